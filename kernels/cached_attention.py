"""Attention of new tokens over stored keys and values: what generation needs instead of the attention of whole samples.

    append     keys[slot_n, :, position_n] = k_n      values[slot_n, :, position_n] = v_n
    forward    s_j = scale q_n k_j    for start_n <= j <= position_n, k_j and v_j from the cache of the row's slot
               o_n = sum_j exp(s_j - m) v_j / sum_j exp(s_j - m)                       m = max_j s_j

    q o (N, H D)   k v (N, G D)   keys values (slots, G, capacity, D)   slots positions (N,) int32
    H query heads share G key/value heads: head h reads head h // (H / G).   No backward: it serves generation only.
    start_n is 0, or position_n - window + 1 where that is more; scale is 1 / sqrt(D) unless it is given.

A row is one new token of the sequence in `slots[n]`; rows of one slot may follow each other (a prompt), if all of them
were appended before.  The cache holds key/value heads, not query heads, and all keys of a head are in one piece, so
decoding reads memory straight through and every key serves its H / G queries while it is in first-level cache.

**What a row is the sum of, and in what order, depends on nothing but the row itself**: not on threads, not on other
rows, not on how a prompt is cut into calls.  Keys are cut where their number is a multiple of TASK_KEYS, into parts,
and these into blocks of BLOCK_KEYS.  Inside a block a score is summed from the first element of q to the last, and a
sum of values from the first key to the last; blocks of a part, and then parts, are joined by

    m' = max(m, m_p)    l' = exp(m - m') l + exp(m_p - m') l_p    a' = exp(m - m') a + exp(m_p - m') a_p    o = a / l

(Milakov and Gimelshein 2018, "Online normalizer calculation for softmax", section 3; cut over keys as in Dao et al.
2023, "Flash-Decoding").  There are two kernels with this one order:

    single rows        a task is a part of a row's keys and a key/value head; `stream` multiplies with keys as they are
    rows in a row      a task is QUERIES rows of one slot and a key/value head; keys and values are packed for the tile

Longer than 400 lines because two kernels that must sum in one order are read side by side.
"""

import math

import numba
import numpy as np
from numba import types
from numba.core import cgutils

from .engine.checks import Array, checked
from .engine.jit import helper, kernel, prange
from .engine.number_formats import FLOAT32
from .engine.panels import pack_a, pack_b, pack_b_transposed, panel_depth
from .engine.routines import COLUMNS, ROWS
from .engine.scratch import scratch
from .engine.shares import round_up
from .engine.simd import (
    I64,
    LANES,
    VECTOR,
    ZERO,
    broadcast,
    constant,
    fetch,
    first_lanes,
    load,
    masked_load,
    masked_store,
    pointer,
    store,
    with_twin,
)
from .engine.streams import STREAMED, stream, streams
from .engine.tiles import begin, end, multiply_add, tile
from .engine.vectors import exp, largest, total
from .matmul import THREADS

__all__ = [
    "cache_append",
    "cache_append_ref",
    "cached_attention_forward",
    "cached_attention_forward_ref",
    "parts_of_keys",
]

TASK_KEYS = 512  # keys of a part
BLOCK_KEYS = 64  # keys of a block: 64 x 64 floats of keys are 16 KB
QUERIES = 64  # rows of a task of many
ROWS_OF_A_BLOCK = 8  # rows from which on they are one: a tile's, about
TOGETHER = 4  # vectors of a weighted sum that grow side by side: a multiply-add waits four cycles for the one before
ROWS_TOGETHER = 4 if LANES == 16 else 2  # queries that share the reading of values; their sums fit the registers
SHRINK = 2  # of a query's stats: m, l, and the factor of what was summed before the block at hand

# -- reference: plain NumPy, any float dtype ---------------------------------------------------


def cache_append_ref(keys: Array, values: Array, k: Array, v: Array, slots: Array, positions: Array) -> None:
    """Write k and v (N, G D) into keys and values (slots, G, capacity, D), in place."""
    _, kv_heads, _, head_dim = keys.shape
    keys[slots, :, positions] = k.reshape(-1, kv_heads, head_dim)
    values[slots, :, positions] = v.reshape(-1, kv_heads, head_dim)


def _scale(scale, head_dim):
    return 1 / math.sqrt(head_dim) if scale is None else scale


def cached_attention_forward_ref(
    q: Array,
    keys: Array,
    values: Array,
    slots: Array,
    positions: Array,
    window: int | None = None,
    scale: float | None = None,
) -> Array:
    """Return o (N, H D) for q (N, H D) and the cache."""
    _, kv_heads, _, head_dim = keys.shape
    o = np.empty_like(q)
    for n, (slot, position) in enumerate(zip(slots, positions)):
        queries = q[n].reshape(kv_heads, -1, head_dim)  # (G, H/G, D)
        seen = slice(max(0, position + 1 - window) if window else 0, position + 1)
        k, v = keys[slot, :, seen], values[slot, :, seen]  # (G, T, D)
        s = queries @ k.swapaxes(1, 2) * _scale(scale, head_dim)  # (G, H/G, T)
        p = np.exp(s - s.max(-1, keepdims=True))
        o[n] = (p / p.sum(-1, keepdims=True) @ v).ravel()
    return o


# -- kernels: Numba, float32, outputs first ----------------------------------------------------


@checked("keys! values! (S, G, T, D); k v (N, G D); slots (N) int < S; positions (N) int < T")
@kernel
def cache_append(keys: Array, values: Array, k: Array, v: Array, slots: Array, positions: Array) -> None:
    """Copy k and v (N, G D), which may be column slices, into the cache; two rows never share slot and position."""
    rows, (kv_heads, head_dim) = k.shape[0], (keys.shape[1], keys.shape[3])
    for n in prange(rows):
        slot, position = slots[n], positions[n]
        for g in range(kv_heads):
            for d in range(head_dim):
                keys[slot, g, position, d] = k[n, g * head_dim + d]
                values[slot, g, position, d] = v[n, g * head_dim + d]


# The compiler would keep `sums` in memory while it adds up a block of values.  So that product is spelt out: a vector
# of the sum stays in its register from the first value to the last.


def _each_piece(builder, start, head_dim, visit):
    """Call `visit(offset, mask)` for each vector from `start` to D; mask is None where all lanes are inside."""
    left = builder.srem(builder.sub(head_dim, start), constant(LANES))
    whole = builder.sub(head_dim, left)
    with cgutils.for_range_slice(builder, start, whole, constant(LANES), I64) as (at, _):
        visit(at, None)
    with builder.if_then(builder.icmp_signed(">", left, constant(0))):
        visit(whole, first_lanes(builder, left))


def _load(builder, start, at, mask):
    address = builder.gep(start, [at])
    return load(builder, address) if mask is None else masked_load(builder, address, mask)


def _shape(context, builder, kind, array):
    return [builder.extract_value(context.make_array(kind)(context, builder, array).shape, i) for i in range(kind.ndim)]


def _weigh_twin(sums, stats, p, low, high, values):
    sums[:] = sums * stats[:, SHRINK, None] + p[: len(sums), low:high] @ values


@with_twin(_weigh_twin)
def _weigh(typing, sums, stats, p, low, high, values):
    """sums (rows, D) = p[:, low : high] values + stats[:, SHRINK] sums, in the order of the values (columns, D)."""

    def codegen(context, builder, signature, arguments):
        kinds, (sums, stats, p, low, high, values) = signature.args, arguments
        rows, head_dim = _shape(context, builder, kinds[0], sums)
        columns = builder.sub(high, low)

        def weigh(first, together):
            """Emit that for `together` rows, which share the reading of values."""
            indices = [builder.add(first, constant(r)) for r in range(together)]
            lines = [pointer(context, builder, kinds[0], sums, row, constant(0)) for row in indices]
            weights = [pointer(context, builder, kinds[2], p, row, low) for row in indices]
            shrinks = [pointer(context, builder, kinds[1], stats, row, constant(SHRINK)) for row in indices]
            factors = [broadcast(builder, builder.load(at), VECTOR) for at in shrinks]

            def visit(at, mask, count=1):
                held = [[cgutils.alloca_once_value(builder, ZERO) for _ in range(count)] for _ in indices]
                places = [builder.add(at, constant(i * LANES)) for i in range(count)]
                with cgutils.for_range(builder, columns, intp=I64) as loop:
                    value = pointer(context, builder, kinds[5], values, loop.index, constant(0))
                    next_block = builder.add(loop.index, constant(BLOCK_KEYS))
                    later = pointer(context, builder, kinds[5], values, next_block, constant(0))
                    read = [_load(builder, value, place, mask) for place in places]
                    for place in places:
                        fetch(builder, builder.gep(later, [place]))
                    for line, vectors in zip(weights, held, strict=True):
                        weight = broadcast(builder, builder.load(builder.gep(line, [loop.index])), VECTOR)
                        for number, vector in zip(read, vectors, strict=True):
                            builder.store(multiply_add(builder, weight, number, builder.load(vector)), vector)
                for line, factor, vectors in zip(lines, factors, held, strict=True):
                    for place, vector in zip(places, vectors, strict=True):
                        address = builder.gep(line, [place])
                        before = builder.fmul(_load(builder, line, place, mask), factor)
                        result = builder.fadd(builder.load(vector), before)
                        if mask is None:
                            store(builder, result, address)
                        else:
                            masked_store(builder, result, address, mask)

            whole = builder.sub(head_dim, builder.srem(head_dim, constant(TOGETHER * LANES)))
            with cgutils.for_range_slice(builder, constant(0), whole, constant(TOGETHER * LANES), I64) as (at, _):
                visit(at, None, TOGETHER)
            _each_piece(builder, whole, head_dim, visit)

        alone = builder.sub(rows, builder.srem(rows, constant(ROWS_TOGETHER)))
        with cgutils.for_range_slice(builder, constant(0), alone, constant(ROWS_TOGETHER), I64) as (first, _):
            weigh(first, ROWS_TOGETHER)
        with cgutils.for_range_slice(builder, alone, rows, constant(1), I64) as (first, _):
            weigh(first, 1)
        return context.get_dummy_value()

    return types.void(sums, stats, p, types.intp, types.intp, values), codegen


@helper
def _soften(s, low, high, stats, scale):
    """Turn scores s (BLOCK_KEYS,), of which low ... high - 1 count, into exp(scale s - m), the others into 0.

    The first two of stats, m and l, take them in; return the factor of what was summed before, 0 at the first block.
    """
    inner = s[low:high]
    for j in range(inner.size):
        inner[j] *= scale
    s[:low] = -np.inf
    s[high:] = -np.inf
    top = max(stats[0], largest(s))  # drops NaN; the sum below does not
    for j in range(s.size):
        s[j] = exp(s[j] - top)
    shrink = exp(stats[0] - top)
    stats[1] = stats[1] * shrink + total(s)
    stats[0] = top
    return shrink


@helper
def _merge(o, whole, sums, stats):
    """Add a part's sums (D,) and stats to those of the parts before it, o and whole."""
    top = max(whole[0], stats[0])
    before, now = exp(whole[0] - top), exp(stats[0] - top)
    for d in range(o.size):
        o[d] = before * o[d] + now * sums[d]
    whole[1] = before * whole[1] + now * stats[1]
    whole[0] = top


@helper
def _begin(sums, stats):
    """Begin a sum: of nothing."""
    sums[:] = 0
    stats[0] = -np.inf
    stats[1] = 0


@helper
def _finish(o, whole):
    """Divide a sum by the sum of its weights."""
    factor = np.float32(1) / whole[1]
    for d in range(o.size):
        o[d] *= factor


@helper
def _attend(sums, stats, queries, keys, values, first, last, s, scale, routines):
    """One part: sums (group, D) and stats (group, 3) of queries (group, D) over keys and values first ... last - 1."""
    group = len(queries)
    for i in range(group):
        _begin(sums[i], stats[i])
    for j0 in range(first // BLOCK_KEYS * BLOCK_KEYS, last, BLOCK_KEYS):
        low, high = max(j0, first), min(j0 + BLOCK_KEYS, last)
        for i in range(0, group, STREAMED):
            count = min(STREAMED, group - i)
            stream(s, s, i, low - j0, count, high - low, queries, keys, low, False, routines)
        for i in range(group):
            stats[i, SHRINK] = _soften(s[i], low - j0, high - j0, stats[i], scale)
        _weigh(sums, stats, s, low - j0, high - j0, values[low:high])


@kernel
def _cached_attention(
    o, q, keys, values, slots, positions, window, longest, scores, sums, stats, whole, scale, routines
):
    """Single rows; o and q (N, H, D).  Scratch: scores (threads, H, BLOCK_KEYS), and of the parts of each row

    sums (N, G, longest, H/G, D), stats (N, G, longest, H/G, 3); whole (N, H, 2): of all parts of a head
    """
    rows, heads = q.shape[:2]
    kv_heads = keys.shape[1]
    group = heads // kv_heads
    for task in prange(rows * kv_heads * longest):
        s = scores[numba.get_thread_id()]
        n = task // (kv_heads * longest)
        g = task // longest % kv_heads
        part = task % longest
        end = positions[n] + 1
        start = max(end - window, 0)
        begin = (start // TASK_KEYS + part) * TASK_KEYS
        first, last = max(begin, start), min(begin + TASK_KEYS, end)
        if first < last:
            k, v, queries = keys[slots[n], g], values[slots[n], g], q[n, g * group : (g + 1) * group]
            _attend(sums[n, g, part], stats[n, g, part], queries, k, v, first, last, s, scale, routines)
            if longest == 1:  # no other part to wait for: one parallel region less
                for i in range(group):
                    h = g * group + i
                    _begin(o[n, h], whole[n, h])
                    _merge(o[n, h], whole[n, h], sums[n, g, 0, i], stats[n, g, 0, i])
                    _finish(o[n, h], whole[n, h])
    if longest > 1:
        for task in prange(rows * heads):
            n, h = task // heads, task % heads
            g, i = h // group, h % group
            parts = positions[n] // TASK_KEYS - max(positions[n] + 1 - window, 0) // TASK_KEYS + 1
            _begin(o[n, h], whole[n, h])
            for part in range(parts):
                _merge(o[n, h], whole[n, h], sums[n, g, part, i], stats[n, g, part, i])
            _finish(o[n, h], whole[n, h])


@kernel
def _attention_of_rows(o, q, keys, values, past, window, scale, panels, scores, sums, stats, whole, table):
    """Rows in a row, of one sequence from position `past` on: o and q (N, H D), keys and values (G, capacity, D).

    Scratch of each thread: panels of q (group QUERIES D), keys, values, weights; scores (QUERIES, BLOCK_KEYS); sums
    (group, QUERIES, D), stats and whole (group, QUERIES, 2).
    """
    rows, kv_heads, head_dim = q.shape[0], keys.shape[0], keys.shape[2]
    group = q.shape[1] // (kv_heads * head_dim)
    blocks = (rows + QUERIES - 1) // QUERIES
    tile_rows, tile_columns, depth = table[ROWS], table[COLUMNS], panel_depth(head_dim, table)
    q_size = (QUERIES + tile_rows - 1) // tile_rows * tile_rows * depth
    for task in prange(kv_heads * blocks):
        thread = numba.get_thread_id()
        q_panels, k_panels = panels[0][thread], panels[1][thread]
        v_panels, p_panels = panels[2][thread], panels[3][thread]
        s, a, l, w = scores[thread], sums[thread], stats[thread], whole[thread]
        g, n0 = task // blocks, task % blocks * QUERIES
        k, v = keys[g], values[g]
        count = min(QUERIES, rows - n0)
        t0 = past + n0  # position of the first row
        stop = t0 + count
        begin(table)
        for i in range(group):
            h = g * group + i
            pack_a(q_panels, i * q_size, q, n0, h * head_dim, count, head_dim, table)
            for r in range(count):
                _begin(o[n0 + r, h * head_dim : (h + 1) * head_dim], w[i, r])
        start = max(t0 + 1 - window, 0)
        for first in range(start // TASK_KEYS * TASK_KEYS, stop, TASK_KEYS):
            last = min(first + TASK_KEYS, stop)
            for i in range(group):
                for r in range(count):
                    _begin(a[i, r], l[i, r])
            for j0 in range(max(first, start // BLOCK_KEYS * BLOCK_KEYS), last, BLOCK_KEYS):
                width = min(BLOCK_KEYS, last - j0)
                terms = panel_depth(width, table)
                # Rows that see a key of the block.
                top, bottom = max(0, j0 - t0), min(count, j0 + BLOCK_KEYS - 1 + window - t0)
                height = bottom - top
                if height <= 0:
                    continue
                pack_b_transposed(k_panels, 0, k, j0, 0, width, head_dim, table)
                pack_b(v_panels, 0, v, j0, 0, head_dim, width, table)
                for i in range(group):
                    for r in range(top // tile_rows * tile_rows, bottom, tile_rows):
                        m, at = min(tile_rows, bottom - r), i * q_size + r * depth
                        for c in range(0, width, tile_columns):
                            place = r, c, m, min(tile_columns, width - c), q_panels, at, k_panels, c * depth, depth
                            tile(s, s, *place, False, table)
                    for r in range(top, bottom):
                        low, high = max(t0 + r + 1 - window - j0, 0), min(t0 + r + 1 - j0, BLOCK_KEYS)
                        shrink, line = _soften(s[r], low, high, l[i, r], scale), a[i, r]
                        for d in range(head_dim):
                            line[d] *= shrink
                    pack_a(p_panels, 0, s, top, 0, height, width, table)
                    for r in range(0, height, tile_rows):
                        m = min(tile_rows, height - r)
                        for c in range(0, head_dim, tile_columns):
                            n = min(tile_columns, head_dim - c)
                            place = top + r, c, m, n, p_panels, r * terms, v_panels, c * terms, terms
                            tile(a[i], a[i], *place, True, table)
            for i in range(group):
                h = g * group + i
                for r in range(count):
                    if t0 + r >= first and t0 + r + 1 - window < last:
                        _merge(o[n0 + r, h * head_dim : (h + 1) * head_dim], w[i, r], a[i, r], l[i, r])
        for i in range(group):
            h = g * group + i
            for r in range(count):
                _finish(o[n0 + r, h * head_dim : (h + 1) * head_dim], w[i, r])
        end(table)


# -- calling it --------------------------------------------------------------------------------


def _memory(rows, heads, kv_heads, head_dim, parts):
    """Return scores, sums, stats and whole as the kernel of single rows takes them."""
    shape = rows, kv_heads, parts, heads // kv_heads
    scores = THREADS, heads, BLOCK_KEYS
    return scratch("cached attention", scores, (*shape, head_dim), (*shape, 3), (rows, heads, 2))


def _memory_of_rows(group, head_dim, kind):
    """Return panels, scores, sums, stats and whole as the kernel of rows in a row takes them."""
    rows = round_up(QUERIES, kind.rows)
    depth, keys = round_up(head_dim, kind.unit), round_up(BLOCK_KEYS, kind.unit)
    panels = group * rows * depth, round_up(BLOCK_KEYS, kind.columns) * depth, round_up(head_dim, kind.columns) * keys
    shape = THREADS, group, QUERIES
    *packed, weights, scores, sums, stats, whole = scratch(
        "attention of rows",
        *((THREADS, size) for size in panels),
        (THREADS, rows * keys),
        (THREADS, QUERIES, BLOCK_KEYS),
        (*shape, head_dim),
        (*shape, 2),
        (*shape, 2),
    )
    return (*packed, weights), scores, sums, stats, whole


def parts_of_keys(keys: int) -> int:
    """Return into how many parts so many keys are cut: calls for single rows differ by this number alone."""
    return (keys - 1) // TASK_KEYS + 1


def _in_a_row(slots, positions):
    """Say whether rows are of one slot, each at the position after the one before."""
    if slots[0] != slots[-1] or positions[-1] - positions[0] != len(positions) - 1:
        return False
    return bool((slots == slots[0]).all() and (np.diff(positions) == 1).all())


def _window_fits(sizes, window, **others):
    if window is not None and window < 1:
        raise ValueError(f"window ({window}) must be at least 1: a row sees its own key; None stands for all keys")


@checked(
    "o! q (N, H D); keys values (S, G, T, D); slots (N) int < S; positions (N) int < T; H = G group; N >= 1",
    _window_fits,
    window=int | None,
    scale=float | int | None,
)
def cached_attention_forward(
    o: Array,
    q: Array,
    keys: Array,
    values: Array,
    slots: Array,
    positions: Array,
    window: int | None = None,
    scale: float | None = None,
) -> None:
    """Write o (N, H D) for q (N, H D), float32; both may be column slices; every position is below the capacity.

    window    keys that a row sees, its own among them; None: all
    """
    _, kv_heads, _, head_dim = keys.shape
    heads = q.shape[1] // head_dim
    factor = np.float32(_scale(scale, head_dim))
    longest = int(positions.max()) + 1
    # No position exceeds the capacity, so what a kernel is told depends on `parts_of_keys` alone.
    reach = keys.shape[2] if window is None else min(int(window), keys.shape[2])
    kind = FLOAT32.chosen
    if len(q) >= ROWS_OF_A_BLOCK and head_dim <= kind.slice_terms and _in_a_row(slots, positions):
        memory = _memory_of_rows(heads // kv_heads, head_dim, kind)
        cache = keys[slots[0]], values[slots[0]], int(positions[0])
        _attention_of_rows(o, q, *cache, reach, factor, *memory, kind.table)  # type: ignore[call-arg]
        return
    # So many whole parts, and one more where a window begins and ends inside one.
    parts = min(parts_of_keys(longest), (reach - 2) // TASK_KEYS + 2)
    memory = _memory(len(q), heads, kv_heads, head_dim, parts)
    shape = len(q), heads, head_dim
    heads_apart = o.reshape(shape), q.reshape(shape)  # views: only the last axis is cut
    _cached_attention(*heads_apart, keys, values, slots, positions, reach, parts, *memory, factor, streams())  # type: ignore[call-arg]
