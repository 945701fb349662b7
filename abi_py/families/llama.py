"""Llama: RMSNorm, rotated queries and keys, grouped key/value heads, SwiGLU; biases on attention if asked for.

    reads    model_type llama, and the DeepZig folder's `deepzig_conversational`, which is the same network
    refuses  what would compute something else than this package: other activations, biases of the feed-forward ...

The order of the tensors is the ABI's.  Sources: Touvron et al. 2023, "LLaMA", section 2.2; "Llama 2", section 2.2.
"""

from collections.abc import Mapping
from typing import Any

from ..formats.gguf.values import U32
from ..model.layers.attention import Attention
from ..model.layers.embedding import Embedding
from ..model.layers.feed_forward import FeedForward
from ..model.layers.head import Head
from ..model.layers.layer import Layer
from ..model.layers.norm import RmsNorm
from ..model.layers.run import Angles
from ..shape import ModelShape
from .config_json import NEUTRAL, attention_bias, common_fields, refuse_others, refuse_windows
from .config_rope import rope_fields, write_rope
from .family import Family
from .gguf_keys import Gguf, Keys, write_head_dim
from .gguf_keys import common_fields as common_keys
from .gguf_keys import write_common as write_common_keys
from .gguf_rope import rope_fields as rope_keys
from .gguf_rope import write_rope as write_rope_keys

__all__ = ["ARCHITECTURE", "BIASES", "FAMILY", "NAMES", "decoder_layers", "read_gguf", "write", "write_gguf"]

NAMES = {
    "token_embedding": ("model.embed_tokens.weight", "token_embd.weight"),
    "layers.{i}.w_q": ("model.layers.{i}.self_attn.q_proj.weight", "blk.{i}.attn_q.weight"),
    "layers.{i}.w_k": ("model.layers.{i}.self_attn.k_proj.weight", "blk.{i}.attn_k.weight"),
    "layers.{i}.w_v": ("model.layers.{i}.self_attn.v_proj.weight", "blk.{i}.attn_v.weight"),
    "layers.{i}.w_o": ("model.layers.{i}.self_attn.o_proj.weight", "blk.{i}.attn_output.weight"),
    "layers.{i}.attn_norm": ("model.layers.{i}.input_layernorm.weight", "blk.{i}.attn_norm.weight"),
    "layers.{i}.w_gate": ("model.layers.{i}.mlp.gate_proj.weight", "blk.{i}.ffn_gate.weight"),
    "layers.{i}.w_up": ("model.layers.{i}.mlp.up_proj.weight", "blk.{i}.ffn_up.weight"),
    "layers.{i}.w_down": ("model.layers.{i}.mlp.down_proj.weight", "blk.{i}.ffn_down.weight"),
    "layers.{i}.ffn_norm": ("model.layers.{i}.post_attention_layernorm.weight", "blk.{i}.ffn_norm.weight"),
    "final_norm": ("model.norm.weight", "output_norm.weight"),
    "output_proj": ("lm_head.weight", "output.weight"),
}
GGUF_PARTS = {"q": "attn_q", "k": "attn_k", "v": "attn_v", "o": "attn_output"}
BIASES = {
    f"layers.{{i}}.b_{part}": (f"model.layers.{{i}}.self_attn.{part}_proj.bias", f"blk.{{i}}.{gguf}.bias")
    for part, gguf in GGUF_PARTS.items()
}


def decoder_layers(shape: ModelShape, *, qkv_bias: bool = False, qk_norm: bool = False) -> list[Layer]:
    """Return the list of layers of Llama and its relatives."""
    width, eps = shape.hidden_dim, shape.norm_eps
    heads = shape.num_heads, shape.num_kv_heads, shape.resolved_head_dim
    scaling = shape.rope_scaling.numbers(shape.max_seq_len) if shape.rope_scaling else None
    angles = Angles(shape.resolved_head_dim, shape.rope_theta, shape.max_seq_len, scaling)
    layers: list[Layer] = [Embedding(shape.vocab_size, width, shape.max_seq_len)]
    for i in range(shape.num_layers):
        at = f"layers.{i}."
        layers.append(
            Attention(
                *(at, i, width, *heads, RmsNorm("attn_norm", width, eps), angles),
                qkv_bias=qkv_bias or shape.attention_bias,
                o_bias=shape.attention_bias,
                window=shape.window(i),
                qk_norm=(RmsNorm("q_norm", heads[-1], eps), RmsNorm("k_norm", heads[-1], eps)) if qk_norm else None,
            )
        )
        layers.append(FeedForward(at, i, width, shape.intermediate_dim, RmsNorm("ffn_norm", width, eps)))
    layers.append(Head(RmsNorm("final_norm", width, eps), shape.vocab_size, width, shape.tie_embeddings))
    return layers


def _read(content: Mapping[str, Any], place: str) -> dict[str, Any]:
    refuse_others(content, {**NEUTRAL, "attention_bias": (True, False)}, place)
    refuse_windows(content, place)
    return {**common_fields(content, place), **rope_fields(content, place), **attention_bias(content)}


def write(shape: ModelShape) -> dict[str, Any]:
    """Return the fields of the Transformers library's `LlamaConfig` for this model."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": shape.vocab_size,
        "hidden_size": shape.hidden_dim,
        "intermediate_size": shape.intermediate_dim,
        "num_hidden_layers": shape.num_layers,
        "num_attention_heads": shape.num_heads,
        "num_key_value_heads": shape.num_kv_heads,
        "head_dim": shape.resolved_head_dim,
        "rms_norm_eps": shape.norm_eps,
        **write_rope(shape),
        "tie_word_embeddings": shape.tie_embeddings,
        "hidden_act": "silu",
        "attention_bias": shape.attention_bias,
        "attention_dropout": 0.0,
        "mlp_bias": False,
        "initializer_range": 0.02,
        "bos_token_id": None,
        "eos_token_id": None,
        "torch_dtype": "float32",
        "use_cache": True,
    }


ARCHITECTURE = "llama"  # of llama.cpp, which has it for Mistral and Mixtral too


def read_gguf(keys: Keys) -> dict[str, Any]:
    """Return the fields of the shape that a GGUF file describes."""
    fields = common_keys(keys)
    head_dim = fields["head_dim"] or fields["hidden_dim"] // max(fields["num_heads"], 1)
    biased = "blk.0.attn_q.bias" in keys.tensors
    rope = rope_keys(keys, head_dim, fields["max_seq_len"], divided=True)
    return {**fields, **rope, **({"attention_bias": True} if biased else {})}


def write_gguf(shape: ModelShape) -> dict[str, Any]:
    """Return the entries of a GGUF file."""
    rope = {"rope.dimension_count": U32(shape.resolved_head_dim), **write_rope_keys(ARCHITECTURE, shape, divided=True)}
    return {**write_common_keys(shape), **rope, **write_head_dim(shape)}


FAMILY = Family(
    names=NAMES | BIASES,
    layers=decoder_layers,
    model_types=("llama", "deepzig_conversational"),
    read=_read,
    write=write,
    gguf=Gguf(architecture=ARCHITECTURE, read=read_gguf, write=write_gguf, permuted=True),
)
