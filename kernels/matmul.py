"""Matrix products: C = A B, each operand as it is or transposed, written or added.

    forward    y  = x Wᵀ        (N, K) x (M, K)  -> (N, M)     product(y, x, w, transpose_b=True)
    backward   dx = dy W        (N, M) x (M, K)  -> (N, K)     product(dx, dy, w)
               dw = dyᵀ x       (N, M) x (N, K)  -> (M, K)     product(dw, dy, x, transpose_a=True, addend=dw)

The three products of a linear layer are one kernel, because both operands are *packed* first: copied into panels that
the register tile (`tiles.tile`) reads straight through.  Transposing is only another way of packing, and so is any
storage format of weights.

    in parallel, for each part of C (about equal parts, one for each thread):
        for each slab of the part's B: slice_terms rows x slab_columns columns       packed; stays in last-level cache
            for each block of its A: block_rows rows x slice_terms                packed; stays in second-level cache
                for each panel of B, for each panel of A:  tile        a panel of A in first-level cache

The sizes are those of the number format (`engine/number_formats.py`).  A thread packs what it reads, even if another
packs the same: a packed slab that two cores write and both read costs more in traffic between them than packing it
twice (docs/log.md).  Every element of C is summed over the depth in the same order however C is cut up, so its bits are
the same for any number of threads.

With few rows of x (a token at a time, in generation) y = x Wᵀ reads each weight for a handful of multiply-adds, and its
time is that of reading W from memory: then rows of W are multiplied as they are there (`tiles.row_by_row`).

Read it in three steps: `product_loops_ref` (the sum as it is defined), `product_ref` (NumPy's product), and the kernel.
"""

import functools
import os

import numba
import numpy as np

from .engine.cache import numba_config
from .engine.checks import Array, check_apart, checked, unchecked
from .engine.halves import widen_bf16_ref
from .engine.jit import helper, kernel, prange
from .engine.number_formats import FLOAT32, AnyFormat
from .engine.panels import pack_a, pack_a_transposed, pack_b, pack_b_transposed, panel_depth
from .engine.routines import BLOCK_ROWS, COLUMNS, ROWS, SLAB_COLUMNS, SLICE_TERMS
from .engine.scratch import aligned_empty, scratch
from .engine.threads import thread_count
from .engine.tiles import begin, end, row_by_row, tile

PACKING_COST = 5  # packing an element takes as long as so many multiply-adds
FEW = 6  # rows of x up to which y = x Wᵀ is better off without packing
TASK_ROWS = 64  # rows of W of a task, where there are so few rows of x
ONE_THREAD = 1 << 16  # multiply-adds below which waking other threads does not pay
BACKEND = os.environ.get("ABI_MATMUL") or "numba"  # "blas": NumPy's product, for comparison only
if BACKEND not in ("numba", "blas"):
    raise ValueError(f"ABI_MATMUL ({BACKEND}) must be numba or blas; unset it to use the kernels of this file")

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
def _product(c, d, a, b, packed_a, packed_b, transpose_a, transpose_b, add, table, part_rows, part_columns):
    """c (M, N) = op(a) op(b) (+ d if add), in parts of part_rows x part_columns; packed_a, packed_b: scratch."""
    rows, columns = c.shape
    terms = a.shape[0] if transpose_a else a.shape[1]
    slice_terms, slab_columns, block_rows = table[SLICE_TERMS], table[SLAB_COLUMNS], table[BLOCK_ROWS]
    tile_rows, tile_columns = table[ROWS], table[COLUMNS]
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
                for i0 in range(top, bottom, block_rows):
                    height = min(block_rows, bottom - i0)
                    _pack_left(a_panels, a, i0, k0, height, k, transpose_a, table)
                    for j in range(0, width, tile_columns):
                        n = min(tile_columns, width - j)
                        for i in range(0, height, tile_rows):
                            m = min(tile_rows, height - i)
                            place = i0 + i, j0 + j, m, n, a_panels, i * steps, b_panels, j * steps, steps
                            if k0 > 0:
                                tile(c, c, *place, True, table)
                            else:
                                tile(c, d, *place, add, table)
        end(table)


@kernel
def _product_of_few_rows(c, d, a, b, add):
    """c (M, N) = a (M, K) b (N, K)ᵀ (+ d if add); b is read once."""
    rows, columns = c.shape
    for task in prange((columns + TASK_ROWS - 1) // TASK_ROWS):
        first = task * TASK_ROWS
        for j in range(first, min(columns, first + TASK_ROWS)):
            for i in range(rows):
                row_by_row(c, d, i, j, a, b, j, add)


# -- calling it ----------------------------------------------------------------------------------


THREADS = numba_config.NUMBA_NUM_THREADS


def panels(number_format):
    """Return the shapes of scratch for packed panels: a block of A and a slab of B for each thread."""
    block, slab = number_format.panels
    return (THREADS, block), (THREADS, slab)


@functools.lru_cache(maxsize=4096)
def _parts(rows, columns, depth, tile_rows, tile_columns, threads):
    """Return the rows and columns of a part: a grid of as many parts as threads, whose slowest part takes least."""
    if rows * columns * depth < ONE_THREAD:
        threads = 1
    best = None
    for down in range(1, threads + 1):
        across = threads // down
        height = -(-rows // (down * tile_rows)) * tile_rows
        width = -(-columns // (across * tile_columns)) * tile_columns
        cost = height * width + PACKING_COST * (height + width)
        if best is None or cost < best[0]:
            best = cost, height, width
    return best[1:]


def _streamed_fits(sizes, out, x, w, addend):
    check_apart("out", out, addend, x=x, w=w)


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
        a, b = (number_format.round_ref(widen_bf16_ref(x)) for x in (a, b))
        y = np.matmul(a.T if transpose_a else a, b.T if transpose_b else b)
        np.copyto(out, y if addend is None else y + addend)
        return
    rows, columns = out.shape
    if rows == 0 or columns == 0:
        return
    terms = a.shape[0] if transpose_a else a.shape[1]
    if terms == 0:
        out[...] = 0 if addend is None else addend
        return
    base = out if addend is None else addend
    kind = number_format.chosen
    parts = _parts(rows, columns, terms, kind.rows, kind.columns, thread_count())
    ways = transpose_a, transpose_b, addend is not None
    _product(out, base, a, b, *scratch("product", *panels(kind)), *ways, kind.table, *parts)  # type: ignore[call-arg]


@checked("out! addend? (N, M); x (N, K); w (M, K) float32|uint16", _streamed_fits)
def streamed_product(out: Array, x: Array, w: Array, addend: Array | None = None) -> None:
    """Write x wᵀ (+ addend) to out; up to FEW rows of x are multiplied with w as it is in memory.

    All float32, but w may be bfloat16 (as uint16).  For generation.  A row's bits are those of the row alone among few
    rows, and of `product` among more.
    """
    if len(x) > FEW or BACKEND == "blas":
        unchecked(product)(out, x, w, transpose_b=True, addend=addend)
    elif x.shape[1] == 0:
        out[...] = 0 if addend is None else addend
    else:
        _product_of_few_rows(out, out if addend is None else addend, x, w, addend is not None)


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
