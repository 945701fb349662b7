"""Measure the machine's multiply-add peak with one thread and with all of them: the figure that shares are taken of."""

import numba
import numpy as np
from _bench import Bench

from abi_py.kernels.engine.number_formats import FLOAT32
from abi_py.kernels.engine.peak import DEPTH, _repeat_tile, measured_peak
from abi_py.kernels.engine.simd import describe

ROWS, COLUMNS, TIMES = FLOAT32.rows, FLOAT32.columns, 200

bench = Bench("peak", f"Multiply-add peak: {describe()}")
most = bench.header["threads"]
for threads in sorted({1, most}):
    numba.set_num_threads(threads)
    c = np.zeros((threads, ROWS, COLUMNS), np.float32)
    a, b = np.ones((threads, DEPTH * ROWS), np.float32), np.ones((threads, DEPTH * COLUMNS), np.float32)
    _repeat_tile(c, a, b, DEPTH, TIMES, FLOAT32.table)
    bench.check(f"{threads} threads", c, np.full(c.shape, DEPTH * TIMES), 1e-6)

    def work(c=c, a=a, b=b):
        _repeat_tile(c, a, b, DEPTH, TIMES, FLOAT32.table)

    bench.time(f"{threads} threads", work, flops=2 * threads * ROWS * COLUMNS * DEPTH * TIMES)
    print(f"best of many rounds: {measured_peak(0.5) / 1e9:.0f} GFLOP/s")
bench.finish()
