"""Mistral: Llama with a sliding window in every block, where config.json has one; null stands for none.

Without the entry `sliding_window`, config.json means 4096, as `MistralConfig` of the Transformers library has it.

Source: Jiang et al. 2023, "Mistral 7B", section 2.
"""

from collections.abc import Mapping
from typing import Any

from ..shape import ModelShape
from . import llama
from .config_json import NEUTRAL, common_fields, refuse_others, window_fields
from .config_rope import rope_fields
from .family import Family
from .gguf_keys import Gguf, refuse_window

__all__ = ["FAMILY"]

DEFAULTS = {"sliding_window": 4096, "num_key_value_heads": 8, "max_position_embeddings": 4096 * 32}  # of MistralConfig


def _read(content: Mapping[str, Any], place: str) -> dict[str, Any]:
    content = {**DEFAULTS, **content}
    refuse_others(content, NEUTRAL, place)
    fields = {**common_fields(content, place), **rope_fields(content, place)}
    return {**fields, **window_fields(content, place, chosen=False)}


def _write(shape: ModelShape) -> dict[str, Any]:
    """Return the fields of the Transformers library's `MistralConfig` for this model."""
    shared = {name: value for name, value in llama.write(shape).items() if name not in ("attention_bias", "mlp_bias")}
    own = {"architectures": ["MistralForCausalLM"], "model_type": "mistral", "sliding_window": shape.sliding_window}
    return {**shared, **own}


def _write_gguf(shape: ModelShape) -> dict[str, Any]:
    """Return the entries of a GGUF file, which is read as a Llama: without a window they are one."""
    refuse_window(llama.ARCHITECTURE, shape)
    return llama.write_gguf(shape)


FAMILY = Family(
    names=llama.NAMES,
    layers=llama.decoder_layers,
    model_types=("mistral",),
    read=_read,
    write=_write,
    gguf=Gguf(architecture=llama.ARCHITECTURE, write=_write_gguf, permuted=True),
)
