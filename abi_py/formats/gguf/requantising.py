"""A GGUF file in another type: every key and tensor of it carried over, the matrices encoded anew.

What the rules leave alone (vectors, norms, what is no weight: `quantising.py`) keeps its bytes, and so does a matrix
that has its type already.  Nothing is known here of what the model computes, so files of any architecture are taken.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from ...errors import CheckpointError
from .container import GgufFile, GgufTensor
from .ggml_types import BY_STORAGE, GgmlType
from .importance import Importance
from .quantising import FileType, Subject, may_be_quantised, plan
from .values import I32, Value
from .writing import PlannedTensor

__all__ = ["Conversion", "Move", "convert", "subject_of"]

REMEDY = "get the file again, or convert it anew"


@dataclass(frozen=True)
class Move:
    """A tensor of a file and the type that it gets."""

    source: GgufTensor
    kind: GgmlType
    importance: np.ndarray | None = None

    @property
    def is_copy(self) -> bool:
        """Whether its bytes stay as they are."""
        return self.source.kind == self.kind

    @property
    def is_requantised(self) -> bool:
        """Whether it was quantised already, and loses more."""
        return not self.is_copy and self.source.kind.block > 1

    @property
    def nbytes(self) -> int:
        """What it will take."""
        return math.prod(self.source.shape) // self.kind.block * self.kind.bytes

    def planned(self) -> PlannedTensor:
        """Return it for the writer."""
        rows = self._raw if self.is_copy else self._numbers
        return PlannedTensor(
            name=self.source.name, shape=self.source.shape, kind=self.kind, rows=rows, importance=self.importance
        )

    def _raw(self, first: int, last: int) -> np.ndarray:
        return self.source.raw[first:last]

    def _numbers(self, first: int, last: int) -> np.ndarray:
        self.source.forget()  # what was read before: of a file of any size, a strip is in memory
        return self.source.numbers(first, last)


@dataclass(frozen=True)
class Conversion:
    """What a file becomes: its metadata, and its tensors in their order."""

    type: FileType
    metadata: Mapping[str, Value]
    moves: tuple[Move, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(move.nbytes for move in self.moves)

    @property
    def numbers(self) -> int:
        """How many numbers they have."""
        return sum(math.prod(move.source.shape) for move in self.moves)

    @property
    def bits_per_weight(self) -> float:
        """Bits that a number takes, on average."""
        return 8 * self.nbytes / self.numbers


def convert(file: GgufFile, type: FileType, importance: Importance | None = None) -> Conversion:
    """Return what a file becomes in a type; nothing is written.

    CheckpointError for a file that is no model, that lacks what the rules ask, or holds a matrix of a type that
    nothing here decodes, and for an importance of another model.
    """
    kind = file.get("general.type", str, "model")
    if kind != "model":
        raise CheckpointError(f"{file.path} is of type {kind!r}, and no model; give the file of a model")
    if not file.tensors:
        raise CheckpointError(f"{file.path} holds no tensors, only metadata; give the file of a model")
    shapes = {name: tensor.shape for name, tensor in file.tensors.items()}
    if importance is not None:
        importance.check(shapes)
    storages = plan(shapes, subject_of(file), type, weighted=importance is not None).storages
    columns = {} if importance is None else importance.columns
    moves = []
    for name, tensor in file.tensors.items():
        target = BY_STORAGE[storages[name]] if may_be_quantised(name, tensor.shape) else tensor.kind
        if target != tensor.kind:
            tensor.kind.require_storage(f"{file.path}: {name}")
        moves.append(Move(tensor, target, None if target == tensor.kind else columns.get(name)))
    return Conversion(type, _metadata(file, type, importance), tuple(moves))


def _metadata(file: GgufFile, type: FileType, importance: Importance | None) -> dict[str, Value]:
    found = {**file.metadata, **type.metadata}
    if importance is not None:  # the keys of llama-quantize
        found["quantize.imatrix.file"] = importance.path.name
        if importance.datasets:
            found["quantize.imatrix.dataset"] = importance.datasets[0]
        found["quantize.imatrix.entries_count"] = I32(len(importance.columns))
        if importance.chunks:
            found["quantize.imatrix.chunks_count"] = I32(importance.chunks)
    return found


def subject_of(file: GgufFile) -> Subject:
    """Return what the rules ask of a file's model, of whatever architecture."""
    architecture = file.require("general.architecture", str)

    def first(key: str, default: int | None = None) -> int:
        where = f"{architecture}.{key}"
        value = file.require(where, int | list[int]) if default is None else file.get(where, int | list[int], default)
        if isinstance(value, int):
            return value
        if not len(value):
            raise CheckpointError(f"{file.path}: {where} is an empty array; {REMEDY}")
        return int(value[0])  # as llama.cpp: that of the first block

    heads = first("attention.head_count", 1)
    blocks, keys = first("block_count"), first("attention.head_count_kv", heads)
    return Subject(architecture, blocks, heads, keys, first("expert_count", 0))
