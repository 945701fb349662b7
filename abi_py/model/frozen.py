"""FrozenModel: weights that are only read, as they lie in a folder or a GGUF file: mapped, each in its own storage.

It has neither gradients nor moments.  It evaluates, it decodes, and adapters can be trained on it; a matrix in bfloat16
so takes two bytes for each weight, which the system reads when they are first used.  What is no matrix (norms, biases,
the stacked weights of experts, which are most of such a model) is a float32 copy.  Losses and logits have the bits of
the model with all weights widened to float32; in the gradients of adapters the sums over q, k and v are in another
order, because only float32 neighbours are one product.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..config import TrainableModelConfig
from ..families import layers, tensor_table
from ..formats.encoded import Encoded, kept_as
from ..formats.finite import check_read
from ..formats.safetensors import Stack, Stored
from ..kernels.engine.scratch import aligned_empty
from ..kernels.storage import STORAGES, Storage
from ..parameters import Buffers, Tensor, Weight
from .stored import StoredModel, open_stored, open_stored_gguf
from .transformer import TrainableModel, Transformer, zeros

__all__ = ["FrozenModel", "frozen_bytes", "read_frozen"]


@dataclass(frozen=True)
class _Kept:
    raw: np.ndarray
    storage: Storage

    def stored(self, shape: tuple[int, ...]) -> Stored | Encoded:
        """Return it as a tensor of that shape."""
        return kept_as(self.storage, self.raw, shape)


def _stays_narrow(tensor: Stored | Stack | Encoded) -> bool:
    return not isinstance(tensor, Stack) and len(tensor.shape) == 2 and tensor.is_narrow


def _keep(tensor: Stored | Stack | Encoded) -> _Kept:
    """Return a tensor in one of the storages; what has none (float64), vectors and stacks are copied to float32."""
    if isinstance(tensor, Encoded) and _stays_narrow(tensor):
        return _Kept(tensor.raw, tensor.storage)
    if isinstance(tensor, Stored) and _stays_narrow(tensor):
        # As it lies; a matrix that is stored transposed is copied, and stays as narrow.
        raw = tensor.raw if tensor.raw.flags.c_contiguous else np.ascontiguousarray(tensor.raw)
        return _Kept(raw, STORAGES["bf16" if tensor.bf16 else "float16"])
    copy = aligned_empty(tensor.shape)
    tensor.copy_to(copy)
    return _Kept(copy, STORAGES["float32"])


class FrozenModel(Transformer):
    """A model of which nothing is trained, over the tensors of a folder or a GGUF file by our names."""

    def __init__(self, config: TrainableModelConfig, tensors: Mapping[str, Stored | Stack | Encoded]) -> None:
        """Take the tensors as they lie; those without a storage of their own are copied to float32."""
        self.parameters = Buffers(())
        self.table = tensor_table(config)
        self._kept = {entry.name: _keep(tensors[entry.name]) for entry in self.table}
        made = layers(config)
        for layer in made:
            layer.bind(self.frozen)
        super().__init__(config, {name: kept.raw for name, kept in self._kept.items()}, made)

    @classmethod
    def from_pretrained(
        cls, folder: str | Path, config: TrainableModelConfig | None = None, *, allow_nonfinite: bool = False
    ) -> "FrozenModel":
        """Return the model of a Hugging Face folder, or of a GGUF file, memory-mapped; errors of
        `TrainableModel.from_pretrained`."""
        return cls._read(open_stored(Path(folder), config), allow_nonfinite)

    @classmethod
    def from_gguf(
        cls, path: str | Path, config: TrainableModelConfig | None = None, *, allow_nonfinite: bool = False
    ) -> "FrozenModel":
        """Return the model of a GGUF file, memory-mapped, quantised or not; errors of `TrainableModel.from_gguf`."""
        return cls._read(open_stored_gguf(Path(path), config), allow_nonfinite)

    @classmethod
    def _read(cls, found: StoredModel, allow_nonfinite: bool) -> "FrozenModel":
        if not allow_nonfinite:
            check_read(found.place, found.used)
        model = cls(found.config, found.tensors)
        model.companions = found.companions
        return model

    def _says(self) -> str:
        return f"{super()._says()}, kept in {' and '.join(self.storages())}"

    def stored_tensors(self) -> tuple[tuple[Tensor, ...], Mapping[str, np.ndarray | Stored | Encoded]]:
        """Return the table and the weights as they are kept."""
        return self.table, {tensor.name: self._kept[tensor.name].stored(tensor.shape) for tensor in self.table}

    def frozen(self, name: str) -> Weight:
        """Return a tensor for a layer that does not train it."""
        kept = self._kept[name]
        return Weight(name, kept.raw, None, kept.storage)

    def _begin_backward(self) -> bool:
        raise RuntimeError("nothing of a FrozenModel is trained; put adapters on it: LoraModel(model)")

    def storages(self) -> tuple[str, ...]:
        """Return the names of the storages that its matrices are kept in."""
        return tuple(sorted({kept.storage.name for kept in self._kept.values() if kept.raw.ndim == 2}))

    def widened(self) -> TrainableModel:
        """Return a copy whose weights are float32, and are trained."""
        model = TrainableModel(self.config, zeros(self.config))
        for name, kept in self._kept.items():
            if kept.raw.ndim == 2:
                kept.storage.decode(model.weights[name], kept.raw, 0)
            else:
                model.weights[name] = kept.raw
        model.companions = self.companions
        return model


def frozen_bytes(place: Path, config: TrainableModelConfig) -> int:
    """Return the bytes that the weights of a folder or a GGUF file take where they are not trained; of what is kept
    narrow none are read."""
    found = open_stored(place, config).tensors.values()
    return sum(map(_kept_bytes, found))


def _kept_bytes(tensor: Stored | Stack | Encoded) -> int:
    if isinstance(tensor, Stack) or not _stays_narrow(tensor):
        return 4 * math.prod(tensor.shape)
    return tensor.raw.nbytes


def read_frozen(
    place: Path, config: TrainableModelConfig | None = None, *, allow_nonfinite: bool = False
) -> TrainableModel | FrozenModel:
    """Return the model in a folder or a GGUF file, that will not be trained: frozen if any of it is narrow, else as it
    is computed."""
    narrow = any(tensor.is_narrow for tensor in open_stored(place, config).tensors.values())
    kind = FrozenModel if narrow else TrainableModel
    return kind.from_pretrained(place, config, allow_nonfinite=allow_nonfinite)
