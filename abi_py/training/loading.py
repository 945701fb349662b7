"""A model from the disk: a checkpoint of a run, the newest one of a run, or a folder of Hugging Face's kind."""

from dataclasses import dataclass
from pathlib import Path

from ..errors import CheckpointError
from ..formats.huggingface import CONFIG, read_config, read_weights
from ..model import TrainableModel
from .checkpoint import STATE, locate, verify

__all__ = ["LoadedModel", "load_model"]


@dataclass(frozen=True)
class LoadedModel:
    """A model, the directory that its weights came from, and what a search passed over and why."""

    model: TrainableModel
    directory: Path
    skipped: tuple[str, ...] = ()


def load_model(path: str | Path) -> LoadedModel:
    """Load a model from a checkpoint, a run directory (its newest whole checkpoint), or a folder with a config.json.

    Of a checkpoint every file is held against its checksum.  FileNotFoundError if the path does not exist,
    CheckpointError if there is no model in it, or a damaged one, or one of another architecture.
    """
    path = Path(path)
    if (path / CONFIG).is_file() and not (path / STATE).is_file():
        return _from_folder(path)
    found = locate(path)
    if found.path.is_file():
        raise CheckpointError(
            f"{found.path} is a single file, which does not say the shape of its model; give a checkpoint directory, a "
            "run directory, or a folder with config.json and model.safetensors"
        )
    verify(found.path)
    return LoadedModel(_from_folder(found.path).model, found.path, found.skipped)


def _from_folder(path: Path) -> LoadedModel:
    model = TrainableModel(read_config(path))
    read_weights(path, model)
    return LoadedModel(model, path)
