"""Head and cross-entropy: the three nails, ignored rows, smoothing, chunks, accuracy, threads and NaN."""

import math

import numpy as np
import pytest

from abi_py.gradcheck import check_close, check_gradient
from abi_py.kernels import cross_entropy as module
from abi_py.kernels.cross_entropy import cross_entropy_ref, head_loss, head_loss_backward, head_loss_ref
from abi_py.kernels.storage import STORAGES

# (N, C, V)
SHAPES = [(1, 1, 2), (5, 3, 7), (23, 12, 31), (37, 20, 101)]
SMOOTHING = [0.0, 0.1]
Z_LOSS = [0.0, 0.02]


def inputs(rng, N, C, V, ignored=0.3, dtype=np.float32):
    x, w = rng.standard_normal((N, C)).astype(dtype), rng.standard_normal((V, C)).astype(dtype)
    labels = rng.integers(0, V, N).astype(np.int32)
    labels[1:][rng.random(N - 1) < ignored] = -100
    return x, w, labels


def scratch_for(x, w):
    """Return just what the head needs, filled with garbage."""
    return np.full(module.scratch_floats(len(x), len(w), x.shape[1]), np.nan, np.float32)


def run_kernels(x, w, labels, scale=1.0, smoothing=0.0, dw=None, z_loss=0.0, weights=None):
    """Return losses, hits, lse, dx and dw; what is overwritten begins as garbage, and dw as the array given."""
    losses, hits = np.full(len(x), np.nan, np.float32), np.full(len(x), 77, np.uint8)
    lse = np.full_like(losses, np.nan)
    dx, accumulate = np.full_like(x, np.nan), dw is not None
    dw = dw.copy() if accumulate else np.full_like(w, np.nan)
    options = {"smoothing": smoothing, "accumulate": accumulate, "z_loss": z_loss, "lse": lse, "weights": weights}
    head_loss_backward(losses, hits, dx, dw, x, w, labels, scratch_for(x, w), scale, **options)
    return losses, hits, lse, dx, dw


def check_equal(x, w, labels, scale=1.0, smoothing=0.0, dw=None, z_loss=0.0, weights=None):
    made = run_kernels(x, w, labels, scale, smoothing, dw, z_loss, weights)
    expected = head_loss_ref(x.astype(np.float64), w.astype(np.float64), labels, scale, smoothing, z_loss, weights)
    check_close(made[0], expected[0], 1e-5)
    assert np.array_equal(made[1], expected[1])
    check_close(made[2], expected[2], 1e-5)
    check_close(made[3], expected[3], 1e-4)
    check_close(made[4], expected[4] + (0 if dw is None else dw), 1e-4)
    losses, hits = np.full(len(x), np.nan, np.float32), np.full(len(x), 77, np.uint8)
    head_loss(losses, hits, x, w, labels, scratch_for(x, w), smoothing)
    assert losses.tobytes() == made[0].tobytes()  # with and without backward
    assert hits.tobytes() == made[1].tobytes()


# -- the three nails -----------------------------------------------------------------------------


@pytest.mark.parametrize("z_loss", Z_LOSS)
@pytest.mark.parametrize("smoothing", SMOOTHING)
@pytest.mark.parametrize("shape", SHAPES)
def test_derivation(rng, shape, smoothing, z_loss):
    x, w, labels = inputs(rng, *shape, dtype=np.float64)
    weights = rng.standard_normal(len(x))
    *_, dx, dw = head_loss_ref(x, w, labels, 0.7, smoothing, z_loss, weights)

    def objective(x, w):
        losses, _, lse, *_ = head_loss_ref(x, w, labels, 1.0, smoothing)
        return 0.7 * (weights * (losses + z_loss * lse**2)).sum()

    check_gradient(lambda x: objective(x, w), x, dx, rng)
    check_gradient(lambda w: objective(x, w), w, dw, rng)


@pytest.mark.parametrize("kind", ["plain", "smooth", "z", "smooth_z"])
def test_definition(golden, kind):
    g = golden("cross_entropy")
    counted = int((g["labels"] >= 0).sum())
    smoothing, z_loss = 0.1 if "smooth" in kind else 0.0, 0.02 if "z" in kind else 0.0
    losses, hits, lse, dx, dw = head_loss_ref(g["x"], g["w"], g["labels"], 1 / counted, smoothing, z_loss)
    check_close(losses, g[f"{kind}_rows"], 1e-10)
    check_close((losses + z_loss * lse**2).sum() / counted, g[f"{kind}_loss"], 1e-10)
    check_close(dx, g[f"{kind}_dx"], 1e-10)
    check_close(dw, g[f"{kind}_dw"], 1e-10)
    assert hits.sum() == g[f"{kind}_correct"]


@pytest.mark.parametrize("z_loss", Z_LOSS)
@pytest.mark.parametrize("accumulate", [False, True])
@pytest.mark.parametrize("smoothing", SMOOTHING)
@pytest.mark.parametrize("shape", SHAPES)
def test_kernels_equal_the_reference(rng, shape, smoothing, accumulate, z_loss):
    x, w, labels = inputs(rng, *shape)
    dw = rng.standard_normal(w.shape).astype(np.float32) if accumulate else None
    check_equal(x, w, labels, 0.37, smoothing, dw, z_loss)
    every = np.where(labels < 0, 0, labels).astype(np.int32)  # every row counts
    check_equal(x, w, every, 0.37, smoothing, dw, z_loss)
    weights = rng.standard_normal(len(x)).astype(np.float32)
    check_equal(x, w, labels, 0.37, smoothing, dw, z_loss, weights)
    check_equal(x, w, every, 0.37, smoothing, dw, z_loss, weights)


@pytest.mark.parametrize("smoothing", SMOOTHING)
def test_a_vocabulary_longer_than_one_stretch_of_the_sum(rng, smoothing):
    check_equal(*inputs(rng, 3, 4, 2 * 4096 + 11), 1.0, smoothing)


# -- rows that do not count ----------------------------------------------------------------------


@pytest.mark.parametrize("accumulate", [False, True])
def test_nothing_counts(rng, accumulate):
    x, w, labels = inputs(rng, 7, 5, 11)
    before = rng.standard_normal(w.shape).astype(np.float32)
    *rows, dw = run_kernels(x, w, np.full_like(labels, -100), dw=before if accumulate else None, z_loss=0.1)
    assert not any(each.any() for each in rows)
    assert np.array_equal(dw, before if accumulate else np.zeros_like(w))


def test_ignored_rows_have_no_influence(rng):
    x, w, labels = inputs(rng, 23, 5, 11)
    ignored = labels < 0
    before = run_kernels(x, w, labels)
    x[ignored] = np.nan
    after = run_kernels(x, w, labels)
    for a, b in zip(before, after, strict=True):
        assert a.tobytes() == b.tobytes()
    for a in after[:4]:
        assert not a[ignored].any()


def test_weights_multiply_gradients_alone(rng):
    """Losses, hits and lse keep their bits; a weight of 1 changes nothing, and one of 0 leaves a row out of dw."""
    x, w, labels = inputs(rng, 23, 5, 11)
    plain = run_kernels(x, w, labels, 0.7, 0.1, None, 0.02)
    ones = run_kernels(x, w, labels, 0.7, 0.1, None, 0.02, np.ones(23, np.float32))
    assert [a.tobytes() for a in ones] == [a.tobytes() for a in plain]
    weights = (np.arange(23) % 3 - 1).astype(np.float32)
    weighted = run_kernels(x, w, labels, 0.7, 0.1, None, 0.02, weights)
    assert [a.tobytes() for a in weighted[:3]] == [a.tobytes() for a in plain[:3]]
    assert np.array_equal(weighted[3], plain[3] * weights[:, None])
    with pytest.raises(ValueError, match="weights"):
        run_kernels(x, w, labels, weights=weights[1:])


# -- chunks --------------------------------------------------------------------------------------


@pytest.mark.parametrize("ignored", [0.0, 0.4])
@pytest.mark.parametrize("accumulate", [False, True])
def test_several_chunks(rng, monkeypatch, ignored, accumulate):
    N, C, V = 67, 9, 13
    x, w, labels = inputs(rng, N, C, V, ignored)
    dw = rng.standard_normal(w.shape).astype(np.float32) if accumulate else None
    weights = rng.standard_normal(N).astype(np.float32)
    whole = run_kernels(x, w, labels, 0.5, 0.1, dw, 0.02, weights)
    monkeypatch.setattr(module, "CHUNK_LOGITS", 16 * V)
    assert module.chunk_rows(V) == 16  # 67 rows: five chunks, the last of three rows
    check_equal(x, w, labels, 0.5, 0.1, dw, 0.02, weights)
    pieces = run_kernels(x, w, labels, 0.5, 0.1, dw, 0.02, weights)
    for at in range(4):  # what belongs to a row has the same bits; dw is a sum over chunks
        assert pieces[at].tobytes() == whole[at].tobytes()


def test_logits_never_exist_at_once(rng, monkeypatch):
    """The scratch holds the logits of one chunk and its rows of x, however many rows there are."""
    monkeypatch.setattr(module, "CHUNK_LOGITS", 16 * 53)
    assert module.scratch_floats(500, 53, 3) == module.scratch_floats(16, 53, 3) == 16 * (53 + 3)
    assert module.scratch_floats(7, 53, 3) == 7 * (53 + 3)
    check_equal(*inputs(rng, 500, 3, 53))


@pytest.mark.parametrize("ignored", [0.0, 0.4, 1.0])
def test_dx_may_lie_where_x_lies(rng, monkeypatch, ignored):
    monkeypatch.setattr(module, "CHUNK_LOGITS", 16 * 13)
    x, w, labels = inputs(rng, 67, 9, 13, ignored)
    labels[0] = -100 if ignored == 1 else labels[0]
    losses, hits, _, *gradients = run_kernels(x, w, labels, 0.5, 0.1)
    got = np.full(67, np.nan, np.float32), np.full(67, 77, np.uint8), x, np.full_like(w, np.nan)
    head_loss_backward(*got, x, w, labels, scratch_for(x, w), 0.5, 0.1, False)
    for one, other in zip(got, (losses, hits, *gradients), strict=True):
        assert one.tobytes() == other.tobytes()


@pytest.mark.parametrize("accumulate", [False, True])
@pytest.mark.parametrize("ignored", [0.0, 0.4, 1.0])
def test_a_frozen_head_has_no_dw(rng, monkeypatch, ignored, accumulate):
    """Without dw all else has the same bits, in one chunk and in several; labels that do not count among them."""
    x, w, labels = inputs(rng, 67, 9, 13, ignored)
    for chunk in (module.CHUNK_LOGITS, 32 * 13):
        monkeypatch.setattr(module, "CHUNK_LOGITS", chunk)
        losses, hits, _, dx, _ = run_kernels(x, w, labels, 0.5, 0.1)
        got = np.full(67, np.nan, np.float32), np.full(67, 77, np.uint8), np.full_like(x, np.nan)
        before = w.copy()
        head_loss_backward(*got, None, x, w, labels, scratch_for(x, w), 0.5, 0.1, accumulate)
        for one, other in zip(got, (losses, hits, dx), strict=True):
            assert one.tobytes() == other.tobytes()
        assert w.tobytes() == before.tobytes()


@pytest.mark.parametrize("name", STORAGES)
@pytest.mark.parametrize("chunk", [None, 16 * 13])
def test_a_matrix_that_is_not_trained_may_be_in_any_storage(rng, monkeypatch, name, chunk, same_bits):
    if chunk:
        monkeypatch.setattr(module, "CHUNK_LOGITS", chunk)
    storage = STORAGES[name]
    x, w, labels = inputs(rng, 37, max(5, storage.block), 13)
    raw = storage.encode_ref(w)
    scratch = scratch_for(x, w)

    def make():
        losses, hits, dx = np.empty(len(x), np.float32), np.empty(len(x), np.uint8), np.empty_like(x)
        options = {"storage": storage, "z_loss": 0.02}
        head_loss_backward(losses, hits, dx, None, x, raw, labels, scratch, 0.5, **options)
        alone = losses.copy()
        head_loss(alone, hits, x, raw, labels, scratch, storage=storage)
        assert alone.tobytes() == losses.tobytes()
        return losses, hits, dx

    same_bits(make)
    decoded = storage.decode_ref(raw).astype(np.float64)
    losses, hits, _, dx, _ = head_loss_ref(x.astype(np.float64), decoded, labels, 0.5, z_loss=0.02)
    for found, wanted in zip(make(), (losses, hits, dx), strict=True):
        check_close(found, wanted, 1e-4)
    with pytest.raises(ValueError, match=f"w is kept as {name} and is not trained"):
        head_loss_backward(*make(), np.zeros_like(w), x, raw, labels, scratch, 0.5, storage=storage)


# -- accuracy, numbers ---------------------------------------------------------------------------


@pytest.mark.parametrize("ignored", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("accumulate", [False, True])
def test_a_second_product_is_more_columns_of_the_first(rng, monkeypatch, ignored, accumulate):
    """z = x Wᵀ + u Bᵀ = [x u] [W B]ᵀ, chunk by chunk."""
    monkeypatch.setattr(module, "CHUNK_LOGITS", 16 * 31)
    x, w, labels = inputs(rng, 40, 12, 31, ignored)
    labels[0] = -100 if ignored == 1 else 3
    u, b = rng.standard_normal((40, 5)).astype(np.float32), rng.standard_normal((31, 5)).astype(np.float32)
    wide = [np.concatenate(pair, axis=1).astype(np.float64) for pair in ((x, u), (w, b))]
    losses, hits, _, dx, dw = head_loss_ref(*wide, labels, 0.7, 0.1, 0.02)
    before = rng.standard_normal(b.shape).astype(np.float32) if accumulate else np.full_like(b, np.nan)
    second = module.Second(u, b, np.full_like(u, np.nan), before.copy())
    made = np.empty(40, np.float32), np.empty(40, np.uint8), np.full_like(x, np.nan)
    options = {"smoothing": 0.1, "accumulate": accumulate, "z_loss": 0.02, "second": second}
    head_loss_backward(*made[:2], made[2], None, x, w, labels, scratch_for(x, w), 0.7, **options)
    check_close(made[0], losses, 1e-5)
    assert np.array_equal(made[1], hits)
    check_close(made[2], dx[:, :12], 1e-4)
    check_close(second.du, dx[:, 12:], 1e-4)
    check_close(second.db, dw[:, 12:] + (before if accumulate else 0), 1e-4)
    head_loss(*made[:2], x, w, labels, scratch_for(x, w), 0.1, second=second)
    check_close(made[0], losses, 1e-5)
    with pytest.raises(ValueError, match=r"second has shapes .* here they must be \[\(40, 5\), \(31, 5\)"):
        head_loss(*made[:2], x, w, labels, scratch_for(x, w), second=second._replace(u=u[1:]))


@pytest.mark.parametrize("ignored", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("accumulate", [False, True])
@pytest.mark.parametrize("dropped", [False, True])
def test_lengths_of_rows_are_those_of_wider_matrices(rng, monkeypatch, ignored, accumulate, dropped):
    """y = x Wᵀ + (g - 1) h Wᵀ + g u Bᵀ = [x h u] [W (g - 1) W  g B]ᵀ, of which gradients of g and B follow."""
    monkeypatch.setattr(module, "CHUNK_LOGITS", 16 * 31)
    x, w, labels = inputs(rng, 40, 12, 31, ignored)
    labels[0] = -100 if ignored == 1 else 3
    u, b = rng.standard_normal((40, 5)).astype(np.float32), rng.standard_normal((31, 5)).astype(np.float32)
    h = rng.standard_normal(x.shape).astype(np.float32) if dropped else x
    g, n, before = (1 + rng.random((3, 31))).astype(np.float32)
    wide = [each.astype(np.float64) for each in (w, (g - 1)[:, None] * w, g[:, None] * b)]
    both = np.concatenate([x, h, u], axis=1).astype(np.float64), np.concatenate(wide, axis=1)
    losses, hits, _, dx, dw = head_loss_ref(*both, labels, 0.7, 0.1, 0.02)
    dm = ((dw[:, 12:24] * w).sum(1) + (dw[:, 24:] * b).sum(1)) / n
    db = g[:, None] * dw[:, 24:]

    of_rows = (h, np.full_like(h, np.nan)) if dropped else (None, None)
    dm_before, db_before = (before, np.ones_like(b)) if accumulate else (np.full_like(before, np.nan),) * 2
    lengths = module.Lengths(g, n, dm_before.copy(), *of_rows)
    second = module.Second(u, b, np.full_like(u, np.nan), np.broadcast_to(db_before.T, b.T.shape).T.copy(), lengths)
    assert second.logits == 2 + dropped
    scratch = np.full(module.scratch_floats(40, 31, 12, second.logits), np.nan, np.float32)
    made = np.empty(40, np.float32), np.empty(40, np.uint8), np.full_like(x, np.nan)
    options = {"smoothing": 0.1, "accumulate": accumulate, "z_loss": 0.02, "second": second}
    head_loss_backward(*made, None, x, w, labels, scratch, 0.7, **options)
    check_close(made[0], losses, 1e-5)
    assert np.array_equal(made[1], hits)
    check_close(made[2], dx[:, :12] if dropped else dx[:, :12] + dx[:, 12:24], 1e-4)
    if dropped:
        check_close(lengths.dh, dx[:, 12:24], 1e-4)
    check_close(second.du, dx[:, 24:], 1e-4)
    check_close(second.db, db + accumulate, 1e-4)
    check_close(lengths.dm, dm + (before if accumulate else 0), 1e-4)
    head_loss(*made[:2], x, w, labels, scratch, 0.1, second=second)
    check_close(made[0], losses, 1e-5)
    with pytest.raises(ValueError, match=r"second.lengths have shapes .* here they must be \[\(31,\), \(31,\)"):
        head_loss(*made[:2], x, w, labels, scratch, second=second._replace(lengths=lengths._replace(g=g[1:])))
    with pytest.raises(ValueError, match=r"dw is an array; a w whose rows have lengths .* is not trained: pass None"):
        head_loss_backward(*made, np.zeros_like(w), x, w, labels, scratch, 0.7, second=second)
    with pytest.raises(ValueError, match="the head needs"):
        head_loss(*made[:2], x, w, labels, scratch_for(x, w), second=second)


def test_the_first_of_equal_maxima_is_the_prediction():
    x = np.ones((5, 1), np.float32)
    w = np.array([[1], [3], [2], [3], [3]], np.float32)
    assert run_kernels(x, w, np.arange(5, dtype=np.int32))[1].tolist() == [0, 1, 0, 0, 0]
    assert cross_entropy_ref(x @ w.T, np.arange(5))[1].tolist() == [0, 1, 0, 0, 0]


def test_equal_logits_cost_the_logarithm_of_the_vocabulary(rng):
    x, w, labels = inputs(rng, 9, 4, 31, 0)
    for smoothing in SMOOTHING:
        losses = run_kernels(x, np.zeros_like(w), labels, 1.0, smoothing)[0]
        check_close(losses, np.full(9, math.log(31)), 1e-6)


def test_a_row_of_dz_sums_to_zero(rng):
    """Column sums of dx's factor: with w = 1 everywhere, dx = sum of dz over the vocabulary."""
    x, w, labels = inputs(rng, 29, 4, 37, 0)
    for smoothing in SMOOTHING:
        dx = run_kernels(x, np.ones_like(w), labels, 1.0, smoothing)[3]
        assert np.abs(dx).max() < 1e-5


def test_very_large_logits_do_not_overflow():
    x = np.array([[1e4], [-1e4]], np.float32)
    w = np.array([[1], [-1], [0.5]], np.float32)
    losses, _, _, dx, dw = run_kernels(x, w, np.array([0, 0], np.int32), z_loss=1e-4)
    check_close(losses, [0, 2e4], 1e-6)
    assert np.isfinite(dx).all()
    assert np.isfinite(dw).all()


@pytest.mark.parametrize("ignored", [0.0, 0.4])
def test_same_bits_for_any_thread_count(rng, same_bits, ignored):
    x, w, labels = inputs(rng, 131, 17, 61, ignored)
    same_bits(lambda: run_kernels(x, w, labels, 0.3, 0.1, z_loss=0.02))
    same_bits(lambda: run_kernels(x, w, labels, 0.3, 0.1, np.ones_like(w)))


def test_nan_stays_in_its_row(rng):
    x, w, labels = inputs(rng, 6, 5, 11, 0)
    x[2, 3] = np.nan
    with np.errstate(invalid="ignore"):
        losses, hits, _, dx, dw = run_kernels(x, w, labels)
    assert np.isnan(losses[2])
    assert np.isnan(dx[2]).all()
    assert not hits[2]
    others = [0, 1, 3, 4, 5]
    assert np.isfinite(losses[others]).all()
    assert np.isfinite(dx[others]).all()
    assert np.isnan(dw).all()


def test_one_nan_logit_spoils_its_row(rng):
    """NaN in one row of w is NaN in one logit of every row: the loss must not hide it, whatever the label."""
    x, w, labels = inputs(rng, 6, 5, 40, 0)
    labels[:] = 3
    w[33] = np.nan
    with np.errstate(invalid="ignore"):
        losses, _, _, dx, _ = run_kernels(x, w, labels)
    assert np.isnan(losses).all()
    assert np.isnan(dx).all()
