"""The state of a training: what decides the next step besides weights, gradients and moments, and the counters."""

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from ..errors import CheckpointError, shown
from ..reprs import Shown
from ..untrusted import check

__all__ = ["ADDED", "Position", "TrainingState"]

# Added to the state after version 1 began.
ADDED = {"window_scale", "loss_scale", "steps_since_overflow", "overflow_count", "draws", "base_digest"}
ADDED |= {"best_val_bits_per_byte", "bf16_method", "window_penalties", "penalties", "initial_val_loss"}
ADDED |= {"rate_set", "rate_factor", "own_schedule", "callbacks"}
ADDED |= {"window_loads", "experts", "window_opened_at"}
# What `data` holds once there are any (`training/feed.py`).
DATA = {"identity": {"length": int, "sha256": str}, "order": dict[str, Any], "batches": int | None}


class Position(NamedTuple):
    """How far a run is; a checkpoint of the same position holds nothing new."""

    step: int
    epoch: int
    batch: int
    micro_step: int
    evaluation_due: bool
    best_step: int


@dataclass(kw_only=True)
class TrainingState(Shown):
    """Everything besides the arrays that decides the next step, and the counters of the report."""

    global_step: int = 0  # optimizer steps done
    optimizer_step: int = 0  # updates in the moments (Adam's t)
    epoch: int = 0  # epochs finished
    batch_position: int = 0  # next batch of the epoch
    micro_step: int = 0  # micro-batches in the open accumulation window
    window_loss: float = 0.0  # sum of token losses in the window
    window_correct: int = 0
    window_tokens: int = 0
    window_penalties: dict[str, float] = field(default_factory=dict)  # by name, times the tokens of its micro-batch
    window_loads: list[list[int]] = field(default_factory=list)  # unmasked tokens that chose each expert, by layer
    window_opened_at: float | None = None  # epoch_loss when the window was opened; None: not known
    epoch_loss: float = 0.0  # sum of token losses in the epoch
    epoch_tokens: int = 0
    tokens_processed: int = 0
    loss: float = 0.0  # of the most recent optimizer step, as the five below
    penalties: dict[str, float] = field(default_factory=dict)  # what was added to that loss, by name
    experts: dict[str, float] = field(default_factory=dict)  # how its tokens were shared, see `report.expert_figures`
    accuracy: float = 0.0
    learning_rate: float = 0.0
    grad_norm: float = 0.0
    bad_steps: int = 0  # updates skipped by the NaN guard
    bad_steps_in_row: int = 0
    evaluation_due: bool = False  # an evaluation was interrupted
    evaluated_step: int = -1  # step of the most recent evaluation
    best_metric: float = math.inf  # early stopping's memory
    patience_counter: int = 0
    early_stopped: bool = False
    initial_val_loss: float | None = None  # before the first step, where that was evaluated
    best_step: int = -1  # step of the best checkpoint; -1: none
    best_val_loss: float = math.inf
    best_val_accuracy: float = 0.0
    best_val_bits_per_byte: float | None = None  # None: the bytes of the validation data are not known
    checkpoints_saved: int = 0
    elapsed_ns: int = 0  # whole time of the run
    train_ns: int = 0  # time in training steps
    window_scale: float = 1.0  # factor inside the gradients of the open window, other than 1 with fp16
    loss_scale: float = 0.0  # 0: never scaled; these three are the state of `LossScaler`
    steps_since_overflow: int = 0
    overflow_count: int = 0  # windows dropped because of it
    draws: int = 0  # training passes that drew random numbers (dropout)
    base_digest: str = ""  # SHA-256 of the frozen weights under adapters
    bf16_method: str = ""  # how products of bfloat16, or of its parts, were made: another way has other last bits
    rate_set: float | None = None  # by a callback, instead of the schedule's
    rate_factor: float = 1.0  # by callbacks
    own_schedule: str = ""  # name of the function that is the schedule; empty: the configuration's
    callbacks: dict[str, Any] = field(default_factory=dict)  # that acted, or have a state: name -> state or None
    data: dict[str, Any] = field(default_factory=dict)  # identity of the data set and of its order

    @property
    def position(self) -> Position:
        """How far the run is."""
        place = self.global_step, self.epoch, self.batch_position, self.micro_step
        return Position(*place, self.evaluation_due, self.best_step)

    @property
    def mean_epoch_loss(self) -> float:
        """Mean loss over the trained tokens of the epoch so far; NaN before the first."""
        return self.epoch_loss / self.epoch_tokens if self.epoch_tokens else math.nan

    def open_window(self) -> None:
        """Begin an accumulation window."""
        self.micro_step, self.window_loss, self.window_correct, self.window_tokens = 0, 0.0, 0, 0
        self.window_penalties, self.window_loads = {}, []
        self.window_opened_at = None

    def repeat_window(self) -> None:
        """Go back to where the open window began: its micro-batches, which follow on each other, are not yet done."""
        before = self.window_opened_at
        self.epoch_loss = self.epoch_loss - self.window_loss if before is None else before
        self.batch_position = max(0, self.batch_position - self.micro_step)  # 0 in a loop of the user's own
        self.epoch_tokens -= self.window_tokens
        self.tokens_processed -= self.window_tokens
        self.open_window()

    def open_epoch(self, epoch: int) -> None:
        """Begin an epoch at its first batch."""
        self.epoch, self.batch_position, self.epoch_loss, self.epoch_tokens = epoch, 0, 0.0, 0

    def become(self, other: "TrainingState") -> None:
        """Take over every field; the parts of a trainer share one state for good."""
        vars(self).update(vars(other))

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON; non-finite floats as the strings inf, -inf, nan."""
        values = dataclasses.asdict(self)
        return {
            name: str(value) if isinstance(value, float) and not math.isfinite(value) else value
            for name, value in values.items()
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "TrainingState":
        """Build from what `to_dict` returned; fields that are missing or unknown are a `CheckpointError`.

        The fields of loss scaling and of adapters may be missing: the first checkpoints had none.
        """
        types: dict[str, Any] = {each.name: each.type for each in dataclasses.fields(cls)}
        schema = {name: float | str if kind is float else kind for name, kind in types.items() if name in values}
        check(dict(values), schema, "the training state")
        if values.get("data"):
            check(values["data"], DATA, "the training state: data")
        odd = sorted(set(values) - set(types) | set(types) - set(values) - ADDED)
        if odd:
            named = ", ".join(name if name.isidentifier() else shown(name) for name in odd[:8])
            raise CheckpointError(f"the training state differs in its fields ({named}); use the version that wrote it")
        restored: dict[str, Any] = dict(values)
        for name, value in values.items():
            if types[name] is float:
                if isinstance(value, str) and value not in ("inf", "-inf", "nan"):
                    raise CheckpointError(f"the training state: {name} is {shown(value)}, but must be a number")
                restored[name] = float(value)
        return cls(**restored)
