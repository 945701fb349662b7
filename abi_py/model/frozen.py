"""FrozenModel: weights that are only read, as they lie in a folder or a GGUF file: mapped, each in its own storage.

It has neither gradients nor moments.  It evaluates, it decodes, and adapters can be trained on it; a matrix in bfloat16
so takes two bytes for each weight, which the system reads when they are first used.  So do the matrices of experts, and
of one that is not chosen nothing is read.  What is no matrix (norms, biases) is a float32 copy.  Losses and logits have
the bits of the model with all weights widened to float32, but for experts in a bfloat16 step
(`layers/expert_products.py`); in the gradients of adapters the sums over q, k and v, and over gate and up of experts,
are in another order, because only float32 neighbours are one product.
"""

import functools
import hashlib
import math
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np

from ..config import TrainableModelConfig
from ..families import layers, tensor_table
from ..formats.encoded import Encoded
from ..formats.finite import check_read
from ..formats.safetensors import Stack, Stored
from ..kernels.engine.scratch import aligned_empty
from ..kernels.storage import STORAGES, Storage
from ..parameters import Buffers, Tensor, Weight
from .stored import StoredModel, open_stored, open_stored_gguf
from .transformer import TrainableModel, Transformer, zeros

__all__ = ["FrozenModel", "frozen_bytes", "read_frozen"]

Kept = Stored | Stack | Encoded
NOTHING = np.empty(0, np.float32)


def _stays_narrow(tensor: Kept) -> bool:
    return len(tensor.shape) > 1 and tensor.is_narrow


def _keep(tensor: Kept) -> Kept:
    """Return matrices as they lie, if they are narrow; vectors and all others (float64) are copied to float32."""
    if not _stays_narrow(tensor):
        copy = aligned_empty(tensor.shape)
        tensor.copy_to(copy)
        return Stored(copy)
    if isinstance(tensor, Stack):
        return Stack(tuple(_in_rows(part) for part in tensor.parts))
    return _in_rows(tensor) if isinstance(tensor, Stored) else tensor


def _in_rows(tensor: Stored) -> Stored:
    """Return matrices whose rows lie one after the other: what is stored transposed is copied, and stays as narrow."""
    *stacked, _, _ = tensor.shape
    one = tensor.raw[(0,) * len(stacked)]
    return tensor if one.flags.c_contiguous else Stored(np.ascontiguousarray(tensor.raw), tensor.bf16)


def _storage(tensor: Stored | Encoded) -> Storage:
    if isinstance(tensor, Encoded):
        return tensor.storage
    return STORAGES["bf16" if tensor.bf16 else tensor.raw.dtype.name]


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
        super().__init__(config, dict(self._arrays()), made)

    def _arrays(self) -> Iterator[tuple[str, np.ndarray]]:
        """Yield what is in memory or mapped, by name; of experts that are stored one by one, with their numbers."""
        for name, kept in self._kept.items():
            if isinstance(kept, Stack):
                yield from ((f"{name}.{e}", part.raw) for e, part in enumerate(kept.parts))
            else:
                yield name, kept.raw

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

    def stored_tensors(self) -> tuple[tuple[Tensor, ...], Mapping[str, np.ndarray | Stored | Stack | Encoded]]:
        """Return the table and the weights as they are kept."""
        return self.table, self._kept

    def frozen(self, name: str) -> Weight:
        """Return a tensor for a layer that does not train it."""
        kept = self._kept[name]
        if isinstance(kept, Stack) or (len(kept.shape) > 2 and kept.is_narrow):
            return Weight(name, NOTHING, None, each=tuple(_weight(name, kept.at((e,))) for e in range(kept.shape[0])))
        return _weight(name, kept)

    def copy_to(self, name: str, out: np.ndarray) -> None:
        """Write a tensor to `out`, float32 of its shape."""
        self._kept[name].copy_to(out)

    def _begin_backward(self) -> bool:
        raise RuntimeError("nothing of a FrozenModel is trained; put adapters on it: LoraModel(model)")

    @functools.cached_property
    def digest(self) -> str:
        """The SHA-256 of its weights as they are kept, worked out once."""
        digest = hashlib.sha256()
        for w in self.base.values():
            digest.update(np.ascontiguousarray(w).data)
        return digest.hexdigest()

    def storages(self) -> tuple[str, ...]:
        """Return the names of the storages that its matrices are kept in."""
        kept = (part for each in self._kept.values() for part in (each.parts if isinstance(each, Stack) else [each]))
        return tuple(sorted({_storage(each).name for each in kept if len(each.shape) > 1}))

    def widened(self) -> TrainableModel:
        """Return a copy whose weights are float32, and are trained."""
        model = TrainableModel(self.config, zeros(self.config))
        for name, kept in self._kept.items():
            kept.copy_to(model.weights[name])
        model.companions = self.companions
        return model


def _weight(name: str, kept: Stored | Encoded) -> Weight:
    return Weight(name, kept.raw, None, _storage(kept))


def frozen_bytes(place: Path, config: TrainableModelConfig) -> int:
    """Return the bytes that the weights of a folder or a GGUF file take where they are not trained; of what is kept
    narrow none are read."""
    found = open_stored(place, config).tensors.values()
    return sum(map(_kept_bytes, found))


def _kept_bytes(tensor: Kept) -> int:
    if not _stays_narrow(tensor):
        return 4 * math.prod(tensor.shape)
    return sum(part.raw.nbytes for part in tensor.parts) if isinstance(tensor, Stack) else tensor.raw.nbytes


def read_frozen(
    place: Path, config: TrainableModelConfig | None = None, *, allow_nonfinite: bool = False
) -> TrainableModel | FrozenModel:
    """Return the model in a folder or a GGUF file, that will not be trained: frozen if any of it is narrow, else as it
    is computed."""
    narrow = any(tensor.is_narrow for tensor in open_stored(place, config).tensors.values())
    kind = FrozenModel if narrow else TrainableModel
    return kind.from_pretrained(place, config, allow_nonfinite=allow_nonfinite)
