"""Attention of new tokens over stored keys and values: what decoding needs instead of the attention of whole samples.

    append     keys[slot_n, :, position_n] = k_n      values[slot_n, :, position_n] = v_n
    forward    s_j = scale q_n k_j    for start_n <= j <= position_n, k_j and v_j from the cache of the row's slot
               o_n = sum_j exp(s_j - m) v_j / sum_j exp(s_j - m)                       m = max_j s_j

    q o (N, H D)   k v (N, G D)   keys values (slots, G, capacity, D)   slots positions (N,) int32
    H query heads share G key/value heads: head h reads head h // (H / G).   No backward: it serves generation only.
    start_n is 0, or position_n - window + 1 where that is more; scale is 1 / sqrt(D) unless it is given.

A row is one new token of the sequence in `slots[n]`; rows of one slot may follow each other (a prompt that goes on a
stored conversation), if all of them were appended before.  The cache holds key/value heads, not query heads, and all
keys of a head are in one piece, so decoding reads memory straight through and every key serves its H / G queries while
it is in first-level cache.

The keys of a row are cut into parts of TASK_KEYS, wherever the row is and however many threads there are.  A part is
one task; it gives its maximum m_p, its sum l_p and its weighted values a_p, and a second loop puts them together:

    m = max_p m_p      o = sum_p exp(m_p - m) a_p / sum_p exp(m_p - m) l_p

(Milakov and Gimelshein 2018, "Online normalizer calculation for softmax", section 3; cut over keys as in Dao et al.
2023, "Flash-Decoding").  Parts before a row's start are left out, and are no task.  So the bits depend on nothing but
the row itself: not on threads, not on other rows.  Inside a part the same sum runs over blocks of BLOCK_KEYS, whose
scores and keys stay in first-level cache.
"""

import math

import numba
import numpy as np
from numba import types
from numba.core import cgutils

from .engine.checks import Array, checked
from .engine.jit import helper, kernel, prange
from .engine.scratch import scratch
from .engine.simd import (
    I64,
    LANES,
    VECTOR,
    ZERO,
    broadcast,
    constant,
    declare,
    first_lanes,
    load,
    masked_load,
    masked_store,
    pointer,
    store,
    sum_of_lanes,
    with_twin,
)
from .engine.vectors import exp, largest, total

__all__ = [
    "cache_append",
    "cache_append_ref",
    "cached_attention_forward",
    "cached_attention_forward_ref",
]

TASK_KEYS = 512  # keys of a task
BLOCK_KEYS = 64  # keys of a block: 64 x 64 floats of keys are 16 KB
TOGETHER = 4  # vectors of a weighted sum that grow side by side: a multiply-add waits four cycles for the one before

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


# The compiler makes no vectors of a float sum (see `jit.py`), and would keep `sums` in memory while it adds up a block
# of values.  So both products of a block are spelt out: a score is LANES partial sums, added up by halves; a vector of
# `sums` stays in its register from the first value to the last.


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


def _scores_twin(s, query, keys, scale):
    s[:] = keys @ query * scale


@with_twin(_scores_twin)
def _scores(typing, s, query, keys, scale):
    """s (columns,) = keys query scale, for query (D,) and keys (columns, D), all with unit stride in the last axis."""

    def codegen(context, builder, signature, arguments):
        kinds = signature.args
        columns, head_dim = _shape(context, builder, kinds[2], arguments[2])
        out, query = (pointer(context, builder, kinds[i], arguments[i], constant(0)) for i in (0, 1))
        with cgutils.for_range(builder, columns, intp=I64) as loop:
            key = pointer(context, builder, kinds[2], arguments[2], loop.index, constant(0))
            partial = cgutils.alloca_once_value(builder, ZERO)
            builder.store(ZERO, partial)

            def visit(at, mask, key=key, partial=partial):
                added = builder.fmul(_load(builder, query, at, mask), _load(builder, key, at, mask))
                builder.store(builder.fadd(builder.load(partial), added), partial)

            _each_piece(builder, constant(0), head_dim, visit)
            score = builder.fmul(sum_of_lanes(builder, builder.load(partial)), arguments[3])
            builder.store(score, builder.gep(out, [loop.index]))
        return context.get_dummy_value()

    return types.void(s, query, keys, types.float32), codegen


def _weigh_twin(sums, p, values, shrink):
    sums[:] = sums * shrink + p @ values


@with_twin(_weigh_twin)
def _weigh(typing, sums, p, values, shrink):
    """sums (D,) = shrink sums + p values, for p (columns,) and values (columns, D), in the order of the columns."""

    def codegen(context, builder, signature, arguments):
        kinds = signature.args
        columns, head_dim = _shape(context, builder, kinds[2], arguments[2])
        sums, weights = (pointer(context, builder, kinds[i], arguments[i], constant(0)) for i in (0, 1))
        factor = broadcast(builder, arguments[3], VECTOR)
        multiply_add = declare(builder, f"llvm.fmuladd.v{LANES}f32", VECTOR, [VECTOR] * 3)

        def visit(at, mask, count=1):
            held = [cgutils.alloca_once_value(builder, ZERO) for _ in range(count)]
            places = [builder.add(at, constant(i * LANES)) for i in range(count)]
            for place, vector in zip(places, held):
                builder.store(builder.fmul(_load(builder, sums, place, mask), factor), vector)
            with cgutils.for_range(builder, columns, intp=I64) as loop:
                weight = broadcast(builder, builder.load(builder.gep(weights, [loop.index])), VECTOR)
                value = pointer(context, builder, kinds[2], arguments[2], loop.index, constant(0))
                for place, vector in zip(places, held):
                    now = [weight, _load(builder, value, place, mask), builder.load(vector)]
                    builder.store(builder.call(multiply_add, now), vector)
            for place, vector in zip(places, held):
                address = builder.gep(sums, [place])
                if mask is None:
                    store(builder, builder.load(vector), address)
                else:
                    masked_store(builder, builder.load(vector), address, mask)

        whole = builder.sub(head_dim, builder.srem(head_dim, constant(TOGETHER * LANES)))
        with cgutils.for_range_slice(builder, constant(0), whole, constant(TOGETHER * LANES), I64) as (at, _):
            visit(at, None, TOGETHER)
        _each_piece(builder, whole, head_dim, visit)
        return context.get_dummy_value()

    return types.void(sums, p, values, types.float32), codegen


@helper
def _attend(sums, stats, queries, keys, values, s, scale):
    """One part: sums (group, D) and stats (group, 2) = maximum and sum, of keys and values (columns, D)."""
    group, head_dim = sums.shape
    sums[:] = 0
    stats[:, 0] = -np.inf
    stats[:, 1] = 0
    for j0 in range(0, keys.shape[0], BLOCK_KEYS):
        columns = min(BLOCK_KEYS, keys.shape[0] - j0)
        for i in range(group):
            row = s[i, :columns]
            _scores(row, queries[i * head_dim : (i + 1) * head_dim], keys[j0 : j0 + columns], scale)
            top = max(stats[i, 0], largest(row))  # drops NaN; the sum below does not
            for j in range(columns):
                row[j] = exp(row[j] - top)
            shrink = exp(stats[i, 0] - top)  # 0 at the first block
            stats[i, 1] = stats[i, 1] * shrink + total(row)
            stats[i, 0] = top
            _weigh(sums[i], row, values[j0 : j0 + columns], shrink)


@helper
def _join(o, sums, stats, parts):
    """o (D,) from the parts' sums (parts, D) and stats (parts, 2), added from the first to the last."""
    top = stats[0, 0]
    for p in range(1, parts):
        top = max(top, stats[p, 0])
    length = np.float32(0)
    o[:] = 0
    for p in range(parts):
        shrink = exp(stats[p, 0] - top)
        length += shrink * stats[p, 1]
        for d in range(o.size):
            o[d] += shrink * sums[p, d]
    factor = np.float32(1) / length
    for d in range(o.size):
        o[d] *= factor


@kernel
def _cached_attention(o, q, keys, values, slots, positions, window, heads, longest, scores, sums, stats, scale):
    """scores (threads, H, BLOCK_KEYS);  sums (N, G, longest, H/G, D) and stats (N, G, longest, H/G, 2) of parts."""
    rows, kv_heads, head_dim = q.shape[0], keys.shape[1], keys.shape[3]
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
            queries = q[n, g * group * head_dim : (g + 1) * group * head_dim]
            k, v = keys[slots[n], g, first:last], values[slots[n], g, first:last]
            _attend(sums[n, g, part], stats[n, g, part], queries, k, v, s, scale)
            if longest == 1:  # no other part to wait for: one parallel region less
                for i in range(group):
                    h = g * group + i
                    _join(o[n, h * head_dim : (h + 1) * head_dim], sums[n, g, :, i], stats[n, g, :, i], 1)
    if longest > 1:
        for task in prange(rows * heads):
            n, h = task // heads, task % heads
            g, i = h // group, h % group
            parts = positions[n] // TASK_KEYS - max(positions[n] + 1 - window, 0) // TASK_KEYS + 1
            _join(o[n, h * head_dim : (h + 1) * head_dim], sums[n, g, :, i], stats[n, g, :, i], parts)


# -- calling it --------------------------------------------------------------------------------


def _memory(rows, heads, kv_heads, head_dim, parts):
    """Return scores, sums and stats as the kernel takes them."""
    scores = numba.config.NUMBA_NUM_THREADS, heads, BLOCK_KEYS
    shape = rows, kv_heads, parts, heads // kv_heads
    return scratch("cached attention", scores, (*shape, head_dim), (*shape, 2))


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
    head_dim = keys.shape[3]
    heads, kv_heads = q.shape[1] // head_dim, keys.shape[1]
    longest = int(positions.max()) + 1
    reach = longest if window is None else min(int(window), longest)
    # So many whole parts, and one more where a window begins and ends inside one.
    parts = min((longest - 1) // TASK_KEYS + 1, (reach - 2) // TASK_KEYS + 2)
    memory = _memory(len(q), heads, kv_heads, head_dim, parts)
    factor = np.float32(_scale(scale, head_dim))
    _cached_attention(o, q, keys, values, slots, positions, reach, heads, parts, *memory, factor)
