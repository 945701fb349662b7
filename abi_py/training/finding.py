"""What a path to a model means: one rule for all verbs and for Python.

    a folder       itself: config.json and weights, or adapters (also RUN/model, RUN/adapter)
    a checkpoint   itself
    a run          its RUN/model, if no checkpoint is newer than what that was made for; else its newest whole
                   checkpoint; "best" is its best checkpoint, even while it is trained, "last" its newest
"""

import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import CheckpointError, ConfigError
from ..files import json_text
from ..formats.checkpoint_names import (
    ADAPTER_CONFIG,
    CONFIG,
    MODEL,
    ORIGIN,
    SETTINGS,
    STATE,
    is_checkpoint_name,
)
from ..untrusted import check, read_json, read_yaml
from .metrics import METRICS

__all__ = [
    "BEST",
    "LAST",
    "Origin",
    "Place",
    "find_place",
    "has_checkpoint",
    "is_run",
    "place_of_checkpoints",
    "root_of_checkpoints",
]

BEST, LAST = "best", "last"


def list_checkpoints(root: Path) -> list[tuple[int, Path]]:
    """Return what `checkpoint.list_checkpoints` does, which is loaded where it is needed: it brings the kernels."""
    from . import checkpoint

    return checkpoint.list_checkpoints(root)


@dataclass(frozen=True, kw_only=True)
class Origin:
    """Which step of a run a folder holds: origin.json in RUN/model.

    step     optimizer steps that made the weights           steps   of the run by then; None: not known
    is_best  whether no evaluation was better                loss    the validation loss of that evaluation
    order    when the newest checkpoint of then was saved; one with a higher order is newer than the folder
    """

    step: int
    steps: int | None
    is_best: bool
    loss: float | None = None
    order: int = 0

    @classmethod
    def read(cls, folder: Path) -> "Origin | None":
        """Return what a folder says; None if it says nothing; CheckpointError if that is damaged."""
        path = folder / ORIGIN
        if not path.is_file():
            return None
        kinds: dict[str, Any] = {"step": int, "steps": int | None, "is_best": bool, "loss": float | None, "order": int}
        content = read_json(path, kinds)
        return cls(**{name: content.get(name) for name in kinds})

    def to_json(self) -> str:
        """Return the text of the file."""
        return json_text(dataclasses.asdict(self))

    @property
    def said(self) -> str:
        """Which step that is, and why it was taken."""
        if self.steps is None:
            return f"step {self.step:,}"
        why = {
            (True, True): ", the last and the best by validation loss",
            (True, False): ", the best by validation loss",
            (False, True): ", the last",
            (False, False): "",
        }[self.is_best, self.step == self.steps]
        of = "" if self.step == self.steps else f" of {self.steps:,}"
        return f"step {self.step:,}{of}{why}"


@dataclass(frozen=True, kw_only=True)
class Place:
    """What a path means: a folder, the run that it is of where one was asked for, and which step it holds, where that
    is known; `skipped` is what a search passed over, and why."""

    folder: Path
    run: Path | None = None
    origin: Origin | None = None
    skipped: tuple[str, ...] = ()

    @property
    def said(self) -> str:
        """Which step is used, and why; "" of a folder that does not say so."""
        return "" if self.origin is None else f"{self.origin.said}: {self.folder}"


def is_run(directory: Path) -> bool:
    """Say whether a directory is that of a run, not that of a checkpoint, which has a config.yaml too."""
    is_checkpoint = (directory / STATE).is_file() or is_checkpoint_name(directory.absolute())
    return (directory / SETTINGS).is_file() and not is_checkpoint


def is_folder(path: Path) -> bool:
    """Say whether a path is one model, or adapters: a folder or a checkpoint, and nothing to choose from.

    A config.json makes a folder a model's, even beside another program's config.yaml; a run has its metrics too.
    """
    if (path / STATE).is_file() or is_checkpoint_name(path):
        return True
    named = any((path / name).is_file() for name in (CONFIG, ADAPTER_CONFIG))
    return named and not (is_run(path) and (path / METRICS).is_file())


def has_checkpoint(directory: Path) -> bool:
    """Say whether there is anything in a run's directory to go on from."""
    return bool(list_checkpoints(root_of_checkpoints(directory)))


def place_of_checkpoints(directory: Path) -> Path:
    """Return the checkpoint_path that the run in a directory was given, or the directory itself.

    A run that was given another place, and was killed before it saved there, has its checkpoints in the old one still.
    """
    if not is_run(directory):
        return directory
    named = _checkpoint_path(directory)
    if not named or (list_checkpoints(_inside(directory)) and not list_checkpoints(_inside(Path(named)))):
        return directory
    return Path(named)


def root_of_checkpoints(directory: Path) -> Path:
    """Return the directory in which the checkpoints of a run are."""
    return _inside(place_of_checkpoints(directory))


def _inside(place: Path) -> Path:
    inner = place / "checkpoints"
    return inner if inner.is_dir() and not list_checkpoints(place) else place


def _checkpoint_path(directory: Path) -> str | None:
    path = directory / SETTINGS
    content = read_yaml(path)
    training = content.get("training") if isinstance(content, dict) else None
    named = training.get("checkpoint_path") if isinstance(training, dict) else None
    if named is not None and not isinstance(named, str):
        raise ConfigError(f"{path}: checkpoint_path of the training must be the path of a directory; correct it")
    return named


def find_place(path: Path, which: str | None = None) -> Place:
    """Return what `path` means; `which` is "best", "last", or None for what the rule says.

    ConfigError for a choice where there is none; CheckpointError or FileNotFoundError where there is no model.
    """
    if not path.is_dir() or is_folder(path):
        if which is not None:
            raise ConfigError(f"{which} has no effect: {path} is one model, not a run; leave --{which} out")
        return Place(folder=path, origin=_origin_of(path))
    if not (is_run(path) or has_checkpoint(path) or (path / "checkpoints").is_dir()):
        return Place(folder=path)  # whoever reads it says what is missing
    return _in_run(path, which)


def _in_run(path: Path, which: str | None) -> Place:
    from .checkpoint import find_latest

    root, model = root_of_checkpoints(path), path / MODEL
    origin = Origin.read(model) if (model / CONFIG).is_file() else None
    there = list_checkpoints(root)
    made = origin.order if origin is not None else -1
    if (model / CONFIG).is_file() and which is None and not any(order > made for order, _ in there):
        return Place(folder=model, run=path, origin=origin)
    try:
        found = find_latest(root)
    except CheckpointError as error:
        if not (model / CONFIG).is_file() or which == LAST:
            raise
        if which is None or (origin is not None and origin.is_best):
            return Place(folder=model, run=path, origin=origin, skipped=(str(error),) if there else ())
        raise
    skipped, order, state = found.skipped, *_state_of(found.path)
    if which is None and order <= made:  # what is newer is damaged
        return Place(folder=model, run=path, origin=origin, skipped=skipped)
    steps = state["global_step"]
    if which != BEST:
        return Place(folder=found.path, run=path, origin=_origin(state, steps), skipped=skipped)
    step = state["best_step"]
    if step < 0:
        raise ConfigError(f"best: {path} was never evaluated, so no checkpoint is known to be the best; take --last")
    folder = root / f"llm_step_{step}"
    if not folder.is_dir():
        if origin is not None and origin.is_best and origin.step == step:
            return Place(folder=model, run=path, origin=origin, skipped=skipped)
        raise CheckpointError(f"{folder}, the best checkpoint of {path}, is not there any more; take --last")
    return Place(folder=folder, run=path, origin=_origin({**state, "global_step": step}, steps), skipped=skipped)


def _state_of(checkpoint: Path) -> tuple[int, dict[str, Any]]:
    """Return when a checkpoint was saved, and its state as plain values."""
    content = read_json(checkpoint / STATE, {"saved": int, "state": dict[str, Any]})
    state = content["state"]
    check(state, {"global_step": int, "best_step": int}, f"{checkpoint / STATE}: state")
    return content["saved"], state


def _origin(state: dict[str, Any], steps: int) -> Origin:
    """Return which step of a run with so many a state is."""
    step, loss = state["global_step"], state.get("best_val_loss")
    is_best = step == state["best_step"]
    known = is_best and isinstance(loss, float) and math.isfinite(loss)
    return Origin(step=step, steps=steps, is_best=is_best, loss=loss if known else None)


def _origin_of(path: Path) -> Origin | None:
    """Return which step a folder or a checkpoint holds, as it says itself."""
    if not path.is_dir():
        return None
    if not (path / STATE).is_file():
        return Origin.read(path)
    try:
        _, state = _state_of(path)
    except CheckpointError:
        return None  # it is damaged, which whoever reads it says
    step = state["global_step"]
    return Origin(step=step, steps=None, is_best=step == state["best_step"])
