"""The products of a mixture of experts, in the two ways in which experts are kept.

    FusedExperts     float32, trained or not: each product is one call for all experts (`kernels/experts.py`)
    StoredExperts    as they lie in a file, not trained: one expert after the other, those that have rows

    gate_up            y_s   = n_token[s] [W_gate W_up]ᵀ
    down               out_n = a_n + Σ_{s of n} h_s W_downᵀ
    gate_up_backward   dn_n += Σ_{s of n} dy_s [W_gate W_up]
    down_backward      dh_s  = dout_token[s] W_down

    n dn out dout a (N, C)   y dy (S, 2F): gate and up side by side   h dh (S, F)   token (S,)   offsets (E + 1,)

An expert as it lies is a frozen matrix like any other (`kernels/stored_matmul.py`): few rows read its blocks and
nothing else, many decode it in strips, and one that no token has chosen is not read.  Its rows are gathered ROWS at a
time, so that memory does not depend on how many an expert has.

Forward has the bits of the fused kernels on the decoded weights: an element is a sum over experts in order, then over
slices of depth, in either way.  There are two exceptions.  In bfloat16, a processor that multiplies tiles (AMX) begins
a sum with what the experts before have added, where the kernel adds afterwards.  And `gate_up_backward` adds gate's sum
and up's after each other, where the kernel has them in one.  In generation, experts in blocks are multiplied as whole
numbers where all such matrices are (`kernels/integer_matmul.py`).
"""

from collections.abc import Iterator
from typing import NamedTuple, Protocol

import numpy as np

from ...kernels.engine.scratch import scratch
from ...kernels.unchecked import from_experts, to_experts
from ...parameters import Weight
from .linear import Joined
from .run import Run

__all__ = ["ExpertProducts", "FusedExperts", "Rows", "StoredExperts", "products_of"]

ROWS = 1024  # of an expert that are gathered at once: a strip that is decoded for them costs a hundredth of its product


class Rows(NamedTuple):
    """Which rows are whose, as the router says: int32."""

    token: np.ndarray  # (S,)
    offsets: np.ndarray  # (E + 1,)


class ExpertProducts(Protocol):
    """What a layer asks for."""

    def gate_up(self, y: np.ndarray, n: np.ndarray, rows: Rows, run: Run) -> None: ...
    def down(self, out: np.ndarray, h: np.ndarray, rows: Rows, addend: np.ndarray, run: Run) -> None: ...
    def gate_up_backward(self, dn: np.ndarray, dy: np.ndarray, rows: Rows, run: Run) -> None: ...
    def down_backward(self, dh: np.ndarray, dout: np.ndarray, rows: Rows, run: Run) -> None: ...


def products_of(gate: Weight, up: Weight, down: Weight) -> ExpertProducts:
    """Return those of experts, by how they are kept."""
    stored = any(weight.each for weight in (gate, up, down))
    return StoredExperts(gate, up, down) if stored else FusedExperts(gate, up, down)


class FusedExperts:
    """Those of matrices (E, out, in) in float32."""

    def __init__(self, gate: Weight, up: Weight, down: Weight) -> None:
        """Take the experts' matrices."""
        self._gate, self._up, self._down = gate.w, up.w, down.w

    def gate_up(self, y: np.ndarray, n: np.ndarray, rows: Rows, run: Run) -> None:
        """Overwrite y (S, 2F)."""
        to_experts(y, n, *rows, self._gate, self._up, number_format=run.number_format)

    def down(self, out: np.ndarray, h: np.ndarray, rows: Rows, addend: np.ndarray, run: Run) -> None:
        """Overwrite out (N, C); addend may be out."""
        from_experts(out, h, *rows, self._down, addend=addend, number_format=run.number_format)

    def gate_up_backward(self, dn: np.ndarray, dy: np.ndarray, rows: Rows, run: Run) -> None:
        """Add to dn (N, C)."""
        same = {"transposed": False, "addend": dn, "number_format": run.number_format}
        from_experts(dn, dy, *rows, self._gate, self._up, **same)

    def down_backward(self, dh: np.ndarray, dout: np.ndarray, rows: Rows, run: Run) -> None:
        """Overwrite dh (S, F)."""
        to_experts(dh, dout, *rows, self._down, transposed=False, number_format=run.number_format)


class StoredExperts:
    """Those of matrices that are each in a storage; the calls depend on what the router chose, so no replay has them.

    Methods as those of `FusedExperts`.
    """

    def __init__(self, gate: Weight, up: Weight, down: Weight) -> None:
        """Take the experts' matrices."""
        self._gate, self._up, self._down = map(_each, (gate, up, down))

    def gate_up(self, y: np.ndarray, n: np.ndarray, rows: Rows, run: Run) -> None:
        """Overwrite y (S, 2F)."""
        middle = y.shape[1] // 2
        for e, own, tokens in _pieces(rows):
            x = _gathered(n, tokens)
            _multiply(self._gate[e], y[own, :middle], x, None, run)
            _multiply(self._up[e], y[own, middle:], x, None, run)

    def down(self, out: np.ndarray, h: np.ndarray, rows: Rows, addend: np.ndarray, run: Run) -> None:
        """Overwrite out (N, C); addend may be out."""
        if addend is not out:
            np.copyto(out, addend)
        for e, own, tokens in _pieces(rows):
            some = _gathered(out, tokens)
            _multiply(self._down[e], some, h[own], some, run)
            out[tokens] = some

    def gate_up_backward(self, dn: np.ndarray, dy: np.ndarray, rows: Rows, run: Run) -> None:
        """Add to dn (N, C)."""
        middle = dy.shape[1] // 2
        for e, own, tokens in _pieces(rows):
            some = _gathered(dn, tokens)
            self._gate[e].product_backward(some, dy[own, :middle], some, run)
            self._up[e].product_backward(some, dy[own, middle:], some, run)
            dn[tokens] = some

    def down_backward(self, dh: np.ndarray, dout: np.ndarray, rows: Rows, run: Run) -> None:
        """Overwrite dh (S, F)."""
        for e, own, tokens in _pieces(rows):
            self._down[e].product_backward(dh[own], _gathered(dout, tokens), None, run)


def _each(weight: Weight) -> list[Joined]:
    """Return the matrices of a stack, one by one."""
    if weight.each:
        return [Joined(None, one.w, None, one.storage) for one in weight.each]
    return [Joined(None, w, None, weight.storage) for w in weight.w]


def _pieces(rows: Rows) -> Iterator[tuple[int, slice, np.ndarray]]:
    """Yield an expert, some of its rows, and their tokens, which are all different."""
    offsets = rows.offsets.tolist()
    for e in np.flatnonzero(np.diff(rows.offsets)).tolist():
        for first in range(offsets[e], offsets[e + 1], ROWS):
            own = slice(first, min(first + ROWS, offsets[e + 1]))
            yield e, own, rows.token[own]


def _gathered(x: np.ndarray, tokens: np.ndarray) -> np.ndarray:
    """Return a copy of rows of x, until the next call."""
    (memory,) = scratch("stored experts: rows", (ROWS, x.shape[1]))
    return np.take(x, tokens, axis=0, out=memory[: len(tokens)], mode="clip")  # which other modes would fill by a copy


def _multiply(w: Joined, y: np.ndarray, x: np.ndarray, addend: np.ndarray | None, run: Run) -> None:
    """Write y = x Wᵀ (+ addend)."""
    if run.slots is None:
        w.product(y, x, addend, run)
    else:  # generation
        w.decode(y, x, addend, run)
