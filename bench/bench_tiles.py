"""Check and time the register tile on panels in cache, on one thread: float32 and pairs of bfloat16."""

import numpy as np
from _bench import Bench
from numba import njit

from abi_py.kernels.engine.number_formats import FLOAT32, METHODS
from abi_py.kernels.engine.panels import COLUMNS, ROWS
from abi_py.kernels.engine.simd import describe
from abi_py.kernels.engine.tiles import tile

DEPTH, TIMES = 256, 100


@njit
def tiles(c, a, b, depth, times, table):
    """Add one product of two panels to c, `times` times."""
    for _ in range(times):
        tile(c, c, 0, 0, ROWS, COLUMNS, a, 0, b, 0, depth, True, table)


bench = Bench("tiles", f"One register tile; one thread: {describe()}")
rng = np.random.default_rng(0)
a, b = rng.standard_normal((DEPTH, ROWS), dtype=np.float32), rng.standard_normal((DEPTH, COLUMNS), dtype=np.float32)
ways = {"tile": FLOAT32} | {f"tile bf16 by {name}": number_format for name, number_format in METHODS.items()}
for name, number_format in ways.items():
    c = np.zeros((ROWS, COLUMNS), np.float32)
    tiles(c, a.ravel(), b.ravel(), DEPTH, 1, number_format.table)
    if number_format is FLOAT32:
        bench.check(name, c, a.T.astype(np.float64) @ b.astype(np.float64), 1e-5)
    flops = 2 * ROWS * COLUMNS * DEPTH * TIMES * number_format.fold
    arguments = c, a.ravel(), b.ravel(), DEPTH, TIMES, number_format.table
    bench.time(f"{name}, {TIMES} times", lambda arguments=arguments: tiles(*arguments), flops=flops)
bench.finish()
