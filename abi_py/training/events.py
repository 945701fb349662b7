"""Events: what the trainer says happened, and the hub that hands it to the sinks of `metrics.py`.

    event           when                                               goes to metrics.jsonl as type
    StartEvent      training begins or goes on                         start (the first record, renewed by a resume)
    StepEvent       after each optimizer step                          step (only if `logged`)
    EvaluationEvent after each evaluation                              evaluation
    SampleEvent     text of the model, after an evaluation             sample
    JsonAnswersEvent  how many answers are JSON, at the end            json_answers
    CheckpointEvent after each save                                    checkpoint
    BadStepEvent    the NaN guard skipped an update                    bad_step
    LossScaleEvent  fp16: the loss scale fell or grew                  loss_scale
    RateEvent       a callback changed the learning rate               rate
    EpochEvent      at the end of each pass over the data              epoch
    StopEvent       early stopping, or a signal                        stop
    WarningEvent    something failed that does not stop training       warning
    EndEvent        training is over                                   end
    ScalarEvent     a number from a loop that is not the trainer's     scalar

A sink is any object with `handle(event)` and `close()`; it may be closed and then used again.  A sink that raises never
stops training: the error is reported once, later failures are counted, and the sink is tried again at the next event.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Protocol

from ..errors import ConfigError
from .report import TrainingReport, plain

__all__ = [
    "BadStepEvent",
    "CheckpointEvent",
    "EndEvent",
    "EpochEvent",
    "EvaluationEvent",
    "Event",
    "EventHub",
    "JsonAnswersEvent",
    "LossScaleEvent",
    "RateEvent",
    "RunLabel",
    "SampleEvent",
    "ScalarEvent",
    "Sink",
    "StartEvent",
    "StepEvent",
    "StopEvent",
    "WarningEvent",
]


# -- events ------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Event:
    """What all events have: the optimizer step, and the seconds that the run has taken, earlier sessions included."""

    type: ClassVar[str] = "event"
    step: int
    time: float

    def record(self) -> dict[str, Any]:
        """Return the event as a JSON object."""
        return plain({"type": self.type, **dataclasses.asdict(self)})


@dataclass(frozen=True, kw_only=True)
class ScalarEvent(Event):
    """One number under a tag, from a loop that is not the trainer's."""

    type = "scalar"
    tag: str
    value: float


@dataclass(frozen=True, kw_only=True)
class CheckpointEvent(Event):
    """A checkpoint is on the disk."""

    type = "checkpoint"
    path: str
    size: int
    best: bool


@dataclass(frozen=True, kw_only=True)
class RunLabel:
    """What loggers are told of the run that they log: its name, the sections of its config.yaml, its directory."""

    name: str
    settings: Mapping[str, Mapping[str, Any]]
    directory: Path


@dataclass(frozen=True, kw_only=True)
class StartEvent(Event):
    """Training begins (step 0), or goes on after `step`."""

    type = "start"
    epoch: int
    epochs: int
    total_steps: int  # of the whole run
    num_params: int
    tokens_per_step: int  # of a full optimizer step
    flops_per_token: float
    resumed_from: str | None = None
    checkpoint: CheckpointEvent | None = None  # the one that was resumed from
    losses: tuple[float, ...] = ()  # of the steps before, one for each
    total_params: int | None = None  # of the whole model, where num_params are those of its adapters
    label: RunLabel | None = None  # None: a trainer of one's own, which belongs to no run

    def record(self) -> dict[str, Any]:
        """Return what is known of the whole run as a JSON object: the same whether it begins here or goes on."""
        return {
            "type": self.type,
            "step": 0,
            "time": 0.0,
            "epochs": self.epochs,
            "total_steps": self.total_steps,
            "tokens_per_step": self.tokens_per_step,
            "num_params": self.total_params or self.num_params,
            "trained_params": self.num_params,
        }


@dataclass(frozen=True, kw_only=True)
class StepEvent(Event):
    """One optimizer step; `epoch` counts from 1, `tokens` since the run began, speed since the last logged step."""

    type = "step"
    epoch: int
    loss: float
    accuracy: float
    perplexity: float
    learning_rate: float
    grad_norm: float
    tokens: int
    tokens_per_second: float
    gflops: float
    memory: int  # bytes in use by the process
    logged: bool
    loss_scale: float | None = None  # after this step; None without fp16
    penalties: Mapping[str, float] = field(default_factory=dict)  # what was added to the loss, by name
    experts: Mapping[str, float] = field(default_factory=dict)  # of a mixture of experts: `report.expert_figures`

    def record(self) -> dict[str, Any]:
        """Return the event as a JSON object: penalties and figures of experts are keys; without fp16 no loss_scale."""
        left_out = {"logged", "penalties", "experts"} | ({"loss_scale"} if self.loss_scale is None else set())
        own = {name: value for name, value in super().record().items() if name not in left_out}
        return {**own, **plain({**self.penalties, **self.experts})}


@dataclass(frozen=True, kw_only=True)
class EvaluationEvent(Event):
    """One pass over the validation data."""

    type = "evaluation"
    epoch: int
    val_loss: float
    val_perplexity: float
    val_accuracy: float
    val_tokens: int
    improved: bool
    patience_left: int | None = None  # None without early stopping
    val_bits_per_byte: float | None = None  # None: the bytes of the tokens are not known


@dataclass(frozen=True, kw_only=True)
class SampleEvent(Event):
    """What the model makes of a prompt at this moment."""

    type = "sample"
    prompt: str
    text: str


@dataclass(frozen=True, kw_only=True)
class JsonAnswersEvent(Event):
    """Of so many answers to questions kept back, how many are JSON, have the right keys, are the data's own."""

    type = "json_answers"
    asked: int
    parsed: int
    keyed: int
    equal: int


@dataclass(frozen=True, kw_only=True)
class BadStepEvent(Event):
    """The NaN guard skipped an update; `message` names the rows or tensors."""

    type = "bad_step"
    message: str
    in_row: int


@dataclass(frozen=True, kw_only=True)
class LossScaleEvent(Event):
    """The loss scale of fp16 changed; after an overflow the update was dropped, and `message` names the tensors."""

    type = "loss_scale"
    loss_scale: float
    previous: float
    overflow: bool
    message: str


@dataclass(frozen=True, kw_only=True)
class EpochEvent(Event):
    """A pass over the data is complete."""

    type = "epoch"
    epoch: int
    train_loss: float
    train_perplexity: float
    train_tokens: int


@dataclass(frozen=True, kw_only=True)
class RateEvent(Event):
    """A callback changed the learning rate: that of the next step, and what it is made of."""

    type = "rate"
    learning_rate: float
    factor: float  # of the schedule's rate, or of `fixed`
    fixed: float | None  # None: the schedule goes on
    by: str  # name of the callback


@dataclass(frozen=True, kw_only=True)
class StopEvent(Event):
    """Training ends before its time."""

    type = "stop"
    message: str


@dataclass(frozen=True, kw_only=True)
class WarningEvent(Event):
    """Something failed that does not stop training."""

    type = "warning"
    message: str


@dataclass(frozen=True, kw_only=True)
class EndEvent(Event):
    """Training is over."""

    type = "end"
    report: TrainingReport


# -- the hub -----------------------------------------------------------------------------------


class Sink(Protocol):
    """Receiver of events."""

    def handle(self, event: Event) -> None:
        """Take in one event."""

    def close(self) -> None:
        """Release files and the terminal; a later event may come all the same."""


class EventHub:
    """Hands events to all sinks and survives their failures; `warnings` collects what went wrong, for the report.

    Sinks that are added before training begins are told of the warnings that came before them: what loading a
    checkpoint warns of must not wait for the report.
    """

    def __init__(self) -> None:
        """Begin without sinks."""
        self.sinks: list[Sink] = []
        self.failures: dict[int, int] = {}  # id of the sink -> how often it failed
        self.warnings: list[str] = []
        self._early: list[WarningEvent] = []
        self._begun = False

    def add(self, sink: Sink) -> None:
        """Add a sink; two sinks that write the same file are a `ConfigError`."""
        path = getattr(sink, "path", None)
        for other in self.sinks:
            if path is not None and getattr(other, "path", None) == path:
                raise ConfigError(f"two sinks would write {path}; set log_dir to another directory than the run's own")
        self.sinks.append(sink)
        for warning in self._early:
            self._guarded(sink, warning, lambda warning=warning: sink.handle(warning))  # type: ignore[misc]

    def emit(self, event: Event, but: Sequence[Sink] = ()) -> None:
        """Give the event to every sink, but not to these."""
        if isinstance(event, WarningEvent):
            self.warnings.append(event.message)
            if not self._begun:
                self._early.append(event)
        else:
            self._begun, self._early = True, []
        for sink in self.sinks:
            if any(sink is other for other in but):
                continue
            self._guarded(sink, event, lambda sink=sink: sink.handle(event))  # type: ignore[misc]

    def close(self) -> None:
        """Close all sinks; a later event opens them again."""
        for sink in self.sinks:
            self._guarded(sink, None, sink.close)

    def _guarded(self, sink: Sink, event: Event | None, action: Callable[[], None]) -> None:
        try:
            action()
        except Exception as error:
            first = id(sink) not in self.failures
            self.failures[id(sink)] = self.failures.get(id(sink), 0) + 1
            if not first:
                return
            message = f"{type(sink).__name__} failed ({error}); training goes on, it is tried again at each event"
            self.warnings.append(message)
            warning = WarningEvent(step=event.step if event else 0, time=event.time if event else 0.0, message=message)
            for other in self.sinks:
                if other is not sink:
                    self._guarded(other, warning, lambda other=other: other.handle(warning))  # type: ignore[misc]
