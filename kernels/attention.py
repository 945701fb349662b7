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
from lse.  Each of the seven products is `tiles.tile` on packed panels.  All gradients are overwritten.  Which thread
does what is a plan (`forward_plan`, `backward_plan`); no two write to the same place, and no sum depends on it.

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
from .engine.number_formats import BFLOAT16, FLOAT32, AnyFormat, NumberFormat
from .engine.panels import (
    as_stored,
    pack_a,
    pack_a_transposed,
    pack_b,
    pack_stored_a,
    pack_stored_a_transposed,
    pack_stored_b,
    pack_stored_b_transposed,
    panel_depth,
)
from .engine.routines import COLUMNS, ROWS, UNIT
from .engine.scratch import LINE, scratch
from .engine.shares import Plan, least, round_up, shared
from .engine.simd import LANES
from .engine.softmax import row_dots, scale_columns, soften_back, soften_columns, turn
from .engine.threads import thread_count
from .engine.tiles import begin, end, tile

# Sums over keys and queries go by these blocks, so they are the same for all machines (docs/log.md).
FORWARD_KEYS = 128  # a panel of scores of 48 queries is 24 KB
BACKWARD_KEYS = 384
BACKWARD_QUERIES = 96
MOST_QUERIES = 768  # of a task of forward, which packs its keys for itself; no sum depends on it

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

# Forward makes scores as panels of keys x queries: its second product finds p where it reads it, and the softmax goes
# down the columns.  Backward makes them as panels of queries x keys, for the sums over queries, dv and dk; for dq, ds
# is packed once more.  What no query of a tile sees is left out.


@helper
def _whole_vectors(count):
    return (count + LANES - 1) // LANES * LANES


@helper
def _extremes(starts, row, rows):
    """Return the smallest and the largest start of a block of queries."""
    first = last = starts[row]
    for r in range(1, rows):
        first, last = min(first, starts[row + r]), max(last, starts[row + r])
    return first, last


@helper
def _is_set(stop):
    """Look at it now: an element read in the body of a `prange` itself is taken out of the loop, and read once."""
    return stop[0] != 0


@helper
def _scores_of_keys(s, keys, queries, a, b, b_at, depth, ahead, table):
    """s[j, r] = k_j q_r for j <= r + ahead; a: packed keys; b: packed queries, of which a panel begins at b_at."""
    for j in range(0, keys, table[ROWS]):
        hidden = max(j - ahead, 0) // LANES * LANES  # queries before see neither key j nor later ones
        if table[UNIT] > 2:
            hidden = 0  # such panels cannot be read from the middle of a row
        n = _whole_vectors(queries) - hidden
        if n > 0:
            m = min(table[ROWS], keys - j)
            tile(s, s, j, hidden, m, n, a, j * depth, b, b_at + hidden, depth, False, table)


@helper
def _hide_queries(s, keys, queries, t0, j0, starts, row, last):
    """s[j, r] becomes -inf where query t0 + r does not see key j0 + j; no start of theirs is after `last`."""
    for j in range(min(max(last - j0, 0), keys)):
        for r in range(queries):
            s[j, r] = -np.inf if starts[row + r] > j0 + j else s[j, r]
    for j in range(max(t0 - j0 + 1, 0), keys):
        s[j, : min(j0 + j - t0, s.shape[1])] = -np.inf


@kernel
def _attention_forward(o, lse, qkv, starts, sizes, scale, tasks, ends, memory, stop, table):
    """Write o and lse; qkv: q, k and v `as_stored`; sizes: batch, heads, kv_heads, packs_p; memory: `_forward_shapes`.

    tasks (n, 4): `forward_plan`; a share of them ends where `ends` says.
    """
    q, k, v = qkv
    batch, heads, kv_heads, packs_p = sizes
    scores, sums, stats, of_queries, of_keys = memory
    time = o.shape[0] // batch
    head_dim = o.shape[1] // heads
    depth = panel_depth(head_dim, table)
    tall, wide = table[ROWS], table[COLUMNS]
    for share in prange(len(ends) - 1):
        begin(table)
        mine = numba.get_thread_id()
        s, p = scores[mine, 0], scores[mine, 1 if packs_p else 0].reshape(-1)
        q_r, k_l, v_l = of_queries[mine], of_keys[mine, 0], of_keys[mine, 1]
        m, l, factor = stats[mine, 0], stats[mine, 1], stats[mine, 2]
        for task in range(ends[share], ends[share + 1]):
            if _is_set(stop):
                break
            b, h, t0, count = tasks[task, 0], tasks[task, 1], tasks[task, 2], tasks[task, 3] - tasks[task, 2]
            row = b * time + t0
            q_column, kv_column = h * head_dim, h * kv_heads // heads * head_dim
            m[:count], l[:count] = -np.inf, 0
            pack_stored_b_transposed(q_r, 0, q, row, q_column, count, head_dim, table)
            first, _ = _extremes(starts, row, count)
            for j0 in range(first // FORWARD_KEYS * FORWARD_KEYS, t0 + count, FORWARD_KEYS):
                keys = min(FORWARD_KEYS, t0 + count - j0)
                places = panel_depth(keys, table)
                pack_stored_a(k_l, 0, k, b * time + j0, kv_column, keys, head_dim, table)
                pack_stored_a_transposed(v_l, 0, v, b * time + j0, kv_column, head_dim, keys, table)
                for c in range(0, count, wide):
                    n = min(wide, count - c)
                    seen = min(keys, t0 + c + n - j0)  # by the last of them
                    first, last = _extremes(starts, row + c, n)
                    if seen <= 0 or first >= j0 + seen:
                        continue
                    again = first < j0  # a block of keys before this one has written o
                    acc = sums[mine, c // wide]
                    _scores_of_keys(s, seen, n, k_l, q_r, c * depth, depth, t0 + c - j0, table)
                    _hide_queries(s, seen, n, t0 + c, j0, starts, row + c, last)
                    if soften_columns(s, seen, n, m[c : c + wide], l[c : c + wide], factor, scale) and again:
                        scale_columns(acc, head_dim, n, factor)
                    if packs_p:
                        pack_b(p, 0, s, 0, 0, n, seen, table)
                    seen = panel_depth(seen, table)
                    for d in range(0, head_dim, tall):
                        tile(acc, acc, d, 0, min(tall, head_dim - d), n, v_l, d * places, p, 0, seen, again, table)
            for c in range(0, count, wide):
                n = min(wide, count - c)
                for r in range(n):
                    factor[r] = np.float32(1) / l[c + r]
                    lse[h, row + c + r] = m[c + r] + np.float32(math.log(l[c + r]))
                scale_columns(sums[mine, c // wide], head_dim, n, factor)
                turn(o, row + c, q_column, sums[mine, c // wide], head_dim, n)
        end(table)


@helper
def _scores_of_queries(s, queries, keys, a, b, b_at, depth, ahead, table):
    """s[r, j] = a_r b_j for j <= r + ahead, and on to the end of a vector; of b's panels one begins at b_at."""
    for i in range(0, queries, table[ROWS]):
        m = min(table[ROWS], queries - i)
        n = _whole_vectors(min(keys, i + m + ahead))
        if n > 0:
            tile(s, s, i, 0, m, n, a, i * depth, b, b_at, depth, False, table)


@helper
def _hide_keys(p, dp, first, queries, keys, t0, j0, starts, row):
    """Where query t0 + r, from the first on, does not see key j0 + j, its score becomes -inf and its dp zero."""
    filled = _whole_vectors(keys)
    for r in range(first, queries):
        if starts[row + r] <= j0 and t0 + r - j0 >= filled - 1:
            continue
        low = min(max(starts[row + r] - j0, 0), filled)
        high = min(max(t0 + r - j0 + 1, low), filled)
        p[r, :low] = -np.inf
        dp[r, :low] = 0
        p[r, high:filled] = -np.inf
        dp[r, high:filled] = 0


@helper
def _sum_over_keys(c, row, column, queries, width, a, b, keys, ahead, add, table):
    """c[row + r, column:column + width] (+)= sum of a_rj b_j over the keys j <= r + ahead; a_rj = 0 for the others."""
    depth = panel_depth(keys, table)
    for j in range(0, width, table[COLUMNS]):
        n = min(table[COLUMNS], width - j)
        for i in range(0, queries, table[ROWS]):
            m = min(table[ROWS], queries - i)
            seen = panel_depth(max(min(keys, i + m + ahead), 0), table)
            tile(c, c, row + i, column + j, m, n, a, i * depth, b, j * depth, seen, add, table)


@kernel
def _attention_backward(gradients, do, qkv, o, lse, starts, sizes, scale, tasks, ends, memory, stop, table):
    """Write gradients: dq, dk and dv, those that a task says; qkv and sizes as in forward; memory: `_backward_shapes`.

    tasks (n, 9): `backward_plan`; a share of them ends where `ends` says.
    """
    dq, dk, dv = gradients
    q, k, v = qkv
    batch, heads, _, packs_p = sizes
    scores, sums, stats, of_keys, of_queries, of_scores = memory
    time = do.shape[0] // batch
    head_dim = do.shape[1] // heads
    depth = panel_depth(head_dim, table)
    tall, wide = table[ROWS], table[COLUMNS]
    for share in prange(len(ends) - 1):
        begin(table)
        mine = numba.get_thread_id()
        delta, ds_l = stats[mine], of_scores[mine]
        p, dp = scores[mine, 0], scores[mine, 1]
        p_r, ds_r = scores[mine, 2 if packs_p else 0].reshape(-1), scores[mine, 3 if packs_p else 1].reshape(-1)
        k_r, v_r, k_n = of_keys[mine, 0], of_keys[mine, 1], of_keys[mine, 2]
        q_l, do_l, q_t, do_t = of_queries[mine, 0], of_queries[mine, 1], of_queries[mine, 2], of_queries[mine, 3]
        for task in range(ends[share], ends[share + 1]):
            b, g, first_head, end_head, first_key, end_key, first_query, end_query, what = tasks[task]
            kv, sums_keys, sums_queries = g * head_dim, what & DQ, what & DK_DV
            for j0 in range(first_key, end_key, BACKWARD_KEYS):
                keys = min(BACKWARD_KEYS, end_key - j0)
                key, places = b * time + j0, panel_depth(keys, table)
                pack_stored_b_transposed(k_r, 0, k, key, kv, keys, head_dim, table)
                pack_stored_b_transposed(v_r, 0, v, key, kv, keys, head_dim, table)
                if sums_keys:
                    pack_stored_b(k_n, 0, k, key, kv, head_dim, keys, table)
                for h in range(first_head, end_head):
                    if _is_set(stop):
                        break
                    c = h * head_dim
                    for t0 in range(first_query, end_query, BACKWARD_QUERIES):
                        rows = min(BACKWARD_QUERIES, end_query - t0)
                        row = b * time + t0
                        first, last = _extremes(starts, row, rows)
                        if t0 + rows <= j0 or first >= j0 + keys:
                            continue
                        row_dots(delta, do, o, row, c, rows, head_dim)  # sum_j p_ij dp_ij
                        pack_stored_a(q_l, 0, q, row, c, rows, head_dim, table)
                        pack_a(do_l, 0, do, row, c, rows, head_dim, table)
                        deep = panel_depth(rows, table)
                        if sums_queries:
                            pack_stored_a_transposed(q_t, 0, q, row, c, head_dim, rows, table)
                            pack_a_transposed(do_t, 0, do, row, c, head_dim, rows, table)
                        for j in range(0, min(keys, t0 + rows - j0), wide):
                            n = min(wide, keys - j)
                            ahead = t0 - j0 - j
                            # forward: s_ij = scale q_i k_j, p_ij = exp(s_ij - lse_i), o_i = sum_j p_ij v_j
                            _scores_of_queries(p, rows, n, q_l, k_r, j * depth, depth, ahead, table)
                            _scores_of_queries(dp, rows, n, do_l, v_r, j * depth, depth, ahead, table)
                            hidden = max(-ahead, 0) & -table[UNIT]  # queries before key j
                            r0 = min(hidden, max(-ahead, 0) // tall * tall)
                            if ahead < n + LANES or last > j0 + j:
                                _hide_keys(p, dp, r0, rows, n, t0, j0 + j, starts, row)
                            soften_back(p, dp, r0, rows, n, scale, lse[h, row : row + rows], delta)
                            if sums_keys:
                                for i in range(r0 // tall * tall, rows, tall):
                                    to = i * places + panel_depth(j, table) * tall
                                    pack_a(ds_l, to, dp, i, 0, min(tall, rows - i), n, table)
                            if sums_queries:
                                if packs_p:
                                    pack_b(p_r, 0, p, 0, 0, n, rows, table)
                                    pack_b(ds_r, 0, dp, 0, 0, n, rows, table)
                                hidden = panel_depth(hidden, table)
                                seen = deep - hidden
                                again = h > first_head or t0 > j0 + j  # not the first block that sees key j
                                v_sum, k_sum = sums[mine, 0, j // wide], sums[mine, 1, j // wide]
                                # forward: o_i = sum_j p_ij v_j, so dv_j sums p_ij do_i over the queries
                                # forward: s_ij = scale q_i k_j, so dk_j sums ds_ij q_i
                                for d in range(0, head_dim, tall):
                                    m, at, b_at = min(tall, head_dim - d), d * deep + hidden * tall, hidden * wide
                                    tile(v_sum, v_sum, d, 0, m, n, do_t, at, p_r, b_at, seen, again, table)
                                    tile(k_sum, k_sum, d, 0, m, n, q_t, at, ds_r, b_at, seen, again, table)
                        if sums_keys:  # ... and dq_i sums ds_ij k_j
                            _sum_over_keys(dq, row, c, rows, head_dim, ds_l, k_n, keys, t0 - j0, first < j0, table)
                if sums_queries and not _is_set(stop):
                    for j in range(0, keys, wide):
                        turn(dv, key + j, kv, sums[mine, 0, j // wide], head_dim, min(wide, keys - j))
                        turn(dk, key + j, kv, sums[mine, 1, j // wide], head_dim, min(wide, keys - j))
        end(table)


# -- who does what -------------------------------------------------------------------------------

# What a task costs, in units of one pair of a query and a key in one product.
SOFTMAX = 0.4  # of a pair, in forward, whose two products are 2
SOFTMAX_BACKWARD = 0.7
PACKED = 16  # of a row of q, k, v or do, each time that it is packed
REGION = 100_000  # starting a parallel region
DK_DV, DQ = 1, 2  # what a task of backward writes


def _pairs(first_key, end_key, first_query, end_query):
    """Return how many pairs of a query and a key that it may see are in a rectangle of them."""

    def below(queries):  # a triangle
        return np.where(queries > 0, queries * (queries + 1) // 2, 0)

    return sum(
        sign * below(query - key)
        for sign, query, key in (
            (1, end_query, first_key),
            (-1, first_query, first_key),
            (-1, end_query, end_key),
            (1, first_query, end_key),
        )
    )


def _cut(length, width):
    """Return equal blocks of `width` or less: (first, end) of each."""
    return [(at, min(at + width, length)) for at in range(0, length, width)]


@functools.lru_cache(maxsize=256)
def forward_plan(batch: int, time: int, heads: int, columns: int, threads: int) -> Plan:
    """Return the tasks of forward: sample, head, first query and end of its queries; `columns`: of the tile.

    A task packs the keys that it needs, so blocks of queries are as wide as the threads' shares allow.  The bits do not
    depend on them.
    """

    def plan(width):
        cuts = _cut(time, width)
        tasks = np.array([(b, h, *cut) for b in range(batch) for h in range(heads) for cut in cuts], np.int64)
        begins, ends = tasks[:, 2:].T
        costs = (2 + SOFTMAX) * _pairs(0, ends, begins, ends) + PACKED * (3 * ends - begins)
        return shared(tasks, costs, threads)

    widest = min(round_up(time, columns), MOST_QUERIES // columns * columns)
    return least(plan(width) for width in range(widest, 0, -columns))


@functools.lru_cache(maxsize=256)
def backward_plan(batch: int, time: int, heads: int, kv_heads: int, columns: int, threads: int) -> tuple[Plan, ...]:
    """Return the tasks of backward, in one phase or two after each other.

    A task: sample, key/value head, first query head and end of its heads, first key and end, first query and end, and
    what it writes.  Where there are tasks enough for all threads, one owns a key/value head of a sample, and computes p
    and ds once for dq, dk and dv.  Where not, the tasks of the first phase own keys, and write dk and dv, and those of
    the second own queries, and write dq.  The order of every sum is the same.
    """
    group = heads // kv_heads

    def plan(kinds, products, packings):
        tasks = np.array(kinds, np.int64)
        heads_of_task = tasks[:, 3] - tasks[:, 2]
        first_key, end_key, first_query, end_query = tasks[:, 4:8].T
        blocks = np.ceil((end_key - first_key) / BACKWARD_KEYS)
        rows = np.maximum(end_query - np.maximum(first_query, first_key), 0)
        pairs = _pairs(first_key, end_key, first_query, end_query)
        costs = heads_of_task * ((products + SOFTMAX_BACKWARD) * pairs + PACKED * packings * blocks * rows)
        costs = costs + 3 * PACKED * (np.minimum(end_key, end_query) - first_key)
        return shared(tasks, costs, threads)

    each = [(b, g) for b in range(batch) for g in range(kv_heads)]
    joint = plan([(b, g, g * group, (g + 1) * group, 0, time, 0, time, DK_DV | DQ) for b, g in each], 5, 5)
    if threads == 1 or joint.imbalance < 1.2:
        return (joint,)

    def of_keys(parts):
        cuts = _cut(time, round_up(-(-BACKWARD_KEYS // parts), columns))
        return plan([(b, g, g * group, (g + 1) * group, *cut, 0, time, DK_DV) for b, g in each for cut in cuts], 4, 5)

    def of_queries(width):
        cuts = _cut(time, width)
        all_heads = [(b, g, h) for b, g in each for h in range(g * group, (g + 1) * group)]
        return plan([(b, g, h, h + 1, 0, end, at, end, DQ) for b, g, h in all_heads for at, end in cuts], 3, 3)

    keys = least(of_keys(parts) for parts in range(1, BACKWARD_KEYS // columns + 1))
    queries = least(of_queries(width) for width in range(4 * BACKWARD_QUERIES, 0, -BACKWARD_QUERIES))
    return (joint,) if joint.slowest < keys.slowest + queries.slowest + REGION else (keys, queries)


# -- calling them --------------------------------------------------------------------------------


@functools.cache
def _forward_shapes(head_dim, number_format):
    """Return, for each thread: scores and packed p; sums of p v; m, l and a factor; packed q; packed k and v."""
    threads, wide, tall = numba.config.NUMBA_NUM_THREADS, number_format.columns, number_format.rows
    queries, deep = round_up(MOST_QUERIES, wide), number_format.depth_of(head_dim)
    places = number_format.depth_of(FORWARD_KEYS)
    keys = round_up(max((FORWARD_KEYS + tall) * deep, (head_dim + tall) * places), LINE)
    return (
        (threads, 2, max(FORWARD_KEYS, places), wide),
        (threads, queries // wide, round_up(head_dim, LINE), wide),
        (threads, 3, queries),
        (threads, queries * deep),
        (threads, 2, keys),
    )


@functools.cache
def _backward_shapes(head_dim, number_format):
    """Return, for each thread: p and dp, also packed; sums of dv and dk; delta; packed k v k; q do q do; ds."""
    threads, wide, tall = numba.config.NUMBA_NUM_THREADS, number_format.columns, number_format.rows
    keys, queries = round_up(BACKWARD_KEYS, wide), round_up(BACKWARD_QUERIES, tall)
    deep, of_keys, of_queries = map(number_format.depth_of, (head_dim, BACKWARD_KEYS, BACKWARD_QUERIES))
    return (
        (threads, 4, max(BACKWARD_QUERIES, of_queries), wide),
        (threads, 2, keys // wide, round_up(head_dim, LINE), wide),
        (threads, BACKWARD_QUERIES),
        (threads, 3, round_up(max(keys * deep, of_keys * round_up(head_dim, wide)), LINE)),
        (threads, 4, round_up(max(queries * deep, of_queries * round_up(head_dim, tall)), LINE)),
        (threads, round_up(queries * of_keys, LINE)),
    )


def _stored(q, k, v, number_format):
    """Return q, k and v as the kernels take them, and the number format that they multiply."""
    if number_format is None:
        number_format = BFLOAT16 if q.dtype == np.uint16 else FLOAT32
    return (as_stored(q), as_stored(k), as_stored(v)), number_format.chosen


def _packs_p(number_format):
    """Return 0 where a panel of B is what the tile has written: float32 scores, row by row; else 1."""
    return 0 if type(number_format) is NumberFormat else 1


def _attention_fits(sizes, q, k, v, starts, scale, number_format, **others):
    if scale is not None and not scale > 0:
        raise ValueError(f"scale is {scale}; scores are hidden before they are scaled, so it must be above 0")
    if not q.dtype == k.dtype == v.dtype:
        raise TypeError(f"q is {q.dtype}, k {k.dtype} and v {v.dtype}; attention takes one type for the three")
    stored = "uint16" if number_format is not None and number_format.chosen.stored else "float32"
    if number_format is not None and q.dtype != stored:
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
    plan = forward_plan(batch, len(q) // batch, heads, chosen.columns, thread_count())
    memory = scratch("attention", *_forward_shapes(head_dim, chosen))
    sizes, factor = (batch, heads, kv_heads, _packs_p(chosen)), np.float32(_scale(scale, head_dim))
    flag = GOES_ON if stop is None else stop
    share = plan.tasks, plan.ends
    _attention_forward(o, lse, stored, starts, sizes, factor, *share, memory, flag, chosen.table)


@checked(
    "dq! do o (N, heads D); dk! dv! (N, kv_heads D); lse (heads, N); "
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
    starts: Array,
    batch: int,
    heads: int,
    kv_heads: int,
    scale: float | None = None,
    stop: Array | None = None,
    number_format: AnyFormat | None = None,
) -> None:
    """Write dq (N, H D), dk and dv (N, G D), float32; the options are those of forward."""
    stored, chosen = _stored(q, k, v, number_format)
    head_dim = q.shape[1] // heads
    memory = scratch("attention", *_backward_shapes(head_dim, chosen))
    sizes, factor = (batch, heads, kv_heads, _packs_p(chosen)), np.float32(_scale(scale, head_dim))
    flag = GOES_ON if stop is None else stop
    for plan in backward_plan(batch, len(q) // batch, heads, kv_heads, chosen.columns, thread_count()):
        share = plan.tasks, plan.ends
        _attention_backward((dq, dk, dv), do, stored, o, lse, starts, sizes, factor, *share, memory, flag, chosen.table)
