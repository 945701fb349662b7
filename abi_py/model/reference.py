"""The whole model on one page: both passes of a Llama in plain NumPy, in float64.  Read this first.

    forward    x = embedding[ids];  L times:  middle = x + attention(rms_norm(x)) w_oᵀ
                                              x      = middle + swiglu(rms_norm(middle)) w_downᵀ
               loss = mean cross-entropy of rms_norm(x) headᵀ with the labels
    backward   the same lines from the last to the first; dx is the gradient of the loss with respect to x

B sequences of T tokens are N = B T rows of width C.  H query heads share G key/value heads of width D; feed-forward
width F; vocabulary V.  Weights are (out, in), by the names of `TrainableModel.weights`:

    token_embedding output_proj (V, C)   w_q (H D, C)   w_k w_v (G D, C)   w_o (C, H D)   w_gate w_up (F, C)
    w_down (C, F)   attn_norm ffn_norm final_norm (C,)

A linear layer and its two gradients:

    y = x Wᵀ        dx = dy W        dW = dyᵀ x

Everything else is a `*_ref` function, from the file in `kernels/` that derives it.  Nothing here is fast or small:
T x T scores, all logits at once, every intermediate kept.  `transformer.py` and `block.py` are the same lines as calls
of float32 kernels; `abi-train verify` and the tests compare the two.  The whole way of a batch is `loss_and_gradients`,
below: forward, head, backward.  Its arguments are the model's (attention_mask=, segment_ids=, label_smoothing= too) and
so are the errors; float32 weights are widened, a label of -100 does not count.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from ..config import TrainableModelConfig as Config
from ..kernels.attention import attention_backward_ref, attention_forward_ref
from ..kernels.cross_entropy import head_loss_ref
from ..kernels.embedding import embedding_backward_ref, embedding_forward_ref
from ..kernels.rms_norm import rms_norm_backward_ref, rms_norm_forward_ref
from ..kernels.rope import rope_backward_ref, rope_forward_ref, rope_table
from ..kernels.swiglu import swiglu_backward_ref, swiglu_forward_ref
from ..parameters import head_name
from .inputs import as_ids, as_labels, check_ids, segment_starts

__all__ = ["backward", "forward", "logits", "loss", "loss_and_gradients", "widened"]

LAYER = ("w_q", "w_k", "w_v", "w_o", "attn_norm", "w_gate", "w_up", "w_down", "ffn_norm")
Weights = Mapping[str, np.ndarray]


def forward(config: Config, weights: Weights, input_ids: npt.ArrayLike, **marks: Any) -> tuple[np.ndarray, Any]:
    """Return hidden (N, C), the input of the head, for ids (B, T); and what `backward` reads."""
    ids = as_ids(input_ids, config)  # (B, T)
    check_ids(ids, input_ids, config)
    (B, T), H, G, eps = ids.shape, config.num_heads, config.num_kv_heads, config.norm_eps
    starts = segment_starts((B, T), **marks).ravel()  # (N,): first position of its row that a token sees; 0 if unmarked
    positions = np.tile(np.arange(T), B) - starts  # (N,): counted from there
    cos, sin = rope_table(T, config.resolved_head_dim, config.rope_theta, np.float64)  # (T, D/2) each
    x = embedding_forward_ref(ids.ravel(), weights["token_embedding"])  # (N, C)
    layers = []
    for i in range(config.num_layers):
        w_q, w_k, w_v, w_o, attn_norm, w_gate, w_up, w_down, ffn_norm = (weights[f"layers.{i}.{w}"] for w in LAYER)
        n_attn, r_attn = rms_norm_forward_ref(x, attn_norm, eps)  # (N, C), and 1/rms (N,)
        q = rope_forward_ref(n_attn @ w_q.T, cos, sin, positions, H)  # (N, H D)
        k = rope_forward_ref(n_attn @ w_k.T, cos, sin, positions, G)  # (N, G D)
        v = n_attn @ w_v.T  # (N, G D)
        att, _ = attention_forward_ref(q, k, v, starts, B, H, G)  # (N, H D)
        middle = x + att @ w_o.T  # (N, C)
        n_ffn, r_ffn = rms_norm_forward_ref(middle, ffn_norm, eps)  # (N, C), and 1/rms (N,)
        gate_up = np.concatenate((n_ffn @ w_gate.T, n_ffn @ w_up.T), axis=1)  # (N, 2F)
        h = swiglu_forward_ref(gate_up)  # (N, F)
        layers.append((x, n_attn, r_attn, q, k, v, att, middle, n_ffn, r_ffn, gate_up, h))
        x = middle + h @ w_down.T  # (N, C)
    hidden, r_final = rms_norm_forward_ref(x, weights["final_norm"], eps)  # (N, C), and 1/rms (N,)
    return hidden, (ids, starts, positions, cos, sin, layers, x, r_final)


def backward(config: Config, weights: Weights, dhidden: np.ndarray, saved: Any) -> dict[str, np.ndarray]:
    """Return the gradients by name, all but the head's, for dhidden (N, C) and what `forward` saved."""
    ids, starts, positions, cos, sin, layers, x, r_final = saved
    B, H, G, gradients = len(ids), config.num_heads, config.num_kv_heads, {}
    # forward: hidden = rms_norm(x)
    dx, gradients["final_norm"] = rms_norm_backward_ref(dhidden, x, weights["final_norm"], r_final)  # (N, C), (C,)
    for i in reversed(range(config.num_layers)):
        w_q, w_k, w_v, w_o, attn_norm, w_gate, w_up, w_down, ffn_norm = (weights[f"layers.{i}.{w}"] for w in LAYER)
        x, n_attn, r_attn, q, k, v, att, middle, n_ffn, r_ffn, gate_up, h = layers[i]
        # forward: x = middle + h w_downᵀ; dx is also the first share of dmiddle
        dh, dw_down = dx @ w_down, dx.T @ h  # (N, F), (C, F)
        # forward: h = swiglu(gate_up)
        dgate, dup = np.split(swiglu_backward_ref(dh, gate_up), 2, axis=1)  # (N, F) each
        # forward: gate_up = [n_ffn w_gateᵀ, n_ffn w_upᵀ]
        dw_gate, dw_up = dgate.T @ n_ffn, dup.T @ n_ffn  # (F, C) each
        dn_ffn = dgate @ w_gate + dup @ w_up  # (N, C)
        # forward: n_ffn = rms_norm(middle)
        share, dffn_norm = rms_norm_backward_ref(dn_ffn, middle, ffn_norm, r_ffn)  # (N, C), (C,)
        dmiddle = dx + share  # (N, C)
        # forward: middle = x + att w_oᵀ; dmiddle is also the first share of the next dx
        datt, dw_o = dmiddle @ w_o, dmiddle.T @ att  # (N, H D), (C, H D)
        # forward: att = attention(q, k, v)
        dq, dk, dv = attention_backward_ref(datt, q, k, v, starts, B, H, G)  # (N, H D), (N, G D), (N, G D)
        # forward: q = rope(n_attn w_qᵀ), k = rope(n_attn w_kᵀ), v = n_attn w_vᵀ
        dq = rope_backward_ref(dq, cos, sin, positions, H)  # (N, H D)
        dk = rope_backward_ref(dk, cos, sin, positions, G)  # (N, G D)
        dw_q, dw_k, dw_v = dq.T @ n_attn, dk.T @ n_attn, dv.T @ n_attn  # (H D, C), (G D, C), (G D, C)
        dn_attn = dq @ w_q + dk @ w_k + dv @ w_v  # (N, C)
        # forward: n_attn = rms_norm(x)
        share, dattn_norm = rms_norm_backward_ref(dn_attn, x, attn_norm, r_attn)  # (N, C), (C,)
        dx = dmiddle + share  # (N, C)
        found = dw_q, dw_k, dw_v, dw_o, dattn_norm, dw_gate, dw_up, dw_down, dffn_norm
        gradients |= {f"layers.{i}.{w}": dw for w, dw in zip(LAYER, found, strict=True)}
    # forward: x = token_embedding[ids]
    gradients["token_embedding"] = embedding_backward_ref(dx, ids.ravel(), config.vocab_size)  # (V, C)
    return gradients


def _forward_and_head(
    config: Config, weights: Weights, input_ids: Any, labels: Any, *, label_smoothing: float = 0.0, **marks: Any
) -> tuple[float, np.ndarray, np.ndarray, Any]:
    """Return the mean loss, its gradients dhidden (N, C) and dhead (V, C), and what `forward` saved."""
    hidden, saved = forward(config, weights, input_ids, **marks)
    targets = as_labels(labels, saved[0].shape, config).ravel()  # (N,)
    count = max(int(np.count_nonzero(targets >= 0)), 1)
    # losses (N,) = cross_entropy(hidden headᵀ, targets), 0 where the label does not count
    losses, _, dhidden, dhead = head_loss_ref(hidden, weights[head_name(config)], targets, 1 / count, label_smoothing)
    return float(losses.sum() / count), dhidden, dhead, saved


def loss_and_gradients(
    config: Config, weights: Weights, input_ids: npt.ArrayLike, labels: npt.ArrayLike, **options: Any
) -> tuple[float, dict[str, np.ndarray]]:
    """Return the mean loss over the labels that count, 0 if none does, and its gradient by each tensor of `weights`."""
    weights, head = widened(weights), head_name(config)
    value, dhidden, dhead, saved = _forward_and_head(config, weights, input_ids, labels, **options)
    gradients = backward(config, weights, dhidden, saved)
    gradients[head] = gradients.get(head, 0) + dhead  # tied: one matrix with two uses, and the sum of two gradients
    return value, {name: gradients[name] for name in weights}


def loss(config: Config, weights: Weights, input_ids: npt.ArrayLike, labels: npt.ArrayLike, **options: Any) -> float:
    """Return that loss alone."""
    return _forward_and_head(config, widened(weights), input_ids, labels, **options)[0]


def logits(config: Config, weights: Weights, input_ids: npt.ArrayLike, **marks: Any) -> np.ndarray:
    """Return the logits (B, T, V)."""
    weights = widened(weights)
    hidden, (ids, *_) = forward(config, weights, input_ids, **marks)
    return (hidden @ weights[head_name(config)].T).reshape(*ids.shape, config.vocab_size)


def widened(weights: Weights) -> dict[str, np.ndarray]:
    """Return the weights in float64, by name; those that are in it are not copied."""
    return {name: np.asarray(w, np.float64) for name, w in weights.items()}
