"""Sinks that are files of lines: the run's metrics.jsonl, and the ABI's stream; and the ABI's tags of what is told.

TensorBoard and W&B are in `loggers.py`, the terminal is in `console.py`.
"""

import json
import math
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

from ..files import atomic_file
from ..untrusted import parse_json
from .events import (
    CheckpointEvent,
    EndEvent,
    EvaluationEvent,
    Event,
    JsonAnswersEvent,
    ScalarEvent,
    StartEvent,
    StepEvent,
)
from .report import TrainingReport, plain

__all__ = [
    "Event",
    "JsonlSink",
    "MetricsStreamSink",
    "memory_in_use",
    "scalars",
    "summary",
]


# -- files of lines ----------------------------------------------------------------------------


class _Lines:
    """A JSONL file that is opened at the first line and forgets what comes after the step at which a run goes on."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path).absolute()
        self._file: TextIO | None = None

    def forget_after(
        self, step: int, time: float = math.inf, start: dict[str, Any] | None = None
    ) -> dict[str, Any] | None:
        """Remove the records of later steps or of a later time of the run, and a half-written last line.

        `start` becomes the first record, in place of the one that is there.
        Return the last record of a checkpoint that stays; None if there is none, {} if there was no file.
        """
        self.close()
        if not self.path.exists():
            if start is not None:
                self.write(start)
            return {}
        checkpoint = None
        with atomic_file(self.path) as new:
            if start is not None:
                new.write(_line(start).encode("utf-8"))
            for line, record in records_until(self.path, step, time):
                if start is not None and record.get("type") == start["type"]:
                    continue
                new.write(line.encode("utf-8"))
                checkpoint = record if record.get("type") == "checkpoint" else checkpoint
        return checkpoint

    def write(self, record: dict[str, Any]) -> None:
        """Append one record; it has left the process when this returns."""
        if self._file is None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = open(self.path, "a", encoding="utf-8")  # noqa: SIM115 (stays open for the whole run)
        self._file.write(_line(record))
        self._file.flush()

    def close(self) -> None:
        """Close the file; the next `write` opens it again."""
        file, self._file = self._file, None
        if file is not None:
            file.close()


def _line(record: dict[str, Any]) -> str:
    return json.dumps(record, allow_nan=False) + "\n"


def records_until(path: Path, step: int, time: float = math.inf) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the whole lines of a file, each with its record, that are not of a later step or time of the run."""
    with open(path, encoding="utf-8", errors="replace") as file:
        for line in file:
            try:
                record: dict[str, Any] = parse_json(line)
                stays = line.endswith("\n") and record["step"] <= step and record.get("time", 0.0) <= time
            except (ValueError, KeyError, TypeError, AttributeError):  # half written, or no record
                continue
            if stays:
                yield line, record


METRICS = "metrics.jsonl"  # its name in the directory of a run, and in log_dir


class JsonlSink:
    """The run's own `metrics.jsonl`: one record for each logged step, evaluation, checkpoint...

    A run that goes on drops the records made after its checkpoint, and adds that of the checkpoint itself where the
    process was killed before it could, so the file is that of a run that never stopped, times and speeds aside.
    """

    def __init__(self, path: str | Path) -> None:
        """Write to `path`."""
        self._lines = _Lines(path)
        self.path = self._lines.path

    def handle(self, event: Event) -> None:
        """Append the event's record."""
        if isinstance(event, StartEvent):
            last, checkpoint = self._lines.forget_after(event.step, event.time, event.record()), event.checkpoint
            if checkpoint is not None and (last is None or last.get("time", checkpoint.time) != checkpoint.time):
                self._lines.write(checkpoint.record())
        elif isinstance(event, EndEvent):
            self._lines.write({"type": event.type, "step": event.step, "time": event.time, **event.report.to_dict()})
        elif not isinstance(event, StepEvent) or event.logged:
            self._lines.write(event.record())

    def close(self) -> None:
        """Close the file."""
        self._lines.close()


# -- scalars under tags: the ABI's stream, and the loggers of others ------------------------------


def scalars(event: Event) -> Iterator[tuple[str, float]]:
    """Yield the ABI's tags with their values."""
    if isinstance(event, ScalarEvent):
        yield event.tag, event.value
    if isinstance(event, StepEvent) and event.logged:
        yield "train/loss", event.loss
        yield "train/accuracy", event.accuracy
        yield "train/perplexity", event.perplexity
        yield "train/learning_rate", event.learning_rate
        yield "train/grad_norm", event.grad_norm
        yield "train/throughput", event.tokens_per_second
        if event.loss_scale is not None:
            yield "train/loss_scale", event.loss_scale
        for name, value in {**event.penalties, **event.experts}.items():
            yield f"train/{name}", value
    elif isinstance(event, EvaluationEvent):
        yield "val/loss", event.val_loss
        yield "val/perplexity", event.val_perplexity
        yield "val/accuracy", event.val_accuracy
        if event.val_bits_per_byte is not None:
            yield "val/bits_per_byte", event.val_bits_per_byte
    elif isinstance(event, JsonAnswersEvent):
        for name in ("parsed", "keyed", "equal"):
            yield f"val/json_{name}", getattr(event, name) / event.asked


def summary(report: TrainingReport) -> Iterator[tuple[str, float]]:
    """Yield the ABI's tags of the end of a run."""
    yield "train/final_loss", report.final_loss
    yield "train/final_accuracy", report.final_accuracy
    yield "train/final_perplexity", report.final_perplexity
    yield "val/best_loss", report.best_val_loss
    yield "val/best_accuracy", report.best_val_accuracy
    yield "train/total_steps", report.total_steps
    yield "train/total_tokens", report.total_tokens


class MetricsStreamSink:
    """`log_dir/metrics.jsonl` in the line form of the ABI's dashboard stream; `ts` is Unix seconds."""

    def __init__(self, log_dir: str | Path) -> None:
        """Write to `log_dir/metrics.jsonl`."""
        self._lines = _Lines(Path(log_dir) / METRICS)
        self.path = self._lines.path
        self._epochs = self._total_steps = 0

    def handle(self, event: Event) -> None:
        """Append the event's lines."""
        now = int(time.time())
        if isinstance(event, StartEvent):
            self._lines.forget_after(event.step)
            self._epochs, self._total_steps = event.epochs, event.total_steps
        for tag, value in scalars(event):
            self._scalar(tag, value, event.step, now)
        if isinstance(event, StepEvent) and event.logged:
            place = {"epoch": event.epoch, "total_epochs": self._epochs}
            steps = {"step": event.step, "total_steps": self._total_steps}
            self._lines.write({"type": "progress", **place, **steps, "ts": now})
        elif isinstance(event, CheckpointEvent):
            self._lines.write(
                {"type": "checkpoint", "path": event.path, "size": event.size, "step": event.step, "ts": now}
            )
        elif isinstance(event, EndEvent):
            for tag, value in summary(event.report):
                self._scalar(tag, value, 0, now)  # the ABI writes its summary at step 0

    def _scalar(self, tag: str, value: float, step: int, now: int) -> None:
        self._lines.write({"type": "scalar", "tag": tag, "value": plain(value), "step": step, "ts": now})

    def close(self) -> None:
        """Close the file."""
        self._lines.close()


def memory_in_use() -> int:
    """Return the bytes of memory that the process occupies now (its highest value where the system does not tell)."""
    try:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError, IndexError):
        pass
    try:
        import resource
    except ImportError:
        return 0
    highest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return highest if sys.platform == "darwin" else highest * 1024
