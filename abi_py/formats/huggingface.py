"""Hugging Face's folder of a Llama model: config.json and model.safetensors, alone or in shards.

    reads    model_type llama, and the DeepZig folder's `deepzig_conversational`, which is the same network
    refuses  what would compute something else than this package: other activations, biases, scaled RoPE
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ..config import TrainableModelConfig
from ..errors import CheckpointError, ConfigError
from .safetensors import read_safetensors

__all__ = ["CONFIG", "config_from_huggingface", "huggingface_config", "read_config", "read_weights"]

CONFIG, WEIGHTS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
MODEL_TYPES = ("llama", "deepzig_conversational")
FIELDS = {
    "vocab_size": "vocab_size",
    "hidden_dim": "hidden_size",
    "intermediate_dim": "intermediate_size",
    "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "max_seq_len": "max_position_embeddings",
}
THETA = ("rope_theta", "rope_base", "qk_rope_base")


def huggingface_config(config: TrainableModelConfig) -> dict[str, Any]:
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
        raise CheckpointError(f"{place}: model_type is {kind!r}; this version reads {' and '.join(MODEL_TYPES)}")
    rope = content.get("rope_parameters") or content.get("rope_scaling") or {}
    scaling = rope.get("rope_type", rope.get("type", "default"))
    wanted: dict[str, tuple[Any, Any]] = {
        "hidden_act": (content.get("hidden_act", "silu"), "silu"),
        "attention_bias": (bool(content.get("attention_bias")), False),
        "mlp_bias": (bool(content.get("mlp_bias")), False),
        "rope_scaling": (scaling, "default"),
    }
    for name, (found, computed) in wanted.items():
        if found != computed:
            raise CheckpointError(f"{place}: {name} is {found!r}; this version computes only {computed!r}")
    missing = [name for name in FIELDS.values() if name not in content]
    if missing:
        raise CheckpointError(f"{place} lacks {', '.join(missing)}; it is not the config.json of a Llama model")
    theta = next((content[name] for name in THETA if name in content), rope.get("rope_theta", 10000.0))
    values = {ours: content[theirs] for ours, theirs in FIELDS.items()}
    values["num_kv_heads"] = content.get("num_key_value_heads") or values["num_heads"]
    values["head_dim"] = content.get("head_dim")
    values["norm_eps"] = content.get("rms_norm_eps", 1e-6)  # the defaults of LlamaConfig
    values["tie_embeddings"] = content.get("tie_word_embeddings", False)
    try:
        return TrainableModelConfig.from_dict({**values, "rope_theta": theta})
    except ConfigError as error:
        raise CheckpointError(f"{place}: {error}") from None


def read_config(folder: Path) -> TrainableModelConfig:
    """Read the shape of a folder's model; CheckpointError if config.json is damaged or of another kind of model."""
    path = folder / CONFIG
    content = _read_json(path)
    return config_from_huggingface(content, str(path))


def read_weights(folder: Path, model: Any) -> None:
    """Fill a model's weights from a folder; CheckpointError names a tensor that is missing or of another shape.

    Tensors may be F32, BF16, F16 or F64.  A tied model's lm_head, if it is stored all the same, is left aside.
    """
    tensors = _read_tensors(folder)
    table = model.parameters.table
    for entry in table:
        found = tensors.get(entry.hf_name)
        if found is None or found.shape != entry.shape:
            what = "is missing" if found is None else f"has shape {found.shape} instead of {entry.shape}"
            raise CheckpointError(f"{folder}: {entry.hf_name} {what}; config.json belongs to other weights")
        if found.dtype.kind != "f":
            raise CheckpointError(f"{folder}: {entry.hf_name} is {found.dtype}; this version reads floats")
    for entry in table:
        model.weights[entry.name] = tensors[entry.hf_name]


def _read_tensors(folder: Path) -> dict[str, np.ndarray]:
    if (folder / WEIGHTS).is_file():
        return read_safetensors(folder / WEIGHTS)
    if not (folder / INDEX).is_file():
        raise CheckpointError(f"{folder} has neither {WEIGHTS} nor {INDEX}; give a folder with a model's weights")
    places = _read_json(folder / INDEX).get("weight_map")
    if not isinstance(places, dict):
        raise CheckpointError(f"{folder / INDEX} has no weight_map; it is damaged")
    tensors: dict[str, np.ndarray] = {}
    for name in sorted(set(places.values())):
        tensors |= read_safetensors(folder / Path(name).name)
    return tensors


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{path} is not JSON ({error}); it is damaged") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds a JSON {type(content).__name__}, but must hold an object; it is damaged")
    return content
