"""One transformer block: two residual branches, forward and backward, one call to a line.

    middle = x + attention(rms_norm(x)) w_oᵀ            attention on RoPE(n w_qᵀ), RoPE(n w_kᵀ), n w_vᵀ
    out    = middle + swiglu(rms_norm(middle)) w_downᵀ    swiglu: silu(n w_gateᵀ) * (n w_upᵀ)

w_q, w_k and w_v are next to each other, and one product; so are w_gate and w_up.  What is cheap to compute again
(the normed rows, the SwiGLU output) is not saved.  In bfloat16, q k v and gate_up are saved rounded, and what
follows reads them rounded, in forward and in backward.  The products are those of `linear.py`, where an adapter adds
its own.
"""

from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import numpy as np

from ..config import TrainableModelConfig
from ..kernels.unchecked import (
    attention_backward,
    attention_forward,
    rms_norm_backward,
    rms_norm_forward,
    rope_backward,
    rope_forward,
    rope_forward_rounded,
    swiglu_backward,
    swiglu_forward,
    swiglu_forward_rounded,
)
from ..parameters import Parameters
from .inputs import Layout
from .linear import Adapter, Linear, inner_gradient, input_gradient, linear_backward, linear_forward, weight_gradients

__all__ = ["BlockGradients", "BlockWeights", "attention_branch", "block_backward", "block_forward"]


class BlockWeights:
    """The weights of one block, with the adapters on its linear layers."""

    def __init__(self, parameters: Parameters, layer: int, adapters: Mapping[str, Adapter]) -> None:
        """Take views of the model's weights; adapters by the names qkv, o, gate_up and down."""
        at, weights = f"layers.{layer}.", parameters.weights
        qkv = parameters.joined_weights(at + "w_q", at + "w_v")  # (q_dim + 2 kv_dim, C)
        gate_up = parameters.joined_weights(at + "w_gate", at + "w_up")  # (2F, C)
        self.qkv = Linear(qkv, adapters.get("qkv"))
        self.w_o = Linear(weights[at + "w_o"], adapters.get("o"))
        self.attn_norm = weights[at + "attn_norm"]
        self.gate_up = Linear(gate_up, adapters.get("gate_up"))
        self.w_down = Linear(weights[at + "w_down"], adapters.get("down"))
        self.ffn_norm = weights[at + "ffn_norm"]


class BlockGradients:
    """The gradients of one block's weights; None for matrices that are frozen."""

    def __init__(self, parameters: Parameters, layer: int) -> None:
        """Take views of the model's gradients."""
        at, gradients = f"layers.{layer}.", parameters.gradients
        self.qkv: np.ndarray | None = parameters.joined_gradients(at + "w_q", at + "w_v")
        self.w_o: np.ndarray | None = gradients[at + "w_o"]
        self.attn_norm = gradients[at + "attn_norm"]
        self.gate_up: np.ndarray | None = parameters.joined_gradients(at + "w_gate", at + "w_up")
        self.w_down: np.ndarray | None = gradients[at + "w_down"]
        self.ffn_norm = gradients[at + "ffn_norm"]

    @classmethod
    def frozen(cls, unread: np.ndarray) -> "BlockGradients":
        """Return those of a frozen block; `unread` (C,) takes what the kernel of the norms writes all the same."""
        made = cls.__new__(cls)
        made.qkv = made.w_o = made.gate_up = made.w_down = None
        made.attn_norm = made.ffn_norm = unread
        return made


def attention_branch(w: BlockWeights, a: Any, s: Any, layout: Layout, config: TrainableModelConfig) -> None:
    """Compute what the attention branch saves: a.r_attn, a.qkv, a.att and a.lse from a.x."""
    heads, kv_heads = config.num_heads, config.num_kv_heads
    rms_norm_forward(s.n, a.r_attn, a.x, w.attn_norm, config.norm_eps)
    qkv = s.qkv if layout.narrow else a.qkv
    linear_forward(qkv, s.n, w.qkv, a.u_qkv, s, layout)
    angles = layout.cos, layout.sin, layout.positions, heads + kv_heads
    if layout.narrow:
        rope_forward_rounded(a.qkv, qkv, *angles)
    else:
        rope_forward(qkv, *angles)
    attention_forward(a.att, a.lse, a.q, a.k, a.v, layout.starts, layout.batch, heads, kv_heads)


def block_forward(
    out: np.ndarray,
    w: BlockWeights,
    a: SimpleNamespace,
    s: SimpleNamespace,
    layout: Layout,
    config: TrainableModelConfig,
) -> None:
    """Write out (N, C) from a.x (N, C), and fill the rest of the block's saved arrays a; s is scratch."""
    attention_branch(w, a, s, layout, config)
    linear_forward(a.middle, a.att, w.w_o, a.u_o, s, layout, addend=a.x)
    rms_norm_forward(s.n, a.r_ffn, a.middle, w.ffn_norm, config.norm_eps)
    gate_up = s.gate_up if layout.narrow else a.gate_up
    linear_forward(gate_up, s.n, w.gate_up, a.u_gate_up, s, layout)
    if layout.narrow:
        swiglu_forward_rounded(s.h, a.gate_up, gate_up)
    else:
        swiglu_forward(s.h, gate_up)
    linear_forward(out, s.h, w.w_down, a.u_down, s, layout, addend=a.middle)


def block_backward(
    dx: np.ndarray,
    dw: BlockGradients,
    w: BlockWeights,
    a: SimpleNamespace,
    s: SimpleNamespace,
    layout: Layout,
    config: TrainableModelConfig,
    accumulate: bool,
    dx_wanted: bool = True,
) -> None:
    """Turn dx (N, C) from the gradient of the block's output into that of its input, in place.

    Matrix gradients are added to if `accumulate`, else overwritten; norm gradients are always added to.  Where nothing
    below the block is trained, dx is not wanted and is left unfinished.
    """
    # forward: out = middle + h w_downᵀ, h = swiglu(gate_up); s.h has the place of s.dh, and swiglu_backward fills it
    inner_gradient(dx, w.w_down, a.u_down, s, layout)
    input_gradient(s.dh, dx, w.w_down, a.u_down, s, layout)
    swiglu_backward(s.dgate_up, s.dh, a.gate_up)
    weight_gradients(dw.w_down, dx, s.h, w.w_down, a.u_down, s, layout, accumulate)
    # forward: gate_up = n gate_upᵀ, n = rms_norm(middle)
    rms_norm_forward(s.n, a.r_ffn, a.middle, w.ffn_norm, config.norm_eps)
    linear_backward(s.dn, dw.gate_up, s.dgate_up, s.n, w.gate_up, a.u_gate_up, s, layout, accumulate)
    rms_norm_backward(dx, dw.ffn_norm, s.dn, a.middle, w.ffn_norm, a.r_ffn, True)
    # forward: middle = x + att w_oᵀ
    linear_backward(s.datt, dw.w_o, dx, a.att, w.w_o, a.u_o, s, layout, accumulate)
    # forward: att = attention(RoPE(q), RoPE(k), v)
    heads, kv_heads = config.num_heads, config.num_kv_heads
    saved = a.q, a.k, a.v, a.att, a.lse, s.delta, layout.starts, layout.batch, heads, kv_heads
    attention_backward(s.dq, s.dk, s.dv, s.datt, *saved)
    rope_backward(s.dqkv, layout.cos, layout.sin, layout.positions, heads + kv_heads)
    # forward: qkv = n qkvᵀ, n = rms_norm(x)
    rms_norm_forward(s.n, a.r_attn, a.x, w.attn_norm, config.norm_eps)
    dn = s.dn if dx_wanted else None
    linear_backward(dn, dw.qkv, s.dqkv, s.n, w.qkv, a.u_qkv, s, layout, accumulate)
    if dx_wanted:
        rms_norm_backward(dx, dw.attn_norm, s.dn, a.x, w.attn_norm, a.r_attn, True)
