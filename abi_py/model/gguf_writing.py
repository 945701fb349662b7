"""A model written as a GGUF file: metadata, tokenizer, and tensors in the storages that the type of the file names.

Rows are taken from where the weights are, some megabytes at a time: float32 to be encoded, or, where a tensor is kept
in the storage that it is written in, the bytes as they are.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..config import TrainableModelConfig
from ..errors import NonFiniteError
from ..families import gguf_entry, tensor_table, write_gguf
from ..families.gguf_rope import ROPE_FREQS, divisors
from ..formats.encoded import Encoded
from ..formats.gguf import quantising
from ..formats.gguf.checking import Written, write_checked
from ..formats.gguf.ggml_types import BY_STORAGE
from ..formats.gguf.quantising import FileType, Plan, Subject, file_type
from ..formats.gguf.rows import rows_in_file
from ..formats.gguf.writing import PlannedTensor, Progress
from ..formats.huggingface import bytes_of_size
from ..formats.merged import Kept, Merged, MergedStack
from ..formats.safetensors import Stack, Stored
from ..kernels.storage import STORAGES, Storage
from ..parameters import Tensor
from .gguf_model import heads_of

__all__ = ["gguf_shapes", "plan_gguf", "write_gguf_model"]


def gguf_shapes(config: TrainableModelConfig) -> dict[str, tuple[int, ...]]:
    """Return the shape of each tensor of a file, by GGUF's names."""
    shapes = {tensor.gguf_name: tensor.shape for tensor in tensor_table(config)}
    if divisors(config) is not None:
        shapes[ROPE_FREQS] = (config.resolved_head_dim // 2,)
    return shapes


def plan_gguf(config: TrainableModelConfig, quantize: FileType | str, *, weighted: bool = False) -> Plan:
    """Return the storage of each tensor by GGUF's names, and the size of them all, for a model of this shape.

    It needs no weights.  ConfigError if the type is none, or no file can say the shape.
    """
    kind = file_type(quantize) if isinstance(quantize, str) else quantize
    write_gguf(config)  # raises for a shape that cannot be said
    heads = config.num_heads, config.num_kv_heads
    subject = Subject(gguf_entry(config).architecture, config.num_layers, *heads, config.num_experts or 0)
    return quantising.plan(gguf_shapes(config), subject, kind, weighted=weighted)


def write_gguf_model(
    path: str | Path,
    model: tuple[TrainableModelConfig, tuple[Tensor, ...], Mapping[str, Kept]],
    quantize: FileType | str = "F32",
    *,
    metadata: Mapping[str, Any] | None = None,
    importance: Mapping[str, np.ndarray] | None = None,
    max_shard_size: int | str | None = None,
    check: bool = False,
    progress: Progress | None = None,
) -> Written:
    """Write a model (its shape, table and tensors by our names), and return the files that it is in.

    metadata     entries besides those of the architecture: a name, the tokenizer
    importance   by GGUF's names, how much an error in each column counts: (K,) float32, of experts (E, K)
    check        read it again: CheckpointError unless every number is as near as its type keeps it
    ConfigError for a shape that such files cannot say; NonFiniteError for weights that are not finite, or too large for
    the type; errors of `formats.gguf.checking.write_checked`.
    """
    config, table, tensors = model
    planned = plan_gguf(config, quantize, weighted=importance is not None)
    entry = gguf_entry(config)
    content = {
        **write_gguf(config),
        "general.type": "model",
        **planned.type.metadata,
        **(metadata or {}),
    }
    written = []
    if (factors := divisors(config)) is not None:
        written.append(_planned(ROPE_FREQS, factors.shape, _Rows(Stored(factors), "float32", ROPE_FREQS)))
    for tensor in table:
        kept = tensors[tensor.name]
        heads = heads_of(tensor.name.rpartition(".")[2], config) if entry.permuted else 0
        rows = _Rows(
            Stored(kept) if isinstance(kept, np.ndarray) else kept,
            planned.storages[tensor.gguf_name],
            tensor.gguf_name,
            rows_in_file(heads, config.resolved_head_dim) if heads else None,
            1.0 if entry.plus_one and len(tensor.shape) == 1 else 0.0,
        )
        written.append(_planned(tensor.gguf_name, tensor.shape, rows, (importance or {}).get(tensor.gguf_name)))
    largest = None if max_shard_size is None else bytes_of_size(max_shard_size)
    return write_checked(path, content, written, largest=largest, check=check, progress=progress)


def _planned(name: str, shape: tuple[int, ...], rows: "_Rows", importance: np.ndarray | None = None) -> PlannedTensor:
    return PlannedTensor(name=name, shape=shape, kind=BY_STORAGE[rows.storage], rows=rows, importance=importance)


def _rows_of(kept: Stored | Stack | MergedStack, first: int, last: int) -> Stored:
    """Return rows of a matrix, or of stacked ones as if each lay below the one before."""
    if isinstance(kept, Stored) and len(kept.shape) == 2:
        return kept.part(first, last)
    height = kept.shape[1]
    cut = range(first // height, -(-last // height))
    parts = [kept.at((e,)).part(max(first - e * height, 0), last - e * height) for e in cut]
    if len({(part.bf16, part.raw.dtype) for part in parts}) == 1:
        return Stored(np.concatenate([part.raw for part in parts]), parts[0].bf16)
    return Stored(np.concatenate([np.asarray(part.widened(), np.float32) for part in parts]))


@dataclass(frozen=True)
class _Rows:
    """Gives the rows of a tensor as they are written: raw ones where it is kept so, else float32."""

    kept: Stored | Stack | Encoded | Merged | MergedStack
    storage: str
    name: str
    order: np.ndarray | None = None  # of the rows, where it is not ours
    plus: float = 0.0

    def __call__(self, first: int, last: int) -> np.ndarray:
        rows = np.arange(first, last) if self.order is None else self.order[first:last]
        if isinstance(self.kept, Encoded):
            if self.kept.storage.name == self.storage:
                raw = self.kept.raw[first:last] if self.order is None else self.kept.raw[rows]
                return self._finite(raw, first, self.kept.storage)
            out = np.empty((len(rows), self.kept.shape[-1]), np.float32)
            self.kept.storage.rows(out, rows, self.kept.raw)
            return out
        if isinstance(self.kept, Merged):
            low, high = (first, last) if self.order is None else (int(rows.min()), int(rows.max()) + 1)
            return self.kept.rows(low, high)[rows - low]
        shape = self.kept.shape
        if len(shape) == 1:  # a vector is one row
            numbers = np.asarray(self.kept.widened(), np.float32)
            numbers = numbers if self.order is None else numbers[self.order]
            return (numbers + np.float32(self.plus))[None]
        if self.order is None or isinstance(self.kept, Stack | MergedStack):  # experts have no heads
            part = _rows_of(self.kept, first, last)
        else:
            part = Stored(self.kept.raw[rows], self.kept.bf16)
        if self.storage != "float32" and self.storage == ("bf16" if part.bf16 else str(part.raw.dtype)):
            return self._finite(part.raw, first, STORAGES[self.storage])
        return np.ascontiguousarray(part.widened(), np.float32)

    def _finite(self, raw: np.ndarray, first: int, storage: Storage) -> np.ndarray:
        """Return rows as they are; NonFiniteError for NaN or infinity: what is encoded, the writer looks at itself."""
        bad = storage.nonfinite_rows(raw)
        if bad.any():
            row = first + int(bad.argmax())
            raise NonFiniteError(f"{self.name} holds NaN or infinity in row {row}; nothing was saved; mend its source")
        return raw
