"""What a run tells about itself: read from config.yaml, metrics.jsonl and report.json, also while it is trained.

No weights are read, and no kernel is loaded.  A half-written last line is passed over; a resumed run has each step
once, because it drops what came after its checkpoint (`training/metrics.py`).
"""

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import CheckpointError, ConfigError, of_the_system
from ..fields import plain
from ..files import sha256_of
from ..locks import holder_of
from ..training.metrics import METRICS
from ..training.report import REPORT, perplexity
from ..untrusted import check, parse_json, read_json
from .directory import CONFIG, is_run
from .settings import read_run_config

__all__ = ["Evaluation", "RecordedRun", "find_runs", "read_run", "size_on_disk"]

TAIL = 1 << 16  # bytes at the end of a long metrics.jsonl in which the figures of a finished run are
# What is reckoned with: of a record, and of report.json, which is as the record of the end.
FIGURES: dict[str, Any] = {
    **dict.fromkeys(("tokens", "total_steps", "total_tokens", "total_time_ns", "num_params"), int | None),
    **dict.fromkeys(("best_val_loss", "best_val_bits_per_byte"), float | None),
}
RECORD: dict[str, Any] = {
    **{"type": str, "step": int, "val_tokens": int | None},
    **dict.fromkeys(("time", "val_loss", "val_bits_per_byte"), float | None),
    **FIGURES,
}
STEP, END = b'{"type": "step"', b'{"type": "end"'  # how the lines of these records begin
DEPTH = 2  # how far below a directory runs are looked for: runs/NAME, runs/SWEEP/NAME


@dataclass(frozen=True)
class Evaluation:
    """One pass over the validation data; loss in nats a token, None where it was not finite."""

    step: int
    time: float
    loss: float | None
    bits_per_byte: float | None
    tokens: int

    @property
    def perplexity(self) -> float | None:
        """exp(loss)."""
        return None if self.loss is None else perplexity(self.loss)


@dataclass(frozen=True)
class RecordedRun:
    """A run's directory, as it is at this moment.

    state        finished, interrupted (stopped, with everything saved), running, or failed: it ended without a report
    settings     the sections of config.yaml as plain values; {} where `problem` says why they cannot be read
    steps        the logged steps, oldest first; at most the last one where the run was read in brief
    evaluations  those of them that were read: in brief at least the last one
    start, end   the records of the beginning and of the end; {} where there is none
    written      when the run last wrote there, in seconds since 1970
    """

    path: Path
    state: str
    settings: Mapping[str, Mapping[str, Any]]
    steps: list[dict[str, Any]]
    evaluations: list[Evaluation]
    start: Mapping[str, Any]
    end: Mapping[str, Any]
    written: float
    problem: str | None = None

    @property
    def name(self) -> str:
        """The name of its directory."""
        return self.path.absolute().name

    def setting(self, section: str, field: str) -> Any:
        """Return a setting; None where the run has no such section."""
        return self.settings.get(section, {}).get(field)

    @property
    def step(self) -> int:
        """The optimizer steps that are done."""
        return int(self.end.get("total_steps") or self._last("step"))

    @property
    def tokens(self) -> int:
        """The tokens that it was trained on, repeated ones too."""
        return int(self.end.get("total_tokens") or self._last("tokens"))

    @property
    def seconds(self) -> float:
        """The seconds of training, evaluation and saving, in all sessions."""
        return float((self.end.get("total_time_ns") or 0) / 1e9 or self._last("time"))

    @property
    def tokens_per_second(self) -> float | None:
        """Tokens a second of that time."""
        return self.tokens / self.seconds if self.seconds else None

    def _last(self, key: str) -> float:
        return self.steps[-1].get(key) or 0 if self.steps else 0

    @property
    def best(self) -> Evaluation | None:
        """The evaluation with the lowest loss; in brief its step may not be known, and is that of the end."""
        finite = [each for each in self.evaluations if each.loss is not None]
        found = min(finite, key=lambda each: each.loss or 0.0, default=None)
        loss = self.end.get("best_val_loss")
        if loss is not None and (found is None or loss < (found.loss or 0.0)):
            return Evaluation(self.step, self.seconds, loss, self.end.get("best_val_bits_per_byte"), 0)
        return found

    @property
    def last(self) -> Evaluation | None:
        """The newest evaluation."""
        return self.evaluations[-1] if self.evaluations else None

    @property
    def num_params(self) -> int | None:
        """The weights of the whole model; None where the run began before that was recorded."""
        return self.start.get("num_params")

    def tokenizer_digest(self) -> str | None:
        """Return the SHA-256 of the tokenizer that the run keeps; None for bytes and for ids without a tokenizer."""
        file = self.path / "tokenizer.json"
        try:
            return sha256_of(file)[1] if file.is_file() else None
        except OSError:
            return None


def read_run(path: Path, brief: bool = False) -> RecordedRun:
    """Read a run's directory; in brief without the curve: of a long metrics.jsonl its end, if the run has ended.

    ConfigError if it is not the directory of a run; what is damaged in it is told in `problem`.
    """
    if not is_run_directory(path):
        what = "is not there" if not path.exists() else f"has neither {CONFIG} nor {METRICS}"
        raise ConfigError(f"RUN ({path}) must be the directory of a run; it {what}; abi-train runs lists them")
    settings, problem = _settings(path)
    start, end, steps, evaluations = dict[str, Any](), dict[str, Any](), dict[int, dict[str, Any]](), list[Evaluation]()
    for record in _records(path / METRICS, brief):
        kind = record.get("type")
        if kind == "start":
            start = record
        elif kind == "step":
            steps[record["step"]] = record
        elif kind == "evaluation":
            evaluations.append(_evaluation(record))
        end = record if kind == "end" else {}
    end = end or _report(path, max(steps, default=0))
    if holder_of(path) is not None:
        state = "running"
    elif end:
        state = "interrupted" if end.get("interrupted") else "finished"
    else:
        state = "failed"
    written = max(_mtime(path / name) for name in (CONFIG, METRICS, REPORT))
    return RecordedRun(path, state, settings, [*steps.values()], evaluations, start, end, written, problem)


def is_run_directory(path: Path) -> bool:
    """Say whether a run was begun in a directory."""
    return is_run(path) or ((path / METRICS).is_file() and not (path / CONFIG).is_file())


def find_runs(directory: Path, depth: int = DEPTH) -> Iterator[Path]:
    """Yield the runs in a directory and in those below it: itself, if it is one; what is hidden is passed over."""
    if is_run_directory(directory):
        yield directory
        return
    if not depth:
        return
    with os.scandir(directory) as entries:
        inner = sorted(entry.name for entry in entries if entry.is_dir() and not entry.name.startswith("."))
    for name in inner:
        try:
            yield from find_runs(directory / name, depth - 1)
        except PermissionError:  # somebody else's
            continue


def size_on_disk(path: Path) -> int:
    """Return the bytes of all files below a directory; what has several names there counts once."""
    seen, total, waiting = set[tuple[int, int]](), 0, [os.fspath(path)]
    while waiting:
        try:
            with os.scandir(waiting.pop()) as entries:
                for entry in entries:
                    if entry.is_dir(follow_symlinks=False):
                        waiting.append(entry.path)
                        continue
                    facts = entry.stat(follow_symlinks=False)
                    if (facts.st_dev, facts.st_ino) not in seen:
                        seen.add((facts.st_dev, facts.st_ino))
                        total += facts.st_size
        except OSError:  # a run that is trained removes old checkpoints
            continue
    return total


# -- the files ---------------------------------------------------------------------------------


def _settings(path: Path) -> tuple[dict[str, dict[str, Any]], str | None]:
    try:
        sections = read_run_config(path / CONFIG)
    except FileNotFoundError:
        return {}, f"{path} has no {CONFIG}"
    except (ConfigError, OSError) as error:
        return {}, of_the_system(error) if isinstance(error, OSError) else str(error)
    return {name: {key: plain(value) for key, value in values.items()} for name, values in sections.items()}, None


def _report(path: Path, step: int) -> dict[str, Any]:
    """Return report.json, if it is not that of a session before the last one; else {}."""
    try:
        found = read_json(path / REPORT, {**FIGURES, "total_steps": int, "interrupted": bool})
    except (OSError, CheckpointError):
        return {}
    return found if found["total_steps"] >= step else {}


def _records(path: Path, brief: bool) -> Iterator[dict[str, Any]]:
    """Yield the records of a metrics.jsonl; in brief, of the steps only the last one."""
    try:
        lines = _lines(path, brief)
    except OSError:
        return
    last = max((index for index, line in enumerate(lines) if line.startswith(STEP)), default=-1)
    for index, line in enumerate(lines):
        if brief and index != last and line.startswith(STEP):
            continue
        try:
            record = parse_json(line)
            check(record, RECORD, "a record")
        except ValueError:  # half written, or damaged, and so CheckpointError is
            continue
        yield record


def _lines(path: Path, brief: bool) -> list[bytes]:
    """Return the lines of a file; in brief, where the last one is that of the end, the first and those of the tail."""
    with open(path, "rb") as file:
        size = file.seek(0, os.SEEK_END)
        if brief and size > 2 * TAIL:
            file.seek(size - TAIL)
            tail = file.read().split(b"\n")[1:]
            if next((line for line in reversed(tail) if line), b"").startswith(END):
                file.seek(0)
                return [file.readline(TAIL), *tail]
        file.seek(0)
        return file.read().split(b"\n")


def _evaluation(record: Mapping[str, Any]) -> Evaluation:
    loss, bits = record.get("val_loss"), record.get("val_bits_per_byte")
    return Evaluation(record["step"], record.get("time") or 0.0, loss, bits, record.get("val_tokens") or 0)


def _mtime(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0
