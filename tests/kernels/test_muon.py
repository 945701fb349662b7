"""Muon: PyTorch's figures, the kernel against the reference, shapes, threads, NaN."""

import numpy as np
import pytest

from abi_py.gradcheck import check_close
from abi_py.kernels.muon import muon_, muon_flops, muon_ratio, muon_ref, orthogonal_ref

KINDS = {
    "original": (False, 0.95, True, 5),
    "match_rms": (True, 0.95, True, 5),
    "plain": (False, 0.8, False, 3),
}  # kind: match_rms, momentum, nesterov, steps
SHAPES = [(1, 1), (1, 9), (9, 1), (5, 12), (23, 7), (31, 31), (129, 65)]


def updated(update, w, gradients, settings):
    """Return w and m after an update by each gradient; a reference returns both, a kernel changes them."""
    w, m = w.copy(), np.zeros_like(w)
    for g in gradients:
        made = update(w, m, g, *settings)
        w, m = (w, m) if made is None else made
    return w, m


@pytest.mark.parametrize("i", range(3))
@pytest.mark.parametrize("kind", KINDS)
def test_definition(golden, kind, i):
    """Ten updates are those of torch.optim.Muon: the reference's its own in float64, the kernel's to 1e-4."""
    g = golden("muon")
    w, gradients = g[f"w{i}"], g[f"g{i}"]
    match_rms, momentum, nesterov, steps = KINDS[kind]
    ratio = muon_ratio(*w.shape, match_rms)
    settings = float(g["lr"]), ratio, momentum, nesterov, float(g["weight_decay"]), steps, 1.0
    exact, change = g[f"exact_{kind}{i}"], np.abs(g[f"exact_{kind}{i}"] - w).max()
    check_close(updated(muon_ref, w, gradients, settings)[0], exact, 1e-10)
    found = updated(muon_, w.astype(np.float32), gradients.astype(np.float32), settings)[0]
    assert np.abs(found - exact).max() < 1e-4 * max(1, change)
    # PyTorch as it is iterates in bfloat16, whose roundings are a few percent of an update.
    assert np.abs(found - g[f"bf16_{kind}{i}"]).max() < 0.05 * change


@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
def test_kernel_equals_the_reference(rng, shape, nesterov):
    w, m, g = rng.standard_normal((3, *shape)).astype(np.float32)
    settings = 0.02, 0.7, 0.9, nesterov, 0.1, 5, 0.25
    expected = muon_ref(*(a.astype(np.float64) for a in (w, m, g)), *settings)
    kept = g.copy()
    muon_(w, m, g, *settings)
    check_close(w, expected[0], 1e-5)
    check_close(m, expected[1], 1e-6)
    assert np.array_equal(g, kept)


def test_the_update_is_nearly_orthogonal(rng):
    """Singular values end near 1 whatever they were; the scale of the gradient does not count."""
    for shape in ((40, 70), (70, 40)):
        u = rng.standard_normal(shape) * np.geomspace(1, 20, shape[1])
        left, _, right = np.linalg.svd(u, full_matrices=False)
        values = np.diag(left.T @ orthogonal_ref(u) @ right.T)  # its own singular vectors are kept
        assert 0.6 < values.min() < values.max() < 1.25
        np.testing.assert_allclose((left * values) @ right, orthogonal_ref(u), atol=1e-9)
        np.testing.assert_allclose(orthogonal_ref(1e-3 * u), orthogonal_ref(u), rtol=1e-9)


def test_the_ratio_matches_the_shape(rng):
    for shape in ((40, 70), (70, 40), (64, 64)):
        x = orthogonal_ref(rng.standard_normal(shape)) * muon_ratio(*shape, True)
        assert 0.14 < np.sqrt((x**2).mean()) < 0.26 * np.sqrt(max(shape) / min(shape))
    assert muon_ratio(8, 2, False) == 2.0
    assert muon_ratio(2, 8, False) == 1.0
    assert muon_flops(2, 8) == muon_flops(8, 2) == 5 * (4 * 2 * 16 + 2 * 8)


def test_a_gradient_of_zeros_changes_nothing_but_decays():
    w, m, g = np.ones((3, 4), np.float32), np.zeros((3, 4), np.float32), np.zeros((3, 4), np.float32)
    muon_(w, m, g, 0.1, 1.0, 0.95, True, 0.5, 5, 1.0)
    check_close(w, np.full((3, 4), 0.95), 1e-6)
    assert not m.any()


def test_same_bits_for_any_thread_count(rng, same_bits):
    w, m, g = rng.standard_normal((3, 131, 257)).astype(np.float32)

    def update():
        found, momentum = w.copy(), m.copy()
        muon_(found, momentum, g, 0.02, 0.7, 0.95, True, 0.1, 5, 0.3)
        return found, momentum

    same_bits(update)


def test_nan_is_not_hidden(rng):
    w, m, g = rng.standard_normal((3, 5, 8)).astype(np.float32)
    g[2, 3] = np.nan
    muon_(w, m, g, 0.02, 1.0, 0.95, True, 0.1, 5, 1.0)
    assert np.isnan(w).all()
    assert np.isnan(m).sum() == 1


def test_numbers_out_of_range_are_refused(rng):
    w, m, g = rng.standard_normal((3, 5, 8)).astype(np.float32)
    with pytest.raises(ValueError, match=r"steps \(0\) must be at least 1"):
        muon_(w, m, g, 0.02, 1.0, 0.95, True, 0.1, 0, 1.0)
    with pytest.raises(ValueError, match=r"momentum \(1.0\) must be at least 0 and below 1"):
        muon_(w, m, g, 0.02, 1.0, 1.0, True, 0.1, 5, 1.0)
