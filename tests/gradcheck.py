"""Compare a hand-written gradient with central differences, and arrays with each other.

For a function f of an array x with the claimed gradient dx, and a random direction u,

    (f(x + h u) - f(x - h u)) / 2h   must be   sum(dx u)

in float64 with h = 1e-6: three directions see every element of dx, at the price of six calls of f.
"""

import numpy as np

STEP = 1e-6
DIRECTIONS = 3


def gradient_error(f, x, dx, rng):
    """Return the largest relative difference between dx and central differences of f at x, over random directions.

    f: function of an array like x that returns a number;  x, dx: float64 arrays of one shape;  rng: a Generator.
    A difference is measured against the length of dx, the size that sum(dx u) has on the average; NaN comes out as inf.
    """
    if x.dtype != np.float64 or dx.shape != x.shape:
        raise ValueError(f"x must be float64 and dx of its shape, got {x.dtype} {x.shape} and {dx.shape}")
    size = np.linalg.norm(dx)
    worst = 0.0
    for _ in range(DIRECTIONS):
        u = rng.standard_normal(x.shape)
        numeric = (f(x + STEP * u) - f(x - STEP * u)) / (2 * STEP)
        claimed = (dx * u).sum()
        error = abs(numeric - claimed) / max(size, abs(numeric), 1e-6)
        worst = max(worst, error if np.isfinite(error) else np.inf)
    return worst


def check_gradient(f, x, dx, rng, tolerance=1e-7):
    """Fail unless dx is the gradient of f at x (see `gradient_error`)."""
    error = gradient_error(f, x, dx, rng)
    assert error < tolerance, f"gradient is off by {error:.1e} (tolerance {tolerance:.0e})"


def relative_error(actual, expected):
    """Return the largest difference of two arrays, relative to the largest element of `expected`; inf for NaN."""
    actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    if actual.shape != expected.shape:
        return np.inf
    if expected.size == 0:
        return 0.0
    error = np.abs(actual - expected).max() / max(np.abs(expected).max(), np.finfo(np.float64).tiny)
    return error if np.isfinite(error) else np.inf


def check_close(actual, expected, tolerance):
    """Fail unless two arrays agree (see `relative_error`)."""
    error = relative_error(actual, expected)
    assert error <= tolerance, f"arrays differ by {error:.1e} (tolerance {tolerance:.0e})"
