"""The whole model in float64 NumPy, forward and backward: the page to read first, and what the fast code must equal.

    x = token_embedding[ids]                           (N, C), N = B T rows: batch B, time T, width C (+ positions)
    for each block i:                                  its weights have these names after `layers.i.`
        attention      q, k, v = rope(n w_qᵀ), rope(n w_kᵀ), n w_vᵀ      n = norm(x)
                       x = x + attention(q, k, v) w_oᵀ               (norms of q's and k's heads, of what is added)
        feed-forward   gate, up = n w_gateᵀ, n w_upᵀ                     n = norm(x)
                       x = x + (act(gate) * up) w_downᵀ             (act is silu; GPT-2: x + gelu(up) w_downᵀ)
                       or, of E experts, those that a router chooses for a token, weighed by its gates:
                       x = x + Σ_j g_j expert_j(n)
    loss = mean cross_entropy(norm(x) headᵀ, labels)      head = output_proj, or token_embedding if tied

H query heads, G key/value heads of width D; feed-forward width F; vocabulary V.  Weights are (out, in): y = x wᵀ (+ b,
where a family has biases), dx = dy w, dw = dyᵀ x: `forward_ref` and `backward_ref` of `layers/linear.py`; embedding,
norm and activation are files with such a pair, too.  Each other operation is a reference of `kernels/`, derived there.
A branch is a pair of functions (that of experts is in `reference_experts.py`); the class in `layers/` that names them
computes the same in float32.  Ids are (B, T), or flat; labels of the same shape, -100 where none is trained; options
those of `TrainableModel.compute_loss`.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from ..kernels.attention import attention_backward_ref, attention_forward_ref, starts_within
from ..kernels.cross_entropy import head_loss_ref
from ..kernels.rope import rope_backward_ref, rope_forward_ref
from .inputs import as_ids, as_labels, check_ids, segment_starts
from .reference_experts import router_penalties

Array = np.ndarray
Weights = Mapping[str, Array]
Batch = tuple[Array, Array, Array]  # ids (B, T); of each token, where in its row its sample began, and its place in it

# -- the branches: forward returns out and what backward reads; backward returns dx and the weights' gradients ----


def attention_forward(layer: Any, w: Weights, x: Array, batch: Batch) -> tuple[Array, Any]:
    """Return x + attention(norm(x)) (N, C)."""
    (ids, starts, positions), H, G = batch, layer.heads, layer.kv_heads
    starts = starts_within(starts, ids.shape[1], layer.window)
    n, r = layer.norm.forward_ref(w, x)  # (N, C), (N,)
    q, k, v = np.split(layer.qkv.forward_ref(w, n), layer.cuts, axis=1)  # (N, H D), (N, G D), (N, G D)
    raw_q, raw_k, r_q, r_k = q, k, None, None
    if layer.qk_norm:
        (q, r_q), (k, r_k) = layer.qk_norm[0].forward_ref(w, q), layer.qk_norm[1].forward_ref(w, k)  # r: (N H,), (N G,)
    longest = int(positions.max()) + 1  # of the samples
    cos, sin = layer.angles.reference(longest) if layer.angles else (x[:0], x[:0])  # (longest, D/2) each, or nothing
    if layer.angles:
        q, k = rope_forward_ref(q, cos, sin, positions, H), rope_forward_ref(k, cos, sin, positions, G)
    att, _ = attention_forward_ref(q, k, v, starts, len(ids), H, G, layer.scale)  # (N, H D)
    z = layer.o.forward_ref(w, att)  # (N, C)
    share, r_z = layer.after.forward_ref(w, z) if layer.after else (z, None)
    return x + share, (x, n, r, raw_q, raw_k, r_q, r_k, q, k, v, att, cos, sin, z, r_z)


def attention_backward(layer: Any, w: Weights, dx: Array, saved: Any, batch: Batch) -> tuple[Array, dict[str, Array]]:
    """Return dx (N, C) of the input for dx of the output, and the gradients of the branch's weights."""
    x, n, r, raw_q, raw_k, r_q, r_k, q, k, v, att, cos, sin, z, r_z = saved
    (ids, starts, positions), H, G = batch, layer.heads, layer.kv_heads
    starts = starts_within(starts, ids.shape[1], layer.window)
    # forward: out = x + z, z = att w_oᵀ, or the norm of that; dx is also the first share of the input's gradient
    dz, of_after = layer.after.backward_ref(w, dx, z, r_z) if layer.after else (dx, {})  # (N, C)
    datt, gradients = layer.o.backward_ref(w, dz, att)  # (N, H D)
    # forward: att = attention(q, k, v)
    dq, dk, dv = attention_backward_ref(datt, q, k, v, starts, len(ids), H, G, layer.scale)
    # forward: q = rope(norm(n w_qᵀ)), k = rope(norm(n w_kᵀ)), v = n w_vᵀ; rope and norm where the family has them
    if layer.angles:
        dq, dk = rope_backward_ref(dq, cos, sin, positions, H), rope_backward_ref(dk, cos, sin, positions, G)
    if layer.qk_norm:
        dq, of_q = layer.qk_norm[0].backward_ref(w, dq, raw_q, r_q)
        dk, of_k = layer.qk_norm[1].backward_ref(w, dk, raw_k, r_k)
        gradients |= of_q | of_k
    dn, of_qkv = layer.qkv.backward_ref(w, np.concatenate((dq, dk, dv), axis=1), n)  # (N, C)
    # forward: n = norm(x)
    share, of_norm = layer.norm.backward_ref(w, dn, x, r)  # (N, C)
    return dx + share, gradients | of_after | of_qkv | of_norm


def feed_forward_forward(layer: Any, w: Weights, x: Array, batch: Batch) -> tuple[Array, Any]:
    """Return x + act(norm(x)) (N, C)."""
    n, r = layer.norm.forward_ref(w, x)  # (N, C), (N,)
    gate_up = layer.gate_up.forward_ref(w, n)  # (N, 2F), or (N, F) without a gate
    h = layer.activation.forward_ref(gate_up)  # (N, F)
    z = layer.down.forward_ref(w, h)  # (N, C)
    share, r_z = layer.after.forward_ref(w, z) if layer.after else (z, None)
    return x + share, (x, n, r, gate_up, h, z, r_z)


def feed_forward_backward(layer: Any, w: Weights, dx: Array, saved: Any, _: Batch) -> tuple[Array, dict[str, Array]]:
    """Return dx (N, C) of the input for dx of the output, and the gradients of the branch's weights."""
    x, n, r, gate_up, h, z, r_z = saved
    # forward: out = x + z, z = h w_downᵀ, or the norm of that; dx is also the first share of the input's gradient
    dz, of_after = layer.after.backward_ref(w, dx, z, r_z) if layer.after else (dx, {})  # (N, C)
    dh, of_down = layer.down.backward_ref(w, dz, h)  # (N, F)
    # forward: h = act(gate_up)
    dgate_up = layer.activation.backward_ref(dh, gate_up)  # (N, 2F)
    # forward: gate_up = n [w_gate, w_up]ᵀ
    dn, of_gate_up = layer.gate_up.backward_ref(w, dgate_up, n)  # (N, C)
    # forward: n = norm(x)
    share, of_norm = layer.norm.backward_ref(w, dn, x, r)  # (N, C)
    return dx + share, of_gate_up | of_down | of_norm | of_after


# -- the model: the list of its layers, and the same list in reverse ------------------------------------------


def forward(layers: Sequence[Any], weights: Weights, input_ids: npt.ArrayLike, **marks: Any) -> tuple[Array, Any]:
    """Return hidden (N, C), the input of the head, for ids (B, T); and what `backward` reads."""
    embedding, *branches, head = layers
    ids = as_ids(input_ids, embedding)  # (B, T)
    check_ids(ids, input_ids, embedding)
    starts = segment_starts(ids.shape, **marks).ravel()  # (N,)
    batch = ids, starts, np.tile(np.arange(ids.shape[1]), len(ids)) - starts
    x, kept = embedding.forward_ref(weights, ids.ravel(), batch[2]), []  # (N, C)
    for layer in branches:
        x, saved = layer.reference[0](layer, local(weights, layer.at), x, batch)  # (N, C)
        kept.append(saved)
    hidden, r = head.norm.forward_ref(weights, x)  # (N, C), (N,)
    return hidden, (batch, kept, x, r)


def backward(layers: Sequence[Any], weights: Weights, dhidden: Array, saved: Any) -> dict[str, Array]:
    """Return the gradients by name, all but that of the head's matrix, for dhidden (N, C)."""
    (embedding, *branches, head), (batch, kept, x, r) = layers, saved
    # forward: hidden = norm(x)
    dx, gradients = head.norm.backward_ref(weights, dhidden, x, r)  # (N, C)
    for layer, inner in zip(reversed(branches), reversed(kept), strict=True):
        dx, found = layer.reference[1](layer, local(weights, layer.at), dx, inner, batch)  # (N, C)
        gradients |= {layer.at + name: dw for name, dw in found.items()}
    # forward: x = token_embedding[ids]
    return gradients | embedding.backward_ref(dx, batch[0].ravel(), batch[2])


def loss_and_gradients(
    layers: Any, weights: Weights, ids: Any, labels: Any, *, label_smoothing: float = 0, z_loss: float = 0, **marks: Any
) -> tuple[float, dict[str, Array]]:
    """Return the mean loss and z-loss over the trained labels, with the routers' penalties, and the gradients."""
    weights, head = widened(weights), layers[-1]
    value, dx, dhead, saved = _loss(layers, weights, ids, labels, label_smoothing, z_loss, marks)
    gradients = backward(layers, weights, dx, saved)
    gradients[head.name] = gradients.get(head.name, 0) + dhead  # tied: one matrix with two uses, and a sum of gradients
    return value, {name: gradients[name] for name in weights}


def loss(
    layers: Any, weights: Weights, ids: Any, labels: Any, *, label_smoothing: float = 0, z_loss: float = 0, **marks: Any
) -> float:
    """Return that loss alone."""
    return _loss(layers, widened(weights), ids, labels, label_smoothing, z_loss, marks)[0]


def _loss(
    layers: Any, weights: Weights, ids: Any, labels: Any, label_smoothing: float, z_loss: float, marks: Any
) -> tuple[float, Array, Array, Any]:
    """Return the loss, its gradients by the hidden rows and by the head's matrix, and what backward needs."""
    embedding, *_, head = layers
    hidden, saved = forward(layers, weights, ids, **marks)
    targets = as_labels(labels, saved[0][0].shape, embedding).ravel()  # (N,)
    count = max(int(np.count_nonzero(targets >= 0)), 1)
    # losses (N,) = cross_entropy(hidden headᵀ, targets), 0 where none is trained; gradients of their mean
    losses, _, lse, dx, dhead = head_loss_ref(hidden, weights[head.name], targets, 1 / count, label_smoothing, z_loss)
    penalty = router_penalties(layers, saved, marks.get("attention_mask"))
    return float((losses.sum() + z_loss * (lse**2).sum()) / count) + penalty, dx, dhead, saved


def logits(layers: Sequence[Any], weights: Weights, input_ids: npt.ArrayLike, **marks: Any) -> Array:
    """Return the logits (B, T, V)."""
    weights, head = widened(weights), layers[-1]
    hidden, ((ids, *_), *_) = forward(layers, weights, input_ids, **marks)
    return (hidden @ weights[head.name].T).reshape(*ids.shape, head.vocab_size)


def local(weights: Weights, at: str) -> Weights:
    """Return a layer's weights by their names without what they begin with."""
    return {name.removeprefix(at): w for name, w in weights.items() if name.startswith(at)}


def widened(weights: Weights) -> dict[str, Array]:
    """Return the weights in float64, by name; those that are in it are not copied."""
    return {name: np.asarray(w, np.float64) for name, w in weights.items()}
