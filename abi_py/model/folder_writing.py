"""A model written as a folder of Hugging Face's kind, whole or not at all.

    config.json                      what the family writes, over what the folder that the model came from said
    model.safetensors                or, above `max_shard_size`, shards and their index, cut as transformers cuts them
    tokenizer, generation_config.json ...      the model's companions, or the files of a tokenizer that is given

Weights are converted and written in pieces of some megabytes, so a model may be as large as memory, or larger where it
is mapped from files.
"""

import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from ..config import TrainableModelConfig
from ..errors import CheckpointError, ConfigError, shown
from ..families import difference, write_config
from ..fields import either
from ..files import atomic_directory, finish_replacement, json_text, write_inside, write_synced
from ..formats.companions import TOKENIZER_FILES, Companions, is_one_of
from ..formats.finite import check_written
from ..formats.forms import to_stored
from ..formats.huggingface import CONFIG, INDEX, WEIGHTS, bytes_of_size, cut_into_shards
from ..formats.safetensors import Joined, Stored, encoded_size, safetensors_pieces
from ..parameters import Tensor

__all__ = ["DTYPES", "Savable", "config_content", "write_folder"]

DTYPES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}
NO_CODE = ("auto_map",)  # names Python files, which are not carried along
WEIGHT_FILES = re.compile(r"(model|pytorch_model)(-\d{5}-of-\d{5})?\.(safetensors|bin)(\.index\.json)?")
ROLES = ("bos", "eos", "pad")
MARGIN = 1 << 16  # bytes of free space besides, for the small files and whole blocks of the file system


class Savable(Protocol):
    """A tokenizer, as this floor knows it: `data.tokenizer.Tokenizer`."""

    bos_id: int | None
    eos_id: int | None
    pad_id: int | None

    def save(self, path: Any, /) -> Any:
        """Write its files into a folder."""


def write_folder(
    folder: Path,
    model: tuple[TrainableModelConfig, tuple[Tensor, ...], Mapping[str, np.ndarray | Stored]],
    *,
    dtype: str,
    max_shard_size: int | str,
    companions: Companions,
    tokenizer: Savable | None,
    files: Mapping[str, str],
) -> None:
    """Write the folder of a model: its shape, table and tensors; errors of `Transformer.save_pretrained`."""
    config, table, tensors = model
    folder = Path(os.path.abspath(folder))  # a path like a/.. has no name of its own
    if dtype not in DTYPES:
        raise ConfigError(f"dtype ({shown(dtype)}) must be {either([*DTYPES])}")
    largest = bytes_of_size(max_shard_size)
    written = to_stored(table, tensors, DTYPES[dtype])
    content = config_content(config, companions.config, dtype)
    if tokenizer is not None:
        content |= {f"{role}_token_id": getattr(tokenizer, f"{role}_id") for role in ROLES}
        companions = companions.with_tokenizer({})
    # Version 5 of transformers says `dtype`, version 4 `torch_dtype`; each leaves the other's aside.
    texts = {**companions.files, **{name: text.encode() for name, text in files.items()}}
    texts[CONFIG] = json_text({**content, "dtype": dtype, "torch_dtype": dtype}).encode()
    finish_replacement(folder)
    new_tokenizer = tokenizer is not None or any(is_one_of(name, TOKENIZER_FILES) for name in texts)
    stay = _what_stays(folder, {*texts}, new_tokenizer)
    check_written(folder, written, "what was there is untouched")
    _check_space(folder, encoded_size(written))
    with atomic_directory(folder) as new:
        _write_weights(new, written, largest, sum(entry.size for entry in table))
        for name in stay:
            write_inside(new, name, [np.memmap(folder / name, np.uint8, "r")] if (folder / name).stat().st_size else [])
        if tokenizer is not None:
            tokenizer.save(new)
        for name, text in texts.items():
            write_inside(new, name, [text])


def config_content(config: TrainableModelConfig, theirs: Mapping[str, Any], dtype: str) -> dict[str, Any]:
    """Return the content of config.json for a model that may have come from a folder, where it was `theirs`.

    What theirs says more than the family reads stays, and so does how it says the shape, unless that is another now.
    """
    theirs = {name: value for name, value in theirs.items() if name not in NO_CODE}
    written = write_config(config)
    ours = {name: value for name, value in written.items() if value is not None or name not in theirs}
    ids = {name: value for name, value in theirs.items() if name.endswith("_token_id")}
    if theirs.get("model_type") != ours["model_type"]:
        theirs = ids
    as_it_was = {**theirs, "architectures": ours["architectures"]}
    candidates = as_it_was, {**theirs, **ours}, {**ids, **ours}
    content = next((each for each in candidates if difference(each, config) is None), ours)
    return {**content, **{name: dtype for name in ("dtype", "torch_dtype") if name in content}}


def _what_stays(folder: Path, written: set[str], new_tokenizer: bool) -> list[str]:
    """Return the files of a folder that is replaced which are neither written anew nor weights.

    A tokenizer stays where no new one takes its place.  ConfigError if there is no directory in its place, or one that
    holds directories.
    """
    if not os.path.lexists(folder):
        return []
    if not folder.is_dir():
        raise ConfigError(f"folder ({folder}) must be a directory, and a file is there; choose another name")
    if folder.samefile("."):
        raise ConfigError(f"folder ({folder}) is the working directory, which would be replaced; choose another one")
    inner = sorted(path.name for path in folder.iterdir() if path.is_dir() and path.name != "additional_chat_templates")
    if inner:
        raise ConfigError(
            f"folder ({folder}) must be new, or hold a model's files alone, and there is the directory {inner[0]}; "
            "choose another"
        )
    names = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()} - written
    names = {name for name in names if not WEIGHT_FILES.fullmatch(name)}
    return sorted(name for name in names if not (new_tokenizer and is_one_of(name, TOKENIZER_FILES)))


def _check_space(folder: Path, size: int) -> None:
    there = next(path for path in (folder, *folder.absolute().parents) if path.is_dir())
    free = shutil.disk_usage(there).free
    if free < size + MARGIN:
        raise CheckpointError(
            f"{folder}: the weights need {size / 1e6:,.2f} MB, {free / 1e6:,.2f} MB are free; free some space, or take "
            "a narrower dtype"
        )


def _write_weights(folder: Path, tensors: Mapping[str, Joined], largest: int, parameters: int) -> None:
    """Write one file, or shards and the index that transformers reads."""
    shards = cut_into_shards({name: tensor.nbytes for name, tensor in tensors.items()}, largest)
    for file, names in shards.items():
        part = {name: tensors[name] for name in names}
        write_synced(folder / file, safetensors_pieces(part, {"format": "pt"}))
    if [*shards] != [WEIGHTS]:
        size = sum(tensor.nbytes for tensor in tensors.values())
        places = {name: file for file, names in shards.items() for name in names}
        index = {
            "metadata": {"total_parameters": parameters, "total_size": size},
            "weight_map": dict(sorted(places.items())),
        }
        write_synced(folder / INDEX, [json_text(index).encode()])
