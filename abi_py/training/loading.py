"""A model from the disk: a folder of Hugging Face's kind, a checkpoint, or what a run left (finding.py)."""

from dataclasses import dataclass
from pathlib import Path

from ..errors import CheckpointError
from ..formats.huggingface import CONFIG, INDEX, WEIGHTS
from ..formats.peft import ADAPTER_CONFIG, read_adapter_config
from ..formats.special_tokens import special_token_ids
from ..model import LoraModel, TrainableModel
from ..model.folder import read_config
from ..model.frozen import FrozenModel, read_frozen
from ..reprs import Shown
from .checkpoint import ADVICE, STATE, Found, is_checkpoint_name, locate, verify
from .finding import BEST, Origin, find_place

__all__ = ["LoadedModel", "find_folder", "load_model"]


@dataclass(frozen=True)
class LoadedModel(Shown):
    """A model, the directory that its weights came from, and what a search passed over and why.

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
    def said(self) -> str:
        """Which step of a run that is, why it was taken, and where it is; "" where nothing says so."""
        return "" if self.origin is None else f"{self.origin.said}: {self.directory}"


def load_model(
    path: str | Path, which: str | None = None, *, frozen: bool = False, allow_nonfinite: bool = False
) -> LoadedModel:
    """Load the model that `path` means: a folder with a config.json, a checkpoint, or a run.

    Of a run its RUN/model is taken, or the newest whole checkpoint where that is newer; `which` is "best" or "last"
    for the best or the newest checkpoint (`finding.find_place`).
    With `frozen` the weights of a folder in bfloat16 or float16 stay as they lie, memory-mapped, and only adapters can
    be trained on them (`FrozenModel`); losses and logits have the same bits.
    Adapters, of a LoRA run or of PEFT, bring the model along that their adapter_config.json names.
    Of a checkpoint every file is held against its checksum.  FileNotFoundError if the path does not exist,
    CheckpointError if there is no model in it, or a damaged one, one of another architecture, or one with NaN or
    infinity among its weights and not `allow_nonfinite`; DataError if a file of it says nonsense about the end token.
    """
    return _load(Path(path), which, adapters=True, frozen=frozen, allow_nonfinite=allow_nonfinite)


def find_folder(path: Path) -> Found:
    """Return the folder of a model, or of adapters, that `path` means, and what was passed over on the way to it.

    Of a checkpoint every file is held against its checksum; errors of `load_model`.
    """
    is_folder = (path / CONFIG).is_file() or (path / ADAPTER_CONFIG).is_file()
    if is_folder and not ((path / STATE).is_file() or is_checkpoint_name(path)):  # those must be whole: verified below
        return Found(path=path)
    try:
        found = locate(path)
    except CheckpointError:
        if any((path / name).is_file() for name in (WEIGHTS, INDEX)):
            problem = f"{path} has weights but no {CONFIG}, the shape of its model; copy it there"
            raise CheckpointError(problem) from None
        raise
    if found.path.is_file():
        raise CheckpointError(
            f"{found.path} is a single file, which does not say the shape of its model; give a checkpoint directory, a "
            "run directory, or a folder with config.json and model.safetensors"
        )
    verify(found.path)
    return found


def _load(where: Path, which: str | None, adapters: bool, frozen: bool, allow_nonfinite: bool) -> LoadedModel:
    place = find_place(where, which)
    try:
        found = find_folder(place.folder)
    except CheckpointError as error:
        if which != BEST:
            raise
        problem = str(error).removesuffix(ADVICE)
        raise CheckpointError(f"{problem}; --last takes the newest checkpoint that is whole") from None
    path, skipped = found.path, (*place.skipped, *found.skipped)
    if (path / ADAPTER_CONFIG).is_file() and not (path / CONFIG).is_file():
        if not adapters:
            raise CheckpointError(f"{path} is named as a base model but holds adapters itself; merge them into theirs")
        base = _base_of(path, frozen, allow_nonfinite)
        if isinstance(base.model, LoraModel):
            raise CheckpointError(f"{path} names as its base model {base.directory}, which holds adapters itself")
        adapted = LoraModel.load(base.model, path, allow_nonfinite=allow_nonfinite)
        return LoadedModel(adapted, path, skipped, base.eos_ids, place.run, base.directory, place.origin)
    config = read_config(path)
    read = read_frozen if frozen else TrainableModel.from_pretrained
    model = read(path, config, allow_nonfinite=allow_nonfinite)
    return LoadedModel(model, path, skipped, special_token_ids(path, "eos"), place.run, origin=place.origin)


def _base_of(path: Path, frozen: bool, allow_nonfinite: bool) -> LoadedModel:
    """Return the model that the adapters in a folder belong to."""
    place, name = path / ADAPTER_CONFIG, read_adapter_config(path).get("base_model_name_or_path")
    if not name:
        raise CheckpointError(f"{place} names no base model; set base_model_name_or_path to the folder of the model")
    for base in (Path(name), path / name):
        if base.exists():
            return _load(base, None, adapters=False, frozen=frozen, allow_nonfinite=allow_nonfinite)
    raise CheckpointError(f"{place}: the base model {name} does not exist here; set base_model_name_or_path")
