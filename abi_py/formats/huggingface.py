"""Hugging Face's folder of a model: config.json, and model.safetensors alone or in shards.

Tensor names may have the family's prefix (`model.`) or not; a tensor stored under both names is an error.
"""

import os
from collections.abc import Callable, Mapping
from pathlib import Path

from ..errors import CheckpointError, shown
from ..untrusted import read_json
from .safetensors import Stored, map_safetensors

__all__ = ["CONFIG", "INDEX", "WEIGHTS", "by_bare_name", "read_tensors"]

CONFIG, WEIGHTS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
MAX_NAME = 256  # bytes of a file's name, which systems refuse to look for


def by_bare_name(
    folder: Path, tensors: Mapping[str, Stored], bare: Callable[[str], str]
) -> dict[str, tuple[str, Stored]]:
    """Return the tensors, and what they are called, by their names without the prefix that `bare` takes off."""
    found: dict[str, tuple[str, Stored]] = {}
    for name, tensor in tensors.items():
        other = found.setdefault(bare(name), (name, tensor))[0]
        if other != name:
            raise CheckpointError(f"{folder} holds {other} and {name}, which are names of one tensor; remove one")
    return found


def read_tensors(folder: Path) -> dict[str, Stored]:
    """Return the tensors of a folder, mapped from its files; CheckpointError if one is missing or there twice."""
    if (folder / WEIGHTS).is_file():
        return map_safetensors(folder / WEIGHTS)
    if not (folder / INDEX).is_file():
        pickled = " (a pickle, pytorch_model.bin, is never opened)" if (folder / "pytorch_model.bin").is_file() else ""
        raise CheckpointError(
            f"{folder} has neither {WEIGHTS} nor {INDEX}{pickled}; give a folder with a model's weights"
        )
    places = read_json(folder / INDEX, {"weight_map": dict[str, str]})["weight_map"]
    tensors: dict[str, Stored] = {}
    origin: dict[str, str] = {}
    for file in sorted(set(places.values())):
        shard = folder / Path(file).name
        if not 0 < len(os.fsencode(Path(file).name)) < MAX_NAME or not shard.is_file():
            raise CheckpointError(f"{folder}: {shown(file)}, which {INDEX} names, is missing; copy the folder again")
        for name, tensor in map_safetensors(shard).items():
            if origin.setdefault(name, file) != file:
                raise CheckpointError(f"{folder}: {name} is in {origin[name]} and in {file}; remove one of them")
            tensors[name] = tensor
    return tensors
