"""Check and time products with frozen matrices in every storage: one row of x, as in generation, and many."""

import numpy as np
from _bench import Bench

from abi_py.kernels.storage import STORAGES
from abi_py.kernels.unchecked import (
    stored_product,
    stored_product_backward,
    stored_product_backward_ref,
    stored_product_ref,
    stored_rows,
    stored_rows_ref,
)

M, K = 4096, 2048  # more than caches hold, in float32

bench = Bench("stored_matmul", f"x Wᵀ and dy W with W {M} x {K} in its storage")
rng = np.random.default_rng(0)
w = rng.standard_normal((M, K)).astype(np.float32)
for name, storage in STORAGES.items():
    raw = storage.encode_ref(w)
    for n in (1, 256):
        x, dy = (rng.standard_normal((n, columns)).astype(np.float32) for columns in (K, M))
        y, dx = np.empty_like(dy), np.empty_like(x)
        stored_product(y, x, raw, storage)
        bench.check(f"y  {n} {name}", y, stored_product_ref(x.astype(np.float64), raw, storage), 1e-5)
        call = lambda y=y, x=x, raw=raw, storage=storage: stored_product(y, x, raw, storage)  # noqa: E731
        if n == 1:
            bench.time(f"y  {n} {name}", call, flops=2 * n * M * K, bytes_moved=raw.nbytes)
            continue
        bench.time(f"y  {n} {name}", call, flops=2 * n * M * K)
        stored_product_backward(dx, dy, raw, storage)
        bench.check(f"dx {n} {name}", dx, stored_product_backward_ref(dy.astype(np.float64), raw, storage), 1e-5)
        bench.time(
            f"dx {n} {name}",
            lambda dx=dx, dy=dy, raw=raw, storage=storage: stored_product_backward(dx, dy, raw, storage),
            flops=2 * n * M * K,
        )
        ids = rng.integers(0, M, n)
        stored_rows(x, ids, raw, storage)
        bench.check(f"rows {n} {name}", x, stored_rows_ref(ids, raw, storage), 0)
        bench.time(
            f"rows {n} {name}",
            lambda x=x, ids=ids, raw=raw, storage=storage: stored_rows(x, ids, raw, storage),
            bytes_moved=x.nbytes + n * raw.nbytes // M,
        )
bench.finish()
