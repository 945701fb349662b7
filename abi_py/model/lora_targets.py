"""Which parts of a model get adapters, what these are made of, and how they are put on its layers.

    named            a configuration with the targets that a model has; what it has not is refused
    adapter_table    the adapters' tensors, in flat order; nothing is allocated
    adapt            the adapters on bound layers

Hugging Face's name of a module decides: as in PEFT, a target is such a name or its end, from a dot on.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from ..config import LoraConfig, TrainableModelConfig
from ..errors import CheckpointError, ConfigError, listed, shown
from ..families import layers, tensor_table
from ..fields import either
from ..parameters import Buffers, HfName, Tensor, Weight, joined
from .layers.adapter import Adapter, Group, Part
from .layers.layer import Layer
from .layers.linear import Linear

__all__ = [
    "Target",
    "adapt",
    "adapter_table",
    "check_tensors",
    "chosen_targets",
    "initialize",
    "named",
    "num_trained",
    "planned",
    "report",
    "targets_of",
]

AnyLora = TypeVar("AnyLora", bound=LoraConfig)

MASKS = 7  # with the configuration's seed, the seed of all masks: another than that of the adapters


def report(shape: TrainableModelConfig, config: LoraConfig) -> str:
    """Return how much is trained of adapters on such a model, in one line; no model is needed."""
    trained, whole = num_trained(shape, config), shape.num_params()
    targets = ", ".join(named(shape, config).target_modules or ())
    return f"{trained:,} trained parameters, {100 * trained / whole:.2f} % of {whole:,} (rank {config.rank}: {targets})"


def planned(shape: TrainableModelConfig, config: LoraConfig) -> tuple[list[Layer], tuple[Tensor, ...]]:
    """Return the layers of such a model as its adapters make them, and the table of these; nothing is allocated."""
    made = layers(shape)
    for linear, targets in targets_of(shape, made, config):
        _size(linear, len(targets), config)
    return made, adapter_table(shape, config)


def num_trained(shape: TrainableModelConfig, config: LoraConfig) -> int:
    """Return the number of weights of all adapters."""
    return sum(entry.size for entry in adapter_table(shape, config))


@dataclass(frozen=True)
class Target:
    """A part of a linear layer that gets an adapter."""

    index: int  # of the part in its layer
    tensor: Tensor  # its matrix
    stream: int  # its number among all parts of the model

    @property
    def module(self) -> str:
        """Hugging Face's name of it."""
        return self.tensor.hf_name.removesuffix(".weight")

    def is_called(self, name: str) -> bool:
        """Say whether a target means this module."""
        return self.module == name or self.module.endswith(f".{name}")


def targets_of(
    shape: TrainableModelConfig, made: Sequence[Layer], config: LoraConfig
) -> list[tuple[Linear, list[Target]]]:
    """Return the linear layers, and of each the parts with adapters: Hugging Face's name of a module decides.

    As in PEFT, a target is a module's name or its end, from a dot on.
    """
    of_model = {tensor.name: tensor for tensor in tensor_table(shape)}
    found, stream = [], 0
    for layer in made:
        for linear in layer.linears:
            chosen = []
            for index, projection in enumerate(linear.projections):
                target = Target(index, of_model[layer.at + projection.name], stream)
                if config.target_modules is None or any(map(target.is_called, config.target_modules)):
                    chosen.append(target)
                stream += 1
            found.append((linear, chosen))
    return found


def chosen_targets(shape: TrainableModelConfig, config: LoraConfig) -> list[Target]:
    """Return the parts that get adapters."""
    return [target for _, targets in targets_of(shape, layers(shape), config) for target in targets]


def named(shape: TrainableModelConfig, config: AnyLora) -> AnyLora:
    """Return the configuration with the targets that this model has, in the order of its layers.

    ConfigError for a target that it has not.
    """
    chosen = chosen_targets(shape, config)
    every = list(dict.fromkeys(target.module.rpartition(".")[2] for target in chosen_targets(shape, LoraConfig())))
    for name in config.target_modules or ():
        if not any(target.is_called(name) for target in chosen):
            raise ConfigError(f"target_modules ({shown(name)}): this model has no such projection; try {either(every)}")
    names = tuple(dict.fromkeys(target.module.rpartition(".")[2] for target in chosen))
    short = config.replace(target_modules=names)  # the last words, unless they mean more than what was asked for
    return short if len(chosen_targets(shape, short)) == len(chosen) else config


def adapter_table(shape: TrainableModelConfig, config: LoraConfig) -> tuple[Tensor, ...]:
    """Return the adapters' tensors in flat order: in each linear layer first the As, then the Bs."""
    table: list[Tensor] = []
    offset = 0
    for _, targets in targets_of(shape, layers(shape), config):
        for half in "ab":
            for target in targets:
                base = target.tensor
                outer, inner = base.shape
                sizes = (config.rank, inner) if half == "a" else (outer, config.rank)
                stem = base.hf_name.removesuffix(".weight")
                hf_name = f"base_model.model.{stem}.lora_{half.upper()}.weight"
                gguf_name = f"{base.gguf_name}.lora_{half}"
                names = (HfName(hf_name),), gguf_name
                table.append(Tensor(f"{base.name}.{half}", *names, sizes, offset, decay=True))
                offset += table[-1].size
    return tuple(table)


def check_tensors(
    tensors: Mapping[str, np.ndarray], table: tuple[Tensor, ...], config: LoraConfig, place: str
) -> None:
    """Raise CheckpointError if what a folder holds is not what its configuration needs on this model."""
    for entry in table:
        found = tensors.get(entry.hf_name)
        if found is None or found.shape != entry.shape:
            what = "is missing" if found is None else f"has shape {found.shape}"
            rule = f"rank {config.rank} on this model takes {entry.shape}; load it on the model it is of"
            raise CheckpointError(f"{place}: {entry.hf_name} {what}; {rule}")
        if found.dtype.kind != "f":
            raise CheckpointError(f"{place}: {entry.hf_name} is {found.dtype}; adapters are floats")
    unknown = sorted(set(tensors) - {entry.hf_name for entry in table})
    if unknown:
        raise CheckpointError(
            f"{place}: {listed(unknown, 1)} has no place in this model; its adapter_config.json names other "
            "targets, or it was trained on a model with more layers"
        )


def initialize(parameters: Buffers, config: LoraConfig) -> None:
    """Fill A from U(±1/√in), which is Kaiming's rule with a = √5 as PEFT uses it, and B with zeros."""
    random = np.random.default_rng(config.seed)
    for name, view in parameters.weights.items():
        view.fill(0)
        if name.endswith(".a"):
            random.random(out=view, dtype=np.float32)
            view *= np.float32(2)
            view -= np.float32(1)
            view *= np.float32(view.shape[1] ** -0.5)


def adapt(made: Sequence[Layer], parameters: Buffers, shape: TrainableModelConfig, config: LoraConfig) -> None:
    """Put the adapters on the linear layers."""
    # Streams of masks are told apart by the seed's place in a range of 2^63, drawn from the configuration's seed.
    seed = int(np.random.SeedSequence([config.seed, MASKS]).generate_state(1, np.uint64)[0] >> np.uint64(1))
    found = targets_of(shape, made, config)
    streams = sum(len(linear.projections) for linear, _ in found)
    for linear, targets in found:
        if targets:
            groups = _groups(linear, targets, parameters, config)
            linear.adapter = Adapter(groups, config.scaling, config.dropout, seed, streams)
            _size(linear, len(targets), config)


def _size(linear: Linear, targets: int, config: LoraConfig) -> None:
    """Tell a linear layer what so many adapters save and need."""
    linear.rank, linear.dropout = config.rank * targets, config.dropout > 0


def _groups(linear: Linear, targets: list[Target], parameters: Buffers, config: LoraConfig) -> tuple[Group, ...]:
    rank, columns = config.rank, linear.columns()
    halves = [{half: parameters.weight(f"{target.tensor.name}.{half}") for half in "ab"} for target in targets]
    parts = []
    for k, target in enumerate(targets):
        b = halves[k]["b"]
        parts.append(Part(columns[target.index], slice(k * rank, (k + 1) * rank), b.w, _gradient(b)))
    # With dropout each projection is a group of its own, because its mask is.
    cuts = [[each] for each in range(len(parts))] if config.dropout > 0 else [list(range(len(parts)))]
    groups = []
    for cut in cuts:
        a = [halves[each]["a"] for each in cut]
        ranks = slice(cut[0] * rank, (cut[-1] + 1) * rank)
        matrices = joined([half.w for half in a]), joined([_gradient(half) for half in a])
        groups.append(Group(ranks, *matrices, tuple(parts[each] for each in cut), targets[cut[0]].stream))
    return tuple(groups)


def _gradient(weight: Weight) -> np.ndarray:
    if weight.dw is None:
        raise RuntimeError(f"{weight.name} is an adapter without a gradient")
    return weight.dw
