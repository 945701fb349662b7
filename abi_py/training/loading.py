"""A model from the disk: a folder of Hugging Face's kind, a checkpoint, or what a run left (finding.py)."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from ..config import TrainableModelConfig
from ..errors import CheckpointError, ConfigError
from ..formats.checkpoint_names import ADAPTER, MODEL, RANDOM_BASE, SETTINGS
from ..formats.companions import Companions
from ..formats.gguf.container import is_gguf
from ..formats.huggingface import CONFIG, INDEX, WEIGHTS
from ..formats.mlx_lm import MLX_WEIGHTS
from ..formats.peft import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from ..formats.special_tokens import special_token_ids
from ..model import LoraModel, TrainableModel
from ..model.frozen import FrozenModel, read_frozen
from ..model.stored_adapter import base_digest_of, base_fingerprint_of, base_named_by, base_storage_of, holds_adapters
from ..reprs import Shown
from ..untrusted import read_json, read_yaml
from .checkpoint import ADVICE, STATE, Found, is_checkpoint_name, locate, verify
from .finding import BEST, Origin, find_place, has_checkpoint, is_run

__all__ = [
    "LoadedModel",
    "find_adapters",
    "find_folder",
    "holds_adapters",
    "load_model",
    "put_on",
    "storage_under",
    "under_adapters",
]


@dataclass(frozen=True)
class LoadedModel(Shown):
    """A model, the directory or GGUF file that its weights came from, and what a search passed over and why.

    `eos_ids` end a text, as the files of the directory say; None if they say nothing.  `run` is the directory of the
    run, where one was asked for, and `base` that of the model under adapters; `origin` says which step of a run it is,
    where that is known.
    """

    model: TrainableModel | FrozenModel | LoraModel
    directory: Path
    skipped: tuple[str, ...] = ()
    eos_ids: tuple[int, ...] | None = None
    run: Path | None = None
    base: Path | None = None
    origin: Origin | None = None

    @property
    def notes(self) -> tuple[str, ...]:
        """What a user should know of it."""
        text = self.model.other_type if isinstance(self.model, LoraModel) else ""
        return (text,) if text else ()

    @property
    def said(self) -> str:
        """Which step of a run that is, why it was taken, and where it is; "" where nothing says so."""
        return "" if self.origin is None else f"{self.origin.said}: {self.directory}"


def load_model(
    path: str | Path,
    which: str | None = None,
    *,
    base: str | Path | None = None,
    frozen: bool = False,
    mapped: bool = False,
    original: bool = False,
    allow_nonfinite: bool = False,
) -> LoadedModel:
    """Load the model that `path` means: a folder with a config.json, a GGUF file, a checkpoint, or a run.

    Of a run its RUN/model is taken, or the newest whole checkpoint where that is newer; `which` is "best" or "last"
    for the best or the newest checkpoint (`finding.find_place`).
    With `frozen` the weights of a folder in bfloat16 or float16 stay as they lie, memory-mapped, and only adapters can
    be trained on them (`FrozenModel`); losses and logits have the same bits.  With `mapped` so do those in float32, for
    what reads each of them once.
    Adapters, of a LoRA run or of PEFT, bring the model along that their adapter_config.json names, or are put on the
    one in `base` (`under_adapters`).  If its matrices were encoded in another storage while they were trained, they are
    so again, unless the `original` ones are asked for.  ConfigError for a `base` where there are no adapters.
    Of a checkpoint every file is held against its checksum.  FileNotFoundError if the path does not exist,
    CheckpointError if there is no model in it, or a damaged one, one of another architecture, or one with NaN or
    infinity among its weights and not `allow_nonfinite`; DataError if a file of it says nonsense about the end token.
    """
    place = None if base is None else Path(base)
    options = _Options(frozen, mapped, original, allow_nonfinite)
    return _load(Path(path), which, place, options)


def find_folder(path: Path, *, adapters: bool = False) -> Found:
    """Return the folder of a model, or of adapters, that `path` means, and what was passed over on the way to it.

    Of a checkpoint every file is held against its checksum; errors of `load_model`, which say what a folder lacks, for
    `adapters` where these alone are asked for.
    """
    if is_gguf(path):
        return Found(path=path)
    is_folder = (path / CONFIG).is_file() or (path / ADAPTER_CONFIG).is_file()
    if is_folder and not ((path / STATE).is_file() or is_checkpoint_name(path)):  # those must be whole: verified below
        return Found(path=path)
    try:
        found = locate(path)
    except CheckpointError:
        if any((path / name).is_file() for name in (WEIGHTS, INDEX)):
            problem = f"{path} has weights but no {CONFIG}, the shape of its model; copy it there"
            raise CheckpointError(problem) from None
        if files := [file for file in sorted(path.glob("*.gguf")) if not adapters or holds_adapters(file)]:
            raise CheckpointError(f"{path} is a directory of GGUF files; give one of them: {files[0]}") from None
        if has_checkpoint(path) or is_run(path) or (path / STATE).is_file():  # a run, which has lost or not made it
            raise
        raise CheckpointError(_lacks(path, adapters)) from None
    if found.path.is_file() and adapters:
        raise CheckpointError(f"{found.path} is no file of adapters; give a folder, a run, or a GGUF file of some")
    if found.path.is_file():
        raise CheckpointError(
            f"{found.path} is a single file, which does not say the shape of its model; give a checkpoint directory, a "
            "run directory, or a folder with config.json and model.safetensors"
        )
    verify(found.path)
    return found


def _lacks(path: Path, adapters: bool) -> str:
    """Return what is wrong with a directory in which there is nothing to be loaded."""
    beside = next((name for name in (ADAPTER_WEIGHTS, MLX_WEIGHTS) if (path / name).is_file()), None)
    if beside is not None:
        return f"{path} has {beside} but no {ADAPTER_CONFIG}, which says what they adapt; copy it there"
    of_adapters = f"adapters ({ADAPTER_CONFIG} and {ADAPTER_WEIGHTS})"
    if adapters:
        return f"{path} holds no {of_adapters}, nor a run or a checkpoint of some; give a folder or a file of adapters"
    return (
        f"{path} holds neither a model ({CONFIG} and {WEIGHTS}) nor {of_adapters} nor a run; give a "
        "folder with one of them, or a GGUF file"
    )


class _Options(NamedTuple):
    """How weights are read."""

    frozen: bool
    mapped: bool
    original: bool
    allow_nonfinite: bool
    storage: str | None = None  # of those under adapters


def _load(where: Path, which: str | None, base: Path | None, options: _Options) -> LoadedModel:
    place = find_place(where, which)
    try:
        found = find_folder(place.folder)
    except CheckpointError as error:
        if which != BEST:
            raise
        problem = str(error).removesuffix(ADVICE)
        raise CheckpointError(f"{problem}; --last takes the newest checkpoint that is whole") from None
    path, skipped = found.path, (*place.skipped, *found.skipped)
    if holds_adapters(path):
        adapted, below, eos_ids = _load_adapters(path, base, options)
        return LoadedModel(adapted, path, skipped, eos_ids, place.run, below, place.origin)
    if base is not None:
        raise ConfigError(f"base ({base}) has no effect: {path} is a whole model, not adapters; leave it out")
    model: TrainableModel | FrozenModel
    if options.frozen or options.mapped or options.storage is not None:
        allow = options.allow_nonfinite
        model = read_frozen(path, storage=options.storage, allow_nonfinite=allow, mapped=options.mapped)
    else:
        model = TrainableModel.from_pretrained(path, allow_nonfinite=options.allow_nonfinite)
    ends = special_token_ids(model.companions.files if is_gguf(path) else path, "eos")
    return LoadedModel(model, path, skipped, ends, place.run, origin=place.origin)


# -- adapters, and the model under them --------------------------------------------------------------


def _load_adapters(
    path: Path, base: Path | None, options: _Options
) -> tuple[LoraModel, Path | None, tuple[int, ...] | None]:
    """Return adapters on the model under them, the directory of that, and the ids that end its texts."""
    place = under_adapters(path) if base is None else base
    if place is None:
        below = LoadedModel(_random_weights(path), path)
    else:
        if holds_adapters(find_place(place).folder):
            raise CheckpointError(
                f"{place} is the base of {path} but holds adapters itself; merge them into theirs: abi-train merge "
                f"{place} -o MERGED"
            )
        storage = None if options.original else storage_under(path, find_place(place).folder)
        below = _load(place, None, None, options._replace(storage=storage))
    if isinstance(below.model, LoraModel):
        raise CheckpointError(f"{path} names as its base model {below.directory}, which holds adapters itself")
    if place is not None:
        return put_on(below, path, allow_nonfinite=options.allow_nonfinite), below.directory, below.eos_ids
    adapted = LoraModel.load(below.model, path, allow_nonfinite=options.allow_nonfinite)
    adapted.companions = Companions.of(path)
    _check_base(adapted, path, None)
    return adapted, None, None


def put_on(below: LoadedModel, path: Path, *, allow_nonfinite: bool = False) -> LoraModel:
    """Return the adapters in a folder or a file, on a model that was loaded.

    They may have been trained on it in another type; `other_type` then says so.  CheckpointError if they do not fit, or
    say that they were trained on other weights; errors of `LoraModel.load`.
    """
    if isinstance(below.model, LoraModel):
        raise CheckpointError(f"{below.directory} holds adapters itself, and others are put on a whole model")
    adapted = LoraModel.load(below.model, path, allow_nonfinite=allow_nonfinite)
    adapted.companions = below.model.companions.under(Companions.of(path))
    _check_base(adapted, path, below.directory)
    if adapted.base_model is None or not Path(adapted.base_model).exists():
        adapted.base_model = str(below.directory.absolute())
    return adapted


def storage_under(path: Path, base: Path) -> str | None:
    """Return the storage that a model is encoded in for adapters: the one in which they were trained.

    None where they were trained on it as it is, or on it in another type than a quantised file or folder, whose blocks
    then stay.
    """
    storage = base_storage_of(path)
    there = base_fingerprint_of(path) if storage is not None else None
    if there is None or not (is_gguf(base) or (base / CONFIG).is_file()):  # checkpoints are in no blocks
        return storage
    here = FrozenModel.from_pretrained(base, allow_nonfinite=True)
    return None if here.is_quantized and not there.is_kept_as(here.identity.fingerprint) else storage


def find_adapters(path: Path) -> Path:
    """Return where the adapters are that a path means: of a run those that it left beside its model, or its newest.

    CheckpointError where there are none.
    """
    place = find_place(path)
    left = path / ADAPTER
    if place.folder == path / MODEL and left.is_dir():
        return left
    found = find_folder(place.folder, adapters=True).path
    if not holds_adapters(found):
        raise CheckpointError(f"{found} is a whole model, and has no adapters; give a folder or a file of adapters")
    return found


def under_adapters(path: Path) -> Path | None:
    """Return where the model is that the adapters in a folder were trained on; None: random weights, of a run.

    That is what their adapter_config.json names, also beside them, or what the config.yaml of their run does, which
    knows better where the model was moved.  CheckpointError if nothing of it is there.
    """
    name = base_named_by(path)
    settings = [_section(each, "base").get("path") for each in (path, path.parent, path.parent.parent)]
    known = [Path(each) for each in settings if isinstance(each, str)]
    for place in (*([Path(name), path / name] if name else []), *known):
        if place.exists():
            return place
    merge = f"abi-train merge BASE {path} -o MERGED"
    if name or known:
        raise CheckpointError(
            f"{path} holds adapters, and the model under them, {name or known[0]}, is not there; put it back, or say "
            f"where it is: {merge}"
        )
    if _random_shape(path) is None:
        raise CheckpointError(
            f"{path} holds adapters, and names no model that they are of; say where it is: {merge}"
        )
    return None


def _section(directory: Path, name: str) -> dict[str, Any]:
    """Return a section of a run's or a checkpoint's config.yaml, {} where there is none."""
    file = directory / SETTINGS
    content = read_yaml(file) if file.is_file() else None
    section = content.get(name) if isinstance(content, dict) else None
    return section if isinstance(section, dict) else {}


def _random_shape(path: Path) -> dict[str, Any] | None:
    """Return the shape, with the seed, of the random weights that adapters are on; None if nothing says it.

    The folder that a run has left says so itself, wherever it is; of a checkpoint it is its config.yaml.
    """
    if (path / RANDOM_BASE).is_file():
        shape: dict[str, Any] = read_json(path / RANDOM_BASE, {"model": dict[str, Any]})["model"]
        return shape
    around = (path, path.parent, path.parent.parent)
    return next((_section(each, "model") for each in around if _section(each, "lora")), None)


def _random_weights(path: Path) -> TrainableModel:
    return TrainableModel(TrainableModelConfig.from_dict(_random_shape(path) or {}))


def _in_other_form(model: TrainableModel | FrozenModel, folder: Path | None) -> TrainableModel | FrozenModel | None:
    """Return narrow weights widened, and widened ones as they are in their folder; None where there is one form."""
    if isinstance(model, FrozenModel):
        return model.widened()
    narrow = None if folder is None else read_frozen(folder, model.config, allow_nonfinite=True)
    return narrow if isinstance(narrow, FrozenModel) else None


def _check_base(adapted: LoraModel, path: Path, below: Path | None) -> None:
    """Raise CheckpointError if adapters say that they were trained on other weights: PEFT's say nothing.

    Those that were trained on the same weights in another type are taken, and say so in `other_type`.
    """
    if (path / STATE).is_file():
        wanted = read_json(path / STATE, {"state": dict[str, Any]})["state"].get("base_digest")
    else:
        wanted = base_digest_of(path)
    if not wanted:
        return
    if adapted.identity.has(wanted):
        adapted.said = {}  # what is here says as much, and of files of earlier versions more
        return
    there, here = base_fingerprint_of(path), adapted.identity.fingerprint
    if there is None:  # of an earlier version
        other = _in_other_form(adapted.model, below)
        problem = "" if other is not None and LoraModel(other, adapted.lora).identity.has(wanted) else "another digest"
    else:
        problem = there.apart(here)
    if problem:
        what = "the random weights of its shape and seed" if below is None else f"those in {below}"
        raise CheckpointError(
            f"{path} holds adapters that were trained on other weights than {what} ({problem}); put these back, or "
            f"give the model that they were trained on: abi-train merge BASE {path} -o MERGED"
        )
    if there is None or there.has_numbers_of(here):
        adapted.said = {}
    else:
        adapted.other_type = (
            f"{path} was trained on this model in {there.storages(here)}, and here it is in {here.storages(there)}"
        )
