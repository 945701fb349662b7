"""One transformer block: two residual branches, forward and backward, one kernel call to a line.

    middle = x + attention(rms_norm(x)) w_oᵀ            attention on RoPE(n w_qᵀ), RoPE(n w_kᵀ), n w_vᵀ
    out    = middle + swiglu(rms_norm(middle)) w_downᵀ    swiglu: silu(n w_gateᵀ) * (n w_upᵀ)

w_q, w_k and w_v lie next to each other and are one product; so are w_gate and w_up.  What is cheap to compute again
(the normed rows, the SwiGLU output) is not saved.  In bfloat16, q k v and gate_up are saved rounded, and what
follows reads them rounded, in forward and in backward.
"""

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np

from ..config import TrainableModelConfig
from ..kernels.attention import attention_backward, attention_forward
from ..kernels.matmul import product
from ..kernels.panels import BFLOAT16, FLOAT32
from ..kernels.rms_norm import rms_norm_backward, rms_norm_forward
from ..kernels.rope import rope_backward, rope_forward, rope_forward_rounded
from ..kernels.swiglu import swiglu_backward, swiglu_forward, swiglu_forward_rounded
from ..parameters import Parameters, Views

__all__ = ["BlockTensors", "Layout", "attention_branch", "block_backward", "block_forward"]


@dataclass(frozen=True)
class Layout:
    """What kernels need to know about the rows of a batch: N = batch * T."""

    batch: int
    starts: np.ndarray  # (N,) int32: first position of its sample that a row sees
    positions: np.ndarray  # (N,) int32: position of a row within its segment
    cos: np.ndarray  # (max_seq_len, D/2)
    sin: np.ndarray
    numbers: Any = FLOAT32  # what the products of linear layers multiply: a constant of kernels.panels

    @property
    def narrow(self) -> bool:
        """Say whether activations are saved in bfloat16."""
        return self.numbers is BFLOAT16


class BlockTensors:
    """The weights, or the gradients, of one block."""

    def __init__(self, parameters: Parameters, layer: int, views: Views, flat: np.ndarray) -> None:
        at = f"layers.{layer}."
        self.qkv = parameters.joined(flat, at + "w_q", at + "w_v")  # (q_dim + 2 kv_dim, C)
        self.w_o = views[at + "w_o"]
        self.attn_norm = views[at + "attn_norm"]
        self.gate_up = parameters.joined(flat, at + "w_gate", at + "w_up")  # (2F, C)
        self.w_down = views[at + "w_down"]
        self.ffn_norm = views[at + "ffn_norm"]


def _split(qkv: np.ndarray, config: TrainableModelConfig) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    q, kv = config.q_dim, config.kv_dim
    return qkv[:, :q], qkv[:, q : q + kv], qkv[:, q + kv :]


def attention_branch(w: BlockTensors, a: Any, s: Any, layout: Layout, config: TrainableModelConfig) -> None:
    """Compute what the attention branch saves: a.r_attn, a.qkv, a.att and a.lse from a.x."""
    heads, kv_heads = config.num_heads, config.num_kv_heads
    rms_norm_forward(s.n, a.r_attn, a.x, w.attn_norm, config.norm_eps)
    qkv = s.qkv if layout.narrow else a.qkv
    product(qkv, s.n, w.qkv, transpose_b=True, numbers=layout.numbers)
    angles = layout.cos, layout.sin, layout.positions, heads + kv_heads
    if layout.narrow:
        rope_forward_rounded(a.qkv, qkv, *angles)
    else:
        rope_forward(qkv, *angles)
    attention_forward(a.att, a.lse, *_split(a.qkv, config), layout.starts, layout.batch, heads, kv_heads)


def block_forward(
    out: np.ndarray,
    w: BlockTensors,
    a: SimpleNamespace,
    s: SimpleNamespace,
    layout: Layout,
    config: TrainableModelConfig,
) -> None:
    """Write out (N, C) from a.x (N, C), and fill the rest of the block's saved arrays a; s is scratch."""
    attention_branch(w, a, s, layout, config)
    product(a.middle, a.att, w.w_o, transpose_b=True, addend=a.x, numbers=layout.numbers)
    rms_norm_forward(s.n, a.r_ffn, a.middle, w.ffn_norm, config.norm_eps)
    gate_up = s.gate_up if layout.narrow else a.gate_up
    product(gate_up, s.n, w.gate_up, transpose_b=True, numbers=layout.numbers)
    if layout.narrow:
        swiglu_forward_rounded(s.h, a.gate_up, gate_up)
    else:
        swiglu_forward(s.h, gate_up)
    product(out, s.h, w.w_down, transpose_b=True, addend=a.middle, numbers=layout.numbers)


def block_backward(
    dx: np.ndarray,
    dw: BlockTensors,
    w: BlockTensors,
    a: SimpleNamespace,
    s: SimpleNamespace,
    layout: Layout,
    config: TrainableModelConfig,
    accumulate: bool,
) -> None:
    """Turn dx (N, C) from the gradient of the block's output into that of its input, in place.

    Matrix gradients are added to if `accumulate`, else overwritten; norm gradients are always added to.
    """

    def weight_gradient(target: np.ndarray, dy: np.ndarray, x: np.ndarray) -> None:
        base = target if accumulate else None
        product(target, dy, x, transpose_a=True, addend=base, numbers=layout.numbers)

    # forward: out = middle + h w_downᵀ, h = swiglu(gate_up)
    swiglu_forward(s.h, a.gate_up)
    weight_gradient(dw.w_down, dx, s.h)
    product(s.dh, dx, w.w_down, numbers=layout.numbers)
    swiglu_backward(s.dgate_up, s.dh, a.gate_up)
    # forward: gate_up = n gate_upᵀ, n = rms_norm(middle)
    rms_norm_forward(s.n, a.r_ffn, a.middle, w.ffn_norm, config.norm_eps)
    weight_gradient(dw.gate_up, s.dgate_up, s.n)
    product(s.dn, s.dgate_up, w.gate_up, numbers=layout.numbers)
    rms_norm_backward(dx, dw.ffn_norm, s.dn, a.middle, w.ffn_norm, a.r_ffn, True)
    # forward: middle = x + att w_oᵀ
    weight_gradient(dw.w_o, dx, a.att)
    product(s.datt, dx, w.w_o, numbers=layout.numbers)
    # forward: att = attention(RoPE(q), RoPE(k), v)
    heads, kv_heads = config.num_heads, config.num_kv_heads
    attention_backward(
        *_split(s.dqkv, config),
        s.datt,
        *_split(a.qkv, config),
        a.att,
        a.lse,
        s.delta,
        layout.starts,
        layout.batch,
        heads,
        kv_heads,
    )
    rope_backward(s.dqkv, layout.cos, layout.sin, layout.positions, heads + kv_heads)
    # forward: qkv = n qkvᵀ, n = rms_norm(x)
    rms_norm_forward(s.n, a.r_attn, a.x, w.attn_norm, config.norm_eps)
    weight_gradient(dw.qkv, s.dqkv, s.n)
    product(s.dn, s.dqkv, w.qkv, numbers=layout.numbers)
    rms_norm_backward(dx, dw.attn_norm, s.dn, a.x, w.attn_norm, a.r_attn, True)
