"""Check and time attention over a cache: bytes of keys and values per second; a call reads all of them once."""

import numpy as np
from _bench import Bench

from abi_py.kernels.unchecked import cached_attention_forward, cached_attention_forward_ref

# (rows, H, G, D, tokens in each cache)
SHAPES = [
    (1, 8, 8, 64, 256),
    (1, 8, 8, 64, 2048),
    (1, 8, 4, 64, 2048),
    (1, 32, 8, 128, 4096),
    (8, 8, 4, 64, 1024),
    (1, 8, 8, 64, 65536),
]

rng = np.random.default_rng(0)
bench = Bench("cached_attention", "Attention over a cache: (rows, query heads, key/value heads, head width, tokens)")
for N, H, G, D, T in SHAPES:
    q = rng.standard_normal((N, H * D), np.float32)
    keys, values = rng.standard_normal((2, N, G, T, D), np.float32)
    o, slots, positions = np.empty_like(q), np.arange(N, dtype=np.int32), np.full(N, T - 1, np.int32)

    def forward(o=o, q=q, keys=keys, values=values, slots=slots, positions=positions):
        cached_attention_forward(o, q, keys, values, slots, positions)

    def numpy_forward(q=q, keys=keys, values=values, slots=slots, positions=positions):
        cached_attention_forward_ref(q, keys, values, slots, positions)

    forward()
    name = f"{N} {H} {G} {D} {T}"
    few = slice(0, 1)
    expected = cached_attention_forward_ref(
        *(a[few].astype(np.float64) for a in (q, keys, values)), slots[few], positions[few]
    )
    bench.check(name, o[few], expected, 1e-5)
    bench.time(name, forward, bytes_moved=8 * N * G * T * D, flops=4 * N * H * T * D, numpy=numpy_forward)
bench.finish()
