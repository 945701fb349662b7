"""Check and time GELU, by a tanh and exact, without a gate and with one."""

import numpy as np
from _bench import Bench

from abi_py.kernels.unchecked import gelu_backward, gelu_backward_ref, gelu_forward, gelu_forward_ref

N, F = 2048, 1536

rng = np.random.default_rng(0)
bench = Bench("gelu", f"GELU of {N} rows, width {F}")
for exact, kind in ((False, "tanh"), (True, "exact")):
    for gated in (False, True):
        name, arrays = kind + ", gated" * gated, 1 + gated
        u = 3 * rng.standard_normal((N, arrays * F)).astype(np.float32)
        dh = rng.standard_normal((N, F)).astype(np.float32)
        h, du = np.empty_like(dh), np.empty_like(u)
        gelu_forward(h, u, exact)
        few = slice(0, 64)  # the reference calls erf number by number
        du_ref = gelu_backward_ref(dh[few].astype(np.float64), u[few].astype(np.float64), exact, gated)
        gelu_backward(du, dh, u, exact)  # dh is h from here on
        bench.check(f"{name}: forward", h[few], gelu_forward_ref(u[few].astype(np.float64), exact, gated), 1e-5)
        bench.check(f"{name}: backward", du[few], du_ref, 1e-4)
        bench.check(f"{name}: forward again", dh, h, 1e-7)
        bench.time(
            f"{name}: forward",
            lambda h=h, u=u, exact=exact: gelu_forward(h, u, exact),
            bytes_moved=4 * (arrays + 1) * N * F,
            numpy=None if exact else lambda u=u, gated=gated: gelu_forward_ref(u, False, gated),
        )
        bench.time(
            f"{name}: backward",
            lambda du=du, dh=dh, u=u, exact=exact: gelu_backward(du, dh, u, exact),
            bytes_moved=8 * (arrays + 1) * N * F,
            numpy=None if exact else lambda dh=dh, u=u, gated=gated: gelu_backward_ref(dh, u, False, gated),
        )
bench.finish()
