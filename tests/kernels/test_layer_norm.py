"""LayerNorm: the three nails, accumulation, extreme sizes, threads and NaN."""

import numpy as np
import pytest

from abi_py.gradcheck import check_close, check_gradient
from abi_py.kernels.layer_norm import (
    layer_norm_backward,
    layer_norm_backward_ref,
    layer_norm_forward,
    layer_norm_forward_ref,
)

EPS = 1e-5
SHAPES = [(1, 2), (3, 5), (17, 31), (131, 67)]


def inputs(rng, shape, dtype=np.float32):
    """Return x, which is not around 0, w, b and dy."""
    x, dy = 2 + rng.standard_normal(shape), rng.standard_normal(shape)
    w, b = 1 + 0.3 * rng.standard_normal(shape[1]), rng.standard_normal(shape[1])
    return tuple(a.astype(dtype) for a in (x, w, b, dy))


def run_kernels(x, w, b, dy, dx, dw, db, accumulate):
    y, r = np.full_like(x, np.nan), np.full(len(x), np.nan, np.float32)  # overwritten
    layer_norm_forward(y, r, x, w, b, EPS)
    layer_norm_backward(dx, dw, db, dy, x, w, r, accumulate)
    return y, r, dx, dw, db


@pytest.mark.parametrize("shape", [*SHAPES[1:], (1, 1)])
def test_derivation(rng, shape):
    x, w, b, dy = inputs(rng, shape, np.float64)
    y, r = layer_norm_forward_ref(x, w, b, EPS)
    dx, dw, db = layer_norm_backward_ref(dy, x, w, r)
    if shape == (1, 1):  # x less its mean is 0, whatever x is
        assert (y[0], dx[0, 0], dw[0]) == (b, 0, 0)
    else:
        check_gradient(lambda x: (layer_norm_forward_ref(x, w, b, EPS)[0] * dy).sum(), x, dx, rng)
        check_gradient(lambda w: (layer_norm_forward_ref(x, w, b, EPS)[0] * dy).sum(), w, dw, rng)
    check_gradient(lambda b: (layer_norm_forward_ref(x, w, b, EPS)[0] * dy).sum(), b, db, rng)


def test_definition(golden):
    g = golden("layer_norm")
    y, r = layer_norm_forward_ref(g["x"], g["w"], g["b"], g["eps"])
    dx, dw, db = layer_norm_backward_ref(g["dy"], g["x"], g["w"], r)
    for name, value in {"y": y, "dx": dx, "dw": dw, "db": db}.items():
        check_close(value, g[name], 1e-10)


@pytest.mark.parametrize("accumulate", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_kernels_equal_the_reference(rng, shape, accumulate):
    x, w, b, dy = inputs(rng, shape)
    dx_before, dw_before, db_before = (rng.standard_normal(a.shape).astype(np.float32) for a in (x, w, b))
    dx = dx_before.copy() if accumulate else np.full_like(x, np.nan)
    y, r, dx, dw, db = run_kernels(x, w, b, dy, dx, dw_before.copy(), db_before.copy(), accumulate)

    wide = [a.astype(np.float64) for a in (x, w, b, dy)]
    y_ref, r_ref = layer_norm_forward_ref(*wide[:3], EPS)
    dx_ref, dw_ref, db_ref = layer_norm_backward_ref(wide[3], wide[0], wide[1], r_ref)
    check_close(y, y_ref, 1e-5)
    check_close(r, r_ref, 1e-5)
    scale = max(1.0, np.abs(dx_ref).max())  # of two columns dx_ref is all but zero: the terms of order 1 cancel
    assert np.abs(dx - (dx_ref + dx_before * accumulate)).max() <= 1e-4 * scale
    check_close(dw, dw_ref + dw_before, 1e-4)
    check_close(db, db_ref + db_before, 1e-4)


def test_rows_far_from_zero_large_and_equal():
    """The variance of numbers around 1000 is right to the last digits; equal numbers give b."""
    x = np.array([[1000, 1001, 1002, 1003], [1e18, -1e18, 1e18, -1e18], [7, 7, 7, 7], [0, 0, 0, 0]], np.float32)
    y, r = np.empty_like(x), np.empty(4, np.float32)
    b = np.full(4, 0.25, np.float32)
    layer_norm_forward(y, r, x, np.ones(4, np.float32), b, EPS)
    check_close(y, layer_norm_forward_ref(x.astype(np.float64), 1.0, b.astype(np.float64), EPS)[0], 1e-6)
    assert (y[2:] == b).all()


def test_same_bits_for_any_thread_count(rng, same_bits):
    x, w, b, dy = inputs(rng, (131, 67))
    for accumulate in (False, True):
        same_bits(lambda: run_kernels(x, w, b, dy, np.ones_like(x), np.ones_like(w), np.ones_like(b), accumulate))  # noqa: B023


def test_nan_stays_in_its_row(rng):
    x, w, b, dy = inputs(rng, (3, 5))
    x[1, 2] = np.nan
    with np.errstate(invalid="ignore"):
        y, r, dx, dw, db = run_kernels(x, w, b, dy, np.empty_like(x), np.zeros_like(w), np.zeros_like(b), False)
    for a in (y, r[:, None], dx):
        assert np.isnan(a[1]).all()
        assert np.isfinite(a[[0, 2]]).all()
    assert np.isnan(dw).all()
    assert np.isfinite(db).all()
