"""A GGUF file as a model of one of the families: its shape, its weights by our names, its tokenizer.

`folder.py` is the same for folders, and `stored.py` opens either.
Nothing is copied but what a file keeps in another order (the rows of q and k of the architecture `llama`, in the bytes
that they have there) or as other numbers (Gemma's norms), and that when it is asked for.
"""

import functools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from ..config import TrainableModelConfig
from ..errors import CheckpointError, ConfigError, listed
from ..families import gguf_entry, read_gguf, tensor_table
from ..families.gguf_rope import ROPE_FREQS
from ..formats.companions import Companions
from ..formats.encoded import Encoded, kept_as
from ..formats.gguf.companion_files import companions_of
from ..formats.gguf.container import GgufFile, GgufTensor
from ..formats.gguf.rows import rows_of_ours
from ..formats.safetensors import Stored
from ..kernels.storage import Storage
from ..parameters import Tensor
from ..shape import ModelShape

__all__ = ["GgufWeights", "companions_of_gguf", "heads_of", "open_gguf_weights", "read_gguf_config"]

ROLES = {"bos": "bos", "eos": "eos", "pad": "padding"}  # config.json's names and GGUF's
Kept = Stored | Encoded
REMEDY = "get the file again, or convert it anew"


def read_gguf_config(file: GgufFile) -> TrainableModelConfig:
    """Return the shape of a file's model; CheckpointError names what this package cannot compute."""
    fields = read_gguf(file)
    try:
        return TrainableModelConfig.from_dict(fields)
    except ConfigError as error:
        raise CheckpointError(f"{file.path}: {error}") from None


def heads_of(local: str, shape: ModelShape) -> int:
    """Return how many heads the rows of a tensor of a block are: of w_q b_q w_k b_k; 0 of any other."""
    return {"q": shape.num_heads, "k": shape.num_kv_heads}.get(local[2:], 0) if local[:2] in ("w_", "b_") else 0


@dataclass(frozen=True)
class GgufWeights(Mapping[str, Kept]):
    """The tensors of a file by our names, each made when it is asked for; `used` are those of the file."""

    made: Mapping[str, Callable[[], Kept]]
    used: Mapping[str, GgufTensor]

    def __getitem__(self, name: str) -> Kept:
        return self.made[name]()

    def __iter__(self) -> Iterator[str]:
        return iter(self.made)

    def __len__(self) -> int:
        return len(self.made)


def open_gguf_weights(file: GgufFile, config: TrainableModelConfig) -> GgufWeights:
    """Return the tensors of a file by our names, once they are those of a model of this shape.

    CheckpointError names a tensor that is missing, of another shape or of a type that nothing here computes with, or
    without a place in the model.
    """
    if config.num_layers > len(file.tensors):  # before a table is made of as many as it says
        raise CheckpointError(
            f"{file.path}: block_count is {config.num_layers:,}, and the file holds {len(file.tensors):,} tensors; "
            f"{REMEDY}"
        )
    entry = gguf_entry(config)
    made: dict[str, Callable[[], Kept]] = {}
    used: dict[str, GgufTensor] = {}
    for tensor in tensor_table(config):
        found = file.tensors.get(tensor.gguf_name)
        if found is None or found.shape != tensor.shape:
            what = "is missing" if found is None else f"has shape {found.shape} instead of {tensor.shape}"
            raise CheckpointError(f"{file.path}: {tensor.gguf_name} {what}; {REMEDY}")
        storage = found.kind.require_storage(f"{file.path}: {tensor.gguf_name}")
        used[tensor.gguf_name] = found
        made[tensor.name] = _Made(found, storage, tensor, config, entry.permuted, entry.plus_one)
    neutral = {ROPE_FREQS} if entry.permuted else set()  # read with the metadata
    extra = [name for name in file.tensors if name not in used and name not in neutral]
    if extra:
        raise CheckpointError(
            f"{file.path}: the model that its metadata describe has no place for {listed(sorted(extra), 3)}, so it "
            "would compute something else than they were trained for"
        )
    return GgufWeights(made, used)


def companions_of_gguf(file: GgufFile) -> Companions:
    """Return what belongs to the model of a file beside its weights: its tokenizer and chat template.

    They are made when they are first asked for, since a vocabulary takes longer than all the rest to be read;
    CheckpointError then, for a tokenizer that is not read here.
    """
    ids = {f"{role}_token_id": file.get(f"tokenizer.ggml.{key}_token_id", int) for role, key in ROLES.items()}
    return Companions(_TokenizerFiles(file), {name: value for name, value in ids.items() if value is not None})


class _TokenizerFiles(Mapping[str, bytes]):
    """The files of a folder with the tokenizer of a GGUF file, made when the first of them is asked for."""

    def __init__(self, file: GgufFile) -> None:
        self._file = file

    @functools.cached_property
    def _made(self) -> Mapping[str, bytes]:
        return self._read[0].files

    @functools.cached_property
    def _read(self) -> tuple[Companions, tuple[str, ...]]:
        return companions_of(self._file.metadata, str(self._file.path))

    @property
    def notes(self) -> tuple[str, ...]:
        """Where llama.cpp reads the tokenizer differently."""
        return self._read[1]

    def __getitem__(self, name: str) -> bytes:
        return self._made[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._made)

    def __len__(self) -> int:
        return len(self._made)


@dataclass(frozen=True)
class _Made:
    """Makes a tensor of ours."""

    found: GgufTensor
    storage: Storage
    tensor: Tensor
    shape: ModelShape
    permuted: bool
    plus_one: bool

    def __call__(self) -> Kept:
        kept = kept_as(self.storage, self.found.raw, self.found.shape)
        if self.plus_one and len(self.tensor.shape) == 1:  # all vectors of such a family are norms
            return Stored(np.asarray(kept.widened(), np.float32) - np.float32(1))
        heads = heads_of(self.tensor.name.rpartition(".")[2], self.shape) if self.permuted else 0
        if not heads:
            return kept
        rows = rows_of_ours(heads, self.shape.resolved_head_dim)
        if len(self.tensor.shape) == 1:
            return Stored(np.asarray(kept.widened(), np.float32)[rows])
        return kept_as(self.storage, kept.raw[rows], self.tensor.shape)
