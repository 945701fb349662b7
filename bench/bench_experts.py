"""Check and time the products of experts, beside one product of the same number of operations."""

import numpy as np
from _bench import Bench

from abi_py.kernels.router import dispatch_ref
from abi_py.kernels.unchecked import (
    expert_gradients,
    expert_gradients_ref,
    from_experts,
    from_experts_ref,
    product,
    to_experts,
    to_experts_ref,
    weighted_swiglu_backward,
    weighted_swiglu_forward,
)

N, K, E, C, F = 4096, 8, 128, 512, 64

rng = np.random.default_rng(0)
bench = Bench("experts", f"{N} tokens, {K} of {E} experts each, width {C}, inner width {F}")


def random(*sizes):
    """Return random float32 numbers."""
    return rng.standard_normal(sizes).astype(np.float32)


chosen = np.argsort(rng.random((N, E)), axis=1)[:, :K]
token, _, offsets = (each.astype(np.int32) for each in dispatch_ref(chosen, E))
rows = token, offsets
x, u, h, weights = random(N, C), random(N * K, 2 * F), random(N * K, F), rng.random(N * K).astype(np.float32)
gate, up, down = random(E, F, C), random(E, F, C), random(E, C, F)
dgate, dup, ddown, out = np.empty_like(gate), np.empty_like(up), np.empty_like(down), np.empty_like(x)
wide_u, wide_h, wide_gate_up, wide_down = random(N, 2 * K * F), random(N, K * F), random(2 * K * F, C), random(C, K * F)
wide_d = np.empty_like(wide_gate_up)
inner, dinner, dgates = np.empty_like(u), np.empty_like(u), np.empty_like(weights)

to_experts(inner, x, *rows, gate, up)
bench.check("to_experts", inner, to_experts_ref(x.astype(np.float64), *rows, gate, up), 1e-5)
from_experts(out, h, *rows, down, addend=x)
bench.check("from_experts", out, from_experts_ref(x.astype(np.float64), h, *rows, down), 1e-5)
expert_gradients(dgate, u, x, *rows, dup, accumulate=False)
bench.check("expert_gradients", dgate, expert_gradients_ref(u[:, :F].astype(np.float64), x[token], offsets), 1e-5)

operations = 4 * N * K * C * F
bench.time("to_experts", lambda: to_experts(inner, x, *rows, gate, up), flops=operations)
bench.time("  one product", lambda: product(wide_u, x, wide_gate_up, transpose_b=True), flops=operations)
bench.time("from_experts", lambda: from_experts(out, h, *rows, down, addend=x), flops=operations // 2)
bench.time("  one product", lambda: product(out, wide_h, wide_down, transpose_b=True, addend=x), flops=operations // 2)
bench.time("gradients", lambda: expert_gradients(dgate, u, x, *rows, dup, accumulate=False), flops=operations)
bench.time("  one product", lambda: product(wide_d, wide_u, x, transpose_a=True), flops=operations)
bench.time("swiglu", lambda: weighted_swiglu_forward(h, inner, weights), bytes_moved=12 * N * K * F)
swiglu_backward = lambda: weighted_swiglu_backward(dinner, dgates, h, inner, weights)  # noqa: E731
bench.time("swiglu backward", swiglu_backward, bytes_moved=28 * N * K * F)
bench.finish()
