"""Bias: add a learned vector to every row, as the linear layers of some families do.

    forward    y_n = y_n + b
    backward   dy is the gradient of the product's output as well        db = sum_n dy_n

    y dy (N, C)   b db (C,)   N = B*T       saved for backward: nothing

y is changed in place, db is added to.  Sums run in float64.  A product could begin with b, as an addend whose rows are
all the same memory; but Numba compiles a product anew for each layout of its operands, which takes longer than this
pass ever will.
"""

import numpy as np

from .engine.checks import Array, checked
from .engine.jit import kernel, prange
from .engine.shares import add_partial_sums, partial_sums

__all__ = ["bias_backward", "bias_backward_ref", "bias_forward", "bias_forward_ref"]

# -- reference: plain NumPy, any float dtype ---------------------------------------------------


def bias_forward_ref(y: Array, b: Array) -> Array:
    """Return y (N, C) with b (C,) added to every row."""
    return y + b


def bias_backward_ref(dy: Array) -> Array:
    """Return db (C,)."""
    return dy.sum(0)


# -- kernels: Numba, float32, outputs first ----------------------------------------------------


@checked("y! (N, C); b (C)")
@kernel
def bias_forward(y: Array, b: Array) -> None:
    """Add b (C,) to every row of y (N, C), in place."""
    N, C = y.shape
    for n in prange(N):
        for j in range(C):
            y[n, j] += b[j]


@checked("db! (C); dy (N, C)")
@kernel
def bias_backward(db: Array, dy: Array) -> None:
    """Add the sum of dy (N, C) over its rows to db (C,)."""
    N, C = dy.shape
    parts = partial_sums(N)
    partial = np.empty((parts, C), np.float64)
    for p in prange(parts):
        part = np.int64(p)
        for j in range(C):
            partial[part, j] = 0
        for n in range(N * part // parts, N * (part + 1) // parts):
            for j in range(C):
                partial[part, j] += dy[n, j]  # forward: y = ... + b
    add_partial_sums(db, partial)
