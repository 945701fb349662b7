"""Routers and experts by the names of the linear modules that they were before version 5 of the Transformers library.

There they are parameters now: the router's `gate.weight`, and two stacks of all experts' matrices, gate and up together
and down.  As PEFT does it, `as_parameters` turns target modules that mean them into target parameters, all-linear too:

    gate                              mlp.gate.weight
    w1 w3, or gate_proj up_proj       mlp.experts.gate_up_proj       of twice the rank and alpha: two adapters in one
    w2, or down_proj                  mlp.experts.down_proj

What leaves modules out leaves these out as well: excluded ones, blocks, and what is trained whole.

Source: PEFT 0.21, `_convert_peft_config_moe`; but there a regular expression means all blocks if one, all-linear does
not mean the dense blocks of a mixed model, and with rsLoRA the factor of gate_up_proj is larger by √2.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from ..config import LoraConfig, TrainableModelConfig
from ..errors import ConfigError
from ..families import tensor_table
from ..fields import either
from ..lora_config import ALL_LINEAR
from ..parameters import Tensor
from .layers.experts import DOWN, GATE_UP, Experts
from .layers.layer import Layer

__all__ = ["ExpertParameter", "as_parameters", "expert_parameters", "means_experts", "on_diagonal"]

AnyLora = TypeVar("AnyLora", bound=LoraConfig)

ROUTER = ("w_router",)


@dataclass(frozen=True)
class ExpertParameter:
    """The router's matrix of a layer of experts, or a stack of theirs, as one parameter of the Transformers library."""

    name: str  # there
    layer: Experts
    matrices: tuple[str, ...]  # our local names of what it is made of
    tensors: tuple[Tensor, ...]

    @property
    def is_router(self) -> bool:
        """Say whether it is the router's matrix."""
        return self.matrices == ROUTER

    @property
    def end(self) -> str:
        """The end of its name that is the same in all blocks."""
        return ".".join(self.name.split(".")[-3:])

    @property
    def modules(self) -> tuple[str, ...]:
        """The linear modules that its matrices were, with {e} for the number of an expert."""
        return tuple(tensor.hf_name.removesuffix(".weight") for tensor in self.tensors)

    def aliases(self, module: str) -> tuple[str, ...]:
        """Return the names by which one of `modules` is meant: its own, that in the place of today, the parameter's."""
        inside = self.name.rpartition(".")[0]
        now = inside if self.is_router else f"{inside}.{module.rpartition('.')[2]}"
        return module.replace("{e}", "0"), now, self.name

    def names(self) -> list[str]:
        """Return all names by which some of `modules` are meant; the last is the parameter's."""
        return [*(alias for module in self.modules for alias in self.aliases(module)[:-1]), self.name]

    def meant(self, config: LoraConfig) -> list[bool]:
        """Say of each of `modules` whether target modules mean it."""
        each = [self.aliases(module) for module in self.modules]
        return [any(map(config.is_target, some)) and not any(map(config.leaves_out, some)) for some in each]


def expert_parameters(shape: TrainableModelConfig, made: Sequence[Layer]) -> list[ExpertParameter]:
    """Return those of a model, in the order of its layers: of each router, gate and up, down."""
    of_model = {tensor.name: tensor for tensor in tensor_table(shape)} if shape.num_experts else {}
    found = []
    for layer in made:
        if not isinstance(layer, Experts):
            continue
        for matrices in (ROUTER, GATE_UP, DOWN):
            tensors = tuple(of_model[layer.at + name] for name in matrices)
            found.append(ExpertParameter(tensors[0].hf_names[-1].name, layer, matrices, tensors))
    return found


def means_experts(config: LoraConfig, parameters: Sequence[ExpertParameter]) -> bool:
    """Say whether target modules mean routers or experts."""
    return any(any(parameter.meant(config)) for parameter in parameters)


def as_parameters(config: AnyLora, parameters: Sequence[ExpertParameter], linear: Sequence[str]) -> AnyLora:
    """Return the configuration with target parameters in place of target modules that mean routers or experts.

    `linear` are the modules that may get an adapter.  ConfigError for gate without up, or the other way round, for two
    factors of them, and for what adapters on parameters cannot have: dropout and DoRA.
    """
    chosen = []
    for parameter in parameters:
        meant = parameter.meant(config)
        if any(meant) and not all(meant):
            one, other = (parameter.modules[meant.index(said)].rpartition(".")[2] for said in (True, False))
            rule = f"target_modules mean {one} of experts without {other}, and both are one matrix, {parameter.name}"
            raise ConfigError(f"{rule}; name both, or neither")
        if any(meant):
            chosen.append(parameter)
    if not chosen:
        return config
    for field, off in (("dropout", 0.0), ("use_dora", False)):
        if (value := getattr(config, field)) != off:
            which = f"target_modules mean experts or routers ({chosen[0].name}), to whose matrices adapters are added"
            remedy = "leave it out, or name other modules, such as q, k, v, o"
            raise ConfigError(f"{field} ({value}) must be {off} where {which}; {remedy}")
    targets = config.target_modules
    if targets not in (None, (ALL_LINEAR,)):
        kept = [name for name in targets or () if _means_any(name, linear) or not _means_some(name, chosen)]
        targets = tuple(kept) or None
    elif targets is None:
        targets = (ALL_LINEAR,)
    more = [name for name in _short(chosen, parameters) if name not in (config.target_parameters or ())]
    more = [name for name in more if not _is_named(name, config, chosen)]
    named = config.replace(target_modules=targets, target_parameters=(*(config.target_parameters or ()), *more))
    return named.replace(**_patterns(config, named, chosen, parameters, linear))


def _means_any(name: str, modules: Sequence[str]) -> bool:
    return any(map(LoraConfig(target_modules=(name,)).is_target, modules))


def _means_some(name: str, parameters: Sequence[ExpertParameter]) -> bool:
    """Say whether a target module's name means some of what were modules."""
    return any(_means_any(name, each.names()) for each in parameters)


def _short(chosen: Sequence[ExpertParameter], parameters: Sequence[ExpertParameter]) -> list[str]:
    """Return names that mean the chosen parameters and no others: the same end in all blocks, or whole names."""
    names = {each.name for each in chosen}
    found = []
    for each in chosen:
        alike = {other.name for other in parameters if other.end == each.end}
        found.append(each.end if alike <= names else each.name)
    return list(dict.fromkeys(found))


def _is_named(name: str, config: LoraConfig, chosen: Sequence[ExpertParameter]) -> bool:
    """Say whether all that a new name means is meant by the configuration's target parameters anyway."""
    return all(config.is_target_parameter(each.name) for each in chosen if each.name.endswith(name))


def _patterns(
    before: LoraConfig,
    config: LoraConfig,
    chosen: Sequence[ExpertParameter],
    parameters: Sequence[ExpertParameter],
    linear: Sequence[str],
) -> dict[str, tuple[str, ...] | None]:
    """Return rank_pattern and alpha_pattern with the ranks and alphas of the new parameters, which are sums.

    They are first, so that they count where a pattern fits modules and parameter alike; but what fits the parameter
    alone is meant for it, and stays.  What means only former modules is left out.
    """
    wanted: dict[str, dict[str, dict[str, float]]] = {"rank_pattern": {}, "alpha_pattern": {}}
    for each in chosen:
        modules = [module.replace("{e}", "0") for module in each.modules]
        rank, factors = sum(map(before.rank_of, modules)), {before.scaling_of(module) for module in modules}
        if len(factors) > 1:
            rule = f"{either(modules)} are one matrix, {each.name}, whose adapter has one factor"
            raise ConfigError(f"rank_pattern, alpha_pattern: {rule}; give them one rank and alpha")
        alpha = factors.pop() * (math.sqrt(rank) if before.use_rslora else rank)
        sums = ("rank_pattern", rank, before.rank_of(each.name)), ("alpha_pattern", alpha, before.alpha_of(each.name))
        for field, value, found in sums:
            if not before.tells_apart(field, each.name, modules) and not math.isclose(value, found):
                wanted[field].setdefault(each.end, {})[each.name] = value
    named = [*linear, *(each.name for each in parameters if config.is_target_parameter(each.name))]
    made: dict[str, tuple[str, ...] | None] = {}
    for field, ends in wanted.items():
        new = []
        for end, values in ends.items():
            if len(set(values.values())) == 1 and all(name in values for name in named if name.endswith(f".{end}")):
                new.append(f"{end}={next(iter(values.values())):.9g}")
            else:
                new += [f"{re.escape(name)}={value:.9g}" for name, value in values.items()]
        pairs = (*new, *(getattr(before, field) or ()))
        unused, former = config.replace(**{field: pairs}).unused(field, named), before.unused(field, _former(chosen))
        made[field] = tuple(pair for pair in pairs if pair not in unused or pair in former) or None
    return made


def _former(parameters: Sequence[ExpertParameter]) -> list[str]:
    return [alias for each in parameters for alias in each.names()[:-1]]


def on_diagonal(blocks: Sequence[np.ndarray]) -> np.ndarray:
    """Return matrices (E, out, R) below each other, each in columns of its own, with zeros beside them.

    So the Bs of two adapters in one are put together, while their As are below each other.
    """
    rows, columns = (sum(each.shape[axis] for each in blocks) for axis in (1, 2))
    made = np.zeros((len(blocks[0]), rows, columns), np.float32)
    row = column = 0
    for each in blocks:
        _, height, width = each.shape
        made[:, row : row + height, column : column + width] = each
        row, column = row + height, column + width
    return made
