"""Measure the machine's multiply-add peak, the figure that shares are taken of, in float32 and by each way of bfloat16.

With one thread and with all of them.  What `abi_py` uses of bfloat16 is the last line.
"""

import numba
import numpy as np
from _bench import Bench

from abi_py.kernels.engine.number_formats import BFLOAT16, FLOAT32, METHODS
from abi_py.kernels.engine.peak import DEPTH, _repeat_tile, measured_peak
from abi_py.kernels.engine.simd import describe

TIMES = 200

bench = Bench("peak", f"Multiply-add peak: {describe()}")
most = bench.header["threads"]
for name, one in {"fp32": FLOAT32, **{f"bf16, {method}": one for method, one in METHODS.items()}}.items():
    for threads in sorted({1, most}):
        numba.set_num_threads(threads)
        c = np.zeros((threads, one.rows, one.columns), np.float32)
        a, b = np.ones((threads, DEPTH * one.rows), np.float32), np.ones((threads, DEPTH * one.columns), np.float32)
        _repeat_tile(c, a, b, DEPTH, TIMES, one.table)
        # A place that is 1.0 as a float32 is a pair of 0 and 1 in bfloat16.
        bench.check(f"{name}, {threads} threads", c, np.full(c.shape, DEPTH * TIMES), 1e-6)

        def work(c=c, a=a, b=b, table=one.table):
            _repeat_tile(c, a, b, DEPTH, TIMES, table)

        work_done = 2 * threads * one.rows * one.columns * DEPTH * one.fold * TIMES
        bench.time(f"{name}, {threads} threads", work, flops=work_done)
        print(f"best of many rounds: {measured_peak(0.5, one) / 1e9:.0f} GFLOP/s")
print(f"bfloat16 is multiplied by the method {BFLOAT16.method}")
bench.finish()
