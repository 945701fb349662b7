"""Matrix products: C = A B, each operand as it is or transposed, written or added.

    forward    y  = x Wᵀ        (N, K) x (M, K)  -> (N, M)     product(y, x, w, transpose_b=True)
    backward   dx = dy W        (N, M) x (M, K)  -> (N, K)     product(dx, dy, w)
               dw = dyᵀ x       (N, M) x (N, K)  -> (M, K)     product(dw, dy, x, transpose_a=True, addend=dw)

The three products of a linear layer are one kernel, because both operands are *packed* first: copied into panels that
the register tile (`tiles.tile`) reads straight through.  Transposing is only another way of packing, and so is any
storage format of weights.

    in parallel, for each part of C (about equal parts, one or a few for each thread):
        for each slice of the sum: slice_terms
            for each slab of the part's B: slab_columns columns       packed; stays in second- or last-level cache
                for each block of its A: block_rows rows              packed; stays in second-level cache
                    for each panel of B, for each panel of A:  tile   a panel of A in first-level cache

That is the order where B stays packed while blocks of A come by.  A part of few rows and many columns is done the
other way round: its A is packed once and stays, in the scratch that holds the slab of B otherwise, and small slabs of B
come by in that of the block.  So both operands are packed once wherever one of them fits.  The sizes are those of the
number format (`engine/number_formats.py`).  A thread packs what it reads, even if another packs the same: a packed slab
that two cores write and both read costs more in traffic between them than packing it twice (docs/log.md).  Every
element of C is summed over the depth in the same order however C is cut up, so its bits are the same for any number of
threads.

With few rows of x (a token at a time, in generation) y = x Wᵀ reads each weight for a handful of multiply-adds, and its
time is that of reading W from memory: that is `streamed_matmul.py`, with the same bits.

Read it in three steps: `product_loops_ref` (the sum as it is defined), `product_ref` (NumPy's product), and the kernel.
"""

import functools
import math
import os
from typing import Any, NamedTuple

import numba
import numpy as np

from .engine.cache import numba_config
from .engine.checks import Array, check_apart, checked, unchecked
from .engine.choice import Method
from .engine.halves import widen_bf16_ref
from .engine.jit import helper, kernel, prange
from .engine.number_formats import FLOAT32, AnyFormat
from .engine.panels import pack_a, pack_a_transposed, pack_b, pack_b_transposed, panel_depth
from .engine.replay import by_numpy
from .engine.routines import COLUMNS, ROWS, SLICE_TERMS
from .engine.scratch import aligned_empty, scratch
from .engine.threads import ONE_THREAD, thread_count
from .engine.tiles import begin, end, tile

PACKING_COST = 16  # packing an element takes as long as so many multiply-adds
PARTS_OF_THREAD = 4  # at most
BACKEND = os.environ.get("ABI_MATMUL") or "numba"  # "blas": NumPy's product, for comparison only
if BACKEND not in ("numba", "blas"):
    raise ValueError(f"ABI_MATMUL ({BACKEND}) must be numba or blas; unset it to use the kernels")

# -- reference ---------------------------------------------------------------------------------


def product_ref(
    a: Array, b: Array, transpose_a: bool = False, transpose_b: bool = False, addend: Array | None = None
) -> Array:
    """Return op(a) op(b) (+ addend) in the arrays' own dtype, where op transposes the last two axes if asked."""
    y = (a.swapaxes(-1, -2) if transpose_a else a) @ (b.swapaxes(-1, -2) if transpose_b else b)
    return y if addend is None else y + addend


def product_loops_ref(
    a: Array, b: Array, transpose_a: bool = False, transpose_b: bool = False, addend: Array | None = None
) -> Array:
    """Return the same of two matrices by three loops, one multiply-add at a time: the definition, and as slow."""
    a, b = a.T if transpose_a else a, b.T if transpose_b else b  # (M, K), (K, N)
    y = np.zeros((len(a), b.shape[1]), np.result_type(a, b)) if addend is None else addend.copy()
    for i in range(y.shape[0]):
        for j in range(y.shape[1]):
            for k in range(a.shape[1]):
                y[i, j] += a[i, k] * b[k, j]
    return y


# -- kernel --------------------------------------------------------------------------------------


@helper
def _pack_left(panels, a, i, k0, height, k, transposed, table):
    if transposed:
        pack_a_transposed(panels, 0, a, k0, i, height, k, table)
    else:
        pack_a(panels, 0, a, i, k0, height, k, table)


@helper
def _pack_right(panels, b, j, k0, width, k, transposed, table):
    if transposed:
        pack_b_transposed(panels, 0, b, j, k0, width, k, table)
    else:
        pack_b(panels, 0, b, k0, j, width, k, table)


@kernel
def _product(
    c,
    d,
    a,
    b,
    packed_a,
    packed_b,
    transpose_a,
    transpose_b,
    add,
    table,
    part_rows,
    part_columns,
    block_rows,
    slab_columns,
    a_stays,
):
    """c (M, N) = op(a) op(b) (+ d if add), cut up as `Parts` says; packed_a, packed_b: scratch."""
    rows, columns = c.shape
    terms = a.shape[0] if transpose_a else a.shape[1]
    slice_terms, tile_rows, tile_columns = table[SLICE_TERMS], table[ROWS], table[COLUMNS]
    down = (rows + part_rows - 1) // part_rows
    across = (columns + part_columns - 1) // part_columns
    for part in prange(down * across):
        thread = numba.get_thread_id()
        a_panels, b_panels = packed_a[thread], packed_b[thread]
        top = part // across * part_rows
        bottom = min(rows, top + part_rows)
        left = part % across * part_columns
        right = min(columns, left + part_columns)
        begin(table)
        for k0 in range(0, terms, slice_terms):
            k = min(slice_terms, terms - k0)
            steps = panel_depth(k, table)
            for j0 in range(left, right, slab_columns):
                width = min(slab_columns, right - j0)
                _pack_right(b_panels, b, j0, k0, width, k, transpose_b, table)
                across_slab = (width + tile_columns - 1) // tile_columns
                for i0 in range(top, bottom, block_rows):
                    height = min(block_rows, bottom - i0)
                    if j0 == left or not a_stays:
                        _pack_left(a_panels, a, i0, k0, height, k, transpose_a, table)
                    down_block = (height + tile_rows - 1) // tile_rows
                    outer, inner = (down_block, across_slab) if a_stays else (across_slab, down_block)
                    for x in range(outer):
                        for y in range(inner):
                            i, j = (x * tile_rows, y * tile_columns) if a_stays else (y * tile_rows, x * tile_columns)
                            m, n = min(tile_rows, height - i), min(tile_columns, width - j)
                            place = i0 + i, j0 + j, m, n, a_panels, i * steps, b_panels, j * steps, steps
                            if k0 > 0:
                                tile(c, c, *place, True, table)
                            else:
                                tile(c, d, *place, add, table)
        end(table)


# -- calling it ----------------------------------------------------------------------------------


THREADS = numba_config.NUMBA_NUM_THREADS


def panels(kind: Method) -> tuple[tuple[int, int], ...]:
    """Return the shapes of scratch for packed panels: a block of A and a slab of B for each thread."""
    block, slab = kind.panels
    return (THREADS, block), (THREADS, slab)


class Parts(NamedTuple):
    """How a product is cut up; which bits it has does not depend on it."""

    rows: int  # of a part of C
    columns: int
    block_rows: int  # of A that are packed at a time
    slab_columns: int  # of B that are packed at a time
    a_stays: bool  # A is packed once for each slice of the sum, not for each slab of B


@functools.lru_cache(maxsize=4096)
def _parts(rows: int, columns: int, depth: int, number_format: Any, threads: int) -> Parts:
    """Return the parts of which the slowest thread has done its own first.

    A grid of parts, at most PARTS_OF_THREAD times as many as threads, which take turns.  Of equal ones those that need
    least of the second-level cache: the fewest rows and columns that are packed at a time.
    """
    if rows * columns * depth < ONE_THREAD:
        threads = 1
    found: list[tuple[float, int, Parts]] = []
    for down in range(1, min(PARTS_OF_THREAD * threads, -(-rows // number_format.rows)) + 1):
        height = _even(rows, down, number_format.rows)
        for times in range(1, PARTS_OF_THREAD + 1):
            width = _even(columns, max(times * threads // down, 1), number_format.columns)
            turns = -(-(-(-rows // height) * -(-columns // width)) // threads)
            for a_stays in (False, True):
                block, slab, packed = _blocks(height, width, number_format, a_stays)
                cost = turns * (height * width + PACKING_COST * packed)
                found.append((cost, block + slab, Parts(height, width, block, slab, a_stays)))
    return min(found)[-1]


def _even(size, count, unit):
    """Return the size of `count` about equal parts, in whole units."""
    return -(-size // (count * unit)) * unit


def _blocks(height, width, number_format, a_stays):
    """Return the rows of a block of A and columns of a slab of B for a part, and how many of both are packed."""
    most_rows, most_columns = number_format.block_rows, number_format.slab_columns
    if a_stays:
        tile_rows, tile_columns = number_format.rows, number_format.columns
        most_rows, most_columns = most_columns // tile_rows * tile_rows, most_rows // tile_columns * tile_columns
        if height > most_rows or most_columns == 0:
            return height, width, math.inf
    slabs = -(-width // most_columns)
    block = _even(height, -(-height // most_rows), number_format.rows)
    slab = _even(width, slabs, number_format.columns)
    return block, slab, width + height * (1 if a_stays else slabs)


def _product_fits(sizes, out, a, b, transpose_a, transpose_b, addend, number_format):
    m, k = a.shape[::-1] if transpose_a else a.shape
    depth, n = b.shape[::-1] if transpose_b else b.shape
    if k != depth:
        raise ValueError(f"a sums over {k} elements and b over {depth}: shapes {a.shape} and {b.shape} do not fit")
    if out.shape != (m, n):
        raise ValueError(f"out has shape {out.shape}; the product has shape {(m, n)}")
    check_apart("out", out, addend, a=a, b=b)


@checked(
    "out! addend? (M, N); a (A, K) float32|uint16; b (B, L) float32|uint16", _product_fits, number_format=AnyFormat
)
def product(
    out: Array,
    a: Array,
    b: Array,
    transpose_a: bool = False,
    transpose_b: bool = False,
    addend: Array | None = None,
    number_format: AnyFormat = FLOAT32,
) -> None:
    """Write op(a) op(b) (+ addend) to out: matrices with unit column stride; addend may be out; a and b may not.

    out and addend are float32; a and b are float32, or uint16 that holds bfloat16.  `number_format` says what is
    multiplied: a and b are rounded to it while they are packed.  Sums are float32.
    """
    if BACKEND == "blas":
        by_numpy(_product_by_blas, out, a, b, transpose_a, transpose_b, addend, number_format)
        return
    rows, columns = out.shape
    if rows == 0 or columns == 0:
        return
    terms = a.shape[0] if transpose_a else a.shape[1]
    if terms == 0:
        by_numpy(np.copyto, out, np.float32(0) if addend is None else addend)
        return
    base = out if addend is None else addend
    kind = number_format.chosen
    parts = _parts(rows, columns, terms, kind, thread_count())
    packed_a, packed_b = scratch("product", *panels(kind))
    if parts.a_stays:
        packed_a, packed_b = packed_b, packed_a
    ways = transpose_a, transpose_b, addend is not None
    _product(out, base, a, b, packed_a, packed_b, *ways, kind.table, *parts)  # type: ignore[call-arg]


def _product_by_blas(out, a, b, transpose_a, transpose_b, addend, number_format):
    a, b = (number_format.round_ref(widen_bf16_ref(x)) for x in (a, b))
    y = np.matmul(a.T if transpose_a else a, b.T if transpose_b else b)
    np.copyto(out, y if addend is None else y + addend)


def _readable(x):
    """Say whether the kernel can walk x: columns side by side, rows whole floats apart (unlike fields of records)."""
    return (x.strides[1] == 4 or x.shape[1] == 1) and x.strides[0] % 4 == 0 and x.flags.aligned


def _operand(x, transposed, out):
    """Return x, or an equal matrix that the kernel can read, and whether it is to be transposed."""
    if np.may_share_memory(x, out):
        x = x.copy()
    if _readable(x):
        return x, transposed
    if _readable(x.T):
        return x.T, not transposed
    return np.array(x, order="C"), transposed


def matmul(
    a: Array,
    b: Array,
    out: Array | None = None,
    transpose_a: bool = False,
    transpose_b: bool = False,
    accumulate: bool = False,
) -> Array:
    """Return op(a) op(b), where op transposes the last two axes if asked; leading axes broadcast as in `np.matmul`.

    a (..., M, K), or (..., K, M) if transpose_a;  b (..., K, N), or (..., N, K) if transpose_b;  float32, any strides
    out (..., M, N) float32 is written and returned, or added to if `accumulate`

    Raises TypeError for another dtype and ValueError for shapes that do not fit.
    """
    for name, x in (("a", a), ("b", b), ("out", out)):
        if x is None:
            continue
        if not isinstance(x, np.ndarray) or x.dtype != np.float32:
            found = getattr(x, "dtype", type(x).__name__)
            raise TypeError(f"{name} is {found}; matmul takes float32 arrays; use {name}.astype(np.float32)")
        if x.ndim < 2:
            raise ValueError(f"{name} has shape {x.shape}; matmul takes matrices or stacks of them; add an axis")
    if out is not None and not out.flags.writeable:
        raise ValueError("out is read-only, and matmul writes to it; pass a writable array")
    if accumulate and out is None:
        raise ValueError("accumulate adds to an existing array; pass it as out=")
    m, k = a.shape[:-3:-1] if transpose_a else a.shape[-2:]
    depth, n = b.shape[:-3:-1] if transpose_b else b.shape[-2:]
    if k != depth:
        raise ValueError(f"a sums over {k} elements and b over {depth}: shapes {a.shape} and {b.shape} do not fit")
    stack = np.broadcast_shapes(a.shape[:-2], b.shape[:-2])
    shape = (*stack, m, n)
    if out is None:
        out = aligned_empty(shape)
    elif out.shape != shape:
        raise ValueError(f"out has shape {out.shape}; the product has shape {shape}")
    a = np.broadcast_to(a, (*stack, *a.shape[-2:]))
    b = np.broadcast_to(b, (*stack, *b.shape[-2:]))
    for index in np.ndindex(*stack):
        target = out[index]
        left, turn_a = _operand(a[index], transpose_a, out)
        right, turn_b = _operand(b[index], transpose_b, out)
        direct = _readable(target)
        y = target if direct else np.array(target, order="C")
        unchecked(product)(y, left, right, turn_a, turn_b, y if accumulate else None)
        if not direct:
            target[...] = y
    return out
