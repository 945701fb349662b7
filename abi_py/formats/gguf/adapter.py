"""A GGUF file of LoRA adapters, `llama.cpp --lora`: what it says, before it is known which model they are put on.

    general.type           "adapter"                NAME.weight.lora_a    A (R, in)
    adapter.type           "lora"                   NAME.weight.lora_b    B (out, R)
    adapter.lora.alpha     float32                  NAME: as the matrix is called in the file of the model
    general.architecture   that of the model

Each matrix is multiplied by alpha / R of its own rank R, or by 1 where alpha is 0 or missing.  Of an embedding (V, C),
A is transposed: (V, R), because a row of it is looked up.  As llama.cpp's loader reads it (`llama-adapter.cpp`); but
what that passes over, norms among the adapters and entries of its own, is an error here.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from ...errors import CheckpointError, listed, shown
from ..checkpoint_names import BASE_DIGEST, BASE_FINGERPRINT
from .container import GgufFile, GgufTensor, is_gguf, open_gguf
from .values import F32, Value

__all__ = [
    "EMBEDDING",
    "GgufAdapter",
    "Pair",
    "adapter_metadata",
    "is_gguf_adapter",
    "open_gguf_adapter",
    "pair_names",
]

EMBEDDING = "token_embd.weight"  # whose A is transposed
ALPHA = "adapter.lora.alpha"
KNOWN = ("adapter.type", ALPHA)
A, B = ".lora_a", ".lora_b"
REMEDY = "convert it anew from the folder that PEFT wrote"


class Pair(NamedTuple):
    """The two tensors of an adapter."""

    a: GgufTensor
    b: GgufTensor

    @property
    def rank(self) -> int:
        """Their inner width."""
        return self.b.shape[-1]


@dataclass(frozen=True)
class GgufAdapter:
    """A file of adapters.

    architecture   of the model that they are of
    alpha          what each is multiplied by, times its rank; 0: each is multiplied by 1
    pairs          by the name of the matrix in the file of the model
    base           what the weights that they were trained on are known by, where the file says it
    """

    path: Path
    architecture: str
    alpha: float
    pairs: Mapping[str, Pair]
    base: Mapping[str, str]


def is_gguf_adapter(path: Path) -> bool:
    """Say whether a path is a GGUF file that says it holds adapters; CheckpointError for a damaged one."""
    return is_gguf(path) and open_gguf(path).get("general.type", str) == "adapter"


def open_gguf_adapter(path: Path) -> GgufAdapter:
    """Open a file of adapters; no tensor is read.

    CheckpointError if it breaks the format, is none of adapters, or holds what is not computed here.
    """
    file = open_gguf(path)
    kind = file.require("general.type", str)
    if kind != "adapter":
        raise CheckpointError(f"{path}: general.type is {shown(kind)}; give a file of adapters, of type 'adapter'")
    kind = file.require("adapter.type", str)
    if kind != "lora":
        raise CheckpointError(f"{path}: adapter.type is {shown(kind)}; this version computes only 'lora'")
    other = [key for key in file.metadata if key.startswith("adapter.") and key not in KNOWN]
    if other:
        raise CheckpointError(
            f"{path}: {other[0]} is {shown(file.metadata[other[0]])}; this version does not know the entry, which may "
            "change what the adapters compute"
        )
    alpha = file.get(ALPHA, float, 0.0)
    base = {key: file.require(key, str) for key in (BASE_DIGEST, BASE_FINGERPRINT) if key in file.metadata}
    return GgufAdapter(path, file.require("general.architecture", str), float(alpha), _pairs(file), base)


def _pairs(file: GgufFile) -> dict[str, Pair]:
    found: dict[str, dict[str, GgufTensor]] = {}
    other = []
    for name, tensor in file.tensors.items():
        half = next((half for half in (A, B) if name.endswith(half)), None)
        if half is None:
            other.append(name)
        else:
            found.setdefault(name.removesuffix(half), {})[half] = tensor
    if other:
        raise CheckpointError(
            f"{file.path}: {listed(sorted(other), 3)} is no part of an adapter (llama.cpp passes over norms); {REMEDY}"
        )
    if not found:
        raise CheckpointError(f"{file.path}: it holds no adapter; {REMEDY}")
    pairs = {}
    for name, halves in found.items():
        missing = next((half for half in (A, B) if half not in halves), None)
        if missing is not None:
            raise CheckpointError(f"{file.path}: {name}{missing} is missing; {REMEDY}")
        pairs[name] = pair = Pair(halves[A], halves[B])
        rank = pair.a.shape[-1] if name == EMBEDDING else pair.a.shape[-2] if len(pair.a.shape) > 1 else 0
        if len(pair.b.shape) < 2 or rank != pair.rank:
            raise CheckpointError(
                f"{file.path}: {name}{A} has shape {pair.a.shape} and {name}{B} {pair.b.shape}; they must have one "
                f"rank; {REMEDY}"
            )
    return pairs


# -- writing ------------------------------------------------------------------------------------------


def pair_names(name: str) -> tuple[str, str]:
    """Return what A and B of a matrix are called, by its own name."""
    return name + A, name + B


def adapter_metadata(
    architecture: str, alpha: float, name: str, base: Mapping[str, str] | None = None
) -> dict[str, Value]:
    """Return the entries of a file of adapters, with their types; `base` as `GgufAdapter` has it."""
    return {
        "general.architecture": architecture,
        "general.type": "adapter",
        "general.name": name,
        "adapter.type": "lora",
        ALPHA: F32(alpha),
        **(base or {}),
    }
