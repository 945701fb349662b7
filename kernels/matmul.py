"""Matrix products: C = A B, each operand as it lies or transposed, written or added.

    forward    y  = x Wᵀ        (N, K) x (M, K)  -> (N, M)     product(y, x, w, transpose_b=True)
    backward   dx = dy W        (N, M) x (M, K)  -> (N, K)     product(dx, dy, w)
               dw = dyᵀ x       (N, M) x (N, K)  -> (M, K)     product(dw, dy, x, transpose_a=True, addend=dw)

The three products of a linear layer are one kernel, because both operands are *packed* first: copied into panels that
the register tile (`tiles.tile`) reads straight through.  Transposing is only another way of packing, and so is any
storage format of weights.

    for each slab of B: DEPTH rows x as many columns as PACKED floats hold    (stays in the last-level cache)
        pack it, all threads together
        in parallel, for each block of A: up to BLOCK rows                    (stays in the second-level cache)
            for each slice of the depth: SLICE                                (its panels stay in the first-level cache)
                pack the block's slice of A
                for each panel of B, for each panel of A:  tile

Every element of C is summed over the depth in the same order whatever the number of threads, so its bits are the same
too.
"""

import os

import numba
import numpy as np

from ._jit import kernel, prange
from .tiles import COLUMNS, ROWS, pack_a, pack_a_transposed, pack_b, pack_b_transposed, tile

SLICE = 512  # depth of one pass of the tile; a panel of A is at most 16 KB
DEPTH = 2048  # depth of a packed slab of B
PACKED = 1 << 20  # floats of a packed slab of B: 4 MiB
BLOCK = 192 // ROWS * ROWS  # rows of a packed block of A: at most 384 KiB
BACKEND = os.environ.get("ABI_MATMUL") or "numba"  # "blas": NumPy's product, for comparison only
if BACKEND not in ("numba", "blas"):
    raise ValueError(f"ABI_MATMUL ({BACKEND}) must be numba or blas; unset it to use the kernels of this file")

# -- reference ---------------------------------------------------------------------------------


def product_ref(a, b, transpose_a=False, transpose_b=False, addend=None):
    """Return op(a) op(b) (+ addend) in the arrays' own dtype, where op transposes the last two axes if asked."""
    y = (a.swapaxes(-1, -2) if transpose_a else a) @ (b.swapaxes(-1, -2) if transpose_b else b)
    return y if addend is None else y + addend


# -- kernel --------------------------------------------------------------------------------------


@kernel
def _product(c, d, a, b, packed_a, packed_b, transpose_a, transpose_b, add, block):
    """c (M, N) = op(a) op(b) (+ d if add); packed_a (threads, ...) and packed_b (...) are scratch."""
    rows, columns = c.shape
    depth = a.shape[0] if transpose_a else a.shape[1]
    blocks = (rows + block - 1) // block
    for k0 in range(0, depth, DEPTH):
        slab_depth = min(DEPTH, depth - k0)
        slab_columns = max(PACKED // slab_depth // COLUMNS, 1) * COLUMNS
        for j0 in range(0, columns, slab_columns):
            width = min(slab_columns, columns - j0)
            panels = (width + COLUMNS - 1) // COLUMNS
            for q in prange(panels):
                j = j0 + q * COLUMNS
                n = min(COLUMNS, columns - j)
                if transpose_b:
                    pack_b_transposed(packed_b, q * COLUMNS * slab_depth, b, j, k0, n, slab_depth)
                else:
                    pack_b(packed_b, q * COLUMNS * slab_depth, b, k0, j, n, slab_depth)
            for index in prange(blocks):
                mine = packed_a[numba.get_thread_id()]
                first = index * block
                last = min(rows, first + block)
                for s in range(0, slab_depth, SLICE):
                    k = min(SLICE, slab_depth - s)
                    base = add or k0 + s > 0
                    if transpose_a:
                        pack_a_transposed(mine, 0, a, k0 + s, first, last - first, k)
                    else:
                        pack_a(mine, 0, a, first, k0 + s, last - first, k)
                    for q in range(panels):
                        j = j0 + q * COLUMNS
                        n = min(COLUMNS, columns - j)
                        b_at = q * COLUMNS * slab_depth + s * COLUMNS
                        for i in range(first, last, ROWS):
                            m = min(ROWS, last - i)
                            if k0 + s > 0:
                                tile(c, c, i, j, m, n, mine, (i - first) * k, packed_b, b_at, k, base)
                            else:
                                tile(c, d, i, j, m, n, mine, (i - first) * k, packed_b, b_at, k, base)


# -- calling it ----------------------------------------------------------------------------------


class _Scratch:
    """The packing buffers, made at the first product and kept; a step allocates nothing."""

    def __init__(self):
        self.threads = 0

    def buffers(self):
        if self.threads < numba.config.NUMBA_NUM_THREADS:
            self.threads = numba.config.NUMBA_NUM_THREADS
            self.a = np.empty((self.threads, BLOCK * SLICE), np.float32)
            self.b = np.empty(PACKED + COLUMNS * DEPTH, np.float32)
        return self.a, self.b


_scratch = _Scratch()


def _block_rows(rows):
    """Rows of a block of A: as many as fit the cache, and about equally many blocks for each thread."""
    threads = numba.get_num_threads()
    rounds = -(-rows // (threads * BLOCK))
    block = -(-rows // (threads * rounds))
    return -(-block // ROWS) * ROWS


def product(out, a, b, transpose_a=False, transpose_b=False, addend=None):
    """Write op(a) op(b) (+ addend) to out: float32 matrices with unit column stride, unchecked; addend may be out."""
    if BACKEND == "blas":
        y = np.matmul(a.T if transpose_a else a, b.T if transpose_b else b)
        np.copyto(out, y if addend is None else y + addend)
        return
    rows, columns = out.shape
    if rows == 0 or columns == 0:
        return
    if (a.shape[0] if transpose_a else a.shape[1]) == 0:
        out[...] = 0 if addend is None else addend
        return
    packed_a, packed_b = _scratch.buffers()
    base = out if addend is None else addend
    _product(out, base, a, b, packed_a, packed_b, transpose_a, transpose_b, addend is not None, _block_rows(rows))


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


def matmul(a, b, out=None, transpose_a=False, transpose_b=False, accumulate=False):
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
    if accumulate and out is None:
        raise ValueError("accumulate adds to an existing array; pass it as out=")
    m, k = a.shape[:-3:-1] if transpose_a else a.shape[-2:]
    depth, n = b.shape[:-3:-1] if transpose_b else b.shape[-2:]
    if k != depth:
        raise ValueError(f"a sums over {k} elements and b over {depth}: shapes {a.shape} and {b.shape} do not fit")
    stack = np.broadcast_shapes(a.shape[:-2], b.shape[:-2])
    shape = (*stack, m, n)
    if out is None:
        out = np.empty(shape, np.float32)
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
        product(y, left, right, turn_a, turn_b, y if accumulate else None)
        if not direct:
            target[...] = y
    return out
