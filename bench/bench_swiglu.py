"""Check and time SwiGLU."""

import numpy as np
from _bench import Bench

from abi_py.kernels.unchecked import swiglu_backward, swiglu_backward_ref, swiglu_forward, swiglu_forward_ref

N, F = 2048, 1536

rng = np.random.default_rng(0)
bench = Bench("swiglu", f"SwiGLU of {N} rows, width {F}")
gate_up = 3 * rng.standard_normal((N, 2 * F)).astype(np.float32)
dh = rng.standard_normal((N, F)).astype(np.float32)
h, dgate_up = np.empty_like(dh), np.empty_like(gate_up)
swiglu_forward(h, gate_up)
dgate_up_ref = swiglu_backward_ref(dh.astype(np.float64), gate_up.astype(np.float64))
swiglu_backward(dgate_up, dh, gate_up)  # dh is h from here on
bench.check("forward", h, swiglu_forward_ref(gate_up.astype(np.float64)), 1e-5)
bench.check("backward", dgate_up, dgate_up_ref, 1e-4)
bench.check("forward again", dh, h, 1e-7)
bench.time(
    "forward",
    lambda: swiglu_forward(h, gate_up),
    bytes_moved=12 * N * F,
    numpy=lambda: swiglu_forward_ref(gate_up),
)
bench.time(
    "backward",
    lambda: swiglu_backward(dgate_up, dh, gate_up),
    bytes_moved=24 * N * F,
    numpy=lambda: swiglu_backward_ref(dh, gate_up),
)
bench.finish()
