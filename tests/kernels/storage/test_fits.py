"""Fits of scales: against least squares in float64, by the errors that they leave, and what no scale can help."""

import numpy as np
import pytest

from abi_py.kernels.storage import q4_k, q6_k
from abi_py.kernels.storage.fits import affine_fit_ref, columns_ref, even_fit_ref, sum_ref, weights_ref


def groups(rng, size):
    x = rng.standard_normal((size, 40)).astype(np.float32)
    return x, rng.uniform(0.1, 2, x.shape).astype(np.float32)


def loss(x, weight, kept):
    return (weight.astype(np.float64) * (kept - x.astype(np.float64)) ** 2).sum(0)


def best_affine(x, weight, q):
    """Return scale and offset of least weighted squared error for whole numbers q, of one group."""
    root = np.sqrt(weight.astype(np.float64))
    (scale, least), *_ = np.linalg.lstsq(np.stack([q * root, root], 1), x * root, rcond=None)
    return scale, -least


def test_an_even_fit_is_the_best_scale_of_its_rounding(rng):
    x, weight = groups(rng, 16)
    scale = even_fit_ref(x, weight, 31, q6_k.STEPS)
    largest = np.take_along_axis(x, np.abs(x).argmax(0)[None], 0)[0]
    losses = []
    for step in q6_k.STEPS.astype(np.float64):
        q = np.clip(np.rint(x * (-step / largest)), -32, 31)
        best = (weight * x * q).sum(0) / (weight * q * q).sum(0)
        losses.append(loss(x, weight, best * q))
    least = np.min(losses, 0)
    roundings = [np.clip(np.rint(x * np.float32(-step / largest)), -32, 31) for step in q6_k.STEPS]
    found = np.min([loss(x, weight, scale.astype(np.float64) * q) for q in roundings], 0)
    assert (found <= least * 1.001).all()


def test_an_affine_fit_is_the_best_scale_and_offset_of_its_rounding(rng):
    x, weight = groups(rng, 32)
    scale, offset = affine_fit_ref(x, weight, 15, q4_k.STEPS)
    assert (scale > 0).all()
    assert (offset >= 0).all()
    found = loss(x, weight, scale * np.clip(np.rint((x + offset) / scale), 0, 15) - offset)
    plain_scale, plain_offset = (x.max(0) - x.min(0)) / 15, -x.min(0)
    plain = loss(x, weight, plain_scale * np.clip(np.rint((x + plain_offset) / plain_scale), 0, 15) - plain_offset)
    assert found.sum() < 0.9 * plain.sum()
    for i in range(x.shape[1]):  # one of the roundings tried has exactly this solution, or is no better
        q = np.clip(np.rint((x[:, i] + offset[i]) / scale[i]), 0, 15).astype(np.float64)
        best_scale, best_offset = best_affine(x[:, i], weight[:, i], q)
        assert found[i] <= 1.1 * loss(x[:, i, None], weight[:, i, None], (best_scale * q - best_offset)[:, None])[0]


@pytest.mark.parametrize("sign", [1, -1])
def test_numbers_of_one_sign(rng, sign):
    """An offset below 0 cannot be kept: positive numbers are scaled alone; negative ones have 0 as their largest."""
    x, weight = groups(rng, 32)
    x = sign * (np.abs(x) + 1)
    scale, offset = affine_fit_ref(x, weight, 15, q4_k.STEPS)
    kept = scale * np.clip(np.rint((x + offset) / scale), 0, 15) - offset
    assert (offset >= 0).all() if sign > 0 else (offset > 0).all()
    assert np.linalg.norm(kept - x) < 0.1 * np.linalg.norm(x)


def test_zeros_and_what_no_half_keeps_have_no_scale():
    for x in (np.zeros((32, 3), np.float32), np.full((32, 3), 1e-31, np.float32)):
        assert not even_fit_ref(x, np.ones_like(x), 31, q6_k.STEPS).any()
        assert not np.any(affine_fit_ref(x, np.ones_like(x), 15, q4_k.STEPS))


def test_weights(rng):
    """By the formulas, in float64; of importance they are a multiple."""
    x = rng.standard_normal((5, 256)).astype(np.float32)
    wide, importance = x.astype(np.float64), rng.random((5, 256)).astype(np.float32)
    rms = np.sqrt((wide.reshape(-1, 32) ** 2).mean(1))
    assert np.allclose(weights_ref(x, None, 32, True), (wide**2).reshape(-1, 32).T)
    assert np.allclose(weights_ref(x, None, 32, False), np.abs(wide).reshape(-1, 32).T + rms)
    expected = importance * np.sqrt(2 * (wide**2).mean(1, keepdims=True) + wide**2)
    for even in (False, True):
        assert np.allclose(weights_ref(x, importance, 32, even), expected.reshape(-1, 32).T)
    assert np.array_equal(columns_ref(x, 32)[:, 9], x[1, 32:64])
    assert np.allclose(sum_ref(x), wide.sum(0), atol=1e-5)
