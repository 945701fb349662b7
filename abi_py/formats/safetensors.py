"""The safetensors container: 8-byte length, JSON header, raw little-endian tensors (https://github.com/huggingface/safetensors).

Written here, because the library's NumPy writer copies every tensor; this one streams arrays from where they are and
hashes them on the way.  Reading gives memory-mapped views.
"""

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from ..errors import CheckpointError, NonFiniteError, shown
from ..files import atomic_file, write_pieces
from ..untrusted import LFS_POINTER, check, parse_json, refuse_lfs_pointer

__all__ = [
    "Joined",
    "Numbers",
    "Stack",
    "Stored",
    "encoded_size",
    "map_safetensors",
    "read_metadata",
    "read_safetensors",
    "safetensors_pieces",
    "write_safetensors",
]

DTYPES = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "I64": "<i8", "I32": "<i4", "I16": "<i2", "I8": "|i1"}
ITEMSIZE = {"F32": 4, "F16": 2, "BF16": 2}  # of the types that weights are written in
LARGEST = {"F16": 65504.0, "BF16": 3.3895314e38}
DTYPES |= {"U64": "<u8", "U32": "<u4", "U16": "<u2", "U8": "|u1", "BOOL": "|b1"}
NAMES = {np.dtype(code): name for name, code in DTYPES.items()}
PIECE = 1 << 18  # numbers that are copied or converted at once, on their way into a file
MAX_HEADER = 100_000_000  # the library's own limit
MAX_AXES = 32  # of NumPy 1
MAX_BYTES = 2**63 - 1  # of an array of NumPy's
ENTRY = {"dtype": str, "shape": list[int], "data_offsets": list[int]}


@dataclass(frozen=True)
class Stored:
    """A tensor as it lies in a file, memory-mapped and read-only; of bfloat16, which NumPy lacks, as uint16."""

    raw: np.ndarray
    bf16: bool = False

    @property
    def shape(self) -> tuple[int, ...]:
        """Its shape."""
        return self.raw.shape

    @property
    def is_float(self) -> bool:
        """Say whether it holds floats."""
        return self.bf16 or self.raw.dtype.kind == "f"

    @property
    def is_narrow(self) -> bool:
        """Say whether its numbers take two bytes each."""
        return self.bf16 or self.raw.dtype == np.float16

    @property
    def nbytes(self) -> int:
        """Its bytes."""
        return self.raw.nbytes

    def at(self, index: tuple[int, ...]) -> "Stored":
        """Return one of its matrices, by the indices of the axes before them."""
        return Stored(self.raw[index], self.bf16)

    def turned(self) -> "Stored":
        """Return it with rows for columns."""
        return Stored(self.raw.swapaxes(-1, -2), self.bf16)

    def settled(self) -> "Stored":
        """Return it ready to be read in strips of rows."""
        return self

    def part(self, first: int, last: int) -> "Stored":
        """Return some of its rows."""
        return Stored(self.raw[first:last], self.bf16)

    def widened(self) -> np.ndarray:
        """Return it as numbers: bfloat16 as a float32 copy, which loses nothing; any other type as it lies."""
        if not self.bf16:
            return self.raw
        return np.left_shift(self.raw, 16, dtype=np.uint32).view(np.float32)  # the upper half of a float32

    def copy_to(self, out: np.ndarray) -> None:
        """Write its numbers to `out`, float32 of its shape, without memory for a copy between.

        Of float64, what float32 cannot hold becomes infinity; `finite.check_read` finds it.
        """
        if self.bf16:
            np.left_shift(self.raw, 16, dtype=np.uint32, out=out.view(np.uint32))
            return
        with np.errstate(over="ignore"):
            out[...] = self.raw

    def numbers(self) -> Iterator[np.ndarray]:
        """Yield its numbers in C order, in pieces."""
        return Joined((self,)).numbers()


@dataclass(frozen=True)
class Stack:
    """Stored tensors of one shape as one, along a new first axis."""

    parts: tuple[Stored, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        """Its shape."""
        return (len(self.parts), *self.parts[0].shape)

    @property
    def is_narrow(self) -> bool:
        """Say whether all numbers take two bytes each."""
        return all(part.is_narrow for part in self.parts)

    def at(self, index: tuple[int, ...]) -> Stored:
        """Return one of its matrices, by the indices of the axes before them."""
        return self.parts[index[0]].at(index[1:])

    def turned(self) -> "Stack":
        """Return it with rows for columns."""
        return Stack(tuple(part.turned() for part in self.parts))

    def settled(self) -> "Stack":
        """Return it ready to be read in strips of rows."""
        return self

    def part(self, first: int, last: int) -> "Stack":
        """Return some of what its first axis has."""
        return Stack(self.parts[first:last])

    def widened(self) -> np.ndarray:
        """Return its numbers, float32."""
        out = np.empty(self.shape, np.float32)
        self.copy_to(out)
        return out

    def copy_to(self, out: np.ndarray) -> None:
        """Write its numbers to `out`, float32 of its shape."""
        for part, place in zip(self.parts, out, strict=True):
            part.copy_to(place)


class Numbers(Protocol):
    """What `Joined` asks of its parts: `Stored`, and what keeps numbers otherwise (`encoded.py`)."""

    @property
    def shape(self) -> tuple[int, ...]: ...
    def at(self, index: tuple[int, ...], /) -> "Numbers": ...
    def settled(self) -> "Numbers": ...
    def part(self, first: int, last: int, /) -> "Numbers": ...
    def widened(self) -> np.ndarray: ...


@dataclass(frozen=True)
class Joined:
    """Tensors side by side along their last axis or the one before, as one that is written: never made as a whole."""

    parts: tuple[Numbers, ...]
    axis: int = -2
    code: str = "F32"

    @property
    def shape(self) -> tuple[int, ...]:
        """Its shape."""
        first, axis = self.parts[0].shape, max(self.axis, -len(self.parts[0].shape))
        return tuple(
            sum(part.shape[i] for part in self.parts) if i - len(first) == axis else size
            for i, size in enumerate(first)
        )

    @property
    def nbytes(self) -> int:
        """Its size in a file."""
        return math.prod(self.shape) * ITEMSIZE[self.code]

    def numbers(self) -> Iterator[np.ndarray]:
        """Yield its numbers in C order, in pieces of some megabytes."""
        vector = len(self.parts[0].shape) < 2
        side_by_side = [[part] for part in self.parts] if self.axis == -2 or vector else [[*self.parts]]
        for index in np.ndindex(self.parts[0].shape[:-2]):
            for group in side_by_side:
                matrices = [part.at(index).settled() for part in group]
                columns = 1 if vector else sum(matrix.shape[1] for matrix in matrices)
                rows = max(1, PIECE // max(columns, 1))
                for i in range(0, matrices[0].shape[0], rows):
                    strips = [np.ascontiguousarray(matrix.part(i, i + rows).widened()) for matrix in matrices]
                    yield strips[0] if len(strips) == 1 else np.concatenate(strips, axis=1)

    def pieces(self, name: str) -> Iterator[np.ndarray]:
        """Yield its content as it is written.  NonFiniteError, with its name, for a number too large for its type."""
        before = 0
        for numbers in self.numbers():
            raw = _encode(numbers, self.code)
            widened = Stored(raw, self.code == "BF16").widened()
            if self.code != "F32" and not np.isfinite(widened).all():
                place = int(np.argmax(~np.isfinite(widened)))
                at = ", ".join(map(str, np.unravel_index(before + place, self.shape)))
                raise NonFiniteError(
                    f"{name} is {numbers.flat[place]:.6g} at [{at}], and {self.code} holds numbers up to "
                    f"{LARGEST[self.code]:.6g}; nothing was saved; save it as float32"
                )
            before += numbers.size
            yield raw


def _encode(numbers: np.ndarray, code: str) -> np.ndarray:
    """Return floats as numbers of another type, each the nearest."""
    with np.errstate(over="ignore"):
        if code == "BF16":
            from ..kernels.storage import STORAGES  # brings the compiler, which who only reads does not need

            return STORAGES["bf16"].encode_ref(numbers.astype(np.float32, copy=False))
        return numbers.astype(DTYPES[code], copy=False)


def _header(tensors: Mapping[str, np.ndarray | Joined], metadata: Mapping[str, str]) -> bytes:
    entries: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    offset = 0
    for name, tensor in tensors.items():
        code = tensor.code if isinstance(tensor, Joined) else NAMES.get(tensor.dtype.newbyteorder("<"))
        if code is None:
            kind = getattr(tensor, "dtype", "")
            raise TypeError(f"{name} ({kind}) must have one of the types {', '.join(DTYPES)}; convert it first")
        end = offset + tensor.nbytes
        entries[name] = {"dtype": code, "shape": list(tensor.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # tensors start at a multiple of 8
    return len(text).to_bytes(8, "little") + text


def encoded_size(tensors: Mapping[str, np.ndarray | Joined], metadata: Mapping[str, str] | None = None) -> int:
    """Return the size in bytes of the file that `write_safetensors` would write."""
    return len(_header(tensors, metadata or {})) + sum(tensor.nbytes for tensor in tensors.values())


def safetensors_pieces(
    tensors: Mapping[str, np.ndarray | Joined], metadata: Mapping[str, str] | None = None
) -> Iterator[bytes | np.ndarray]:
    """Yield the content of a file, header first, then the arrays; for `files.write_pieces` and `write_synced`."""
    yield _header(tensors, metadata or {})
    for name, tensor in tensors.items():
        if isinstance(tensor, Joined):
            yield from tensor.pieces(name)
        else:
            yield np.ascontiguousarray(tensor, dtype=tensor.dtype.newbyteorder("<"))


def write_safetensors(
    path: str | Path, tensors: Mapping[str, np.ndarray | Joined], metadata: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """Write arrays of any shape under their names in one indivisible step; return {"size": ..., "sha256": ...}."""
    with atomic_file(path) as file:
        return write_pieces(file, safetensors_pieces(tensors, metadata))


def read_safetensors(path: str | Path) -> dict[str, np.ndarray]:
    """Return read-only memory-mapped arrays by name, those of bfloat16 widened; see `map_safetensors`."""
    return {name: tensor.widened() for name, tensor in map_safetensors(path).items()}


def map_safetensors(path: str | Path) -> dict[str, Stored]:
    """Return the tensors of a file by name; a file that breaks the format is a `CheckpointError`.

    Types that are not read (float8 and smaller) are named.
    """
    entries, _, start = _read_header(path)
    size = Path(path).stat().st_size
    content = np.memmap(path, np.uint8, "r", start) if size > start else np.zeros(0, np.uint8)
    tensors, ranges = {}, []
    for name, entry in entries.items():
        check(entry, ENTRY, f"{path}: the header's entry for {shown(name)}")
        bf16 = entry["dtype"] == "BF16"
        if not bf16 and entry["dtype"] not in DTYPES:
            kind = shown(entry["dtype"])
            raise CheckpointError(
                f"{path}: {shown(name)} is of type {kind}, which this version does not read; convert it to BF16 or F32"
            )
        dtype, shape = np.dtype("<u2" if bf16 else DTYPES[entry["dtype"]]), tuple(entry["shape"])
        first, last = entry["data_offsets"] if len(entry["data_offsets"]) == 2 else (1, 0)
        good = 0 <= first <= last <= len(content) and min(shape, default=0) >= 0 and len(shape) <= MAX_AXES
        # NumPy counts the strides of an empty array as if none of its axes were.
        good = good and math.prod(size for size in shape if size) * dtype.itemsize <= MAX_BYTES
        if not good or last - first != math.prod(shape) * dtype.itemsize:
            place = f"offsets {start + first} to {start + last}"
            raise CheckpointError(
                f"{path}: {shown(name)} ({place}) does not fit shape {shown(shape)} or the file; it is damaged"
            )
        ranges.append((first, last))
        tensors[name] = Stored(content[first:last].view(dtype).reshape(shape), bf16)
    _check_whole(sorted(ranges), len(content), start, path)
    return tensors


def read_metadata(path: str | Path) -> dict[str, str]:
    """Return what the header says besides of its tensors; errors of `map_safetensors`."""
    return _read_header(path)[1]


def _read_header(path: str | Path) -> tuple[dict[str, Any], dict[str, str], int]:
    """Return the entries of the tensors, the metadata, and the offset of the first tensor."""
    size = Path(path).stat().st_size
    with open(path, "rb") as file:
        refuse_lfs_pointer(path, file.read(len(LFS_POINTER)))
        file.seek(0)
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(size - 8, MAX_HEADER):
            raise CheckpointError(f"{path}: offset 0 says that the header has {length} of {size} bytes; it is damaged")
        try:
            entries = parse_json(file.read(length))
        except ValueError as problem:
            raise CheckpointError(f"{path}: the header at offset 8 is not JSON ({problem}); it is damaged") from None
    check(entries, dict[str, Any], f"{path}: the header at offset 8")
    metadata = entries.pop("__metadata__", None)
    metadata = {} if metadata is None else metadata  # mlx 0.32 writes null where it has none
    check(metadata, dict[str, str], f"{path}: __metadata__ in the header")
    return entries, metadata, 8 + length


def _check_whole(ranges: list[tuple[int, int]], size: int, start: int, path: str | Path) -> None:
    """Raise CheckpointError where tensors share bytes, or bytes belong to none: the format has neither."""
    end = 0
    for first, last in (*ranges, (size, size)):
        if first != end:
            what = "belong to no tensor" if first > end else "belong to two tensors"
            place = f"bytes {start + min(first, end)} to {start + max(first, end)}"
            raise CheckpointError(f"{path}: {place} {what}; it is damaged")
        end = last
