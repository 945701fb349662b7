"""Hugging Face's folder of a Llama model: config.json and model.safetensors, alone or in shards.

    reads    model_type llama, and the DeepZig folder's `deepzig_conversational`, which is the same network
    refuses  what would compute something else than this package: other activations, biases, scaled RoPE ...

Where two entries speak of one thing, transformers' choice holds (measured with 5.24), or an error names both:

    rope_scaling, if it says anything, hides rope_parameters; the rope_theta inside hides the one beside them
    head_dim hides hidden_size / num_attention_heads
    a tied model whose lm_head differs from its embedding is an error (transformers takes both and unties them)
    tensor names may have `model.` before them or not; a tensor stored under both names is an error
    a tied model may have stored its matrix as embedding, as lm_head, or as both
"""

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ..config import TrainableModelConfig
from ..errors import CheckpointError, ConfigError, listed, shown
from ..parameters import tensor_table
from ..shape import ModelShape
from ..untrusted import read_json
from .finite import check_read
from .safetensors import read_safetensors

__all__ = [
    "CONFIG",
    "config_from_huggingface",
    "fill_weights",
    "huggingface_config",
    "open_weights",
    "read_config",
    "read_weights",
]

CONFIG, WEIGHTS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
MAX_NAME = 256  # bytes of a file's name, which systems refuse to look for
MODEL_TYPES = ("llama", "deepzig_conversational")
FIELDS = {
    "vocab_size": "vocab_size",
    "hidden_dim": "hidden_size",
    "intermediate_dim": "intermediate_size",
    "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "max_seq_len": "max_position_embeddings",
}
# The DeepZig folder writes it under three names; transformers knows the first.
THETA = ("rope_theta", "rope_base", "qk_rope_base")
# What would change the arithmetic, and the values with which it does not (null and empty never do).
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu", "swish"),
    **dict.fromkeys(("attention_bias", "mlp_bias", "qkv_bias", "use_bias", "use_qkv_bias", "bias"), (False,)),
    **dict.fromkeys(("qk_norm", "use_qk_norm", "qk_layernorm", "alibi", "rope_interleaved"), (False,)),
    **dict.fromkeys(("is_encoder_decoder", "add_cross_attention", "use_bidirectional_attention"), (False,)),
    "is_causal": (True,),
    **dict.fromkeys(("attention_dropout", "hidden_dropout", "hidden_dropout_prob"), (0,)),
    **dict.fromkeys(("partial_rotary_factor", "rotary_pct", "rope_pct"), (1,)),
    **dict.fromkeys(("logit_scale", "logits_scaling", "logit_scaling", "lm_head_multiplier", "scale_emb"), (1,)),
    **dict.fromkeys(("embedding_multiplier", "residual_multiplier", "attention_multiplier", "scale_depth"), (1,)),
    **dict.fromkeys(("final_logit_softcapping", "attn_logit_softcapping", "query_pre_attn_scalar", "clip_qkv"), ()),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts"), (0,)),
    **dict.fromkeys(("quantization_config", "compression_config", "pruned_heads"), ()),
    **dict.fromkeys(("no_rope_layers", "no_rope_layer_interval"), ()),
}
ROPE = {"rope_type": ("default",), "type": ("default",), "partial_rotary_factor": (1,)}
# Buffers that older versions stored, and that follow from config.json.
DERIVED = re.compile(r"(^|\.)rotary_emb\.(inv_freq|original_inv_freq|cos_cached|sin_cached)$")
EMBEDDING, HEAD = "embed_tokens.weight", "lm_head.weight"
ROWS = 1024  # of two matrices, compared at once


def huggingface_config(config: ModelShape) -> dict[str, Any]:
    """Return the fields of a Hugging Face `LlamaConfig` for this model."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_dim,
        "intermediate_size": config.intermediate_dim,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.resolved_head_dim,
        "max_position_embeddings": config.max_seq_len,
        "rms_norm_eps": config.norm_eps,
        "rope_theta": config.rope_theta,
        "tie_word_embeddings": config.tie_embeddings,
        "hidden_act": "silu",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "mlp_bias": False,
        "initializer_range": 0.02,
        "bos_token_id": None,
        "eos_token_id": None,
        "torch_dtype": "float32",
        "use_cache": True,
    }


def config_from_huggingface(content: Mapping[str, Any], place: str = CONFIG) -> TrainableModelConfig:
    """Return the shape that a config.json describes; CheckpointError names what this package cannot compute."""
    kind = content.get("model_type")
    if kind not in MODEL_TYPES:
        raise CheckpointError(f"{place}: model_type is {shown(kind)}; this version reads {' and '.join(MODEL_TYPES)}")
    _refuse_others(content, NEUTRAL, place)
    _refuse_windows(content, place)
    missing = [name for name in FIELDS.values() if name not in content]
    if missing:
        raise CheckpointError(f"{place} lacks {', '.join(missing)}; it is not the config.json of a Llama model")
    values = {ours: content[theirs] for ours, theirs in FIELDS.items()}
    values["num_kv_heads"] = content.get("num_key_value_heads") or values["num_heads"]
    values["head_dim"] = content.get("head_dim")
    values["norm_eps"] = content.get("rms_norm_eps", 1e-6)  # the defaults of LlamaConfig
    values["tie_embeddings"] = content.get("tie_word_embeddings") or False
    try:
        return TrainableModelConfig.from_dict({**values, "rope_theta": _rope_theta(content, place)})
    except ConfigError as error:
        raise CheckpointError(f"{place}: {error}") from None


def _refuse_others(content: Mapping[str, Any], neutral: Mapping[str, tuple[Any, ...]], place: str) -> None:
    """Raise CheckpointError for an entry that has another value than those with which it changes nothing."""
    for name, computed in neutral.items():
        found = content.get(name)
        if found not in (None, [], {}) and found not in computed:
            rule = f"only {' or '.join(map(repr, computed))}" if computed else "nothing of that kind"
            raise CheckpointError(f"{place}: {name} is {shown(found)}; this version computes {rule}")


def _refuse_windows(content: Mapping[str, Any], place: str) -> None:
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


def _rope_theta(content: Mapping[str, Any], place: str) -> Any:
    """Return the base of RoPE; CheckpointError for any RoPE but the plain one."""
    table = next((name for name in ("rope_scaling", "rope_parameters") if content.get(name)), "")
    rope = content[table] if table else {}
    if not isinstance(rope, Mapping):
        raise CheckpointError(f"{place}: {table} is {shown(rope)}, but must be an object; it is damaged")
    if "rope_type" in rope:
        rope = {name: value for name, value in rope.items() if name != "type"}  # its older name
    unknown = {name: () for name in rope if name != "rope_theta"}
    _refuse_others(
        {f"{table}.{name}": value for name, value in rope.items()},
        {f"{table}.{name}": values for name, values in (unknown | ROPE).items()},
        place,
    )
    if "rope_theta" in rope:
        return rope["rope_theta"]
    names = THETA if content["model_type"] != "llama" else THETA[:1]
    given = {name: content[name] for name in names if name in content}
    values = list(given.values())
    if any(value != values[0] for value in values):
        said = " and ".join(f"{name} ({shown(value)})" for name, value in given.items())
        raise CheckpointError(f"{place}: {said} must be equal, because they are one thing; remove those that are wrong")
    return values[0] if values else 10000.0


def read_config(folder: Path) -> TrainableModelConfig:
    """Read the shape of a folder's model; CheckpointError if config.json is damaged or of another kind of model."""
    path = folder / CONFIG
    return config_from_huggingface(read_json(path), str(path))


def read_weights(folder: Path, model: Any, *, allow_nonfinite: bool = False) -> None:
    """Fill a model's weights from a folder: `open_weights`, then `fill_weights`."""
    fill_weights(folder, model, open_weights(folder, model.config), allow_nonfinite=allow_nonfinite)


def fill_weights(
    folder: Path, model: Any, tensors: Mapping[str, np.ndarray], *, allow_nonfinite: bool = False
) -> None:
    """Copy what `open_weights` has returned into a model; CheckpointError for NaN or infinity, if not allowed."""
    for name, tensor in tensors.items():
        model.weights[name] = tensor
    if not allow_nonfinite:
        check_read(folder, {entry.hf_name: model.weights[entry.name] for entry in model.parameters.table})


def open_weights(folder: Path, config: TrainableModelConfig) -> dict[str, np.ndarray]:
    """Return the tensors of a folder by our names, mapped from its files, once they are those of a model of this shape.

    Nothing of the model's size is made before: config.json may say anything.  Tensors may be F32, BF16, F16 or F64.
    CheckpointError names a tensor that is missing, of another shape, or without a place in the model.
    """
    stored = _by_bare_name(folder, _read_tensors(folder))
    tensors = {bare: tensor for bare, (_, tensor) in stored.items()}
    if config.tie_embeddings and HEAD in tensors:
        head = tensors.pop(HEAD)
        if not _equal(head, tensors.setdefault(EMBEDDING, head)):
            raise CheckpointError(
                f"{folder}: {stored[HEAD][0]} differs from {stored[EMBEDDING][0]}, though tie_word_embeddings in "
                f"{CONFIG} says that they are one; set it to false to use both, or remove the head that is wrong"
            )
    if config.num_layers > len(tensors):  # before a table is made of as many as it says
        raise CheckpointError(
            f"{folder}: num_hidden_layers in {CONFIG} is {config.num_layers:,}, and its files hold {len(tensors):,} "
            "tensors; config.json belongs to other weights"
        )
    places = {_bare(entry.hf_name): entry for entry in tensor_table(config)}
    for bare, entry in places.items():
        found = tensors.get(bare)
        if found is None or found.shape != entry.shape:
            what = "is missing" if found is None else f"has shape {found.shape} instead of {entry.shape}"
            raise CheckpointError(f"{folder}: {entry.hf_name} {what}; config.json belongs to other weights")
        if found.dtype.kind != "f":
            raise CheckpointError(f"{folder}: {entry.hf_name} is {found.dtype}; this version reads floats")
    extra = [stored[bare][0] for bare in tensors if bare not in places and not DERIVED.search(bare)]
    if extra:
        raise CheckpointError(
            f"{folder}: the model that {CONFIG} describes has no place for {listed(sorted(extra), 3)}, so it "
            "would compute something else than they were trained for; use the config.json that belongs to them"
        )
    return {entry.name: tensors[bare] for bare, entry in places.items()}


def _bare(name: str) -> str:
    return name.removeprefix("model.")


def _by_bare_name(folder: Path, tensors: Mapping[str, np.ndarray]) -> dict[str, tuple[str, np.ndarray]]:
    """Return the tensors, and what they are called, by their names without `model.` in front."""
    found: dict[str, tuple[str, np.ndarray]] = {}
    for name, tensor in tensors.items():
        other = found.setdefault(_bare(name), (name, tensor))[0]
        if other != name:
            raise CheckpointError(f"{folder} holds {other} and {name}, which are names of one tensor; remove one")
    return found


def _equal(one: np.ndarray, other: np.ndarray) -> bool:
    """Say whether two matrices hold the same numbers, NaN among them."""
    if one is other:
        return True
    rows = range(0, len(one) if one.ndim else 0, ROWS)
    return one.shape == other.shape and all(
        np.array_equal(one[i : i + ROWS], other[i : i + ROWS], equal_nan=True) for i in rows
    )


def _read_tensors(folder: Path) -> dict[str, np.ndarray]:
    if (folder / WEIGHTS).is_file():
        return read_safetensors(folder / WEIGHTS)
    if not (folder / INDEX).is_file():
        pickled = " (a pickle, pytorch_model.bin, is never opened)" if (folder / "pytorch_model.bin").is_file() else ""
        raise CheckpointError(
            f"{folder} has neither {WEIGHTS} nor {INDEX}{pickled}; give a folder with a model's weights"
        )
    places = read_json(folder / INDEX, {"weight_map": dict[str, str]})["weight_map"]
    tensors: dict[str, np.ndarray] = {}
    origin: dict[str, str] = {}
    for file in sorted(set(places.values())):
        shard = folder / Path(file).name
        if not 0 < len(os.fsencode(Path(file).name)) < MAX_NAME or not shard.is_file():
            raise CheckpointError(f"{folder}: {shown(file)}, which {INDEX} names, is missing; copy the folder again")
        for name, tensor in read_safetensors(shard).items():
            if origin.setdefault(name, file) != file:
                raise CheckpointError(f"{folder}: {name} is in {origin[name]} and in {file}; remove one of them")
            tensors[name] = tensor
    return tensors
