"""Adapters of mlx-lm's kind as those of a model, by PEFT's names, and the other way.

mlx-lm calls a module as Hugging Face does, but for what the names begin with (`transformer.` of GPT-2 is `model.`
there).  It has one rank and one factor for all: narrower adapters are written with zeros to the widest rank, and where
a factor differs B takes the quotient, so what is computed is the same.
"""

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from ..config import LoraConfig, TrainableModelConfig
from ..errors import CheckpointError, ConfigError
from ..families import family, tensor_table
from ..formats.checkpoint_names import ADAPTER_CONFIG
from ..formats.finite import check_read
from ..formats.mlx_lm import MLX_WEIGHTS, read_mlx_config, write_mlx_adapter
from ..formats.peft import AdapterFolder
from ..formats.safetensors import read_safetensors
from ..parameters import Tensor
from .gguf_adapter import ELSEWHERE, LowRank
from .layers.embedding import Embedding
from .lora_targets import named, trained_table

__all__ = ["read_mlx_adapter", "save_mlx_adapter"]

TABLES = (Embedding.name, Embedding.positions)
PREFIX = "model."  # of all names in mlx-lm but the head's


def _their_name(shape: TrainableModelConfig, module: str) -> str:
    """Return what mlx-lm calls a module, by Hugging Face's name."""
    own = family(shape).prefix
    return PREFIX + module.removeprefix(own) if module.startswith(own) else module


def read_mlx_adapter(folder: Path, shape: TrainableModelConfig, *, allow_nonfinite: bool = False) -> AdapterFolder:
    """Return the adapters in a folder, for a model of this shape, as `formats.peft.read_adapter` returns PEFT's.

    CheckpointError if it is damaged, holds an adapter without a place in the model, or what is not computed here, or
    NaN or infinity and not `allow_nonfinite`.
    """
    content, place = read_mlx_config(folder), folder / MLX_WEIGHTS
    stored = read_safetensors(place)
    if not allow_nonfinite:
        check_read(place, stored)
    modules = {_their_name(shape, each): each for each in _modules(shape)}
    found = dict.fromkeys(name.rpartition(".")[0] for name in stored)
    stray = next((each for each in found if each not in modules), None)
    if stray is not None:
        raise CheckpointError(f"{place}: {stray} has no place in this model, a {shape.family.value}; {ELSEWHERE}")
    tables = {_their_name(shape, _module(each)) for each in tensor_table(shape) if each.name in TABLES}
    table = next((each for each in found if each in tables), None)
    if table is not None:
        what = "an adapter of an embedding in mlx-lm's form is not computed"
        raise CheckpointError(f"{place}: {table}: {what}; fuse it in mlx-lm (mlx_lm.fuse), and take the whole model")
    parameters = content["lora_parameters"]
    missing = next((key for key in ("rank", "scale") if key not in parameters), None)
    if missing is not None or not stored:
        what = f"lora_parameters lack {missing}" if missing is not None else f"{MLX_WEIGHTS} holds no tensor"
        raise CheckpointError(f"{folder / ADAPTER_CONFIG}: {what}; it is not that of an adapter of mlx-lm")
    try:
        config = LoraConfig(
            rank=parameters["rank"],
            alpha=parameters["scale"] * parameters["rank"],
            dropout=parameters.get("dropout") or 0.0,
            target_modules=tuple(modules[each] for each in found),
        )
        config = named(shape, config)
    except (ConfigError, TypeError) as error:
        raise CheckpointError(f"{folder / ADAPTER_CONFIG}: {error}") from None
    tensors = {}
    for entry in trained_table(shape, config):
        module, _, half = entry.hf_name.removeprefix("base_model.model.").removesuffix(".weight").rpartition(".")
        name = f"{_their_name(shape, module)}.{half.lower()}"
        numbers = stored.get(name)
        if numbers is None or numbers.shape != entry.shape[::-1]:
            what = "is missing" if numbers is None else f"has shape {numbers.shape}"
            rule = f"rank {config.rank} on this model takes {entry.shape[::-1]}"
            raise CheckpointError(f"{place}: {name} {what}; {rule}; {ELSEWHERE}")
        tensors[entry.hf_name] = np.ascontiguousarray(numbers.T)
    unread = sorted(set(stored) - {f"{each}.lora_{half}" for each in found for half in "ab"})
    if unread:
        raise CheckpointError(f"{place}: {unread[0]} is no part of an adapter; fuse it in mlx-lm (mlx_lm.fuse)")
    base = content.get("model")
    return AdapterFolder(config, tensors, base if isinstance(base, str) else None)


def _modules(shape: TrainableModelConfig) -> list[str]:
    return [_module(tensor) for tensor in tensor_table(shape)]


def _module(tensor: Tensor) -> str:
    return tensor.hf_name.removesuffix(".weight")


def save_mlx_adapter(
    folder: Path,
    shape: TrainableModelConfig,
    adapters: Mapping[str, LowRank],
    *,
    dropout: float = 0.0,
    base_model: str | None = None,
    base: Mapping[str, str] | None = None,
) -> None:
    """Write the adapters of a model's matrices, by our names, as mlx-lm reads them; errors of `write_mlx_adapter`."""
    modules = {tensor.name: _module(tensor) for tensor in tensor_table(shape)}
    rank, scale = max(len(each.a) for each in adapters.values()), next(iter(adapters.values())).scale
    tensors = {}
    for name, (a, b, factor) in adapters.items():
        theirs, wider = _their_name(shape, modules[name]), ((0, 0), (0, rank - len(a)))
        tensors[f"{theirs}.lora_a"] = np.pad(a.T, wider)
        tensors[f"{theirs}.lora_b"] = np.pad(b * np.float32(factor / scale) if factor != scale else b, wider).T.copy()
    write_mlx_adapter(
        folder, tensors, blocks=shape.num_layers, scale=scale, dropout=dropout,
        base_model=base_model, base=base,
    )  # fmt: skip
