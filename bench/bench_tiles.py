"""Check and time the register tile on panels in cache, on one thread: float32 and each way of multiplying bfloat16."""

import numpy as np
from _bench import Bench
from numba import njit

from abi_py.kernels.engine.number_formats import FLOAT32, METHODS
from abi_py.kernels.engine.routines import COLUMNS, ROWS
from abi_py.kernels.engine.simd import describe
from abi_py.kernels.engine.tiles import begin, end, tile

DEPTH, TIMES = 256, 100


@njit
def tiles(c, a, b, depth, times, table):
    """Add one product of two panels to c, `times` times."""
    begin(table)
    for _ in range(times):
        tile(c, c, 0, 0, table[ROWS], table[COLUMNS], a, 0, b, 0, depth, True, table)
    end(table)


bench = Bench("tiles", f"One register tile; one thread: {describe()}")
rng = np.random.default_rng(0)
ways = {"tile": FLOAT32} | {f"tile bf16 by {name}": number_format for name, number_format in METHODS.items()}
for name, number_format in ways.items():
    rows, columns = number_format.rows, number_format.columns
    a, b = rng.standard_normal((DEPTH, rows), dtype=np.float32), rng.standard_normal((DEPTH, columns), dtype=np.float32)
    c = np.zeros((rows, columns), np.float32)
    tiles(c, a.ravel(), b.ravel(), DEPTH, 1, number_format.table)
    if number_format is FLOAT32:
        bench.check(name, c, a.T.astype(np.float64) @ b.astype(np.float64), 1e-5)
    flops = 2 * rows * columns * DEPTH * TIMES * number_format.fold
    arguments = c, a.ravel(), b.ravel(), DEPTH, TIMES, number_format.table
    bench.time(f"{name}, {TIMES} times", lambda arguments=arguments: tiles(*arguments), flops=flops)
bench.finish()
