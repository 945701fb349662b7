"""Check and time AdamW with moments in 8 bits beside AdamW, on 16 million parameters: more than any cache holds."""

import numpy as np
from _bench import Bench

from abi_py.kernels.adamw_8bit import adamw_8bit_ref, block_chunks, encode_blocks_ref
from abi_py.kernels.unchecked import adamw_, adamw_8bit_, parameter_chunks

P, SMALL = 16_000_000, 200_000  # timed, checked
SETTINGS = 1e-3, 0.9, 0.999, 1e-8, 0.01, 3, 0.5  # rate, beta1, beta2, eps, weight decay, step, gradient scale

rng = np.random.default_rng(0)
bench = Bench("adamw_8bit", f"One update of {P} parameters")
w, m, g = (rng.standard_normal(P, dtype=np.float32) for _ in range(3))
v = np.square(m)


def in_8_bits(size):
    """Return w, and codes and scales of m and v, of so many parameters."""
    return w[:size].copy(), *encode_blocks_ref(m[:size], True), *encode_blocks_ref(v[:size], False)


kept = in_8_bits(SMALL)
expected = adamw_8bit_ref(
    *(a if a.dtype == np.uint8 else a.astype(np.float64) for a in kept), g[:SMALL].astype(np.float64), 1.0, *SETTINGS
)
adamw_8bit_(*kept, g[:SMALL], *block_chunks([0], [SMALL], [True]), *SETTINGS)
bench.check("adamw_8bit", kept[0], expected[0], 1e-6)
kept, blocks, whole = in_8_bits(P), block_chunks([0], [P], [True]), parameter_chunks([0], [P], [True])
# w, codes and scales are read and written, g is read.
bench.time("adamw_8bit", lambda: adamw_8bit_(*kept, g, *blocks, *SETTINGS), bytes_moved=12 * P + 2 * 2.03125 * P)
bench.time("adamw", lambda: adamw_(w, m, v, g, *whole, *SETTINGS), bytes_moved=28 * P)
few, few_g = in_8_bits(SMALL), g[:SMALL]
bench.time(
    "adamw_8bit, 200 000",
    lambda: adamw_8bit_(*few, few_g, *block_chunks([0], [SMALL], [True]), *SETTINGS),
    numpy=lambda: adamw_8bit_ref(*few, few_g, 1.0, *SETTINGS),
)
bench.finish()
