"""Check and time the three products of a linear layer, with NumPy's times from processes of their own.

NumPy's thread pool and ours disturb each other inside one process: idle threads spin.  So NumPy is timed in a child,
once before our products and once after them.
"""

import json
import os
import subprocess
import sys

import numpy as np
from _bench import Bench

from abi_py.kernels.unchecked import product, product_ref

# (N, M, K): x Wᵀ of N rows, K inputs, M outputs
SHAPES = [(2048, 1536, 512), (2048, 512, 1536), (2048, 1536, 1536), (512, 512, 512), (64, 192, 64), (1, 1536, 512)]

CHILD = """
import json, sys, time
import numpy as np
rng = np.random.default_rng(0)
times = []
for n, m, k in json.loads(sys.argv[1]):
    x, w = rng.standard_normal((n, k), dtype=np.float32), rng.standard_normal((m, k), dtype=np.float32)
    y = np.empty((n, m), np.float32)
    np.matmul(x, w.T, out=y)
    repeats, samples = max(1, int(2e6 / (n * m * k) * 100)), []
    for _ in range(20):
        start = time.perf_counter()
        for _ in range(repeats):
            np.matmul(x, w.T, out=y)
        samples.append((time.perf_counter() - start) / repeats)
    times.append(sorted(samples)[10])
print(json.dumps(times))
"""


def numpy_seconds(threads):
    """Return the median seconds of NumPy's x Wᵀ for each shape, measured in a process without Numba."""
    environment = os.environ | {f"{name}_NUM_THREADS": str(threads) for name in ("OPENBLAS", "MKL", "OMP")}
    command = [sys.executable, "-c", CHILD, json.dumps(SHAPES)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


bench = Bench("matmul", "Products of a linear layer: y = x Wᵀ, dx = dy W, dw = dyᵀ x")
rng = np.random.default_rng(0)
with bench.beside(numpy_seconds) as compared:
    for n, m, k in SHAPES:
        x, w, dy = (rng.standard_normal(shape).astype(np.float32) for shape in ((n, k), (m, k), (n, m)))
        y, dx, dw = (np.empty(shape, np.float32) for shape in ((n, m), (n, k), (m, k)))
        product(y, x, w, transpose_b=True)
        product(dx, dy, w)
        product(dw, dy, x, transpose_a=True)
        wide_x, wide_w, wide_dy = (a.astype(np.float64) for a in (x, w, dy))
        name = f"{n}x{m}x{k}"
        bench.check(f"y  {name}", y, product_ref(wide_x, wide_w, transpose_b=True), 1e-5)
        bench.check(f"dx {name}", dx, product_ref(wide_dy, wide_w), 1e-5)
        bench.check(f"dw {name}", dw, product_ref(wide_dy, wide_x, transpose_a=True), 1e-5)
        flops = 2 * n * m * k

        def y_product(y=y, x=x, w=w):
            product(y, x, w, transpose_b=True)

        def dx_product(dx=dx, dy=dy, w=w):
            product(dx, dy, w)

        def dw_product(dw=dw, dy=dy, x=x):
            product(dw, dy, x, transpose_a=True)

        compared.append(bench.time(f"y  {name}", y_product, flops=flops))
        bench.time(f"dx {name}", dx_product, flops=flops)
        bench.time(f"dw {name}", dw_product, flops=flops)
bench.finish()
