"""A Llama-family transformer whose forward and backward are lists of kernel calls.

    forward    x = embedding(ids);  L x block;  hidden = rms_norm(x);  head and loss in one operation
    backward   the same list in reverse

Batches are (B, T) ids; inside, all is rows: N = B T.  Samples never see each other, and neither do the segments of a
packed row.

    Transformer       the two passes, over weights of which all, some or none are trained
    TrainableModel    all of them are; `lora.py` has the model of which only adapters are
"""

import math
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt

from ..config import CheckpointingStrategy, Config, Precision, TrainableModelConfig
from ..errors import CheckpointError
from ..formats.zig import load_abic, save_abic
from ..kernels.engine.number_formats import BFLOAT16, FLOAT16, FLOAT32
from ..kernels.engine.threads import PASS, threads_as_before, threads_for
from ..kernels.unchecked import (
    embedding_backward,
    embedding_forward,
    global_norm,
    head_loss,
    head_loss_backward,
    product,
    rms_norm_backward,
    rms_norm_forward,
)
from ..parameters import Buffers, Parameters, Views, head_name
from .activations import NO_ADAPTERS, AdapterWidths, Arena, memory_plan, segment_length
from .block import BlockGradients, BlockWeights, attention_branch, block_backward, block_forward
from .inputs import Layout, Layouts, as_ids, as_labels, check_ids

__all__ = ["Gradients", "LossOutput", "TrainableModel", "Transformer"]

NUMBER_FORMATS = {Precision.FP32: FLOAT32, Precision.BF16: BFLOAT16, Precision.FP16: FLOAT16}  # what products multiply


@dataclass(frozen=True)
class LossOutput:
    """Result of one batch: sums over the labels that count, and the loss of each token."""

    loss: float  # mean over the labels that count; 0 if there is none
    loss_sum: float
    num_tokens: int
    num_correct: int
    token_losses: np.ndarray  # (B, T) float32, 0 where the label does not count


@dataclass(frozen=True)
class Gradients:
    """Where a backward pass writes: matrices are added to if `accumulate`, vectors and the embedding always.

    None means a frozen matrix.
    """

    head: np.ndarray | None
    token_embedding: np.ndarray | None
    final_norm: np.ndarray
    blocks: list[BlockGradients]
    accumulate: bool


class Transformer:
    """The two passes over the weights `base`; `parameters` are what is trained, and what their gradients are of."""

    parameters: Buffers
    draws = 0  # training passes that drew random numbers; the masks of dropout depend on it (`LoraModel`)

    def __init__(
        self,
        config: TrainableModelConfig,
        base: Parameters,
        blocks: list[BlockWeights],
        adapters: AdapterWidths = NO_ADAPTERS,
    ) -> None:
        """Prepare for the passes; nothing is allocated before the first of them."""
        self.config = config
        self.base, self.blocks = base, blocks
        self._arena, self._layouts = Arena(config, adapters), Layouts(config)
        self._last: tuple[np.ndarray, Layout] | None = None  # ids and layout of the forward that the arena holds

    # -- what it is made of ----------------------------------------------------------------------

    @property
    def weights(self) -> Views:
        """What is trained by name, float32 views (out, in) into the flat buffer."""
        return self.parameters.weights

    @property
    def gradients(self) -> Views:
        """The gradients by name, of the same shapes."""
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
        """Make all gradients zero."""
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

    def _segments(self) -> list[range]:
        length, layers = segment_length(self.config), self.config.num_layers
        return [range(i, min(i + length, layers)) for i in range(0, layers, length)]

    def _run_segment(self, segment: range, layout: Layout, rows: int, redo: bool = False) -> None:
        """Run the blocks of a segment; a repeated run leaves out the last block's output, which is there already."""
        layers, scratch = self._arena.views(rows, layout.narrow)
        for i in segment:
            last = i == self.config.num_layers - 1
            out = scratch.final if last else layers[i + 1].x
            if redo and i == segment[-1]:
                out = scratch.dn  # not needed again, and its place may hold what is
            block_forward(out, self.blocks[i], layers[i], scratch, layout, self.config)

    def _forward(self, ids: np.ndarray, layout: Layout) -> np.ndarray:
        """Return hidden (N, C), the input of the head; the arena keeps what backward needs."""
        layers, scratch = self._arena.views(ids.size, layout.narrow)
        weights = self.base.weights
        embedding_forward(layers[0].x, ids.ravel(), weights["token_embedding"])
        for segment in self._segments():
            self._run_segment(segment, layout, ids.size)
        rms_norm_forward(scratch.hidden, scratch.r_final, scratch.final, weights["final_norm"], self.config.norm_eps)
        return scratch.hidden

    def _backward(self, ids: np.ndarray, layout: Layout, gradients: Gradients) -> None:
        """Go from scratch.dn, the gradient of the head's input, to the gradients of what is trained."""
        layers, scratch = self._arena.views(ids.size, layout.narrow)
        norm, dx = self.base.weights["final_norm"], scratch.dx
        rms_norm_backward(dx, gradients.final_norm, scratch.dn, scratch.final, norm, scratch.r_final, False)
        segments = self._segments()
        for segment in reversed(segments):
            if segment is not segments[-1]:
                self._run_segment(segment, layout, ids.size, redo=True)
            for i in reversed(segment):
                w, dw, a = self.blocks[i], gradients.blocks[i], layers[i]
                if self.config.checkpointing is CheckpointingStrategy.ATTENTION_ONLY and i != segments[-1][-1]:
                    attention_branch(w, a, scratch, layout, self.config)
                wanted = i > 0 or gradients.token_embedding is not None
                block_backward(dx, dw, w, a, scratch, layout, self.config, gradients.accumulate, wanted)
        if gradients.token_embedding is not None:
            embedding_backward(gradients.token_embedding, dx, ids.ravel())

    def _gradients_to_write(self) -> Gradients:
        """Return where a backward pass writes."""
        raise NotImplementedError

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
        layout = self._layouts.layout((ids.shape[0], ids.shape[1]), attention_mask, segment_ids)
        hidden = self._forward(ids, layout)
        logits = np.empty((*ids.shape, self.config.vocab_size), np.float32)
        product(logits.reshape(ids.size, -1), hidden, self.base.weights[head_name(self.config)], transpose_b=True)
        self._last = (ids, layout)
        return logits

    def backward(self, dlogits: np.ndarray) -> None:
        """Add to the gradients, given dlogits (B, T, V) float32 of the logits that the last `forward` returned.

        RuntimeError if no `forward` came before, TypeError or ValueError for another dtype or shape.
        """
        if self._last is None:
            raise RuntimeError("backward needs the activations of a forward; call model.forward(input_ids) first")
        ids, layout = self._last
        shape = (*ids.shape, self.config.vocab_size)
        if not isinstance(dlogits, np.ndarray) or dlogits.dtype != np.float32:
            found = getattr(dlogits, "dtype", type(dlogits).__name__)
            raise TypeError(f"dlogits is {found}; it must be a float32 array {shape}")
        if dlogits.shape != shape:
            raise ValueError(f"dlogits has shape {dlogits.shape}; the logits have {shape}")
        _, scratch = self._arena.views(ids.size)
        rows = np.ascontiguousarray(dlogits).reshape(ids.size, -1)
        gradients = self._gradients_to_write()
        dw = gradients.head
        if dw is not None:
            product(dw, rows, scratch.hidden, transpose_a=True, addend=dw if gradients.accumulate else None)
        product(scratch.dn, rows, self.base.weights[head_name(self.config)])
        self._backward(ids, layout, gradients)
        self._last = None

    def compute_loss(
        self,
        input_ids: npt.ArrayLike,
        labels: npt.ArrayLike,
        *,
        attention_mask: npt.ArrayLike | None = None,
        segment_ids: npt.ArrayLike | None = None,
        label_smoothing: float = 0.0,
        backward: bool = False,
        reduction: str = "mean",
        precision: Precision = Precision.FP32,
        loss_scale: float = 1.0,
    ) -> LossOutput:
        """Return the cross-entropy of a batch; with `backward`, add the gradients of its mean (or "sum") as well.

        With precision bf16 all products round their operands to bfloat16, and the widest saved activations are kept in
        it; with fp16 the products of the linear layers and the head round theirs to half precision.  Weights, sums and
        everything else stay float32.  The gradients, but not the losses, are multiplied by loss_scale.
        input_ids, labels (B, T) or flat, integers; a label of -100 (in uint32: 0xFFFFFF9C) does not count.
        DataError for an id or label outside the vocabulary and for shapes that do not fit.
        """
        if reduction not in ("mean", "sum"):
            raise ValueError(f"reduction ({reduction}) must be mean or sum")
        if not 0 <= label_smoothing < 1:
            raise ValueError(f"label_smoothing ({label_smoothing}) must be at least 0 and below 1; try 0.1")
        if precision not in NUMBER_FORMATS:
            raise ValueError(f"precision ({precision}) must be one of {', '.join(NUMBER_FORMATS)}")
        if not 0 < loss_scale < math.inf:
            raise ValueError(f"loss_scale ({loss_scale}) must be a positive number; 1 leaves the gradients as they are")
        ids = as_ids(input_ids, self.config)
        check_ids(ids, input_ids, self.config)
        targets = as_labels(labels, ids.shape, self.config).ravel()
        layout = self._layouts.layout((ids.shape[0], ids.shape[1]), attention_mask, segment_ids)
        layout = replace(layout, number_format=NUMBER_FORMATS[precision], draw=self._next_draw() if backward else None)
        count = int(np.count_nonzero(targets >= 0))
        head, number_format = self.base.weights[head_name(self.config)], layout.number_format
        with threads_for(ids.size * self.flops_per_token(ids.shape[1])):
            hidden = self._forward(ids, layout)
            self._last = None
            _, scratch = self._arena.views(ids.size, layout.narrow)
            results = scratch.losses, scratch.hits
            if backward:
                gradients = self._gradients_to_write()
                scale = loss_scale if reduction == "sum" else loss_scale / max(count, 1)
                options = scale, label_smoothing, gradients.accumulate, number_format
                head_loss_backward(*results, scratch.dn, gradients.head, hidden, head, targets, scratch.head, *options)
                self._backward(ids, layout, gradients)
            else:
                head_loss(*results, hidden, head, targets, scratch.head, label_smoothing, number_format)
        loss_sum = float(scratch.losses.sum(dtype=np.float64))
        return LossOutput(
            loss=loss_sum / max(count, 1),
            loss_sum=loss_sum,
            num_tokens=count,
            num_correct=int(scratch.hits.sum()),
            token_losses=scratch.losses.reshape(ids.shape).copy(),
        )

    def train_step(self, input_ids: npt.ArrayLike, labels: npt.ArrayLike) -> float:
        """Return the mean loss of a batch and add its gradients; the weights stay as they are."""
        return self.compute_loss(input_ids, labels, backward=True).loss

    # -- what it costs ---------------------------------------------------------------------------

    def memory_plan(
        self, batch_size: int, seq_len: int, precision: Precision = Precision.FP32
    ) -> dict[str, int]:
        """Return the bytes of a training step by part, for AdamW and batches of (batch_size, seq_len)."""
        added = 0 if self.base is self.parameters else self.num_params()
        return memory_plan(self.config, batch_size, seq_len, precision, self._arena.adapters, added)

    def flops_per_token(self, seq_len: int) -> float:
        """Return the operations of a step for one token of a row of seq_len; a multiply-add counts two."""
        raise NotImplementedError


class TrainableModel(Transformer):
    """Weights, gradients, and the two passes; see `TrainableModelConfig` for its shape."""

    parameters: Parameters

    def __init__(self, config: TrainableModelConfig, weights: np.ndarray | None = None) -> None:
        """Make a model with a copy of `weights` (P,), or with fresh ones: N(0, 0.02) from `config.seed`, norms 1."""
        self.parameters = Parameters(config, weights)
        layers = range(config.num_layers)
        super().__init__(config, self.parameters, [BlockWeights(self.parameters, i, {}) for i in layers])
        gradients, table = self.parameters.gradients, self.parameters.table
        blocks = [BlockGradients(self.parameters, i) for i in layers]
        self._destinations = {  # by `accumulate`
            accumulate: Gradients(
                head=gradients[head_name(self.config)],
                token_embedding=gradients["token_embedding"],
                final_norm=gradients["final_norm"],
                blocks=blocks,
                accumulate=accumulate,
            )
            for accumulate in (False, True)
        }
        added_to = ("token_embedding",) if not config.tie_embeddings else ()
        self._added_to = [gradients[t.name] for t in table if len(t.shape) == 1 or t.name in added_to]

    def merged(self) -> "TrainableModel":
        """Return a model without adapters that computes the same: this one."""
        return self

    def _gradients_to_write(self) -> Gradients:
        _, accumulate = self.parameters.gradients_to_write()
        if not accumulate:
            for gradient in self._added_to:  # by kernels, in any case
                gradient.fill(0)
        return self._destinations[accumulate]

    # -- files -----------------------------------------------------------------------------------

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

    def flops_per_token(self, seq_len: int) -> float:
        """Return the operations of forward and backward for one token of a row of seq_len; a multiply-add counts two.

        Six for each weight of a matrix (Kaplan et al. 2020, section 2.1), counting the head and not the embedding,
        plus 12 for each query width and visible key; a query sees (seq_len + 1) / 2 keys on average.
        """
        c, layers = self.config, self.config.num_layers
        matrices = layers * c.hidden_dim * (2 * c.q_dim + 2 * c.kv_dim + 3 * c.intermediate_dim)
        return 6.0 * (matrices + c.vocab_size * c.hidden_dim) + 12.0 * layers * c.q_dim * (seq_len + 1) / 2
