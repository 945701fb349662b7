"""y = x Wᵀ for generation: every weight is read from memory once for all rows of x, and at the speed of memory.

    forward    y = x Wᵀ      (N, K) x (M, K) -> (N, M)      no backward: it serves generation

An element of y is summed as in `matmul.py`: slices of 512 terms, each from the first term to the last, added up
one after the other.  So a row has the same bits alone, among others, in a prompt, and in `product`, and what multiplies
it is a matter of speed only:

    up to STREAMED rows     rows of W as they are in memory, multiplied with all rows of x at once (`engine/streams.py`)
    more                    `product`, which packs W

Several matrices that read the same x (q, k and v; gate and up) are one call, as if they were one below the other: each
thread has a share of each, and threads begin and end together once.
"""

from collections.abc import Sequence

import numpy as np

from .engine.checks import Array, check_apart, checked, unchecked
from .engine.jit import kernel, prange
from .engine.replay import by_numpy
from .engine.shares import filled, share_of
from .engine.simd import LANES
from .engine.streams import STREAMED, stream, streams
from .engine.threads import ONE_THREAD, thread_count
from .matmul import BACKEND, product, product_ref

__all__ = ["streamed_product", "streamed_product_ref", "streamed_products"]

# -- reference: plain NumPy, any float dtype ---------------------------------------------------


def streamed_product_ref(x: Array, w: Array, addend: Array | None = None) -> Array:
    """Return x wᵀ (+ addend)."""
    return product_ref(x, w, transpose_b=True, addend=addend)


# -- kernel -------------------------------------------------------------------------------------


@kernel
def _streamed(c, d, a, matrices, count, add, parts, table):
    """c (M, N) = a (M, K) bᵀ (+ d if add), M <= STREAMED, b (N, K): the first `count` matrices below one another."""
    rows = c.shape[0]
    for part in prange(parts):
        begin = 0
        for index in range(count):
            b = matrices[index]
            first = share_of(len(b), LANES, np.int64(part), parts)
            last = share_of(len(b), LANES, np.int64(part) + 1, parts)
            if first < last:
                stream(c, d, 0, begin + first, rows, last - first, a, b, first, add, table)
            begin += len(b)


# -- calling them ------------------------------------------------------------------------------


def _fits(sizes, out, x, w, addend):
    check_apart("out", out, addend, x=x, w=w)
    if w.dtype == np.int16 and len(x) > STREAMED:
        raise ValueError(
            f"x has {len(x)} rows; half precision is multiplied with at most {STREAMED} as it is; use stored_product"
        )


@checked("out! addend? (N, M); x (N, K); w (M, K) float32|uint16|int16", _fits)
def streamed_product(out: Array, x: Array, w: Array, addend: Array | None = None) -> None:
    """Write x wᵀ (+ addend) to out: all float32, but w may be bfloat16 (as uint16) or,
    for at most STREAMED rows, half precision (as int16).

    The bits are those of `product` in FLOAT32, however many rows there are.
    """
    rows = len(x)
    halves = w.dtype == np.int16
    if rows > STREAMED or (BACKEND == "blas" and not halves):
        unchecked(product)(out, x, w, transpose_b=True, addend=addend)
    elif x.shape[1] == 0:
        by_numpy(np.copyto, out, np.float32(0) if addend is None else addend)
    elif rows:
        streamed_products(out, x, [w], addend)


def streamed_products(out: Array, x: Array, matrices: Sequence[Array], addend: Array | None = None) -> None:
    """Write x [w1; w2; ...]ᵀ (+ addend) to out (N, ΣM), of 1 to MATRICES matrices of one type and layout.

    It checks nothing: there are 1 to STREAMED rows and some columns of x, and BACKEND is "numba" or w half precision.
    """
    base = out if addend is None else addend
    parts = 1 if out.size * x.shape[1] < ONE_THREAD else thread_count()
    table = streams(matrices[0].dtype == np.int16)
    _streamed(out, base, x, filled(matrices), len(matrices), addend is not None, parts, table)
