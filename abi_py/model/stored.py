"""A model on the disk, whatever it is kept in: its shape, its tensors by our names, and what belongs to it.

    a folder of Hugging Face's kind    folder.py
    a GGUF file, or one of several     gguf_model.py

Who takes a model by its path opens it here, so that the one may be given wherever the other may.
"""

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from ..config import TrainableModelConfig
from ..formats.companions import Companions
from ..formats.encoded import Encoded
from ..formats.gguf.container import GgufFile, GgufTensor, is_gguf, open_gguf
from ..formats.safetensors import Stack, Stored
from .folder import open_weights, read_config
from .gguf_model import companions_of_gguf, open_gguf_weights, read_gguf_config

__all__ = ["StoredModel", "companions_at", "open_stored", "open_stored_gguf", "read_shape"]


@dataclass(frozen=True)
class StoredModel:
    """What was opened; no weight was read.

    tensors   by our names, mapped; those that a file keeps in another order are made when they are asked for
    used      the stored ones that they are made of, by the names of the files
    """

    place: Path
    config: TrainableModelConfig
    tensors: Mapping[str, Stored | Stack | Encoded]
    used: Mapping[str, Stored | Encoded | GgufTensor]
    file: GgufFile | None = None

    @functools.cached_property
    def companions(self) -> Companions:
        """Tokenizer, chat template, how it writes, special tokens."""
        return companions_at(self.place) if self.file is None else companions_of_gguf(self.file)


def open_stored(place: Path, config: TrainableModelConfig | None = None) -> StoredModel:
    """Open the model in a folder or a GGUF file; `config` is `read_shape(place)` where that is not changed.

    Errors of `model.folder.read_config` and `open_weights`, or of `model.gguf_model`.
    """
    if is_gguf(place):
        return open_stored_gguf(place, config)
    config = read_config(place) if config is None else config
    found = open_weights(place, config)
    return StoredModel(place, config, found.tensors, found.used)


def open_stored_gguf(place: Path, config: TrainableModelConfig | None = None) -> StoredModel:
    """Open the model in a GGUF file."""
    file = open_gguf(place)
    config = read_gguf_config(file) if config is None else config
    found = open_gguf_weights(file, config)
    return StoredModel(place, config, found, found.used, file)


def read_shape(place: Path) -> TrainableModelConfig:
    """Return the shape of the model in a folder or a GGUF file; its tensors are not looked at."""
    return read_gguf_config(open_gguf(place)) if is_gguf(place) else read_config(place)


def companions_at(place: Path) -> Companions:
    """Return what belongs to the model in a folder or a GGUF file beside its weights."""
    return companions_of_gguf(open_gguf(place)) if is_gguf(place) else Companions.of(place)
