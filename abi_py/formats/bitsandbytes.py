"""Matrices in NF4 as bitsandbytes writes them beside others into a folder of Hugging Face's kind.

    X.weight                                  U8 (n / 2, 1): two numbers a byte, the first in its upper half
    X.weight.absmax                           F32 (blocks,), or U8 with double quantisation
    X.weight.quant_map                        F32 (16,): the values of NF4
    X.weight.nested_absmax, nested_quant_map  F32, of double quantisation
    X.weight.quant_state.bitsandbytes__nf4    U8: JSON with shape, block sizes, nested_offset

They become one tensor X.weight over the mapped bytes (`kernels/storage/nf4.py`).  Its other types (FP4, 8 bits) and
other sizes of blocks are refused.  The layout is that of bitsandbytes 0.50 (`QuantState.as_dict`).
"""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from ..errors import CheckpointError, shown
from ..kernels.storage.nf4 import NF4, NUMBERS, SCALES, VALUES
from ..untrusted import check, parse_json
from .encoded import Encoded
from .safetensors import Stored

__all__ = ["QUANTIZATION", "in_nf4", "without_quantization"]

QUANTIZATION = "quantization_config"  # of config.json
STATE = ".quant_state.bitsandbytes__"
SCHEMA = {"quant_type": str, "blocksize": int, "shape": list[int]}
REMEDY = "take the folder in 16 bits, and --base-storage nf4-dq"
BESIDE = ("absmax", "quant_map", "nested_absmax", "nested_quant_map")


def without_quantization(content: Mapping[str, Any]) -> dict[str, Any]:
    """Return the content of a config.json without what says that it is bitsandbytes' NF4; anything else stays."""
    said = content.get(QUANTIZATION)
    ours = isinstance(said, Mapping) and said.get("load_in_4bit") and said.get("bnb_4bit_quant_type") == "nf4"
    return {name: value for name, value in content.items() if not (ours and name == QUANTIZATION)}


def in_nf4(tensors: Mapping[str, Stored], place: object) -> dict[str, Stored | Encoded]:
    """Return tensors with one for each matrix in NF4, in place of its parts; CheckpointError names what is damaged."""
    states = {name: name.partition(STATE) for name in tensors if STATE in name}
    found: dict[str, Stored | Encoded] = dict(tensors)
    for name, (weight, _, kind) in states.items():
        if kind != "nf4":
            raise CheckpointError(f"{place}: {weight} is in {shown(kind)} of bitsandbytes, which is not read; {REMEDY}")
        found[weight] = _matrix(tensors, weight, name, place)
        for part in (name, *(f"{weight}.{each}" for each in BESIDE)):
            found.pop(part, None)
    return found


def _matrix(tensors: Mapping[str, Stored], weight: str, name: str, place: object) -> Encoded:
    where = f"{place}: {name}"
    try:
        state: dict[str, Any] = parse_json(tensors[name].raw.tobytes())
    except ValueError as problem:
        raise CheckpointError(f"{where} is not JSON ({problem}); it is damaged") from None
    check(state, SCHEMA, where)
    shape, double = tuple(state["shape"]), f"{weight}.nested_absmax" in tensors
    if state["blocksize"] != NUMBERS or (double and state.get("nested_blocksize") != SCALES):
        sizes = f"{state['blocksize']} and {state.get('nested_blocksize')}"
        raise CheckpointError(f"{where} has blocks of {sizes}; those of {NUMBERS} and {SCALES} are read; {REMEDY}")
    if len(shape) != 2 or min(shape) < 1 or shape[1] % 2:
        raise CheckpointError(f"{where}: shape {shown(shape)} is not of a matrix with rows of an even length; {REMEDY}")
    blocks = math.ceil(math.prod(shape) / NUMBERS)

    def part(end: str, size: int, dtype: type) -> np.ndarray:
        tensor = tensors.get(f"{weight}{end}")
        if tensor is None or tensor.raw.size != size or tensor.raw.dtype != dtype or tensor.bf16:
            said = "is missing" if tensor is None else f"is {tensor.raw.dtype} of {tensor.raw.size} numbers"
            wanted = f"{size} of {np.dtype(dtype)}"
            raise CheckpointError(f"{place}: {weight}{end} {said}; of {shape} in NF4 it has {wanted}; it is damaged")
        return tensor.raw.reshape(-1)

    raw = part("", math.prod(shape) // 2, np.uint8).reshape(shape[0], shape[1] // 2)
    if not np.allclose(part(".quant_map", len(VALUES), np.float32), VALUES, rtol=1e-6):
        raise CheckpointError(f"{place}: {weight}.quant_map are other values than those of NF4; {REMEDY}")
    if not double:
        return Encoded(raw, NF4.of_scales(part(".absmax", blocks, np.float32)), shape)
    check(state, {"nested_offset": float}, where)
    scales = part(".nested_absmax", math.ceil(blocks / SCALES), np.float32)
    wide = np.append(np.float32(state["nested_offset"]), scales).astype(np.float32)
    table = part(".nested_quant_map", 256, np.float32)
    return Encoded(raw, NF4.of_bytes(part(".absmax", blocks, np.uint8), wide, table), shape)

