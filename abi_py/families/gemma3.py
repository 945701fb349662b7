"""Gemma 3, text alone: norms before and after each branch, GeGLU, blocks with a window, whose RoPE has its own base.

    reads    model_type gemma3_text, which is `Gemma3ForCausalLM` of the Transformers library
    refuses  the model of images and text (gemma3), capped scores and logits, attention in both directions ...

All norms multiply by 1 + w, also those of the heads of q and k; embeddings are scaled by the root of their width.
Without `layer_types`, every sixth block sees all keys, or with `sliding_window_pattern` n every n-th.
They turn by `rope_theta`, scaled if asked for; those with the window by `rope_local_base_freq`.

Source: Gemma Team 2025, "Gemma 3 Technical Report", section 2.
"""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from ..errors import CheckpointError, ConfigError, shown
from ..formats.gguf.values import F32, U32
from ..model.layers.activation import Gelu
from ..model.layers.attention import Attention
from ..model.layers.embedding import Embedding
from ..model.layers.feed_forward import FeedForward
from ..model.layers.head import Head
from ..model.layers.layer import Layer
from ..model.layers.norm import RmsNorm
from ..model.layers.run import Angles
from ..shape import MAX_LAYERS, LayerType, ModelShape
from . import llama, qwen3
from .config_json import attention_bias, common_fields, refuse_others, window_fields
from .config_rope import rope_fields
from .family import Family
from .gguf_keys import Gguf, Keys, refuse, write_common, write_head_dim
from .gguf_keys import common_fields as common_keys
from .gguf_rope import rope_fields as rope_keys
from .gguf_rope import write_rope as write_rope_keys

__all__ = ["FAMILY"]

NAMES = {
    **qwen3.NAMES,
    "layers.{i}.attn_norm_after": (
        "model.layers.{i}.post_attention_layernorm.weight",
        "blk.{i}.post_attention_norm.weight",
    ),
    "layers.{i}.ffn_norm": ("model.layers.{i}.pre_feedforward_layernorm.weight", "blk.{i}.ffn_norm.weight"),
    "layers.{i}.ffn_norm_after": (
        "model.layers.{i}.post_feedforward_layernorm.weight",
        "blk.{i}.post_ffw_norm.weight",
    ),
}
DEFAULTS = {  # of Gemma3TextConfig
    "num_key_value_heads": 4,
    "head_dim": 256,
    "max_position_embeddings": 131072,
    "tie_word_embeddings": True,
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
    "sliding_window_pattern": 6,
    "rope_theta": 1e6,
    "rope_local_base_freq": 10000.0,
}
ACTIVATION = "gelu_pytorch_tanh"
ONLY = {
    **{name: values for name, values in qwen3.ONLY.items() if name not in ("query_pre_attn_scalar", "hidden_act")},
    "hidden_activation": (ACTIVATION,),
    "original_max_position_embeddings": (),  # it has no effect beside a RoPE for each kind of block
}


def layers(shape: ModelShape) -> list[Layer]:
    """Return the list of layers."""
    width, head_dim, longest = shape.hidden_dim, shape.resolved_head_dim, shape.max_seq_len
    scaling = shape.rope_scaling.numbers(longest) if shape.rope_scaling else None
    angles = {
        LayerType.FULL: Angles(head_dim, shape.rope_theta, longest, scaling),
        LayerType.SLIDING: Angles(head_dim, shape.rope_local_theta, longest),
    }

    def norm(name: str, size: int = width) -> RmsNorm:
        return RmsNorm(name, size, shape.norm_eps, above_one=True)

    made: list[Layer] = [Embedding(shape.vocab_size, width, longest, scale=math.sqrt(width))]
    for i in range(shape.num_layers):
        at, heads = f"layers.{i}.", (shape.num_heads, shape.num_kv_heads, head_dim)
        made.append(
            Attention(
                *(at, i, width, *heads, norm("attn_norm"), angles[shape.layer_type(i)], shape.attention_bias),
                o_bias=shape.attention_bias,
                qk_norm=(norm("q_norm", head_dim), norm("k_norm", head_dim)),
                window=shape.window(i),
                scale=(shape.query_pre_attn_scalar or head_dim) ** -0.5,
                after=norm("attn_norm_after"),
            )
        )
        feed_forward = at, i, width, shape.intermediate_dim, norm("ffn_norm")
        made.append(FeedForward(*feed_forward, activation=Gelu(gated=True), after=norm("ffn_norm_after")))
    made.append(Head(norm("final_norm"), shape.vocab_size, width, shape.tie_embeddings))
    return made


def _kinds(content: Mapping[str, Any], place: str) -> Any:
    """Return what `layer_types` says, or the pattern."""
    blocks, every = content["num_hidden_layers"], content["sliding_window_pattern"]
    if content.get("layer_types") or not (isinstance(blocks, int) and 0 < blocks <= MAX_LAYERS):
        return content.get("layer_types")
    if not isinstance(every, int) or every < 1:
        raise CheckpointError(
            f"{place}: sliding_window_pattern is {shown(every)}, but must be a whole number from 1 on; it is damaged"
        )
    return [(LayerType.SLIDING if (i + 1) % every else LayerType.FULL).value for i in range(blocks)]


def _rope(content: Mapping[str, Any], place: str) -> dict[str, Any]:
    """Return the fields of both RoPEs: version 5 has a table for each, version 4 a scaling of that of all keys."""
    scaling, tables = content.get("rope_scaling") or {}, content.get("rope_parameters") or {}
    if not isinstance(scaling, Mapping) or not isinstance(tables, Mapping):
        name = "rope_parameters" if isinstance(scaling, Mapping) else "rope_scaling"
        raise CheckpointError(f"{place}: {name} is {shown(content[name])}, but must be an object; it is damaged")
    if scaling and tables:
        raise CheckpointError(f"{place}: rope_scaling and rope_parameters are one thing; remove one of them")
    # A scaling that is called `type` has no effect in version 5, and one in version 4: as the default, it is refused.
    full = {"rope_type": "default", **scaling}
    tables = {LayerType.FULL.value: full, **{name: each for name, each in tables.items() if each is not None}}
    tables.setdefault(LayerType.SLIDING.value, {})
    others = {f"rope_parameters.{name}": each for name, each in tables.items() if name not in list(LayerType)}
    refuse_others(others, dict.fromkeys(others, ()), place)
    content = {**content, "rope_scaling": None, "rope_parameters": tables}
    fields = rope_fields(content, place, LayerType.FULL.value)
    local = rope_fields({**content, "rope_theta": content["rope_local_base_freq"]}, place, LayerType.SLIDING.value)
    if local["rope_scaling"] is not None:
        kind = local["rope_scaling"].rope_type.value
        part = f"rope_parameters.{LayerType.SLIDING.value}.rope_type"
        raise CheckpointError(f"{place}: {part} is {kind!r}; this version computes only 'default'")
    return {**fields, "rope_local_theta": local["rope_theta"]}


def _read(content: Mapping[str, Any], place: str) -> dict[str, Any]:
    content = {**DEFAULTS, **content}
    refuse_others(content, ONLY, place)
    fields = {**common_fields(content, place), **_rope(content, place), **attention_bias(content)}
    windows = {**content, "layer_types": _kinds(content, place), "use_sliding_window": True}
    fields |= window_fields(windows, place, chosen=True)
    if fields["sliding_window"] is None:
        del fields["rope_local_theta"]  # of no block
    scalar = content["query_pre_attn_scalar"]
    return {**fields, "query_pre_attn_scalar": None if scalar == fields["head_dim"] else scalar}


def _write(shape: ModelShape) -> dict[str, Any]:
    """Return the fields of the Transformers library's `Gemma3TextConfig` for this model."""
    shared = {name: each for name, each in llama.write(shape).items() if name not in ("hidden_act", "mlp_bias")}
    return {
        **shared,
        "architectures": ["Gemma3ForCausalLM"],
        "model_type": "gemma3_text",
        "hidden_activation": ACTIVATION,
        "query_pre_attn_scalar": shape.query_pre_attn_scalar or shape.resolved_head_dim,
        "rope_local_base_freq": shape.rope_local_theta,
        "sliding_window": shape.sliding_window or shape.max_seq_len,  # asked for even where no block has it
        "layer_types": [shape.layer_type(i).value for i in range(shape.num_layers)],
    }


ARCHITECTURE = "gemma3"
WINDOW, PATTERN, EVERY = "attention.sliding_window", "attention.sliding_window_pattern", 6  # of llama.cpp's loader
BY_WIDTH = 62  # blocks of the one model (27B) whose scores llama.cpp divides by the root of hidden_dim / num_heads


def _scalar(layers: int, hidden_dim: int, heads: int, head_dim: int) -> int:
    """Return what llama.cpp divides scores by the root of: it does not stand in a file."""
    return hidden_dim // heads if layers == BY_WIDTH else head_dim


def _pattern(keys: Keys, blocks: int) -> tuple[LayerType, ...]:
    """Return what the attention of each block sees: a number n, every n-th sees all, or an array of who does not."""
    value = keys.value(PATTERN)
    if isinstance(value, np.ndarray):
        if len(value) != blocks:
            raise keys.wrong(PATTERN, f"it must say for each of {blocks} blocks whether it has the window")
        narrow = [bool(each) for each in value]
    else:
        every = keys.whole(PATTERN, EVERY)
        narrow = [every == 0 or i % every < every - 1 for i in range(blocks)]
    return tuple(LayerType.SLIDING if each else LayerType.FULL for each in narrow)


def _read_gguf(keys: Keys) -> dict[str, Any]:
    fields = common_keys(keys)
    heads, width, blocks = fields["num_heads"], fields["hidden_dim"], fields["num_layers"]
    head_dim = fields["head_dim"] or width // max(heads, 1)
    fields |= rope_keys(keys, head_dim, fields["max_seq_len"])
    window, local = keys.whole(WINDOW, 0), keys.number("rope.freq_base_swa", 10000.0)
    kinds = _pattern(keys, blocks) if 0 < blocks <= MAX_LAYERS else ()
    if window and LayerType.SLIDING in kinds:
        fields |= {"sliding_window": window, "layer_types": kinds, "rope_local_theta": local}
    return {**fields, "query_pre_attn_scalar": _scalar(blocks, width, max(heads, 1), head_dim)}


def _write_gguf(shape: ModelShape) -> dict[str, Any]:
    """Return the entries of a GGUF file."""
    refuse(ARCHITECTURE, shape, attention_bias=qwen3.NO_BIAS)
    blocks, head_dim = shape.num_layers, shape.resolved_head_dim
    scalar = shape.query_pre_attn_scalar or head_dim
    computed = _scalar(blocks, shape.hidden_dim, shape.num_heads, head_dim)
    if scalar != computed:
        raise ConfigError(
            f"query_pre_attn_scalar ({scalar}) cannot be written as GGUF: llama.cpp computes with {computed} in a "
            f"model of {blocks} blocks (architecture {ARCHITECTURE}); export a Hugging Face folder"
        )
    written = {**write_common(shape), **write_rope_keys(ARCHITECTURE, shape), **write_head_dim(shape)}
    if shape.sliding_window is None:
        return written
    narrow = np.array([shape.layer_type(i) is LayerType.SLIDING for i in range(blocks)])
    if (narrow != [i % EVERY < EVERY - 1 for i in range(blocks)]).any():
        written[PATTERN] = narrow
    return {**written, WINDOW: U32(shape.sliding_window), "rope.freq_base_swa": F32(shape.rope_local_theta)}


FAMILY = Family(
    names=NAMES,
    layers=layers,
    model_types=("gemma3_text",),
    read=_read,
    write=_write,
    entries=("sliding_window_pattern",),
    gguf=Gguf(architecture=ARCHITECTURE, read=_read_gguf, write=_write_gguf, plus_one=True),
)
