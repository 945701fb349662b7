"""Bias: the nails, accumulation, columns of a wider matrix, threads and NaN."""

import numpy as np
import pytest

from abi_py.gradcheck import check_close, check_gradient
from abi_py.kernels.bias import bias_backward, bias_backward_ref, bias_forward, bias_forward_ref
from abi_py.kernels.matmul import product

SHAPES = [(1, 1), (3, 5), (17, 31), (131, 67)]


def inputs(rng, shape, dtype=np.float32):
    y, dy = rng.standard_normal(shape).astype(dtype), rng.standard_normal(shape).astype(dtype)
    return y, rng.standard_normal(shape[1]).astype(dtype), dy


@pytest.mark.parametrize("shape", SHAPES)
def test_derivation(rng, shape):
    y, b, dy = inputs(rng, shape, np.float64)
    check_gradient(lambda b: (bias_forward_ref(y, b) * dy).sum(), b, bias_backward_ref(dy), rng)


@pytest.mark.parametrize("shape", SHAPES)
def test_kernels_equal_the_reference(rng, shape):
    y, b, dy = inputs(rng, shape)
    before = rng.standard_normal(shape[1]).astype(np.float32)
    expected, db = bias_forward_ref(y.astype(np.float64), b), before.copy()
    bias_forward(y, b)
    bias_backward(db, dy)
    check_close(y, expected, 1e-6)
    check_close(db, bias_backward_ref(dy.astype(np.float64)) + before, 1e-6)  # added to, and summed in float64


def test_columns_of_a_wider_matrix(rng):
    whole, b, _ = inputs(rng, (9, 12))
    expected, db, part = whole.copy(), np.zeros(5, np.float32), whole[:, 3:8]
    expected[:, 3:8] += b[:5]
    bias_backward(db, part)
    check_close(db, part.sum(0), 1e-6)
    bias_forward(part, b[:5])
    assert np.array_equal(whole, expected)  # and nothing beside the columns


def test_a_product_may_begin_with_a_bias(rng):
    x, w, b = (rng.standard_normal(shape).astype(np.float32) for shape in ((11, 7), (5, 7), 5))
    y, alone = np.empty((11, 5), np.float32), np.empty((11, 5), np.float32)
    product(y, x, w, transpose_b=True, addend=np.broadcast_to(b, y.shape))
    product(alone, x, w, transpose_b=True)
    bias_forward(alone, b)
    assert np.array_equal(y, alone)


def test_same_bits_for_any_thread_count(rng, same_bits):
    y, b, dy = inputs(rng, (131, 67))

    def run():
        out, db = y.copy(), np.ones_like(b)
        bias_forward(out, b)
        bias_backward(db, dy)
        return out, db

    same_bits(run)


def test_nan_stays_in_its_column(rng):
    y, b, dy = inputs(rng, (4, 3))
    dy[2, 1], b[0] = np.nan, np.nan
    db = np.zeros(3, np.float32)
    bias_backward(db, dy)
    bias_forward(y, b)
    assert np.isnan(db).tolist() == [False, True, False]
    assert np.isnan(y).all(0).tolist() == [True, False, False]
