"""Which storage each tensor gets in a GGUF file of a type such as Q4_K_M, and how large that makes the file.

The rules are those of llama.cpp's quantiser (`llama_tensor_get_type_impl` and `tensor_type_fallback` of
`llama-quant.cpp`), without the types that nothing here writes:

    float32 stay   vectors, norms, routers, learned positions, what is no weight
    the head       and the embedding where it is the head: Q8_0 in Q8_0, else Q6_K, whatever the type
    v and down     more bits in a type of several (..._M), in the blocks where errors count most (`_counts_most`); v, k
                   and o more in models of 8 experts, v in those of 80 blocks whose heads share keys
    whole blocks   rows that are none get a type of smaller blocks (`FALLBACK`), or float16
"""

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from ...errors import ConfigError, shown
from ...fields import either
from .ggml_types import BY_STORAGE
from .values import U32

__all__ = ["FILE_TYPES", "FileType", "Plan", "Subject", "file_type", "may_be_quantised", "plan", "tensor_bytes"]


@dataclass(frozen=True)
class FileType:
    """A type of files: its number in `general.file_type`, and the storage of most tensors."""

    name: str
    id: int
    storage: str

    @property
    def metadata(self) -> dict[str, U32]:
        """What a file of this type says of it."""
        return {"general.file_type": U32(self.id), "general.quantization_version": U32(VERSION)}


# llama.h: llama_ftype
FILE_TYPES = {
    name: FileType(name, number, storage)
    for name, number, storage in (
        ("F32", 0, "float32"),
        ("F16", 1, "float16"),
        ("BF16", 32, "bf16"),
        ("Q8_0", 7, "q8_0"),
        ("Q6_K", 18, "q6_k"),
        ("Q5_K_M", 17, "q5_k"),
        ("Q5_K_S", 16, "q5_k"),
        ("Q5_1", 9, "q5_1"),
        ("Q5_0", 8, "q5_0"),
        ("Q4_K_M", 15, "q4_k"),
        ("Q4_K_S", 14, "q4_k"),
        ("Q4_1", 3, "q4_1"),
        ("Q4_0", 2, "q4_0"),
        ("IQ4_NL", 25, "iq4_nl"),
        ("MXFP4_MOE", 38, "mxfp4"),
        ("Q3_K_L", 13, "q3_k"),
        ("Q3_K_M", 12, "q3_k"),
        ("Q3_K_S", 11, "q3_k"),
        ("Q2_K", 10, "q2_k"),
    )
}
VERSION = 2  # GGML_QNT_VERSION of ggml.h
ALIASES = {"Q5_K": "Q5_K_M", "Q4_K": "Q4_K_M", "Q3_K": "Q3_K_M"}  # of llama-quantize
FALLBACK = {"q4_k": "q5_0", "q5_k": "q5_1", "q6_k": "q8_0", "q3_k": "q4_0", "q2_k": "q4_0"}
WHOLE = ("float32", "float16", "bf16")
NEVER = re.compile(  # `tensor_allows_quantization`, of any architecture
    r"_norm\.weight|ffn_gate_inp\.weight|ffn_gate_tid2eid\.weight|^(position_embd|token_types)\.weight$|altup|laurel|"
    r"per_layer_model_proj|ssm_conv1d|shortconv\.conv\.weight|indexer\.[qk]_proj\.weight|attn_rel_b\.weight|"
    r"time_mix_(first|[wvag][012]|decay_w[12]|lerp_fused)\.weight"
)
PART = re.compile(r"^blk\.(\d+)\.([a-z_]+)\.weight$")


@dataclass(frozen=True)
class Subject:
    """What the rules ask of a model: its architecture, blocks, heads, heads of keys, experts of a layer."""

    architecture: str
    blocks: int
    heads: int
    kv_heads: int
    experts: int = 0

    @property
    def shares_keys(self) -> bool:
        """Whether at least four heads share a head of keys."""
        return self.heads >= 4 * self.kv_heads

    @property
    def is_70b(self) -> bool:
        """Whether llama.cpp takes it for one of the models of 70 billion weights, whose v is small."""
        if self.architecture == "llama":
            return self.blocks == 80 and self.experts != 8 and self.heads != self.kv_heads
        return self.architecture == "qwen2" and self.blocks == 80


@dataclass(frozen=True)
class Plan:
    """The storage of each tensor, by name, and what that takes: bytes of the tensors, numbers in them."""

    type: FileType
    storages: Mapping[str, str]
    nbytes: int
    numbers: int

    @property
    def bits_per_weight(self) -> float:
        """Bits that a number takes, on average."""
        return 8 * self.nbytes / self.numbers


def file_type(name: str) -> FileType:
    """Return the type of that name, in capitals or not; ConfigError, with those that there are, for another."""
    known = ALIASES.get(name.upper(), name.upper())
    if known not in FILE_TYPES:
        raise ConfigError(f"quantize ({shown(name)}) must be {either([*FILE_TYPES])}")
    return FILE_TYPES[known]


def plan(shapes: Mapping[str, tuple[int, ...]], subject: Subject, type: FileType, *, weighted: bool = False) -> Plan:
    """Return the storage of each tensor, given their shapes, outermost axis first, by GGUF's names.

    weighted   whether a file says how much errors in each column count (an importance matrix)
    """
    tied = "output.weight" not in shapes
    storages = {}
    for name, shape in shapes.items():
        may = may_be_quantised(name, shape)
        storages[name] = _storage(name, shape, subject, type, tied, weighted) if may else "float32"
    nbytes = sum(tensor_bytes(shape, storages[name]) for name, shape in shapes.items())
    return Plan(type, storages, nbytes, sum(map(math.prod, shapes.values())))


def may_be_quantised(name: str, shape: tuple[int, ...]) -> bool:
    """Say whether a tensor is a matrix of weights, or several, that may be kept in fewer bits."""
    return len(shape) > 1 and name.endswith("weight") and not NEVER.search(name)


def tensor_bytes(shape: tuple[int, ...], storage: str) -> int:
    """Return the bytes of a tensor in a storage."""
    kind = BY_STORAGE[storage]
    return math.prod(shape) // kind.block * kind.bytes


def _storage(name: str, shape: tuple[int, ...], subject: Subject, type: FileType, tied: bool, weighted: bool) -> str:
    if type.storage in WHOLE:
        return type.storage
    columns, storage = shape[-1], type.storage
    found = PART.match(name)
    if name == "output.weight" or (tied and name == "token_embd.weight"):
        storage = _of_head(columns, storage, type)
    elif type.name == "MXFP4_MOE":
        storage = "mxfp4" if len(shape) > 2 else "q8_0"
    elif found is not None:
        rule = RULES.get(found[2].removesuffix("_exps"))
        if rule is not None:
            storage = rule(type.name, storage, int(found[1]), subject, weighted)
    return _that_fits(columns, storage)


def _that_fits(columns: int, storage: str) -> str:
    for each in (storage, FALLBACK.get(storage, storage)):
        if columns % BY_STORAGE[each].block == 0:
            return each
    return "float16"


def _of_head(columns: int, storage: str, type: FileType) -> str:
    if type.name == "MXFP4_MOE" or columns % BY_STORAGE[storage].block:
        return "q8_0"
    return storage if storage == "q8_0" else "q6_k"


def _counts_most(i: int, blocks: int) -> bool:
    """Say whether block i is one of the first or last eighth, or every third between."""
    return i < blocks // 8 or i >= 7 * blocks // 8 or (i - blocks // 8) % 3 == 2


def _of_v(type: str, storage: str, i: int, of: Subject, weighted: bool) -> str:
    shared = of.shares_keys
    if type == "Q2_K":
        storage = "q4_k" if shared else "q3_k"
    elif type == "Q3_K_M":
        storage = "q5_k" if i < 2 else "q4_k"
    elif type == "Q3_K_L" or (type == "IQ4_NL" and shared) or (type == "Q4_K_S" and i < 4):
        storage = "q5_k"
    elif type in ("Q4_K_M", "Q5_K_M") and _counts_most(i, of.blocks):
        storage = "q6_k"
    if of.is_70b and storage in ("q3_k", "q4_k"):
        storage = "q5_k"
    return "q8_0" if of.experts == 8 else storage


def _of_k(type: str, storage: str, i: int, of: Subject, weighted: bool) -> str:
    return "q8_0" if of.experts == 8 else storage


def _of_o(type: str, storage: str, i: int, of: Subject, weighted: bool) -> str:
    if of.experts == 8:
        return "q5_k" if type in ("Q2_K", "Q3_K_S", "Q3_K_M", "IQ4_NL", "Q4_K_S", "Q4_K_M") else storage
    return {"Q2_K": "q3_k", "Q3_K_M": "q4_k", "Q3_K_L": "q5_k"}.get(type, storage)


def _of_down(type: str, storage: str, i: int, of: Subject, weighted: bool) -> str:
    first = i < of.blocks // 8
    if type == "Q2_K":
        return "q3_k"
    if type == "Q3_K_M":
        return "q5_k" if i < of.blocks // 16 else "q4_k"
    if type in ("Q4_K_M", "Q5_K_M"):
        return "q6_k" if _counts_most(i, of.blocks) else storage
    if type == "Q3_K_L" or (first and (type == "Q4_K_S" or (type == "IQ4_NL" and not weighted))):
        return "q5_k"
    if first and weighted:
        return {"Q4_0": "q4_1", "Q5_0": "q5_1"}.get(type, storage)
    return storage


RULES: dict[str, Callable[[str, str, int, Subject, bool], str]] = {
    "attn_v": _of_v,
    "attn_qkv": _of_v,  # llama.cpp has a rule of its own for it, behind this one, which is never reached
    "attn_k": _of_k,
    "attn_output": _of_o,
    "ffn_down": _of_down,
}
