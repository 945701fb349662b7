"""What the config.json files of the families have in common: entries, their values without effect, windows.

Where two entries speak of one thing, transformers' choice holds (measured with 5.24), or an error names both:

    head_dim hides hidden_size / num_attention_heads
    layer_types hides max_window_layers
"""

from collections.abc import Mapping
from typing import Any

from ..errors import CheckpointError, counted, shown
from ..fields import either
from ..shape import MAX_LAYERS, LayerType, ModelShape, shortest

__all__ = [
    "NEUTRAL",
    "attention_bias",
    "common_fields",
    "refuse_others",
    "refuse_windows",
    "window_fields",
    "write_windows",
]

FIELDS = {
    "vocab_size": "vocab_size",
    "hidden_dim": "hidden_size",
    "intermediate_dim": "intermediate_size",
    "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "max_seq_len": "max_position_embeddings",
}
# What would change the arithmetic, and the values with which it does not (null and empty never do).
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu", "swish"),
    **dict.fromkeys(("attention_bias", "mlp_bias", "qkv_bias", "use_bias", "use_qkv_bias", "bias"), (False,)),
    **dict.fromkeys(("qk_norm", "use_qk_norm", "qk_layernorm", "alibi", "rope_interleaved"), (False,)),
    **dict.fromkeys(("is_encoder_decoder", "add_cross_attention", "use_bidirectional_attention"), (False,)),
    "is_causal": (True,),
    **dict.fromkeys(("partial_rotary_factor", "rotary_pct", "rope_pct"), (1,)),
    **dict.fromkeys(("logit_scale", "logits_scaling", "logit_scaling", "lm_head_multiplier", "scale_emb"), (1,)),
    **dict.fromkeys(("embedding_multiplier", "residual_multiplier", "attention_multiplier", "scale_depth"), (1,)),
    **dict.fromkeys(("final_logit_softcapping", "attn_logit_softcapping", "query_pre_attn_scalar", "clip_qkv"), ()),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts"), (0,)),
    **dict.fromkeys(("quantization_config", "compression_config", "pruned_heads"), ()),
    **dict.fromkeys(("no_rope_layers", "no_rope_layer_interval"), ()),
}


def common_fields(content: Mapping[str, Any], place: str) -> dict[str, Any]:
    """Return the fields of the shape that all families read alike; CheckpointError if one is missing."""
    missing = [name for name in FIELDS.values() if name not in content]
    if missing:
        kind = content["model_type"]
        raise CheckpointError(f"{place} lacks {', '.join(missing)}; it is not the config.json of a {kind} model")
    values = {ours: content[theirs] for ours, theirs in FIELDS.items()}
    values["num_kv_heads"] = content.get("num_key_value_heads") or values["num_heads"]
    values["head_dim"] = content.get("head_dim")
    values["norm_eps"] = content.get("rms_norm_eps", 1e-6)  # the defaults of LlamaConfig
    values["tie_embeddings"] = content.get("tie_word_embeddings") or False
    return values


def attention_bias(content: Mapping[str, Any]) -> dict[str, Any]:
    """Return the field that says whether q, k, v and o have biases, of a family whose config.json says it."""
    return {"attention_bias": content.get("attention_bias") or False}


def refuse_others(content: Mapping[str, Any], neutral: Mapping[str, tuple[Any, ...]], place: str) -> None:
    """Raise CheckpointError for an entry that has another value than those with which it changes nothing."""
    for name, computed in neutral.items():
        found = content.get(name)
        if found not in (None, [], {}) and found not in computed:
            rule = f"only {' or '.join(map(repr, computed))}" if computed else "nothing of that kind"
            raise CheckpointError(f"{place}: {name} is {shown(found)}; this version computes {rule}")


def window_fields(content: Mapping[str, Any], place: str, *, chosen: bool) -> dict[str, Any]:
    """Return the fields of the sliding window.

    chosen    `use_sliding_window` says whether there is one and `layer_types`, or `max_window_layers`, where, as Qwen
              has it; else `sliding_window` alone, for all blocks
    """
    window = content.get("sliding_window")
    if chosen and not content.get("use_sliding_window"):
        window = None
    kinds = content.get("layer_types") or []
    if not isinstance(kinds, list):
        raise CheckpointError(f"{place}: layer_types is {shown(kinds)}, but must be a list; it is damaged")
    other = next((kind for kind in kinds if kind not in list(LayerType)), None)
    if other is not None:
        computed = either([repr(kind.value) for kind in LayerType])
        raise CheckpointError(f"{place}: layer_types names {shown(other)}; this version computes {computed}")
    layers = content["num_hidden_layers"]
    if kinds and isinstance(layers, int) and len(kinds) != layers:
        named = counted(len(kinds), "block")
        raise CheckpointError(f"{place}: layer_types names {named} of {layers}; it must name each")
    if window is None:
        if LayerType.SLIDING in kinds:
            raise CheckpointError(
                f"{place}: layer_types names 'sliding_attention', but there is no sliding window; set sliding_window"
                + (" and use_sliding_window" if chosen else "")
            )
        return {"sliding_window": None, "layer_types": ()}
    if not chosen:
        if LayerType.FULL in kinds:
            raise CheckpointError(
                f"{place}: layer_types names 'full_attention'; here all blocks have the sliding_window"
            )
        return {"sliding_window": window, "layer_types": ()}
    first = content.get("max_window_layers", 28)  # the default of Qwen2Config and Qwen3Config
    if not kinds and type(first) is not int:
        raise CheckpointError(
            f"{place}: max_window_layers is {shown(first)}, but must be the number of the first block with the "
            "sliding_window; set it, or name each block in layer_types"
        )
    if not kinds and isinstance(layers, int) and 0 < layers <= MAX_LAYERS:
        kinds = [LayerType.SLIDING if i >= first else LayerType.FULL for i in range(layers)]
    if LayerType.SLIDING not in kinds:
        return {"sliding_window": None, "layer_types": ()}
    return {"sliding_window": window, "layer_types": shortest(tuple(map(LayerType, kinds)))}


def write_windows(shape: ModelShape) -> dict[str, Any]:
    """Return the entries of the sliding window as Qwen's config.json has them."""
    if shape.sliding_window is None:
        return {"use_sliding_window": False}
    kinds = [shape.layer_type(i).value for i in range(shape.num_layers)]
    return {
        "use_sliding_window": True,
        "sliding_window": shape.sliding_window,
        "max_window_layers": kinds.index(LayerType.SLIDING),  # older versions know only this
        "layer_types": kinds,
    }


def refuse_windows(content: Mapping[str, Any], place: str) -> None:
    """Raise CheckpointError if a query would not see all keys before it."""
    window, longest = content.get("sliding_window"), content.get("max_position_embeddings")
    whole = isinstance(window, int) and isinstance(longest, int) and window >= longest
    if window is not None and content.get("use_sliding_window", True) and not whole:
        raise CheckpointError(
            f"{place}: sliding_window is {shown(window)}, less than max_position_embeddings ({shown(longest)}); this "
            "version computes attention over the whole context"
        )
    kinds = content.get("layer_types") or []
    if not isinstance(kinds, list):
        raise CheckpointError(f"{place}: layer_types is {shown(kinds)}, but must be a list; it is damaged")
    other = next((kind for kind in kinds if kind != "full_attention"), None)
    if other is not None:
        raise CheckpointError(f"{place}: layer_types names {shown(other)}; this version computes only 'full_attention'")
