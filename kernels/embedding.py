"""Embedding: pick one row of the table for each token.

    forward    x_n = w[id_n]
    backward   dw[v] += sum over the rows n with id_n = v of dx_n

    x dx (N, C)   w dw (V, C)   ids (N,) int32, each in [0, V)   N = B*T      saved for backward: ids
    x is overwritten, or added to (learned positions are rows as well); dw is accumulated.

A token that occurs twice must be added twice, so two threads must never own the same element of dw.  A task of backward
has the tokens that are equal modulo `down`, and of many threads' tasks each has a slice of the columns only: it adds
all rows of these tokens, in the order of n.  No race, and the same bits for every number of threads.
"""

import numpy as np

from .engine.checks import Array, checked
from .engine.jit import kernel, prange
from .engine.shares import share_of
from .engine.threads import thread_count

__all__ = [
    "embedding_backward",
    "embedding_backward_ref",
    "embedding_forward",
    "embedding_forward_adding",
    "embedding_forward_ref",
    "grid",
]

ALONE = 1 << 19  # elements of dx below which a second thread does not pay (docs/log.md)
BY_TOKEN = 8  # tasks by tokens, before columns are shared too: a token that is every 20th makes one a third longer
NARROWEST = 32  # columns at least: 128 bytes, the two lines that hardware fetches together


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


@kernel
def _embedding_backward(dw, dx, ids, down, across):
    N, C = dx.shape
    for task in prange(down * across):
        turn, s = np.uint32(np.int64(task) // across), np.int64(task) % across
        start, stop = share_of(C, NARROWEST, s, across), share_of(C, NARROWEST, s + 1, across)
        for n in range(N):
            if down > 1 and np.uint32(ids[n]) % np.uint32(down) != turn:
                continue
            # Views that begin at 0: LLVM then sees plain vector code, four times as fast as dw[v, start + j].
            to, row = dw[ids[n], start:stop], dx[n, start:stop]
            for j in range(stop - start):
                to[j] += row[j]  # forward: x[n, j] = w[ids[n], j]


# -- calling it ----------------------------------------------------------------------------------


def grid(rows: int, columns: int, threads: int) -> tuple[int, int]:
    """Return into how many tasks backward is cut by tokens, times by columns: one for each thread."""
    if rows * columns < ALONE:
        return 1, 1
    across = min(max(1, threads // BY_TOKEN), -(-columns // NARROWEST))
    return threads // across, across


@checked("dw! (V, C); dx (N, C); ids (N) int < V")
def embedding_backward(dw: Array, dx: Array, ids: Array) -> None:
    """Add each row of dx (N, C) to the row of dw (V, C) that ids (N,) names."""
    if dx.size:
        rows, columns = dx.shape
        _embedding_backward(dw, dx, ids, *grid(rows, columns, thread_count()))
