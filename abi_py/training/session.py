"""What the parts of a trainer share: what is trained, by which settings, how far it is, and who is told."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TypedDict

import numba

from ..config import EarlyStoppingConfig, LlmTrainingConfig
from ..errors import ConfigError, counted
from ..model import LoraModel, TrainableModel
from ..reprs import Shown
from .clock import Clock
from .evaluation import CountBytes
from .events import EventHub, RunLabel, Sink, WarningEvent
from .loggers import configured_sinks
from .optimizer import Optimizer
from .precision import scaler_for
from .schedule import check_own_schedule, learning_rate
from .state import TrainingState

__all__ = ["Model", "Moment", "Session", "set_threads"]

Model = TrainableModel | LoraModel  # what can be trained


class Moment(TypedDict):
    """When an event happens: what all of them begin with."""

    step: int
    time: float


class Session(Shown):
    """A model in training, and all that is remembered of it."""

    def __init__(
        self,
        model: Model,
        config: LlmTrainingConfig,
        sinks: Sequence[Sink] = (),
        schedule: Callable[[int], float] | None = None,
    ) -> None:
        """Prepare to train; ConfigError if a sink's package or so many threads are missing."""
        self.model, self.config, self.schedule = model, config, schedule
        if schedule is not None:
            check_own_schedule(config)
        self.optimizer = Optimizer(model.parameters, config)
        self.state = TrainingState()
        self.clock = Clock(self.state)
        self.scaler = scaler_for(config)
        self.loss_history: list[float] = []
        self.early_stopping: EarlyStoppingConfig | None = None  # None: off
        self.count_bytes: CountBytes | None = None
        self.label: RunLabel | None = None  # what loggers call this run
        self.events = EventHub()
        for sink in (*configured_sinks(config), *sinks):
            self.events.add(sink)
        set_threads(config.num_threads)
        model.zero_gradients()

    def _says(self) -> str:
        state, config = self.state, self.config
        loss = f", loss {state.loss:.4g}" if state.global_step else ""
        place = f"step {state.global_step:,}, {state.epoch} of {counted(config.epochs, 'epoch')} done{loss}"
        return f"{place}; {self.optimizer!r}; {self.model!r}"

    def now(self) -> Moment:
        """Return the step, and the seconds that the run has taken."""
        return {"step": self.state.global_step, "time": self.clock.elapsed() / 1e9}

    def next_rate(self) -> float:
        """Return the learning rate of the next update; ConfigError if the user's schedule gives none."""
        state, step = self.state, self.state.global_step
        rate = state.rate_set
        if rate is None and self.schedule is not None:
            rate = float(self.schedule(step))
            if not (math.isfinite(rate) and rate >= 0):
                raise ConfigError(f"schedule({step}) is {rate}, but must be a learning rate, zero or more; correct it")
        return (learning_rate(self.config, step) if rate is None else rate) * state.rate_factor

    def warn(self, message: str) -> None:
        """Tell of something that failed and does not stop training."""
        self.events.emit(WarningEvent(**self.now(), message=message))

    def drop_window(self) -> None:
        """Forget the gradients and counts of the open window."""
        self.model.zero_gradients()
        self.state.open_window()


def set_threads(count: int | None) -> None:
    """Use `count` threads, all for 0; None leaves the choice as it is: all, unless the caller has changed it.

    ConfigError if there are not so many.
    """
    if count is None:
        return
    available = numba.config.NUMBA_NUM_THREADS  # type: ignore[attr-defined]
    if count > available:
        raise ConfigError(f"num_threads ({count}) must be at most {available} here; lower it, or use 0 for all")
    numba.set_num_threads(count or available)
