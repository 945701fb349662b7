"""Global norm: the length of the whole gradient, for clipping and for the log.

    norm = sqrt(sum_i g_i^2)

    g (P,) float32, contiguous      returns a float64

Each block (`elements_each`) has a partial sum of its own, in float64, and the partial sums are added in order: same
bits for every number of threads.  A float64 sum cannot overflow here, so the result is inf or NaN only if an element
of g is.
"""

import math

import numpy as np

from .engine.checks import Array, checked
from .engine.jit import kernel, prange
from .engine.shares import elements_each
from .engine.vectors import sum_of_squares

__all__ = ["global_norm", "global_norm_ref"]


# -- reference: plain NumPy, any float dtype ---------------------------------------------------
def global_norm_ref(g: Array) -> float:
    """Return the norm of g (P,) as a float."""
    return math.sqrt(np.square(g, dtype=np.float64).sum())


# -- kernel: Numba, float32 --------------------------------------------------------------------
@checked("g (P)")
@kernel
def global_norm(g: Array) -> float:
    """Return the norm of g (P,) float32 as a float."""
    P = g.shape[0]
    each = elements_each(P)
    blocks = (P + each - 1) // each
    partial = np.empty(blocks, np.float64)
    for k in prange(blocks):
        start = np.int64(k) * each
        block = g[start : min(start + each, P)]
        partial[k] = sum_of_squares(block)
    total = 0.0
    for k in range(blocks):
        total += partial[k]
    return math.sqrt(total)
