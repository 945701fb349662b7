"""A checkpoint: a directory that holds everything that decides the next step, so that resumed means never stopped.

    llm_step_{step}/
        model.safetensors       weights under their Hugging Face names
        config.json             the same model for Hugging Face tools
        optimizer.safetensors   moments; partial gradients in the middle of an accumulation window; the loss history
        config.yaml             model, training and early-stopping configuration of the run
        ...                     what belongs to the model besides: tokenizer, generation_config.json, README.md, the
                                model card (`Companions`)
        state.json              `TrainingState`, and size and SHA-256 of each file above; written last

Of adapters on a frozen model (LoRA) the first two are adapter_model.safetensors and adapter_config.json.

A checkpoint is written under a temporary name beside its place, forced to the disk file by file, and renamed
(`files.atomic_directory`); only then may older ones be removed.  So at every moment, whatever happens, the last good
checkpoint is whole.  A second one of the same step takes the place of the first by way of the name
`.abi-old-llm_step_{step}`, which counts as the checkpoint while its own name is free.
"""

import hashlib
import json
import math
import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..config import Config, load_yaml, to_yaml
from ..errors import CheckpointError, ConfigError, counted, shown
from ..files import (
    OLD,
    atomic_directory,
    atomic_text,
    finish_replacement,
    json_text,
    remove_directory,
    remove_leftovers,
    sha256_of,
    write_inside,
    write_synced,
)
from ..formats.checkpoint_names import CARD, NAME, SETTINGS, STATE, is_checkpoint_name
from ..formats.companions import is_one_of
from ..formats.finite import check_read, check_written
from ..formats.forms import to_stored
from ..formats.peft import ADAPTER_CONFIG, ADAPTER_WEIGHTS, adapter_metadata
from ..formats.safetensors import Stored, encoded_size, map_safetensors, read_safetensors, safetensors_pieces
from ..kernels.adamw_8bit import SHARING
from ..model.folder_writing import config_content
from ..model.lora import LoraModel
from ..model.transformer import Transformer
from ..untrusted import check, read_json
from .moments import MOMENTS
from .state import TrainingState

__all__ = [
    "STATE",
    "Checkpoint",
    "Found",
    "check_unused",
    "find_latest",
    "is_checkpoint_name",
    "list_checkpoints",
    "locate",
    "prune",
    "read_checkpoint",
    "save_checkpoint",
    "verify",
]

FORMAT, VERSION = "abi_py checkpoint", 1
FILES = OPTIMIZER, CONFIG = "optimizer.safetensors", SETTINGS
MODEL_FILES, ADAPTER_FILES = ("model.safetensors", "config.json"), (ADAPTER_WEIGHTS, ADAPTER_CONFIG)
SLACK = 1.05  # free space that must be there, in units of the checkpoint's size
ADVICE = "; resume from the directory above it to use the newest whole checkpoint"
RENAME = "; it was renamed or copied over another one: give it its own name, or use another checkpoint"
MARGIN = 1 << 16  # bytes of free space besides, for the small files and whole blocks of the file system


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A verified checkpoint; the arrays are read-only and mapped from its files."""

    path: Path
    state: TrainingState
    config: dict[str, dict[str, Any]]  # sections of config.yaml
    weights: dict[str, Stored]  # by Hugging Face name, of adapters by PEFT's
    optimizer: dict[str, np.ndarray]  # moments (moments.py); gradients (P,) float32; loss_history float64


@dataclass(frozen=True, kw_only=True)
class Found:
    """Where a search ended, and which checkpoints it passed over and why."""

    path: Path
    skipped: tuple[str, ...] = ()


# -- saving ------------------------------------------------------------------------------------


def save_checkpoint(
    root: str | Path,
    *,
    model: Transformer,
    state: TrainingState,
    optimizer: Mapping[str, np.ndarray],
    sections: Mapping[str, Config | None],
) -> Path:
    """Save under `root` and return the new directory.

    The caller holds `root` (locks.py).  OSError (disk full...) passes through; CheckpointError if there is too little
    free space to begin, or a directory of the user's has the name; NonFiniteError if a weight or a moment is not
    finite.  In all cases the earlier checkpoints are as they were.
    """
    root = Path(root)
    root.mkdir(parents=True, exist_ok=True)
    recover(root)
    tensors = to_stored(model.parameters.table, model.weights)
    check_written(root, {**tensors, **_moments(optimizer)}, "the earlier checkpoints are untouched")
    beside = model.companions
    _check_space(root, encoded_size(tensors) + encoded_size(optimizer) + beside.size)
    (weights_file, config_file), description = MODEL_FILES, config_content(model.config, beside.config, "float32")
    if isinstance(model, LoraModel):
        (weights_file, config_file), description = ADAPTER_FILES, model.description()
    metadata = {"format": "pt"}
    if isinstance(model, LoraModel):
        metadata = adapter_metadata(model.identity.facts(), model.model.storage)  # a run is on what is here
    name = f"llm_step_{state.global_step}"
    if not is_replaceable(root / name):
        raise CheckpointError(
            f"{root / name} holds files that are not of a checkpoint, so it is not replaced; move it elsewhere, then "
            "resume"
        )
    order = max([order for order, _ in list_checkpoints(root)], default=0)
    with atomic_directory(root / name) as folder:
        files = {
            weights_file: write_synced(folder / weights_file, safetensors_pieces(tensors, metadata)),
            config_file: write_synced(folder / config_file, [json_text(description).encode()]),
            OPTIMIZER: write_synced(folder / OPTIMIZER, safetensors_pieces(optimizer)),
            CONFIG: write_synced(folder / CONFIG, [to_yaml(**sections).encode()]),
            **{name: write_inside(folder, name, [content]) for name, content in beside.files.items()},
        }
        content = {
            "format": FORMAT,
            "version": VERSION,
            "saved": max(time.time_ns(), order + 1),  # a clock set back must not make this one look older
            "state": state.to_dict(),
            "files": files,
        }
        write_synced(folder / STATE, [json_text({**content, "checksum": _checksum(content)}).encode()])
    atomic_text(root / "latest", name + "\n")
    return root / name


def _checksum(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _moments(optimizer: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Return what must be finite of an optimizer's arrays; partial gradients of fp16 may have overflowed."""
    numbers = ((name, array) for name, array in optimizer.items() if name in MOMENTS and array.dtype.kind == "f")
    return {f"the optimizer's {name}": array for name, array in numbers}


def _check_space(root: Path, size: int) -> None:
    needed, free = int(size * SLACK) + MARGIN, shutil.disk_usage(root).free
    if free < needed:
        raise CheckpointError(
            f"{root}: a checkpoint needs {needed / 1e6:.2f} MB, {free / 1e6:.2f} MB are free; the earlier checkpoints "
            "are untouched; free some space, and resume if the run has ended"
        )


def prune(root: Path, keep: int, protected: set[str]) -> None:
    """Remove all but the `keep` newest checkpoints (0 = none) and those with a protected name."""
    if keep == 0:
        return
    for path in removable(root, keep):
        if path.name not in protected:
            remove_directory(path)


def removable(root: Path, keep: int) -> list[Path]:
    """Return the checkpoints in `root` that are older than the `keep` newest; what is the user's stays: links, and
    directories that only have the name of a checkpoint.
    """
    there = [path for _, path in list_checkpoints(root) if not path.is_symlink() and is_replaceable(path)]
    return there[: max(0, len(there) - keep)]


def is_replaceable(path: Path) -> bool:
    """Say whether nothing of the user's is lost with `path`: a checkpoint, what is left of one, a link, or nothing."""
    if path.is_symlink() or not path.is_dir() or (path / STATE).is_file():
        return True
    names = {each.relative_to(path).as_posix() for each in path.rglob("*") if not each.is_dir()}
    return all(map(is_one_of, names - {*FILES, *MODEL_FILES, *ADAPTER_FILES, CARD}))


def check_unused(root: str | Path) -> None:
    """Raise ConfigError if a new run would replace and prune the checkpoints that `root` holds."""
    there = list_checkpoints(root)
    if there:
        raise ConfigError(
            f"checkpoint_path ({root}) must not hold checkpoints of another run, and there is {there[-1][1].name}; "
            "choose another, or go on with that run: abi-train resume RUN, in Python load_checkpoint"
        )


def recover(root: Path) -> None:
    """Clear up after a killed process: remove its left-overs, finish or undo a half-done replacement."""
    remove_leftovers(root)
    for path in root.iterdir():
        if path.name.startswith(OLD) and NAME.fullmatch(path.name.removeprefix(OLD)):
            finish_replacement(path.with_name(path.name.removeprefix(OLD)))


# -- finding and loading -----------------------------------------------------------------------


def list_checkpoints(root: str | Path) -> list[tuple[int, Path]]:
    """Return (order of saving, directory) of the checkpoints in `root`, oldest first, damaged ones among them."""
    found = []
    root = Path(root)
    for path in root.iterdir() if root.is_dir() else ():
        name = path.name.removeprefix(OLD)
        if not is_checkpoint_name(path) or not path.is_dir() or (path.name != name and (root / name).exists()):
            continue
        try:
            order = read_json(path / STATE, {"saved": int})["saved"]
        except (OSError, CheckpointError):
            order = path.stat().st_mtime_ns  # damaged; at its place, so that a search reports it
        found.append((order, path))
    return sorted(found, key=lambda item: (item[0], _step_of(item[1])))


def _step_of(path: Path) -> int:
    match = NAME.search(path.name)
    return int(match.group(1)) if match else -1


def verify(path: str | Path) -> dict[str, Any]:
    """Check every file's size and SHA-256 and return the content of state.json; CheckpointError names the file."""
    path = Path(path)
    try:
        content = read_json(path / STATE, remedy=f"it is damaged{ADVICE}")
    except FileNotFoundError:
        raise CheckpointError(f"{path / STATE} is missing, so the checkpoint is not whole{ADVICE}") from None
    if content.get("checksum") != _checksum({key: value for key, value in content.items() if key != "checksum"}):
        raise CheckpointError(f"{path / STATE} is damaged (checksum){ADVICE}")
    check(content, {"format": str, "version": int, "state": dict[str, Any]}, str(path / STATE))
    if content["format"] != FORMAT or content["version"] != VERSION:
        found = f"{content['format']} {content['version']}"
        rule = f"this version reads {FORMAT} {VERSION}"
        raise CheckpointError(f"{path / STATE} is of kind {found}, {rule}; use the version that wrote it")
    named, step = NAME.fullmatch(path.name.removeprefix(OLD)), content["state"].get("global_step")
    if named is not None and int(named[1]) != step:
        raise CheckpointError(f"{path} is named after step {named[1]}, but its state is that of step {step}{RENAME}")
    check(content, {"files": dict[str, Any]}, str(path / STATE))
    more = [name for name in content["files"] if name == CARD or is_one_of(name)]
    names = (*_model_files(content["files"]), *FILES, *more)
    check(content["files"], {name: {"size": int, "sha256": str} for name in names}, f"{path / STATE}: files")
    for name in names:
        wanted, file = content["files"][name], path / name
        if not file.exists():
            raise CheckpointError(f"{file} is missing{ADVICE}")
        size, digest = sha256_of(file)
        if size != wanted["size"]:
            raise CheckpointError(f"{file} is damaged: {counted(size, 'byte')} instead of {wanted['size']}{ADVICE}")
        if digest != wanted["sha256"]:
            raise CheckpointError(f"{file} is damaged (checksum){ADVICE}")
    return content


def _model_files(files: Mapping[str, Any]) -> tuple[str, str]:
    return ADAPTER_FILES if ADAPTER_WEIGHTS in files else MODEL_FILES


def read_checkpoint(path: str | Path) -> Checkpoint:
    """Verify a checkpoint directory and return what is in it; CheckpointError names the damaged file."""
    path = Path(path)
    content = verify(path)
    try:
        config = load_yaml(path / CONFIG)
    except ConfigError as error:
        raise CheckpointError(f"{error}; the checkpoint is of another version") from None
    weights = map_safetensors(path / _model_files(content["files"])[0])
    optimizer = read_safetensors(path / OPTIMIZER)
    _check_arrays(optimizer, sum(tensor.raw.size for tensor in weights.values()), path / OPTIMIZER)
    check_read(path, {**weights, **_moments(optimizer)}, "use an earlier checkpoint")
    state = TrainingState.from_dict(content["state"])
    return Checkpoint(path=path, state=state, config=config, weights=weights, optimizer=optimizer)


def _check_arrays(arrays: Mapping[str, np.ndarray], size: int, file: Path) -> None:
    """Raise CheckpointError for an array that is not as `Checkpoint` says; `size` is the number of weights."""
    for name, array in arrays.items():
        kind, inner, least, most = _kind_of(name, size, "m_codes" in arrays)
        if array.dtype != kind or array.shape[1:] != inner or array.ndim == 0 or not least <= len(array) <= most:
            length = f"{size}" if least == most else "any number" if most > size else f"at most {size}"
            wanted = f"({length}, {inner[0]}) {kind}" if inner else f"({length},) {kind}"
            raise CheckpointError(f"{file}: {shown(name)} is {array.shape} {array.dtype}, but must be {wanted}{ADVICE}")


def _kind_of(name: str, size: int, coded: bool) -> tuple[np.dtype, tuple[int, ...], float, float]:
    """Return of an optimizer's array: type, shape of what it has, and least and largest number of these.

    v is not of all weights with muon, nor m and v where others are `coded`.
    """
    if name == "loss_history":
        return np.dtype(np.float64), (), 0, math.inf
    if name.endswith("_codes"):
        return np.dtype(np.uint8), (SHARING,), 0, math.inf
    if name.endswith("_scales"):
        return np.dtype(np.float32), (), 0, math.inf
    return np.dtype(np.float32), (), 0 if name == "v" or (name == "m" and coded) else size, size


def find_latest(root: str | Path) -> Found:
    """Return the newest whole checkpoint under `root`, and what was passed over; CheckpointError if there is none."""
    skipped = []
    for _, path in reversed(list_checkpoints(root)):
        try:
            verify(path)
        except (CheckpointError, OSError) as error:
            skipped.append(str(error).removesuffix(ADVICE))  # the search has begun at that directory
            continue
        return Found(path=path, skipped=tuple(skipped))
    if skipped:
        raise CheckpointError(f"{root} holds no whole checkpoint: {'; '.join(skipped)}; the run must be begun again")
    raise CheckpointError(f"{root} holds no checkpoint; give the directory of a run that has saved one (abi-train run)")


def named_like_zig(path: Path) -> Path | None:
    """Return our checkpoint directory llm_step_N that the Zig trainer's name llm_step_N.ckpt means, if it is there."""
    ours = path.with_suffix("")
    return ours if path.suffix == ".ckpt" and is_checkpoint_name(ours) and ours.is_dir() else None


def locate(path: str | Path) -> Found:
    """Return the checkpoint that `path` means: a checkpoint, a directory of them, a run directory, a Zig .ckpt file."""
    path = Path(path)
    if path.is_file() or (path / STATE).is_file() or (is_checkpoint_name(path) and path.is_dir()):
        return Found(path=path)
    if not path.exists():
        ours = named_like_zig(path)
        if ours is not None:
            return Found(path=ours)
        beside = path.with_name(OLD + path.name)
        if beside.is_dir():
            return Found(path=beside)
        raise FileNotFoundError(f"{path} does not exist; give a checkpoint, a run directory or a .ckpt file")
    inner = path / "checkpoints"
    return find_latest(inner if inner.is_dir() and not list_checkpoints(path) else path)
