"""Causal attention: the three nails, grouped heads, who sees whom, wide views, threads and NaN."""

import threading
import time
from itertools import pairwise

import numpy as np
import pytest

from abi_py.gradcheck import check_close, check_gradient
from abi_py.kernels import attention
from abi_py.kernels.attention import (
    BACKWARD_KEYS,
    BACKWARD_QUERIES,
    FORWARD_KEYS,
    MOST_QUERIES,
    attention_backward,
    attention_backward_ref,
    attention_blocked_backward_ref,
    attention_blocked_forward_ref,
    attention_forward,
    attention_forward_ref,
)
from abi_py.kernels.engine.halves import round_to_bf16_ref, widen_bf16_ref
from abi_py.kernels.engine.jit import JIT
from abi_py.kernels.engine.number_formats import METHODS

# (B, T, H, G, D)
SMALL = [
    (1, 1, 1, 1, 1),
    (2, 3, 2, 2, 2),  # one key/value head for each query head
    (2, 7, 6, 3, 5),  # grouped, D odd
    (3, 13, 4, 1, 8),  # one key/value head for all
    (1, 51, 2, 1, 17),  # a second panel of queries
]
LARGE = [
    (2, BACKWARD_QUERIES + 1, 2, 1, 16),
    (1, FORWARD_KEYS, 1, 1, 64),
    (2, 2 * BACKWARD_KEYS + 5, 4, 2, 24),  # three blocks of keys in backward, seven in forward
    (1, MOST_QUERIES + 3, 1, 1, 8),  # two tasks of forward
    (1, 131, 3, 3, 200),  # heads wider than a block of keys
]
NAMES = ("o", "lse", "dq", "dk", "dv")  # what the kernels write
SEGMENTED = (2, BACKWARD_KEYS + 37, 4, 2, 12) if JIT else (2, 19, 4, 2, 12)


def inputs(rng, B, T, H, G, D, dtype=np.float32):
    """Return q k v do and starts of plain causal attention."""
    arrays = [rng.standard_normal((B * T, heads * D)).astype(dtype) for heads in (H, G, G, H)]
    return arrays, np.zeros(B * T, np.int32)


def starts_of(segments):
    """Return starts (N,) for segment marks (B, T): where the run of equal marks began."""
    starts = np.zeros(segments.shape, np.int32)
    for b in range(segments.shape[0]):
        for t in range(1, segments.shape[1]):
            starts[b, t] = starts[b, t - 1] if segments[b, t] == segments[b, t - 1] else t
    return starts.ravel()


def random_starts(rng, B, T):
    return starts_of(np.cumsum(rng.random((B, T)) < 0.05, axis=1))


def windowed(starts, B, window):
    """Return starts of rows that see `window` keys at most, their own among them."""
    return np.maximum(starts, np.tile(np.arange(len(starts) // B, dtype=np.int32), B) - window + 1)


def run_kernels(q, k, v, do, starts, *sizes):
    """Return o, lse, dq, dk, dv; every output begins as NaN, because it is overwritten.  sizes: B, H, G (, scale)."""
    N, H = len(q), sizes[1]
    o, lse = np.full_like(q, np.nan), np.full((H, N), np.nan, np.float32)
    attention_forward(o, lse, q, k, v, starts, *sizes)
    dq, dk, dv = (np.full_like(x, np.nan) for x in (q, k, v))
    attention_backward(dq, dk, dv, do, q, k, v, o, lse, starts, *sizes)
    return o, lse, dq, dk, dv


def run_reference(q, k, v, do, starts, *sizes):
    q, k, v, do = (x.astype(np.float64) for x in (q, k, v, do))
    o, lse = attention_forward_ref(q, k, v, starts, *sizes)
    return o, lse, *attention_backward_ref(do, q, k, v, starts, *sizes)


def check_equal(arrays, starts, *sizes):
    made, expected = run_kernels(*arrays, starts, *sizes), run_reference(*arrays, starts, *sizes)
    for name, a, b in zip(NAMES, made, expected, strict=True):
        if name in ("dq", "dk") and not np.abs(b).max() > 1e-12:
            assert np.abs(a).max() < 1e-5  # one visible key: p = 1 whatever q and k are, so their gradient is zero
        else:
            check_close(a, b, 1e-4 if name[0] == "d" else 1e-5)


# -- the three nails -----------------------------------------------------------------------------


@pytest.mark.parametrize("segmented", [False, True])
@pytest.mark.parametrize("shape", SMALL[1:4])
def test_derivation(rng, shape, segmented):
    B, T, H, G, _ = shape
    (q, k, v, do), starts = inputs(rng, *shape, np.float64)
    if segmented:
        starts = random_starts(rng, B, T)
    gradients = attention_backward_ref(do, q, k, v, starts, B, H, G)
    for at, gradient in enumerate(gradients):

        def loss(x, at=at):
            arguments = [q, k, v]
            arguments[at] = x
            return (attention_forward_ref(*arguments, starts, B, H, G)[0] * do).sum()

        check_gradient(loss, (q, k, v)[at], gradient, rng)


@pytest.mark.parametrize(("window", "scale"), [(1, None), (3, 0.7), (5, 2.0), (99, 0.1)])
def test_derivation_with_a_window_and_a_scale(rng, window, scale):
    B, T, H, G, _ = shape = (2, 11, 4, 2, 5)
    (q, k, v, do), starts = inputs(rng, *shape, np.float64)
    starts = windowed(random_starts(rng, B, T), B, window)
    gradients = attention_backward_ref(do, q, k, v, starts, B, H, G, scale)
    assert window > 1 or max(np.abs(x).max() for x in gradients[:2]) < 1e-12  # p = 1 whatever q and k are
    for at in range(0 if window > 1 else 2, 3):

        def loss(x, at=at):
            arguments = [q, k, v]
            arguments[at] = x
            return (attention_forward_ref(*arguments, starts, B, H, G, scale)[0] * do).sum()

        check_gradient(loss, (q, k, v)[at], gradients[at], rng)


def rows(x):
    """Turn (B, heads, T, D), as in PyTorch, into (N, heads D)."""
    return np.ascontiguousarray(x.transpose(0, 2, 1, 3)).reshape(x.shape[0] * x.shape[2], -1)


@pytest.mark.parametrize("kind", ["causal", "segment"])
def test_definition(golden, kind):
    g = golden("attention")
    B, H, T, _ = g["q"].shape
    G = g["k"].shape[1]
    q, k, v, do = (rows(g[name]) for name in ("q", "k", "v", "do"))
    starts = starts_of(g["segments"]) if kind == "segment" else np.zeros(B * T, np.int32)
    o, _ = attention_forward_ref(q, k, v, starts, B, H, G)
    check_close(o, rows(g[f"{kind}_o"]), 1e-10)
    for name, gradient in zip(("dq", "dk", "dv"), attention_backward_ref(do, q, k, v, starts, B, H, G), strict=True):
        check_close(gradient, rows(g[f"{kind}_{name}"]), 1e-10)


@pytest.mark.parametrize("segmented", [False, True])
@pytest.mark.parametrize("block", [1, 3, 5, 13, 99])
def test_blocks_of_keys_equal_the_whole_matrix(rng, block, segmented):
    """Running maximum and sum, and gradients block by block; with segments, a query sees nothing of some blocks."""
    B, T, H, G, D = 3, 13, 4, 2, 8
    (q, k, v, do), starts = inputs(rng, B, T, H, G, D, np.float64)
    q *= 3  # peaked rows: the maximum moves from block to block
    if segmented:
        starts = starts_of(np.cumsum(rng.random((B, T)) < 0.3, axis=1))
        assert starts.max() > 2 * 3
    o, lse = attention_blocked_forward_ref(q, k, v, starts, B, H, G, block)
    gradients = attention_blocked_backward_ref(do, q, k, v, o, lse, starts, B, H, G, block)
    expected = run_reference(q, k, v, do, starts, B, H, G)
    for name, a, b in zip(NAMES, (o, lse, *gradients), expected, strict=True):
        check_close(a, b, 1e-12, name)


def test_blocks_of_keys_keep_float32_and_nan(rng):
    B, T, H, G, D = 2, 13, 4, 2, 8
    (q, k, v, _), starts = inputs(rng, B, T, H, G, D)
    o, lse = attention_blocked_forward_ref(q, k, v, starts, B, H, G, 5)
    assert o.dtype == lse.dtype == np.float32
    q[T + 4] = np.nan
    broken, _ = attention_blocked_forward_ref(q, k, v, starts, B, H, G, 5)
    assert np.isnan(broken[T + 4]).all()
    rest = np.arange(B * T) != T + 4
    assert np.array_equal(broken[rest], o[rest])


@pytest.mark.parametrize("shape", SMALL)
def test_kernels_equal_the_reference(rng, shape):
    B, _, H, G, _ = shape
    arrays, starts = inputs(rng, *shape)
    check_equal(arrays, starts, B, H, G)


@pytest.mark.skipif(not JIT, reason="slow without compiling; the small shapes take the same lines")
@pytest.mark.parametrize("shape", LARGE)
def test_kernels_equal_the_reference_over_several_blocks(rng, shape):
    B, _, H, G, _ = shape
    arrays, starts = inputs(rng, *shape)
    check_equal(arrays, starts, B, H, G)


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_segments_equal_the_reference(seed):
    rng = np.random.default_rng(seed)
    B, T, H, G, _ = SEGMENTED
    arrays, _ = inputs(rng, *SEGMENTED)
    check_equal(arrays, random_starts(rng, B, T), B, H, G)


def test_a_segment_of_one_copies_its_value(rng):
    """Where every token sees itself alone, o is v; nothing reaches q and k."""
    B, T, H, G, D = 2, 21, 4, 2, 6
    (q, k, v, do), _ = inputs(rng, B, T, H, G, D)
    starts = np.tile(np.arange(T, dtype=np.int32), B)
    o, _, dq, dk, dv = run_kernels(q, k, v, do, starts, B, H, G)
    check_close(o.reshape(B * T, G, H // G, D), np.repeat(v.reshape(B * T, G, 1, D), H // G, axis=2), 1e-6)
    assert np.abs(dq).max() < 1e-5
    assert np.abs(dk).max() < 1e-5
    check_close(dv, do.reshape(B * T, G, H // G, D).sum(2).reshape(B * T, -1), 1e-6)


# -- who sees whom -------------------------------------------------------------------------------


def test_samples_never_see_each_other(rng):
    B, T, H, G, D = SEGMENTED
    arrays, starts = inputs(rng, B, T, H, G, D)
    before = run_kernels(*arrays, starts, B, H, G)
    other = [x.copy() for x in arrays]
    for x in other:
        x[T:] = rng.standard_normal(x[T:].shape)  # the second sample
    after = run_kernels(*other, starts, B, H, G)
    for name, a, b in zip(NAMES, before, after, strict=True):
        a, b = (a.T, b.T) if name == "lse" else (a, b)
        assert a[:T].tobytes() == b[:T].tobytes(), name
        assert not np.array_equal(a[T:], b[T:]), name


def test_a_sample_gives_the_same_bits_alone(rng):
    B, T, H, G, D = SEGMENTED
    arrays, starts = inputs(rng, B, T, H, G, D)
    together = run_kernels(*arrays, starts, B, H, G)
    alone = run_kernels(*(x[T : 2 * T] for x in arrays), starts[T : 2 * T], 1, H, G)
    for name, a, b in zip(NAMES, together, alone, strict=True):
        a, b = (np.ascontiguousarray(a.T), np.ascontiguousarray(b.T)) if name == "lse" else (a, b)
        assert a[T : 2 * T].tobytes() == b.tobytes(), name


def test_segments_never_see_each_other(rng):
    """Changing everything about one segment of a packed row leaves the bits of the others, before and after it."""
    B, T, H, G, D = SEGMENTED
    first, last = T // 3, T // 2
    marks = np.zeros((B, T), int)
    marks[:, first:last], marks[:, last:] = 1, 2
    arrays, starts = inputs(rng, B, T, H, G, D)[0], starts_of(marks)
    before = run_kernels(*arrays, starts, B, H, G)
    changed = (marks == 1).ravel()
    other = [x.copy() for x in arrays]
    for x in other:
        x[changed] = rng.standard_normal(x[changed].shape)
    after = run_kernels(*other, starts, B, H, G)
    for name, a, b in zip(NAMES, before, after, strict=True):
        a, b = (a.T, b.T) if name == "lse" else (a, b)
        assert a[~changed].tobytes() == b[~changed].tobytes(), name
        assert not np.array_equal(a[changed], b[changed]), name


def test_a_segment_equals_a_sequence_of_its_own(rng):
    B, T, H, G, D = SEGMENTED
    cut = T // 2 + 1
    arrays, starts = inputs(rng, B, T, H, G, D)
    starts = np.tile(np.where(np.arange(T) < cut, 0, cut).astype(np.int32), B)
    packed = run_kernels(*arrays, starts, B, H, G)
    for part in (slice(0, cut), slice(cut, T)):
        alone = run_kernels(*(x[part] for x in arrays), np.zeros(part.stop - part.start, np.int32), 1, H, G)
        for name, a, b in zip(NAMES, packed, alone, strict=True):
            check_close(a[:, part] if name == "lse" else a[part], b, 1e-4 if name[0] == "d" else 1e-5)


def test_the_future_never_influences(rng):
    B, T, H, G, D = SEGMENTED
    for cut in {1, T // 2, T - 1}:
        arrays, starts = inputs(rng, B, T, H, G, D)
        before = run_kernels(*arrays, starts, B, H, G)
        other = [x.copy() for x in arrays]
        later = np.tile(np.arange(T) >= cut, B)
        for x in other[:3]:
            x[later] = 10 * rng.standard_normal(x[later].shape)
        o, lse = run_kernels(*other, starts, B, H, G)[:2]
        assert o[~later].tobytes() == before[0][~later].tobytes()
        assert lse[:, ~later].tobytes() == before[1][:, ~later].tobytes()
        # and backward: what flows into a token's q comes from itself alone, into k and v from itself and later ones
        other = [x.copy() for x in arrays]
        other[3][~later] = rng.standard_normal(other[3][~later].shape)
        _, _, dq, dk, dv = run_kernels(*other, starts, B, H, G)
        for a, b in ((dq, before[2]), (dk, before[3]), (dv, before[4])):
            assert a[later].tobytes() == b[later].tobytes()


def test_every_key_before_counts(rng):
    """The opposite of the above: a change of the first token reaches the last."""
    B, T, H, G, D = SEGMENTED
    arrays, starts = inputs(rng, B, T, H, G, D)
    o = run_kernels(*arrays, starts, B, H, G)[0]
    arrays[2][0] += 1000
    changed = run_kernels(*arrays, starts, B, H, G)[0]
    assert (o[:T] != changed[:T]).all()
    assert np.array_equal(o[T:], changed[T:])


# -- memory and numbers --------------------------------------------------------------------------


def test_columns_of_wide_matrices(rng):
    """In the model q, k and v are columns of one matrix, and so are their gradients; nothing beside them may change."""
    B, T, H, G, D = 2, 70 if JIT else 9, 6, 2, 10
    (q, k, v, do), starts = inputs(rng, B, T, H, G, D)
    expected = run_kernels(q, k, v, do, starts, B, H, G)
    edges = np.cumsum([3, H * D, G * D, G * D])
    wide, d_wide = (rng.standard_normal((B * T, edges[-1] + 5)).astype(np.float32) for _ in range(2))
    views = [wide[:, a:b] for a, b in pairwise(edges)]
    d_views = [d_wide[:, a:b] for a, b in pairwise(edges)]
    for view, x in zip(views, (q, k, v), strict=True):
        view[...] = x
    before, d_before = wide.copy(), d_wide.copy()
    o_wide, lse = np.full((B * T, H * D + 7), -1, np.float32), np.empty((H, B * T), np.float32)
    o = o_wide[:, 4 : 4 + H * D]
    do_wide = np.concatenate([do, do], axis=1)[:, H * D :]
    attention_forward(o, lse, *views, starts, B, H, G)
    attention_backward(*d_views, do_wide, *views, o, lse, starts, B, H, G)
    for a, b in zip((o, lse, *d_views), expected, strict=True):
        check_close(a, b, 1e-5)  # not to the bit: sums over strided rows are vectorised in another order
    assert (np.delete(o_wide, np.s_[4 : 4 + H * D], axis=1) == -1).all()
    assert np.array_equal(wide, before)
    beside = np.s_[edges[0] : edges[-1]]
    assert np.array_equal(np.delete(d_wide, beside, axis=1), np.delete(d_before, beside, axis=1))


def test_same_bits_for_any_thread_count(rng, same_bits):
    B, T, H, G, D = SEGMENTED
    arrays, starts = inputs(rng, B, T, H, G, D)
    same_bits(lambda: run_kernels(*arrays, starts, B, H, G))
    starts = random_starts(rng, B, T)
    same_bits(lambda: run_kernels(*arrays, starts, B, H, G))


@pytest.mark.skipif(not JIT, reason="long rows")
@pytest.mark.parametrize("window", [None, 50])
def test_same_bits_for_any_plan(rng, monkeypatch, window):
    """For 8 to 128 threads backward has two phases, whose tasks own keys, then queries; two do them here."""
    B, T, H, G, _ = shape = 1, 3 * BACKWARD_KEYS + 5, 4, 2, 24
    arrays, starts = inputs(rng, *shape)
    starts = starts if window is None else windowed(starts, B, window)
    expected = run_kernels(*arrays, starts, B, H, G)
    for threads in (3, 8, 32, 128):
        monkeypatch.setattr(attention, "thread_count", lambda threads=threads: threads)
        for name, a, b in zip(NAMES, run_kernels(*arrays, starts, B, H, G), expected, strict=True):
            assert a.tobytes() == b.tobytes(), (name, threads)
    assert len(attention.backward_plan(B, T, H, G, attention.FLOAT32.columns, 32)) == 2


def test_shares_are_about_equal():
    """Of the deepzig step's attention and of a long row, as far as there is work for so many threads."""
    for batch, length, heads, kv_heads in ((4, 512, 8, 8), (1, 4096, 8, 4)):
        for threads in (8, 32):
            plans = attention.backward_plan(batch, length, heads, kv_heads, 48, threads)
            for plan in (attention.forward_plan(batch, length, heads, 48, threads), *plans):
                assert plan.imbalance < 1.2, (batch, length, threads)
                assert len(plan.ends) == threads + 1


def test_wide_heads_and_then_narrow_ones(rng):
    """The scratch is made for the widest heads seen; heads narrower than it must not read what is beside."""
    for shape in ((1, 5, 2, 1, 40), (1, 5, 2, 1, 3), (2, 5, 1, 1, 64), (1, 4, 2, 2, 7)):
        arrays, starts = inputs(rng, *shape)
        check_equal(arrays, starts, shape[0], *shape[2:4])


@pytest.mark.parametrize("segmented", [False, True])
@pytest.mark.parametrize("shape", [*SMALL[1:], *(LARGE if JIT else [])])
def test_windows(rng, shape, segmented):
    B, T, H, G, _ = shape
    arrays, starts = inputs(rng, *shape)
    if segmented:
        starts = random_starts(rng, B, T)
    for window in {2, T // 3 + 1, BACKWARD_QUERIES, T}:
        check_equal(arrays, windowed(starts, B, window), B, H, G, 0.3)


@pytest.mark.skipif(not JIT, reason="long rows")
def test_blocks_of_keys_out_of_all_windows_are_not_read(rng):
    """A key that is read and masked would multiply its NaN by zero."""
    B, _, H, G, _ = shape = 1, 3 * BACKWARD_KEYS, 2, 1, 8
    (q, k, v, do), starts = inputs(rng, *shape)
    block = BACKWARD_KEYS
    starts = windowed(starts, B, 20)
    expected = run_kernels(q, k, v, do, starts, B, H, G)
    k[:block] = v[:block] = np.nan
    made = run_kernels(q, k, v, do, starts, B, H, G)
    after = 2 * block  # no block of queries from here on sees one of those keys
    for name, a, b in zip(NAMES, made, expected, strict=True):
        a, b = (x.T if name == "lse" else x for x in (a, b))
        assert a[after:].tobytes() == b[after:].tobytes(), name


@pytest.mark.parametrize("size", [1e-3, 30.0])
def test_flat_and_peaked_rows(rng, size):
    """Scores all but equal, and scores so far apart that exp underflows for most."""
    shape = (1, 97 if JIT else 11, 2, 1, 16)
    (q, k, v, do), starts = inputs(rng, *shape)
    q *= np.float32(size)
    made, expected = run_kernels(q, k, v, do, starts, 1, 2, 1), run_reference(q, k, v, do, starts, 1, 2, 1)
    for a, b in zip(made, expected, strict=True):
        check_close(a, b, 2e-4)  # scores of some hundred have float32 errors of 1e-5, which exp passes on


def test_scores_beyond_the_range_of_exp(rng):
    (q, k, v, do), starts = inputs(rng, 1, 9, 1, 1, 4)
    q *= 1e4
    for x in run_kernels(q, k, v, do, starts, 1, 1, 1):
        assert np.isfinite(x).all()


def test_nan_stays_in_its_sample(rng):
    """NaN in q touches one row; in k or v every later row of its sample, and in backward all of it; never another."""
    B, T, H, G, D = SEGMENTED
    at = T // 2
    for spoiled in range(3):
        arrays, starts = inputs(rng, B, T, H, G, D)
        arrays[spoiled][at, 0] = np.nan  # sample 0, head 0
        with np.errstate(invalid="ignore"):
            o, lse, *gradients = run_kernels(*arrays, starts, B, H, G)
        head = o[:, 0] if spoiled == 2 else o[:, :D]  # v's first column feeds o's first column only
        assert np.isnan(head[at]).all()
        assert np.isfinite(o[T:]).all()
        assert np.isfinite(lse[:, T:]).all()
        for x in gradients:
            assert np.isfinite(x[T:]).all()
        assert any(np.isnan(x[:T]).any() for x in gradients)
        if spoiled == 0:
            assert np.isfinite(np.delete(o, at, axis=0)).all()
        else:
            assert np.isnan(head[at:T]).all()


# -- bfloat16 ------------------------------------------------------------------------------------


def narrow(x):
    """Return x rounded to bfloat16, as it is stored."""
    return (round_to_bf16_ref(x).view(np.uint32) >> np.uint32(16)).astype(np.uint16)


@pytest.mark.parametrize("segmented", [False, True])
@pytest.mark.parametrize("shape", [*SMALL, *(LARGE if JIT else [])])
def test_stored_in_bfloat16(rng, shape, segmented):
    """What is rounded besides the inputs are p, ds and do: each to 8 bits, so within 1 % of the largest element."""
    B, T, H, G, _ = shape
    (q, k, v, do), starts = inputs(rng, *shape)
    if segmented:
        starts = random_starts(rng, B, T)
    stored = [narrow(x) for x in (q, k, v)]
    o, lse = np.full_like(q, np.nan), np.full((H, len(q)), np.nan, np.float32)
    attention_forward(o, lse, *stored, starts, B, H, G)
    gradients = [np.full_like(x, np.nan) for x in (q, k, v)]
    attention_backward(*gradients, do, *stored, o, lse, starts, B, H, G)
    expected = run_reference(*(widen_bf16_ref(x) for x in stored), round_to_bf16_ref(do), starts, B, H, G)
    for name, found, right in zip(NAMES, (o, lse, *gradients), expected, strict=True):
        scale = max(np.abs(right).max(), 0.2)  # dq and dk of a single visible key are zero
        assert np.abs(found - right).max() < (1e-5 if name == "lse" else 1.5e-2) * scale, name


def test_bfloat16_has_the_same_bits_for_any_thread_count(rng, same_bits):
    B, _, H, G, _ = SEGMENTED
    (q, k, v, do), starts = inputs(rng, *SEGMENTED)
    stored = [narrow(x) for x in (q, k, v)]

    def make():
        o, lse = np.empty_like(q), np.empty((H, len(q)), np.float32)
        attention_forward(o, lse, *stored, starts, B, H, G)
        gradients = [np.empty_like(x) for x in (q, k, v)]
        attention_backward(*gradients, do, *stored, o, lse, starts, B, H, G)
        return o, lse, *gradients

    same_bits(make)


@pytest.mark.skipif(not JIT, reason="nothing is compiled")
def test_both_storage_formats_run_the_same_compiled_kernel(rng):
    B, _, H, G, _ = SMALL[1]
    (q, k, v, do), starts = inputs(rng, *SMALL[1])
    o, lse = np.empty_like(q), np.empty((H, len(q)), np.float32)
    for stored in ((q, k, v), [narrow(x) for x in (q, k, v)]):
        attention_forward(o, lse, *stored, starts, B, H, G)
        gradients = [np.empty_like(x) for x in (q, k, v)]
        attention_backward(*gradients, do, *stored, o, lse, starts, B, H, G)
    for compiled in (attention._attention_forward, attention._attention_backward):
        at = compiled.__code__.co_varnames.index("qkv")
        types = {str(kind.dtype) for signature in compiled.signatures for kind in signature[at]}
        assert types == {"uint16"}


# -- ending early --------------------------------------------------------------------------------


def test_nothing_is_computed_where_stop_is_set(rng):
    B, _, H, G, _ = SMALL[2]
    (q, k, v, do), starts = inputs(rng, *SMALL[2])
    expected = run_kernels(q, k, v, do, starts, B, H, G)
    for same, stop in ((True, 0), (False, 1)):
        found = run_kernels(q, k, v, do, starts, B, H, G, None, np.full(1, stop, np.uint8))
        for a, b in zip(found, expected, strict=True):
            assert np.array_equal(a, b) if same else np.isnan(a).all()


@pytest.mark.skipif(not JIT, reason="compiled code might look once only")
@pytest.mark.parametrize("backward", [False, True])
def test_a_kernel_that_runs_ends_early(rng, backward):
    """Another thread stops it when the first block is there; the last one that would be written then never is."""
    B, T, H, G, _ = shape = 1, 20_000, 2, 1, 64
    (q, k, v, do), starts = inputs(rng, *shape)
    o, lse = np.full_like(q, np.nan), np.zeros((H, T), np.float32)
    dq, dk, dv = (np.full_like(x, np.nan) for x in (q, k, v))
    stop = np.zeros(1, np.uint8)
    begun = (lambda: not np.isnan(dk[0, 0])) if backward else (lambda: not np.isnan(o).all())

    def watch():
        while not begun():
            time.sleep(0.001)
        stop[0] = 1

    watcher = threading.Thread(target=watch)
    watcher.start()
    if backward:
        attention_backward(dq, dk, dv, do, q, k, v, do, lse, starts, B, H, G, None, stop)
        unfinished = dk[-1]
    else:
        attention_forward(o, lse, q, k, v, starts, B, H, G, None, stop)
        unfinished = o
    watcher.join()
    assert np.isnan(unfinished).any()


@pytest.mark.skipif(not JIT, reason="a tile's twin is NumPy's product, whose last bits depend on the shape")
def test_bits_do_not_depend_on_the_tile(rng, monkeypatch, tiles):
    arrays, starts = inputs(rng, 2, FORWARD_KEYS + 37, 4, 2, 20)
    found = []
    for number_format in tiles:
        monkeypatch.setattr(attention, "FLOAT32", number_format)
        found.append(run_kernels(*arrays, starts, 2, 4, 2))
    for results in found[1:]:
        for name, x, expected in zip(NAMES, results, found[0], strict=True):
            assert np.array_equal(x, expected), name


@pytest.mark.parametrize("scale", [0, -0.5, float("nan")])
def test_a_scale_that_is_not_above_0_is_refused(rng, scale):
    arrays, starts = inputs(rng, 1, 5, 2, 1, 8)
    with pytest.raises(ValueError, match=r"^scale is .*; scores are hidden before they are scaled, so it must"):
        run_kernels(*arrays, starts, 1, 2, 1, scale)


def test_a_method_of_bfloat16_takes_what_is_stored_so(rng):
    """Also one that was not chosen."""
    arrays, starts = inputs(rng, 1, 5, 2, 1, 8)
    q, k, v = (x for x in arrays[:3])
    o, lse = np.empty_like(q), np.empty((2, len(q)), np.float32)
    with pytest.raises(TypeError, match=r"^q is float32; in attention .* is stored as uint16; convert q, k, v"):
        attention.attention_forward(o, lse, q, k, v, starts, 1, 2, 1, number_format=METHODS["fp32"])
