"""The optimizer: moments beside the flat weights, and one kernel call for an update; with muon one more a matrix.

What is kept, by name, for which ranges of the flat buffer (`moments_of`):

    sgd            m (P,) with momentum; nothing without
    adam, adamw    m and v (P,)
    muon           m (P,), and v for what is no hidden matrix and so is adamw's

The formulas are in `kernels/optimizers.py` and `kernels/muon.py`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from ..config import LlmTrainingConfig, MuonScale, OptimizerType
from ..errors import CheckpointError, ConfigError, counted
from ..kernels.engine.scratch import aligned_zeros
from ..kernels.engine.threads import PASS, threads_as_before
from ..kernels.muon import muon_flops, muon_ratio
from ..kernels.optimizers import parameter_chunks
from ..kernels.unchecked import adam_, adamw_, muon_, sgd_
from ..parameters import Buffers, Tensor
from ..reprs import Shown

__all__ = ["Optimizer", "matrices_of", "moments_of", "operations_of", "stack_of"]


def matrices_of(table: Sequence[Tensor], config: LlmTrainingConfig) -> list[Tensor]:
    """Return the tensors that muon takes: hidden matrices, and stacks of them; none with another optimizer."""
    return [entry for entry in table if entry.hidden and config.optimizer is OptimizerType.MUON]


def stack_of(entry: Tensor) -> tuple[int, int, int]:
    """Return how many matrices a tensor of two axes or more is, and their rows and columns."""
    *_, rows, columns = entry.shape
    return entry.size // (rows * columns), rows, columns


def _between(table: Sequence[Tensor], taken: Sequence[Tensor]) -> list[slice]:
    """Return the ranges of the flat buffer without the tensors `taken`, neighbours together."""
    ranges: list[slice] = []
    names = {entry.name for entry in taken}
    for entry in table:
        if entry.name in names:
            continue
        joins = ranges and ranges[-1].stop == entry.offset
        start = ranges.pop().start if joins else entry.offset
        ranges.append(slice(start, entry.offset + entry.size))
    return ranges


def operations_of(matrices: Sequence[Tensor], config: LlmTrainingConfig) -> float:
    """Return the operations of muon's products in an update of `matrices`."""
    stacks = map(stack_of, matrices)
    return sum(count * muon_flops(rows, columns, config.muon_steps) for count, rows, columns in stacks)


def moments_of(table: Sequence[Tensor], config: LlmTrainingConfig) -> dict[str, list[slice]]:
    """Return the moments by name, each as the ranges of the flat buffer that it has numbers for."""
    whole = _between(table, ())
    if config.optimizer is OptimizerType.SGD:
        return {"m": whole} if config.momentum > 0 else {}
    return {"m": whole, "v": _between(table, matrices_of(table, config))}


def _length(ranges: Sequence[slice]) -> int:
    return sum(each.stop - each.start for each in ranges)


@dataclass(frozen=True)
class _Stretch:
    """A range of the flat buffer that one kernel call updates."""

    place: slice
    v: slice  # its place in v
    chunks: np.ndarray  # (n, 2) int64, within it
    decay: np.ndarray  # (n,) bool


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
        self._ranges = moments_of(table, config)
        self.moments = {name: aligned_zeros(_length(ranges)) for name, ranges in self._ranges.items()}
        self._stretches = self._cut(_between(table, self.matrices))
        self._operations = operations_of(self.matrices, config)

    def _says(self) -> str:
        size = sum(moment.nbytes for moment in self.moments.values()) / 1e6
        moments = f"moments {' and '.join(self.moments)}, {size:,.1f} MB" if self.moments else "no moments"
        return f"{self.config.optimizer.value}, {counted(self.step, 'update')}, {moments}"

    def _cut(self, ranges: Sequence[slice]) -> list[_Stretch]:
        """Return the stretches of the flat buffer that SGD, Adam or AdamW updates."""
        made, at = [], 0
        for place in ranges:
            inside = [entry for entry in self.parameters.table if place.start <= entry.offset < place.stop]
            chunks, decay = parameter_chunks(
                [entry.offset - place.start for entry in inside],
                [entry.size for entry in inside],
                [entry.decay or self.config.decay_norms_and_biases for entry in inside],
            )
            size = place.stop - place.start
            made.append(_Stretch(place, slice(at, at + size), chunks, decay))
            at += size
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

    def _update_stretch(self, stretch: _Stretch, scale: float, rate: float) -> None:
        config, place, cut = self.config, stretch.place, (stretch.chunks, stretch.decay)
        weights, gradients = self.parameters.weights_flat[place], self.parameters.gradients_flat[place]
        m = self.moments.get("m", np.zeros(0, np.float32))[place]
        decay = config.weight_decay
        if config.optimizer is OptimizerType.SGD:
            sgd_(weights, m, gradients, *cut, rate, config.momentum, decay, config.nesterov, scale)
            return
        rule = adam_ if config.optimizer is OptimizerType.ADAM else adamw_
        betas = (config.beta1, config.beta2, config.epsilon)
        rule(weights, m, self.moments["v"][stretch.v], gradients, *cut, rate, *betas, decay, self.step, scale)

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
        """Take over the moments, float32 under the names m and v, and the number of updates in them."""
        if set(moments) != set(self.moments):
            found, wanted = sorted(moments) or ["none"], sorted(self.moments) or ["none"]
            raise CheckpointError(
                f"the checkpoint holds the moments {', '.join(found)}, but {self.config.optimizer.value} (momentum "
                f"{self.config.momentum}) needs {', '.join(wanted)}; resume with the optimizer of the checkpoint"
            )
        for name, moment in moments.items():
            if moment.shape != self.moments[name].shape:
                raise CheckpointError(
                    f"{name} has {moment.size} numbers, but {self.config.optimizer.value} needs "
                    f"{self.moments[name].size} here; resume with the optimizer and the model of the checkpoint"
                )
        for name, moment in moments.items():
            self.moments[name][:] = moment
        self.step = step

    def load_flat(self, moments: Mapping[str, np.ndarray], step: int) -> None:
        """Take over moments of all weights, (P,) float32; what this optimizer does not keep is left out."""
        self.load(
            {name: np.concatenate([moments[name][each] for each in ranges]) for name, ranges in self._ranges.items()},
            step,
        )

    def flat(self, name: str) -> np.ndarray:
        """Return a moment for all weights, (P,) float32; zeros where it is not kept."""
        whole, at = np.zeros(self.parameters.weights_flat.size, np.float32), 0
        for each in self._ranges.get(name, ()):
            size = each.stop - each.start
            whole[each] = self.moments[name][at : at + size]
            at += size
        return whole

    def reset(self) -> None:
        """Forget all updates."""
        self.step = 0
        for moment in self.moments.values():
            moment.fill(0)

    def copy_moments(self) -> dict[str, np.ndarray]:
        """Return copies of the moments."""
        return {name: moment.copy() for name, moment in self.moments.items()}
