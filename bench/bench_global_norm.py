"""Check and time the global norm of 16 million numbers: more than any cache holds."""

import numpy as np
from _bench import Bench

from abi_py.kernels.unchecked import global_norm, global_norm_ref

P = 16_000_000

rng = np.random.default_rng(0)
bench = Bench("global_norm", f"Norm of {P} numbers")
g = rng.standard_normal(P, dtype=np.float32)
bench.check("norm", global_norm(g), global_norm_ref(g), 1e-12)
bench.time("norm", lambda: global_norm(g), bytes_moved=4 * P, numpy=lambda: global_norm_ref(g))
bench.finish()
