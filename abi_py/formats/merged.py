"""A matrix with an adapter in it, W + s B A, made a strip of rows at a time where its numbers are asked for.

So a model is written with its adapters merged in the memory of some rows, whatever its own matrices are kept in.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from ..kernels.matmul import product
from .encoded import Encoded, Turned
from .safetensors import PIECE, Stack, Stored

__all__ = ["Kept", "Merged", "MergedStack"]


class Rows(Protocol):
    """What is asked of the matrix itself."""

    @property
    def shape(self) -> tuple[int, ...]: ...
    def part(self, first: int, last: int, /) -> "Rows": ...
    def copy_to(self, out: np.ndarray, /) -> None: ...


@dataclass(frozen=True)
class Merged:
    """A matrix (out, in) as it is kept, and what is added to it: b (out, R), its factor in it, times a (R, in).

    Of DoRA the sum is multiplied by `factors`, float32: (out, 1) those of its rows, (1, in) of a table's columns.
    """

    of: Rows
    a: np.ndarray
    b: np.ndarray
    factors: np.ndarray | None = None

    is_float = True
    is_narrow = False

    @property
    def shape(self) -> tuple[int, ...]:
        """Its shape."""
        return self.of.shape

    def rows(self, first: int, last: int) -> np.ndarray:
        """Return some of its rows, (last - first, in) float32."""
        part = self.of.part(first, last)
        made = np.empty(part.shape, np.float32)
        part.copy_to(made)
        product(made, self.b[first:last], self.a, addend=made)
        if self.factors is not None:
            np.multiply(made, np.broadcast_to(self.factors, self.shape)[first:last], out=made)
        return made

    def at(self, index: tuple[int, ...]) -> "Merged":
        """Return itself: it is one matrix."""
        return self

    def settled(self) -> "Merged":
        """Return it ready to be read in strips of rows."""
        return self

    def turned(self) -> Turned:
        """Return it with rows for columns."""
        return Turned(self)

    def part(self, first: int, last: int) -> Stored:
        """Return some of its rows."""
        return Stored(self.rows(max(first, 0), min(last, self.shape[0])))

    def widened(self) -> np.ndarray:
        """Return its numbers, float32."""
        return self.rows(0, self.shape[0])

    def copy_to(self, out: np.ndarray) -> None:
        """Write its numbers to `out`, float32 of its shape."""
        for first, rows in self._strips():
            out[first : first + len(rows)] = rows

    def numbers(self) -> Iterator[np.ndarray]:
        """Yield its numbers in C order, in pieces."""
        for _, rows in self._strips():
            yield rows

    def _strips(self) -> Iterator[tuple[int, np.ndarray]]:
        step = max(1, PIECE // self.shape[1])
        for first in range(0, self.shape[0], step):
            yield first, self.rows(first, min(first + step, self.shape[0]))


class Matrices(Protocol):
    """What is asked of stacked matrices."""

    @property
    def shape(self) -> tuple[int, ...]: ...
    def at(self, index: tuple[int, ...], /) -> Rows: ...


@dataclass(frozen=True)
class MergedStack:
    """Stacked matrices (E, out, in) as they are kept, with an adapter in each: b (E, out, R) times a (E, R, in)."""

    of: Matrices
    a: np.ndarray
    b: np.ndarray

    is_float = True
    is_narrow = False

    @property
    def shape(self) -> tuple[int, ...]:
        """Its shape."""
        return self.of.shape

    def at(self, index: tuple[int, ...]) -> Merged:
        """Return one of its matrices."""
        (e,) = index
        return Merged(self.of.at((e,)), self.a[e], self.b[e])

    def settled(self) -> "MergedStack":
        """Return it ready to be read in strips of rows."""
        return self

    def turned(self) -> Turned:
        """Return it with rows for columns."""
        return Turned(self)

    def part(self, first: int, last: int) -> Stored:
        """Return some of what its first axis has."""
        return Stored(np.stack([self.at((e,)).widened() for e in range(first, min(last, len(self.a)))]))

    def widened(self) -> np.ndarray:
        """Return its numbers, float32."""
        return self.part(0, len(self.a)).raw

    def copy_to(self, out: np.ndarray) -> None:
        """Write its numbers to `out`, float32 of its shape."""
        for e, place in enumerate(out):
            self.at((e,)).copy_to(place)

    def numbers(self) -> Iterator[np.ndarray]:
        """Yield its numbers in C order, in pieces."""
        for e in range(len(self.a)):
            yield from self.at((e,)).numbers()


Kept = np.ndarray | Stored | Stack | Encoded | Merged | MergedStack  # what a model's tensors are written from
