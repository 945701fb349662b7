"""FrozenModel: weights that are only read, as they lie in a folder or a GGUF file: mapped, each in its own storage.

With a `storage` the matrices of linear layers and experts are encoded in it, one after another, when they are opened,
and are in memory; embedding, head and routers stay as they lie, as bitsandbytes has it.

It has neither gradients nor moments.  It evaluates, it decodes, and adapters can be trained on it; a matrix in bfloat16
so takes two bytes for each weight, which the system reads when they are first used.  So do the matrices of experts, and
of one that is not chosen nothing is read.  Float32 matrices of a file are mapped too.  What is no matrix (norms,
biases), and float64 are float32 copies.  Losses and logits have the bits of the model with all weights widened to
float32, but for experts in a bfloat16 step (`layers/expert_products.py`); in the gradients of adapters the sums over q,
k and v, and over gate and up of experts, are in another order, because only float32 neighbours are one product.
"""

import functools
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from ..config import TrainableModelConfig
from ..errors import ConfigError, shown
from ..families import layers, tensor_table
from ..fields import either
from ..formats.encoded import Encoded, arrays_of, encoded_as, kept_as, storage_of
from ..formats.finite import check_read
from ..formats.safetensors import Stack, Stored
from ..kernels.engine.scratch import aligned_empty
from ..kernels.storage import OF_A_MATRIX, STORAGES, Storage
from ..parameters import Buffers, Tensor, Weight
from .identity import Identity
from .stored import StoredModel, open_stored, open_stored_gguf
from .transformer import TrainableModel, Transformer, zeros

__all__ = ["FrozenModel", "frozen_bytes", "read_frozen", "storage_named"]

Kept = Stored | Stack | Encoded
NOTHING = np.empty(0, np.float32)


def _stays_narrow(tensor: Kept) -> bool:
    return len(tensor.shape) > 1 and tensor.is_narrow


def _is_mapped(tensor: Kept) -> bool:
    """Say whether these are float32 matrices that nobody writes, as those of a file, and kernels read as they lie."""
    if isinstance(tensor, Stack):
        return all(map(_is_mapped, tensor.parts))
    if not isinstance(tensor, Stored) or len(tensor.shape) < 2:
        return False
    flags = tensor.raw.flags
    return tensor.raw.dtype == np.float32 and flags.c_contiguous and flags.aligned and not flags.writeable


def _keep(tensor: Kept) -> Kept:
    """Return matrices as they lie, if they are narrow or float32 of a file; all others are copied to float32."""
    if _is_mapped(tensor):
        return tensor
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


class FrozenModel(Transformer):
    """A model of which nothing is trained, over the tensors of a folder or a GGUF file by our names."""

    def __init__(
        self,
        config: TrainableModelConfig,
        tensors: Mapping[str, Stored | Stack | Encoded],
        storage: str | None = None,
    ) -> None:
        """Take the tensors as they lie; those without a storage of their own are copied to float32.

        With a `storage` what is multiplied is encoded.  ConfigError if that does not keep a matrix, which is named.
        """
        self.parameters = Buffers(())
        self.table = tensor_table(config)
        self.storage = storage  # that the matrices were encoded in when they were read
        encodes = _encoder(storage)
        self._kept = {entry.name: _keep(encodes(entry, tensors[entry.name])) for entry in self.table}
        self._read = tensors if storage is not None else None
        made = layers(config)
        for layer in made:
            layer.bind(self.frozen)
        super().__init__(config, dict(self._arrays()), made)

    def _arrays(self) -> Iterator[tuple[str, np.ndarray]]:
        """Yield what is in memory or mapped, by name; of experts that are stored one by one, with their numbers."""
        for name, kept in self._kept.items():
            yield from arrays_of(name, kept)

    def as_read(self, name: str) -> Kept:
        """Return a tensor as its files have it, whatever it was encoded in."""
        return self._kept[name] if self._read is None else _keep(self._read[name])

    @classmethod
    def from_pretrained(
        cls,
        folder: str | Path,
        config: TrainableModelConfig | None = None,
        *,
        storage: str | None = None,
        allow_nonfinite: bool = False,
    ) -> "FrozenModel":
        """Return the model of a Hugging Face folder, or of a GGUF file, memory-mapped; errors of
        `TrainableModel.from_pretrained`.

        With a `storage` ("nf4-dq", "nf4", "q8_0", "q4_k" ...) the matrices of its linear layers are kept in that.
        """
        return cls._open(open_stored(Path(folder), config), allow_nonfinite, storage)

    @classmethod
    def from_gguf(
        cls, path: str | Path, config: TrainableModelConfig | None = None, *, allow_nonfinite: bool = False
    ) -> "FrozenModel":
        """Return the model of a GGUF file, memory-mapped, quantised or not; errors of `TrainableModel.from_gguf`."""
        return cls._open(open_stored_gguf(Path(path), config), allow_nonfinite)

    @classmethod
    def _open(cls, found: StoredModel, allow_nonfinite: bool, storage: str | None = None) -> "FrozenModel":
        if not allow_nonfinite:
            check_read(found.place, found.used)
        model = cls(found.config, found.tensors, storage)
        model.companions = found.companions
        return model

    def _says(self) -> str:
        return f"{super()._says()}, kept in {' and '.join(self.storages())}"

    def stored_tensors(self) -> tuple[tuple[Tensor, ...], Mapping[str, Kept]]:
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
    def identity(self) -> Identity:
        """What its weights, as their files keep them, are known by."""
        return Identity(self.config, self.as_read)

    def storages(self) -> tuple[str, ...]:
        """Return the names of the storages that its matrices are kept in."""
        kept = (part for each in self._kept.values() for part in (each.parts if isinstance(each, Stack) else [each]))
        return tuple(sorted({storage_of(each).name for each in kept if len(each.shape) > 1}))

    def widened(self) -> TrainableModel:
        """Return a copy whose weights are float32, and are trained."""
        model = TrainableModel(self.config, zeros(self.config))
        for name, kept in self._kept.items():
            kept.copy_to(model.weights[name])
        model.companions = self.companions
        return model


def _weight(name: str, kept: Stored | Encoded) -> Weight:
    return Weight(name, kept.raw, None, storage_of(kept))


def storage_named(name: str) -> Storage:
    """Return the storage that matrices can be encoded in; ConfigError for another name."""
    known = {**OF_A_MATRIX, **STORAGES}
    if name not in known:
        raise ConfigError(f"storage ({shown(name)}) must be {either(list(known))}")
    return known[name]


def _is_encoded(entry: Tensor, tensor: Kept, storage: Storage) -> bool:
    """Say whether a tensor is encoded: what multiplies, unless it lies in this storage already."""
    return entry.hidden and not (isinstance(tensor, Encoded) and tensor.storage.name == storage.name)


@contextmanager
def _named(entry: Tensor, storage: Storage) -> Iterator[None]:
    """Raise ConfigError, with the tensor's name, where it cannot be kept in a storage."""
    try:
        yield
    except ValueError as error:
        raise ConfigError(
            f"{entry.hf_name} cannot be kept as {storage}: {error}; nf4-dq and nf4 keep rows of any even length"
        ) from None


def _encoder(name: str | None) -> Callable[[Tensor, Kept], Kept]:
    """Return what encodes the matrices of linear layers."""
    if name is None:
        return lambda entry, tensor: tensor
    storage = storage_named(name)

    def encode(entry: Tensor, tensor: Kept) -> Kept:
        if not _is_encoded(entry, tensor, storage):
            return tensor
        with _named(entry, storage):
            found = encoded_as(storage, tensor)
        return kept_as(storage, found.raw, found.shape) if storage.block == 1 else found

    return encode


def frozen_bytes(place: Path, config: TrainableModelConfig, storage: str | None = None) -> int:
    """Return the bytes that the weights of a folder or a GGUF file take where they are not trained, encoded in a
    storage if one is named; of what is kept narrow none are read."""
    tensors, total = open_stored(place, config).tensors, 0
    for entry in tensor_table(config):
        tensor = tensors[entry.name]
        if storage is not None and _is_encoded(entry, tensor, storage_named(storage)):
            with _named(entry, storage_named(storage)):
                total += storage_named(storage).nbytes(math.prod(entry.shape[:-1]), entry.shape[-1])
        else:
            total += _kept_bytes(tensor)
    return total


def _kept_bytes(tensor: Kept) -> int:
    if not _stays_narrow(tensor):
        return 4 * math.prod(tensor.shape)
    return sum(part.raw.nbytes for part in tensor.parts) if isinstance(tensor, Stack) else tensor.nbytes


def read_frozen(
    place: Path,
    config: TrainableModelConfig | None = None,
    *,
    storage: str | None = None,
    allow_nonfinite: bool = False,
    mapped: bool = False,
) -> TrainableModel | FrozenModel:
    """Return the model in a folder or a GGUF file, that will not be trained: frozen if any of it is narrow, is to be
    encoded in a `storage`, or to stay `mapped` whatever it is, else as it is computed."""
    if storage is not None or mapped:
        return FrozenModel.from_pretrained(place, config, storage=storage, allow_nonfinite=allow_nonfinite)
    narrow = any(tensor.is_narrow for tensor in open_stored(place, config).tensors.values())
    kind = FrozenModel if narrow else TrainableModel
    return kind.from_pretrained(place, config, allow_nonfinite=allow_nonfinite)
