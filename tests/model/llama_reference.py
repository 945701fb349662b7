"""The model in plain NumPy: the references of the kernels, one after the other, in float64.

It gives a loss that finite differences can be taken of, which float32 is too coarse for.
"""

import numpy as np

from abi_py.config import TrainableModelConfig
from abi_py.kernels.attention import attention_forward_ref
from abi_py.kernels.cross_entropy import head_loss_ref
from abi_py.kernels.rms_norm import rms_norm_forward_ref
from abi_py.kernels.rope import rope_forward_ref
from abi_py.kernels.swiglu import swiglu_forward_ref
from abi_py.model import TrainableModel

TINY = {
    "hidden_dim": 48,
    "num_layers": 2,
    "num_heads": 4,
    "num_kv_heads": 2,
    "intermediate_dim": 80,
    "vocab_size": 97,
    "max_seq_len": 32,
}


def make_model(size=1.0, **changes):
    """Return a small model whose matrices are `size` times as large as fresh ones, and whose norms are not 1."""
    model = TrainableModel(TrainableModelConfig(**(TINY | changes)))
    rng = np.random.default_rng(7)
    for name, w in model.weights.items():
        if w.ndim == 1:
            model.weights[name] = 1 + 0.2 * rng.standard_normal(w.shape)
        else:
            w *= np.float32(size)
    return model


def make_batch(rng, model, batch=2, time=13, ignored=0.2):
    """Return ids and labels (B, T) int32; some labels do not count, but the first does."""
    ids, labels = rng.integers(0, model.config.vocab_size, (2, batch, time)).astype(np.int32)
    labels.ravel()[1:][rng.random(batch * time - 1) < ignored] = -100
    return ids, labels


def wide(model):
    """Return the weights by name in float64."""
    return {name: w.astype(np.float64) for name, w in model.weights.items()}


def loss_ref(config, weights, ids, labels, starts=None, smoothing=0.0):
    """Return the mean loss of ids, labels (B, T); starts (B, T) is where each token's segment began, by default 0."""
    (B, T), H, G, D = ids.shape, config.num_heads, config.num_kv_heads, config.resolved_head_dim
    starts = np.zeros((B, T), np.int32) if starts is None else starts
    positions = (np.arange(T) - starts).ravel()
    angles = np.arange(T)[:, None] / config.rope_theta ** (np.arange(0, D, 2) / D)
    table = np.cos(angles), np.sin(angles)
    x = weights["token_embedding"][ids.ravel()]
    for i in range(config.num_layers):
        w = {name: weights[f"layers.{i}.{name}"] for name in ("w_q", "w_k", "w_v", "w_o", "w_gate", "w_up", "w_down")}
        n, _ = rms_norm_forward_ref(x, weights[f"layers.{i}.attn_norm"], config.norm_eps)
        q = rope_forward_ref(n @ w["w_q"].T, *table, positions, H)
        k = rope_forward_ref(n @ w["w_k"].T, *table, positions, G)
        o, _ = attention_forward_ref(q, k, n @ w["w_v"].T, starts.ravel(), B, H, G)
        x = x + o @ w["w_o"].T
        n, _ = rms_norm_forward_ref(x, weights[f"layers.{i}.ffn_norm"], config.norm_eps)
        x = x + swiglu_forward_ref(np.concatenate([n @ w["w_gate"].T, n @ w["w_up"].T], axis=1)) @ w["w_down"].T
    hidden, _ = rms_norm_forward_ref(x, weights["final_norm"], config.norm_eps)
    head = weights.get("output_proj", weights["token_embedding"])
    losses = head_loss_ref(hidden, head, labels.ravel(), 1.0, smoothing)[0]
    return losses.sum() / max((labels >= 0).sum(), 1)
