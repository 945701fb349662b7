"""The adapters of a model put on its layers, and how they begin; which those are says `lora_targets.py`."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ..config import LoraConfig, TrainableModelConfig
from ..families import layers
from ..parameters import Buffers, Tensor, Weight, joined
from .arena import parts_of
from .layers.adapter import Adapter, Group, Part
from .layers.dora_adapter import DoraAdapter
from .layers.embedding import Embedding
from .layers.end_adapters import DoraHead, DoraTable, HeadAdapter, TableAdapter
from .layers.expert_adapter import ExpertAdapter
from .layers.experts import GATE_UP
from .layers.head import Head
from .layers.layer import Layer
from .layers.linear import Linear
from .layers.magnitude import Magnitude, TableMagnitude
from .lora_targets import (
    Kind,
    Target,
    end_targets,
    expert_targets,
    linear_targets,
    router_targets,
    trained_shape,
    trained_table,
)

__all__ = ["adapt", "initialize", "planned"]

MASKS = 7  # with the configuration's seed, the seed of all masks: another than that of the adapters


def planned(shape: TrainableModelConfig, config: LoraConfig) -> tuple[list[Layer], tuple[Tensor, ...]]:
    """Return the layers of such a model as its adapters make them, and the table of these; nothing is allocated."""
    made = layers(trained_shape(shape, config))
    for linear, targets in (*linear_targets(shape, made, config), *router_targets(shape, made, config)):
        _size(linear, targets, config)
    for experts, stacks in expert_targets(shape, made, config):
        experts.ranks |= {target.matrices: target.rank for target in stacks}
    _, _, head = parts_of(made)
    _size_head(head, end_targets(shape, config), config)
    return made, trained_table(shape, config)


def initialize(parameters: Buffers, config: LoraConfig) -> None:
    """Fill A from U(±1/√in), which is Kaiming's rule with a = √5 as PEFT uses it, and all else with zeros.

    Of a table A is zeros, and B from N(0, 1), as in PEFT.
    """
    random, tables = np.random.default_rng(config.seed), (Embedding.name, Embedding.positions)
    for name, view in parameters.weights.items():
        view.fill(0)
        if name.startswith(tables):
            if name.endswith(".b"):
                random.standard_normal(out=view, dtype=np.float32)
        elif name.endswith(".a"):
            random.random(out=view, dtype=np.float32)
            view *= np.float32(2)
            view -= np.float32(1)
            view *= np.float32(view.shape[-1] ** -0.5)


def adapt(
    made: Sequence[Layer], parameters: Buffers, shape: TrainableModelConfig, config: LoraConfig
) -> dict[str, Magnitude]:
    """Put the adapters on linear layers, routers, experts, embedding and head.

    Return DoRA's lengths by the name of a matrix.
    """
    # Streams of masks are told apart by the seed's place in a range of 2^63, drawn from the configuration's seed.
    seed = int(np.random.SeedSequence([config.seed, MASKS]).generate_state(1, np.uint64)[0] >> np.uint64(1))
    found = linear_targets(shape, made, config)
    parts = sum(len(linear.projections) for linear, _ in found)
    ends = end_targets(shape, config)
    streams = parts + any(target.kind is Kind.HEAD for target in ends)
    magnitudes: dict[str, Magnitude] = {}

    def lengths_of(target: Target, w: Weight, kind: type[Magnitude] = Magnitude) -> Magnitude:
        a, b, m = (parameters.weight(f"{target.tensor.name}.{part}") for part in "abm")
        magnitudes[target.tensor.name] = made = kind.of(w.w, w.storage, a.w, b.w, target.scale, m)
        return made

    for linear, targets in (*found, *router_targets(shape, made, config)):
        if targets:
            groups = _groups(linear, targets, parameters, config)
            _size(linear, targets, config)
            linear.adapter = Adapter(groups, _scales(targets), config.dropout, seed, streams)
            if config.use_dora:
                lengths = [lengths_of(target, linear.parts[target.index]) for target in targets]
                linear.adapter = DoraAdapter.on(linear, lengths, linear.adapter)
    for experts, stacks in expert_targets(shape, made, config):
        for target in stacks:
            a, b = (parameters.weight(f"{target.tensor.name}.{half}") for half in "ab")
            halves, scale = (a.w, _gradient(a), b.w, _gradient(b)), np.float32(target.scale)
            experts.adapters[target.matrices] = ExpertAdapter(*halves, scale, gathers=target.matrices == GATE_UP)
            experts.ranks[target.matrices] = target.rank
    embedding, _, head = parts_of(made)
    _size_head(head, ends, config)
    for target in ends:
        name = target.tensor.name
        a, b = (parameters.weight(f"{name}.{half}") for half in "ab")
        arrays = a.w, _gradient(a), b.w, _gradient(b), target.scale
        masks = config.dropout, seed, streams, target.stream
        if target.kind is Kind.TABLE and config.use_dora:
            table = next(weight for weight in embedding.weights if weight.name == name)
            embedding.adapters[name] = DoraTable(*arrays, lengths_of(target, table, TableMagnitude))
        elif target.kind is Kind.TABLE:
            embedding.adapters[name] = TableAdapter(*arrays)
        elif config.use_dora:
            head.adapter = DoraHead(*arrays, *masks, lengths_of(target, head.weight))
        else:
            head.adapter = HeadAdapter(*arrays, *masks)
    return magnitudes


def _size(linear: Linear, targets: Sequence[Target], config: LoraConfig) -> None:
    """Tell a linear layer what its adapters save and need."""
    linear.rank, linear.dropout = sum(target.rank for target in targets), config.dropout > 0
    linear.magnitudes = sum(target.tensor.shape[0] for target in targets) if config.use_dora else 0


def _size_head(head: Head, ends: Sequence[Target], config: LoraConfig) -> None:
    """Tell the head what its adapter needs."""
    own = [target for target in ends if target.kind is Kind.HEAD]
    head.rank, head.dropout = sum(target.rank for target in own), config.dropout > 0
    head.magnitudes = sum(target.tensor.shape[0] for target in own) if config.use_dora else 0


def _scales(targets: Sequence[Target]) -> np.ndarray:
    """Return the factor of each rank (R, 1)."""
    scales, ranks = [target.scale for target in targets], [target.rank for target in targets]
    return np.repeat(scales, ranks).astype(np.float32)[:, None]


def _groups(linear: Linear, targets: list[Target], parameters: Buffers, config: LoraConfig) -> tuple[Group, ...]:
    columns, ends = linear.columns(), np.cumsum([target.rank for target in targets]).tolist()
    halves = [{half: parameters.weight(f"{target.tensor.name}.{half}") for half in "ab"} for target in targets]
    parts = []
    for k, target in enumerate(targets):
        b = halves[k]["b"]
        parts.append(Part(columns[target.index], slice(ends[k] - target.rank, ends[k]), b.w, _gradient(b)))
    # With dropout each projection is a group of its own, because its mask is.
    cuts = [[each] for each in range(len(parts))] if config.dropout > 0 else [list(range(len(parts)))]
    groups = []
    for cut in cuts:
        a = [halves[each]["a"] for each in cut]
        ranks = slice(parts[cut[0]].ranks.start, parts[cut[-1]].ranks.stop)
        matrices = joined([half.w for half in a]), joined([_gradient(half) for half in a])
        groups.append(Group(ranks, *matrices, tuple(parts[each] for each in cut), targets[cut[0]].stream))
    return tuple(groups)


def _gradient(weight: Weight) -> np.ndarray:
    if weight.dw is None:
        raise RuntimeError(f"{weight.name} is an adapter without a gradient")
    return weight.dw
