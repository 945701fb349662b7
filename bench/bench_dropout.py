"""Check and time dropout."""

import numpy as np
from _bench import Bench

from abi_py.kernels.unchecked import dropout_backward, dropout_backward_ref, dropout_forward, dropout_forward_ref

N, C, RATE, SEED = 2048, 512, 0.1, 42

rng = np.random.default_rng(0)
bench = Bench("dropout", f"Dropout of {RATE} on {N} rows, width {C}")
x, dy = rng.standard_normal((2, N, C)).astype(np.float32)
y, dx = np.empty_like(x), np.empty_like(x)
dropout_forward(y, x, RATE, SEED)
dropout_backward(dx, dy, RATE, SEED)
bench.check("forward", y, dropout_forward_ref(x.astype(np.float64), RATE, SEED), 1e-5)
bench.check("backward", dx, dropout_backward_ref(dy.astype(np.float64), RATE, SEED), 1e-4)
bench.time(
    "forward",
    lambda: dropout_forward(y, x, RATE, SEED),
    bytes_moved=8 * N * C,
    numpy=lambda: dropout_forward_ref(x, RATE, SEED),
)
bench.time(
    "backward",
    lambda: dropout_backward(dx, dy, RATE, SEED),
    bytes_moved=8 * N * C,
    numpy=lambda: dropout_backward_ref(dy, RATE, SEED),
)
bench.finish()
