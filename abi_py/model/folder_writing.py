"""A model written as a folder of Hugging Face's kind, whole or not at all.

    config.json                      what the family writes, over what the folder that the model came from said
    model.safetensors                or, above `max_shard_size`, shards and their index, cut as transformers cuts them
    tokenizer, generation_config.json ...      the model's companions, or the files of a tokenizer that is given

Weights are converted and written in pieces of some megabytes, so a model may be as large as memory, or larger where it
is mapped from files.
"""

import contextlib
import math
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

from ..config import TrainableModelConfig
from ..errors import CheckpointError, ConfigError, shown
from ..families import difference, write_config
from ..fields import either
from ..files import OLD, atomic_directory, finish_replacement, json_text, write_inside, write_synced
from ..formats.checkpoint_names import ORIGIN, RANDOM_BASE, SETTINGS, STATE, TRAINING_ARGS, is_checkpoint_name
from ..formats.companions import TOKENIZER_FILES, Companions, is_one_of
from ..formats.finite import check_written
from ..formats.forms import to_stored
from ..formats.huggingface import CONFIG, INDEX, WEIGHTS, bytes_of_size, cut_into_shards
from ..formats.merged import Kept
from ..formats.mlx_lm import MLX_WEIGHTS
from ..formats.peft import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from ..formats.safetensors import Joined, encoded_size, safetensors_pieces
from ..parameters import Tensor

__all__ = ["DTYPES", "Savable", "check_space", "config_content", "new_folder", "write_folder"]

DTYPES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}
NO_CODE = ("auto_map",)  # names Python files, which are not carried along
UNSAID = (*NO_CODE, "quantization_config")  # and how the files were encoded, which are written anew
WEIGHT_FILES = re.compile(r"(model|pytorch_model)(-\d{5}-of-\d{5})?\.(safetensors|bin)(\.index\.json)?")
# What belongs to the model that is replaced, beside its weights, and goes with it.
OF_A_MODEL = (
    *(CONFIG, "generation_config.json", TRAINING_ARGS, ORIGIN),
    *(ADAPTER_CONFIG, ADAPTER_WEIGHTS, MLX_WEIGHTS, "adapter_model.bin", RANDOM_BASE),
)
TEMPLATES, DOWNLOADS = "additional_chat_templates", ".cache/huggingface"  # directories of a model's folder
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
    model: tuple[TrainableModelConfig, tuple[Tensor, ...], Mapping[str, Kept]],
    besides: tuple[Companions, Savable | None, Mapping[str, str]],
    *,
    dtype: str,
    max_shard_size: int | str,
    replace: bool,
) -> None:
    """Write the folder of a model (its shape, table and tensors), and what belongs to it: companions, a tokenizer in
    place of theirs, texts by name; errors of `Transformer.save_pretrained`.
    """
    (config, table, tensors), (companions, tokenizer, files) = model, besides
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
    new_tokenizer = tokenizer is not None or any(is_one_of(name, TOKENIZER_FILES) for name in texts)
    check_written(folder, written, "what was there is untouched")
    with new_folder(folder, {*texts}, encoded_size(written), no_tokenizer=new_tokenizer or replace) as new:
        _write_weights(new, written, largest, sum(entry.size for entry in table))
        if tokenizer is not None:
            tokenizer.save(new)
        for name, text in texts.items():
            write_inside(new, name, [text])


@contextlib.contextmanager
def new_folder(folder: Path, written: set[str], size: int, *, no_tokenizer: bool) -> Iterator[Path]:
    """Yield a new folder, which takes the place of a model's when the block ends without an error.

    What belongs to no model is in it already, unless it is among the `written`; of a tokenizer see `_what_stays`.
    ConfigError for what is no folder of a model; CheckpointError if weights of `size` bytes have no room.
    """
    folder = Path(os.path.abspath(folder))  # a path like a/.. has no name of its own
    stay = _what_stays(folder, written, no_tokenizer=no_tokenizer)
    check_space(folder, size)
    finish_replacement(folder)
    with atomic_directory(folder) as new:
        for name in stay:
            _take_along(folder / name, new / name)
        yield new
        if folder.is_dir():
            shutil.copymode(folder, new)


def config_content(config: TrainableModelConfig, theirs: Mapping[str, Any], dtype: str) -> dict[str, Any]:
    """Return the content of config.json for a model that may have come from a folder, where it was `theirs`.

    What theirs says more than the family reads stays, and so does how it says the shape, unless that is another now.
    """
    theirs = {name: value for name, value in theirs.items() if name not in UNSAID}
    written = write_config(config)
    ours = {name: value for name, value in written.items() if value is not None or name not in theirs}
    ids = {name: value for name, value in theirs.items() if name.endswith("_token_id")}
    if theirs.get("model_type") != ours["model_type"]:
        theirs = ids
    as_it_was = {**theirs, "architectures": ours["architectures"]}
    candidates = as_it_was, {**theirs, **ours}, {**ids, **ours}
    content = next((each for each in candidates if difference(each, config) is None), ours)
    return {**content, **{name: dtype for name in ("dtype", "torch_dtype") if name in content}}


def _what_stays(folder: Path, written: set[str], *, no_tokenizer: bool) -> list[str]:
    """Return the files and links of a folder that is replaced which neither are written anew nor belong to its model.

    A tokenizer stays unless a new one takes its place, or none is to stay.  ConfigError if what is there is no folder
    of a model, or one in which something else would be lost.
    """
    if is_checkpoint_name(folder):
        raise ConfigError(f"folder ({folder}) must not have the name of a checkpoint; choose another")
    half_replaced = folder.with_name(OLD + folder.name)
    there = half_replaced if half_replaced.is_dir() and not os.path.lexists(folder) else folder
    if not os.path.lexists(there):
        return []
    if not there.is_dir():
        raise ConfigError(f"folder ({folder}) must be a directory, and a file is there; choose another name")
    if there.samefile("."):
        raise ConfigError(f"folder ({folder}) is the working directory, which would be replaced; choose another one")
    training = next((name for name in (STATE, SETTINGS) if os.path.lexists(there / name)), None)
    if training is not None:
        raise ConfigError(
            f"folder ({folder}) must not be that of a run or a checkpoint, and there is {training}; choose another"
        )
    names = {path.relative_to(there).as_posix(): path for path in there.rglob("*")}
    names = {name: path for name, path in names.items() if not f"{name}/".startswith(f"{DOWNLOADS}/")}
    holders = {TEMPLATES, *(DOWNLOADS.split("/")[:1] if (there / DOWNLOADS).is_dir() else ())}
    for name, path in sorted(names.items()):
        kind = "the directory" if path.is_dir() else "" if path.is_file() or path.is_symlink() else "the pipe or device"
        if kind and not (name in holders and not path.is_symlink()):
            raise ConfigError(
                f"folder ({folder}) must be new, or hold a model's files alone, and there is {kind} {name}; "
                "choose another"
            )
    gone = (*OF_A_MODEL, *(TOKENIZER_FILES if no_tokenizer else ()))
    kept = {*names} - written - holders
    return sorted(name for name in kept if not WEIGHT_FILES.fullmatch(name) and not is_one_of(name, gone))


def _take_along(path: Path, new: Path) -> None:
    """Let a file or link be in the new folder too, as it is: where the system allows it, the same file."""
    new.parent.mkdir(exist_ok=True)
    if path.is_symlink():
        new.symlink_to(os.readlink(path))
        return
    with contextlib.suppress(OSError):  # no hard links here, or not of somebody else's file
        os.link(path, new)
        return
    shutil.copy2(path, new)


def check_space(folder: Path, size: int) -> None:
    """Raise CheckpointError if there is no room for so many bytes where a folder, or a file, will be."""
    there = next(path for path in (folder, *folder.absolute().parents) if path.is_dir())
    needed, free = size + MARGIN, shutil.disk_usage(there).free
    if free < needed:
        raise CheckpointError(
            f"{folder}: {math.ceil(needed / 1e4) / 100:,.2f} MB are needed, {free // 10**4 / 100:,.2f} MB are free; "
            "free some space, or take a narrower type"
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
