"""Check and time the products of generation: bytes of W per second for 1 to 128 rows of x."""

import numpy as np
from _bench import Bench

from abi_py.kernels.storage.bf16 import STORAGE as BF16
from abi_py.kernels.unchecked import streamed_product, streamed_product_ref

M, K = 32_000, 512  # more than caches hold
ROWS = (1, 2, 4, 8, 16, 32, 128)

bench = Bench("streamed_matmul", f"x Wᵀ with W {M} x {K}: rows of x, and what W is kept in")
rng = np.random.default_rng(0)
w = rng.standard_normal((M, K)).astype(np.float32)
raw = BF16.encode_ref(w)
for name, kept, wide in (("float32", w, w), ("bf16", raw, BF16.decode_ref(raw))):
    for n in ROWS:
        x, y = rng.standard_normal((n, K)).astype(np.float32), np.empty((n, M), np.float32)

        def forward(y=y, x=x, kept=kept):
            streamed_product(y, x, kept)

        def numpy_forward(x=x, wide=wide):
            streamed_product_ref(x, wide)

        forward()
        bench.check(f"{n} {name}", y, streamed_product_ref(x.astype(np.float64), wide), 1e-5)
        bench.time(f"{n} {name}", forward, bytes_moved=kept.nbytes, flops=2 * n * M * K, numpy=numpy_forward)
bench.finish()
