"""Adapters alone, written in the forms of other programs, and read again.

    peft           PEFT's folder, in float32                    PeftModel.from_pretrained(BASE, PATH)
    gguf-adapter   a GGUF file, in F32, F16 or BF16             llama-cli -m BASE.gguf --lora PATH
    mlx-lm         mlx-lm's folder, in float32                  mlx_lm.generate --model BASE --adapter-path PATH

Each is read here, too, wherever adapters are taken.
"""

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from ..errors import CheckpointError, ConfigError
from ..fields import either
from ..files import json_text, write_inside
from ..formats.checkpoint_names import CARD, RANDOM_BASE
from ..formats.gguf.checking import Written
from ..model import LoraModel
from ..model.folder_writing import new_folder
from ..model.gguf_adapter import ADAPTER_TYPES
from .export_source import Source

__all__ = ["ADAPTER_FORMATS", "GGUF_ADAPTER", "check_adapter_format", "opens", "write_adapter_file", "write_adapters"]

GGUF_ADAPTER, MLX = "gguf-adapter", "mlx-lm"
ADAPTER_FORMATS = ("peft", GGUF_ADAPTER, MLX)
ERRORS = {"F32": 1e-6, "F16": 2.0**-10, "BF16": 2.0**-7}  # of the largest number of an adapter, that a type may lose


def check_adapter_format(form: str, dtype: str | None, max_shard_size: str | None, quantize: str | None) -> None:
    """Raise ConfigError for a setting without effect on adapters in this form."""
    if dtype not in (None, "float32"):
        remedy = "take --quantize F16" if form == GGUF_ADAPTER else "leave it out"
        raise ConfigError(f"dtype ({dtype}) must be float32 for {form}: adapters are written as they were; {remedy}")
    if max_shard_size is not None:
        raise ConfigError(f"max_shard_size ({max_shard_size}) has no effect on adapters; leave it out")
    if quantize is not None and form == GGUF_ADAPTER and quantize.upper() not in ADAPTER_TYPES:
        raise ConfigError(f"quantize ({quantize}) must be {either(list(ADAPTER_TYPES))} for {form}")


def write_adapters(source: Source, output: Path, form: str, texts: Mapping[str, str]) -> None:
    """Write adapters as a folder, with tokenizer and settings of generation, or leave what is there as it is.

    CheckpointError if it does not read as it was written, or the disk is full.
    """
    model = source.adapters
    files = dict(source.companions.files)
    files |= {name: text.encode() for name, text in texts.items() if name != CARD}  # which is that of a whole model
    if source.loaded.base is None:
        files[RANDOM_BASE] = json_text({"model": model.config.to_dict()}).encode()
    with new_folder(output, {*files}, model.parameters.weights_flat.nbytes, no_tokenizer=True) as new:
        if form == MLX:
            model.save_mlx(new)
        else:
            model.save(new)
        for name, text in files.items():
            write_inside(new, name, [text])
        _read_again(model, new, output, 0.0 if form == "peft" else ERRORS["F32"])


def write_adapter_file(source: Source, output: Path, kind: str, *, name: str | None, check: bool) -> Written:
    """Write adapters as a GGUF file, or leave what is there as it is; unless `check` is false, read it again."""
    model = source.adapters
    written = model.save_gguf(output, kind, name=name, check=check)
    if check:
        _read_again(model, output, output, ERRORS[kind])
    return written


def _read_again(model: LoraModel, place: Path, output: Path, most: float) -> None:
    """Raise CheckpointError unless what is in a place adds to each matrix what the adapters add, but for rounding."""
    loaded = LoraModel.load(model.model, place)
    again, adapters = loaded.adapters(), model.adapters()
    for name in model.weights:
        whole = name.removesuffix(".a").removesuffix(".b") not in adapters
        if whole and (name not in loaded.weights or not np.array_equal(loaded.weights[name], model.weights[name])):
            raise CheckpointError(f"{output}: {name} does not read as it was written; check the disk, and export again")
    for name, wanted in adapters.items():
        found = again.get(name)
        if found is None or not (
            _near(found.a, wanted.a, most) and _near(found.b * found.scale, wanted.b * wanted.scale, most)
        ):
            raise CheckpointError(
                f"{output}: the adapter of {name} does not read as it was written; check the disk, and export again"
            )


def _near(found: np.ndarray, wanted: np.ndarray, most: float) -> bool:
    """Say whether an array is another but for rounding; mlx-lm's have zeros beside it, to the widest rank."""
    if found.ndim != wanted.ndim or any(has < size for has, size in zip(found.shape, wanted.shape, strict=True)):
        return False
    own = tuple(map(slice, wanted.shape))
    return bool(np.abs(found[own] - wanted).max() <= most * np.abs(wanted).max())


def opens(source: Source, output: Path, form: str, ours: str) -> tuple[str, ...]:
    """Return what opens adapters in this form; `ours` is what does here, of a folder that names its base."""
    base = "BASE" if source.loaded.base is None else str(source.loaded.base)
    if form == GGUF_ADAPTER:
        return f"abi-train generate {base} --adapter {output}", f"llama.cpp: llama-cli -m BASE.gguf --lora {output}"
    if source.loaded.base is None:  # random weights, which only abi_py makes again: no program could open them
        return (ours,)
    if form == MLX:
        return ours, f"mlx-lm: mlx_lm.generate --model BASE --adapter-path {output}"
    return ours, "PEFT: PeftModel.from_pretrained(BASE, PATH)"
