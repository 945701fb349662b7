"""Callbacks: what a user's code may do to a training while it runs.

    hook            called after                                  may
    on_start        training begins or goes on                    stop, rate
    on_step         an optimizer step                             stop, rate, evaluate, save
    on_evaluation   an evaluation, before its result is saved     stop, rate, save
    on_epoch        a pass over the data                          stop, rate, evaluate, save
    on_checkpoint   a save                                        stop
    on_end          the end                                       nothing

A hook is called with the event (`events.py`) and a `Control`.  A callback is an object with some of these hooks, or a
function, which is `on_step`.  All of them are one sink among the others: it keeps the events until the loop is between
two batches, where everything that a callback changes is still saved with the step.  So a run that is resumed has the
same bits, if it has the same callbacks; one that has a state of its own gives it as `state_dict()` (plain values for
JSON) and takes it back by `load_state_dict`, which is called before `on_start`.  What `on_checkpoint` changes in it
comes after that save, and is in the next one.

A sink may fail, and training goes on; a callback that fails ends `fit` with its exception, because nobody knows what
training without it would be.  The state is whole then: `save_checkpoint` and another `fit` are possible.
"""

import math
from collections.abc import Callable
from inspect import ismethod
from typing import Any

from ..errors import ConfigError
from ..fields import suggested
from .events import (
    CheckpointEvent,
    EndEvent,
    EpochEvent,
    EvaluationEvent,
    Event,
    RateEvent,
    StartEvent,
    StepEvent,
)
from .session import Session

__all__ = ["Callbacks", "Control"]

HOOKS: dict[type[Event], str] = {
    StartEvent: "on_start",
    StepEvent: "on_step",
    EvaluationEvent: "on_evaluation",
    EpochEvent: "on_epoch",
    CheckpointEvent: "on_checkpoint",
    EndEvent: "on_end",
}
MAY = {
    "on_start": ("stop", "rate"),
    "on_step": ("stop", "rate", "evaluate", "save"),
    "on_evaluation": ("stop", "rate", "save"),
    "on_epoch": ("stop", "rate", "evaluate", "save"),
    "on_checkpoint": ("stop",),
    "on_end": (),
}


class Control:
    """What a hook may ask for; each is a `ConfigError` in a hook that is too late for it, or where it cannot be had."""

    def __init__(self, session: Session) -> None:
        """Begin without a wish."""
        self._session = session
        self._hook, self._who = "on_end", ""
        self.stop_reason: str | None = None
        self.wants_evaluation = self.wants_save = False

    def stop(self, reason: str) -> None:
        """End the training here as at its planned end: a last evaluation, a checkpoint, the reason in the report."""
        self._check("stop")
        self.stop_reason = self.stop_reason or reason

    def set_learning_rate(self, rate: float | None) -> None:
        """Use this rate from the next step on, whatever the schedule says; None gives the rate back to the schedule."""
        self._check("rate")
        if rate is not None and not (math.isfinite(rate) and rate >= 0):
            raise ConfigError(f"learning rate ({rate}) must be zero or more; set a finite number, or None")
        self._change(rate, 1.0)

    def scale_learning_rate(self, factor: float) -> None:
        """Multiply the rate of all further steps by this factor, on top of earlier ones."""
        self._check("rate")
        if not (math.isfinite(factor) and factor >= 0):
            raise ConfigError(f"factor ({factor}) of the learning rate must be zero or more; give a finite number")
        self._change(self._session.state.rate_set, self._session.state.rate_factor * factor)

    def evaluate(self) -> None:
        """Evaluate on the validation data now."""
        self._check("evaluate")
        self.wants_evaluation = True

    def save(self) -> None:
        """Save a checkpoint now, after an evaluation that is due."""
        self._check("save")
        if not self._session.config.checkpoint_path:
            raise ConfigError("checkpoint_path (None) must be a directory for a callback to save; set it")
        self.wants_save = True

    def _check(self, what: str) -> None:
        if what not in MAY[self._hook]:
            raise ConfigError(
                f"{self._who}: {self._hook} comes too late to ask for {'a learning rate' if what == 'rate' else what}; "
                f"ask in {', '.join(hook for hook, may in MAY.items() if what in may)}"
            )
        self._session.state.callbacks.setdefault(self._who, None)

    def _change(self, rate: float | None, factor: float) -> None:
        session = self._session
        session.state.rate_set, session.state.rate_factor = rate, factor
        event = RateEvent(**session.now(), learning_rate=session.next_rate(), factor=factor, fixed=rate, by=self._who)
        session.events.emit(event)


class Callbacks:
    """The callbacks of a trainer: a sink that keeps events until `act`."""

    def __init__(self, session: Session) -> None:
        """Begin without any."""
        self.session, self.control = session, Control(session)
        self._named: dict[str, Any] = {}
        self._waiting: list[Event] = []
        self._open = False

    def add(self, callback: Any) -> None:
        """Add an object with hooks, or a function for `on_step`; TypeError for anything else, or an unknown hook.

        One that is there already is not added again: its hooks would be called twice.
        """
        if isinstance(callback, type):
            raise TypeError(f"{_name(callback)} is a class, not a callback; give an object of it: {_name(callback)}()")
        hooks = [name for name in dir(callback) if name.startswith("on_")]
        odd = [name for name in hooks if name not in MAY]
        if odd:
            hint = suggested(odd[0], list(MAY)) or f"the hooks are {', '.join(MAY)}"
            raise TypeError(f"{_name(callback)} has {odd[0]}, which is no hook; {hint}")
        if not hooks and not callable(callback):
            raise TypeError(f"{_name(callback)} is no callback; give a function, or an object with one of {list(MAY)}")
        if any(known is callback or (ismethod(callback) and known == callback) for known in self._named.values()):
            return
        name, number = _name(callback), 2
        while name in self._named:
            name, number = f"{_name(callback)} {number}", number + 1
        if not self._named:
            self.session.events.add(self)
        self._named[name] = callback

    # -- what the hub calls ----------------------------------------------------------------------

    def handle(self, event: Event) -> None:
        """Keep an event for the hooks; in a loop of the user's own nobody will ask for it."""
        if self._open and type(event) in HOOKS:
            self._waiting.append(event)

    def close(self) -> None:
        """Nothing stays open."""

    # -- what the loop calls ---------------------------------------------------------------------

    def begin(self, resumed: bool) -> None:
        """Take events from here on; after a resume, ConfigError without a callback that the checkpoint knows."""
        state = self.session.state
        missing = [name for name in state.callbacks if name not in self._named]
        if resumed and missing:
            raise ConfigError(
                f"the checkpoint was trained with the callback {missing[0]}, without which other weights come of it; "
                f"add_callback it before fit, or go on without: trainer.state.callbacks.clear()"
            )
        if resumed:
            for name, kept in state.callbacks.items():
                if kept is not None:
                    self._named[name].load_state_dict(kept)
        self._waiting, self._open, self.control.stop_reason = [], True, None
        self._remember()

    def end(self) -> None:
        """Take no events any more."""
        self._open, self._waiting = False, []

    def act(self) -> None:
        """Call the hooks of the events that wait."""
        while self._waiting:
            event = self._waiting.pop(0)
            hook = HOOKS[type(event)]
            for name, callback in self._named.items():
                called: Callable[..., Any] | None = getattr(callback, hook, None)
                if called is None and hook == "on_step" and callable(callback):
                    called = callback
                if called is not None:
                    self.control._hook, self.control._who = hook, name
                    called(event, self.control)
            self._remember()

    def take(self, wish: str) -> bool:
        """Return whether a hook has asked for `evaluation` or `save` since the last call."""
        asked = bool(getattr(self.control, f"wants_{wish}"))
        setattr(self.control, f"wants_{wish}", False)
        return asked

    def _remember(self) -> None:
        """Put the states of the callbacks into the training's, of which the next checkpoint is made."""
        for name, callback in self._named.items():
            if hasattr(callback, "state_dict"):
                self.session.state.callbacks[name] = callback.state_dict()


def _name(callback: Any) -> str:
    return getattr(callback, "__qualname__", None) or type(callback).__name__
