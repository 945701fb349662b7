"""LoraModel: a frozen model with low-rank adapters on its linear layers, of which only the adapters are trained.

    y = x Wᵀ + s D(x) Aᵀ Bᵀ        A (R, in)   B (out, R)   s = alpha / R   D: dropout, in training only

`linear.py` has the two passes of such a layer.  A begins as Kaiming-uniform noise, B as zeros, so a fresh LoraModel
computes what its model computes.

    merge, unmerge   W + s B A in the model's own weights and back; unmerge puts back a copy that merge has kept, so
                     every bit is as it was
    merged           a copy of the model with W + s B A
    save, load       a folder of PEFT's kind (`formats/peft.py`)

Source: Hu et al. 2021, "LoRA: Low-Rank Adaptation of Large Language Models"; the initial A is PEFT's.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from ..config import Config, LoraConfig, TrainableModelConfig
from ..errors import CheckpointError, ConfigError, listed, shown
from ..families import layers, tensor_table
from ..fields import either
from ..formats.encoded import Encoded
from ..formats.peft import adapter_config, read_adapter, write_adapter
from ..formats.safetensors import Stack as Stacked
from ..formats.safetensors import Stored
from ..formats.zig import save_abic
from ..kernels.matmul import product
from ..parameters import Buffers, HfName, Tensor, Weight, joined
from .frozen import FrozenModel
from .layers.layer import Layer
from .layers.linear import Adapter, Group, Linear, Part
from .stack import Stack
from .transformer import TrainableModel, Transformer

__all__ = ["LoraConfig", "LoraModel", "named", "num_trained", "planned", "report"]

AnyLora = TypeVar("AnyLora", bound=LoraConfig)

MASKS = 7  # with the configuration's seed, the seed of all masks: another than that of the adapters


class LoraModel(Transformer):
    """Adapters on a model whose weights stay as they are; trained, evaluated and saved like a model.

    `weights`, `gradients` and `parameters` are the adapters'; the names are those of the model's weights with .a or .b
    after it, as in `layers.0.w_q.a`.
    """

    def __init__(
        self,
        model: TrainableModel | FrozenModel,
        config: LoraConfig | None = None,
        base_model: str | Path | None = None,
    ) -> None:
        """Put fresh adapters on `model`; TypeError if it is neither a TrainableModel nor a FrozenModel.

        ConfigError if it has not a projection that `config` names.  `lora` is `config` with the targets by name.
        `base_model` says where its weights are, or their name: what is saved repeats it.
        """
        if not isinstance(model, TrainableModel | FrozenModel):
            raise TypeError(f"model is a {type(model).__name__}; adapters are put on a TrainableModel or a FrozenModel")
        self.model, self.lora = model, named(model.config, config if config is not None else LoraConfig())
        self.parameters = Buffers(_adapter_table(model.config, self.lora))
        _initialize(self.parameters, self.lora)
        self.base_model = str(base_model) if base_model is not None else None
        adapted = layers(model.config)
        for layer in adapted:
            layer.bind(model.frozen)
        _adapt(adapted, self.parameters, model.config, self.lora)
        super().__init__(model.config, model.base, adapted)
        self.companions = model.companions
        self.draws = 0
        self._plain = Stack(model.config, model.layers)  # for passes while the adapters are merged
        self._adapted = self.stack
        self._kept: dict[str, np.ndarray] = {}  # the weights before a merge
        self._digest = ""

    def _says(self) -> str:
        return f"{self.report()}, on {self.model!r}"

    def report(self) -> str:
        """Return how much is trained, in one line."""
        return report(self.config, self.lora)

    def sections(self) -> dict[str, Config]:
        """Return the sections of a run's config.yaml that describe this model."""
        return {**super().sections(), "lora": self.lora}

    def base_digest(self) -> str:
        """Return the SHA-256 of the model's weights without the adapters, worked out once: they are frozen."""
        if not self._digest:
            digest = hashlib.sha256()
            plain = {**self.base, **self._kept}
            for w in plain.values():  # in flat order: of float32 weights, the digest of their buffer
                digest.update(np.ascontiguousarray(w).data)
            self._digest = digest.hexdigest()
        return self._digest

    # -- the passes ------------------------------------------------------------------------------

    def _begin_backward(self) -> bool:
        if self.is_merged:
            raise RuntimeError("the adapters are merged into the weights, which are frozen; call unmerge() to train on")
        return super()._begin_backward()

    def _next_draw(self) -> int | None:
        self.draws += 1
        return self.draws - 1 if self.lora.dropout > 0 else None

    # -- merging ---------------------------------------------------------------------------------

    @property
    def is_merged(self) -> bool:
        """Say whether the adapters are inside the model's weights."""
        return bool(self._kept)

    def merge(self) -> TrainableModel:
        """Add s B A to the model's own weights and return the model; until `unmerge` there is no training.

        RuntimeError if they are those of a FrozenModel, which are only read: `merged` makes a copy.
        """
        if isinstance(self.model, FrozenModel):
            raise RuntimeError("the weights of a FrozenModel are only read; merged() returns a copy with the adapters")
        if not self.is_merged:
            kept = {name: self.model.weights[name].copy() for name in self._targets()}
            _add_adapters(self.model, self)
            self._kept = kept
            self._pass_through(self._plain)
        return self.model

    def unmerge(self) -> None:
        """Put the model's weights back as they were before `merge`, to the last bit."""
        for name, weights in self._kept.items():
            self.model.base[name][...] = weights
        self._kept = {}
        self._pass_through(self._adapted)

    def _pass_through(self, stack: Stack) -> None:
        self.stack, self._last = stack, None  # the activations of a forward are in the other one

    def merged(self) -> TrainableModel:
        """Return a copy of the model with s B A in its weights; this one stays as it is."""
        copy = self.model.widened()
        if not self.is_merged:
            _add_adapters(copy, self)
        return copy

    def stored_tensors(self) -> tuple[tuple[Tensor, ...], Mapping[str, np.ndarray | Stored | Stacked | Encoded]]:
        """Return the table of the network and its weights, adapters merged, which are a copy."""
        return self.merged().stored_tensors()

    def for_decoding(self) -> Transformer:
        """Return the merged copy, or these adapters as they are where a copy would be larger than what is read."""
        return self if isinstance(self.model, FrozenModel) else self.merged()

    def _targets(self) -> list[str]:
        return [name.removesuffix(".b") for name in self.weights if name.endswith(".b")]

    # -- files -----------------------------------------------------------------------------------

    def save(self, folder: str | Path, base_model: str | None = None) -> None:
        """Write the adapters as a PEFT folder; `base_model` beats the constructor's."""
        tensors = {tensor.hf_name: self.weights[tensor.name] for tensor in self.parameters.table}
        write_adapter(Path(folder), tensors, self.description(base_model), self.base_digest())

    def description(self, base_model: str | None = None) -> dict[str, Any]:
        """Return the content of PEFT's adapter_config.json; `base_model` beats the constructor's."""
        transposed = any(target.tensor.hf_names[0].transposed for target in _chosen(self.config, self.lora))
        return adapter_config(self.lora, base_model or self.base_model, fan_in_fan_out=transposed)

    @classmethod
    def load(
        cls, model: TrainableModel | FrozenModel, folder: str | Path, *, allow_nonfinite: bool = False
    ) -> LoraModel:
        """Put the adapters of a PEFT folder on `model`.

        FileNotFoundError if there is none, CheckpointError if it is damaged, of a kind that is not computed here, of
        another model, or holds NaN or infinity and not `allow_nonfinite`.
        """
        config, tensors, base_model = read_adapter(Path(folder), allow_nonfinite=allow_nonfinite)
        try:
            config = named(model.config, config)
        except ConfigError as error:
            raise CheckpointError(f"{folder}: {error}") from None
        table = _adapter_table(model.config, config)
        _check_tensors(tensors, table, config, str(folder))  # before anything of the adapters' size is made
        made = cls(model, config, base_model)
        for entry in table:
            made.weights[entry.name] = tensors[entry.hf_name]
        return made

    def save_checkpoint(self, path: str | Path, step: int = 0) -> None:
        """Write the merged weights as a Zig `ABIC` file, which knows no adapters."""
        save_abic(path, self.merged().parameters.weights_flat, step)


def report(shape: TrainableModelConfig, config: LoraConfig) -> str:
    """Return how much is trained of adapters on such a model, in one line; no model is needed."""
    trained, whole = num_trained(shape, config), shape.num_params()
    targets = ", ".join(named(shape, config).target_modules or ())
    return f"{trained:,} trained parameters, {100 * trained / whole:.2f} % of {whole:,} (rank {config.rank}: {targets})"


def planned(shape: TrainableModelConfig, config: LoraConfig) -> tuple[list[Layer], tuple[Tensor, ...]]:
    """Return the layers of such a model as its adapters make them, and the table of these; nothing is allocated."""
    made = layers(shape)
    for linear, targets in _targets(shape, made, config):
        _size(linear, len(targets), config)
    return made, _adapter_table(shape, config)


def num_trained(shape: TrainableModelConfig, config: LoraConfig) -> int:
    """Return the number of weights of all adapters."""
    return sum(entry.size for entry in _adapter_table(shape, config))


# -- what the adapters are made of ------------------------------------------------------------------


@dataclass(frozen=True)
class _Target:
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


def _targets(
    shape: TrainableModelConfig, made: Sequence[Layer], config: LoraConfig
) -> list[tuple[Linear, list[_Target]]]:
    """Return the linear layers, and of each the parts with adapters: Hugging Face's name of a module decides.

    As in PEFT, a target is a module's name or its end, from a dot on.
    """
    of_model = {tensor.name: tensor for tensor in tensor_table(shape)}
    found, stream = [], 0
    for layer in made:
        for linear in layer.linears:
            chosen = []
            for index, projection in enumerate(linear.projections):
                target = _Target(index, of_model[layer.at + projection.name], stream)
                if config.target_modules is None or any(map(target.is_called, config.target_modules)):
                    chosen.append(target)
                stream += 1
            found.append((linear, chosen))
    return found


def _chosen(shape: TrainableModelConfig, config: LoraConfig) -> list[_Target]:
    """Return the parts that get adapters."""
    return [target for _, targets in _targets(shape, layers(shape), config) for target in targets]


def named(shape: TrainableModelConfig, config: AnyLora) -> AnyLora:
    """Return the configuration with the targets that this model has, in the order of its layers.

    ConfigError for a target that it has not.
    """
    chosen = _chosen(shape, config)
    every = list(dict.fromkeys(target.module.rpartition(".")[2] for target in _chosen(shape, LoraConfig())))
    for name in config.target_modules or ():
        if not any(target.is_called(name) for target in chosen):
            raise ConfigError(f"target_modules ({shown(name)}): this model has no such projection; try {either(every)}")
    names = tuple(dict.fromkeys(target.module.rpartition(".")[2] for target in chosen))
    short = config.replace(target_modules=names)  # the last words, unless they mean more than what was asked for
    return short if len(_chosen(shape, short)) == len(chosen) else config


def _adapter_table(shape: TrainableModelConfig, config: LoraConfig) -> tuple[Tensor, ...]:
    """Return the adapters' tensors in flat order: in each linear layer first the As, then the Bs."""
    table: list[Tensor] = []
    offset = 0
    for _, targets in _targets(shape, layers(shape), config):
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


def _check_tensors(
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


def _initialize(parameters: Buffers, config: LoraConfig) -> None:
    """Fill A from U(±1/√in), which is Kaiming's rule with a = √5 as PEFT uses it, and B with zeros."""
    random = np.random.default_rng(config.seed)
    for name, view in parameters.weights.items():
        view.fill(0)
        if name.endswith(".a"):
            random.random(out=view, dtype=np.float32)
            view *= np.float32(2)
            view -= np.float32(1)
            view *= np.float32(view.shape[1] ** -0.5)


def _adapt(made: Sequence[Layer], parameters: Buffers, shape: TrainableModelConfig, config: LoraConfig) -> None:
    """Put the adapters on the linear layers."""
    # Streams of masks are told apart by the seed's place in a range of 2^63, drawn from the configuration's seed.
    seed = int(np.random.SeedSequence([config.seed, MASKS]).generate_state(1, np.uint64)[0] >> np.uint64(1))
    found = _targets(shape, made, config)
    streams = sum(len(linear.projections) for linear, _ in found)
    for linear, targets in found:
        if targets:
            groups = _groups(linear, targets, parameters, config)
            linear.adapter = Adapter(groups, config.scaling, config.dropout, seed, streams)
            _size(linear, len(targets), config)


def _size(linear: Linear, targets: int, config: LoraConfig) -> None:
    """Tell a linear layer what so many adapters save and need."""
    linear.rank, linear.dropout = config.rank * targets, config.dropout > 0


def _groups(linear: Linear, targets: list[_Target], parameters: Buffers, config: LoraConfig) -> tuple[Group, ...]:
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


def _add_adapters(model: TrainableModel, lora: LoraModel) -> None:
    """Add s B A to the weights of `model`."""
    for name in lora._targets():
        w, a, b = model.weights[name], lora.weights[f"{name}.a"], lora.weights[f"{name}.b"]
        product(w, b * np.float32(lora.lora.scaling), a, addend=w)
