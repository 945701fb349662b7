"""A model from the disk: a checkpoint of a run, the newest one of a run, or a folder of Hugging Face's kind."""

from dataclasses import dataclass
from pathlib import Path

from ..errors import CheckpointError
from ..formats.huggingface import CONFIG, INDEX, WEIGHTS
from ..formats.peft import ADAPTER_CONFIG, read_adapter_config
from ..formats.special_tokens import special_token_ids
from ..model import LoraModel, TrainableModel
from ..model.folder import read_config
from ..model.frozen import FrozenModel, read_frozen
from .checkpoint import STATE, Found, is_checkpoint_name, locate, verify

__all__ = ["LoadedModel", "find_folder", "load_model"]


@dataclass(frozen=True)
class LoadedModel:
    """A model, the directory that its weights came from, and what a search passed over and why.

    `eos_ids` end a text, as the files of the directory say; None if they say nothing.  `run` is the directory of the
    run, where that is known to be elsewhere, and `base` that of the model under adapters.
    """

    model: TrainableModel | FrozenModel | LoraModel
    directory: Path
    skipped: tuple[str, ...] = ()
    eos_ids: tuple[int, ...] | None = None
    run: Path | None = None
    base: Path | None = None


def load_model(path: str | Path, *, frozen: bool = False, allow_nonfinite: bool = False) -> LoadedModel:
    """Load a model from a checkpoint, a run directory (its newest whole checkpoint), or a folder with a config.json.

    With `frozen` the weights of a folder in bfloat16 or float16 stay as they lie, memory-mapped, and only adapters can
    be trained on them (`FrozenModel`); losses and logits have the same bits.
    Adapters, of a LoRA run or of PEFT, bring the model along that their adapter_config.json names.
    Of a checkpoint every file is held against its checksum.  FileNotFoundError if the path does not exist,
    CheckpointError if there is no model in it, or a damaged one, one of another architecture, or one with NaN or
    infinity among its weights and not `allow_nonfinite`; DataError if a file of it says nonsense about the end token.
    """
    return _load(Path(path), adapters=True, frozen=frozen, allow_nonfinite=allow_nonfinite)


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


def _load(where: Path, adapters: bool, frozen: bool, allow_nonfinite: bool) -> LoadedModel:
    found = find_folder(where)
    path, skipped = found.path, found.skipped
    if (path / ADAPTER_CONFIG).is_file() and not (path / CONFIG).is_file():
        if not adapters:
            raise CheckpointError(f"{path} is named as a base model but holds adapters itself; merge them into theirs")
        base = _base_of(path, frozen, allow_nonfinite)
        if isinstance(base.model, LoraModel):
            raise CheckpointError(f"{path} names as its base model {base.directory}, which holds adapters itself")
        adapted = LoraModel.load(base.model, path, allow_nonfinite=allow_nonfinite)
        return LoadedModel(adapted, path, skipped, base.eos_ids, base=base.directory)
    config = read_config(path)
    read = read_frozen if frozen else TrainableModel.from_pretrained
    model = read(path, config, allow_nonfinite=allow_nonfinite)
    return LoadedModel(model, path, skipped, special_token_ids(path, "eos"))


def _base_of(path: Path, frozen: bool, allow_nonfinite: bool) -> LoadedModel:
    """Return the model that the adapters in a folder belong to."""
    place, name = path / ADAPTER_CONFIG, read_adapter_config(path).get("base_model_name_or_path")
    if not name:
        raise CheckpointError(f"{place} names no base model; set base_model_name_or_path to the folder of the model")
    for base in (Path(name), path / name):
        if base.exists():
            return _load(base, adapters=False, frozen=frozen, allow_nonfinite=allow_nonfinite)
    raise CheckpointError(f"{place}: the base model {name} does not exist here; set base_model_name_or_path")
