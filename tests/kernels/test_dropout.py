"""Dropout: the three nails, the mask itself, threads and NaN."""

import numpy as np
import pytest

from abi_py.gradcheck import check_close, check_gradient
from abi_py.kernels.dropout import (
    dropout_backward,
    dropout_backward_ref,
    dropout_forward,
    dropout_forward_ref,
    dropout_mask_ref,
)

SHAPES = [(1, 1), (3, 5), (17, 31), (67, 131)]
SEED = 987654321


@pytest.mark.parametrize("shape", SHAPES)
def test_derivation(rng, shape):
    x, dy = rng.standard_normal((2, *shape))
    rate = 0.0 if shape == (1, 1) else 0.4  # a single element may be dropped: then there is nothing to measure
    check_gradient(
        lambda x: (dropout_forward_ref(x, rate, SEED) * dy).sum(), x, dropout_backward_ref(dy, rate, SEED), rng
    )


def test_definition(golden):
    g = golden("dropout")
    rate, seed = float(g["rate"]), int(g["seed"])
    assert np.array_equal(dropout_mask_ref(g["x"].shape, rate, seed), g["mask"])  # a mask must never change
    check_close(dropout_forward_ref(g["x"], rate, seed), g["y"], 1e-10)
    check_close(dropout_backward_ref(g["dy"], rate, seed), g["dx"], 1e-10)


@pytest.mark.parametrize("rate", [0.0, 0.1, 0.5, 0.999])
@pytest.mark.parametrize("shape", SHAPES)
def test_kernels_equal_the_reference(rng, shape, rate):
    x, dy = rng.standard_normal((2, *shape)).astype(np.float32)
    y, dx = np.full_like(x, np.nan), np.full_like(x, np.nan)  # overwritten
    dropout_forward(y, x, rate, SEED)
    dropout_backward(dx, dy, rate, SEED)
    check_close(y, dropout_forward_ref(x.astype(np.float64), rate, SEED), 1e-5)
    check_close(dx, dropout_backward_ref(dy.astype(np.float64), rate, SEED), 1e-4)


def test_output_may_be_the_input(rng):
    x = rng.standard_normal((17, 31)).astype(np.float32)
    y = x.copy()
    dropout_forward(y, y, 0.5, SEED)
    check_close(y, dropout_forward_ref(x, 0.5, SEED), 1e-6)


@pytest.mark.parametrize("rate", [0.1, 0.5, 0.9])
def test_mask_looks_random(rate):
    N, C = 503, 499
    one = dropout_mask_ref((N, C), rate, SEED).astype(np.float64)
    two = dropout_mask_ref((N, C), rate, SEED + 1).astype(np.float64)
    sigma = np.sqrt(rate * (1 - rate))
    assert abs(one.mean() - (1 - rate)) < 4 * sigma / np.sqrt(one.size)
    assert abs(one.mean(0) - (1 - rate)).max() < 5 * sigma / np.sqrt(N)
    assert abs(one.mean(1) - (1 - rate)).max() < 5 * sigma / np.sqrt(C)
    a, b = (one - one.mean()) / sigma, (two - two.mean()) / sigma
    limit = 4 / np.sqrt(one.size)
    assert abs((a * b).mean()) < limit  # another seed, another mask
    assert abs((a[:, 1:] * a[:, :-1]).mean()) < limit  # neighbours in a row
    assert abs((a[1:] * a[:-1]).mean()) < limit  # neighbours in a column
    assert abs((a[1:, :-1] * a[:-1, 1:]).mean()) < limit  # along a diagonal


def test_mask_of_a_row_does_not_depend_on_the_others():
    whole = dropout_mask_ref((9, 21), 0.5, SEED)
    assert np.array_equal(dropout_mask_ref((4, 13), 0.5, SEED), whole[:4, :13])


def test_same_bits_for_any_thread_count(rng, same_bits):
    x = rng.standard_normal((67, 131)).astype(np.float32)

    def run():
        y, dx = np.empty_like(x), np.empty_like(x)
        dropout_forward(y, x, 0.3, SEED)
        dropout_backward(dx, x, 0.3, SEED)
        return y, dx

    same_bits(run)


def test_nan_stays_nan_even_where_it_is_dropped():
    x = np.full((5, 8), np.nan, np.float32)
    for apply in (dropout_forward, dropout_backward):
        y = np.zeros_like(x)
        apply(y, x, 0.5, SEED)
        assert np.isnan(y).all()
