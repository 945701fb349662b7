"""Qwen3-MoE: Qwen3 whose feed-forward layers are mixtures of experts, all of them or every n-th.

Block i has experts if i + 1 is a multiple of `decoder_sparse_step` and i is not in `mlp_only_layers`, as
`Qwen3MoeDecoderLayer` of the Transformers library decides; the others are dense, with `intermediate_size`.  The gates
of a token are those of a softmax over all experts, and add up to 1 only with `norm_topk_prob`.  Names of a tensor for
each expert are written; those of transformers 5 in memory, fused, are read as well.

Source: Qwen Team 2025, "Qwen3 Technical Report", section 2.
"""

from collections.abc import Mapping
from typing import Any

from ..errors import CheckpointError, ConfigError, shown
from ..formats.gguf.values import U32
from ..model.layers.layer import Layer
from ..shape import ModelShape
from . import llama, qwen3
from .config_json import attention_bias, common_fields, refuse_others, window_fields
from .config_rope import rope_fields
from .family import Family, HfNames
from .gguf_keys import Gguf, Keys, refuse
from .gguf_keys import expert_fields as expert_keys
from .gguf_keys import write_experts as write_expert_keys
from .mixtral import FUSED, expert_fields, with_experts, without_count, write_experts

__all__ = ["FAMILY"]

NAMES: dict[str, tuple[HfNames, str]] = {
    **qwen3.NAMES,
    "layers.{i}.w_router": ("model.layers.{i}.mlp.gate.weight", "blk.{i}.ffn_gate_inp.weight"),
    **{
        f"layers.{{i}}.experts_{part}": (
            (f"model.layers.{{i}}.mlp.experts.{{e}}.{part}_proj.weight", FUSED[f"layers.{{i}}.experts_{part}"]),
            f"blk.{{i}}.ffn_{part}_exps.weight",
        )
        for part in ("gate", "up", "down")
    },
}
# of Qwen3MoeConfig; without head_dim, its attention takes hidden_size / num_attention_heads
DEFAULTS = {"use_sliding_window": False, "num_key_value_heads": 4, "max_position_embeddings": 32768}


def _layers(shape: ModelShape) -> list[Layer]:
    return with_experts(shape, llama.decoder_layers(shape, qk_norm=True), renormalised=shape.norm_topk_prob)


def _read(content: Mapping[str, Any], place: str) -> dict[str, Any]:
    content = {**DEFAULTS, **content}
    refuse_others(content, without_count(qwen3.ONLY), place)
    window = content.get("sliding_window", 4096) if content["use_sliding_window"] else None  # one for all blocks
    dense = content.get("mlp_only_layers") or []
    if not isinstance(dense, list):
        raise CheckpointError(f"{place}: mlp_only_layers is {shown(dense)}, but must be a list; it is damaged")
    return {
        **common_fields(content, place),
        **attention_bias(content),
        **rope_fields(content, place),
        **window_fields({**content, "sliding_window": window}, place, chosen=False),
        **expert_fields(content, place, experts=128, chosen=8),
        "expert_dim": content.get("moe_intermediate_size", 768),
        "norm_topk_prob": content.get("norm_topk_prob") or False,
        "decoder_sparse_step": content.get("decoder_sparse_step", 1),
        "mlp_only_layers": tuple(dense),
    }


def _write(shape: ModelShape) -> dict[str, Any]:
    """Return the fields of the Transformers library's `Qwen3MoeConfig` for this model."""
    return {
        **{name: value for name, value in llama.write(shape).items() if name != "mlp_bias"},
        "use_sliding_window": shape.sliding_window is not None,
        "sliding_window": shape.sliding_window,
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        **write_experts(shape),
        "num_experts": shape.num_experts,
        "moe_intermediate_size": shape.resolved_expert_dim,
        "norm_topk_prob": shape.norm_topk_prob,
        "decoder_sparse_step": shape.decoder_sparse_step,
        "mlp_only_layers": list(shape.mlp_only_layers),
    }


ARCHITECTURE = "qwen3moe"


def _read_gguf(keys: Keys) -> dict[str, Any]:
    experts = expert_keys(keys)
    whole = keys.whole("feed_forward_length")
    inner = keys.whole("expert_feed_forward_length", whole // max(experts["experts_per_token"], 1))
    return {**qwen3.read_gguf(keys), **experts, "expert_dim": inner, "norm_topk_prob": True}


def _write_gguf(shape: ModelShape) -> dict[str, Any]:
    """Return the entries of a GGUF file."""
    everywhere = "llama.cpp has experts in every layer there"
    refuse(ARCHITECTURE, shape, mlp_only_layers=everywhere)
    if shape.decoder_sparse_step != 1:
        refuse(ARCHITECTURE, shape, decoder_sparse_step=everywhere)
    if not shape.norm_topk_prob:
        raise ConfigError(
            f"norm_topk_prob (False) cannot be written as GGUF: llama.cpp lets the gates of a token's experts add up "
            f"to 1 (architecture {ARCHITECTURE}); export a Hugging Face folder"
        )
    inner = {"expert_feed_forward_length": U32(shape.resolved_expert_dim)}
    return {**qwen3.write_gguf(ARCHITECTURE, shape), **write_expert_keys(shape), **inner}


FAMILY = Family(
    names=NAMES,
    layers=_layers,
    model_types=("qwen3_moe",),
    read=_read,
    write=_write,
    gguf=Gguf(architecture=ARCHITECTURE, read=_read_gguf, write=_write_gguf),
)
