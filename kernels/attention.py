"""Causal attention with grouped key/value heads: each query mixes the values of the keys up to its own position.

    forward    s_ij = scale q_i k_j           for start_i <= j <= i       lse_i = log sum_j exp(s_ij)
               p_ij = exp(s_ij - lse_i)       o_i = sum_j p_ij v_j
    backward   dv_j  = sum_i p_ij do_i        dp_ij = do_i v_j
               ds_ij = p_ij (dp_ij - delta_i)      delta_i = sum_j p_ij dp_ij = do_i o_i
               dq_i  = scale sum_j ds_ij k_j       dk_j    = scale sum_i ds_ij q_i

    q o dq do (N, H D)    k v dk dv (N, G D)    lse (H, N)    starts (N,) int32    N = B T
    H query heads share G key/value heads: head h reads head h // (H / G).      saved for backward: q k v o lse
    scale is 1 / sqrt(D) unless it is given.

`starts[n]` is the first position, within its own sample, that query n may see: 0 for plain causal attention, the
beginning of its segment in a packed row, position - window + 1 with a sliding window, or the larger of the two.
Samples of a batch never see each other.  Blocks of keys that no query of a block sees are left out, so a row of T
tokens with a window costs as T times the window.

q, k and v are float32, or all bfloat16 (as uint16); then the products multiply bfloat16, and p, ds and do are rounded
to it while they are packed.  Everything else is float32.

No T x T matrix is stored.  A block of queries walks over blocks of keys with a running maximum m and sum l of its
softmax (Milakov and Gimelshein 2018; Dao et al. 2022, "FlashAttention", algorithm 1), and backward computes p again
from lse.  Each of the seven products is `tiles.tile` on packed panels.  All gradients are overwritten.  A task of the
backward owns one key/value head of one sample, with all query heads that share it, so no two threads write to the
same place.

Read it in three steps: `attention_*_ref` (the T x T matrix of the formulas above), `attention_blocked_*_ref` (the same
figures by blocks of keys, still in NumPy), and the kernel (blocks of queries too, on packed panels, in threads).

Longer than 400 lines because forward and backward, and the three steps of each, are read side by side.
"""

import functools
import math

import numba
import numpy as np

from .engine.checks import Array, checked
from .engine.halves import widen_bf16_ref
from .engine.jit import helper, kernel, prange
from .engine.number_formats import BFLOAT16, FLOAT32, AnyFormat
from .engine.panels import (
    as_stored,
    pack_a,
    pack_a_transposed,
    pack_b,
    pack_stored_a,
    pack_stored_b,
    pack_stored_b_transposed,
    panel_depth,
)
from .engine.routines import COLUMNS, FOLD, ROWS, UNIT
from .engine.scratch import scratch
from .engine.simd import ISA, LANES
from .engine.tiles import begin, end, tile
from .engine.vectors import dot, exp, largest, total

# Measured (docs/log.md).
FORWARD_QUERIES = 128 if 128 % ISA.tile_rows == 0 else 96  # queries of a block, forward: whole panels
FORWARD_KEYS = 384  # keys of a block, forward
BACKWARD_BLOCK = 96 if LANES == 16 else 144  # queries, and keys, of a block in backward
# FORWARD_KEYS and BACKWARD_BLOCK are multiples of every LANES: a row of scores is whole vectors, filled to their end.

GOES_ON = np.zeros(1, np.uint8)  # a `stop` that nobody sets


def starts_within(starts: Array, length: int, window: int | None) -> Array:
    """Return starts (N,) of samples of `length` tokens none of which sees more than `window` keys; None: all of them.

    A token's own key is one of them, as in Mistral (Jiang et al. 2023, "Mistral 7B", section 2).
    """
    if window is None:
        return starts
    within = np.arange(len(starts), dtype=np.int32) % length - (window - 1)
    return np.maximum(starts, within).astype(np.int32)


# -- reference -----------------------------------------------------------------------------------


def _heads(x, batch, count):
    return widen_bf16_ref(x).reshape(batch, -1, count, x.shape[-1] // count).transpose(0, 2, 1, 3)  # (B, heads, T, D)


def _rows(x):
    return x.transpose(0, 2, 1, 3).reshape(x.shape[0] * x.shape[2], -1)  # (N, heads * D)


def _each_query_head(x, batch, heads, kv_heads):
    """Return k or v (N, G D) as each query head reads it: (B, H, T, D)."""
    return np.repeat(_heads(x, batch, kv_heads), heads // kv_heads, axis=1)


def _sum_of_group(dx, kv_heads):
    """Return dk or dv (N, G D) from the shares of all query heads (B, H, T, D)."""
    B, H, T, D = dx.shape
    return _rows(dx.reshape(B, kv_heads, H // kv_heads, T, D).sum(2))


def _scale(scale, head_dim):
    return 1 / math.sqrt(head_dim) if scale is None else scale


def _scores_ref(q, k, starts, scale, first_query, first_key):
    """Return s (B, H, queries, keys), -inf where the mask hides a key; q, k (B, H, queries or keys, D)."""
    i = first_query + np.arange(q.shape[2])[:, None]
    j = first_key + np.arange(k.shape[2])
    visible = (j <= i) & (j >= starts.reshape(len(q), 1, -1, 1)[:, :, first_query : first_query + len(i)])
    return np.where(visible, q @ k.swapaxes(-1, -2) * _scale(scale, q.shape[-1]), -np.inf)


def _probabilities_ref(q, k, starts, scale):
    """Return p (B, H, T, T) and lse (B, H, T)."""
    s = _scores_ref(q, k, starts, scale, 0, 0)
    m = s.max(-1, keepdims=True)
    p = np.exp(s - m)
    l = p.sum(-1, keepdims=True)
    return p / l, (m + np.log(l))[..., 0]


def attention_forward_ref(
    q: Array, k: Array, v: Array, starts: Array, batch: int, heads: int, kv_heads: int, scale: float | None = None
) -> tuple[Array, Array]:
    """Return o (N, H D) and lse (H, N)."""
    q, (k, v) = _heads(q, batch, heads), (_each_query_head(x, batch, heads, kv_heads) for x in (k, v))
    p, lse = _probabilities_ref(q, k, starts, scale)
    return _rows(p @ v), lse.transpose(1, 0, 2).reshape(heads, -1)


def attention_backward_ref(
    do: Array,
    q: Array,
    k: Array,
    v: Array,
    starts: Array,
    batch: int,
    heads: int,
    kv_heads: int,
    scale: float | None = None,
) -> tuple[Array, Array, Array]:
    """Return dq (N, H D), dk and dv (N, G D)."""
    q, do = _heads(q, batch, heads), _heads(do, batch, heads)
    k, v = (_each_query_head(x, batch, heads, kv_heads) for x in (k, v))
    p, _ = _probabilities_ref(q, k, starts, scale)  # (B, H, T, T)
    # forward: o = p v
    dv, dp = p.swapaxes(-1, -2) @ do, do @ v.swapaxes(-1, -2)
    # forward: p = exp(s - lse), a softmax over the keys
    ds = p * (dp - (p * dp).sum(-1, keepdims=True))
    # forward: s = scale q kᵀ
    ds = ds * _scale(scale, q.shape[-1])
    dq, dk = ds @ k, ds.swapaxes(-1, -2) @ q
    return _rows(dq), _sum_of_group(dk, kv_heads), _sum_of_group(dv, kv_heads)


# The same by blocks of keys j, j + 1, ...: never more than T x block scores.  Queries before j do not see them.


def attention_blocked_forward_ref(
    q: Array,
    k: Array,
    v: Array,
    starts: Array,
    batch: int,
    heads: int,
    kv_heads: int,
    block: int,
    scale: float | None = None,
) -> tuple[Array, Array]:
    """Return o (N, H D) and lse (H, N), with the running maximum and sum of the kernel."""
    q, (k, v) = _heads(q, batch, heads), (_each_query_head(x, batch, heads, kv_heads) for x in (k, v))
    m = np.full((*q.shape[:3], 1), -np.inf, q.dtype)  # largest score so far, (B, H, T, 1)
    l = np.zeros_like(m)  # sum of exp(s - m) so far
    o = np.zeros_like(q)  # sum of exp(s - m) v so far, (B, H, T, D)
    for j in range(0, q.shape[2], block):
        queries, keys = np.s_[:, :, j:], np.s_[:, :, j : j + block]
        s = _scores_ref(q[queries], k[keys], starts, scale, j, j)
        top = np.maximum(m[queries], s.max(-1, keepdims=True))
        base = np.where(top > -np.inf, top, 0)  # a query that has seen no key yet: its sums stay 0
        shrink, p = np.exp(m[queries] - base), np.exp(s - base)
        l[queries] = l[queries] * shrink + p.sum(-1, keepdims=True)
        o[queries] = o[queries] * shrink + p @ v[keys]
        m[queries] = top
    return _rows(o / l), (m + np.log(l)).transpose(1, 0, 2, 3).reshape(heads, -1)


def attention_blocked_backward_ref(
    do: Array,
    q: Array,
    k: Array,
    v: Array,
    o: Array,
    lse: Array,
    starts: Array,
    batch: int,
    heads: int,
    kv_heads: int,
    block: int,
    scale: float | None = None,
) -> tuple[Array, Array, Array]:
    """Return dq (N, H D), dk and dv (N, G D) from what forward saved: p is computed again, block by block."""
    q, do, o = (_heads(x, batch, heads) for x in (q, do, o))
    k, v = (_each_query_head(x, batch, heads, kv_heads) for x in (k, v))
    lse = lse.reshape(heads, batch, -1, 1).swapaxes(0, 1)  # (B, H, T, 1)
    delta = (do * o).sum(-1, keepdims=True)  # sum_j p_ij dp_ij, known before the walk begins
    dq, dk, dv = np.zeros_like(q), np.zeros_like(k), np.zeros_like(v)
    for j in range(0, q.shape[2], block):
        queries, keys = np.s_[:, :, j:], np.s_[:, :, j : j + block]
        # forward: s = scale q kᵀ, p = exp(s - lse)
        p = np.exp(_scores_ref(q[queries], k[keys], starts, scale, j, j) - lse[queries])
        # forward: o = p v
        dv[keys] = p.swapaxes(-1, -2) @ do[queries]
        dp = do[queries] @ v[keys].swapaxes(-1, -2)
        ds = p * (dp - delta[queries]) * _scale(scale, q.shape[-1])
        dq[queries] += ds @ k[keys]
        dk[keys] = ds.swapaxes(-1, -2) @ q[queries]
    return _rows(dq), _sum_of_group(dk, kv_heads), _sum_of_group(dv, kv_heads)


# -- kernels -------------------------------------------------------------------------------------


# The three kinds of product of a block of queries and a block of keys, whose first query is `ahead` positions after its
# first key.  Query r sees the keys up to r + ahead; tiles leave out what no query of theirs sees.


@helper
def _whole_vectors(count):
    return (count + LANES - 1) // LANES * LANES


@helper
def _scores(s, queries, keys, a, b, depth, ahead, table):
    """s[r, j] = a_r b_j for j <= r + ahead, and on to the end of a vector, maybe past `keys`; a, b: packed panels."""
    tile_rows, tile_columns = table[ROWS], table[COLUMNS]
    for j in range(0, keys, tile_columns):
        for i in range(0, queries, tile_rows):
            m = min(tile_rows, queries - i)
            n = min(tile_columns, _whole_vectors(min(keys, i + m + ahead) - j))
            if n > 0:
                tile(s, s, i, j, m, n, a, i * depth, b, j * depth, depth, False, table)


@helper
def _sum_over_keys(c, row, column, queries, width, a, b, keys, ahead, add, table):
    """c[row + r, column:column + width] (+)= sum of a_rj b_j over the keys j <= r + ahead; a_rj = 0 for the others."""
    depth, tile_rows, tile_columns = panel_depth(keys, table), table[ROWS], table[COLUMNS]
    for j in range(0, width, tile_columns):
        n = min(tile_columns, width - j)
        for i in range(0, queries, tile_rows):
            m = min(tile_rows, queries - i)
            seen = panel_depth(max(min(keys, i + m + ahead), 0), table)
            tile(c, c, row + i, column + j, m, n, a, i * depth, b, j * depth, seen, add, table)


@helper
def _sum_over_queries(c, row, column, keys, width, a, b, queries, ahead, add, table):
    """c[row + j, column:column + width] (+)= sum of a_jr b_r over the queries r >= j - ahead; a_jr = 0 for others."""
    depth, tile_rows, tile_columns = panel_depth(queries, table), table[ROWS], table[COLUMNS]
    for j in range(0, width, tile_columns):
        n = min(tile_columns, width - j)
        for i in range(0, keys, tile_rows):
            m = min(tile_rows, keys - i)
            first = min(max(i - ahead, 0), queries) & -table[UNIT]
            first >>= table[FOLD] - 1  # 1 or 2
            a_at, b_at = i * depth + first * tile_rows, j * depth + first * tile_columns
            tile(c, c, row + i, column + j, m, n, a, a_at, b, b_at, depth - first, add, table)


@helper
def _first_visible(starts, row, rows):
    """Smallest start of a block of queries."""
    first = starts[row]
    for r in range(1, rows):
        first = min(first, starts[row + r])
    return first


@helper
def _visible(start, position, j0, columns):
    """Return low, high, end: of a block's keys a query sees low ... high - 1, in vectors that end before `end`.

    `end` may be past `columns`.  The caller makes the scores from high to end -inf, and their exponentials are zero.
    """
    low = min(max(start - j0, 0), columns)
    high = max(min(position - j0 + 1, columns), low)
    return low, high, _whole_vectors(high) if high > low else high


@helper
def _scaled_copy(y, x, factor):
    for i in range(y.size):
        y[i] = x[i] * factor


@helper
def _softmax_row(s, scale, top):
    """Turn scores into exp(scale s - m) in place, m the larger of `top` and their maximum; return m and their sum."""
    best = max(top, largest(s) * scale)  # drops NaN; the sum below does not
    for j in range(s.size):
        s[j] = exp(s[j] * scale - best)
    return best, total(s)


@helper
def _softmax_step(s, o, m, l, starts, row, t0, j0, rows, columns, scale):
    """Turn the scores s of one block into exp(s - m) in place; update the running maximum m and sum l; rescale o."""
    for r in range(rows):
        low, high, end = _visible(starts[row + r], t0 + r, j0, columns)
        s[r, :low] = 0
        s[r, high:end] = -np.inf
        s[r, end:columns] = 0
        if low == high:
            continue
        top, added = _softmax_row(s[r, low:end], scale, m[r])
        shrink = exp(m[r] - top)  # 0 at the first block: m is -inf
        for d in range(o.shape[1]):
            o[r, d] *= shrink
        l[r] = l[r] * shrink + added
        m[r] = top


@helper
def _is_set(stop):
    """Look at it now: an element read in the body of a `prange` itself is taken out of the loop, and read once."""
    return stop[0] != 0


@kernel
def _attention_forward(o, lse, qkv, starts, sizes, scale, memory, stop, table):
    """Write o and lse; qkv: q, k and v `as_stored`; sizes: batch, heads, kv_heads; memory: `_forward_shapes`."""
    q, k, v = qkv
    batch, heads, kv_heads = sizes
    scores, sums, stats, panels = memory
    time = o.shape[0] // batch
    head_dim = o.shape[1] // heads
    depth = panel_depth(head_dim, table)
    group = heads // kv_heads
    blocks = (time + FORWARD_QUERIES - 1) // FORWARD_QUERIES
    for task in prange(batch * heads * blocks):
        if _is_set(stop):
            continue
        begin(table)
        mine = numba.get_thread_id()
        s, acc, m, l = scores[mine], sums[mine], stats[mine, 0], stats[mine, 1]
        left, right, left_p = panels[mine, 0], panels[mine, 1], panels[mine, 2]
        b = task // (heads * blocks)
        h = task // blocks % heads
        turn = task % blocks
        block = turn // 2 if turn % 2 == 0 else blocks - 1 - turn // 2  # long and short rows in turn: even shares
        t0 = block * FORWARD_QUERIES
        rows = min(FORWARD_QUERIES, time - t0)
        row = b * time + t0
        q_column, kv_column = h * head_dim, h // group * head_dim
        m[:rows] = -np.inf
        l[:rows] = 0
        acc[:rows] = 0
        pack_stored_a(left, 0, q, row, q_column, rows, head_dim, table)
        first = _first_visible(starts, row, rows) // FORWARD_KEYS * FORWARD_KEYS
        for j0 in range(first, t0 + rows, FORWARD_KEYS):
            columns = min(FORWARD_KEYS, t0 + rows - j0)
            pack_stored_b_transposed(right, 0, k, b * time + j0, kv_column, columns, head_dim, table)
            _scores(s, rows, columns, left, right, depth, t0 - j0, table)
            _softmax_step(s, acc, m, l, starts, row, t0, j0, rows, columns, scale)
            pack_a(left_p, 0, s, 0, 0, rows, columns, table)
            pack_stored_b(right, 0, v, b * time + j0, kv_column, head_dim, columns, table)
            _sum_over_keys(acc, 0, 0, rows, head_dim, left_p, right, columns, t0 - j0, True, table)
        for r in range(rows):
            _scaled_copy(o[row + r, q_column : q_column + head_dim], acc[r], np.float32(1) / l[r])
            lse[h, row + r] = m[r] + np.float32(math.log(l[r]))
        end(table)


@helper
def _softmax_backward_row(p, dp, scale, lse, delta):
    """Turn scores into probabilities p, and dp into scale ds, both in place."""
    for j in range(p.size):
        probability = exp(p[j] * scale - lse)  # as in forward: s = scale q k, p = exp(s - lse), a softmax
        p[j] = probability
        dp[j] = probability * (dp[j] - delta) * scale


@helper
def _softmax_backward(p, dp, lse, delta, starts, row, t0, j0, rows, columns, scale):
    """Do that for a block of queries; what the mask hides is zero, if lse and delta of its row are finite."""
    for r in range(rows):
        low, high, end = _visible(starts[row + r], t0 + r, j0, columns)
        p[r, :low] = 0
        p[r, high:end] = -np.inf
        p[r, end:columns] = 0
        dp[r, :low] = 0
        dp[r, high:columns] = 0
        _softmax_backward_row(p[r, low:end], dp[r, low:end], scale, lse[row + r], delta[row + r])


@kernel
def _attention_backward(gradients, do, qkv, o, lse, starts, sizes, scale, memory, stop, table):
    """Write gradients: dq, dk and dv; qkv and sizes as in forward; memory: delta and `_backward_shapes`."""
    dq, dk, dv = gradients
    q, k, v = qkv
    batch, heads, kv_heads = sizes
    delta, scores, panels = memory
    time = do.shape[0] // batch
    head_dim = do.shape[1] // heads
    depth = panel_depth(head_dim, table)
    group = heads // kv_heads
    for task in prange(batch * kv_heads):
        begin(table)
        mine = numba.get_thread_id()
        p, dp = scores[mine, 0], scores[mine, 1]
        k_t, v_t, k_n, q_l, do_l, q_r, do_r, p_t, ds_t, ds = panels[mine]
        b, g = task // kv_heads, task % kv_heads
        kv = g * head_dim
        for h in range(g * group, (g + 1) * group):
            head = slice(h * head_dim, (h + 1) * head_dim)
            for n in range(b * time, (b + 1) * time):
                delta[h, n] = dot(do[n, head], o[n, head])  # sum_j p_ij dp_ij
        for j0 in range(0, time, BACKWARD_BLOCK):
            columns = min(BACKWARD_BLOCK, time - j0)
            key = b * time + j0
            pack_stored_b_transposed(k_t, 0, k, key, kv, columns, head_dim, table)
            pack_stored_b_transposed(v_t, 0, v, key, kv, columns, head_dim, table)
            pack_stored_b(k_n, 0, k, key, kv, head_dim, columns, table)
            for h in range(g * group, (g + 1) * group):
                if _is_set(stop):
                    break
                c = h * head_dim
                for t0 in range(j0, time, BACKWARD_BLOCK):
                    rows = min(BACKWARD_BLOCK, time - t0)
                    row = b * time + t0
                    first = _first_visible(starts, row, rows)
                    if first >= j0 + columns:
                        continue
                    more_keys = first < j0  # an earlier block has written dq
                    more_queries = t0 > j0 or h > g * group  # the same of dk and dv: the diagonal is never left out
                    ahead = t0 - j0
                    pack_stored_a(q_l, 0, q, row, c, rows, head_dim, table)
                    pack_a(do_l, 0, do, row, c, rows, head_dim, table)
                    pack_stored_b(q_r, 0, q, row, c, head_dim, rows, table)
                    pack_b(do_r, 0, do, row, c, head_dim, rows, table)
                    # forward: s_ij = scale q_i k_j, p_ij = exp(s_ij - lse_i), o_i = sum_j p_ij v_j
                    _scores(p, rows, columns, q_l, k_t, depth, ahead, table)
                    _scores(dp, rows, columns, do_l, v_t, depth, ahead, table)
                    _softmax_backward(p, dp, lse[h], delta[h], starts, row, t0, j0, rows, columns, scale)
                    pack_a_transposed(p_t, 0, p, 0, 0, columns, rows, table)
                    pack_a_transposed(ds_t, 0, dp, 0, 0, columns, rows, table)
                    pack_a(ds, 0, dp, 0, 0, rows, columns, table)
                    # forward: o_i = sum_j p_ij v_j, so dv_j sums p_ij do_i over the queries
                    _sum_over_queries(dv, key, kv, columns, head_dim, p_t, do_r, rows, ahead, more_queries, table)
                    # forward: s_ij = scale q_i k_j, so dk_j sums ds_ij q_i, and dq_i sums ds_ij k_j
                    _sum_over_queries(dk, key, kv, columns, head_dim, ds_t, q_r, rows, ahead, more_queries, table)
                    _sum_over_keys(dq, row, c, rows, head_dim, ds, k_n, columns, ahead, more_keys, table)
        end(table)


# -- calling them --------------------------------------------------------------------------------


def _panels(count, head_dim, number_format):
    """Return the shape of `count` panels for each thread, of the largest operand of a block."""
    longest = max(FORWARD_KEYS, FORWARD_QUERIES, BACKWARD_BLOCK, head_dim)
    depth = -(-longest // number_format.unit) * number_format.unit
    return numba.config.NUMBA_NUM_THREADS, count, (longest + max(number_format.rows, number_format.columns)) * depth


@functools.cache
def _forward_shapes(head_dim, number_format):
    """Return, for each thread, scores of a block, sums of p v, stats (running maximum and sum), and three panels."""
    threads, _, _ = panels = _panels(3, head_dim, number_format)
    scores, sums = (threads, FORWARD_QUERIES, FORWARD_KEYS), (threads, FORWARD_QUERIES, head_dim)
    return scores, sums, (threads, 2, FORWARD_QUERIES), panels


@functools.cache
def _backward_shapes(head_dim, number_format):
    """Return, for each thread, p and dp of a block, and ten panels."""
    threads, _, _ = panels = _panels(10, head_dim, number_format)
    return (threads, 2, BACKWARD_BLOCK, BACKWARD_BLOCK), panels


def _stored(q, k, v, number_format):
    """Return q, k and v as the kernels take them, and the number format that they multiply."""
    if number_format is None:
        number_format = BFLOAT16 if q.dtype == np.uint16 else FLOAT32
    return (as_stored(q), as_stored(k), as_stored(v)), number_format.chosen


def _attention_fits(sizes, q, k, v, starts, number_format, **others):
    if not q.dtype == k.dtype == v.dtype:
        raise TypeError(f"q is {q.dtype}, k {k.dtype} and v {v.dtype}; attention takes one type for the three")
    if number_format is not None and (number_format is BFLOAT16) != (q.dtype == np.uint16):
        stored = "uint16" if number_format is BFLOAT16 else "float32"
        raise TypeError(f"q is {q.dtype}; in attention {number_format} is stored as {stored}; convert q, k, v")
    position = np.arange(len(starts)) % sizes["T"]
    wrong = (starts < 0) | (starts > position)
    if wrong.any():
        n = np.flatnonzero(wrong)[0]
        raise ValueError(f"starts[{n}] is {starts[n]}; query {n} is at {position[n]} and sees 0 ... {position[n]}")


@checked(
    "o! (N, heads D); lse! (heads, N); q (N, heads D) float32|uint16; "
    "k v (N, kv_heads D) float32|uint16; starts (N) int; stop? (1) uint8; heads = kv_heads group; N = batch T",
    _attention_fits,
    scale=float | int | None,
    number_format=AnyFormat | None,
)
def attention_forward(
    o: Array,
    lse: Array,
    q: Array,
    k: Array,
    v: Array,
    starts: Array,
    batch: int,
    heads: int,
    kv_heads: int,
    scale: float | None = None,
    stop: Array | None = None,
    number_format: AnyFormat | None = None,
) -> None:
    """Write o (N, H D) and lse (H, N); q, k, v and o may be column slices of wider arrays.

    q, k and v have one dtype, float32 or uint16; o is float32.  A row's work grows with the square of its length: where
    another thread sets stop (1,), this ends soon, and what it has written is undefined.  `number_format` is what is
    multiplied: by itself bfloat16 where q is stored so, else float32.
    """
    stored, chosen = _stored(q, k, v, number_format)
    head_dim = q.shape[1] // heads
    memory = scratch("attention", *_forward_shapes(head_dim, chosen))
    factor = np.float32(_scale(scale, head_dim))
    flag = GOES_ON if stop is None else stop
    _attention_forward(o, lse, stored, starts, (batch, heads, kv_heads), factor, memory, flag, chosen.table)


@checked(
    "dq! do o (N, heads D); dk! dv! (N, kv_heads D); lse delta! (heads, N); "
    "q (N, heads D) float32|uint16; k v (N, kv_heads D) float32|uint16; starts (N) int; "
    "stop? (1) uint8; heads = kv_heads group; N = batch T",
    _attention_fits,
    scale=float | int | None,
    number_format=AnyFormat | None,
)
def attention_backward(
    dq: Array,
    dk: Array,
    dv: Array,
    do: Array,
    q: Array,
    k: Array,
    v: Array,
    o: Array,
    lse: Array,
    delta: Array,
    starts: Array,
    batch: int,
    heads: int,
    kv_heads: int,
    scale: float | None = None,
    stop: Array | None = None,
    number_format: AnyFormat | None = None,
) -> None:
    """Write dq (N, H D), dk and dv (N, G D), float32; delta (H, N) is scratch, the options those of forward."""
    stored, chosen = _stored(q, k, v, number_format)
    head_dim = q.shape[1] // heads
    memory = delta, *scratch("attention", *_backward_shapes(head_dim, chosen))
    factor = np.float32(_scale(scale, head_dim))
    gradients, sizes, flag = (dq, dk, dv), (batch, heads, kv_heads), GOES_ON if stop is None else stop
    _attention_backward(gradients, do, stored, o, lse, starts, sizes, factor, memory, flag, chosen.table)
