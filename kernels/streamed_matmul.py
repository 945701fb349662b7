"""y = x Wᵀ for generation: every weight is read from memory once for all rows of x, and at the speed of memory.

    forward    y = x Wᵀ      (N, K) x (M, K) -> (N, M)      no backward: it serves generation

An element of y is summed as in `matmul.py`: slices of 512 terms, each from the first term to the last, added up
one after the other.  So a row has the same bits alone, among others, in a prompt, and in `product`, and what multiplies
it is a matter of speed only:

    up to STREAMED rows     rows of W as they are in memory, multiplied with all rows of x at once (`engine/streams.py`)
    more                    `product`, which packs W
"""

import numpy as np

from .engine.checks import Array, check_apart, checked, unchecked
from .engine.jit import kernel, prange
from .engine.replay import by_numpy
from .engine.shares import share_of
from .engine.simd import LANES
from .engine.streams import STREAMED, stream, streams
from .engine.threads import ONE_THREAD, thread_count
from .matmul import BACKEND, product, product_ref

__all__ = ["streamed_product", "streamed_product_ref"]

# -- reference: plain NumPy, any float dtype ---------------------------------------------------


def streamed_product_ref(x: Array, w: Array, addend: Array | None = None) -> Array:
    """Return x wᵀ (+ addend)."""
    return product_ref(x, w, transpose_b=True, addend=addend)


# -- kernel -------------------------------------------------------------------------------------


@kernel
def _streamed(c, d, a, b, add, parts, table):
    """c (M, N) = a (M, K) b (N, K)ᵀ (+ d if add), M <= STREAMED."""
    rows, columns = c.shape
    for part in prange(parts):
        first = share_of(columns, LANES, np.int64(part), parts)
        last = share_of(columns, LANES, np.int64(part) + 1, parts)
        if first < last:
            stream(c, d, 0, first, rows, last - first, a, b, first, add, table)


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
        base = out if addend is None else addend
        parts = 1 if rows * w.size < ONE_THREAD else thread_count()
        _streamed(out, base, x, w, addend is not None, parts, streams(halves))
