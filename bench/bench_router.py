"""Check and time the router of a mixture of experts."""

import numpy as np
from _bench import Bench

from abi_py.kernels.unchecked import route_backward, route_backward_ref, route_forward, route_forward_ref

N, K, E = 4096, 8, 128

rng = np.random.default_rng(0)
bench = Bench("router", f"the router of {N} tokens, {K} of {E} experts each")
logits, dgates = rng.standard_normal((N, E)).astype(np.float32), rng.standard_normal((N, K)).astype(np.float32)
balance = rng.standard_normal(E).astype(np.float32)
chosen, slot, token = np.empty((N, K), np.int32), np.empty((N, K), np.int32), np.empty(N * K, np.int32)
weights, lse, dweights = np.empty(N * K, np.float32), np.empty(N, np.float32), np.empty(N * K, np.float32)
found = np.empty(E + 1, np.int32), np.empty(E), np.empty(E), np.empty(1)
dlogits = np.empty_like(logits)


def forward():
    """Choose experts and sort the rows."""
    route_forward(chosen, weights, lse, token, slot, *found, logits)


def backward():
    """Go from the gates' gradient to that of the logits, with both penalties."""
    route_backward(dlogits, dweights, logits, lse, chosen, slot, weights, balance, 0.1)


forward()
dweights[slot] = dgates
backward()
reference = route_forward_ref(logits.astype(np.float64), K, True)
bench.check("forward", weights[slot], reference[1], 1e-5)
expected = route_backward_ref(dgates.astype(np.float64), *reference, True, 1.0, balance.astype(np.float64), 0.1)
bench.check("backward", dlogits, expected, 1e-4)
bench.time("forward", forward, bytes_moved=4 * N * (E + 4 * K), numpy=lambda: route_forward_ref(logits, K, True))
bench.time("backward", backward, bytes_moved=4 * N * (2 * E + 4 * K))
bench.finish()
