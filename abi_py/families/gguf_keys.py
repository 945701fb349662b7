"""What the metadata of GGUF files of the families have in common, both ways; as `config_json.py` is for config.json.

Keys and defaults are those of llama.cpp's loader (`llama_model_base::load_hparams`, and `load_arch_hparams` of the
architecture), types those that its converter writes.  A key of the architecture that no family asks for is an error,
unless its value says nothing.  Tensors say the rest: whether there is a head of its own, biases, the vocabulary.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import CheckpointError, ConfigError, shown
from ..fields import either
from ..formats.gguf.values import F32, U32
from ..shape import ModelShape

if TYPE_CHECKING:
    from ..formats.gguf.container import GgufFile

__all__ = [
    "Gguf",
    "Keys",
    "common_fields",
    "expert_fields",
    "refuse",
    "refuse_window",
    "write_common",
    "write_experts",
    "write_head_dim",
]

EMBEDDING, HEAD = "token_embd.weight", "output.weight"
# What would change the arithmetic, and the values with which it does not; 0, false and what is empty never do.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "attention.causal": (True,),
    "tensor_data_layout": ("reference",),
    "expert_weights_norm": (True,),
    "expert_weights_scale": (1.0,),
    "expert_gating_func": (1,),  # a softmax
    "expert_group_count": (1,),
    "expert_group_used_count": (1,),
    "interleave_moe_layer_step": (1,),
    "logit_scale": (1.0,),
    "residual_scale": (1.0,),
    "embedding_scale": (1.0,),
}
WITHOUT_EFFECT = ("rope.scaling.finetuned", "mm.tokens_per_image")


@dataclass(frozen=True, kw_only=True)
class Gguf:
    """A family's entry for GGUF files.

    architecture   its name there; several families may have one
    read           turns the metadata of a file into the fields of `TrainableModelConfig`; None where another family of
                   the same architecture computes all that such a file can say
    write          returns the entries of the architecture for a shape, with their types; ConfigError for a shape that
                   such a file cannot say, or that llama.cpp computes otherwise
    permuted       q and k have their rows in the order of `formats/gguf/rows.py`
    plus_one       norms are stored as 1 + w
    """

    architecture: str
    write: "Callable[[ModelShape], dict[str, Any]]"
    read: "Callable[[Keys], dict[str, Any]] | None" = None
    permuted: bool = False
    plus_one: bool = False


class Keys:
    """The entries of an architecture in a file's metadata, which are known once they are asked for."""

    def __init__(self, file: "GgufFile", architecture: str) -> None:
        self.file, self.architecture = file, architecture
        self.tensors = file.tensors
        self._asked: set[str] = set()

    def _key(self, name: str) -> str:
        self._asked.add(name)
        return f"{self.architecture}.{name}"

    def __contains__(self, name: str) -> bool:
        return self._key(name) in self.file.metadata

    def whole(self, name: str, default: int | None = None) -> int:
        """Return a whole number; CheckpointError if it is no such number, or missing where there is no default."""
        key = self._key(name)
        found = self.file.require(key, int) if default is None else self.file.get(key, int, default)
        return int(found)

    def number(self, name: str, default: float | None = None) -> float:
        """Return a number; one in single precision as the shortest decimal number that is nearest to it there."""
        key = self._key(name)
        found = self.file.require(key, float) if default is None else self.file.get(key, float, default)
        return float(str(np.float32(found)))  # 1e-05, not 9.999999747378752e-06

    def text(self, name: str, default: str) -> str:
        """Return a text."""
        return str(self.file.get(self._key(name), str, default))

    def value(self, name: str) -> Any:
        """Return what is there, of whatever type; None if there is nothing."""
        return self.file.metadata.get(self._key(name))

    def wrong(self, name: str, rule: str) -> CheckpointError:
        """Return the error for an entry whose value breaks a rule."""
        return CheckpointError(f"{self.file.path}: {self._key(name)} is {shown(self.value(name))}; {rule}")

    def only(self, name: str, *values: Any) -> None:
        """Raise CheckpointError if an entry is there with another value than these."""
        if self.value(name) is not None and self.value(name) not in values:
            raise self.wrong(name, f"this version computes only {either([shown(value) for value in values])}")

    def refuse_unknown(self) -> None:
        """Raise CheckpointError for an entry that nobody has asked for, and that says something."""
        begin = f"{self.architecture}."
        for key, value in self.file.metadata.items():
            name = key.removeprefix(begin)
            if not key.startswith(begin) or name in self._asked or name in WITHOUT_EFFECT:
                continue
            several = isinstance(value, np.ndarray | list)
            if (several and not np.any(value)) or (not several and value in (0, "", *NEUTRAL.get(name, ()))):
                continue
            raise self.wrong(
                name,
                f"this version computes only {either([repr(each) for each in NEUTRAL[name]])}"
                if name in NEUTRAL
                else "this version does not know the entry, which may change what the model computes",
            )


# -- what all architectures say -----------------------------------------------------------------------


def common_fields(keys: Keys, eps: str = "attention.layer_norm_rms_epsilon") -> dict[str, Any]:
    """Return the fields that all families read alike; CheckpointError names what is missing or does not agree."""
    embedding = keys.tensors.get(EMBEDDING)
    if not keys.tensors:
        remedy = "get the file of the model, or give this one as --tokenizer"
        raise CheckpointError(f"{keys.file.path}: it holds a vocabulary and no weights; {remedy}")
    if embedding is None:
        raise CheckpointError(f"{keys.file.path}: {EMBEDDING} is missing; it is not the file of a language model")
    width, heads = keys.whole("embedding_length"), keys.whole("attention.head_count")
    head_dim = keys.whole("attention.key_length", width // heads if heads > 0 else 0)
    same = ("attention.value_length", "rope.dimension_count", "attention.key_length_swa", "attention.value_length_swa")
    for name in (*same, "rope.dimension_count_swa"):
        keys.only(name, head_dim)
    keys.only("vocab_size", embedding.shape[0])
    return {
        "vocab_size": embedding.shape[0],
        "hidden_dim": width,
        "intermediate_dim": keys.whole("feed_forward_length"),
        "num_layers": keys.whole("block_count"),
        "num_heads": heads,
        "num_kv_heads": keys.whole("attention.head_count_kv", heads),
        "head_dim": None if heads > 0 and head_dim * heads == width else head_dim,
        "max_seq_len": keys.whole("context_length"),
        "norm_eps": keys.number(eps),
        "tie_embeddings": HEAD not in keys.tensors,
    }


def write_common(shape: ModelShape, eps: str = "attention.layer_norm_rms_epsilon") -> dict[str, Any]:
    """Return the entries that all architectures have."""
    return {
        "block_count": U32(shape.num_layers),
        "context_length": U32(shape.max_seq_len),
        "embedding_length": U32(shape.hidden_dim),
        "feed_forward_length": U32(shape.intermediate_dim),
        "attention.head_count": U32(shape.num_heads),
        "attention.head_count_kv": U32(shape.num_kv_heads),
        eps: F32(shape.norm_eps),
        "vocab_size": U32(shape.vocab_size),
    }


def write_head_dim(shape: ModelShape) -> dict[str, Any]:
    """Return the entries of the width of a head."""
    return {
        "attention.key_length": U32(shape.resolved_head_dim),
        "attention.value_length": U32(shape.resolved_head_dim),
    }


def refuse(architecture: str, shape: ModelShape, **wrong: str) -> None:
    """Raise ConfigError for a field that is set, with the reason why a file of the architecture cannot say it."""
    for name, reason in wrong.items():
        if value := getattr(shape, name):
            raise ConfigError(
                f"{name} ({value}) cannot be written as GGUF: {reason} (architecture {architecture}); "
                "export a Hugging Face folder"
            )


def refuse_window(architecture: str, shape: ModelShape) -> None:
    """Raise ConfigError for a sliding window, in an architecture that has none; one that hides nothing is none."""
    if shape.sliding_window is not None and shape.sliding_window < shape.max_seq_len:
        raise ConfigError(
            f"sliding_window ({shape.sliding_window}) cannot be written as GGUF: llama.cpp lets all queries of the "
            f"architecture {architecture} see the whole context ({shape.max_seq_len}); set max_seq_len to at most the "
            "window, or export a Hugging Face folder"
        )


# -- experts ------------------------------------------------------------------------------------------


def expert_fields(keys: Keys) -> dict[str, Any]:
    """Return the fields of the experts."""
    return {
        "num_experts": keys.whole("expert_count"),
        "experts_per_token": keys.whole("expert_used_count"),
        "router_aux_loss_coef": 0.001,
        "router_z_loss_coef": 0.0,
    }


def write_experts(shape: ModelShape) -> dict[str, Any]:
    """Return the entries of the experts."""
    return {"expert_count": U32(shape.num_experts or 0), "expert_used_count": U32(shape.experts_per_token or 0)}
