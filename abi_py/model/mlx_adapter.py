"""Adapters of mlx-lm's kind as those of a model, by PEFT's names, and the other way.

mlx-lm calls a module as Hugging Face does, but for what the names begin with (`transformer.` of GPT-2 is `model.`
there), and for experts, which it stacks as `switch_mlp`.  It has one rank and one factor for all: narrower adapters are
written with zeros to the widest rank, and where a factor differs B takes the quotient, so what is computed is the same.

Gate and up of experts have one A here, as in PEFT, and each its own there.  Ours is written twice; where theirs differ,
ours is both below each other, of twice the rank, and B is block-diagonal.
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..config import LoraConfig, TrainableModelConfig
from ..errors import CheckpointError, ConfigError
from ..families import family, layers, tensor_table
from ..formats.checkpoint_names import ADAPTER_CONFIG
from ..formats.finite import check_read
from ..formats.forms import stored_form
from ..formats.mlx_lm import DORA, MLX_WEIGHTS, read_mlx_config, write_mlx_adapter
from ..formats.peft import AdapterFolder
from ..formats.safetensors import read_safetensors
from ..parameters import Tensor
from ..untrusted import check
from .expert_modules import ExpertParameter, expert_parameters, on_diagonal
from .gguf_adapter import ELSEWHERE, LowRank
from .layers.embedding import Embedding
from .layers.magnitude import Magnitude
from .lora_targets import Kind, Target, chosen_targets, named, trained_table

__all__ = ["read_mlx_adapter", "save_mlx_adapter"]

PARAMETERS = {"rank": int, "scale": float, "dropout": float | None}
TABLES = (Embedding.name, Embedding.positions)
PREFIX = "model."  # of all names in mlx-lm but the head's
EXPERT = re.compile(r"\.experts\.\{e\}\..*")  # of Hugging Face's names
FUSE = "fuse it in mlx-lm (mlx_lm.fuse), and take the whole model"

Arrays = Mapping[str, np.ndarray]


def _their_name(shape: TrainableModelConfig, tensor: Tensor) -> str:
    """Return what mlx-lm calls the module of a matrix."""
    own, name = family(shape).prefix, tensor.hf_name.removesuffix(".weight")
    name = PREFIX + name.removeprefix(own) if name.startswith(own) else name
    return EXPERT.sub(f".switch_mlp.{tensor.name.rpartition('experts_')[2]}_proj", name)


# -- reading ------------------------------------------------------------------------------------------


def read_mlx_adapter(folder: Path, shape: TrainableModelConfig, *, allow_nonfinite: bool = False) -> AdapterFolder:
    """Return the adapters in a folder, for a model of this shape, as `formats.peft.read_adapter` returns PEFT's.

    CheckpointError if it is damaged, holds an adapter without a place in the model, or what is not computed here, or
    NaN or infinity and not `allow_nonfinite`.
    """
    content, place = read_mlx_config(folder), folder / MLX_WEIGHTS
    stored = read_safetensors(place)
    if not allow_nonfinite:
        check_read(place, stored)
    every = {_their_name(shape, tensor): tensor for tensor in tensor_table(shape) if len(tensor.shape) > 1}
    names = dict.fromkeys(name.rpartition(".")[0] for name in stored)
    stray = next((name for name in names if name not in every), None)
    if stray is not None:
        raise CheckpointError(f"{place}: {stray} has no place in this model, a {shape.family.value}; {ELSEWHERE}")
    dora = content.get("fine_tune_type") == DORA
    for name in names:
        _check_table(every[name], dora, shape, f"{place}: {name}")
    parameters = content["lora_parameters"]
    missing = next((key for key in ("rank", "scale") if key not in parameters), None)
    if missing is not None or not stored:
        what = f"lora_parameters lack {missing}" if missing is not None else f"{MLX_WEIGHTS} holds no tensor"
        raise CheckpointError(f"{folder / ADAPTER_CONFIG}: {what}; it is not that of an adapter of mlx-lm")
    check(parameters, PARAMETERS, f"{folder / ADAPTER_CONFIG}: lora_parameters")
    stacks = [
        each
        for each in expert_parameters(shape, layers(shape))
        if any(_their_name(shape, tensor) in names for tensor in each.tensors)
    ]
    parts = {tensor.name for each in stacks for tensor in each.tensors}
    modules = [every[name].hf_names[-1].name.removesuffix(".weight") for name in names if every[name].name not in parts]
    try:
        config = _config(parameters, modules, [each.name for each in stacks], dora)
        wanted = {name: _shapes(every[name], config.rank, dora) for name in names}
        _check_shapes(stored, wanted, config.rank, place)
        made = {each.name: _stack(stored, shape, each) for each in stacks if not each.is_router}
        twice = {re.escape(name): a.shape[1] for name, (a, _) in made.items() if a.shape[1] != config.rank}
        alphas = {name: config.scaling * rank for name, rank in twice.items()}
        config = named(shape, config.replace(rank_pattern=twice or None, alpha_pattern=alphas or None))
    except ConfigError as error:
        raise CheckpointError(f"{folder / ADAPTER_CONFIG}: {error}") from None
    table = {entry.name: entry for entry in trained_table(shape, config)}
    tensors = {}
    for target in chosen_targets(shape, config):
        ours = dict(zip("ab", made[target.module])) if target.module in made else _ours(stored, shape, target)
        for part, numbers in ours.items():
            entry = table[f"{target.tensor.name}.{part}"]
            tensors[entry.hf_name] = np.ascontiguousarray(stored_form(numbers, entry.hf_names[0]))
    base = content.get("model")
    return AdapterFolder(config, tensors, base if isinstance(base, str) else None)


def _check_table(tensor: Tensor, dora: bool, shape: TrainableModelConfig, place: str) -> None:
    """Raise CheckpointError for an adapter of a table that is another one here."""
    if tensor.name in TABLES and dora:
        raise CheckpointError(f"{place}: lengths of an embedding's rows are not computed, but of its columns; {FUSE}")
    if tensor.name == Embedding.name and shape.tie_embeddings:
        rule = "it is embedding and head in one, and an adapter of both is not computed"
        raise CheckpointError(f"{place}: {rule}; {FUSE}")


def _config(parameters: Mapping[str, Any], modules: Sequence[str], stacks: Sequence[str], dora: bool) -> LoraConfig:
    """Return the configuration of such adapters; ConfigError for what cannot be one.

    Dropout, which parameters cannot have, is left out beside them, as `older_adapter` does: it acts in training only.
    """
    config = LoraConfig(
        rank=parameters["rank"],
        alpha=parameters["scale"] * parameters["rank"],
        dropout=parameters.get("dropout") or 0.0,
        target_modules=tuple(modules) or None,
        use_dora=dora,
    )
    return config.replace(target_parameters=tuple(stacks), dropout=0.0) if stacks else config


def _shapes(tensor: Tensor, rank: int, dora: bool) -> dict[str, tuple[int, ...]]:
    """Return the shapes of what an adapter of a matrix has in mlx-lm, by the last word of their names."""
    *experts, outer, inner = tensor.shape
    if experts:
        return {"lora_a": (*experts, rank, inner), "lora_b": (*experts, outer, rank)}
    if tensor.name in TABLES:  # of which rows are looked up
        return {"lora_a": (outer, rank), "lora_b": (rank, inner)}
    return {"lora_a": (inner, rank), "lora_b": (rank, outer), **({"m": (outer,)} if dora else {})}


def _check_shapes(stored: Arrays, wanted: Mapping[str, Mapping[str, tuple[int, ...]]], rank: int, place: Path) -> None:
    """Raise CheckpointError for a tensor that is missing, of another shape, or no part of an adapter."""
    expected = {f"{name}.{part}": sizes for name, parts in wanted.items() for part, sizes in parts.items()}
    for name, sizes in expected.items():
        numbers = stored.get(name)
        if numbers is None or numbers.shape != sizes:
            what = "is missing" if numbers is None else f"has shape {numbers.shape}"
            raise CheckpointError(f"{place}: {name} {what}; rank {rank} on this model takes {sizes}; {ELSEWHERE}")
    unread = sorted(set(stored) - set(expected))
    if unread:
        raise CheckpointError(f"{place}: {unread[0]} is no part of an adapter; {FUSE}")


def _stack(stored: Arrays, shape: TrainableModelConfig, parameter: ExpertParameter) -> tuple[np.ndarray, np.ndarray]:
    """Return A (E, R, in) and B (E, out, R) of experts' matrices that are one parameter, from those of each."""
    a: list[np.ndarray] = []
    b: list[np.ndarray] = []
    for tensor in parameter.tensors:
        name = _their_name(shape, tensor)
        if f"{name}.lora_a" in stored:
            a.append(stored[f"{name}.lora_a"])
            b.append(stored[f"{name}.lora_b"])
        else:  # of no rank
            b.append(np.zeros((*tensor.shape[:2], 0), np.float32))
    if len(a) == len(b) and all(np.array_equal(a[0], each) for each in a):
        return a[0], np.concatenate(b, axis=1)
    return np.concatenate(a, axis=1), on_diagonal(b)


def _ours(stored: Arrays, shape: TrainableModelConfig, target: Target) -> dict[str, np.ndarray]:
    """Return A, B and the lengths of a matrix, as they are here."""
    name = _their_name(shape, target.tensor)
    a, b = stored[f"{name}.lora_a"], stored[f"{name}.lora_b"]
    lengths = {"m": stored[f"{name}.m"]} if f"{name}.m" in stored else {}
    return {"a": a if target.kind is Kind.TABLE else a.T, "b": b.T, **lengths}


# -- writing ------------------------------------------------------------------------------------------


def save_mlx_adapter(
    folder: Path,
    shape: TrainableModelConfig,
    adapters: Mapping[str, LowRank],
    *,
    lengths: Mapping[str, Magnitude],
    dropout: float = 0.0,
    base_model: str | None = None,
    base: Mapping[str, str] | None = None,
) -> None:
    """Write the adapters of a model's matrices, by our names, as mlx-lm reads them.

    lengths   those of DoRA, by the same names

    ConfigError for lengths that mlx-lm computes otherwise: of an embedding, which are of rows there, and of a row of
    zeros; errors of `write_mlx_adapter`.
    """
    remedy = "save PEFT's folder, or the merged model"
    for name, magnitude in lengths.items():
        if name in TABLES:
            rule = f"has lengths of an embedding's rows, and {name} has those of its columns (use_dora)"
            raise ConfigError(f"mlx-lm's folder {rule}; {remedy}")
        if not magnitude.n.all():
            rule = f"divides by the lengths of rows, and {name} has rows of zeros (use_dora)"
            raise ConfigError(f"mlx-lm {rule}; {remedy}")
    of_model = {tensor.name: tensor for tensor in tensor_table(shape)}
    rank, scale = max(each.rank for each in adapters.values()), next(iter(adapters.values())).scale
    tensors: dict[str, np.ndarray] = {}
    for name, adapter in adapters.items():
        theirs, more = _their_name(shape, of_model[name]), rank - adapter.rank
        a = _padded(adapter.a, -2, more)
        b = _padded(adapter.b * np.float32(adapter.scale / scale) if adapter.scale != scale else adapter.b, -1, more)
        if name in TABLES:  # the model adds A Bᵀ to a table, and here A and B are that Bᵀ and A
            a, b = b, a
        elif a.ndim == 2:
            a, b = a.T, b.T
        tensors |= {f"{theirs}.lora_a": np.ascontiguousarray(a), f"{theirs}.lora_b": np.ascontiguousarray(b)}
        if lengths:
            tensors[f"{theirs}.m"] = lengths[name].m
    write_mlx_adapter(
        folder, tensors, blocks=shape.num_layers, rank=rank, scale=scale, dropout=dropout, dora=bool(lengths),
        base_model=base_model, base=base,
    )  # fmt: skip


def _padded(array: np.ndarray, axis: int, more: int) -> np.ndarray:
    """Return an array with so many zeros behind along an axis."""
    widths = [(0, 0)] * array.ndim
    widths[axis] = 0, more
    return np.pad(array, widths)
