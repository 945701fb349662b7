"""Hugging Face's folder of a model: config.json, and model.safetensors alone or in shards.

Tensor names may have the family's prefix (`model.`) or not; a tensor stored under both names is an error.
"""

import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TypeVar

from ..errors import CheckpointError, ConfigError, shown
from ..untrusted import read_json
from .checkpoint_names import CONFIG
from .safetensors import Stored, map_safetensors

__all__ = ["CONFIG", "INDEX", "WEIGHTS", "by_bare_name", "bytes_of_size", "cut_into_shards", "read_tensors"]

Kept = TypeVar("Kept")
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([KMGT]?)B?", re.IGNORECASE)
UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}
MAX_NAME = 256  # bytes of a file's name, which systems refuse to look for


def by_bare_name(
    folder: Path, tensors: Mapping[str, Kept], bare: Callable[[str], str]
) -> dict[str, tuple[str, Kept]]:
    """Return the tensors, and what they are called, by their names without the prefix that `bare` takes off."""
    found: dict[str, tuple[str, Kept]] = {}
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


def bytes_of_size(size: int | str) -> int:
    """Return the bytes of a size: a number, or "5GB", of which G is 10^9; ConfigError for anything else."""
    match = SIZE.fullmatch(str(size).strip())
    number = int(float(match[1]) * UNITS[match[2].upper()]) if match else 0
    if number < 1:
        raise ConfigError(f'max_shard_size ({shown(size)}) must be a number of bytes, or a size; try "5GB" or "500MB"')
    return number


def cut_into_shards(sizes: Mapping[str, int], largest: int) -> dict[str, list[str]]:
    """Return which tensors are in which file, given their sizes in bytes: all in one, or in shards up to `largest`.

    The rule, and the names, are those of huggingface_hub (`split_state_dict_into_shards_factory`): in order, a new
    shard where the next tensor would be too much, and a shard of its own for one that is larger than a shard.
    """
    shards: list[list[str]] = []
    current: list[str] = []
    room = largest
    for name, size in sizes.items():
        if size > largest:
            shards.append([name])
            continue
        if size > room:
            shards.append(current)
            current, room = [], largest
        current.append(name)
        room -= size
    shards += [current] if current else []
    if len(shards) < 2:
        return {WEIGHTS: [*sizes]}
    stem = WEIGHTS.removesuffix(".safetensors")
    return {f"{stem}-{i:05d}-of-{len(shards):05d}.safetensors": names for i, names in enumerate(shards, 1)}
