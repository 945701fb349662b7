"""The optimizer: moments beside the flat weights, and one kernel call for an update.

With muon there is one more for each matrix, with adamw_8bit one more for all tensors whose moments are in 8 bits.  What
is kept, `moments.py` says; the formulas are in `kernels/optimizers.py`, `kernels/muon.py` and `kernels/adamw_8bit.py`.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from ..config import LlmTrainingConfig, MuonScale, OptimizerType
from ..errors import CheckpointError, ConfigError, counted
from ..kernels.adamw_8bit import block_chunks, blocks_of, decode_blocks_ref, encode_blocks_ref
from ..kernels.engine.scratch import aligned_zeros
from ..kernels.engine.threads import PASS, threads_as_before
from ..kernels.muon import muon_flops, muon_ratio
from ..kernels.optimizers import parameter_chunks
from ..kernels.unchecked import adam_, adamw_, adamw_8bit_, muon_, sgd_
from ..parameters import Buffers, Tensor
from ..reprs import Shown
from .moments import coded_of, matrices_of, moments_of, ranges_of, without

__all__ = ["Optimizer", "operations_of", "stack_of"]


def stack_of(entry: Tensor) -> tuple[int, int, int]:
    """Return how many matrices a tensor of two axes or more is, and their rows and columns."""
    *_, rows, columns = entry.shape
    return entry.size // (rows * columns), rows, columns


def operations_of(matrices: Sequence[Tensor], config: LlmTrainingConfig) -> float:
    """Return the operations of muon's products in an update of `matrices`."""
    stacks = map(stack_of, matrices)
    return sum(count * muon_flops(rows, columns, config.muon_steps) for count, rows, columns in stacks)


@dataclass(frozen=True)
class _Stretch:
    """A range of the flat buffer that one kernel call updates."""

    place: slice
    m: slice  # its place in m
    v: slice  # ... and in v
    chunks: np.ndarray  # (n, 2) int64, within it
    decay: np.ndarray  # (n,) bool


def _place_in(ranges: Sequence[slice], place: slice) -> slice:
    """Return where the numbers of a range of the flat buffer are among those of `ranges`; nowhere if not in them."""
    at = 0
    for each in ranges:
        if each.start <= place.start and place.stop <= each.stop:
            start = at + place.start - each.start
            return slice(start, start + place.stop - place.start)
        at += each.stop - each.start
    return slice(0, 0)


class Optimizer(Shown):
    """Update rule and its memory; `step` counts the updates made (Adam's t)."""

    def __init__(self, parameters: Buffers, config: LlmTrainingConfig) -> None:
        """Allocate the moments for `parameters` (model.parameters), float32.

        ConfigError for muon where no hidden matrix is trained: of adapters, the product of two is one.
        """
        self.parameters, self.config, self.step = parameters, config, 0
        table = parameters.table
        self.matrices = matrices_of(table, config)
        if config.optimizer is OptimizerType.MUON and not self.matrices:
            raise ConfigError(
                "optimizer (muon) is for hidden matrices, of which this model trains none: an adapter is half of a "
                "product, and making it orthogonal says nothing about that; use adamw"
            )
        self.coded = coded_of(table, config)
        self._ranges = ranges_of(table, config)
        self.moments = {name: aligned_zeros(kept.shape, kept.dtype) for name, kept in moments_of(table, config).items()}
        self._stretches = self._cut(without(table, [*self.matrices, *self.coded]))
        self._blocks = block_chunks(*self._described(self.coded, 0)) if self._in_8_bits else None
        self._operations = operations_of(self.matrices, config)

    @property
    def _in_8_bits(self) -> bool:
        return self.config.optimizer is OptimizerType.ADAMW_8BIT

    def _says(self) -> str:
        size = sum(moment.nbytes for moment in self.moments.values()) / 1e6
        names = " and ".join(name for name in ("m", "v") if name in self.moments)
        moments = f"moments {names}, {size:,.1f} MB" if names else "no moments"
        return f"{self.config.optimizer.value}, {counted(self.step, 'update')}, {moments}"

    def _described(self, entries: Sequence[Tensor], begin: int) -> tuple[list[int], list[int], list[bool]]:
        """Return where tensors are, counted from `begin`, how large they are, and whether they decay."""
        everything = self.config.decay_norms_and_biases
        sizes, decays = [entry.size for entry in entries], [entry.decay or everything for entry in entries]
        return [entry.offset - begin for entry in entries], sizes, decays

    def _cut(self, ranges: Sequence[slice]) -> list[_Stretch]:
        """Return the stretches of the flat buffer that SGD, Adam or AdamW updates."""
        made = []
        for place in ranges:
            inside = [entry for entry in self.parameters.table if place.start <= entry.offset < place.stop]
            cut = parameter_chunks(*self._described(inside, place.start))
            m, v = (_place_in(self._ranges.get(name, ()), place) for name in ("m", "v"))
            made.append(_Stretch(place, m, v, *cut))
        return made

    # -- the update ------------------------------------------------------------------------------

    def update(self, scale: float, learning_rate: float) -> None:
        """Apply one update; the gradient buffer is multiplied by `scale` (1 / tokens x clip factor) on the way."""
        self.step += 1
        size, scale, rate = self.parameters.weights_flat.size, float(scale), float(learning_rate)
        with threads_as_before(PASS * size + self._operations):
            for entry in self.matrices:
                self._update_matrix(entry, scale, rate)
            for stretch in self._stretches:
                self._update_stretch(stretch, scale, rate)
            if self._blocks is not None:
                self._update_coded(self._blocks, scale, rate)

    def _update_stretch(self, stretch: _Stretch, scale: float, rate: float) -> None:
        config, place, cut = self.config, stretch.place, (stretch.chunks, stretch.decay)
        weights, gradients = self.parameters.weights_flat[place], self.parameters.gradients_flat[place]
        m = self.moments.get("m", np.zeros(0, np.float32))[stretch.m]
        decay = config.weight_decay
        if config.optimizer is OptimizerType.SGD:
            sgd_(weights, m, gradients, *cut, rate, config.momentum, decay, config.nesterov, scale)
            return
        rule = adam_ if config.optimizer is OptimizerType.ADAM else adamw_
        betas = (config.beta1, config.beta2, config.epsilon)
        rule(weights, m, self.moments["v"][stretch.v], gradients, *cut, rate, *betas, decay, self.step, scale)

    def _update_coded(self, cut: tuple[np.ndarray, np.ndarray], scale: float, rate: float) -> None:
        """Update the tensors whose moments are in 8 bits."""
        config, flat = self.config, self.parameters
        kept = [self.moments[name] for name in ("m_codes", "m_scales", "v_codes", "v_scales")]
        settings = rate, config.beta1, config.beta2, config.epsilon, config.weight_decay, self.step, scale
        adamw_8bit_(flat.weights_flat, *kept, flat.gradients_flat, *cut, *settings)

    def _update_matrix(self, entry: Tensor, scale: float, rate: float) -> None:
        """Update a matrix by muon; of a stack of them each by itself."""
        config, flat, (_, rows, columns) = self.config, self.parameters, stack_of(entry)
        ratio = muon_ratio(rows, columns, config.muon_scale is MuonScale.MATCH_RMS_ADAMW)
        settings = config.muon_momentum, config.muon_nesterov, config.weight_decay, config.muon_steps
        whole = (flat.weights_flat, self.moments["m"], flat.gradients_flat)
        stacks = (each[entry.slice].reshape(-1, rows, columns) for each in whole)
        for w, m, g in zip(*stacks, strict=True):
            muon_(w, m, g, rate * config.muon_rate, ratio, *settings, scale)

    # -- the moments, elsewhere ------------------------------------------------------------------

    def load(self, moments: Mapping[str, np.ndarray], step: int) -> None:
        """Take over the moments, by the names and in the types of `moments_of`, and the number of updates in them."""
        if set(moments) != set(self.moments):
            found, wanted = sorted(moments) or ["none"], sorted(self.moments) or ["none"]
            raise CheckpointError(
                f"the checkpoint holds the moments {', '.join(found)}, but {self.config.optimizer.value} (momentum "
                f"{self.config.momentum}) needs {', '.join(wanted)}; resume with the optimizer of the checkpoint"
            )
        for name, moment in moments.items():
            mine = self.moments[name]
            if moment.shape != mine.shape or moment.dtype != mine.dtype:
                kind = "" if moment.dtype == mine.dtype else f" of {moment.dtype}"
                raise CheckpointError(
                    f"{name} has {moment.size} numbers{kind}, but {self.config.optimizer.value} needs {mine.size} "
                    "here; resume with the optimizer and the model of the checkpoint"
                )
        for name, moment in moments.items():
            self.moments[name][:] = moment
        self.step = step

    def load_flat(self, moments: Mapping[str, np.ndarray], step: int) -> None:
        """Take over moments of all weights, (P,) float32; what this optimizer does not keep is left out."""
        found = {}
        for name, ranges in self._ranges.items():
            found[name] = np.concatenate([np.zeros(0, np.float32), *(moments[name][each] for each in ranges)])
        if self._in_8_bits:
            for name in ("m", "v"):
                codes, scales = (self.moments[f"{name}_{kind}"].copy() for kind in ("codes", "scales"))
                for entry, blocks in self._with_blocks():
                    codes[blocks], scales[blocks] = encode_blocks_ref(moments[name][entry.slice], name == "m")
                found |= {f"{name}_codes": codes, f"{name}_scales": scales}
        self.load(found, step)

    def flat(self, name: str) -> np.ndarray:
        """Return the moment m or v of all weights, (P,) float32; zeros where it is not kept."""
        whole, at = np.zeros(self.parameters.weights_flat.size, np.float32), 0
        for each in self._ranges.get(name, ()):
            size = each.stop - each.start
            whole[each] = self.moments[name][at : at + size]
            at += size
        for entry, blocks in self._with_blocks():
            codes, scales = self.moments[f"{name}_codes"][blocks], self.moments[f"{name}_scales"][blocks]
            whole[entry.slice] = decode_blocks_ref(codes, scales, entry.size, name == "m")
        return whole

    def _with_blocks(self) -> Iterator[tuple[Tensor, slice]]:
        """Yield the tensors whose moments are in 8 bits, each with its place among the blocks."""
        at = 0
        for entry in self.coded:
            yield entry, slice(at, at + blocks_of(entry.size))
            at += blocks_of(entry.size)

    def reset(self) -> None:
        """Forget all updates."""
        self.step = 0
        for moment in self.moments.values():
            moment.fill(0)

    def copy_moments(self) -> dict[str, np.ndarray]:
        """Return copies of the moments."""
        return {name: moment.copy() for name, moment in self.moments.items()}
