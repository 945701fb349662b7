# ruff: noqa: RUF009 (a call of `opt` declares a field, it is not a shared default)
"""The shape of a model: what layers, families and file formats need to know.

`config.py` is the place from which users take configuration; these classes stand below the layers, it stands above.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any

from .errors import ConfigError, counted
from .fields import ON, REQUIRED, Accepts, Config, Other, either, fields_of, opt
from .rope_scaling import RopeScaling, RopeType, read_rope_scaling

__all__ = [
    "IGNORE_INDEX",
    "Activation",
    "CheckpointingStrategy",
    "LayerType",
    "ModelFamily",
    "ModelShape",
    "Precision",
    "RopeScaling",
    "RopeType",
]

MAX_VOCAB = 2**31 - 1  # ids travel as int32
MAX_LAYERS = 10_000  # nine tensors each are listed by name; the deepest models have a few hundred
IGNORE_INDEX = -100  # a label that is not trained, as in PyTorch's cross_entropy


class CheckpointingStrategy(str, Enum):
    """Which activations the forward pass keeps; what is not kept is computed again in the backward pass."""

    NONE = "none"
    EVERY_N_LAYERS = "every_n_layers"
    ATTENTION_ONLY = "attention_only"
    FULL = "full"


_EXPERTS = "num_experts", "experts_per_token", "router_aux_loss_coef", "router_z_loss_coef"


class ModelFamily(str, Enum):
    """The families, each a file of `families/`: a name, and the fields of a shape that not all of them share."""

    fields: tuple[str, ...]

    def __new__(cls, name: str, *fields: str) -> "ModelFamily":
        """Make a member whose value is its name."""
        made = str.__new__(cls, name)
        made._value_, made.fields = name, fields
        return made

    LLAMA = "llama", "attention_bias"
    MISTRAL = "mistral", "sliding_window"
    QWEN2 = "qwen2", "sliding_window", "layer_types"
    QWEN3 = "qwen3", "sliding_window", "layer_types", "attention_bias"
    GPT2 = "gpt2", "activation"
    MIXTRAL = "mixtral", "sliding_window", *_EXPERTS
    QWEN3_MOE = (
        *("qwen3_moe", "sliding_window", "attention_bias", *_EXPERTS),
        *("expert_dim", "norm_topk_prob", "decoder_sparse_step", "mlp_only_layers"),
    )
    GEMMA3 = "gemma3", "sliding_window", "layer_types", "attention_bias", "rope_local_theta", "query_pre_attn_scalar"


class Activation(str, Enum):
    """The activation of a feed-forward layer that has no gate."""

    GELU_TANH = "gelu_tanh"
    GELU = "gelu"


class LayerType(str, Enum):
    """What the attention of a block sees; names as in transformers."""

    FULL = "full_attention"
    SLIDING = "sliding_attention"


def having(field: str) -> tuple[ModelFamily, ...]:
    """Return the families that have a field."""
    return tuple(family for family in ModelFamily if field in family.fields)


EXPERTS = having("num_experts")


def shortest(kinds: tuple[LayerType, ...]) -> tuple[LayerType, ...]:
    """Return the shortest pattern that, repeated, is this one; () for a window in every block."""
    period = next(n for n in range(1, len(kinds) + 1) if all(kinds[i] == kinds[i % n] for i in range(len(kinds))))
    return () if kinds[:period] == (LayerType.SLIDING,) else kinds[:period]


def _of_experts(value: int) -> Callable[[Any], int | None]:
    """Return what gives a field of experts its value, in a family that has any."""
    return lambda shape: value if shape.family in EXPERTS else None


@dataclass(frozen=True, kw_only=True)
class ModelShape(Config):
    """Shape of a model; names and defaults are the ABI's."""

    hidden_dim: int = opt(REQUIRED, "width of the model", common=True, example=64)
    num_layers: int = opt(REQUIRED, "number of transformer blocks", common=True, example=2)
    num_heads: int = opt(REQUIRED, "number of query heads", common=True, example=4)
    num_kv_heads: Accepts[int, None] = opt(
        None,
        "number of key/value heads; a divisor of num_heads, and num_heads when not given",
        acts={"family": Other(ModelFamily.GPT2)},
        derive=lambda shape: shape.num_heads,
    )
    intermediate_dim: int = opt(REQUIRED, "inner width of the feed-forward layer", common=True, example=128)
    vocab_size: int = opt(REQUIRED, "number of token ids", example=256)
    max_seq_len: int = opt(2048, "longest sequence the model can read")
    rope_theta: float = opt(10000.0, "base of the RoPE frequencies", acts={"family": Other(ModelFamily.GPT2)})
    rope_scaling: Accepts[RopeScaling | None, str | Mapping[str, Any]] = opt(
        None,
        "RoPE for rows longer than those of training: linear, dynamic, yarn or llama3, as in yarn:4 or "
        "llama3:8,original_max_position_embeddings=8192",
        read=read_rope_scaling,
        acts={"family": Other(ModelFamily.GPT2)},
    )
    norm_eps: float = opt(1e-5, "epsilon of the norms")
    tie_embeddings: bool = opt(True, "use the token embedding as output projection too")
    checkpointing: Accepts[CheckpointingStrategy, str] = opt(
        CheckpointingStrategy.NONE, "gradient checkpointing: what to keep"
    )
    checkpoint_interval: int = opt(
        4,
        "keep the input of every n-th layer",
        acts={"checkpointing": CheckpointingStrategy.EVERY_N_LAYERS},
    )
    head_dim: int | None = opt(
        None,
        "width of one head; hidden_dim / num_heads when not given",
        acts={"family": Other(ModelFamily.GPT2)},
    )
    sliding_window: int | None = opt(
        None,
        "keys that a query sees, its own among them; all before it when not given",
        acts={"family": having("sliding_window")},
    )
    layer_types: Accepts[tuple[LayerType, ...], Sequence[str]] = opt(
        (),
        "which blocks have the sliding window, a pattern that is repeated; all of them when not given",
        acts={"sliding_window": ON, "family": having("layer_types")},
    )
    rope_local_theta: float = opt(
        10000.0,
        "base of the RoPE frequencies in blocks with the sliding window, which rope_scaling does not change",
        acts={"sliding_window": ON, "family": having("rope_local_theta")},
    )
    query_pre_attn_scalar: int | None = opt(
        None,
        "the scores of attention are divided by its root; head_dim when not given",
        acts={"family": having("query_pre_attn_scalar")},
    )
    attention_bias: bool = opt(
        False,
        "biases on the projections of attention, w_o's included",
        acts={"family": having("attention_bias")},
    )
    activation: Accepts[Activation, str] = opt(
        Activation.GELU_TANH, "GELU by a tanh, or exact", acts={"family": having("activation")}
    )
    seed: int = opt(0, "seed of the initial weights", flag="model-seed")
    family: Accepts[ModelFamily, str] = opt(ModelFamily.LLAMA, "what the layers are", common=True)
    num_experts: int | None = opt(
        None, "experts of a layer (8 in a family with experts)", acts={"family": EXPERTS}, derive=_of_experts(8)
    )
    experts_per_token: int | None = opt(
        None, "experts that compute a token (2)", acts={"family": EXPERTS}, derive=_of_experts(2)
    )
    expert_dim: int | None = opt(
        None,
        "inner width of an expert (intermediate_dim)",
        acts={"family": having("expert_dim")},
        derive=lambda shape: shape.intermediate_dim if shape.family is ModelFamily.QWEN3_MOE else None,
    )
    norm_topk_prob: bool = opt(
        False, "the gates of a token's experts add up to 1", acts={"family": having("norm_topk_prob")}
    )
    decoder_sparse_step: int = opt(1, "every n-th layer has experts", acts={"family": having("decoder_sparse_step")})
    mlp_only_layers: tuple[int, ...] = opt(
        (), "layers without experts, counted from 0", acts={"family": having("mlp_only_layers")}
    )
    router_aux_loss_coef: float = opt(
        0.001, "in training, load-balancing loss times this is added; 0 switches it off", acts={"family": EXPERTS}
    )
    router_z_loss_coef: float = opt(
        0.0, "in training, the router's z-loss times this is added (1e-3 in ST-MoE)", acts={"family": EXPERTS}
    )

    def validate(self) -> None:
        """Raise `ConfigError` naming field, value, rule and remedy."""
        self._require_at_least(1, "hidden_dim", "num_layers", "num_heads", "num_kv_heads", "intermediate_dim")
        self._require("num_layers", self.num_layers <= MAX_LAYERS, f"be at most {MAX_LAYERS}", "is it another number?")
        self._require_at_least(1, "vocab_size", "max_seq_len", "checkpoint_interval")
        self._require_at_least(0, "seed")
        if self.vocab_size > MAX_VOCAB:
            raise ConfigError(f"vocab_size ({self.vocab_size}) must be at most {MAX_VOCAB}; ids are 32-bit")
        self._check_heads()
        if self.num_heads % self.num_kv_heads:
            good = [str(n) for n in range(1, self.num_heads + 1) if self.num_heads % n == 0]
            raise ConfigError(
                f"num_kv_heads ({self.num_kv_heads}) must divide num_heads ({self.num_heads}); try {either(good[-4:])}"
            )
        if self.family is not ModelFamily.GPT2 and (self.resolved_head_dim % 2 or self.resolved_head_dim < 2):
            raise ConfigError(
                f"head_dim ({self.resolved_head_dim}) must be even and at least 2, because RoPE rotates pairs; "
                f"set head_dim to {max(2, self.resolved_head_dim + 1)} or change num_heads"
            )
        for name in ("rope_theta", "rope_local_theta", "norm_eps"):
            value = getattr(self, name)
            default = next(option.default for option in fields_of(type(self)) if option.name == name)
            good_value = math.isfinite(value) and value > 0
            self._require(name, good_value, "be a positive number", f"the usual value is {default}")
        if self.rope_scaling is not None:
            object.__setattr__(self, "rope_scaling", self.rope_scaling.resolved(self.max_seq_len))
            self.rope_scaling.check(self.max_seq_len, self.resolved_head_dim, self.rope_theta)
            if self.family is ModelFamily.GEMMA3 and not self.rope_scaling.truncate:
                raise ConfigError(  # transformers 5.24 looks for it in the table of both kinds, where it cannot be
                    "rope_scaling's truncate (False) has no effect in transformers' gemma3; leave truncate out"
                )
        if self.sliding_window is not None:
            self._require_at_least(1, "sliding_window")
            self._shorten_layer_types()
        if self.family in EXPERTS:
            self._validate_experts()
        if self.query_pre_attn_scalar is not None:
            self._require_at_least(1, "query_pre_attn_scalar")
            if self.query_pre_attn_scalar == self.resolved_head_dim:  # shapes that are equal look equal
                object.__setattr__(self, "query_pre_attn_scalar", None)

    def _check_heads(self) -> None:
        if self.head_dim is None and self.hidden_dim % self.num_heads:
            below = self.hidden_dim // self.num_heads * self.num_heads
            good = [str(n) for n in (below, below + self.num_heads) if n > 0]
            heads = [n for n in range(1, min(2 * self.num_heads, 1024) + 1) if self.hidden_dim % n == 0]
            near = sorted(sorted(heads, key=lambda n: abs(n - self.num_heads))[:2])
            raise ConfigError(
                f"hidden_dim ({self.hidden_dim}) must be a multiple of num_heads ({self.num_heads}); "
                f"try {either(good)}, or num_heads {either([str(n) for n in near])}, or set head_dim"
            )

    def _shorten_layer_types(self) -> None:
        """Bring the pattern to its shortest form, so that shapes that are equal look equal."""
        kinds = [self.layer_type(i) for i in range(self.num_layers)]
        if LayerType.SLIDING not in kinds:
            raise ConfigError(
                f"layer_types gives none of {counted(self.num_layers, 'block')} the sliding_window "
                f"({self.sliding_window}); leave both out, or name sliding_attention"
            )
        object.__setattr__(self, "layer_types", shortest(tuple(kinds)))

    def layer_type(self, block: int) -> LayerType:
        """Return what the attention of a block sees."""
        if self.sliding_window is None:
            return LayerType.FULL
        return self.layer_types[block % len(self.layer_types)] if self.layer_types else LayerType.SLIDING

    def window(self, block: int) -> int | None:
        """Return the window of a block; None where it sees all keys."""
        return self.sliding_window if self.layer_type(block) is LayerType.SLIDING else None

    def _validate_experts(self) -> None:
        self._require_at_least(1, "num_experts", "experts_per_token", "decoder_sparse_step")
        if self.expert_dim is not None:
            self._require_at_least(1, "expert_dim")
        experts, chosen = self.num_experts or 0, self.experts_per_token or 0
        remedy = f"choose at most all, or set num_experts to {chosen} or more"
        self._require("experts_per_token", chosen <= experts, f"be at most num_experts ({experts})", remedy)
        for name in ("router_aux_loss_coef", "router_z_loss_coef"):
            good = math.isfinite(getattr(self, name)) and getattr(self, name) >= 0
            self._require(name, good, "be zero or more", "try 0.001; 0 switches it off")
        inside = all(0 <= i < self.num_layers for i in self.mlp_only_layers)
        self._require("mlp_only_layers", inside, f"name layers from 0 to {self.num_layers - 1}", "leave the others out")
        if not any(map(self.has_experts, range(self.num_layers))):
            raise ConfigError(
                f"no layer has experts: decoder_sparse_step is {self.decoder_sparse_step}, mlp_only_layers "
                f"{list(self.mlp_only_layers)}, num_layers {self.num_layers}; without experts it is family qwen3"
            )

    def has_experts(self, block: int) -> bool:
        """Say whether the feed-forward layer of a block is a mixture of experts."""
        sparse = (block + 1) % self.decoder_sparse_step == 0 and block not in self.mlp_only_layers
        return self.family in EXPERTS and sparse

    @property
    def resolved_expert_dim(self) -> int:
        """Inner width of an expert: `expert_dim`, or `intermediate_dim`."""
        return self.expert_dim if self.expert_dim is not None else self.intermediate_dim

    @property
    def resolved_head_dim(self) -> int:
        """Width of one head: `head_dim`, or `hidden_dim / num_heads`."""
        return self.head_dim if self.head_dim is not None else self.hidden_dim // self.num_heads

    @property
    def q_dim(self) -> int:
        """Width of all query heads together."""
        return self.num_heads * self.resolved_head_dim

    @property
    def kv_dim(self) -> int:
        """Width of all key (or value) heads together."""
        return self.num_kv_heads * self.resolved_head_dim

    def in_brief(self) -> str:
        """Return its measures, in a phrase."""
        heads = f"{counted(self.num_heads, 'head')} ({self.num_kv_heads} for keys)"
        layers = f"{counted(self.num_layers, 'layer')} of width {self.hidden_dim}"
        return f"{layers}, {heads}, vocabulary {self.vocab_size}, rows to {self.max_seq_len}"


class Precision(str, Enum):
    """Number format of the products."""

    FP32 = "fp32"
    BF16 = "bf16"
    FP16 = "fp16"
    BF16X3 = "bf16x3"  # float32 by three products of bfloat16 parts
    BF16X6 = "bf16x6"  # by six
