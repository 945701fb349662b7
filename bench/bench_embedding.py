"""Check and time the embedding: a large vocabulary, whose rows are hit once, and that of bytes, hit often."""

import numpy as np
from _bench import Bench

from abi_py.kernels.unchecked import (
    embedding_backward,
    embedding_backward_ref,
    embedding_forward,
    embedding_forward_ref,
)

N, C = 2048, 512

rng = np.random.default_rng(0)
bench = Bench("embedding", f"Embedding of {N} tokens, width {C}, vocabulary 32000 and 256")
for V in (32_000, 256):
    w, dx = rng.standard_normal((V, C)).astype(np.float32), rng.standard_normal((N, C)).astype(np.float32)
    ids = rng.integers(0, V, N).astype(np.int32)
    x, dw = np.empty_like(dx), np.zeros_like(w)
    embedding_forward(x, ids, w)
    embedding_backward(dw, dx, ids)
    bench.check(f"forward V={V}", x, embedding_forward_ref(ids, w), 0)
    bench.check(f"backward V={V}", dw, embedding_backward_ref(dx.astype(np.float64), ids, V), 1e-4)
    bench.time(
        f"forward V={V}",
        lambda x=x, ids=ids, w=w: embedding_forward(x, ids, w),
        bytes_moved=8 * N * C,
        numpy=lambda ids=ids, w=w: embedding_forward_ref(ids, w),
    )
    bench.time(
        f"backward V={V}",
        lambda dw=dw, dx=dx, ids=ids: embedding_backward(dw, dx, ids),
        bytes_moved=12 * N * C,
        numpy=lambda dx=dx, ids=ids, V=V: embedding_backward_ref(dx, ids, V),
    )
bench.finish()
