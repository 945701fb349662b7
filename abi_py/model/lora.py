"""LoraModel: a frozen model with low-rank adapters on its linear layers, of which only the adapters are trained.

    y = x Wᵀ + s D(x) Aᵀ Bᵀ        A (R, in)   B (out, R)   s = alpha / R   D: dropout, in training only
    with DoRA, rows of W + s B A have lengths m (out,) that are trained: `layers/dora_adapter.py`

`layers/adapter.py` has the two passes of an adapter, `lora_targets.py` says what gets one.  A begins as Kaiming-uniform
noise, B as zeros, so a fresh LoraModel computes what its model computes.

    merge, unmerge   W + s B A, of DoRA with rows as long as m says, in the model's own weights and back; unmerge puts
                     back a copy that merge has kept, so every bit is as it was
    merged           a copy of the model with these weights
    save, load       a folder of PEFT's kind (`formats/peft.py`); what else `load` takes, `stored_adapter.py` says
    save_gguf        a GGUF file of adapters, for `llama.cpp --lora`
    save_mlx         a folder of adapters for mlx-lm

Source: Hu et al. 2021, "LoRA: Low-Rank Adaptation of Large Language Models"; the initial A is PEFT's.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ..config import Config, LoraConfig, TrainableModelConfig
from ..errors import CheckpointError, ConfigError, listed
from ..families import layers, tensor_table
from ..formats.encoded import Encoded
from ..formats.forms import from_stored, to_stored
from ..formats.gguf.checking import Written
from ..formats.merged import Kept, Merged, MergedStack
from ..formats.peft import adapter_config, adapter_metadata, write_adapter
from ..formats.safetensors import Stack as Piled
from ..formats.safetensors import Stored
from ..formats.zig import save_abic
from ..kernels.engine.checksum import checksum
from ..parameters import Buffers, Tensor, Weight
from .frozen import FrozenModel
from .gguf_adapter import LowRank, write_gguf_adapter
from .identity import Identity
from .layers.embedding import Embedding
from .lora_layers import adapt, initialize
from .lora_targets import (
    PREFIX,
    Kind,
    Target,
    chosen_targets,
    copies,
    named,
    report,
    trained_shape,
    trained_table,
    without_unused,
)
from .mlx_adapter import save_mlx_adapter
from .stack import Stack
from .stored_adapter import HEAD, base_facts_of, base_storage_of, check_tensors, read_stored_adapter, without_second
from .transformer import TrainableModel, Transformer, zeros

__all__ = ["LoraConfig", "LoraModel"]


class LoraModel(Transformer):
    """Adapters on a model whose weights stay as they are; trained, evaluated and saved like a model.

    `weights`, `gradients` and `parameters` are the adapters'; the names are those of the model's weights with .a, .b
    or .m after it, as in `layers.0.w_q.a`.
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
        self.parameters = Buffers(trained_table(model.config, self.lora))
        initialize(self.parameters, self.lora)
        self._copies = [tensor.name for tensor in copies(model.config, self.lora)]
        self._shape = trained_shape(model.config, self.lora)  # of the layers
        for name in self._copies:
            model.copy_to(self._under(name), self.weights[name])
        self.base_model = str(base_model) if base_model is not None else None
        adapted = layers(self._shape)
        for layer in adapted:
            layer.bind(self._weight)
        self._magnitudes = adapt(adapted, self.parameters, model.config, self.lora)
        for magnitude in self._magnitudes.values():
            magnitude.begin()
        super().__init__(model.config, model.base, adapted)
        tables = (target.tensor.name for target in self.targets() if target.kind is Kind.TABLE)
        self._clear_first({*self._copies, *(f"{name}.a" for name in tables)})
        self.companions = model.companions
        self.draws = 0
        self._plain = Stack(model.config, model.layers)  # for passes while the adapters are merged
        self._adapted = self.stack
        self._kept: dict[str, np.ndarray] = {}  # the weights before a merge
        self._measured = b""  # stands for the weights that the adapters have measured themselves by
        self.trained_in = model.storage  # of the frozen matrices, where they are encoded while the adapters are trained
        self.said: Mapping[str, str] = {}  # what the files that they were loaded from say of the weights under them
        self.other_type = ""  # what is to be said where they were trained on the model in another type than it has here

    def _under(self, name: str) -> str:
        """Return what the model itself calls one of the tensors of the layers: its head may be its embedding."""
        tied = name == "output_proj" and self.model.config.tie_embeddings
        return "token_embedding" if tied else name

    def _weight(self, name: str) -> Weight:
        """Return a tensor for the layers: a copy that is trained, or what the model has, frozen."""
        return self.parameters.weight(name) if name in self._copies else self.model.frozen(self._under(name))

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
        return self.identity.digest

    @functools.cached_property
    def identity(self) -> Identity:
        """What the model's weights without the adapters are known by."""
        if isinstance(self.model, FrozenModel):
            return self.model.identity
        return Identity(self.model.config, lambda name: Stored(self._kept.get(name, self.base[name])))

    def trained_on(self) -> Mapping[str, str]:
        """Return what the weights are known by that the adapters were trained on, for the files of adapters.

        Of loaded ones that is what their files say, on whatever they are now; once trained here, it is the model here.
        """
        return self.said or self.identity.facts()

    # -- the passes ------------------------------------------------------------------------------

    def begin_pass(self) -> None:
        """Work out the lengths of DoRA, if the adapters have changed."""
        if not self._magnitudes or self.is_merged:
            return
        mark = checksum(self.parameters.weights_flat)
        if mark != self._measured:
            for magnitude in self._magnitudes.values():
                magnitude.measure()
            self._measured = mark

    def _begin_backward(self) -> bool:
        if self.is_merged:
            raise RuntimeError("the adapters are merged into the weights, which are frozen; call unmerge() to train on")
        self.said, self.trained_in, self.other_type = {}, self.model.storage, ""
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

        What is trained whole takes the place of its own.  RuntimeError if they are those of a FrozenModel, which are
        only read, or have one matrix for embedding and head where these are two by now: `merged` makes a copy.
        """
        if isinstance(self.model, FrozenModel):
            raise RuntimeError("the weights of a FrozenModel are only read; merged() returns a copy with the adapters")
        if self._shape != self.config:
            raise RuntimeError("embedding and head are one matrix in the model, and two now; merged() returns a copy")
        if not self.is_merged:
            merged = self._merged()
            kept = {name: self.model.weights[name].copy() for name in merged}
            for name, tensor in merged.items():
                tensor.copy_to(self.model.weights[name])
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
        """Return a copy of the model with s B A in its weights; this one stays as it is.

        Where embedding and head are one matrix, and are not trained as one, they are two in the copy.
        """
        copy = self.model.widened()
        if self._shape != self.config:
            tied, copy = copy, TrainableModel(self._shape, zeros(self._shape))
            for name in copy.weights:
                copy.weights[name] = tied.weights[self._under(name)]
            copy.companions = tied.companions
        for name, tensor in self._merged().items():
            tensor.copy_to(copy.weights[name])
        return copy

    def stored_config(self) -> TrainableModelConfig:
        """Return the shape of the merged model."""
        return self._shape

    def stored_tensors(self) -> tuple[tuple[Tensor, ...], Mapping[str, Kept]]:
        """Return the table of the merged model and its weights: those of matrices with adapters are made as they are
        asked for, a strip of rows at a time."""
        _, tensors = self.model.stored_tensors()
        table, merged = tensor_table(self._shape), self._merged()
        return table, {entry.name: merged.get(entry.name, tensors[self._under(entry.name)]) for entry in table}

    def _merged(self) -> dict[str, Merged | MergedStack | Stored]:
        """Return the matrices that have adapters, with these in them (of DoRA, with their lengths), and what is
        trained whole; none while they are in the model's own weights."""
        if self.is_merged:
            return {}
        self.begin_pass()
        factors = {name: magnitude.factors() for name, magnitude in self._magnitudes.items()}
        _, tensors = self.model.stored_tensors()
        found: dict[str, Merged | MergedStack | Stored] = {name: Stored(self.weights[name]) for name in self._copies}

        def kept(name: str) -> Stored | Piled | Encoded:
            w = tensors[self._under(name)]
            return Stored(w) if isinstance(w, np.ndarray) else w

        for name, (a, b, scale) in self.by_matrix().items():
            b = b * np.float32(scale)
            found[name] = MergedStack(kept(name), a, b) if b.ndim > 2 else Merged(kept(name), a, b, factors.get(name))
        return found

    def for_decoding(self) -> Transformer:
        """Return the merged copy, or these adapters as they are where a copy would be larger than what is read."""
        if not isinstance(self.model, FrozenModel):
            return self.merged()
        self.begin_pass()
        return self

    def targets(self) -> list[Target]:
        """Return what has an adapter."""
        return chosen_targets(self.config, self.lora)

    def adapters(self) -> dict[str, LowRank]:
        """Return what is added to each matrix that has an adapter, by its name: views.

        Of a table of the embedding (V, C), that is A (V, R) times Bᵀ (R, C); of stacked experts, an A and a B for each.
        """
        found = {}
        for target in self.targets():
            a, b = (self.weights[f"{target.tensor.name}.{half}"] for half in "ab")
            pair = (np.ascontiguousarray(b.T), a) if target.kind is Kind.TABLE else (a, b)
            found[target.tensor.name] = LowRank(*pair, target.scale)
        return found

    def by_matrix(self) -> dict[str, LowRank]:
        """Return the same by the names of the model's own tensors: of experts' gate and up each, the A of both."""
        found: dict[str, LowRank] = {}
        for target, (a, b, scale) in zip(self.targets(), self.adapters().values(), strict=True):
            at, _, last = target.tensor.name.rpartition(".")
            own = [f"{at}.{each}".lstrip(".") for each in target.matrices or (last,)]
            halves = zip(own, np.split(b, len(own), axis=-2), strict=True)
            found |= {name: LowRank(a, half, scale) for name, half in halves}
        return found

    # -- files -----------------------------------------------------------------------------------

    def save(self, folder: str | Path, base_model: str | None = None) -> None:
        """Write the adapters as a PEFT folder; `base_model` beats the constructor's."""
        stored = to_stored(self.parameters.table, dict(self.weights))
        if self.lora.ensure_weight_tying:  # PEFT wants both names of the one matrix
            names = {tensor.name: tensor.hf_name for tensor in self.parameters.table}
            stored[HEAD] = stored[names["token_embedding"]]
        metadata = adapter_metadata(self.trained_on(), self.trained_in)
        write_adapter(Path(folder), stored, self.description(base_model), metadata)

    def save_gguf(self, path: str | Path, kind: str = "F32", *, name: str | None = None, check: bool = True) -> Written:
        """Write the adapters as a GGUF file, for `llama.cpp --lora` on a file of the model; kind is F32, F16 or BF16.

        `name` is that of the adapters in it, the file's own when not given.  Unless `check` is false it is read again.
        ConfigError for another kind, DoRA, or a model that llama.cpp does not compute; errors of `write_gguf_adapter`.
        """
        place = "a GGUF file of adapters"
        lacks = "and lengths of rows are trained (use_dora)" if self.lora.use_dora else ""
        if f"{Embedding.positions}.a" in self.weights:
            lacks = f"and {Embedding.positions} has an adapter"
        if lacks:
            raise ConfigError(f"{place} holds adapters alone, {lacks}; save PEFT's folder, or the merged model")
        self._require_adapters_alone(place)
        return write_gguf_adapter(
            *(Path(path), self.config, self.by_matrix(), kind), name=name, base=self.trained_on(), check=check
        )

    def save_mlx(self, folder: str | Path, base_model: str | None = None) -> None:
        """Write the adapters as a folder for mlx-lm; `base_model` beats the constructor's.

        ConfigError for what is trained besides them, and for lengths (DoRA) that mlx-lm computes otherwise: those of an
        embedding, or of a row of zeros.
        """
        self._require_adapters_alone("mlx-lm's folder")
        self.begin_pass()
        save_mlx_adapter(
            Path(folder), self.config, self.by_matrix(), lengths=self._magnitudes, dropout=self.lora.dropout,
            base_model=base_model or self.base_model, base=self.trained_on(),
        )  # fmt: skip

    def _require_adapters_alone(self, place: str) -> None:
        """Raise ConfigError if a place has no room for what is trained: modules whole, or one end of a tied model."""
        ends = [target for target in self.targets() if target.kind in (Kind.TABLE, Kind.HEAD)]
        ends = [target for target in ends if target.tensor.name != Embedding.positions]
        if ends and self.config.tie_embeddings:
            rule = f"one matrix for embedding and head, and {ends[0].module} has an adapter of its own"
            raise ConfigError(f"{place} has {rule}; save PEFT's folder, or the merged model")
        if self._copies:
            raise ConfigError(
                f"{place} holds adapters alone, and {listed(self._copies, 3)} are trained whole (modules_to_save, "
                "bias); save PEFT's folder, or the merged model"
            )

    def description(self, base_model: str | None = None) -> dict[str, Any]:
        """Return the content of PEFT's adapter_config.json; `base_model` beats the constructor's."""
        transposed = any(target.tensor.hf_names[0].transposed for target in self.targets())
        return adapter_config(self.lora, base_model or self.base_model, fan_in_fan_out=transposed)

    @classmethod
    def load(
        cls, model: TrainableModel | FrozenModel, folder: str | Path, *, allow_nonfinite: bool = False
    ) -> LoraModel:
        """Put the adapters of a folder of PEFT's or mlx-lm's, or of a GGUF file, on `model`.

        FileNotFoundError if there is none, CheckpointError if it is damaged, of a kind that is not computed here, of
        another model, or holds NaN or infinity and not `allow_nonfinite`.
        """
        config, tensors, base_model = read_stored_adapter(Path(folder), model.config, allow_nonfinite=allow_nonfinite)
        try:
            config = named(model.config, without_unused(model.config, config))
        except ConfigError as error:
            raise CheckpointError(f"{folder}: {error}") from None
        table = trained_table(model.config, config)
        tensors = without_second(tensors, config, str(folder))
        tensors = _without_base(tensors, model, config, str(folder))
        check_tensors(tensors, table, str(folder))  # before anything of the adapters' size is made
        made = cls(model, config, base_model)
        made.said, made.trained_in = base_facts_of(Path(folder)), base_storage_of(Path(folder)) or model.storage
        stored = {name: Stored(tensor) for name, tensor in tensors.items()}
        for name, tensor in from_stored(table, stored, folder, "load it on the model it is of").tensors.items():
            tensor.copy_to(made.weights[name])
        return made

    def save_checkpoint(self, path: str | Path, step: int = 0) -> None:
        """Write the merged weights as a Zig `ABIC` file, which knows no adapters."""
        save_abic(path, self.merged().parameters.weights_flat, step)


def _without_base(
    tensors: Mapping[str, np.ndarray], model: TrainableModel | FrozenModel, config: LoraConfig, place: str
) -> dict[str, np.ndarray]:
    """Return what a folder holds without the frozen embedding and head, which PEFT writes beside adapters on them.

    CheckpointError if they are not those of the model, which would be another one with them.
    """
    rest = dict(tensors)
    for target in chosen_targets(model.config, config):
        found = rest.pop(f"{PREFIX}{target.module}.base_layer.weight", None)
        if found is None or target.kind is Kind.LINEAR or model.is_quantized:  # quantised ones are not quite the same
            continue
        own = np.empty(target.tensor.shape, np.float32)
        tied = target.kind is Kind.HEAD and model.config.tie_embeddings
        model.copy_to("token_embedding" if tied else target.tensor.name, own)
        if not np.array_equal(found, own):
            raise CheckpointError(f"{place} holds a {target.module} of its own, and the model under it has another")
    return rest
