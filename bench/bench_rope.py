"""Check and time RoPE on the query and key columns of a joint (N, 3C) buffer."""

import numpy as np
from _bench import Bench

from abi_py.kernels.unchecked import rope_backward, rope_backward_ref, rope_forward, rope_forward_ref, rope_table

B, T, HEADS, D, W = 4, 512, 16, 64, 1536
N = B * T

rng = np.random.default_rng(0)
bench = Bench("rope", f"RoPE of {HEADS} heads of width {D} in {N} rows of {W} columns")
start = rng.standard_normal((N, W)).astype(np.float32)
cos, sin = rope_table(T, D, 1e4)
positions = np.tile(np.arange(T, dtype=np.int32), B)
wide = [a.astype(np.float64) for a in (start, cos, sin)]
x, dx = start.copy(), start.copy()
rope_forward(x, cos, sin, positions, HEADS)
rope_backward(dx, cos, sin, positions, HEADS)
bench.check("forward", x, rope_forward_ref(*wide, positions, HEADS), 1e-5)
bench.check("backward", dx, rope_backward_ref(*wide, positions, HEADS), 1e-4)
moved = 8 * N * HEADS * D
bench.time(
    "forward",
    lambda: rope_forward(x, cos, sin, positions, HEADS),
    bytes_moved=moved,
    numpy=lambda: rope_forward_ref(start, cos, sin, positions, HEADS),
)
bench.time(
    "backward",
    lambda: rope_backward(dx, cos, sin, positions, HEADS),
    bytes_moved=moved,
    numpy=lambda: rope_backward_ref(start, cos, sin, positions, HEADS),
)
bench.finish()
