"""Qwen2: Llama with biases on the queries, keys and values.

In flat order the biases of a block come after w_v, so w_q w_k w_v are neighbours, and one product.  config.json has no
entry that says so: `Qwen2Attention` of the Transformers library always has them, and has no other width of a head than
hidden_size / num_attention_heads unless `head_dim` gives it.  A sliding window is refused, unless `use_sliding_window`
switches it off, which is its default.

Source: Yang et al. 2024, "Qwen2 Technical Report", section 2.2.1.
"""

from collections.abc import Mapping
from functools import partial
from typing import Any

from ..shape import ModelShape
from . import llama
from .config_json import NEUTRAL, common_fields, refuse_others, refuse_windows, rope_theta
from .family import Family

__all__ = ["FAMILY"]

DEFAULTS = {"use_sliding_window": False, "num_key_value_heads": 32, "max_position_embeddings": 32768}  # of Qwen2Config
ONLY = {**NEUTRAL, "attention_bias": (True,), "qkv_bias": (True,), "use_qkv_bias": (True,)}


def _read(content: Mapping[str, Any], place: str) -> dict[str, Any]:
    content = {**DEFAULTS, **content}
    refuse_others(content, ONLY, place)
    refuse_windows(content, place)
    return {**common_fields(content, place), "rope_theta": rope_theta(content, place)}


def _write(shape: ModelShape) -> dict[str, Any]:
    """Return the fields of the Transformers library's `Qwen2Config` for this model."""
    shared = {name: value for name, value in llama.write(shape).items() if name not in ("attention_bias", "mlp_bias")}
    return {**shared, "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "use_sliding_window": False}


FAMILY = Family(
    names=llama.NAMES | llama.BIASES,
    layers=partial(llama.decoder_layers, qkv_bias=True),
    model_types=("qwen2",),
    read=_read,
    write=_write,
)
