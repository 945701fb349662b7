"""The small names of the ABI's training module: thin, on the kernels and classes that the trainer itself uses.

`docs/zig-differences.md` lists every name that the ABI exports and where it is here; what takes Zig's allocator there
takes nothing here, and what writes into a buffer returns an array.
"""

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from .config import LlmTrainingConfig, LoraConfig
from .data.batch import TokenArray
from .data.tokens import TokenizedDataset
from .errors import CheckpointError, ConfigError, DataError
from .formats.zig import AbicCheckpoint as Checkpoint
from .formats.zig import AblcCheckpoint as LlmCheckpoint
from .formats.zig import load_abic as load_checkpoint
from .formats.zig import load_ablc as load_llm_checkpoint
from .formats.zig import save_abic as save_checkpoint
from .formats.zig import save_ablc as save_llm_checkpoint
from .kernels.cross_entropy import cross_entropy
from .kernels.global_norm import global_norm
from .kernels.matmul import matmul
from .reprs import Shown
from .training.events import CheckpointEvent, EventHub, ScalarEvent
from .training.loggers import configured_sinks
from .training.precision import LossScaler, LossScalerStats, MixedPrecisionConfig
from .training.report import perplexity
from .training.schedule import learning_rate

__all__ = [
    "Checkpoint",
    "CheckpointStore",
    "CrossEntropyLoss",
    "FocalLoss",
    "GradientAccumulator",
    "LlmCheckpoint",
    "LoraAdapter",
    "MSELoss",
    "MixedPrecisionContext",
    "TrainingLogMetric",
    "TrainingLogger",
    "calculate_learning_rate",
    "clip_gradients",
    "kl_divergence",
    "load_checkpoint",
    "load_llm_checkpoint",
    "perplexity",
    "read_token_bin_file",
    "save_checkpoint",
    "save_llm_checkpoint",
    "write_token_bin_file",
]

Floats = npt.NDArray[np.floating[Any]]
Array32 = npt.NDArray[np.float32]
REDUCTIONS = ("none", "mean", "sum")


# -- losses --------------------------------------------------------------------------------------


class CrossEntropyLoss(Shown):
    """Cross-entropy of logits, by the kernel of the head (`kernels/cross_entropy.py`).

    reduction  mean over the labels that count, sum, or none: then `forward` still returns the sum, and `losses` has the
               loss (N,) of each row
    """

    def __init__(self, vocab_size: int, label_smoothing: float = 0.0, reduction: str = "mean") -> None:
        """Take the number of classes; ConfigError for values out of range."""
        if reduction not in REDUCTIONS:
            raise ConfigError(f"reduction ({reduction}) must be one of {', '.join(REDUCTIONS)}; the usual one is mean")
        self.vocab_size, self.reduction = vocab_size, reduction
        self.ignore_index = -1
        self.losses: Array32 = np.zeros(0, np.float32)
        self.last_loss, self.valid_count = 0.0, 0
        self._gradient: Array32 = np.zeros((0, vocab_size), np.float32)
        self.set_label_smoothing(label_smoothing)

    def set_label_smoothing(self, smoothing: float) -> None:
        """Spread this share of the target evenly; ConfigError unless 0 <= smoothing < 1."""
        if not 0 <= smoothing < 1:
            raise ConfigError(f"label_smoothing ({smoothing}) must be at least 0 and below 1; the usual value is 0.1")
        self.label_smoothing = float(smoothing)

    def set_ignore_index(self, index: int) -> None:
        """Leave labels of this value out; negative ones never count."""
        self.ignore_index = int(index)

    def forward(self, logits: npt.ArrayLike, targets: npt.ArrayLike) -> float:
        """Return the loss of logits (N, V), float32 inside, and targets (N,); DataError where the shapes do not fit."""
        z, labels = np.array(logits, np.float32), np.asarray(targets).astype(np.int64)
        if z.ndim != 2 or z.shape[1] != self.vocab_size or labels.shape != z.shape[:1]:
            raise DataError(
                f"logits {z.shape} and targets {labels.shape} must be (N, {self.vocab_size}) and (N,); reshape them"
            )
        labels = np.where((labels == self.ignore_index) | (labels < 0), -1, labels).astype(np.int32)
        rows = np.flatnonzero(labels >= 0).astype(np.int32)
        self.losses, hits = np.zeros(len(z), np.float32), np.zeros(len(z), np.uint8)
        counted = np.ascontiguousarray(z[rows])
        numbers = self.label_smoothing, 0.0, 1.0
        outputs, ones = (self.losses, hits, np.zeros_like(self.losses)), np.ones_like(self.losses)
        cross_entropy(counted, *outputs, labels, ones, rows, 0, *numbers, True)
        self.valid_count = len(rows)
        self._gradient = np.zeros_like(z)
        self._gradient[rows] = counted
        total = float(self.losses.sum(dtype=np.float64))
        self.last_loss = total / max(1, self.valid_count) if self.reduction == "mean" else total
        return self.last_loss

    def backward(self) -> Array32:
        """Return the gradient (N, V) of the last `forward` in its logits; rows that do not count are zero."""
        return self._gradient / np.float32(max(1, self.valid_count)) if self.reduction == "mean" else self._gradient

    def get_loss(self) -> float:
        """Return the last loss."""
        return self.last_loss

    def get_perplexity(self) -> float:
        """Return exp of the last loss."""
        return perplexity(self.last_loss)


class MSELoss(Shown):
    """Mean squared error."""

    def forward(self, prediction: npt.ArrayLike, target: npt.ArrayLike) -> float:
        """Return mean (p - t)^2 over all elements."""
        return float(np.square(np.subtract(prediction, target, dtype=np.float64)).mean())

    def backward(self, prediction: npt.ArrayLike, target: npt.ArrayLike) -> Floats:
        """Return its gradient 2 (p - t) / n in the prediction, as float64."""
        difference: Floats = np.subtract(prediction, target, dtype=np.float64)
        return 2 * difference / difference.size


class FocalLoss(Shown):
    """-alpha (1 - p)^gamma log p of the right class, mean over rows (Lin et al. 2017, arXiv:1708.02002)."""

    def __init__(self, alpha: float = 0.25, gamma: float = 2.0) -> None:
        """Take the two constants; the defaults are the paper's."""
        self.alpha, self.gamma = alpha, gamma

    def forward(self, probabilities: npt.ArrayLike, targets: npt.ArrayLike) -> float:
        """Return the loss of probabilities (N, V) and targets (N,)."""
        p = np.asarray(probabilities, np.float64)[np.arange(len(np.asarray(targets))), np.asarray(targets)]
        with np.errstate(divide="ignore"):
            return float((-self.alpha * (1 - p) ** self.gamma * np.log(p)).mean())


def kl_divergence(p: npt.ArrayLike, q: npt.ArrayLike) -> float:
    """Return sum p log(p / q) of two distributions; infinity where q is 0 and p is not."""
    first, second = np.asarray(p, np.float64), np.asarray(q, np.float64)
    with np.errstate(divide="ignore"):
        return float((first[first > 0] * np.log(first[first > 0] / second[first > 0])).sum())


# -- gradients -----------------------------------------------------------------------------------


class GradientAccumulator(Shown):
    """A running sum of gradients (P,) and how many were added."""

    def __init__(self, size: int) -> None:
        """Begin with nothing."""
        self.sum: Array32 = np.zeros(size, np.float32)
        self.count = 0

    def reset(self) -> None:
        """Forget everything."""
        self.sum.fill(0)
        self.count = 0

    def add(self, gradient: npt.ArrayLike) -> None:
        """Add a gradient; DataError for another size."""
        given = np.asarray(gradient, np.float32)
        if given.shape != self.sum.shape:
            raise DataError(f"gradient has shape {given.shape}, must have {self.sum.shape}; it is of another model")
        self.sum += given
        self.count += 1

    def average(self) -> Array32:
        """Return the mean; DataError when nothing was added."""
        if not self.count:
            raise DataError("average of no gradients; call add first")
        return self.sum / np.float32(self.count)

    def apply(self, weights: Array32, learning_rate: float) -> None:
        """Take a step of plain gradient descent along the mean, in place."""
        weights -= np.float32(learning_rate) * self.average()


def clip_gradients(gradients: Array32, max_norm: float) -> float:
    """Scale gradients (P,) float32 in place to a norm of at most `max_norm` (0 = off); return the norm before."""
    norm = float(global_norm(gradients))
    if 0 < max_norm < norm:
        gradients *= np.float32(max_norm / norm)
    return norm


def calculate_learning_rate(config: LlmTrainingConfig, step: int, base_lr: float | None = None) -> float:
    """Return the rate of the update after `step` finished ones; `base_lr` is the peak instead of the config's."""
    return learning_rate(config if base_lr is None else config.replace(learning_rate=base_lr), step)


class MixedPrecisionContext(Shown):
    """A `LossScaler` that scales, unscales and follows in the ABI's two calls; passes everything on if not enabled."""

    def __init__(self, config: MixedPrecisionConfig) -> None:
        """Begin at the configuration's scale."""
        self.scaler = LossScaler(config)
        self._skip = False

    def prepare_loss(self, loss: float) -> float:
        """Return the scaled loss."""
        return self.scaler.scale_loss(loss)

    def process_gradients(self, gradients: Array32) -> bool:
        """Unscale in place and let the scale follow; return whether the step may be taken."""
        valid = self.scaler.unscale_gradients(gradients)
        self.scaler.update(valid)
        self._skip = not valid
        return valid

    def should_skip_step(self) -> bool:
        """Return whether the last gradients were not finite."""
        return self._skip

    def get_stats(self) -> LossScalerStats:
        """Return scale and counters."""
        return self.scaler.get_stats()


# -- an adapter by itself ------------------------------------------------------------------------


class LoraAdapter(Shown):
    """The low-rank change of one linear layer: y = scaling x aᵀ bᵀ, with a (R, in) and b (out, R), as in the paper.

    The ABI calls the two the other way round.  `LoraModel` puts adapters into a whole model.
    """

    def __init__(self, in_features: int, out_features: int, config: LoraConfig | None = None) -> None:
        """Begin with b = 0, so that the change is none; a is drawn like those of `LoraModel`.

        ConfigError for DoRA, which changes what the weights compute: that is `LoraModel`'s.
        """
        config = config if config is not None else LoraConfig()
        if config.use_dora:
            raise ConfigError("use_dora (True) must be False here: an adapter by itself has no weights; take LoraModel")
        bound = in_features**-0.5
        drawn = np.random.default_rng(config.seed).uniform(-bound, bound, (config.rank, in_features))
        self.a: Array32 = drawn.astype(np.float32)
        self.b: Array32 = np.zeros((out_features, config.rank), np.float32)
        self.d_a, self.d_b = np.zeros_like(self.a), np.zeros_like(self.b)
        self.scaling, self.active = config.scaling, True

    def forward(self, x: Array32) -> Array32:
        """Return the change (N, out) of a layer's output for its input x (N, in); zeros when not active."""
        if not self.active:
            return np.zeros((len(x), len(self.b)), np.float32)
        return matmul(matmul(x, self.a, transpose_b=True), self.b, transpose_b=True) * np.float32(self.scaling)

    def backward(self, dy: Array32, x: Array32) -> Array32:
        """Add to d_a and d_b; return dx (N, in)."""
        if not self.active:
            return np.zeros_like(x)
        dy = dy * np.float32(self.scaling)
        inner = matmul(dy, self.b)
        matmul(dy, matmul(x, self.a, transpose_b=True), self.d_b, transpose_a=True, accumulate=True)
        matmul(inner, x, self.d_a, transpose_a=True, accumulate=True)
        return matmul(inner, self.a)

    def merge_into(self, weights: Array32) -> None:
        """Add scaling b a to weights (out, in), in place."""
        weights += np.float32(self.scaling) * matmul(self.b, self.a)

    def zero_grad(self) -> None:
        """Set the gradients to zero."""
        self.d_a.fill(0)
        self.d_b.fill(0)

    def set_active(self, active: bool) -> None:
        """Switch the adapter on or off."""
        self.active = active

    def num_params(self) -> int:
        """Return the number of trained weights."""
        return self.a.size + self.b.size


# -- checkpoints in memory, tokens in files, a logger ----------------------------------------------


class CheckpointStore(Shown):
    """The newest weights of a training, in memory, and as an `ABIC` file when asked for."""

    def __init__(self, max_checkpoints: int = 0) -> None:
        """Keep so many; 0 keeps all."""
        self._kept: deque[Checkpoint] = deque(maxlen=max_checkpoints or None)

    def _says(self) -> str:
        return f"{self.count()} kept, the newest of step {self._kept[-1].step}" if self._kept else "nothing kept"

    def add(self, step: int, weights: Array32) -> None:
        """Keep a copy of the weights (P,)."""
        self._kept.append(Checkpoint(step=step, weights=np.array(weights, np.float32)))

    def latest(self) -> Checkpoint | None:
        """Return the newest, or None."""
        return self._kept[-1] if self._kept else None

    def count(self) -> int:
        """Return how many there are."""
        return len(self._kept)

    def save_latest_to_file(self, path: str | Path) -> None:
        """Write the newest as an `ABIC` file; CheckpointError if there is none."""
        if not self._kept:
            raise CheckpointError(f"{path}: there is no checkpoint to save; call add first")
        save_checkpoint(path, self._kept[-1].weights, self._kept[-1].step)


def read_token_bin_file(path: str | Path) -> TokenArray:
    """Return the u32 ids of a file, mapped, not read."""
    return TokenizedDataset.load(path).tokens


def write_token_bin_file(path: str | Path, tokens: npt.ArrayLike) -> None:
    """Write ids as u32 little-endian, whole or not at all."""
    TokenizedDataset.from_slice(tokens).save(path)


@dataclass(frozen=True)
class TrainingLogMetric(Shown):
    """A name and a number."""

    key: str
    value: float


class TrainingLogger(Shown):
    """The sinks that a configuration's `log_dir` and `enable_` fields ask for, for a loop of your own."""

    def __init__(self, config: LlmTrainingConfig) -> None:
        """Open them; ConfigError if a sink's package is missing."""
        self.events = EventHub()
        for sink in configured_sinks(config):
            self.events.add(sink)

    def _says(self) -> str:
        return ", ".join(type(sink).__name__ for sink in self.events.sinks) or "no sinks"

    def log_scalar(self, tag: str, value: float, step: int) -> None:
        """Log one number under a tag, as in "train/loss"."""
        self.events.emit(ScalarEvent(step=step, time=0.0, tag=tag, value=value))

    def log_checkpoint(self, path: str | Path, size: int, step: int) -> None:
        """Log that a checkpoint of so many bytes was saved."""
        self.events.emit(CheckpointEvent(step=step, time=0.0, path=str(path), size=size, best=False))

    def write_summary(self, metrics: Iterable[TrainingLogMetric]) -> None:
        """Log the figures of the end, at step 0 as the ABI does."""
        for metric in metrics:
            self.log_scalar(metric.key, metric.value, 0)

    def close(self) -> None:
        """Close the sinks."""
        self.events.close()
