"""Check and time the bias of a linear layer: added to an output, and its gradient."""

import numpy as np
from _bench import Bench

from abi_py.kernels.unchecked import bias_backward, bias_backward_ref, bias_forward, bias_forward_ref

N, C = 2048, 512

rng = np.random.default_rng(0)
bench = Bench("bias", f"bias of {N} rows, width {C}")
y, dy = rng.standard_normal((2, N, C)).astype(np.float32)
b, db = rng.standard_normal(C).astype(np.float32), np.zeros(C, np.float32)
out = y.copy()
bias_forward(out, b)
bias_backward(db, dy)
bench.check("forward", out, bias_forward_ref(y.astype(np.float64), b), 1e-5)
bench.check("backward", db, bias_backward_ref(dy.astype(np.float64)), 1e-4)
bench.time("forward", lambda: bias_forward(out, b), bytes_moved=8 * N * C, numpy=lambda: np.add(out, b, out=out))
bench.time("backward", lambda: bias_backward(db, dy), bytes_moved=4 * N * C, numpy=lambda: dy.sum(0))
bench.finish()
