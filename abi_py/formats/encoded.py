"""A tensor as it is kept in blocks, of a few bits a number (`kernels/storage`), with the interface of `Stored`.

It is decoded in pieces, where its numbers are asked for, and never as a whole unless somebody wants it so.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from ..kernels.storage import STORAGES, Storage
from .safetensors import PIECE, Stack, Stored

__all__ = ["Encoded", "Turned", "arrays_of", "encoded_as", "kept_as", "storage_of"]

STRIP = 1024  # rows that are encoded at once: what is there twice of a matrix; a multiple of 64


@dataclass(frozen=True)
class Encoded:
    """A tensor (..., K) in a storage; raw (M, items) has a row for each row of K numbers."""

    raw: np.ndarray
    storage: Storage
    shape: tuple[int, ...]

    is_float = True
    is_narrow = True

    @property
    def raw_rows(self) -> int:
        """How many rows of raw an element of the first axis has."""
        return math.prod(self.shape[1:-1]) if len(self.shape) > 1 else 1

    @property
    def nbytes(self) -> int:
        """Its bytes in memory."""
        return self.raw.nbytes + self.storage.side_bytes

    def at(self, index: tuple[int, ...]) -> "Encoded":
        """Return one of its matrices, by the indices of the axes before them."""
        part = self
        for i in index:
            rows = part.raw_rows
            first = i * rows
            part = Encoded(part.raw[first : first + rows], part.storage.from_row(first), part.shape[1:])
        return part

    def turned(self) -> "Turned":
        """Return it with rows for columns."""
        return Turned(self)

    def settled(self) -> "Encoded":
        """Return it ready to be read in strips of rows."""
        return self

    def part(self, first: int, last: int) -> "Encoded":
        """Return some of what its first axis has; of a matrix, rows."""
        first, last, rows = max(first, 0), min(last, self.shape[0]), self.raw_rows
        shape = (max(last - first, 0), *self.shape[1:])
        return Encoded(self.raw[first * rows : last * rows], self.storage.from_row(first * rows), shape)

    def widened(self) -> np.ndarray:
        """Return its numbers, float32."""
        out = np.empty(self.shape, np.float32)
        self.copy_to(out)
        return out

    def copy_to(self, out: np.ndarray) -> None:
        """Write its numbers to `out`, float32 of its shape."""
        self.storage.decode(out.reshape(len(self.raw), -1), self.raw, 0)

    def numbers(self) -> Iterator[np.ndarray]:
        """Yield its numbers in C order, in pieces."""
        columns = self.shape[-1]
        rows = max(1, PIECE // max(columns, 1))
        for i in range(0, len(self.raw), rows):
            raw = self.raw[i : i + rows]
            yield Encoded(raw, self.storage.from_row(i), (len(raw), columns)).widened()


def kept_as(storage: Storage, raw: np.ndarray, shape: tuple[int, ...]) -> Stored | Encoded:
    """Return the tensor of a shape that raw rows in a storage are."""
    if storage.block > 1:
        return Encoded(raw, storage, shape)
    return Stored(raw.reshape(shape), storage.name == "bf16")


def storage_of(tensor: Stored | Encoded) -> Storage:
    """Return the storage that a tensor is kept in."""
    if isinstance(tensor, Encoded):
        return tensor.storage
    return STORAGES["bf16" if tensor.bf16 else tensor.raw.dtype.name]


def arrays_of(name: str, kept: Stored | Stack | Encoded) -> Iterator[tuple[str, np.ndarray]]:
    """Yield what a tensor consists of, by name: its numbers or codes, and the scales that lie apart from codes."""
    if isinstance(kept, Stack):
        for e, part in enumerate(kept.parts):
            yield from arrays_of(f"{name}.{e}", part)
        return
    yield name, kept.raw
    if isinstance(kept, Encoded):
        yield from ((f"{name}.{i}", part) for i, part in enumerate(kept.storage.side[1:3]) if part.size)


def encoded_as(storage: Storage, kept: Stored | Stack | Encoded) -> Encoded:
    """Return matrices (..., M, K) in another storage, in memory; of their numbers only STRIP rows are ever there.

    ValueError where rows are no whole blocks, or for a number that it cannot keep.
    """
    *stacked, height, columns = kept.shape
    rows = math.prod(stacked) * height
    raw, own = storage.encoded_strips((rows, columns), _strips(kept))
    return Encoded(raw, own, kept.shape)


def _strips(kept: Stored | Stack | Encoded) -> Iterator[np.ndarray]:
    """Yield the rows of stacked matrices as float32, as if each lay below the one before: STRIP of them, then the rest.
    """
    *stacked, height, columns = kept.shape
    strip, filled = np.empty((STRIP, columns), np.float32), 0
    for index in np.ndindex(*stacked):
        matrix, first = kept.at(index), 0
        while first < height:
            last = min(first + STRIP - filled, height)
            matrix.part(first, last).copy_to(strip[filled : filled + last - first])
            filled, first = filled + last - first, last
            if filled == STRIP:
                yield strip
                filled = 0
    if filled:
        yield strip[:filled]


class Turnable(Protocol):
    """What `Turned` asks of a tensor."""

    @property
    def shape(self) -> tuple[int, ...]: ...
    def at(self, index: tuple[int, ...], /) -> "Turnable": ...
    def widened(self) -> np.ndarray: ...


@dataclass(frozen=True)
class Turned:
    """A tensor with rows for columns, which is made a matrix at a time: blocks, and strips, are along its columns."""

    of: Turnable

    @property
    def shape(self) -> tuple[int, ...]:
        """Its shape."""
        *before, rows, columns = self.of.shape
        return (*before, columns, rows)

    def at(self, index: tuple[int, ...]) -> "Turned":
        """Return one of its matrices."""
        return Turned(self.of.at(index))

    def settled(self) -> Stored:
        """Return it decoded."""
        return Stored(self.of.widened().swapaxes(-1, -2))

    def part(self, first: int, last: int) -> Stored:
        """Return some of its rows."""
        return self.settled().part(first, last)

    def widened(self) -> np.ndarray:
        """Return its numbers, float32."""
        return self.settled().raw
