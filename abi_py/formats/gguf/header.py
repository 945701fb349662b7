"""What a GGUF file says before its tensors begin: read with every bound checked before anything is made of it.

    0   "GGUF"            8   u64 number of tensors        string   u64 length, bytes in UTF-8
    4   u32 version 3    16   u64 number of entries        array    u32 type of its items, u64 count, items

    24  the entries of the metadata: string key, u32 type, value
        the tensors: string name, u32 number of axes, u64 sizes, innermost first, u32 ggml's type, u64 offset
        bytes of padding up to a multiple of the alignment, from which offsets count
        the tensors' bytes, each from a multiple of the alignment on

All numbers are little-endian.  From gguf.md of the ggml project.  No count is believed: it must fit into what is
left of the file.  Values stay where they are until somebody asks for them.
"""

import math
import mmap
import os
import stat
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import numpy as np

from ...errors import CheckpointError, shown
from ...untrusted import LFS_POINTER, refuse_lfs_pointer
from .ggml_types import GGML_TYPES, GgmlType
from .values import ARRAY, BOOL, STRING, VALUE_TYPES, Value, ValueType

__all__ = ["ALIGNMENT", "Entry", "Part", "TensorInfo", "read_part"]

ALIGNMENT = "general.alignment"
DEFAULT_ALIGNMENT = 32
LEAST_ALIGNMENT = 8  # gguf.md; and NumPy's and Numba's views of numbers need as much
VERSIONS = (2, 3)  # 3 differs by big-endian files, which say so
AXES = 4  # GGML_MAX_DIMS
NAME_BYTES = 65_535  # of a key, by gguf.md; names of tensors are shorter
DEPTH = 4  # of arrays in arrays, which no program is known to write
LARGEST = 2**63 - 1
OLD = {b"lmgg": "GGML", b"fmgg": "GGMF", b"tjgg": "GGJT", b"algg": "GGLA"}  # first bytes of what was before GGUF
DAMAGED = "it is damaged or cut short; get it again"
CONVERT = "convert the model again with a current llama.cpp"
WITHDRAWN = {4, 5, 31, 32, 33, 36, 37, 38}  # ids of types that ggml has given up
_U32, _U64 = struct.Struct("<I"), struct.Struct("<Q")


class Entry(NamedTuple):
    """Where the value of a key is: its type, of an array the type and number of its items, and the first byte."""

    kind: ValueType
    item: ValueType | None
    length: int
    at: int

    @property
    def type_name(self) -> str:
        """Its type as people write it: uint32, an array of string."""
        return f"an array of {self.item.name}" if self.item else self.kind.name


class TensorInfo(NamedTuple):
    """A tensor: its shape, outermost axis first, its type, where its bytes begin in the file, and how many they are."""

    shape: tuple[int, ...]
    kind: GgmlType
    offset: int
    size: int


@dataclass(frozen=True, eq=False)
class Part:
    """A file, mapped into memory and read up to its tensors."""

    path: Path
    content: np.ndarray  # (size,) uint8, read-only
    version: int
    alignment: int
    entries: dict[str, Entry]
    tensors: dict[str, TensorInfo]

    def value(self, key: str) -> Value:
        """Return the value of a key; CheckpointError if it breaks the format, KeyError if there is no such key."""
        entry = self.entries[key]
        reader = _Reader(self.path, self.content, entry.at)
        if entry.item is None:
            return reader.scalar(entry.kind, key)
        return reader.items(entry.item, entry.length, key)

    def forget(self, first: int, size: int) -> None:
        """Let the system take back the memory of some bytes, where it can be told so."""
        mapped = self.content.base.obj if isinstance(self.content.base, memoryview) else None
        if isinstance(mapped, mmap.mmap) and hasattr(mmap, "MADV_DONTNEED"):  # of a file that is only read
            start = -(-first // mmap.PAGESIZE) * mmap.PAGESIZE
            whole = (first + size) // mmap.PAGESIZE * mmap.PAGESIZE - start
            if whole > 0:
                mapped.madvise(mmap.MADV_DONTNEED, start, whole)

    def fail(self, at: int, problem: str, remedy: str = DAMAGED) -> NoReturn:
        """Raise CheckpointError for what is at a byte of this file."""
        raise CheckpointError(f"{self.path}: byte {at}: {problem}; {remedy}")


def read_part(path: str | Path) -> Part:
    """Return what one file says, whatever the others of a split model do; CheckpointError if it breaks the format."""
    path = Path(path)
    content = _mapped(path)
    reader = _Reader(path, content, 0)
    version, tensors, entries = _head(reader)
    found = _entries(reader, entries)
    alignment = _alignment(reader, found)
    return Part(path, content, version, alignment, found, _tensors(reader, tensors, alignment))


def _mapped(path: Path) -> np.ndarray:
    """Return the bytes of a file, read-only and memory-mapped."""
    with open(path, "rb", opener=_without_waiting) as file:
        facts = os.fstat(file.fileno())
        if not stat.S_ISREG(facts.st_mode):
            raise CheckpointError(f"{path} is no file but a pipe or a device, and cannot be mapped; save it to a file")
        if not facts.st_size:
            raise CheckpointError(f"{path} is empty; get it again")
        return np.frombuffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), np.uint8)


def _without_waiting(path: str, flags: int) -> int:
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))  # of a pipe that nobody writes to


class _Reader:
    """Walks through a file; `at` is the next byte."""

    def __init__(self, path: Path, content: np.ndarray, at: int) -> None:
        self.path, self.content, self.at = path, content, at
        self.view, self.size = content.data, len(content)

    def fail(self, at: int, problem: str, remedy: str = DAMAGED) -> NoReturn:
        raise CheckpointError(f"{self.path}: byte {at}: {problem}; {remedy}")

    def take(self, form: struct.Struct, what: str) -> Any:
        """Return the next numbers, one or a tuple."""
        at = self.at
        if form.size > self.size - at:
            self.fail(at, f"the file ends within {what}")
        self.at += form.size
        numbers = form.unpack_from(self.view, at)
        return numbers[0] if len(numbers) == 1 else numbers

    def raw_text(self, what: str, longest: int) -> bytes:
        at = self.at
        length = self.take(_U64, f"the length of {what}")
        if length > min(longest, self.size - self.at):
            rule = (
                f"at most {longest:,} are allowed"
                if longest <= self.size - self.at
                else f"{self.size - self.at:,} are left"
            )
            self.fail(at, f"{what} has {length:,} bytes, and {rule}")
        self.at += length
        return bytes(self.view[self.at - length : self.at])

    def text(self, what: str, longest: int = LARGEST) -> str:
        """Return the next string."""
        at = self.at
        raw = self.raw_text(what, longest)
        try:
            return raw.decode()
        except UnicodeDecodeError as problem:
            self.fail(at + 8 + problem.start, f"{what} is not UTF-8")

    def kind(self, what: str) -> ValueType:
        """Return the next type of a value."""
        at = self.at
        number = self.take(_U32, f"the type of {what}")
        if number not in VALUE_TYPES:
            self.fail(at, f"{what} is of type {number}, and there are 0 to {len(VALUE_TYPES) - 1}")
        return VALUE_TYPES[number]

    def array(self, what: str) -> tuple[ValueType, int]:
        """Return type and number of the items that come next."""
        item = self.kind(f"the items of {what}")
        at = self.at
        count = self.take(_U64, f"the number of items of {what}")
        most = (self.size - self.at) // item.least
        if count > most:
            self.fail(at, f"{what} has {count:,} items, and what is left of the file holds {most:,} at most")
        return item, count

    # -- past values, and values ----------------------------------------------------------------

    def skip(self, item: ValueType, count: int, what: str, depth: int = 1) -> None:
        """Go past `count` values of a type."""
        if item is STRING:
            self._skip_strings(count, what)
        elif item is not ARRAY:
            self.at += count * item.least
        elif depth == DEPTH:
            self.fail(self.at, f"{what} has arrays in arrays more than {DEPTH} deep", "store it flat")
        else:
            for _ in range(count):
                inner, inner_count = self.array(what)
                self.skip(inner, inner_count, what, depth + 1)

    def _skip_strings(self, count: int, what: str) -> None:
        at, view, last, unpack = self.at, self.view, self.size - 8, _U64.unpack_from
        for i in range(count):
            if at > last:
                self.fail(min(at, self.size), f"the file ends within string {i} of {what}")
            at += 8 + unpack(view, at)[0]
        if at > self.size:
            self.fail(self.size, f"the file ends within string {count - 1} of {what}")
        self.at = at

    def scalar(self, kind: ValueType, what: str) -> Value:
        """Return the next value, which is no array."""
        if kind is STRING:
            return self.text(what)
        at = self.at
        number = self.take(kind.number, what)
        if kind is BOOL and self.view[at] > 1:
            self.fail(at, f"{what} is {self.view[at]}, but must be 0 or 1, for it is a bool")
        return kind.kind(number)

    def items(self, item: ValueType, count: int, what: str) -> list[Any] | np.ndarray:
        """Return the next values, as the whole of an array."""
        if item is STRING:
            return self._strings(count, what)
        if item is ARRAY:
            return [self._inner(what) for _ in range(count)]
        start, self.at = self.at, self.at + count * item.least
        raw = self.content[start : self.at]
        if item is BOOL and count and raw.max() > 1:
            place = int(np.argmax(raw > 1))
            self.fail(start + place, f"item {place} of {what} is {raw[place]}, but must be 0 or 1, for it is a bool")
        return raw.view(item.dtype)

    def _strings(self, count: int, what: str) -> list[str]:
        at, view, unpack, strings = self.at, self.view, _U64.unpack_from, list[str]()
        self._skip_strings(count, what)
        try:
            for _ in range(count):  # of a vocabulary there are hundreds of thousands
                first = at + 8
                at = first + unpack(view, at)[0]
                strings.append(str(view[first:at], "utf-8"))
        except UnicodeDecodeError as problem:
            self.fail(first + problem.start, f"string {len(strings)} of {what} is not UTF-8")
        return strings

    def _inner(self, what: str) -> list[Any]:
        inner = self.items(*self.array(what), what)
        return inner.tolist() if isinstance(inner, np.ndarray) else inner  # many small views would take much memory


def _head(reader: _Reader) -> tuple[int, int, int]:
    """Return version, number of tensors, number of entries."""
    begin = bytes(reader.view[:LFS_BYTES])
    refuse_lfs_pointer(reader.path, begin)
    if begin[:4] in OLD:
        raise CheckpointError(
            f"{reader.path} is a {OLD[begin[:4]]} file, from before GGUF, and is not read here; {CONVERT}"
        )
    if begin[:4] != b"GGUF"[: len(begin)]:
        raise CheckpointError(f"{reader.path} is no GGUF file: it begins with {begin[:4]!r}; is it another file?")
    reader.at = 4
    version = reader.take(_U32, "the version")
    if version and not version & 0xFFFF:
        reader.fail(
            4, "the file is big-endian", "gguf_convert_endian.py of the gguf package turns it into little-endian"
        )
    if version not in VERSIONS:
        known = " and ".join(map(str, VERSIONS))
        reader.fail(4, f"the file is of version {version}, and this version of abi_py reads {known}", CONVERT)
    tensors = reader.take(_U64, "the number of tensors")
    entries = reader.take(_U64, "the number of metadata entries")
    for at, count, what, least in (
        (8, tensors, "tensors", TENSOR_BYTES),
        (16, entries, "metadata entries", ENTRY_BYTES),
    ):
        if count > (reader.size - reader.at) // least:
            reader.fail(at, f"the file says that it has {count:,} {what}, which {reader.size:,} bytes cannot hold")
    return version, tensors, entries


LFS_BYTES = len(LFS_POINTER)
ENTRY_BYTES = 8 + 1 + 4 + 1  # the least: length of the key, a letter, a type, a byte
TENSOR_BYTES = 8 + 4 + 8 + 4 + 8  # length of the name, number of axes, a size, type, offset


def _entries(reader: _Reader, count: int) -> dict[str, Entry]:
    entries: dict[str, Entry] = {}
    for i in range(count):
        start = reader.at
        key = reader.text(f"key {i}", NAME_BYTES)
        if not key or key in entries:
            reader.fail(start, f"key {i} is empty" if not key else f"the key {shown(key)} is given twice")
        what = key if key.isascii() and key.isprintable() and len(key) < 100 else shown(key)
        kind = reader.kind(what)
        item, size = reader.array(what) if kind is ARRAY else (None, 1)
        entry = Entry(kind, item, size, reader.at)
        reader.skip(item or kind, size, what)
        if reader.at > reader.size:
            reader.fail(entry.at, f"the file ends within {what}")
        entries[key] = entry
    return entries


def _alignment(reader: _Reader, entries: dict[str, Entry]) -> int:
    entry = entries.get(ALIGNMENT)
    if entry is None:
        return DEFAULT_ALIGNMENT
    if not issubclass(entry.kind.kind, int) or entry.kind is BOOL:
        reader.fail(entry.at, f"{ALIGNMENT} is {entry.type_name}, but must be uint32")
    (alignment,) = entry.kind.number.unpack_from(reader.view, entry.at)
    if alignment < LEAST_ALIGNMENT or alignment & (alignment - 1):
        rule = f"a power of two, and at least {LEAST_ALIGNMENT}"
        reader.fail(entry.at, f"{ALIGNMENT} is {alignment}, but must be {rule}")
    return int(alignment)


def _tensors(reader: _Reader, count: int, alignment: int) -> dict[str, TensorInfo]:
    found: dict[str, tuple[TensorInfo, int]] = {}
    for i in range(count):
        start = reader.at
        name = reader.text(f"the name of tensor {i}", NAME_BYTES)
        if name in found:
            reader.fail(start, f"the tensor {shown(name)} is given twice")
        found[name] = _tensor(reader, name), start
    data = -(-reader.at // alignment) * alignment
    tensors = {}
    for name, (info, start) in found.items():
        first, last = data + info.offset, data + info.offset + info.size
        if info.offset % alignment:
            reader.fail(start, f"the tensor {shown(name)} has offset {info.offset}, no multiple of {alignment}")
        if last > reader.size:
            place = f"bytes {first:,} to {last:,}"
            reader.fail(start, f"the tensor {shown(name)} is {place} of a file of {reader.size:,}")
        tensors[name] = info._replace(offset=first)
    _check_apart(reader, tensors)
    return tensors


def _tensor(reader: _Reader, name: str) -> TensorInfo:
    """Return what comes after a tensor's name."""
    what, at = f"the tensor {shown(name)}", reader.at
    axes = reader.take(_U32, f"the number of axes of {what}")
    if not 1 <= axes <= AXES:
        reader.fail(at, f"{what} has {axes:,} axes, but must have 1 to {AXES}")
    at = reader.at
    sizes = tuple(reader.take(_U64, f"the sizes of {what}") for _ in range(axes))
    if not all(sizes) or math.prod(sizes) > LARGEST:
        rule = "each must be at least 1, and their product below 2^63"
        reader.fail(at, f"{what} has sizes {shown(sizes)}, innermost first; {rule}")
    type_at = reader.at
    number = reader.take(_U32, f"the type of {what}")
    kind = GGML_TYPES.get(number)
    if kind is None:
        known = (
            f"one that ggml has withdrawn; {CONVERT}" if number in WITHDRAWN else f"unknown to this version; {DAMAGED}"
        )
        raise CheckpointError(f"{reader.path}: byte {type_at}: {what} is of type {number}, {known}")
    if sizes[0] % kind.block:
        reader.fail(at, f"{what} has rows of {sizes[0]} numbers, but {kind} keeps {kind.block} in a block")
    size = math.prod(sizes) // kind.block * kind.bytes
    offset = reader.take(_U64, f"the offset of {what}")
    return TensorInfo(sizes[::-1], kind, offset, size)


def _check_apart(reader: _Reader, tensors: dict[str, TensorInfo]) -> None:
    """Raise CheckpointError where two tensors share bytes."""
    end, before = 0, ""
    for name, info in sorted(tensors.items(), key=lambda pair: pair[1].offset):
        if info.offset < end:
            reader.fail(info.offset, f"the tensors {shown(before)} and {shown(name)} overlap")
        end, before = info.offset + info.size, name
