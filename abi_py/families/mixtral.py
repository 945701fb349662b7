"""Mixtral: Llama whose feed-forward layers are mixtures of experts, of which a router chooses two for each token.

The gates of a token are a softmax over the logits of its chosen experts.  intermediate_size is the width of an expert;
every layer has them.  transformers writes a tensor for each expert (w1 gate, w2 down, w3 up); folders that keep them as
transformers 5 has them in memory (experts.gate_up_proj (E, 2F, C), experts.down_proj) are read as well.

Source: Jiang et al. 2024, "Mixtral of Experts", section 2.1.
"""

from collections.abc import Mapping
from typing import Any

from ..errors import CheckpointError, shown
from ..model.layers.experts import Experts, Routing
from ..model.layers.feed_forward import FeedForward
from ..model.layers.layer import Layer
from ..parameters import HfName
from ..shape import ModelShape
from . import llama
from .config_json import NEUTRAL, common_fields, refuse_others, window_fields
from .config_rope import rope_fields
from .family import Family, HfNames
from .gguf_keys import Gguf, Keys, refuse_window
from .gguf_keys import expert_fields as expert_keys
from .gguf_keys import write_experts as write_expert_keys

__all__ = ["FAMILY", "FUSED", "expert_fields", "with_experts", "without_count", "write_experts"]

COUNT = ("num_local_experts", "num_experts")  # transformers 5 takes either for the other
DEFAULTS = {"rms_norm_eps": 1e-5, "rope_theta": 1e6, "num_key_value_heads": 8}  # of MixtralConfig
DENSE = ("layers.{i}.w_gate", "layers.{i}.w_up", "layers.{i}.w_down")
AT, BLOCK = "model.layers.{i}.mlp.experts", "model.layers.{i}.block_sparse_moe"
FUSED = {  # as transformers 5 has them in memory: all experts in one tensor, gate above up
    "layers.{i}.experts_gate": HfName(f"{AT}.gate_up_proj", part=(0, 2)),
    "layers.{i}.experts_up": HfName(f"{AT}.gate_up_proj", part=(1, 2)),
    "layers.{i}.experts_down": HfName(f"{AT}.down_proj"),
}
NAMES: dict[str, tuple[HfNames, str]] = {
    **{name: others for name, others in llama.NAMES.items() if name not in DENSE},
    "layers.{i}.w_router": (
        (f"{BLOCK}.gate.weight", "model.layers.{i}.mlp.gate.weight"),
        "blk.{i}.ffn_gate_inp.weight",
    ),
    **{
        f"layers.{{i}}.experts_{part}": (
            (f"{BLOCK}.experts.{{e}}.{theirs}.weight", FUSED[f"layers.{{i}}.experts_{part}"]),
            f"blk.{{i}}.ffn_{part}_exps.weight",
        )
        for part, theirs in (("gate", "w1"), ("up", "w3"), ("down", "w2"))
    },
}


def with_experts(shape: ModelShape, layers: list[Layer], *, renormalised: bool) -> list[Layer]:
    """Return a list of layers with experts in place of the feed-forward branches of the blocks that have them."""
    routing = Routing(shape.num_experts or 0, shape.router_aux_loss_coef, shape.router_z_loss_coef)

    def changed(layer: Layer) -> Layer:
        if not isinstance(layer, FeedForward) or not shape.has_experts(layer.block):
            return layer
        sizes = layer.width, shape.resolved_expert_dim, layer.norm, routing, shape.experts_per_token or 0
        return Experts(layer.at, layer.block, *sizes, renormalised=renormalised)

    return [changed(layer) for layer in layers]


def without_count(neutral: Mapping[str, tuple[Any, ...]]) -> dict[str, tuple[Any, ...]]:
    """Return what a config.json must say, but for the number of experts, which families with experts read."""
    return {**{name: values for name, values in neutral.items() if name not in COUNT}, "router_jitter_noise": (0,)}


def expert_fields(content: Mapping[str, Any], place: str, experts: int, chosen: int) -> dict[str, Any]:
    """Return the fields that both families read alike, given the defaults of their classes in transformers."""
    given = {name: content[name] for name in COUNT if content.get(name) is not None}
    if any(value != next(iter(given.values())) for value in given.values()):
        said = " and ".join(f"{name} ({shown(value)})" for name, value in given.items())
        raise CheckpointError(f"{place}: {said} must be equal, because they are one thing; remove the wrong one")
    return {
        "num_experts": next(iter(given.values()), experts),
        "experts_per_token": content.get("num_experts_per_tok", chosen),
        "router_aux_loss_coef": content.get("router_aux_loss_coef", 0.001),
        "router_z_loss_coef": content.get("router_z_loss_coef", 0.0),
    }


def write_experts(shape: ModelShape) -> dict[str, Any]:
    """Return the entries of config.json that both families write alike; transformers ignores the z-loss."""
    z_loss = {"router_z_loss_coef": shape.router_z_loss_coef} if shape.router_z_loss_coef else {}
    return {
        "num_local_experts": shape.num_experts,
        "num_experts_per_tok": shape.experts_per_token,
        "router_aux_loss_coef": shape.router_aux_loss_coef,
        "output_router_logits": False,
        **z_loss,
    }


def _layers(shape: ModelShape) -> list[Layer]:
    return with_experts(shape, llama.decoder_layers(shape), renormalised=True)


def _read(content: Mapping[str, Any], place: str) -> dict[str, Any]:
    content = {**DEFAULTS, **content}
    refuse_others(content, without_count(NEUTRAL), place)
    return {
        **common_fields(content, place),
        **rope_fields(content, place),
        **window_fields(content, place, chosen=False),
        **expert_fields(content, place, experts=8, chosen=2),
    }


def _write(shape: ModelShape) -> dict[str, Any]:
    """Return the fields of the Transformers library's `MixtralConfig` for this model."""
    shared = {name: value for name, value in llama.write(shape).items() if name not in ("attention_bias", "mlp_bias")}
    own = {"architectures": ["MixtralForCausalLM"], "model_type": "mixtral", "router_jitter_noise": 0.0}
    return {**shared, **own, "sliding_window": shape.sliding_window, **write_experts(shape)}


def _read_gguf(keys: Keys) -> dict[str, Any]:
    return {**llama.read_gguf(keys), **expert_keys(keys)}


def _write_gguf(shape: ModelShape) -> dict[str, Any]:
    """Return the entries of a GGUF file."""
    refuse_window(llama.ARCHITECTURE, shape)
    return {**llama.write_gguf(shape), **write_expert_keys(shape)}


FAMILY = Family(
    names=NAMES,
    layers=_layers,
    model_types=("mixtral",),
    read=_read,
    write=_write,
    gguf=Gguf(architecture=llama.ARCHITECTURE, read=_read_gguf, write=_write_gguf, permuted=True),
)
