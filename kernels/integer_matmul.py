"""y = x Wᵀ by whole numbers: a frozen matrix in blocks is multiplied as it is kept, and so is x, in blocks of bytes.

    forward    x_k ~ d_b p_k                   p_k = round(x_k / d_b), -127 to 127;   d_b = max |x| / 127 of 32 numbers
               W_mk = s_mg (q_mk - zero) - o_mg                 as storages of blocks keep it (`storage/blocks.py`)
               y_nm = Σ_g d_b s_mg Σ_k p_k (q_mk - zero)  -  Σ_g o_mg d_b Σ_k p_k       over groups g, k within a group

No backward pass: it serves generation.  The sums over k are exact, of whole numbers in 32 bits; the sum over groups is
float32, in order.  So a row's bits are those of the row alone, in any number of rows, on any number of threads, with
any instruction set (`engine/whole_numbers.py`).  What is approximate is x: of N(0, 1) numbers, rounding to p changes a
product by 0.5 % of its size, root mean square (docs/4-integer_matmul.md); the weights are those of the file.

Why it pays: four products of bytes are one instruction for 16 numbers, where float32 has one product; and weights in
four bits are only spread out to bytes, not turned into numbers.

    in parallel, for each LANES rows of W, for each `chunk` columns, with up to MOST rows of x:
        multiply_few                            in registers, where raw is spread out (`engine/few_rows.py`); of several
                                                matrices that read the same x, in any storages, in one call
    with more:
        spread                                  bytes of q, scales and offsets from raw; the next rows are fetched
        turn                                    into a panel, LANES rows side by side
        for each AT_ONCE rows of x:             multiply
"""

from collections.abc import Sequence

import numba
import numpy as np

from .engine.checks import Array, check_apart, checked
from .engine.few_rows import MOST, arrange, multiply_few
from .engine.integers import AT_ONCE, integers, multiply, spread, turn
from .engine.jit import helper, kernel, prange
from .engine.replay import by_numpy
from .engine.scratch import scratch
from .engine.shares import MATRICES, filled, share_of
from .engine.simd import LANES
from .engine.threads import ONE_THREAD, thread_count
from .engine.vectors import bits_of, float_from_bits
from .engine.whole_numbers import BLOCK_BYTES, BLOCK_SIZE, GROUP, OFFSETS, SCALED, grouped_ref
from .matmul import THREADS
from .storage.blocks import BlockStorage

__all__ = ["bytes_ref", "integer_product", "integer_product_ref", "integer_products"]

BYTE = np.float32(127)
LEAST_SIZE = np.float32(BYTE * np.finfo(np.float32).tiny)  # of 32 numbers: their scale is a normal number; below, 0
ALL_BUT_SIGN = np.int32(0x7FFFFFFF)  # bits of |x|, which are in the order of the sizes, NaN last
# Columns of a panel, whole blocks of any storage.  With few rows of x, panel and rows of q fit the first-level cache;
# with many, y is visited seldom: its rows may be a power of two apart, all of them in a few sets of the caches.
PANEL_COLUMNS, WIDE_COLUMNS = 512, 4096
FEW_COLUMNS = 2048  # whose sums fit the first-level cache, with few rows of x

# -- reference: plain NumPy ----------------------------------------------------------------------


def bytes_ref(x: Array) -> tuple[Array, Array]:
    """Return p (N, K) int8 and d (N, K / 32) float32 of float32 x (N, K)."""
    blocks = x.reshape(len(x), -1, SCALED)
    size = np.abs(blocks).max(2, initial=0)
    with np.errstate(all="ignore"):
        d = np.where(size < LEAST_SIZE, np.float32(0), np.where(np.isfinite(size), size / BYTE, np.float32(np.nan)))
        inverse = np.where(d > 0, np.float32(1) / d, np.float32(0))
        p = np.where(np.isfinite(d)[..., None], np.rint(blocks * inverse[..., None]), np.float32(0))
    return p.astype(np.int8).reshape(x.shape), d


def integer_product_ref(x: Array, raw: Array, storage: BlockStorage, addend: Array | None = None) -> Array:
    """Return the product (+ addend) of float32 x, to the bits of the kernel."""
    p, d = bytes_ref(x)
    q, scale, offset = storage.integers_ref(raw)
    group = storage.group
    sums = p.reshape(len(x), -1, group).sum(2, dtype=np.int32).astype(np.float32) * np.repeat(d, SCALED // group, 1)
    y = np.zeros((len(x), len(raw)), np.float32) if addend is None else addend
    return grouped_ref(y, p, d, sums, q, scale, offset, storage.zero)


# -- kernel --------------------------------------------------------------------------------------


@helper
def _row_in_bytes(p, d, x):
    """Write p (K,) and d (K / 32,) of a row x (K,)."""
    for b in range(d.size):
        numbers, to = x[SCALED * b : SCALED * b + SCALED], p[SCALED * b : SCALED * b + SCALED]
        largest = np.int32(0)
        for k in range(SCALED):
            largest = max(largest, bits_of(numbers[k]) & ALL_BUT_SIGN)
        size = float_from_bits(largest)
        if size < np.float32(np.inf):
            d[b] = size / BYTE if size >= LEAST_SIZE else np.float32(0)
            inverse = np.float32(1) / d[b] if size >= LEAST_SIZE else np.float32(0)
            for k in range(SCALED):
                to[k] = np.int8(np.int32(np.rint(numbers[k] * inverse)))
        else:
            d[b] = np.float32(np.nan)
            for k in range(SCALED):
                to[k] = np.int8(0)


@helper
def _sums_of_groups(sums, p, d, zero, table):
    """Write what `multiply` takes as sums of groups, (K / group,), of a row's p and d."""
    group, offsets = table[GROUP], table[OFFSETS] != 0
    for g in range(p.size // group):
        some, total = p[group * g : group * g + group], np.int32(0)
        for k in range(group):
            total += np.int32(some[k])
        sums[g] = d[group * g // SCALED] * np.float32(total) if offsets else float_from_bits(-np.int32(zero) * total)


@kernel
def _few_product(
    c, d, x, matrices, zeros, tables, count, p, p_words, dx, sums, n, scale, offset, arranged, chunk, add, parts
):
    """c (N, M) = x (N, K) Wᵀ (+ d if add), N <= MOST; W: the first `count` of `matrices` below one another.

    zeros, tables   of each matrix's storage
    p, dx, sums     x in bytes (N, K), its scales (N, K / SCALED); of each matrix (N, K / group) what `multiply` takes
    p_words         the memory of p, four bytes a word; `arranged` is that in the order of W's bytes once spread out
    n scale offset  of each thread: what is spread out of LANES rows of W
    """
    rows, depth = x.shape
    for i in range(rows):
        _row_in_bytes(p[i], dx[i], x[i])
        arrange(arranged[i], p_words[i])
        for index in range(count):
            _sums_of_groups(sums[index, i], p[i], dx[i], zeros[index], tables[index])
    for part in prange(parts):
        thread = numba.get_thread_id()
        scales = n[thread], scale[thread], offset[thread]
        begin = 0
        for index in range(count):
            raw, table = matrices[index], tables[index]
            columns = len(raw)
            y, base, of_groups = c[:, begin : begin + columns], d[:, begin : begin + columns], sums[index]
            last = share_of(columns, LANES, np.int64(part) + 1, parts)
            for j in range(share_of(columns, LANES, np.int64(part), parts), last, LANES):
                cols = min(LANES, last - j)
                for k0 in range(0, depth, chunk):
                    k = min(chunk, depth - k0)
                    at = k0 // table[BLOCK_SIZE] * table[BLOCK_BYTES]
                    place = 0, j, rows, cols, arranged, dx, of_groups, k0, raw, at
                    if k0 > 0:
                        multiply_few(y, y, *place, *scales, k, True, table)
                    else:
                        multiply_few(y, base, *place, *scales, k, add, table)
            begin += columns


@kernel
def _integer_product(c, d, x, raw, p, p_words, dx, sums, zero, q, scale, offset, panels, chunk, add, parts, table):
    """c (N, M) = x (N, K) Wᵀ (+ d if add); all from p on but `zero` is scratch."""
    rows, columns = c.shape
    depth, group, offsets = x.shape[1], table[GROUP], table[OFFSETS] != 0
    if parts == 1:
        for i in range(rows):
            _row_in_bytes(p[i], dx[i], x[i])
            _sums_of_groups(sums[i], p[i], dx[i], zero, table)
    else:
        for i in prange(rows):
            _row_in_bytes(p[i], dx[i], x[i])
            _sums_of_groups(sums[i], p[i], dx[i], zero, table)
    for part in prange(parts):
        thread = numba.get_thread_id()
        words, scales, least = q[thread], scale[thread], offset[thread]
        panel_q, panel_scale, panel_offset = panels[thread, 0], panels[thread, 1], panels[thread, 2]
        last = share_of(columns, LANES, np.int64(part) + 1, parts)
        for j in range(share_of(columns, LANES, np.int64(part), parts), last, LANES):
            cols = min(LANES, last - j)
            for k0 in range(0, depth, chunk):
                k = min(chunk, depth - k0)
                begin = k0 // table[BLOCK_SIZE] * table[BLOCK_BYTES]
                spread(words, scales, least, raw, j, cols, begin, k, table)
                turn(panel_q, words, k // 4, table)
                turn(panel_scale, scales, k // group, table)
                if offsets:
                    turn(panel_offset, least, k // group, table)
                for i in range(0, rows, AT_ONCE):
                    height = min(AT_ONCE, rows - i)
                    place = i, j, height, cols, p_words, dx, sums, k0, panel_q, panel_scale, panel_offset, k
                    if k0 > 0:
                        multiply(c, c, *place, True, table)
                    else:
                        multiply(c, d, *place, add, table)


# -- calling it ----------------------------------------------------------------------------------


def _fits(sizes, y, x, raw, storage, addend):
    storage.check(raw, sizes["K"])
    check_apart("y", y, addend, x=x, raw=raw)


@checked("y! addend? (N, M); x (N, K); raw (M, items) uint8", _fits, storage=BlockStorage)
def integer_product(y: Array, x: Array, raw: Array, storage: BlockStorage, addend: Array | None = None) -> None:
    """Write y = x Wᵀ (+ addend), x rounded to bytes; addend may be y.  A row's bits are those of the row alone."""
    rows, depth = x.shape
    if y.size == 0:
        return
    if depth == 0:
        by_numpy(np.copyto, y, np.float32(0) if addend is None else addend)
        return
    if rows <= MOST:
        integer_products(y, x, [raw], [storage], addend)
        return
    group, chunk = storage.group, PANEL_COLUMNS if rows <= AT_ONCE else WIDE_COLUMNS
    words, groups = chunk // 4, chunk // group
    p_words, dx, sums = scratch(
        "integer product: x", (rows, depth // 4), (rows, depth // SCALED), (rows, depth // group)
    )
    q, scale, offset = scratch("integer product: rows", (THREADS, LANES, words), *[(THREADS, LANES, groups)] * 2)
    (panels,) = scratch("integer product: panels", (THREADS, 3, LANES * words))
    given = y, y if addend is None else addend, x, storage.for_kernels(raw)
    of_x = p_words.view(np.int8), p_words, dx, sums, storage.zero
    add, parts = addend is not None, 1 if y.size * depth < ONE_THREAD else thread_count()
    _integer_product(*given, *of_x, q, scale, offset, panels, chunk, add, parts, integers(storage))


def integer_products(
    y: Array, x: Array, raws: Sequence[Array], storages: Sequence[BlockStorage], addend: Array | None = None
) -> None:
    """Write y (N, ΣM) = x [W1; W2; ...]ᵀ (+ addend), of 1 to MATRICES matrices, each in its own storage.

    It checks nothing: there are 1 to MOST rows and some columns of x, and the matrices are alike in layout.
    """
    rows, depth = x.shape
    least = min(storage.group for storage in storages)
    p_words, arranged, dx, sums = scratch(
        "integer product: few rows of x",
        *[(rows, depth // 4)] * 2,
        *[(rows, depth // SCALED), (MATRICES, rows, depth // least)],
    )
    tables = (THREADS, MOST * LANES, FEW_COLUMNS // least), *[(THREADS, LANES, FEW_COLUMNS // least)] * 2
    of_rows = scratch("integer product: few rows", *tables)
    matrices = [storage.for_kernels(raw) for raw, storage in zip(raws, storages, strict=True)]
    of_each = filled(matrices), filled([each.zero for each in storages]), filled([integers(each) for each in storages])
    given = y, y if addend is None else addend, x, *of_each, len(matrices)
    parts = 1 if y.size * depth < ONE_THREAD else thread_count()
    of_x = p_words.view(np.int8), p_words, dx, sums
    options = arranged, FEW_COLUMNS, addend is not None, parts
    _few_product(*given, *of_x, *of_rows, *options)  # type: ignore[call-arg]
