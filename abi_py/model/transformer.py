"""The model as its users see it: ids in, logits or loss and gradients out.

    Transformer       a list of layers over weights of which all, some or none are trained
    TrainableModel    all of them are; `lora.py` has the model of which only adapters are

The two passes over the list are `stack.py`.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt

from ..config import Config, Precision, TrainableModelConfig
from ..errors import CheckpointError
from ..families import layers, tensor_table
from ..formats.encoded import Encoded
from ..formats.finite import check_read, find_nonfinite
from ..formats.forms import to_stored
from ..formats.safetensors import Stack as Stacked
from ..formats.safetensors import Stored
from ..formats.zig import load_abic, save_abic
from ..kernels.engine.number_formats import PRECISIONS
from ..kernels.engine.scratch import aligned_empty
from ..kernels.engine.threads import PASS, threads_as_before, threads_for
from ..kernels.unchecked import global_norm
from ..parameters import Buffers, Parameters, Tensor, Views, Weight
from ..reprs import Shown
from .arena import memory_plan
from .inputs import as_ids, as_labels, as_weights, check_ids, check_numbers
from .layers.layer import Layer
from .layers.run import Check, Objective, Penalties, Run
from .loss_output import LossOutput
from .stack import Runs, Stack, flops_per_token
from .stored import StoredModel, open_stored, open_stored_gguf
from .writable import Writable

__all__ = ["LossOutput", "TrainableModel", "Transformer"]


class Transformer(Shown, Writable):
    """A list of layers; `parameters` are what is trained, and what their gradients are of.

    `base` has the weights of the network itself by name: those that are trained, or those under adapters.
    """

    parameters: Buffers
    storage: str | None = None  # that the matrices were encoded in when they were read (`FrozenModel`)
    draws = 0  # training passes that drew random numbers; the masks of dropout depend on it (`LoraModel`)

    def __init__(self, config: TrainableModelConfig, base: Mapping[str, np.ndarray], layers: Sequence[Layer]) -> None:
        """Prepare for the passes over bound layers; nothing is allocated before the first of them."""
        self.config, self.base = config, base
        self.layers = list(layers)
        self.stack = Stack(config, layers, self.parameters)
        self._runs = Runs()
        self._flops: dict[int, float] = {}  # by length of a row
        self._last: tuple[np.ndarray, Run] | None = None  # ids and run of the forward that the arena holds
        self._added_to: list[np.ndarray] = []  # gradients that a backward pass adds to in any case

    def _says(self) -> str:
        trained, whole = self.num_params(), self.config.num_params()
        count = f"{trained:,} parameters" if trained == whole else f"{trained:,} of {whole:,} parameters trained"
        return f"{self.config.family.value}, {count}: {self.config.in_brief()}"

    # -- what it is made of ----------------------------------------------------------------------

    @property
    def weights(self) -> Views:
        """What is trained by name, float32 views (out, in) into the flat buffer."""
        return self.parameters.weights

    @property
    def gradients(self) -> Views:
        """The gradients by name, of the same shapes: views, see `Buffers.gradients` for how long they hold them."""
        return self.parameters.gradients

    def sections(self) -> dict[str, Config]:
        """Return the sections of a run's config.yaml that describe this model."""
        return {"model": self.config}

    def base_digest(self) -> str:
        """Return the SHA-256 of the frozen weights under adapters; empty where there are none."""
        return ""

    def num_params(self) -> int:
        """Return the number of trained weights."""
        return self.parameters.size

    def collect_weights(self) -> np.ndarray:
        """Return a copy of all weights, float32 (P,), in flat order."""
        return self.parameters.weights_flat.copy()

    def distribute_weights(self, flat: npt.ArrayLike) -> None:
        """Set all weights from one float32 array (P,) in flat order; ValueError if it has another length."""
        array = np.asarray(flat)
        if array.shape != (self.num_params(),):
            raise ValueError(f"flat has shape {array.shape}; this model takes ({self.num_params()},)")
        self.parameters.weights_flat[...] = array

    # -- gradients -------------------------------------------------------------------------------

    def zero_gradients(self) -> None:
        """Make all gradients zero; views that were taken before show it after a new look (`Buffers.zero_gradients`)."""
        self.parameters.zero_gradients()

    def compute_gradient_norm(self) -> float:
        """Return the length of the whole gradient."""
        gradients = self.parameters.gradients_flat
        with threads_as_before(PASS * gradients.size):
            return float(global_norm(gradients))

    def clip_gradients(self, max_norm: float) -> float:
        """Scale the gradient down to length `max_norm` if it is longer; return the length before.

        A length that is NaN or infinite is returned, and the gradient left as it is; so it is for a `max_norm` of 0
        (off).
        """
        norm = self.compute_gradient_norm()
        if norm > max_norm > 0 and math.isfinite(norm):
            self.scale_gradients(max_norm / norm)
        return norm

    def scale_gradients(self, factor: float) -> None:
        """Multiply all gradients by `factor`."""
        self.parameters.gradients_flat[...] *= np.float32(factor)

    def has_non_finite_gradients(self) -> bool:
        """Say whether any gradient is NaN or infinite."""
        return not np.isfinite(self.compute_gradient_norm())

    # -- forward and backward --------------------------------------------------------------------

    def begin_pass(self) -> None:
        """Work out what passes read besides weights, if that has changed."""

    def _begin_backward(self) -> bool:
        """Prepare the gradients for a backward pass; return whether it must add to those of matrices."""
        _, accumulate = self.parameters.gradients_to_write()
        if not accumulate:
            for gradient in self._added_to:
                gradient.fill(0)
        return accumulate

    def _clear_first(self, names: Collection[str]) -> None:
        """Of these tensors, clear before a backward pass the gradients that its layers add to and do not overwrite."""
        overwritten = {name for layer in self.layers for name in layer.overwritten()}
        gradients = (self.parameters.weight(name).dw for name in names if name not in overwritten)
        self._added_to = [dw for dw in gradients if dw is not None]

    def _next_draw(self) -> int | None:
        """Count a training pass with random numbers and return its number; None if it has none."""
        return None

    def forward(
        self,
        input_ids: npt.ArrayLike,
        *,
        attention_mask: npt.ArrayLike | None = None,
        segment_ids: npt.ArrayLike | None = None,
    ) -> np.ndarray:
        """Return logits (B, T, V) float32 for ids (B, T), or flat; `backward` may follow.

        Runs of equal values in attention_mask or segment_ids (B, T) see only themselves. DataError for an id outside
        the vocabulary or a row longer than max_seq_len; TypeError for ids that are no integers.
        """
        ids = as_ids(input_ids, self.config)
        check_ids(ids, input_ids, self.config)
        run = self._runs.run((ids.shape[0], ids.shape[1]), attention_mask, segment_ids)
        self.begin_pass()
        self.stack.forward(ids.ravel(), run)
        logits = aligned_empty((*ids.shape, self.config.vocab_size))
        self.stack.head.logits(logits.reshape(ids.size, -1), self.stack.arrays(run).head, run)
        self._last = (ids, run)
        return logits

    def backward(self, dlogits: np.ndarray) -> None:
        """Add to the gradients, given dlogits (B, T, V) float32 of the logits that the last `forward` returned.

        RuntimeError if no `forward` came before, TypeError or ValueError for another dtype or shape.
        """
        if self._last is None:
            raise RuntimeError("backward needs the activations of a forward; call model.forward(input_ids) first")
        ids, run = self._last
        shape = (*ids.shape, self.config.vocab_size)
        if not isinstance(dlogits, np.ndarray) or dlogits.dtype != np.float32:
            found = getattr(dlogits, "dtype", type(dlogits).__name__)
            raise TypeError(f"dlogits is {found}; it must be a float32 array {shape}")
        if dlogits.shape != shape:
            raise ValueError(f"dlogits has shape {dlogits.shape}; the logits have {shape}")
        rows = np.ascontiguousarray(dlogits).reshape(ids.size, -1)
        run = replace(run, accumulate=self._begin_backward())
        self.stack.head.logits_backward(rows, self.stack.arrays(run).head, run)
        self.stack.backward(ids.ravel(), run)
        self._last = None

    def compute_loss(
        self,
        input_ids: npt.ArrayLike,
        labels: npt.ArrayLike,
        *,
        attention_mask: npt.ArrayLike | None = None,
        segment_ids: npt.ArrayLike | None = None,
        label_weights: npt.ArrayLike | None = None,
        label_smoothing: float = 0.0,
        z_loss: float = 0.0,
        backward: bool = False,
        reduction: str = "mean",
        precision: Precision = Precision.FP32,
        loss_scale: float = 1.0,
        check: Check | None = None,
    ) -> LossOutput:
        """Return the cross-entropy of a batch; with `backward`, add the gradients of its mean (or "sum") as well.

        With precision bf16 all products round their operands to bfloat16, and the widest saved activations are kept in
        it; with fp16 the products of the linear layers and the head round theirs to half precision.  Weights, sums and
        everything else stay float32.  The gradients, but not the losses, are multiplied by loss_scale.  Penalties act
        with `backward` only, and are told apart from the loss: z_loss times the mean of the squared log-sum-exp of the
        logits (1e-4 in PaLM; `kernels/cross_entropy.py`), and what layers add (`layers/run.py`).
        label_weights (B, T), finite and of any sign, multiply the gradients of each label's loss, and z-loss, but not
        the losses themselves; they act with `backward` only.  A "mean" stays that over the labels that count.  So the
        gradient of any objective in the tokens' log-probabilities can be had (docs/4-cross_entropy.md has DPO's).
        `check` is called between layers, and its flag ends attention early (`layers/run.py`); what it raises gives the
        pass up, after which the gradients are undefined if `parameters.passes` has grown.  It cannot read them.
        input_ids, labels (B, T) or flat, integers; a label of -100 (in uint32: 0xFFFFFF9C) does not count.
        DataError for an id or label outside the vocabulary and for shapes that do not fit, ValueError for other numbers
        that do not.
        """
        check_numbers(reduction, label_smoothing, z_loss, loss_scale)
        if precision not in PRECISIONS:
            raise ValueError(f"precision ({precision}) must be one of {', '.join(PRECISIONS)}")
        ids = as_ids(input_ids, self.config)
        check_ids(ids, input_ids, self.config)
        targets = as_labels(labels, ids.shape, self.config).ravel()
        weights = None if label_weights is None else as_weights(label_weights, ids.shape).ravel()
        count = int(np.count_nonzero(targets >= 0))
        scale = loss_scale if reduction == "sum" else loss_scale / max(count, 1)
        alike = count == targets.size and weights is None
        objective = Objective(float(scale), float(label_smoothing), float(z_loss), alike)
        penalties = Penalties(scale * count)
        work = ids.size * self.flops_per_token(ids.shape[1])
        with threads_for(work), self.parameters.lending() as borrows:
            plain = self._runs.run((ids.shape[0], ids.shape[1]), attention_mask, segment_ids, borrows)
            self.begin_pass()
            draw = self._next_draw() if backward else None
            number_format = PRECISIONS[precision]
            same = draw is plain.draw and number_format is plain.number_format and check is None
            run = plain if same else replace(plain, number_format=number_format, draw=draw, check=check)
            self.stack.pass_forward(ids.ravel(), run)
            self._last = None
            s = self.stack.arrays(run).head
            if backward:
                run = replace(run, accumulate=self._begin_backward(), objective=objective, penalties=penalties)
                run = run if weights is None else replace(run, label_weights=weights)
                self.stack.pass_backward(targets, ids.ravel(), run)
            else:
                self.stack.head.loss(targets, s, label_smoothing, run)
        loss_sum = float(s.losses.sum(dtype=np.float64))
        return LossOutput(
            loss=loss_sum / max(count, 1),
            loss_sum=loss_sum,
            num_tokens=count,
            num_correct=int(s.hits.sum()),
            token_losses=s.losses.reshape(ids.shape).copy(),
            penalties=penalties.values,
            expert_loads=self.stack.loads() if backward else None,
        )

    def train_step(self, input_ids: npt.ArrayLike, labels: npt.ArrayLike) -> float:
        """Return the mean loss of a batch and add its gradients; the weights stay as they are."""
        return self.compute_loss(input_ids, labels, backward=True).loss

    # -- what it costs ---------------------------------------------------------------------------

    def memory_plan(
        self, batch_size: int, seq_len: int, precision: Precision = Precision.FP32, *, accumulates: bool = False
    ) -> dict[str, int]:
        """Return the bytes of a step by part, with AdamW; `accumulates`: one of several micro-batches to a window."""
        batch = batch_size, seq_len, precision, accumulates
        if self.base is self.weights:
            return memory_plan(self.config, *batch)
        frozen = sum(w.nbytes for w in self.base.values())
        return memory_plan(self.config, *batch, adapted=(self.layers, self.parameters.table), frozen=frozen)

    def flops_per_token(self, seq_len: int) -> float:
        """Return the operations of a step for one token of a row of seq_len; a multiply-add counts two."""
        if seq_len not in self._flops:
            self._flops[seq_len] = flops_per_token(self.layers, seq_len)
        return self._flops[seq_len]

    def merged(self) -> Transformer:
        """Return a model without adapters that computes the same: this one, where it has none."""
        return self

    @property
    def is_quantized(self) -> bool:
        """Whether a matrix of it is kept in blocks of a few bits a number."""
        return any(weight.storage.block > 1 for layer in self.stack.layers for weight in layer.weights)

    def for_decoding(self) -> Transformer:
        """Return a model that computes the same, with as little as possible to compute for a token."""
        return self.merged()


def zeros(config: TrainableModelConfig) -> np.ndarray:
    """Return (P,) zeros for a model whose weights are set next; they take no memory."""
    return np.broadcast_to(np.float32(0), (config.num_params(),))


class TrainableModel(Transformer):
    """Weights, gradients, and the two passes; see `TrainableModelConfig` for its shape."""

    parameters: Parameters

    def __init__(self, config: TrainableModelConfig, weights: np.ndarray | None = None) -> None:
        """Make a model with a copy of `weights` (P,), or with fresh ones: N(0, 0.02) from `config.seed`, norms 1."""
        self.parameters = Parameters(tensor_table(config), config.seed, weights)
        made = layers(config)
        for layer in made:
            layer.bind(self.parameters.weight)
        super().__init__(config, self.parameters.weights, made)
        self._clear_first(set(self.weights))

    def frozen(self, name: str) -> Weight:
        """Return a tensor for a layer that does not train it."""
        return Weight(name, self.weights[name], None)

    def copy_to(self, name: str, out: np.ndarray) -> None:
        """Write a tensor to `out`, float32 of its shape."""
        np.copyto(out, self.weights[name])

    def widened(self) -> TrainableModel:
        """Return a copy."""
        made = TrainableModel(self.config, self.parameters.weights_flat)
        made.companions = self.companions
        return made

    # -- files -----------------------------------------------------------------------------------

    @classmethod
    def from_pretrained(
        cls, folder: str | Path, config: TrainableModelConfig | None = None, *, allow_nonfinite: bool = False
    ) -> TrainableModel:
        """Return the model of a Hugging Face folder, or of a GGUF file, float32; see `model.stored`.

        `config` is `read_shape(folder)` where that is not changed (gradient checkpointing, another max_seq_len).
        CheckpointError names what does not fit or is not computed here, and NaN or infinity, if not allowed.
        """
        return cls._read(open_stored(Path(folder), config), allow_nonfinite)

    @classmethod
    def from_gguf(
        cls, path: str | Path, config: TrainableModelConfig | None = None, *, allow_nonfinite: bool = False
    ) -> TrainableModel:
        """Return the model of a GGUF file, quantised or not, decoded to float32; see `model.gguf_model`.

        `config` as in `from_pretrained`.  CheckpointError names what does not fit or is not computed here, and NaN or
        infinity, if not allowed.
        """
        return cls._read(open_stored_gguf(Path(path), config), allow_nonfinite)

    @classmethod
    def _read(cls, found: StoredModel, allow_nonfinite: bool) -> TrainableModel:
        model = cls(found.config, zeros(found.config))  # nothing is drawn that is overwritten
        for name, tensor in found.tensors.items():
            tensor.copy_to(model.weights[name])
        if not allow_nonfinite and find_nonfinite(model.parameters.weights_flat) is not None:
            check_read(found.place, found.used)
            check_read(found.place, to_stored(*model.stored_tensors()))  # a float64 that float32 cannot hold
        model.companions = found.companions
        return model

    def stored_tensors(self) -> tuple[tuple[Tensor, ...], Mapping[str, np.ndarray | Stored | Stacked | Encoded]]:
        """Return the table and the weights."""
        return self.parameters.table, dict(self.weights)

    def save_checkpoint(self, path: str | Path, step: int = 0) -> None:
        """Write the weights as a Zig `ABIC` file."""
        save_abic(path, self.parameters.weights_flat, step)

    def load_checkpoint_file(self, path: str | Path, *, allow_nonfinite: bool = False) -> int:
        """Read the weights from a Zig `ABIC` file and return its step.

        CheckpointError if it is of another model, or holds NaN or infinity and not `allow_nonfinite`.
        """
        checkpoint = load_abic(path, allow_nonfinite=allow_nonfinite)
        if checkpoint.weights.size != self.num_params():
            raise CheckpointError(
                f"{path} holds {checkpoint.weights.size} weights, this model has {self.num_params()}; "
                "build the model with the configuration that the file was saved from"
            )
        self.distribute_weights(checkpoint.weights)
        return checkpoint.step
