"""The branch of experts in float64 NumPy, as `reference.py` has the others, and the penalties of its routers.

Of N rows, each goes to K of E experts: S = N K rows of experts, grouped by expert.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ..kernels.experts import expert_gradients_ref, from_experts_ref, to_experts_ref
from ..kernels.router import dispatch_ref, load_balancing, route_backward_ref, route_forward_ref, z_loss
from ..kernels.swiglu import weighted_swiglu_backward_ref, weighted_swiglu_forward_ref

Array = np.ndarray
Weights = Mapping[str, Array]


def experts_forward(layer: Any, w: Weights, x: Array, _: Any) -> tuple[Array, Any]:
    """Return x + the sum of the chosen experts' outputs (N, C), each times its gate; in S = N K rows."""
    n, r = layer.norm.forward_ref(w, x)  # (N, C), (N,)
    route = route_forward_ref(n @ w["w_router"].T, layer.chosen, layer.renormalised)
    chosen, gates, *_ = route  # (N, K) both
    token, slot, offsets = dispatch_ref(chosen, layer.experts)  # (S,), (N, K), (E + 1,)
    weights = np.empty(token.size)
    weights[slot] = gates  # (S,)
    gate_up = to_experts_ref(n, token, offsets, w["experts_gate"], w["experts_up"])  # (S, 2F)
    h = weighted_swiglu_forward_ref(gate_up, weights)  # (S, F)
    out = from_experts_ref(x, h, token, offsets, w["experts_down"])
    saved = {"x": x, "n": n, "r": r, "route": route, "rows": (token, offsets), "slot": slot, "weights": weights}
    return out, {**saved, "gate_up": gate_up, "h": h, "penalty": (1.0, 0.0, 0.0)}


def experts_backward(layer: Any, w: Weights, dx: Array, saved: Any, _: Any) -> tuple[Array, dict[str, Array]]:
    """Return dx (N, C) of the input for dx of the output, and the gradients of the branch's weights."""
    n, (token, offsets), gate_up = saved["n"], saved["rows"], saved["gate_up"]
    gate, up, down = (w[f"experts_{name}"] for name in ("gate", "up", "down"))
    # forward: out = x + Σ h experts_downᵀ; dx is also the first share of the input's gradient
    dh = to_experts_ref(dx, token, offsets, down, transposed=False)  # (S, F)
    # forward: h = g swiglu(gate_up)
    dgate_up, dweights = weighted_swiglu_backward_ref(dh, gate_up, saved["weights"])  # (S, 2F), (S,)
    # forward: g = gates(logits)
    (chosen, gates, p, lse), (counted, balance, z) = saved["route"], saved["penalty"]
    options = layer.renormalised, counted, balance, z
    dlogits = route_backward_ref(dweights[saved["slot"]], chosen, gates, p, lse, *options)
    # forward: gate_up = n [experts_gate experts_up]ᵀ, logits = n w_routerᵀ
    dn = from_experts_ref(dlogits @ w["w_router"], dgate_up, token, offsets, gate, up, transposed=False)  # (N, C)
    # forward: n = norm(x)
    share, of_norm = layer.norm.backward_ref(w, dn, saved["x"], saved["r"])  # (N, C)
    dgate, dup = np.split(dgate_up, 2, axis=1)  # (S, F) each
    return dx + share, of_norm | {
        "w_router": dlogits.T @ n,
        "experts_gate": expert_gradients_ref(dgate, n[token], offsets),
        "experts_up": expert_gradients_ref(dup, n[token], offsets),
        "experts_down": expert_gradients_ref(dx[token], saved["h"], offsets),
    }


def router_penalties(layers: Sequence[Any], saved: Any, attention_mask: Any = None) -> float:
    """Return what the routers of all layers together add to the loss; their gradients are put into `saved`."""
    routers = [(layer, kept) for layer, kept in zip(layers[1:-1], saved[1], strict=True) if hasattr(layer, "routing")]
    rows = saved[0][0].size
    counted = np.ones(rows) if attention_mask is None else (np.asarray(attention_mask).ravel() != 0).astype(float)
    pairs, value = max(counted.sum() * len(routers), 1), 0.0
    masked = [(kept["route"][0], counted[:, None] * kept["route"][2], kept["route"][3]) for _, kept in routers]
    load = np.sum([np.bincount(chosen[counted > 0].ravel(), minlength=p.shape[1]) for chosen, p, _ in masked], axis=0)
    for (layer, kept), (_, p, lse) in zip(routers, masked, strict=True):
        part, b = load_balancing(load, p.sum(0), pairs)
        squared, z = z_loss((counted * lse**2).sum(), pairs)
        value += layer.routing.balance * part + layer.routing.z * squared
        kept["penalty"] = counted, layer.routing.balance * b, layer.routing.z * z
    return value


def closest_choice(saved: Any) -> float:
    """Return by how much the logit of an expert that a row chose is above the next one's, at least; inf without any.

    At zero, where the choice changes, the loss jumps.
    """
    gaps = [np.inf]
    for kept in saved[1]:
        if isinstance(kept, dict):  # of a branch of experts
            chosen, _, p, _ = kept["route"]
            ranked, K = np.sort(np.log(p), axis=1)[:, ::-1], chosen.shape[1]  # p (N, E)
            gaps.append((ranked[:, K - 1 : K] - ranked[:, K : K + 1]).min(initial=np.inf))
    return float(min(gaps))
