"""Check and time LayerNorm, forward, backward, and backward that adds to the residual branch's gradient."""

import numpy as np
from _bench import Bench

from abi_py.kernels.unchecked import (
    layer_norm_backward,
    layer_norm_backward_ref,
    layer_norm_forward,
    layer_norm_forward_ref,
)

N, C, EPS = 2048, 512, 1e-5

rng = np.random.default_rng(0)
bench = Bench("layer_norm", f"LayerNorm of {N} rows, width {C}")
x, dy = rng.standard_normal((2, N, C)).astype(np.float32)
w, b = rng.standard_normal((2, C)).astype(np.float32)
y, r, dx, dw, db = np.empty_like(x), np.empty(N, np.float32), np.empty_like(x), np.zeros_like(w), np.zeros_like(b)
layer_norm_forward(y, r, x, w, b, EPS)
layer_norm_backward(dx, dw, db, dy, x, w, r, False)
wide = [a.astype(np.float64) for a in (x, w, b, dy)]
y_ref, r_ref = layer_norm_forward_ref(*wide[:3], EPS)
dx_ref, dw_ref, db_ref = layer_norm_backward_ref(wide[3], wide[0], wide[1], r_ref)
bench.check("forward", y, y_ref, 1e-5)
bench.check("backward dx", dx, dx_ref, 1e-4)
bench.check("backward dw", dw, dw_ref, 1e-4)
bench.check("backward db", db, db_ref, 1e-4)
bench.time(
    "forward",
    lambda: layer_norm_forward(y, r, x, w, b, EPS),
    bytes_moved=8 * N * C,
    numpy=lambda: layer_norm_forward_ref(x, w, b, EPS),
)
bench.time(
    "backward",
    lambda: layer_norm_backward(dx, dw, db, dy, x, w, r, False),
    bytes_moved=12 * N * C,
    numpy=lambda: layer_norm_backward_ref(dy, x, w, r),
)
total = np.zeros_like(dx)
bench.time(
    "backward, adding",
    lambda: layer_norm_backward(total, dw, db, dy, x, w, r, True),
    bytes_moved=16 * N * C,
    numpy=lambda: np.add(total, layer_norm_backward_ref(dy, x, w, r)[0], out=total),
)
bench.finish()
