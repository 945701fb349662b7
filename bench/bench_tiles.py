"""Check and time the register tile on panels in cache, on one thread: float32 and pairs of bfloat16."""

import numpy as np
from _bench import Bench
from numba import njit

from abi_py.kernels.panels import COLUMNS, ROWS
from abi_py.kernels.simd import describe
from abi_py.kernels.tiles import FLOAT32, METHODS, tile

DEPTH, TIMES = 256, 100


@njit
def tiles(c, a, b, depth, times, numbers):
    """Add one product of two panels to c, `times` times."""
    for _ in range(times):
        tile(c, c, 0, 0, ROWS, COLUMNS, a, 0, b, 0, depth, True, numbers)


bench = Bench("tiles", f"One register tile; one thread: {describe()}")
rng = np.random.default_rng(0)
a, b = rng.standard_normal((DEPTH, ROWS), dtype=np.float32), rng.standard_normal((DEPTH, COLUMNS), dtype=np.float32)
ways = {"tile": FLOAT32} | {f"tile bf16 by {name}": numbers for name, numbers in METHODS.items()}
for name, numbers in ways.items():
    c = np.zeros((ROWS, COLUMNS), np.float32)
    tiles(c, a.ravel(), b.ravel(), DEPTH, 1, numbers.table)
    if numbers is FLOAT32:
        bench.check(name, c, a.T.astype(np.float64) @ b.astype(np.float64), 1e-5)
    flops = 2 * ROWS * COLUMNS * DEPTH * TIMES * numbers.fold
    arguments = c, a.ravel(), b.ravel(), DEPTH, TIMES, numbers.table
    bench.time(f"{name}, {TIMES} times", lambda arguments=arguments: tiles(*arguments), flops=flops)
bench.finish()
