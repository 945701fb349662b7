"""Qwen2: Llama with biases on the queries, keys and values.

In flat order the biases of a block come after w_v, so w_q w_k w_v are neighbours, and one product.  config.json has no
entry that says so: `Qwen2Attention` of the Transformers library always has them, and has no other width of a head than
hidden_size / num_attention_heads unless `head_dim` gives it.  A sliding window acts where `use_sliding_window` switches
it on, in the blocks that `layer_types` names, or from block `max_window_layers` on.

Source: Yang et al. 2024, "Qwen2 Technical Report", section 2.2.1.
"""

from collections.abc import Mapping
from functools import partial
from typing import Any

from ..errors import ConfigError
from ..shape import ModelShape
from . import llama
from .config_json import NEUTRAL, common_fields, refuse_others, window_fields, write_windows
from .config_rope import rope_fields
from .family import Family
from .gguf_keys import Gguf, Keys, refuse_window
from .gguf_keys import common_fields as common_keys
from .gguf_keys import write_common as write_common_keys
from .gguf_rope import rope_fields as rope_keys
from .gguf_rope import write_rope as write_rope_keys

__all__ = ["FAMILY"]

DEFAULTS = {  # of Qwen2Config
    "use_sliding_window": False,
    "sliding_window": 4096,
    "num_key_value_heads": 32,
    "max_position_embeddings": 32768,
}
ONLY = {**NEUTRAL, "attention_bias": (True,), "qkv_bias": (True,), "use_qkv_bias": (True,)}


def _read(content: Mapping[str, Any], place: str) -> dict[str, Any]:
    content = {**DEFAULTS, **content}
    refuse_others(content, ONLY, place)
    fields = {**common_fields(content, place), **rope_fields(content, place)}
    return {**fields, **window_fields(content, place, chosen=True)}


def _write(shape: ModelShape) -> dict[str, Any]:
    """Return the fields of the Transformers library's `Qwen2Config` for this model."""
    shared = {name: value for name, value in llama.write(shape).items() if name not in ("attention_bias", "mlp_bias")}
    return {**shared, "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", **write_windows(shape)}


ARCHITECTURE = "qwen2"


def _read_gguf(keys: Keys) -> dict[str, Any]:
    fields = common_keys(keys)
    if fields["head_dim"] is not None:
        raise keys.wrong("attention.key_length", "it must be embedding_length / attention.head_count")
    head_dim = fields["hidden_dim"] // max(fields["num_heads"], 1)
    return {**fields, **rope_keys(keys, head_dim, fields["max_seq_len"])}


def _write_gguf(shape: ModelShape) -> dict[str, Any]:
    """Return the entries of a GGUF file."""
    refuse_window(ARCHITECTURE, shape)
    if shape.q_dim != shape.hidden_dim:
        raise ConfigError(
            f"head_dim ({shape.resolved_head_dim}) cannot be written as GGUF: llama.cpp computes the architecture "
            f"{ARCHITECTURE} with hidden_dim / num_heads alone; export a Hugging Face folder"
        )
    return {**write_common_keys(shape), **write_rope_keys(ARCHITECTURE, shape)}


FAMILY = Family(
    names=llama.NAMES | llama.BIASES,
    layers=partial(llama.decoder_layers, qkv_bias=True),
    model_types=("qwen2",),
    read=_read,
    write=_write,
    gguf=Gguf(architecture=ARCHITECTURE, read=_read_gguf, write=_write_gguf),
)
