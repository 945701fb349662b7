"""GPT-2: LayerNorm, learned positions, GELU without a gate, biases everywhere, queries, keys and values in one matrix.

config.json of the Transformers library's `GPT2Config`, whose names are its own (n_embd ...).  Its matrices are stored
(in, out), as its Conv1D keeps them.  Its dropouts, which every real folder names (0.1), act in training only, and
training has none here: they are read past, as a model that is evaluated does, and written as 0.  The names in a folder
may lack `transformer.`; the causal masks that old ones store are not read.

Source: Radford et al. 2019, "Language Models are Unsupervised Multitask Learners", section 2.3: a norm before each
branch and one at the end; the initial weights of what is added are smaller by the root of the number of branches.
"""

import math
from collections.abc import Mapping
from typing import Any

from ..errors import CheckpointError, ConfigError, shown
from ..fields import either
from ..model.layers.activation import Gelu
from ..model.layers.attention import Attention
from ..model.layers.embedding import Embedding
from ..model.layers.feed_forward import FeedForward
from ..model.layers.head import Head
from ..model.layers.layer import Layer
from ..model.layers.norm import LayerNorm
from ..parameters import INITIAL_STD, HfName
from ..shape import Activation, ModelShape
from .config_json import NEUTRAL, refuse_others
from .family import Family, HfNames
from .gguf_keys import Gguf, Keys, write_common
from .gguf_keys import common_fields as common_keys

__all__ = ["FAMILY"]


def _linear(ours: str, theirs: str, gguf: str) -> dict[str, tuple[HfNames, str]]:
    """Return the names of a matrix and its bias."""
    weight = HfName(f"transformer.h.{{i}}.{theirs}.weight", transposed=True)
    return {
        f"layers.{{i}}.w_{ours}": (weight, f"blk.{{i}}.{gguf}.weight"),
        f"layers.{{i}}.b_{ours}": (f"transformer.h.{{i}}.{theirs}.bias", f"blk.{{i}}.{gguf}.bias"),
    }


def _norm(ours: str, theirs: str, gguf: str) -> dict[str, tuple[HfNames, str]]:
    """Return the names of a norm's weight and bias."""
    return {
        ours: (f"transformer.{theirs}.weight", f"{gguf}.weight"),
        f"{ours}_bias": (f"transformer.{theirs}.bias", f"{gguf}.bias"),
    }


NAMES: dict[str, tuple[HfNames, str]] = {
    "token_embedding": ("transformer.wte.weight", "token_embd.weight"),
    "position_embedding": ("transformer.wpe.weight", "position_embd.weight"),
    **_linear("qkv", "attn.c_attn", "attn_qkv"),
    **_linear("o", "attn.c_proj", "attn_output"),
    **_norm("layers.{i}.attn_norm", "h.{i}.ln_1", "blk.{i}.attn_norm"),
    **_linear("up", "mlp.c_fc", "ffn_up"),
    **_linear("down", "mlp.c_proj", "ffn_down"),
    **_norm("layers.{i}.ffn_norm", "h.{i}.ln_2", "blk.{i}.ffn_norm"),
    **_norm("final_norm", "ln_f", "output_norm"),
    "output_proj": ("lm_head.weight", "output.weight"),
}
FIELDS = {
    "vocab_size": ("vocab_size", 50257),  # with the defaults of GPT2Config
    "hidden_dim": ("n_embd", 768),
    "num_layers": ("n_layer", 12),
    "num_heads": ("n_head", 12),
    "max_seq_len": ("n_positions", 1024),
    "norm_eps": ("layer_norm_epsilon", 1e-5),
    "tie_embeddings": ("tie_word_embeddings", True),
}
OTHER_NAMES = {  # under which the Transformers library takes them as well
    "n_embd": "hidden_size",
    "n_layer": "num_hidden_layers",
    "n_head": "num_attention_heads",
    "n_positions": "max_position_embeddings",
}
ACTIVATIONS = {
    "gelu_new": Activation.GELU_TANH,  # the first is written
    "gelu_pytorch_tanh": Activation.GELU_TANH,
    "gelu_fast": Activation.GELU_TANH,
    "gelu": Activation.GELU,
    "gelu_python": Activation.GELU,
}
ONLY = {
    **{name: values for name, values in NEUTRAL.items() if name != "hidden_act"},
    "scale_attn_weights": (True,),
    "scale_attn_by_inverse_layer_idx": (False,),  # reorder_and_upcast_attn only orders the same arithmetic otherwise
}


def layers(shape: ModelShape) -> list[Layer]:
    """Return the list of layers."""
    width, heads, eps = shape.hidden_dim, shape.num_heads, shape.norm_eps
    small = INITIAL_STD / math.sqrt(2 * shape.num_layers)  # two branches a block
    activation = Gelu(exact=shape.activation is Activation.GELU)
    made: list[Layer] = [Embedding(shape.vocab_size, width, shape.max_seq_len, learned_positions=True)]
    for i in range(shape.num_layers):
        at = f"layers.{i}."
        norms = LayerNorm("attn_norm", width, eps), LayerNorm("ffn_norm", width, eps)
        sizes = width, heads, heads, shape.resolved_head_dim
        made.append(Attention(at, i, *sizes, norms[0], None, True, fused=True, o_bias=True, out_std=small))
        inner = shape.intermediate_dim
        made.append(FeedForward(at, i, width, inner, norms[1], activation=activation, bias=True, out_std=small))
    made.append(Head(LayerNorm("final_norm", width, eps), shape.vocab_size, width, shape.tie_embeddings))
    return made


def _read(content: Mapping[str, Any], place: str) -> dict[str, Any]:
    for name, other in OTHER_NAMES.items():
        if name in content and other in content and content[name] != content[other]:
            said = f"{name} ({shown(content[name])}) and {other} ({shown(content[other])})"
            raise CheckpointError(f"{place}: {said} must be equal, because they are one thing; remove the wrong one")
    content = {**{name: content[other] for name, other in OTHER_NAMES.items() if other in content}, **content}
    refuse_others(content, ONLY, place)
    kind = content.get("activation_function", "gelu_new")
    if not isinstance(kind, str) or kind not in ACTIVATIONS:
        raise CheckpointError(
            f"{place}: activation_function is {shown(kind)}; this version computes {either([*ACTIVATIONS])}"
        )
    values = {ours: content.get(theirs, default) for ours, (theirs, default) in FIELDS.items()}
    inner = content.get("n_inner")
    if inner is None and isinstance(values["hidden_dim"], int):
        inner = 4 * values["hidden_dim"]
    return {**values, "intermediate_dim": inner, "activation": ACTIVATIONS[kind]}


def _write(shape: ModelShape) -> dict[str, Any]:
    """Return the fields of the Transformers library's `GPT2Config` for this model."""
    kind = next(name for name, activation in ACTIVATIONS.items() if activation is shape.activation)
    return {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        **{theirs: getattr(shape, ours) for ours, (theirs, _) in FIELDS.items()},
        "n_inner": shape.intermediate_dim,
        "activation_function": kind,
        **dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0),
        "scale_attn_weights": True,
        "scale_attn_by_inverse_layer_idx": False,
        "reorder_and_upcast_attn": False,
        "initializer_range": INITIAL_STD,
        "bos_token_id": None,
        "eos_token_id": None,
        "torch_dtype": "float32",
        "use_cache": True,
    }


ARCHITECTURE = "gpt2"
EPS = "attention.layer_norm_epsilon"


def _read_gguf(keys: Keys) -> dict[str, Any]:
    fields = common_keys(keys, EPS)
    if fields["head_dim"] is not None or fields["num_kv_heads"] != fields["num_heads"]:
        raise keys.wrong(
            "attention.head_count_kv" if fields["head_dim"] is None else "attention.key_length",
            "GPT-2 has heads of embedding_length / attention.head_count, as many for keys as for queries",
        )
    same_for_all = ("num_kv_heads", "head_dim")
    return {**{name: value for name, value in fields.items() if name not in same_for_all}, "activation": "gelu_tanh"}


def _write_gguf(shape: ModelShape) -> dict[str, Any]:
    """Return the entries of a GGUF file."""
    if shape.activation is not Activation.GELU_TANH:
        raise ConfigError(
            f"activation ({shape.activation.value}) cannot be written as GGUF: llama.cpp computes gelu_tanh alone "
            f"(architecture {ARCHITECTURE}); export a Hugging Face folder"
        )
    common = write_common(shape, EPS)
    del common["attention.head_count_kv"]
    return common


FAMILY = Family(
    names=NAMES,
    layers=layers,
    model_types=("gpt2",),
    read=_read,
    write=_write,
    prefix="transformer.",
    derived=r"(^|\.)attn\.(bias|masked_bias)$",
    gguf=Gguf(architecture=ARCHITECTURE, read=_read_gguf, write=_write_gguf),
)
