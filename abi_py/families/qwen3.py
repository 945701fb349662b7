"""Qwen3: Llama with norms of the heads of q and k before they are rotated, and a width of a head of its own.

`Qwen3Attention` of the Transformers library norms each head over head_dim with one weight for all heads, and has biases
on q, k, v and o where `attention_bias` is true; without `head_dim`, config.json means 128.

Source: Qwen Team 2025, "Qwen3 Technical Report", section 2.
"""

from collections.abc import Mapping
from functools import partial
from typing import Any

from ..shape import ModelShape
from . import llama
from .config_json import NEUTRAL, attention_bias, common_fields, refuse_others, window_fields, write_windows
from .config_rope import rope_fields
from .family import Family
from .gguf_keys import Gguf, Keys, refuse, refuse_window, write_head_dim
from .gguf_keys import common_fields as common_keys
from .gguf_keys import write_common as write_common_keys
from .gguf_rope import rope_fields as rope_keys
from .gguf_rope import write_rope as write_rope_keys

__all__ = ["DEFAULTS", "FAMILY", "NAMES", "NO_BIAS", "ONLY", "read_gguf", "write", "write_gguf"]

NAMES = {
    **llama.NAMES,
    **llama.BIASES,
    "layers.{i}.q_norm": ("model.layers.{i}.self_attn.q_norm.weight", "blk.{i}.attn_q_norm.weight"),
    "layers.{i}.k_norm": ("model.layers.{i}.self_attn.k_norm.weight", "blk.{i}.attn_k_norm.weight"),
}
DEFAULTS = {  # of Qwen3Config
    "use_sliding_window": False,
    "sliding_window": 4096,
    "num_key_value_heads": 32,
    "head_dim": 128,
    "max_position_embeddings": 32768,
}
NORMS = dict.fromkeys(("qk_norm", "use_qk_norm", "qk_layernorm"), (True,))
ONLY = {**NEUTRAL, **NORMS, "attention_bias": (True, False)}


def _read(content: Mapping[str, Any], place: str) -> dict[str, Any]:
    content = {**DEFAULTS, **content}
    refuse_others(content, ONLY, place)
    fields = {**common_fields(content, place), **rope_fields(content, place), **attention_bias(content)}
    return {**fields, **window_fields(content, place, chosen=True)}


def write(shape: ModelShape) -> dict[str, Any]:
    """Return the fields of the Transformers library's `Qwen3Config` for this model."""
    shared = {name: value for name, value in llama.write(shape).items() if name != "mlp_bias"}
    return {**shared, "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", **write_windows(shape)}


NO_BIAS = "llama.cpp has no bias of attn_output there"


def read_gguf(keys: Keys) -> dict[str, Any]:
    """Return the fields of the shape that a GGUF file describes."""
    fields = common_keys(keys)
    head_dim = fields["head_dim"] or fields["hidden_dim"] // max(fields["num_heads"], 1)
    return {**fields, **rope_keys(keys, head_dim, fields["max_seq_len"])}


def write_gguf(architecture: str, shape: ModelShape) -> dict[str, Any]:
    """Return the entries of a GGUF file."""
    refuse_window(architecture, shape)
    refuse(architecture, shape, attention_bias=NO_BIAS)
    return {**write_common_keys(shape), **write_rope_keys(architecture, shape), **write_head_dim(shape)}


FAMILY = Family(
    names=NAMES,
    layers=partial(llama.decoder_layers, qk_norm=True),
    model_types=("qwen3",),
    read=_read,
    write=write,
    gguf=Gguf(architecture="qwen3", read=read_gguf, write=partial(write_gguf, "qwen3")),
)
