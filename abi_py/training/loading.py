"""A model from the disk: a checkpoint of a run, the newest one of a run, or a folder of Hugging Face's kind."""

from dataclasses import dataclass
from pathlib import Path

from ..errors import CheckpointError
from ..formats.huggingface import CONFIG, read_config, read_weights
from ..formats.peft import ADAPTER_CONFIG, read_adapter_config
from ..model import LoraModel, TrainableModel
from .checkpoint import STATE, is_checkpoint_name, locate, verify

__all__ = ["LoadedModel", "load_model"]


@dataclass(frozen=True)
class LoadedModel:
    """A model, the directory that its weights came from, and what a search passed over and why."""

    model: TrainableModel | LoraModel
    directory: Path
    skipped: tuple[str, ...] = ()


def load_model(path: str | Path) -> LoadedModel:
    """Load a model from a checkpoint, a run directory (its newest whole checkpoint), or a folder with a config.json.

    Adapters, of a LoRA run or of PEFT, bring the model along that their adapter_config.json names.
    Of a checkpoint every file is held against its checksum.  FileNotFoundError if the path does not exist,
    CheckpointError if there is no model in it, or a damaged one, or one of another architecture.
    """
    return _load(Path(path), adapters=True)


def _load(path: Path, adapters: bool) -> LoadedModel:
    is_folder = (path / CONFIG).is_file() or (path / ADAPTER_CONFIG).is_file()
    if is_folder and not ((path / STATE).is_file() or is_checkpoint_name(path)):  # those must be whole: verified below
        return LoadedModel(_from_folder(path, adapters), path)
    found = locate(path)
    if found.path.is_file():
        raise CheckpointError(
            f"{found.path} is a single file, which does not say the shape of its model; give a checkpoint directory, a "
            "run directory, or a folder with config.json and model.safetensors"
        )
    verify(found.path)
    return LoadedModel(_from_folder(found.path, adapters), found.path, found.skipped)


def _from_folder(path: Path, adapters: bool) -> TrainableModel | LoraModel:
    if (path / ADAPTER_CONFIG).is_file() and not (path / CONFIG).is_file():
        if not adapters:
            raise CheckpointError(f"{path} is named as a base model but holds adapters itself; merge them into theirs")
        return LoraModel.load(_base_of(path), path)
    model = TrainableModel(read_config(path))
    read_weights(path, model)
    return model


def _base_of(path: Path) -> TrainableModel:
    """Return the model that the adapters in a folder belong to."""
    place, name = path / ADAPTER_CONFIG, read_adapter_config(path).get("base_model_name_or_path")
    if not name:
        raise CheckpointError(f"{place} names no base model; set base_model_name_or_path to the folder of the model")
    for base in (Path(name), path / name):
        if base.exists():
            return _load(base, adapters=False).model.merged()
    raise CheckpointError(f"{place}: the base model {name} does not exist here; set base_model_name_or_path")
