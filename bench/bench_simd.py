"""Check and time e^x and the maximum, on one thread and in first-level cache."""

import numpy as np
from _bench import Bench
from numba import njit

from abi_py.kernels.engine.simd import describe
from abi_py.kernels.engine.vectors import exp, largest

SIZE = 4096  # floats: 16 KiB in, 16 KiB out


@njit
def exp_of_each(y, x):
    """y = e^x."""
    for i in range(x.size):
        y[i] = exp(x[i])


@njit
def largest_of(x):
    """Return the largest element."""
    return largest(x)


bench = Bench("simd", f"Vector operations on {SIZE} floats, one thread: {describe()}")
x = np.random.default_rng(0).uniform(-20, 0, SIZE).astype(np.float32)
y = np.empty_like(x)
exp_of_each(y, x)
bench.check("exp", y / np.exp(x.astype(np.float64)), np.ones(SIZE), 2e-7)
bench.check("largest", largest_of(x), x.max(), 0)
bench.time("exp", lambda: exp_of_each(y, x), bytes_moved=8 * SIZE, numpy=lambda: np.exp(x, out=y))
bench.time("largest", lambda: largest_of(x), bytes_moved=4 * SIZE, numpy=lambda: x.max())
bench.finish()
