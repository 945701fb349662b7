"""Check and time DoRA: lengths of rows, and what they add to the two passes of a linear layer."""

import numpy as np
from _bench import Bench

from abi_py.kernels.unchecked import (
    dora_backward,
    dora_backward_ref,
    dora_forward,
    dora_forward_ref,
    product,
    row_factors,
    row_lengths,
    row_lengths_ref,
    row_squares,
)

N, M, K, R, SCALE = 1024, 1536, 512, 16, 2.0

rng = np.random.default_rng(0)
bench = Bench("dora", f"DoRA of a matrix {M} x {K}, rank {R}, {N} rows")
y0, v, t, dy = rng.standard_normal((4, N, M)).astype(np.float32)
w, a, b = (rng.standard_normal(shape).astype(np.float32) for shape in ((M, K), (R, K), (M, R)))
squares, n, g, m, dm = np.empty(M), *np.ones((4, M), np.float32)
wa, gram = np.empty((R, M), np.float32), np.empty((R, R), np.float32)


def lengths():
    """Write n: what is done when A or B has changed."""
    product(wa, a, w, transpose_b=True)
    product(gram, a, a, transpose_b=True)
    row_lengths(n, squares, wa, b, gram, SCALE)


row_squares(squares, w)
lengths()
row_factors(g, m, n)
y, z, dz = y0.copy(), v.copy(), np.empty_like(dy)
dora_forward(y, z, t, g, given=True)
dora_backward(dz, dm, dy, z, g, n)
dm -= 1
wide = [x.astype(np.float64) for x in (y0, v, t, g, dy, z, n, w, a, b)]
expected = dora_forward_ref(*wide[:4])
bench.check("lengths", n, row_lengths_ref(*wide[7:], SCALE), 1e-6)
bench.check("forward", y, expected[0], 1e-5)
bench.check("forward z", z, expected[1], 1e-5)
bench.check("backward", dm, dora_backward_ref(*wide[4:6], wide[3], wide[6])[1], 1e-4)
row_factors(g, n, n)  # 1: y, which is changed in place, does not fall to numbers that are slow
bench.time(
    "lengths", lengths, bytes_moved=4 * M * K, numpy=lambda: np.linalg.norm(w + np.float32(SCALE) * (b @ a), axis=1)
)
bench.time(
    "forward",
    lambda: dora_forward(y, z, t, g),
    bytes_moved=16 * N * M,
    numpy=lambda: (np.add(y, t, out=z), np.multiply(z, g, out=y)),
)
bench.time(
    "backward",
    lambda: dora_backward(dz, dm, dy, z, g, n),
    bytes_moved=12 * N * M,
    numpy=lambda: (np.multiply(dy, g, out=dz), (dy * z).sum(0)),
)
bench.finish()
