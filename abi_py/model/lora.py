"""LoraModel: a frozen model with low-rank adapters on its linear layers, of which only the adapters are trained.

    y = x Wᵀ + s D(x) Aᵀ Bᵀ        A (R, in)   B (out, R)   s = alpha / R   D: dropout, in training only

`layers/adapter.py` has the two passes of an adapter, `lora_targets.py` says what gets one.  A begins as Kaiming-uniform
noise, B as zeros, so a fresh LoraModel computes what its model computes.

    merge, unmerge   W + s B A in the model's own weights and back; unmerge puts back a copy that merge has kept, so
                     every bit is as it was
    merged           a copy of the model with W + s B A
    save, load       a folder of PEFT's kind (`formats/peft.py`); what else `load` takes, `stored_adapter.py` says
    save_gguf        a GGUF file of adapters, for `llama.cpp --lora`
    save_mlx         a folder of adapters for mlx-lm

Source: Hu et al. 2021, "LoRA: Low-Rank Adaptation of Large Language Models"; the initial A is PEFT's.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ..config import Config, LoraConfig
from ..errors import CheckpointError, ConfigError
from ..families import layers
from ..formats.encoded import Encoded
from ..formats.gguf.checking import Written
from ..formats.peft import adapter_config, write_adapter
from ..formats.safetensors import Stack as Stacked
from ..formats.safetensors import Stored
from ..formats.zig import save_abic
from ..kernels.matmul import product
from ..parameters import Buffers, Tensor
from .frozen import FrozenModel
from .gguf_adapter import LowRank, write_gguf_adapter
from .lora_targets import adapt, adapter_table, check_tensors, chosen_targets, initialize, named, report
from .mlx_adapter import save_mlx_adapter
from .stack import Stack
from .stored_adapter import read_stored_adapter
from .transformer import TrainableModel, Transformer

__all__ = ["LoraConfig", "LoraModel"]


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
        self.parameters = Buffers(adapter_table(model.config, self.lora))
        initialize(self.parameters, self.lora)
        self.base_model = str(base_model) if base_model is not None else None
        adapted = layers(model.config)
        for layer in adapted:
            layer.bind(model.frozen)
        adapt(adapted, self.parameters, model.config, self.lora)
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
        if isinstance(self.model, FrozenModel):
            return self.model.digest
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
            kept = {name: self.model.weights[name].copy() for name in self.adapters()}
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

    def adapters(self) -> dict[str, LowRank]:
        """Return what is added to each matrix that has an adapter, by its name: views."""
        return {
            target.tensor.name: LowRank(
                self.weights[f"{target.tensor.name}.a"], self.weights[f"{target.tensor.name}.b"], self.lora.scaling
            )
            for target in chosen_targets(self.config, self.lora)
        }

    # -- files -----------------------------------------------------------------------------------

    def save(self, folder: str | Path, base_model: str | None = None) -> None:
        """Write the adapters as a PEFT folder; `base_model` beats the constructor's."""
        tensors = {tensor.hf_name: self.weights[tensor.name] for tensor in self.parameters.table}
        write_adapter(Path(folder), tensors, self.description(base_model), self.base_digest())

    def save_gguf(self, path: str | Path, kind: str = "F32", *, name: str | None = None, check: bool = True) -> Written:
        """Write the adapters as a GGUF file, for `llama.cpp --lora` on a file of the model; kind is F32, F16 or BF16.

        `name` is that of the adapters in it, the file's own when not given.  Unless `check` is false it is read again.
        ConfigError for another kind, or a model that llama.cpp does not compute; errors of `write_gguf_adapter`.
        """
        return write_gguf_adapter(
            *(Path(path), self.config, self.adapters(), kind), name=name, base_digest=self.base_digest(), check=check
        )

    def save_mlx(self, folder: str | Path, base_model: str | None = None) -> None:
        """Write the adapters as a folder for mlx-lm; `base_model` beats the constructor's."""
        save_mlx_adapter(
            Path(folder), self.config, self.adapters(), dropout=self.lora.dropout,
            base_model=base_model or self.base_model, base_digest=self.base_digest(),
        )  # fmt: skip

    def description(self, base_model: str | None = None) -> dict[str, Any]:
        """Return the content of PEFT's adapter_config.json; `base_model` beats the constructor's."""
        transposed = any(target.tensor.hf_names[0].transposed for target in chosen_targets(self.config, self.lora))
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
            config = named(model.config, config)
        except ConfigError as error:
            raise CheckpointError(f"{folder}: {error}") from None
        table = adapter_table(model.config, config)
        check_tensors(tensors, table, config, str(folder))  # before anything of the adapters' size is made
        made = cls(model, config, base_model)
        for entry in table:
            made.weights[entry.name] = tensors[entry.hf_name]
        return made

    def save_checkpoint(self, path: str | Path, step: int = 0) -> None:
        """Write the merged weights as a Zig `ABIC` file, which knows no adapters."""
        save_abic(path, self.merged().parameters.weights_flat, step)


def _add_adapters(model: TrainableModel, lora: LoraModel) -> None:
    """Add s B A to the weights of `model`."""
    for name, (a, b, scale) in lora.adapters().items():
        w = model.weights[name]
        product(w, b * np.float32(scale), a, addend=w)
