"""Check and time causal attention with grouped heads, on columns of one wide matrix as in the model."""

import numpy as np
from _bench import Bench

from abi_py.kernels.unchecked import (
    attention_backward,
    attention_backward_ref,
    attention_forward,
    attention_forward_ref,
)

# (B, T, H, G, D)
SHAPES = [(4, 512, 8, 8, 64), (4, 512, 8, 4, 64), (1, 2048, 8, 4, 64), (8, 256, 4, 4, 32)]

rng = np.random.default_rng(0)
bench = Bench("attention", "Causal attention: (B, T, query heads, key/value heads, head width)")
for B, T, H, G, D in SHAPES:
    N, q_width, kv_width = B * T, H * D, G * D
    qkv = rng.standard_normal((N, q_width + 2 * kv_width)).astype(np.float32)
    q, k, v = np.split(qkv, [q_width, q_width + kv_width], axis=1)
    d_qkv = np.empty_like(qkv)
    dq, dk, dv = np.split(d_qkv, [q_width, q_width + kv_width], axis=1)
    do, o = rng.standard_normal((N, q_width)).astype(np.float32), np.empty((N, q_width), np.float32)
    lse = np.empty((H, N), np.float32)
    starts = np.zeros(N, np.int32)

    def forward(o=o, lse=lse, q=q, k=k, v=v, starts=starts, B=B, H=H, G=G):
        attention_forward(o, lse, q, k, v, starts, B, H, G)

    def backward(
        dq=dq, dk=dk, dv=dv, do=do, q=q, k=k, v=v, o=o, lse=lse, starts=starts, B=B, H=H, G=G
    ):
        attention_backward(dq, dk, dv, do, q, k, v, o, lse, starts, B, H, G)

    def numpy_forward(q=q, k=k, v=v, starts=starts, B=B, H=H, G=G):
        attention_forward_ref(q, k, v, starts, B, H, G)

    forward()
    backward()
    name, few = f"{B} {T} {H} {G} {D}", slice(0, T)  # one sample is enough of a check
    wide = [a[few].astype(np.float64) for a in (q, k, v, do)]
    expected_o, _ = attention_forward_ref(*wide[:3], starts[few], 1, H, G)
    expected = attention_backward_ref(wide[3], *wide[:3], starts[few], 1, H, G)
    bench.check(f"o  {name}", o[few], expected_o, 1e-5)
    for label, a, b in zip(("dq", "dk", "dv"), (dq, dk, dv), expected, strict=True):
        bench.check(f"{label} {name}", a[few], b, 1e-4)
    pairs = B * H * T * (T + 1) // 2  # of a query and a key that it sees
    bench.time(f"forward  {name}", forward, flops=4 * D * pairs, numpy=numpy_forward)
    bench.time(f"backward {name}", backward, flops=10 * D * pairs)  # five products: the scores are made again
bench.finish()
