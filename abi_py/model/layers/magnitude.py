"""Lengths that are trained beside an adapter (DoRA): of the rows of W + s B A, or of the columns of a table.

    rows       n_r = |w_r + s b_r A|     W (M, K)   A (R, K)   B (M, R)   m dm n g (M,)     of a matrix
    columns    n_c = |e_c + s A b_c|     E (V, C)   A (V, R)   B (C, R)   m dm n g (C,)     of a table of the embedding

n and g = m / n are worked out when A, B or m have changed (`measure`), not in a pass, in which they are constants.  The
arithmetic is `kernels/dora.py`, to which a table is W = Eᵀ with Aᵀ.
"""

from dataclasses import dataclass

import numpy as np

from ...kernels.engine.scratch import aligned_empty
from ...kernels.storage import Storage
from ...kernels.storage.float32 import STORAGE as FLOAT32
from ...kernels.unchecked import column_squares, product, row_factors, row_lengths, row_squares, strips
from ...parameters import Weight
from .linear import Joined
from .run import Run

__all__ = ["Magnitude", "TableMagnitude"]

ALONE = Run(1, 0, None, np.zeros(0, np.int32))  # of no pass: products are in float32


@dataclass(frozen=True)
class Magnitude:
    """The lengths of the rows of one matrix with an adapter."""

    base: Joined  # W
    a: np.ndarray  # (R, K)
    b: np.ndarray  # (M, R)
    scale: float  # s
    m: np.ndarray  # (M,)
    dm: np.ndarray
    n: np.ndarray  # (M,)
    g: np.ndarray  # (M,)
    squares: np.ndarray  # (M,) float64: |w_r|², which is measured once

    @classmethod
    def of(
        cls, w: np.ndarray, storage: Storage, a: np.ndarray, b: np.ndarray, scale: float, m: Weight
    ) -> "Magnitude":
        """Measure W, of which some rows are decoded at a time."""
        if m.dw is None:
            raise RuntimeError(f"{m.name} is a length without a gradient")
        squares = np.zeros(m.w.size)
        for rows, strip in strips(w, storage, storage.columns(w)) if storage is not FLOAT32 else [(slice(None), w)]:
            cls._add_squares(squares, rows, strip)
        own = np.empty_like(m.w), np.empty_like(m.w)
        return cls(Joined(None, w, None, storage), a, b, float(np.float32(scale)), m.w, m.dw, *own, squares)

    def begin(self) -> None:
        """Let m be the lengths as they are: those of W, as long as B, or a table's A, is 0."""
        self.measure()
        self.m[...] = self.n
        self.measure()

    def measure(self) -> None:
        """Work out n and g, as A, B and m now are."""
        a = self._inner()
        wa, gram = aligned_empty((len(a), len(self.m))), aligned_empty((len(a), len(a)))
        self._project(wa, a)
        product(gram, a, a, transpose_b=True)
        row_lengths(self.n, self.squares, wa, self.b, gram, self.scale)
        row_factors(self.g, self.m, self.n)

    def factors(self) -> np.ndarray:
        """Return what merging multiplies W + s B A with: g, (M, 1)."""
        return self.g[:, None]

    @staticmethod
    def _add_squares(squares: np.ndarray, rows: slice, w: np.ndarray) -> None:
        """Take account of some rows of W (n, K)."""
        row_squares(squares[rows], w)

    def _inner(self) -> np.ndarray:
        """Return A (R, K)."""
        return self.a

    def _project(self, wa: np.ndarray, a: np.ndarray) -> None:
        """Overwrite wa (R, M) with W Aᵀ, transposed."""
        self.base.product(wa, a, None, ALONE)


class TableMagnitude(Magnitude):
    """The lengths of the columns of a table (V, C) with an adapter: a (V, R), b (C, R), m dm n g (C,)."""

    def factors(self) -> np.ndarray:
        """Return what merging multiplies E + s A Bᵀ with: g, (1, C)."""
        return self.g[None]

    @staticmethod
    def _add_squares(squares: np.ndarray, rows: slice, w: np.ndarray) -> None:
        column_squares(squares, w)

    def _inner(self) -> np.ndarray:
        return np.ascontiguousarray(self.a.T)

    def _project(self, wa: np.ndarray, a: np.ndarray) -> None:
        self.base.product_backward(wa, a, None, ALONE)
