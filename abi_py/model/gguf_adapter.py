"""Adapters of a GGUF file as those of a model, by PEFT's names, and the other way.

`formats/peft.py` is the same for folders.  In files of the architecture `llama` the rows of q and k have another order
(`formats/gguf/rows.py`), and with them the rows of B.  A file has one alpha for all its adapters, and multiplies each
by alpha / R; where ours is multiplied by something else, B takes the quotient.

Experts    A (E, R, in), B (E, out, R) of gate, up and down, which llama.cpp multiplies as it does the experts.  Here
gate and up have one adapter: each is written with its A, and the rows of B that are its own.  Read are also two of
their own, as one whose A has the rows of both, and whose B theirs on the diagonal and zeros beside it; and one alone.
"""

import math
import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ..config import LoraConfig, TrainableModelConfig
from ..errors import CheckpointError, ConfigError
from ..families import gguf_entry, layers, tensor_table, write_gguf
from ..fields import either
from ..formats.finite import check_read
from ..formats.forms import stacked
from ..formats.gguf.adapter import EMBEDDING, GgufAdapter, adapter_metadata, open_gguf_adapter, pair_names
from ..formats.gguf.checking import Written, write_checked
from ..formats.gguf.container import GgufTensor
from ..formats.gguf.ggml_types import BY_NAME, GgmlType
from ..formats.gguf.rows import rows_in_file, rows_of_ours
from ..formats.gguf.writing import PlannedTensor
from ..formats.peft import AdapterFolder
from ..parameters import Tensor
from .expert_modules import ExpertParameter, expert_parameters, on_diagonal
from .gguf_model import heads_of
from .lora_targets import Kind, chosen_targets, named, trained_table

__all__ = ["ADAPTER_TYPES", "LowRank", "read_gguf_adapter", "write_gguf_adapter"]

ADAPTER_TYPES = ("F32", "F16", "BF16")  # rows of B are as short as the rank: too short for blocks
ELSEWHERE = "put it on the model that it is of"


class LowRank(NamedTuple):
    """An adapter of a matrix (out, in): a (R, in), b (out, R), and the factor of their product; of experts, of each."""

    a: np.ndarray
    b: np.ndarray
    scale: float

    @property
    def rank(self) -> int:
        """The inner width R."""
        return self.a.shape[-2]


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
    stacks = {
        each.name: _stack(file, each)
        for each in expert_parameters(shape, layers(shape))
        if not each.is_router and any(tensor.gguf_name in file.pairs for tensor in each.tensors)
    }
    config = _config(file, shape, {name: stack.a.shape[1] for name, stack in stacks.items()})
    whole = {
        f"{target.tensor.name}.{half}": getattr(stacks[target.module], half)
        for target in chosen_targets(shape, config)
        if target.kind is Kind.EXPERTS
        for half in "ab"
    }
    tensors = {
        entry.hf_name: stacked(whole[entry.name], entry.hf_names[0])
        if entry.name in whole
        else _numbers(file, entry, shape)
        for entry in trained_table(shape, config)
    }
    if not allow_nonfinite:
        check_read(path, tensors)
    return AdapterFolder(config, tensors, None)


def _config(file: GgufAdapter, shape: TrainableModelConfig, stacks: Mapping[str, int]) -> LoraConfig:
    """Return the configuration that such adapters have on a model, those of experts of the given ranks.

    CheckpointError for one without a place there.
    """
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
    parameters = {
        tensor.gguf_name: each.name for each in expert_parameters(shape, layers(shape)) for tensor in each.tensors
    }
    routers = {parameters[name]: pair.rank for name, pair in file.pairs.items() if name in parameters} | dict(stacks)
    modules = {
        of_model[name].hf_name.removesuffix(".weight"): pair.rank
        for name, pair in file.pairs.items()
        if name not in parameters
    }
    ranks = modules | routers
    rank = Counter(ranks.values()).most_common(1)[0][0]
    others = {re.escape(name): each for name, each in ranks.items() if each != rank}
    try:
        config = LoraConfig(
            rank=rank,
            alpha=file.alpha or rank,
            target_modules=tuple(modules) or None,
            target_parameters=tuple(routers) or None,
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
    numbers = _whole(found)
    if entry.hf_names[0].transposed:
        return numbers.T
    heads = _heads(entry.name, shape)
    return numbers[rows_of_ours(heads, shape.resolved_head_dim)] if half == "b" and heads else numbers


def _whole(found: GgufTensor) -> np.ndarray:
    """Return all numbers of a tensor in its shape, float32."""
    return found.numbers(0, math.prod(found.shape[:-1])).reshape(found.shape)


def _stack(file: GgufAdapter, parameter: ExpertParameter) -> LowRank:
    """Return the one adapter of experts' matrices that the library has as one parameter, from those of each.

    CheckpointError for another shape.
    """
    a: list[np.ndarray] = []
    b: list[np.ndarray] = []
    for tensor in parameter.tensors:
        (experts, outer, inner), pair = tensor.shape, file.pairs.get(tensor.gguf_name)
        if pair is None:  # no ranks
            b.append(np.zeros((experts, outer, 0), np.float32))
            continue
        wanted = (experts, pair.rank, inner), (experts, outer, pair.rank)
        for found, shape, halves in zip(pair, wanted, (a, b), strict=True):
            if found.shape != shape:
                raise CheckpointError(
                    f"{file.path}: {found.name} has shape {found.shape}, and on this model takes {shape}; {ELSEWHERE}"
                )
            halves.append(_whole(found))
    if len(b) == len(a) and all(np.array_equal(a[0], each) for each in a):
        return LowRank(a[0], np.concatenate(b, axis=1), 1.0)
    whole = np.concatenate(a, axis=1)
    if file.alpha:  # each is multiplied by alpha / rank, and the one by that of its own
        b = [each * np.float32(whole.shape[1] / each.shape[2]) if each.size else each for each in b]
    return LowRank(whole, on_diagonal(b), 1.0)


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
    alpha = np.float32(first.scale * first.rank)
    files = {tensor.name: tensor.gguf_name for tensor in tensor_table(shape)}
    planned = []
    for matrix, adapter in adapters.items():
        b, factor = adapter.b, np.float32(adapter.scale * adapter.rank / alpha)
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
    rows = numbers.reshape(-1, numbers.shape[-1])
    return PlannedTensor(name=name, shape=numbers.shape, kind=kind, rows=lambda first, last: rows[first:last])
