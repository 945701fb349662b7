"""Vectors: exp over the whole range, largest, and soften.

What is expected is here in NumPy: one run checks the compiled operations, one with NUMBA_DISABLE_JIT=1 their twins.
"""

import numpy as np
import pytest
from numba import njit

from abi_py.kernels.engine import vectors
from abi_py.kernels.engine.jit import JIT
from abi_py.kernels.engine.simd import LANES
from abi_py.kernels.engine.vectors import exp, largest, soften, total

SAMPLES = 1_000_000 if JIT else 2_000


@njit
def exp_of_each(y, x):
    for i in range(x.size):
        y[i] = exp(x[i])


@njit
def largest_of(x):
    return largest(x)


def exps(x):
    x = np.asarray(x, np.float32)
    y = np.full_like(x, np.nan)
    exp_of_each(y, x)
    return y


# -- exp -----------------------------------------------------------------------------------------


def test_exp_error_bound(rng):
    spread = rng.uniform(-87.3, 88.7, SAMPLES)
    positive = rng.integers(0, 2**31 - 2**24, SAMPLES).astype(np.int32).view(np.float32)  # of every size
    sizes = np.concatenate([positive, -positive])
    x = np.concatenate([spread, sizes[np.abs(sizes) < 87.3]]).astype(np.float32)
    y, expected = exps(x).astype(np.float64), np.exp(x.astype(np.float64))
    assert np.abs(y / expected - 1).max() < 2e-7


def test_exp_around_every_reduction_step():
    """x = n ln 2 + r: the largest r, and so the largest error, is half way between multiples of ln 2."""
    middle = (np.arange(-125, 128) + 0.5) * np.log(2)
    x = (middle[:, None] + np.linspace(-1e-4, 1e-4, 41)).ravel().astype(np.float32)
    x = x[(x > -87.3) & (x < 88.7)]
    assert np.abs(exps(x) / np.exp(x.astype(np.float64)) - 1).max() < 2e-7


def test_exp_at_both_ends():
    """The last 2000 floats inside, and the first one beyond, on each side."""
    steps = np.arange(2000, dtype=np.int32)
    ends = vectors._EXP_LOW, vectors._EXP_HIGH
    x = np.concatenate([(end.view(np.int32) - steps).view(np.float32) for end in ends])
    assert np.abs(exps(x) / np.exp(x.astype(np.float64)) - 1).max() < 2e-7
    beyond = np.nextafter(np.float32(ends), np.float32([-np.inf, np.inf]))
    assert exps(beyond).tolist() == [0, np.inf]


def test_exp_of_special_values():
    inf, nan = np.inf, np.nan
    x = [0.0, -0.0, inf, -inf, nan, -nan, 88.73, 1e30, -87.4, -1e30, 3e-45, -3e-45]
    y = exps(x)
    assert np.array_equal(y, np.float32([1, 1, inf, 0, nan, nan, inf, inf, 0, 0, 1, 1]), equal_nan=True)
    edge = exps([88.72, 88.72283, -87.33])
    assert np.isfinite(edge).all()
    assert (edge > 0).all()


def test_exp_never_falls():
    x = np.linspace(-90, 90, SAMPLES // 4, dtype=np.float32)
    y = exps(x)[1:].astype(np.float64)
    before = exps(x)[:-1].astype(np.float64)
    finite = np.isfinite(y)
    assert (y[finite] >= before[finite] * (1 - 2.4e-7)).all()  # never by more than the error bound


def test_exp_has_the_same_bits_in_vectors_and_alone(rng):
    x = rng.uniform(-100, 100, 5 * LANES + 3).astype(np.float32)
    together = exps(x)
    alone = np.concatenate([exps(x[i : i + 1]) for i in range(x.size)])
    assert together.tobytes() == alone.tobytes()


# -- largest -------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 2, LANES - 1, LANES, LANES + 1, 3 * LANES + 5])
def test_largest(rng, size):
    x = -1 - np.abs(rng.standard_normal(size + 1)).astype(np.float32)  # all negative: a zero that creeps in would win
    for at in range(size):
        y = x[1:].copy()
        y[at] = -0.5
        assert largest_of(y) == np.float32(-0.5)
    assert largest_of(x[1:]) == x[1:].max()  # not aligned


def test_largest_of_special_values():
    inf, nan = np.float32(np.inf), np.float32(np.nan)
    assert largest_of(np.empty(0, np.float32)) == -inf
    assert largest_of(np.full(LANES + 1, nan)) == -inf
    assert largest_of(np.full(LANES + 1, -inf)) == -inf
    x = np.arange(2 * LANES + 1, dtype=np.float32)
    x[::3] = nan
    assert largest_of(x) == np.nanmax(x)
    x[1] = inf
    assert largest_of(x) == inf


# -- soften --------------------------------------------------------------------------------------


@njit
def soften_it(x, m):
    return soften(x, m)


@njit
def total_of(x):
    return total(x)


@pytest.mark.parametrize("size", [0, 1, LANES - 1, LANES, LANES + 1, 3 * LANES + 5])
def test_soften_has_the_bits_of_exp_and_total(rng, size):
    whole = rng.standard_normal(size + 2).astype(np.float32)
    x = whole[1:-1]  # not aligned, and with neighbours that must stay as they are
    m, ends, y = np.float32(1.5), whole[[0, -1]].copy(), exps(x - np.float32(1.5))
    expected = total_of(x.copy()), total_of(y)
    assert soften_it(x, m) == expected
    assert x.tobytes() == y.tobytes()
    assert np.array_equal(whole[[0, -1]], ends)


def test_soften_of_special_values():
    inf = np.float32(np.inf)
    for bad in (np.float32(np.nan), inf):
        x = np.zeros(LANES + 1, np.float32)
        x[-1] = bad
        assert np.isnan(soften_it(x, max(bad, np.float32(0)))[1])
    x = np.array([-inf, 0], np.float32)  # what is left out
    assert soften_it(x, np.float32(0)) == (-inf, 1)
    assert x.tolist() == [0, 1]
