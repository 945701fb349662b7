"""RMSNorm: the three nails, accumulation, extreme sizes, threads and NaN."""

import numpy as np
import pytest

from abi_py.gradcheck import check_close, check_gradient
from abi_py.kernels.rms_norm import (
    rms_norm_backward,
    rms_norm_backward_ref,
    rms_norm_forward,
    rms_norm_forward_ref,
    rms_norm_in_place,
)

EPS = 1e-5
SHAPES = [(1, 1), (3, 5), (17, 31), (131, 67)]


def inputs(rng, shape, dtype=np.float32):
    x, dy = rng.standard_normal(shape).astype(dtype), rng.standard_normal(shape).astype(dtype)
    return x, (1 + 0.3 * rng.standard_normal(shape[1])).astype(dtype), dy


def run_kernels(x, w, dy, dx, dw, accumulate):
    y, r = np.full_like(x, np.nan), np.full(len(x), np.nan, np.float32)  # overwritten
    rms_norm_forward(y, r, x, w, EPS)
    rms_norm_backward(dx, dw, dy, x, w, r, accumulate)
    return y, r, dx, dw


@pytest.mark.parametrize("shape", SHAPES)
def test_derivation(rng, shape):
    x, w, dy = inputs(rng, shape, np.float64)
    _, r = rms_norm_forward_ref(x, w, EPS)
    dx, dw = rms_norm_backward_ref(dy, x, w, r)
    if shape != (1, 1):  # there dx is eps times something: nothing to measure against, see the test below
        check_gradient(lambda x: (rms_norm_forward_ref(x, w, EPS)[0] * dy).sum(), x, dx, rng)
    check_gradient(lambda w: (rms_norm_forward_ref(x, w, EPS)[0] * dy).sum(), w, dw, rng)


def test_derivation_with_a_large_eps(rng):
    x, w, dy = inputs(rng, (1, 1), np.float64)
    _, r = rms_norm_forward_ref(x, w, 0.5)
    dx, _ = rms_norm_backward_ref(dy, x, w, r)
    check_gradient(lambda x: (rms_norm_forward_ref(x, w, 0.5)[0] * dy).sum(), x, dx, rng)


def test_definition(golden):
    g = golden("rms_norm")
    y, r = rms_norm_forward_ref(g["x"], g["w"], g["eps"])
    dx, dw = rms_norm_backward_ref(g["dy"], g["x"], g["w"], r)
    check_close(y, g["y"], 1e-10)
    check_close(dx, g["dx"], 1e-10)
    check_close(dw, g["dw"], 1e-10)


@pytest.mark.parametrize("accumulate", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_kernels_equal_the_reference(rng, shape, accumulate):
    x, w, dy = inputs(rng, shape)
    dx_before = rng.standard_normal(shape).astype(np.float32)
    dw_before = rng.standard_normal(shape[1]).astype(np.float32)
    dx = dx_before.copy() if accumulate else np.full_like(x, np.nan)
    y, r, dx, dw = run_kernels(x, w, dy, dx, dw_before.copy(), accumulate)

    wide = [a.astype(np.float64) for a in (x, w, dy)]
    y_ref, r_ref = rms_norm_forward_ref(wide[0], wide[1], EPS)
    dx_ref, dw_ref = rms_norm_backward_ref(wide[2], wide[0], wide[1], r_ref)
    check_close(y, y_ref, 1e-5)
    check_close(r, r_ref, 1e-5)
    scale = max(1.0, np.abs(dx_ref).max())  # for shape (1, 1) dx_ref is all but zero: the terms of order 1 cancel
    assert np.abs(dx - (dx_ref + dx_before * accumulate)).max() <= 1e-4 * scale
    check_close(dw, dw_ref + dw_before, 1e-4)


@pytest.mark.parametrize(("rows", "heads", "width"), [(1, 2, 1), (3, 5, 7), (19, 3, 34)])
def test_heads_of_a_row_are_rows_of_their_own(rng, rows, heads, width):
    """Columns of a wider array, as q and k are; in place, as attention does it."""
    x, w, dy = inputs(rng, (rows * heads, width))
    y, r, dx, dw = run_kernels(x, w, dy, np.empty_like(x), np.zeros_like(w), False)
    wide, r_heads = rng.standard_normal((2, rows, heads * width + 3)).astype(np.float32), np.empty_like(r)
    (values, gradients), beside = wide[:, :, 2:-1], wide[:, :, [0, 1, -1]].copy()
    kept = values[...] = x.reshape(rows, -1)
    gradients[...] = dy.reshape(rows, -1)
    rms_norm_forward(values, r_heads, values, w, EPS)
    assert np.array_equal(values, y.reshape(rows, -1))
    assert np.array_equal(r_heads, r)
    dw_heads = np.zeros_like(w)
    rms_norm_backward(gradients, dw_heads, gradients, kept, w, r_heads, False)
    assert np.array_equal(gradients, dx.reshape(rows, -1))
    check_close(dw_heads, dw, 1e-5)  # other slices of rows
    again, before, r_again = values.copy(), np.full_like(kept, np.nan), np.empty_like(r)
    again[...] = kept
    rms_norm_in_place(again, before, r_again, w, EPS)
    assert np.array_equal(before, kept)
    assert again.tobytes() == values.tobytes()
    assert r_again.tobytes() == r.tobytes()
    assert np.array_equal(wide[:, :, [0, 1, -1]], beside)


def test_large_and_small_rows_do_not_overflow_or_vanish():
    x = np.array([[1e30, -1e30], [1e-30, 1e-30], [0, 0]], np.float32)
    y, r = np.empty_like(x), np.empty(3, np.float32)
    rms_norm_forward(y, r, x, np.ones(2, np.float32), EPS)
    check_close(y[0], np.array([1.0, -1.0]), 1e-6)
    check_close(r[1:], np.full(2, EPS**-0.5), 1e-6)
    assert not y[2].any()


def test_same_bits_for_any_thread_count(rng, same_bits):
    x, w, dy = inputs(rng, (131, 67))
    same_bits(lambda: run_kernels(x, w, dy, np.ones_like(x), np.ones_like(w), True))
    same_bits(lambda: run_kernels(x, w, dy, np.empty_like(x), np.ones_like(w), False))


def test_nan_stays_in_its_row(rng):
    x, w, dy = inputs(rng, (3, 5))
    x[1, 2] = np.nan
    with np.errstate(invalid="ignore"):
        y, r, dx, dw = run_kernels(x, w, dy, np.empty_like(x), np.zeros_like(w), False)
    for a in (y, r[:, None], dx):
        assert np.isnan(a[1]).all()
        assert np.isfinite(a[[0, 2]]).all()
    assert np.isnan(dw).all()
