"""The checker is checked: a right gradient passes, and one that is 0.1 % off, anywhere, fails."""

import numpy as np
import pytest

from abi_py.gradcheck import check_close, check_gradient, gradient_error, relative_error


def f(x):
    return float((np.sin(x) * np.exp(0.1 * x)).sum())


def gradient(x):
    return (np.cos(x) + 0.1 * np.sin(x)) * np.exp(0.1 * x)


@pytest.mark.parametrize("shape", [(1,), (3, 5), (37, 41)])
def test_right_gradient_passes(rng, shape):
    x = rng.standard_normal(shape)
    check_gradient(f, x, gradient(x), rng)


@pytest.mark.parametrize("shape", [(1,), (3, 5), (37, 41)])
@pytest.mark.parametrize("factor", [1.001, 0.999, -1.0])
def test_gradient_with_a_wrong_factor_fails(rng, shape, factor):
    x = rng.standard_normal(shape)
    with pytest.raises(AssertionError, match="gradient is off"):
        check_gradient(f, x, factor * gradient(x), rng)


def test_one_wrong_element_among_many_fails(rng):
    x = rng.standard_normal((37, 41))
    dx = gradient(x)
    largest = np.unravel_index(np.abs(dx).argmax(), dx.shape)
    dx[largest] *= 1.001
    with pytest.raises(AssertionError, match="gradient is off"):
        check_gradient(f, x, dx, rng)


@pytest.mark.parametrize("bad", [0.0, np.nan, np.inf])
def test_lost_or_broken_gradient_fails(rng, bad):
    x = rng.standard_normal((3, 5))
    dx = gradient(x)
    dx[1, 2] = bad
    with np.errstate(invalid="ignore"), pytest.raises(AssertionError, match="gradient is off"):
        check_gradient(f, x, dx, rng)


def test_error_is_the_size_of_the_fault(rng):
    x = rng.standard_normal((37, 41))
    assert 1e-5 < gradient_error(f, x, 1.001 * gradient(x), rng) < 1e-2


def test_single_precision_and_wrong_shapes_are_refused(rng):
    x = rng.standard_normal((3, 5))
    with pytest.raises(ValueError, match="float64"):
        gradient_error(f, x.astype(np.float32), gradient(x), rng)
    with pytest.raises(ValueError, match="shape"):
        gradient_error(f, x, gradient(x)[0], rng)


def test_a_third_derivative_is_no_fault(rng):
    """The length of a short vector, which a norm divides by: its third derivative is a million times the first."""
    x = 1e-3 * rng.standard_normal(5)
    check_gradient(lambda x: float(np.sqrt((x * x).sum())), x, x / np.linalg.norm(x), rng, 1e-8)


def test_close_arrays():
    a = np.array([1.0, -2.0, 1000.0])
    check_close(a + 1e-3, a, 1.1e-6)
    with pytest.raises(AssertionError, match="arrays differ"):
        check_close(a + 1e-3, a, 0.9e-6)
    assert relative_error(a[:2], a) == np.inf
    assert relative_error(np.array([1.0, np.nan, 1000.0]), a) == np.inf
    assert relative_error(np.zeros((0, 3)), np.zeros((0, 3))) == 0
