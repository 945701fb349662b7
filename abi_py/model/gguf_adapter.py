"""Adapters of a GGUF file as those of a model, by PEFT's names, and the other way.

`formats/peft.py` is the same for folders.  In files of the architecture `llama` the rows of q and k have another order
(`formats/gguf/rows.py`), and with them the rows of B.  A file has one alpha for all its adapters, and multiplies each
by alpha / R; where ours is multiplied by something else, B takes the quotient.
"""

import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ..config import LoraConfig, TrainableModelConfig
from ..errors import CheckpointError, ConfigError
from ..families import gguf_entry, tensor_table, write_gguf
from ..fields import either
from ..formats.finite import check_read
from ..formats.gguf.adapter import EMBEDDING, GgufAdapter, adapter_metadata, open_gguf_adapter, pair_names
from ..formats.gguf.checking import Written, write_checked
from ..formats.gguf.ggml_types import BY_NAME, GgmlType
from ..formats.gguf.rows import rows_in_file, rows_of_ours
from ..formats.gguf.writing import PlannedTensor
from ..formats.peft import AdapterFolder
from ..parameters import Tensor
from .gguf_model import heads_of
from .lora_targets import named, trained_table

__all__ = ["ADAPTER_TYPES", "LowRank", "read_gguf_adapter", "write_gguf_adapter"]

ADAPTER_TYPES = ("F32", "F16", "BF16")  # rows of B are as short as the rank: too short for blocks
ELSEWHERE = "put it on the model that it is of"


class LowRank(NamedTuple):
    """An adapter of a matrix (out, in): a (R, in), b (out, R), and the factor of their product."""

    a: np.ndarray
    b: np.ndarray
    scale: float


def read_gguf_adapter(path: Path, shape: TrainableModelConfig, *, allow_nonfinite: bool = False) -> AdapterFolder:
    """Return the adapters in a file, for a model of this shape, as `formats.peft.read_adapter` returns a folder's.

    CheckpointError if the file is damaged, is of another architecture, holds an adapter without a place in the model or
    of another shape, what is not computed here, or NaN or infinity and not `allow_nonfinite`.
    """
    file = open_gguf_adapter(path)
    architecture = gguf_entry(shape).architecture
    if file.architecture != architecture:
        raise CheckpointError(
            f"{path}: general.architecture is {file.architecture!r}, and the model under it is a {shape.family.value}, "
            f"whose is {architecture!r}; {ELSEWHERE}"
        )
    config = _config(file, shape)
    tensors = {entry.hf_name: _numbers(file, entry, shape) for entry in trained_table(shape, config)}
    if not allow_nonfinite:
        check_read(path, tensors)
    return AdapterFolder(config, tensors, None)


def _config(file: GgufAdapter, shape: TrainableModelConfig) -> LoraConfig:
    """Return the configuration that such adapters have on a model; CheckpointError for one without a place there."""
    of_model = {tensor.gguf_name: tensor for tensor in tensor_table(shape)}
    stray = next((name for name in file.pairs if name not in of_model), None)
    if stray is not None:
        raise CheckpointError(
            f"{file.path}: {stray} has no place in this model, a {shape.family.value} of {shape.num_layers} layers; "
            f"{ELSEWHERE}"
        )
    if EMBEDDING in file.pairs and shape.tie_embeddings:
        raise CheckpointError(
            f"{file.path}: {EMBEDDING} is embedding and head in one, and an adapter of both is not computed; merge it "
            "in llama.cpp (llama-export-lora)"
        )
    ranks = Counter(pair.rank for pair in file.pairs.values())
    rank = ranks.most_common(1)[0][0]
    modules = {name: of_model[name].hf_name.removesuffix(".weight") for name in file.pairs}
    others = {re.escape(modules[name]): pair.rank for name, pair in file.pairs.items() if pair.rank != rank}
    try:
        config = LoraConfig(
            rank=rank,
            alpha=file.alpha or rank,
            target_modules=tuple(modules.values()),
            rank_pattern=others or None,
            alpha_pattern=None if file.alpha else others or None,
        )
        return named(shape, config)
    except ConfigError as error:
        raise CheckpointError(f"{file.path}: {error}") from None


def _numbers(file: GgufAdapter, entry: Tensor, shape: TrainableModelConfig) -> np.ndarray:
    """Return the numbers of one half of an adapter in our order, float32; CheckpointError for another shape."""
    matrix, _, half = entry.gguf_name.rpartition(".lora_")
    found = getattr(file.pairs[matrix], half)
    if found.shape != entry.shape:
        raise CheckpointError(
            f"{file.path}: {entry.gguf_name} has shape {found.shape}, and on this model takes {entry.shape}; "
            f"{ELSEWHERE}"
        )
    numbers: np.ndarray = found.numbers(0, found.shape[0])
    if entry.hf_names[0].transposed:
        return numbers.T
    heads = _heads(entry.name, shape)
    return numbers[rows_of_ours(heads, shape.resolved_head_dim)] if half == "b" and heads else numbers


def _heads(name: str, shape: TrainableModelConfig) -> int:
    """Return how many heads the rows of a matrix are whose order the files change; 0 where they do not."""
    local = name.removesuffix(".a").removesuffix(".b").rpartition(".")[2]
    return heads_of(local, shape) if gguf_entry(shape).permuted else 0


# -- writing ------------------------------------------------------------------------------------------


def write_gguf_adapter(
    path: Path,
    shape: TrainableModelConfig,
    adapters: Mapping[str, LowRank],
    kind: str = "F32",
    *,
    name: str | None = None,
    base: Mapping[str, str] | None = None,
    check: bool = True,
) -> Written:
    """Write adapters, by our names of their matrices, as a file for `llama.cpp --lora`, or leave what is there.

    kind          F32, F16 or BF16, in which all numbers are kept
    name          general.name; that of the file when not given
    base          what the weights that they were trained on are known by, for a reader of ours
    check         read it again: CheckpointError unless every number is as near as its type keeps it

    ConfigError for another type, or a model that llama.cpp does not compute; NonFiniteError for NaN or infinity, or a
    number that is too large for the type; OSError.
    """
    if kind.upper() not in ADAPTER_TYPES:
        raise ConfigError(f"quantize ({kind}) must be {either(list(ADAPTER_TYPES))} for adapters")
    write_gguf(shape)  # raises for a shape that llama.cpp does not compute
    ggml, first = BY_NAME[kind.upper()], next(iter(adapters.values()))
    alpha = np.float32(first.scale * len(first.a))
    files = {tensor.name: tensor.gguf_name for tensor in tensor_table(shape)}
    planned = []
    for matrix, adapter in adapters.items():
        b, factor = adapter.b, np.float32(adapter.scale * len(adapter.a) / alpha)
        heads = _heads(matrix, shape)
        if heads:
            b = b[rows_in_file(heads, shape.resolved_head_dim)]
        if not np.isclose(factor, 1, rtol=1e-6):  # the rounding of alpha itself
            b = b * factor
        pair = (b, adapter.a.T) if files[matrix] == EMBEDDING else (adapter.a, b)
        for part, numbers in zip(pair_names(files[matrix]), pair, strict=True):
            planned.append(_planned(part, numbers, ggml))
    metadata = adapter_metadata(gguf_entry(shape).architecture, float(alpha), name or path.stem, base)
    return write_checked(path, metadata, planned, check=check)


def _planned(name: str, numbers: np.ndarray, kind: GgmlType) -> PlannedTensor:
    return PlannedTensor(name=name, shape=numbers.shape, kind=kind, rows=lambda first, last: numbers[first:last])
