"""Embedding: pick one row of the table for each token.

    forward    x_n = w[id_n]
    backward   dw[v] += sum over the rows n with id_n = v of dx_n

    x dx (N, C)   w dw (V, C)   ids (N,) int32, each in [0, V)   N = B*T      saved for backward: ids
    x is overwritten, or added to (learned positions are rows as well); dw is accumulated.

A token that occurs twice must be added twice, so two threads must never own the same element of dw.  The backward
kernel is parallel over fixed slices of columns: one thread adds all rows to its slice, in the order of n.  No race,
and the same bits for every number of threads.
"""

import numpy as np

from .engine.checks import Array, checked
from .engine.jit import kernel, prange

__all__ = [
    "embedding_backward",
    "embedding_backward_ref",
    "embedding_forward",
    "embedding_forward_adding",
    "embedding_forward_ref",
]

SLICE_COLUMNS = 128  # columns in a slice: 512 bytes, long enough for the hardware to fetch ahead


# -- reference: plain NumPy, any float dtype ---------------------------------------------------
def embedding_forward_ref(ids: Array, w: Array) -> Array:
    """Return x (N, C) for ids (N,) and w (V, C)."""
    return w[ids]


def embedding_backward_ref(dx: Array, ids: Array, vocab_size: int) -> Array:
    """Return dw (V, C) for dx (N, C) and ids (N,)."""
    dw = np.zeros((vocab_size, dx.shape[1]), dx.dtype)
    np.add.at(dw, ids, dx)
    return dw


# -- kernels: Numba, float32, outputs first ----------------------------------------------------
@checked("x! (N, C); ids (N) int < V; w (V, C)")
@kernel
def embedding_forward(x: Array, ids: Array, w: Array) -> None:
    """Overwrite x (N, C) with the rows ids (N,) of w (V, C)."""
    N, C = x.shape
    for n in prange(N):
        v = ids[n]
        for j in range(C):
            x[n, j] = w[v, j]


@checked("x! (N, C); ids (N) int < V; w (V, C)")
@kernel
def embedding_forward_adding(x: Array, ids: Array, w: Array) -> None:
    """Add the rows ids (N,) of w (V, C) to x (N, C)."""
    N, C = x.shape
    for n in prange(N):
        v = ids[n]
        for j in range(C):
            x[n, j] += w[v, j]


@checked("dw! (V, C); dx (N, C); ids (N) int < V")
@kernel
def embedding_backward(dw: Array, dx: Array, ids: Array) -> None:
    """Add each row of dx (N, C) to the row of dw (V, C) that ids (N,) names."""
    N, C = dx.shape
    slices = (C + SLICE_COLUMNS - 1) // SLICE_COLUMNS
    for s in prange(slices):
        start = np.int64(s) * SLICE_COLUMNS
        stop = min(start + SLICE_COLUMNS, C)
        for n in range(N):
            # Views that begin at 0: LLVM then sees plain vector code, four times as fast as dw[v, start + j].
            to, row = dw[ids[n], start:stop], dx[n, start:stop]
            for j in range(stop - start):
                to[j] += row[j]  # forward: x[n, j] = w[ids[n], j]
