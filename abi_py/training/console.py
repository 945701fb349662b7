"""The terminal as a sink of events: one live line of progress, or plain lines where nobody looks on."""

import time
from collections.abc import Mapping

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, TaskID, TextColumn

from ..errors import counted
from .events import (
    BadStepEvent,
    CheckpointEvent,
    EndEvent,
    EpochEvent,
    EvaluationEvent,
    Event,
    JsonAnswersEvent,
    LossScaleEvent,
    RateEvent,
    SampleEvent,
    StartEvent,
    StepEvent,
    StopEvent,
    WarningEvent,
)

__all__ = ["ConsoleSink", "clock_time"]

WIDE = 120  # columns of a terminal that has room for a bar
# Parts of the line of progress that a narrow terminal does without, the first one first.
LESS_IMPORTANT = ("penalties", "experts", "loss scale", "memory", "gradient norm", "learning rate", "speed")


class ConsoleSink:
    """One live line of progress on a terminal; elsewhere one plain line for each logged step.

    `peak_gflops`, the machine's measured peak, adds the share of it that training reaches.
    """

    def __init__(self, console: Console | None = None, peak_gflops: float | None = None) -> None:
        """Write to `console` (default: standard output)."""
        self.console = console or Console()
        self.peak_gflops = peak_gflops
        self._progress: Progress | None = None
        self._task = TaskID(0)
        self._total = self._first = 0
        self._began = time.perf_counter()

    def handle(self, event: Event) -> None:
        """Show the event."""
        if isinstance(event, StartEvent):
            self._start(event)
        elif isinstance(event, StepEvent):
            self._step(event)
        elif isinstance(event, EndEvent):
            self.close()
        else:
            self.say(_sentence(event))

    def close(self) -> None:
        """Take the live line down."""
        progress, self._progress = self._progress, None
        if progress is not None:
            progress.stop()

    def _start(self, event: StartEvent) -> None:
        self._total, self._first, self._began = event.total_steps, event.step, time.perf_counter()
        if event.resumed_from:
            self.say(f"resumed from {event.resumed_from} at step {event.step}")
        if self.console.is_terminal and self._progress is None:
            columns: list[ProgressColumn] = [MofNCompleteColumn(), TextColumn("{task.description}")]
            if self.console.width >= WIDE:
                columns.insert(0, BarColumn(bar_width=20))
            self._progress = Progress(*columns, console=self.console, transient=True)
            self._task = self._progress.add_task("", total=event.total_steps, completed=event.step)
            self._progress.start()

    def _parts(self, event: StepEvent) -> dict[str, str]:
        return {
            "loss": f"loss {event.loss:.4f}",
            "learning rate": f"lr {event.learning_rate:.2e}",
            "gradient norm": f"grad {event.grad_norm:.3f}",
            "tokens": f"{event.tokens_per_second:,.0f} tok/s",
            "speed": self._speed(event.gflops),
            "memory": f"{event.memory / 1e6:,.0f} MB",
            "time left": f"ETA {self._time_left(event.step)}",
            "loss scale": f"scale {event.loss_scale:.10g}" if event.loss_scale is not None else "",
            "penalties": "  ".join(f"{name} {value:.4f}" for name, value in event.penalties.items()),
            "experts": _of_experts(event.experts),
        }

    def _step(self, event: StepEvent) -> None:
        parts = self._parts(event)
        if self._progress is not None:
            room = self.console.width - 2 * len(str(self._total)) - 3 - (21 if self.console.width >= WIDE else 0)
            self._progress.update(self._task, completed=event.step, description=_fit(parts, room))
        elif event.logged:
            self.say(self._plain(event, parts))

    def line_of(self, event: StepEvent) -> str:
        """Return all of a step in one line."""
        return self._plain(event, self._parts(event))

    def _plain(self, event: StepEvent, parts: Mapping[str, str]) -> str:
        place = f"{event.step}/{self._total}" if self._total else f"{event.step}"
        return f"step {place}  epoch {event.epoch}  {_fit(parts, None)}"

    def _speed(self, gflops: float) -> str:
        if gflops <= 0:
            return ""
        share = f" ({100 * gflops / self.peak_gflops:.0f}% of peak)" if self.peak_gflops else ""
        return f"{gflops:.1f} GFLOP/s{share}"

    def _time_left(self, step: int) -> str:
        done = step - self._first
        if done <= 0 or step > self._total:
            return "-"
        return clock_time((time.perf_counter() - self._began) / done * (self._total - step))

    def say(self, text: str) -> None:
        """Print a line."""
        self.console.print(text, soft_wrap=True, markup=False, highlight=False)


def clock_time(seconds: float) -> str:
    """Return a time as 4:05 or 1:04:05."""
    hours, rest = divmod(round(seconds), 3600)
    return f"{hours}:{rest // 60:02}:{rest % 60:02}" if hours else f"{rest // 60}:{rest % 60:02}"


def _fit(parts: Mapping[str, str], room: int | None) -> str:
    """Join the parts of a line of progress; where there is not enough room, the less important ones are left out."""
    left = dict(parts)
    for name in LESS_IMPORTANT:
        if room is None or len("  ".join(filter(None, left.values()))) <= room:
            break
        left.pop(name, None)
    return "  ".join(filter(None, left.values()))


def _of_experts(figures: Mapping[str, float]) -> str:
    """Say how the tokens of a step were shared among experts; nothing of a model without any."""
    if not figures:
        return ""
    idle = f"{figures['idle_experts']} of {figures['experts']} experts idle, " if figures["idle_experts"] else ""
    return f"{idle}load {figures['expert_load']:.1f}x"


def _sentence(event: Event) -> str:
    if isinstance(event, EvaluationEvent):
        note = " (best so far)" if event.improved else ""
        left = "" if event.patience_left is None else f", patience left {event.patience_left}"
        return (
            f"step {event.step}: validation loss {event.val_loss:.4f}, perplexity {event.val_perplexity:.2f}, "
            f"accuracy {100 * event.val_accuracy:.2f}%{note}{left}"
        )
    if isinstance(event, SampleEvent):
        return f"step {event.step}: {event.prompt!r} -> {event.text!r}"  # quoted: one line, nothing a terminal obeys
    if isinstance(event, JsonAnswersEvent):
        return (
            f"step {event.step}: of {counted(event.asked, 'answer')} {event.parsed} are JSON, {event.keyed} with the "
            f"right keys, {event.equal} the data's own"
        )
    if isinstance(event, CheckpointEvent):
        return f"step {event.step}: saved {event.path} ({event.size / 1e6:.1f} MB{', best' if event.best else ''})"
    if isinstance(event, BadStepEvent):
        return f"step {event.step}: update skipped ({event.in_row} in a row): {event.message}"
    if isinstance(event, LossScaleEvent):
        change = f"loss scale {event.previous:.10g} -> {event.loss_scale:.10g}"
        return f"step {event.step}: {'update dropped, ' if event.overflow else ''}{change}: {event.message}"
    if isinstance(event, RateEvent):
        return f"step {event.step}: learning rate {event.learning_rate:.3g} from the next step on, by {event.by}"
    if isinstance(event, EpochEvent):
        return f"epoch {event.epoch}: training loss {event.train_loss:.4f}, perplexity {event.train_perplexity:.2f}"
    if isinstance(event, WarningEvent):
        return f"warning: {event.message}"
    if isinstance(event, StopEvent):
        return event.message
    return f"step {event.step}: {event.type}"
