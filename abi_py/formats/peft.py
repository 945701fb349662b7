"""PEFT's folder of a LoRA adapter: adapter_config.json and adapter_model.safetensors.

    base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight    (R, in)
    base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight    (out, R)
    base_model.model.model.layers.0.self_attn.q_proj.lora_magnitude_vector  (out,)    with DoRA
    base_model.model.model.layers.0.mlp.experts.lora_A.weight    (E R, in)    of target_parameters, B (out, R E)

As PEFT 0.21 writes and reads it.  What would compute something else than `model/lora.py` is refused.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ..errors import CheckpointError, ConfigError, shown
from ..files import atomic_files, json_text, write_pieces
from ..lora_config import ALL_LINEAR, SHORT, LoraConfig, is_expression
from ..untrusted import read_json
from .checkpoint_names import ADAPTER_CONFIG, BASE_STORAGE
from .finite import check_read, check_written
from .safetensors import Joined, read_safetensors, safetensors_pieces

__all__ = [
    "ADAPTER_CONFIG",
    "ADAPTER_WEIGHTS",
    "AdapterFolder",
    "adapter_config",
    "adapter_metadata",
    "read_adapter",
    "read_adapter_config",
    "write_adapter",
]

ADAPTER_WEIGHTS = "adapter_model.safetensors"
# What else is written, and the only values of it that are read.
FIXED: dict[str, Any] = {
    "layer_replication": None,
    "peft_type": "LORA",
}
UNREAD: dict[str, Any] = {
    "auto_mapping": None,
    "inference_mode": True,
    "init_lora_weights": True,
    "revision": None,
    "task_type": "CAUSAL_LM",
}
READ = (
    *("base_model_name_or_path", "lora_alpha", "lora_dropout", "r", "target_modules", "use_dora", "use_rslora"),
    *("exclude_modules", "layers_to_transform", "layers_pattern", "rank_pattern", "alpha_pattern"),
    *("bias", "modules_to_save", "ensure_weight_tying", "target_parameters"),
)
# Set even where nothing uses them; the first, PEFT corrects by the kind of module.
WITHOUT_EFFECT = ("fan_in_fan_out", "megatron_core", "peft_version", "qalora_group_size")
# Fields in which a configuration of ours has short names: `gate` is gate_proj there, and in PEFT's files the router.
WITH_SHORT = ("target_modules", "exclude_modules")
ROUTER = "mlp.gate"
REMEDY = "merge them in PEFT (merge_and_unload), and take the whole model"
INITIAL = (True, False, "gaussian", "orthogonal")  # other beginnings change the frozen weights


class AdapterFolder(NamedTuple):
    """What a folder holds: configuration, tensors by PEFT's names, and name or place of the frozen model, if said."""

    config: LoraConfig
    tensors: dict[str, np.ndarray]
    base_model: str | None


def adapter_config(
    config: LoraConfig, base_model: str | None = None, *, fan_in_fan_out: bool = False
) -> dict[str, Any]:
    """Return the content of adapter_config.json; `base_model` is the name or place of the frozen model.

    fan_in_fan_out  its matrices are stored (in, out), as GPT-2's
    """
    content = {
        **FIXED,
        **UNREAD,
        "alpha_pattern": {name: _number(value) for name, value in _pairs(config.alpha_pattern)},
        "base_model_name_or_path": base_model,
        "bias": config.bias,
        "ensure_weight_tying": config.ensure_weight_tying,
        "exclude_modules": _as_peft(config.exclude_modules),
        "fan_in_fan_out": fan_in_fan_out,
        "layers_pattern": _as_peft(config.layers_pattern),
        "layers_to_transform": _as_peft(config.layers_to_transform),
        "lora_alpha": _number(config.alpha),
        "lora_dropout": config.dropout,
        "modules_to_save": _as_peft(config.modules_to_save),
        "r": config.rank,
        "rank_pattern": {name: int(value) for name, value in _pairs(config.rank_pattern)},
        "target_modules": _as_peft(config.target_modules) or [],
        "target_parameters": _as_peft(config.target_parameters),
        "use_dora": config.use_dora,
        "use_rslora": config.use_rslora,
    }
    return dict(sorted(content.items()))


def _number(value: float | str) -> float:
    """Return a number as PEFT writes it, whole where it can be."""
    number = float(value)
    return int(number) if number == int(number) else number


def _pairs(pattern: Sequence[str] | None) -> list[tuple[str, str]]:
    """Return the names and values of NAME=VALUE."""
    return [(name, value) for name, _, value in (pair.rpartition("=") for pair in pattern or ())]


def _as_peft(values: Sequence[str] | Sequence[int] | None) -> list[str | int] | str | None:
    """Return names as a list, a regular expression as one text."""
    if values is None:
        return None
    first = values[0]
    return first if isinstance(first, str) and is_expression(first) else list(values)


def _names(value: Any, place: Path, field: str) -> tuple[str, ...] | None:
    """Return what PEFT has as a list of names, or as a regular expression for whole names; CheckpointError."""
    if value in (None, [], ""):
        return None
    if isinstance(value, str):
        text = value if is_expression(value) or value.lower() == ALL_LINEAR else f"({value})"
        return (text,)
    if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
        raise CheckpointError(f"{place}: {field} is {shown(value)}; it must be a list of names, or one text")
    if field not in WITH_SHORT:
        return tuple(value)
    names = tuple(ROUTER if name == "gate" else name for name in value if name == "gate" or not _is_short(name))
    if not names and field == "target_modules":
        rule = "no module has such a name, which PEFT takes as it is; write whole ones, such as q_proj"
        raise CheckpointError(f"{place}: {field} is {shown(value)}; {rule}")
    return names


def _is_short(name: str) -> bool:
    """Say whether a configuration of ours takes a name for a short one."""
    return name.strip() in SHORT


def _pattern(value: Any, place: Path, field: str) -> Mapping[str, Any] | None:
    """Return regular expressions and numbers; CheckpointError."""
    if not isinstance(value or {}, Mapping):
        raise CheckpointError(f"{place}: {field} is {shown(value)}; it must be an object of names and numbers")
    return {f"({name})" if _is_short(name) else name: number for name, number in (value or {}).items()} or None


def adapter_metadata(base: Mapping[str, str] | None = None, base_storage: str | None = None) -> dict[str, str]:
    """Return what the header of the tensors says, where PEFT looks for nothing: which weights they were trained on
    (`model.identity.Identity.facts`), and in which storage these were while they were."""
    return {"format": "pt", **(base or {}), **({BASE_STORAGE: base_storage} if base_storage else {})}


def write_adapter(
    folder: Path,
    tensors: Mapping[str, np.ndarray | Joined],
    description: Mapping[str, Any],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write both files, or leave those that are there as they are; `tensors` by PEFT's names, and `adapter_config`.

    `metadata` is that of `adapter_metadata`.

    NonFiniteError, and nothing written, for NaN or infinity.
    """
    check_written(folder / ADAPTER_WEIGHTS, tensors)
    text, metadata = json_text(description), metadata or adapter_metadata()
    with atomic_files(folder / ADAPTER_CONFIG) as open_new:
        write_pieces(open_new(folder / ADAPTER_WEIGHTS), safetensors_pieces(tensors, metadata))
        open_new(folder / ADAPTER_CONFIG).write(text.encode())


def read_adapter(folder: Path, *, allow_nonfinite: bool = False) -> AdapterFolder:
    """Return what a folder holds; each file is read once.

    FileNotFoundError if a file is missing; CheckpointError if one is damaged, says what is not computed here, or holds
    NaN or infinity and not `allow_nonfinite`.
    """
    content = read_adapter_config(folder)
    place = folder / ADAPTER_CONFIG
    for name, wanted in FIXED.items():
        found = content.get(name, wanted)
        if found != wanted and not (found in (None, [], {}) and wanted in (None, {})):
            raise CheckpointError(f"{place}: {name} is {shown(found)}; this version computes only {wanted!r}; {REMEDY}")
    unknown = sorted(set(content) - {*FIXED, *UNREAD, *READ, *WITHOUT_EFFECT})
    for name in unknown:
        if content[name]:
            found = shown(content[name])
            raise CheckpointError(f"{place}: {name} is {found}; this version does not compute that; {REMEDY}")
    if content.get("init_lora_weights", True) not in INITIAL:
        found = shown(content["init_lora_weights"])
        raise CheckpointError(f"{place}: init_lora_weights is {found}, which changes frozen weights; {REMEDY}")
    targets = "target_parameters" if content.get("target_parameters") else "target_modules"
    missing = [name for name in ("r", "lora_alpha", targets) if content.get(name) is None]
    if missing:
        raise CheckpointError(f"{place} lacks {', '.join(missing)}; it is not the adapter_config.json of LoRA")
    names = ("target_modules", "target_parameters", "exclude_modules", "layers_pattern", "modules_to_save")
    fields: dict[str, Any] = {field: _names(content.get(field), place, field) for field in names}
    fields |= {field: _pattern(content.get(field), place, field) for field in ("rank_pattern", "alpha_pattern")}
    blocks = content.get("layers_to_transform")
    try:
        config = LoraConfig(
            rank=content["r"],
            alpha=content["lora_alpha"],
            dropout=content.get("lora_dropout") or 0.0,
            layers_to_transform=None if blocks == [] else blocks,
            bias=content.get("bias") or "none",
            ensure_weight_tying=bool(content.get("ensure_weight_tying") and content.get("modules_to_save")),
            use_rslora=bool(content.get("use_rslora")),
            use_dora=bool(content.get("use_dora")),
            **fields,
        )
    except ConfigError as error:
        raise CheckpointError(f"{place}: {error}") from None
    tensors = read_safetensors(folder / ADAPTER_WEIGHTS)
    if not allow_nonfinite:
        check_read(folder / ADAPTER_WEIGHTS, tensors)
    return AdapterFolder(config, tensors, content.get("base_model_name_or_path"))


def read_adapter_config(folder: Path) -> dict[str, Any]:
    """Return the content of adapter_config.json; FileNotFoundError without it, CheckpointError if it is damaged."""
    place = folder / ADAPTER_CONFIG
    if not place.is_file():
        raise FileNotFoundError(f"{place} does not exist; give a folder that LoraModel.save or PEFT has written")
    content: dict[str, Any] = read_json(place, {"base_model_name_or_path": str | None})
    return content
