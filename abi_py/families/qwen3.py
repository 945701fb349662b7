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

__all__ = ["DEFAULTS", "FAMILY", "NAMES", "ONLY", "write"]

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


FAMILY = Family(
    names=NAMES,
    layers=partial(llama.decoder_layers, qk_norm=True),
    model_types=("qwen3",),
    read=_read,
    write=write,
)
