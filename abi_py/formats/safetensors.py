"""The safetensors container: 8-byte length, JSON header, raw little-endian tensors (https://github.com/huggingface/safetensors).

Written here, because the library's NumPy writer copies every tensor; this one streams arrays from where they lie and
hashes them on the way.  Reading gives memory-mapped views.
"""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import CheckpointError
from ..files import atomic_file, write_pieces

__all__ = ["encoded_size", "read_safetensors", "safetensors_pieces", "write_safetensors"]

DTYPES = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "I64": "<i8", "I32": "<i4", "I16": "<i2", "I8": "|i1"}
DTYPES |= {"U64": "<u8", "U32": "<u4", "U16": "<u2", "U8": "|u1", "BOOL": "|b1"}
NAMES = {np.dtype(code): name for name, code in DTYPES.items()}
MAX_HEADER = 100_000_000  # the library's own limit


def _header(tensors: Mapping[str, np.ndarray], metadata: Mapping[str, str]) -> bytes:
    entries: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    offset = 0
    for name, tensor in tensors.items():
        dtype = tensor.dtype.newbyteorder("<")
        if dtype not in NAMES:
            raise TypeError(f"{name} ({tensor.dtype}) must have one of the types {', '.join(DTYPES)}; convert it first")
        end = offset + tensor.nbytes
        entries[name] = {"dtype": NAMES[dtype], "shape": list(tensor.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # tensors start at a multiple of 8
    return len(text).to_bytes(8, "little") + text


def encoded_size(tensors: Mapping[str, np.ndarray], metadata: Mapping[str, str] | None = None) -> int:
    """Return the size in bytes of the file that `write_safetensors` would write."""
    return len(_header(tensors, metadata or {})) + sum(tensor.nbytes for tensor in tensors.values())


def safetensors_pieces(
    tensors: Mapping[str, np.ndarray], metadata: Mapping[str, str] | None = None
) -> Iterator[bytes | np.ndarray]:
    """Yield the content of a file, header first, then the arrays; for `files.write_pieces` and `write_synced`."""
    yield _header(tensors, metadata or {})
    for tensor in tensors.values():
        yield np.ascontiguousarray(tensor, dtype=tensor.dtype.newbyteorder("<"))


def write_safetensors(
    path: str | Path, tensors: Mapping[str, np.ndarray], metadata: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """Write arrays of any shape under their names in one indivisible step; return {"size": ..., "sha256": ...}."""
    with atomic_file(path) as file:
        return write_pieces(file, safetensors_pieces(tensors, metadata))


def read_safetensors(path: str | Path) -> dict[str, np.ndarray]:
    """Return read-only memory-mapped arrays by name; a file that breaks the format is a `CheckpointError`.

    NumPy has no bfloat16: such tensors are widened to float32 copies, which loses nothing.
    """
    size = Path(path).stat().st_size
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(size - 8, MAX_HEADER):
            raise CheckpointError(f"{path}: offset 0 says that the header has {length} of {size} bytes; it is damaged")
        try:
            entries = json.loads(file.read(length))
        except ValueError:
            raise CheckpointError(f"{path}: the header at offset 8 is not JSON; the file is damaged") from None
    start = 8 + length
    content = np.memmap(path, np.uint8, "r", start) if size > start else np.zeros(0, np.uint8)
    tensors = {}
    for name, entry in entries.items():
        if name == "__metadata__":
            continue
        try:
            bf16 = entry["dtype"] == "BF16"
            dtype, shape = np.dtype("<u2" if bf16 else DTYPES[entry["dtype"]]), tuple(entry["shape"])
            first, last = entry["data_offsets"]
            count = int(np.prod(shape, dtype=np.int64))
        except (KeyError, TypeError, ValueError):
            raise CheckpointError(f"{path}: the header's entry for {name!r} is malformed; it is damaged") from None
        if not 0 <= first <= last <= len(content) or last - first != count * dtype.itemsize:
            place = f"offsets {start + first} to {start + last}"
            raise CheckpointError(f"{path}: {name!r} ({place}) does not fit shape {shape} or the file; it is damaged")
        tensor = content[first:last].view(dtype).reshape(shape)
        # bfloat16 is the upper half of a float32.
        tensors[name] = np.left_shift(tensor, 16, dtype=np.uint32).view(np.float32) if bf16 else tensor
    return tensors
