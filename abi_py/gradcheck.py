"""The gradient checker: compare a hand-written gradient with central differences, and arrays with each other.

For a function f of an array x with the claimed gradient dx, and a random direction u,

    (8 (f(x + h u) - f(x - h u)) - (f(x + 2 h u) - f(x - 2 h u))) / 12 h   must be   sum(dx u)

in float64 with h = 1e-6: three directions see every element of dx, at the price of twelve calls of f.  The difference
over 2 h takes away what the third derivative adds to the one over h, which is not small where a norm divides by the
length of a short vector: the error falls with h⁴ (Fornberg 1988, table 1).

`gradient_error` and `relative_error` measure; `check_gradient` and `check_close` raise AssertionError, as
`numpy.testing` does.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = ["check_close", "check_gradient", "gradient_error", "relative_error"]

STEP = 1e-6  # h
DIRECTIONS = 3
TOLERANCE = 1e-7  # of a derivation in float64; right ones are off by some 1e-9


def gradient_error(
    f: Callable[[Any], float], x: np.ndarray, dx: np.ndarray, rng: np.random.Generator, directions: int = DIRECTIONS
) -> float:
    """Return the largest relative difference between dx and central differences of f at x, over random directions.

    f is a function of an array like x that returns a number; x and dx are float64 arrays of one shape (ValueError).
    A difference is measured against the length of dx, the size that sum(dx u) has on the average; NaN comes out as inf.
    """
    if x.dtype != np.float64 or dx.shape != x.shape:
        raise ValueError(f"x must be float64 and dx of its shape, got {x.dtype} {x.shape} and {dx.shape}")
    size, worst = float(np.linalg.norm(dx)), 0.0
    for _ in range(directions):
        u = rng.standard_normal(x.shape)
        one, two = (f(x + h * u) - f(x - h * u) for h in (STEP, 2 * STEP))
        numeric = (8 * one - two) / (12 * STEP)
        error = abs(numeric - float((dx * u).sum())) / max(size, abs(numeric), 1e-6)
        worst = max(worst, error if np.isfinite(error) else np.inf)
    return worst


def check_gradient(
    f: Callable[[Any], float],
    x: np.ndarray,
    dx: np.ndarray,
    rng: np.random.Generator,
    tolerance: float = TOLERANCE,
    name: str = "gradient",
) -> None:
    """Raise AssertionError unless dx is the gradient of f at x (see `gradient_error`)."""
    error = gradient_error(f, x, dx, rng)
    if not error < tolerance:
        raise AssertionError(f"{name} is off by {error:.1e} (tolerance {tolerance:.0e})")


def relative_error(actual: npt.ArrayLike, expected: npt.ArrayLike) -> float:
    """Return the largest difference of two arrays, relative to the largest element of `expected`.

    inf for NaN and for arrays of different shapes, 0 for empty ones.
    """
    a, b = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    if a.shape != b.shape:
        return np.inf
    if b.size == 0:
        return 0.0
    error = float(np.abs(a - b).max() / max(np.abs(b).max(), np.finfo(np.float64).tiny))
    return error if np.isfinite(error) else np.inf


def check_close(actual: npt.ArrayLike, expected: npt.ArrayLike, tolerance: float, name: str = "arrays") -> None:
    """Raise AssertionError unless two arrays agree (see `relative_error`)."""
    error = relative_error(actual, expected)
    if not error <= tolerance:
        raise AssertionError(f"{name} differ by {error:.1e} (tolerance {tolerance:.0e})")
