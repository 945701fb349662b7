"""What training tells about itself: one step, one evaluation, the running figures, and the final report."""

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..files import atomic_json
from ..reprs import Shown

__all__ = [
    "EvalResult",
    "StepMetrics",
    "TrainingReport",
    "TrainingStats",
    "expert_figures",
    "perplexity",
    "plain",
    "write_report",
]


def expert_figures(loads: list[list[int]]) -> dict[str, float]:
    """Return how the tokens of a step were shared among the experts of all layers; {} for a model without any.

    experts        how many there are
    idle_experts   those that no token chose, but for masked ones: they get no gradient
    expert_load    the largest load of a layer over its mean, in the layer where that is most: 1 if all are equal
    """
    if not loads:
        return {}
    peaks = [max(load) * len(load) / max(sum(load), 1) for load in loads]
    every = [count for load in loads for count in load]
    return {"experts": len(every), "idle_experts": every.count(0), "expert_load": max(peaks)}


def perplexity(loss: float) -> float:
    """Return exp(loss); infinity where that is too large for a float."""
    return math.exp(loss) if loss < 709.0 else (math.inf if loss == loss else loss)


def plain(value: Any) -> Any:
    """Return `value` fit for strict JSON: NaN and infinities, which JSON cannot write, become null."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return value


@dataclass(frozen=True, kw_only=True)
class StepMetrics(Shown):
    """Result of one micro-batch.

    loss and accuracy are of this micro-batch; grad_norm (before clipping) and learning_rate are of the most recent
    optimizer step; updated: this micro-batch completed an optimizer step; skipped: the window was dropped, by the NaN
    guard or for an overflow of fp16; loss_scale: fp16's after it, 1 without fp16; penalties: what was added to the
    loss of this micro-batch, by name.
    """

    loss: float
    accuracy: float
    grad_norm: float
    learning_rate: float
    updated: bool
    skipped: bool
    loss_scale: float = 1.0
    penalties: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class EvalResult(Shown):
    """Result of an evaluation: loss is the mean over all tokens, without label smoothing."""

    loss: float
    perplexity: float
    accuracy: float
    num_batches: int
    total_tokens: int
    bits_per_byte: float | None = None  # None: the bytes of the tokens are not known


@dataclass(frozen=True, kw_only=True)
class TrainingStats(Shown):
    """Figures of the most recent optimizer step, and counters since the beginning of the run."""

    epoch: int = 0
    global_step: int = 0
    micro_step: int = 0
    tokens_processed: int = 0
    loss: float = 0.0
    accuracy: float = 0.0
    learning_rate: float = 0.0
    grad_norm: float = 0.0
    perplexity: float = 0.0
    throughput: float = 0.0  # tokens per second of training, evaluation and saving left out
    time_ns: int = 0

    def __str__(self) -> str:
        """Return the line of the ABI."""
        return (
            f"epoch={self.epoch} step={self.global_step} loss={self.loss:.4f} acc={100 * self.accuracy:.2f}% "
            f"ppl={self.perplexity:.2f} lr={self.learning_rate:.2e} grad_norm={self.grad_norm:.2f} "
            f"toks/s={self.throughput:.0f}"
        )


@dataclass(frozen=True, kw_only=True)
class TrainingReport(Shown):
    """The end of a run; the first eleven fields are the ABI's."""

    final_loss: float
    final_accuracy: float
    best_val_loss: float  # +inf if never validated
    best_val_accuracy: float
    final_perplexity: float
    total_steps: int
    total_tokens: int
    total_time_ns: int
    avg_throughput: float  # tokens per second of the whole time
    checkpoints_saved: int
    early_stopped: bool
    epochs: int  # finished passes over the data
    skipped_updates: int  # by the NaN guard
    interrupted: bool  # stopped by a signal before the end
    checkpoint: str | None  # the last one
    best_checkpoint: str | None
    overflows: int = 0  # updates dropped because the loss scale of fp16 was too large
    best_val_bits_per_byte: float | None = None  # of the evaluation with best_val_loss; None: bytes are not known
    initial_val_loss: float | None = None  # before the first step; None: that was not evaluated
    stop_reason: str | None = None  # why a callback ended the training
    warnings: tuple[str, ...] = ()  # saves or sinks that failed without stopping the run

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as plain values, fit for strict JSON (infinity as null)."""
        return plain(dataclasses.asdict(self))


REPORT = "report.json"  # its name in the directory of a run


def write_report(report: TrainingReport, path: str | Path) -> None:
    """Write `report.json` in one indivisible step."""
    atomic_json(path, report.to_dict())
