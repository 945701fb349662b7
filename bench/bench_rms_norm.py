"""Check and time RMSNorm, forward, backward, and backward that adds to the residual branch's gradient."""

import numpy as np
from _bench import Bench

from abi_py.kernels.unchecked import (
    rms_norm_backward,
    rms_norm_backward_ref,
    rms_norm_forward,
    rms_norm_forward_ref,
)

N, C, EPS = 2048, 512, 1e-5

rng = np.random.default_rng(0)
bench = Bench("rms_norm", f"RMSNorm of {N} rows, width {C}")
x, dy = rng.standard_normal((2, N, C)).astype(np.float32)
w = rng.standard_normal(C).astype(np.float32)
y, r, dx, dw = np.empty_like(x), np.empty(N, np.float32), np.empty_like(x), np.zeros_like(w)
rms_norm_forward(y, r, x, w, EPS)
rms_norm_backward(dx, dw, dy, x, w, r, False)
wide = [a.astype(np.float64) for a in (x, w, dy)]
y_ref, r_ref = rms_norm_forward_ref(wide[0], wide[1], EPS)
dx_ref, dw_ref = rms_norm_backward_ref(wide[2], wide[0], wide[1], r_ref)
bench.check("forward", y, y_ref, 1e-5)
bench.check("backward dx", dx, dx_ref, 1e-4)
bench.check("backward dw", dw, dw_ref, 1e-4)
bench.time(
    "forward",
    lambda: rms_norm_forward(y, r, x, w, EPS),
    bytes_moved=8 * N * C,
    numpy=lambda: rms_norm_forward_ref(x, w, EPS),
)
bench.time(
    "backward",
    lambda: rms_norm_backward(dx, dw, dy, x, w, r, False),
    bytes_moved=12 * N * C,
    numpy=lambda: rms_norm_backward_ref(dy, x, w, r),
)
total = np.zeros_like(dx)
bench.time(
    "backward, adding",
    lambda: rms_norm_backward(total, dw, dy, x, w, r, True),
    bytes_moved=16 * N * C,
    numpy=lambda: np.add(total, rms_norm_backward_ref(dy, x, w, r)[0], out=total),
)
bench.finish()
