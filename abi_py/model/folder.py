"""A Hugging Face folder as a model of one of the families: its shape, and its weights by our names.

`TrainableModel.from_pretrained` and `FrozenModel.from_pretrained` are what is made of them.

Where two tensors speak of one thing, transformers' choice holds (measured with 5.24), or an error names both:

    a tied model whose head differs from its embedding is an error (transformers takes both and unties them)
    a tied model may have stored its matrix as embedding, as head, or as both
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ..config import TrainableModelConfig
from ..errors import CheckpointError, ConfigError, listed, shown
from ..families import family, tensor_table
from ..families import read_config as fields_of_config
from ..families.config_entries import unknown_entry
from ..files import OLD
from ..formats.bitsandbytes import in_nf4, without_quantization
from ..formats.encoded import Encoded
from ..formats.forms import FromFiles, from_stored
from ..formats.huggingface import CONFIG, by_bare_name, read_tensors
from ..formats.safetensors import Stored
from ..untrusted import read_json
from .layers.embedding import Embedding

__all__ = ["config_from_huggingface", "open_weights", "read_config"]

ROWS = 1024  # of two matrices, compared at once


def config_from_huggingface(content: Mapping[str, Any], place: str = CONFIG) -> TrainableModelConfig:
    """Return the shape that a config.json describes; CheckpointError names what this package cannot compute."""
    try:
        config = TrainableModelConfig.from_dict(fields_of_config(content, place))
    except ConfigError as error:
        raise CheckpointError(f"{place}: {error}") from None
    own = family(config)
    unknown = unknown_entry(content, {*own.write(config), *own.entries})
    if unknown is not None:
        raise CheckpointError(
            f"{place}: {shown(unknown)} is {shown(content[unknown])}; this version does not know the entry, which may "
            "change what the model computes; remove it if it does not"
        )
    return config


def read_config(folder: Path) -> TrainableModelConfig:
    """Read the shape of a folder's model.

    CheckpointError if there is none, or its config.json is damaged or of another kind of model.
    """
    path = folder / CONFIG
    place = folder.absolute()
    old = place.parent / (OLD + place.name)
    if old.is_dir() and not folder.exists():
        raise CheckpointError(f"{folder} was being replaced when its process was killed; rename {old} to {folder.name}")
    if not path.is_file():
        what = "does not exist" if not folder.exists() else f"has no {CONFIG}" if folder.is_dir() else "is a file"
        raise CheckpointError(f"{folder} {what}; give the folder of a model ({CONFIG} and weights)")
    return config_from_huggingface(without_quantization(read_json(path)), str(path))


def open_weights(folder: Path, config: TrainableModelConfig) -> FromFiles:
    """Return the tensors of a folder by our names, mapped from its files, once they are those of a model of this shape.

    Nothing of the model's size is made before: config.json may say anything.  Tensors may be F32, BF16, F16 or F64.
    CheckpointError names a tensor that is missing, of another shape, or without a place in the model.
    """
    own = family(config)
    stored = by_bare_name(folder, in_nf4(read_tensors(folder), folder), own.bare)
    tensors = {name: tensor for name, (_, tensor) in stored.items()}
    embedding, head = (own.bare(own.names_of(name)[0][0].name) for name in (Embedding.name, "output_proj"))
    if config.tie_embeddings and head in tensors:
        matrix = tensors.pop(head)
        if not _equal(matrix, tensors.setdefault(embedding, matrix)):
            raise CheckpointError(
                f"{folder}: {stored[head][0]} differs from {stored[embedding][0]}, though tie_word_embeddings in "
                f"{CONFIG} says that they are one; set it to false to use both, or remove the head that is wrong"
            )
    if config.num_layers > len(tensors):  # before a table is made of as many as it says
        raise CheckpointError(
            f"{folder}: num_hidden_layers in {CONFIG} is {config.num_layers:,}, and its files hold {len(tensors):,} "
            "tensors; use the config.json of these weights"
        )
    found = from_stored(tensor_table(config), tensors, folder, "use the config.json of these weights", own.bare)
    extra = [stored[name][0] for name in tensors if name not in found.used and not own.is_derived(name)]
    if extra:
        raise CheckpointError(
            f"{folder}: the model that {CONFIG} describes has no place for {listed(sorted(extra), 3)}, so it "
            "would compute something else than they were trained for; use the config.json that belongs to them"
        )
    called = {name: stored[name if name in stored else head][0] for name in found.used}  # a tied matrix: the head
    return FromFiles(found.tensors, {called[name]: tensor for name, tensor in found.used.items()})


def _equal(one: Stored | Encoded, other: Stored | Encoded) -> bool:
    """Say whether two matrices hold the same numbers, NaN among them."""
    if one is other:
        return True
    rows = range(0, one.shape[0] if one.shape else 0, ROWS)
    return one.shape == other.shape and all(
        np.array_equal(one.part(i, i + ROWS).widened(), other.part(i, i + ROWS).widened(), equal_nan=True) for i in rows
    )
