"""Check and time products of whole numbers in every storage of blocks: a few rows of x, as in generation, and many."""

import numpy as np
from _bench import Bench

from abi_py.kernels.integer_matmul import integer_product_ref
from abi_py.kernels.storage import STORAGES
from abi_py.kernels.storage.blocks import BlockStorage
from abi_py.kernels.unchecked import integer_product, stored_product

M, K = 16384, 2048  # more than second-level caches hold, in four bits too
WIDE = 2048  # rows of W that many rows of x are multiplied with

bench = Bench("integer_matmul", f"x Wᵀ with W {M} x {K} in blocks, by whole numbers and by float32")
rng = np.random.default_rng(0)
some = rng.standard_normal((64, K)).astype(np.float32)
for name, storage in STORAGES.items():
    if not isinstance(storage, BlockStorage):
        continue
    matrix = np.tile(storage.encode_ref(some), (M // len(some), 1))
    for n in (1, 2, 8, 512):
        raw = matrix if n <= 8 else matrix[:WIDE]
        x = rng.standard_normal((n, K)).astype(np.float32)
        y = np.empty((n, len(raw)), np.float32)
        integer_product(y, x, raw, storage)
        bench.check(f"y {n} {name}", y[:, :64], integer_product_ref(x, raw[:64], storage), 0)
        moved = {} if n > 8 else {"bytes_moved": raw.nbytes}
        for kind, call in (("integer", integer_product), ("float32", stored_product)):
            bench.time(
                f"y {n} {name} {kind}",
                lambda call=call, y=y, x=x, raw=raw, storage=storage: call(y, x, raw, storage),
                flops=2 * y.size * K,
                **moved,
            )
bench.finish()
