"""Products with a matrix that is not trained, in whatever storage it is kept (`storage/`).

    forward    y  = x Wᵀ         (N, K) x (M, K) -> (N, M)     W is kept as raw, (M, items of the storage)
    backward   dx = dy W         (N, M) x (M, K) -> (N, K)     no dw: W is frozen
    rows       x_n = W[id_n]     (N,)            -> (N, K)     an embedding

W is never expanded as a whole.  Storages that the packers of `matmul.py` read (float32, bfloat16) go straight to its
products.  Of any other, STRIP rows at a time are decoded to float32 scratch and multiplied there:

    for each strip of rows of W:      decode it;  y[:, strip] = x stripᵀ      or      dx (+)= dy[:, strip] strip

With few rows of x (a token for each of some sequences, in generation) not even that: half precision is read as it is
too, and of all others LANES rows of W are decoded into a cache of the core and multiplied with all rows of x while they
are there (`engine/streams.py`), so memory is read once, and only the bytes that are kept.

Matrices that read the same x are one call there (`stored_products`), where they are multiplied in the same way: threads
begin and end together once, and x is rounded to bytes once.

The bits are those of one product with all of W decoded: y's elements do not depend on how columns are cut up or on the
number of rows, and the sums of dx go over the rows of W in slices of the same length (`NumberFormat.slice_terms`).
"""

import functools
from collections.abc import Hashable, Iterator, Sequence
from itertools import groupby
from typing import Any

import numba
import numpy as np

from .engine.checks import Array, check_apart, checked, unchecked
from .engine.few_rows import MOST
from .engine.jit import kernel, prange
from .engine.number_formats import FLOAT32, AnyFormat
from .engine.scratch import scratch
from .engine.shares import MATRICES, share_of
from .engine.simd import LANES
from .engine.streams import STREAMED, stream, streams
from .engine.threads import ONE_THREAD, thread_count
from .integer_matmul import integer_product, integer_products
from .matmul import BACKEND, THREADS, product, product_ref
from .storage import Storage
from .storage.blocks import BlockStorage
from .streamed_matmul import streamed_product, streamed_products

__all__ = [
    "stored_product",
    "stored_product_backward",
    "stored_product_backward_ref",
    "stored_product_ref",
    "stored_products",
    "stored_products_ref",
    "stored_rows",
    "stored_rows_ref",
    "strips",
]

FEW = 4 * STREAMED  # rows of x that are multiplied with rows of W while these are in cache
STRIP = 1024  # rows: whole slices of a product's sum, of every number format

# -- reference: plain NumPy, x and dy in any float dtype ---------------------------------------


def stored_product_ref(x: Array, raw: Array, storage: Storage, addend: Array | None = None) -> Array:
    """Return x Wᵀ (+ addend)."""
    return product_ref(x, storage.decode_ref(raw).astype(x.dtype), transpose_b=True, addend=addend)


def stored_product_backward_ref(dy: Array, raw: Array, storage: Storage, addend: Array | None = None) -> Array:
    """Return dx = dy W (+ addend)."""
    return product_ref(dy, storage.decode_ref(raw).astype(dy.dtype), addend=addend)


def stored_products_ref(
    x: Array, raws: Sequence[Array], storages: Sequence[Storage], addend: Array | None = None
) -> Array:
    """Return x [W1; W2; ...]ᵀ (+ addend)."""
    y = np.concatenate([stored_product_ref(x, *of_one) for of_one in zip(raws, storages, strict=True)], axis=1)
    return y if addend is None else y + addend


def stored_rows_ref(ids: Array, raw: Array, storage: Storage) -> Array:
    """Return the rows `ids` (N,) of W, (N, K) float32."""
    return storage.decode_ref(raw[ids])


# -- kernels -----------------------------------------------------------------------------------


@functools.cache
def _product_of_few_rows(decode_at):
    """Return the kernel of one storage."""

    @kernel
    def product_of_few_stored_rows(c, d, a, raw, first, small, wide, table, decoded, add, parts, routines):
        """c (N, M) = a (N, K) Wᵀ (+ d if add); first to table: `Storage.side`; decoded (threads, LANES, K): scratch."""
        rows, columns = c.shape
        for part in prange(parts):
            w = decoded[numba.get_thread_id()]
            last = share_of(columns, LANES, np.int64(part) + 1, parts)
            for j in range(share_of(columns, LANES, np.int64(part), parts), last, LANES):
                cols = min(LANES, last - j)
                for r in range(cols):
                    decode_at(w[r], raw, j + r, first, small, wide, table)
                for i in range(0, rows, STREAMED):
                    stream(c, d, i, j, min(STREAMED, rows - i), cols, a, w, 0, add, routines)

    return product_of_few_stored_rows


# -- calling them ------------------------------------------------------------------------------


def _raw_fits(sizes, raw, storage, **others):
    storage.check(raw, sizes["K"])


def _forward_fits(sizes, y, x, raw, storage, addend, **others):
    _raw_fits(sizes, raw, storage)
    check_apart("y", y, addend, x=x, raw=raw)


def _all_fit(sizes, y, x, raws, storages, addend, **others):
    if len(raws) != len(storages):
        raise ValueError(f"{len(raws)} matrices have {len(storages)} storages; name one for each")
    for index, (raw, storage) in enumerate(zip(raws, storages, strict=True)):
        storage.check(raw, sizes["K"], f"raws[{index}]")
        if raw.size and (raw.strides[1] != raw.itemsize or raw.strides[0] % raw.itemsize):
            raise ValueError(
                f"raws[{index}] has numbers {raw.strides[1]} bytes apart; stored_products takes rows whose numbers are "
                f"side by side; use np.ascontiguousarray(raws[{index}])"
            )
        check_apart("y", y, addend, x=x, raw=raw)
    if (rows := sum(map(len, raws))) != sizes["M"]:
        raise ValueError(f"y has {sizes['M']} columns; the matrices have {rows} rows together; both must be as many")


def _backward_fits(sizes, dx, dy, raw, storage, addend, **others):
    _raw_fits(sizes, raw, storage)
    check_apart("dx", dx, addend, dy=dy, raw=raw)


def strips(raw: Array, storage: Storage, columns: int) -> Iterator[tuple[slice, Array]]:
    """Yield (slice of the rows of W, these rows in float32 scratch that the next ones overwrite)."""
    for first in range(0, max(1, len(raw)), STRIP):  # of no rows, one strip of none: dx is still to be written
        rows = slice(first, min(first + STRIP, len(raw)))
        (strip,) = scratch("stored product: strip", (rows.stop - first, columns))
        storage.decode(strip, raw, first)
        yield rows, strip


@checked(
    "y! addend? (N, M); x (N, K); raw (M, items) float32|float16|uint16|uint8",
    _forward_fits,
    storage=Storage,
    number_format=AnyFormat,
)
def stored_product(
    y: Array,
    x: Array,
    raw: Array,
    storage: Storage,
    addend: Array | None = None,
    number_format: AnyFormat = FLOAT32,
    integer: bool = False,
) -> None:
    """Write y = x Wᵀ (+ addend); addend may be y; x and W are rounded to the number format as in `product`.

    With `integer`, what is kept as whole numbers is multiplied as whole numbers, x rounded to bytes, whatever the
    number format (`integer_matmul.py`).  In either way a row's bits are those of the row alone.
    """
    if integer and isinstance(storage, BlockStorage):
        unchecked(integer_product)(y, x, raw, storage, addend)
        return
    exact = number_format is FLOAT32 and BACKEND == "numba"
    if exact and storage.read_by_streams and (storage.read_by_products or len(x) <= STREAMED):
        unchecked(streamed_product)(y, x, storage.for_kernels(raw), addend)
    elif storage.read_by_products:
        unchecked(product)(y, x, storage.for_kernels(raw), False, True, addend, number_format)
    elif exact and 0 < len(x) <= FEW and x.shape[1]:
        (decoded,) = scratch("stored product: rows", (THREADS, LANES, x.shape[1]))
        parts = 1 if y.size * x.shape[1] < ONE_THREAD else thread_count()
        multiply, options = _product_of_few_rows(storage.decode_at), (addend is not None, parts, streams())
        kept = storage.for_kernels(raw), *storage.side
        multiply(y, y if addend is None else addend, x, *kept, decoded, *options)
    else:
        for rows, strip in strips(raw, storage, x.shape[1]):
            base = None if addend is None else addend[:, rows]
            unchecked(product)(y[:, rows], x, strip, False, True, base, number_format)


@checked("y! addend? (N, M); x (N, K)", _all_fit, raws=tuple, storages=tuple)
def stored_products(
    y: Array,
    x: Array,
    raws: tuple[Array, ...],
    storages: tuple[Storage, ...],
    addend: Array | None = None,
    integer: bool = False,
) -> None:
    """Write y (N, ΣM) = x [W1; W2; ...]ᵀ (+ addend), of matrices in any storages: the bits of `stored_product` of each.

    Neighbours that few rows of x are multiplied with in the same way are one call of a kernel.
    """
    ways = [_way(len(x), raw, storage, integer) for raw, storage in zip(raws, storages, strict=True)]
    starts = [0]
    for raw in raws:
        starts.append(starts[-1] + len(raw))
    for way, members in groupby(range(len(raws)), ways.__getitem__):
        run = list(members)
        size = 1 if way is None or x.shape[1] == 0 else MATRICES
        for first in range(run[0], run[-1] + 1, size):
            part = slice(first, min(first + size, run[-1] + 1))
            columns = slice(starts[part.start], starts[part.stop])
            base = None if addend is None else addend[:, columns]
            _products(y[:, columns], x, raws[part], storages[part], base, integer)


def _way(rows: int, raw: Array, storage: Storage, integer: bool) -> Hashable:
    """Return what matrices that can be multiplied in one call with so many rows have in common; None: alone."""
    if integer and isinstance(storage, BlockStorage):
        return ("whole numbers", raw.flags.c_contiguous) if 0 < rows <= MOST else None
    if storage.read_by_streams and BACKEND == "numba" and 0 < rows <= STREAMED:
        return raw.dtype, raw.flags.c_contiguous
    return None


def _products(
    y: Array, x: Array, raws: tuple[Array, ...], storages: tuple[Any, ...], addend: Array | None, integer: bool
) -> None:
    """Do that for matrices that are multiplied in one call."""
    if len(raws) == 1:
        unchecked(stored_product)(y, x, raws[0], storages[0], addend, integer=integer)
    elif integer and isinstance(storages[0], BlockStorage):
        integer_products(y, x, raws, storages, addend)
    else:
        matrices = [storage.for_kernels(raw) for raw, storage in zip(raws, storages, strict=True)]
        streamed_products(y, x, matrices, addend)


@checked(
    "dx! addend? (N, K); dy (N, M); raw (M, items) float32|float16|uint16|uint8",
    _backward_fits,
    storage=Storage,
    number_format=AnyFormat,
)
def stored_product_backward(
    dx: Array, dy: Array, raw: Array, storage: Storage, addend: Array | None = None, number_format: AnyFormat = FLOAT32
) -> None:
    """Write dx = dy W (+ addend); addend may be dx; dy and W are rounded to the number format as in `product`."""
    if storage.read_by_products:
        unchecked(product)(dx, dy, storage.for_kernels(raw), False, False, addend, number_format)
        return
    base = addend
    for rows, strip in strips(raw, storage, dx.shape[1]):
        unchecked(product)(dx, dy[:, rows], strip, False, False, base, number_format)
        base = dx


@checked(
    "x! (N, K); ids (N) int < V; raw (V, items) float32|float16|uint16|uint8",
    _raw_fits,
    storage=Storage,
)
def stored_rows(x: Array, ids: Array, raw: Array, storage: Storage) -> None:
    """Overwrite x (N, K) with the rows `ids` (N,) of W."""
    storage.rows(x, ids, raw)
