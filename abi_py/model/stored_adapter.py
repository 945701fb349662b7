"""Adapters on the disk, whatever they are kept in, as `stored.py` is for models.

    a folder of PEFT's kind      formats/peft.py, of experts as they were before older_adapter.py
    a folder of mlx-lm's kind    mlx_adapter.py
    a GGUF file                  gguf_adapter.py

Who takes adapters by their path opens them here, so that one may be given wherever another may.
"""

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from ..config import LoraConfig, TrainableModelConfig
from ..errors import CheckpointError, listed
from ..formats.checkpoint_names import BASE_DIGEST, BASE_FINGERPRINT, BASE_STORAGE, CONFIG
from ..formats.forms import stored_names, stored_shape
from ..formats.gguf.adapter import is_gguf_adapter, open_gguf_adapter
from ..formats.gguf.container import is_gguf
from ..formats.mlx_lm import MLX_WEIGHTS, is_mlx_adapter, read_mlx_config
from ..formats.peft import ADAPTER_CONFIG, ADAPTER_WEIGHTS, AdapterFolder, read_adapter, read_adapter_config
from ..formats.safetensors import read_metadata
from ..parameters import Tensor
from .gguf_adapter import read_gguf_adapter
from .identity import Fingerprint
from .lora_targets import PREFIX
from .mlx_adapter import read_mlx_adapter
from .older_adapter import modernised

__all__ = [
    "HEAD",
    "base_digest_of",
    "base_facts_of",
    "base_fingerprint_of",
    "base_named_by",
    "base_storage_of",
    "check_tensors",
    "holds_adapters",
    "read_stored_adapter",
    "without_second",
]

HEAD = f"{PREFIX}lm_head.weight"  # in every family
RANK_AXES = {".a": -2, ".b": -1}  # of the two matrices of an adapter, by the ends of their names


def holds_adapters(place: Path) -> bool:
    """Say whether a folder or a GGUF file holds adapters alone."""
    return is_gguf_adapter(place) or ((place / ADAPTER_CONFIG).is_file() and not (place / CONFIG).is_file())


def read_stored_adapter(place: Path, shape: TrainableModelConfig, *, allow_nonfinite: bool = False) -> AdapterFolder:
    """Return the adapters in a place, for a model of this shape.

    FileNotFoundError if a file is missing; CheckpointError if one is damaged, says what is not computed here, holds an
    adapter that the model has no place for, or NaN or infinity and not `allow_nonfinite`.
    """
    if is_gguf(place):
        return read_gguf_adapter(place, shape, allow_nonfinite=allow_nonfinite)
    if is_mlx_adapter(place):
        return read_mlx_adapter(place, shape, allow_nonfinite=allow_nonfinite)
    return modernised(read_adapter(place, allow_nonfinite=allow_nonfinite), shape, place)


def _said_of_base(place: Path) -> Mapping[str, str]:
    """Return what the files of adapters say of the weights that they were trained on; those of others say nothing."""
    if is_gguf(place):
        return open_gguf_adapter(place).base
    return read_metadata(place / (MLX_WEIGHTS if is_mlx_adapter(place) else ADAPTER_WEIGHTS))


def base_digest_of(place: Path) -> str:
    """Return the digest of the weights that adapters were trained on; "" where their files do not say it."""
    return _said_of_base(place).get(BASE_DIGEST, "")


def base_fingerprint_of(place: Path) -> Fingerprint | None:
    """Return their fingerprint; None where their files do not say it, CheckpointError where they say nonsense."""
    text = _said_of_base(place).get(BASE_FINGERPRINT)
    return None if text is None else Fingerprint.read(text, f"{place}: {BASE_FINGERPRINT}")


def base_facts_of(place: Path) -> dict[str, str]:
    """Return both as the files say them, to be said again; {} where they say neither."""
    said = _said_of_base(place)
    return {name: said[name] for name in (BASE_DIGEST, BASE_FINGERPRINT) if name in said}


def base_storage_of(place: Path) -> str | None:
    """Return the storage that the weights were encoded in on which adapters were trained; None: as they were, or their
    files, as a GGUF file and mlx-lm's, do not say it."""
    return _said_of_base(place).get(BASE_STORAGE)


def base_named_by(place: Path) -> str | None:
    """Return the name or place of the model that adapters are of, as their files say it; a GGUF file does not."""
    if is_gguf(place):
        return None
    name = read_mlx_config(place).get("model") if is_mlx_adapter(place) else None
    if name is None:
        name = read_adapter_config(place).get("base_model_name_or_path")
    if name is not None and not isinstance(name, str):
        raise CheckpointError(f"{place / ADAPTER_CONFIG}: model is {name!r}; it must be the name or place of one")
    return name


def _kind_of(entry: Tensor) -> str:
    """Return what an entry of the table is a part of."""
    if entry.name.endswith(".m"):
        return "DoRA"
    axis = RANK_AXES.get(entry.name[-2:])
    return "what is trained whole" if axis is None else f"rank {entry.shape[axis]}"


def check_tensors(tensors: Mapping[str, np.ndarray], table: tuple[Tensor, ...], place: str) -> None:
    """Raise CheckpointError if what a folder holds is not what its configuration needs on this model."""
    known = set()
    for entry in table:
        form = entry.hf_names[0]
        wanted = stored_shape(form, entry)
        for name in stored_names(form, entry):
            known.add(name)
            found = tensors.get(name)
            if found is None or found.shape != wanted:
                what = "is missing" if found is None else f"has shape {found.shape}"
                rule = f"{_kind_of(entry)} on this model takes {wanted}; load it on the model it is of"
                raise CheckpointError(f"{place}: {name} {what}; {rule}")
            if found.dtype.kind != "f":
                raise CheckpointError(f"{place}: {name} is {found.dtype}; adapters are floats")
    unknown = sorted(set(tensors) - known)
    if unknown:
        raise CheckpointError(
            f"{place}: {listed(unknown, 1)} has no place in this model; its adapter_config.json names other "
            "targets, or it was trained on a model with more layers"
        )


def without_second(tensors: Mapping[str, np.ndarray], config: LoraConfig, place: str) -> dict[str, np.ndarray]:
    """Return what a folder holds without the second copy of the one matrix of embedding and head.

    PEFT writes both; CheckpointError if they differ.
    """
    if not config.ensure_weight_tying or HEAD not in tensors:
        return dict(tensors)
    rest = {name: tensor for name, tensor in tensors.items() if name != HEAD}
    if not any(np.array_equal(tensor, tensors[HEAD]) for name, tensor in rest.items() if "lora_" not in name):
        raise CheckpointError(f"{place}: {HEAD} differs from the embedding, and ensure_weight_tying makes them one")
    return rest
