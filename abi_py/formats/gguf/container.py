"""A GGUF file, or the files of a split one: metadata and tensors by name, read where they are, nothing copied."""

import itertools
import math
import re
import types
import typing
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, overload

import numpy as np

from ...errors import CheckpointError, shown
from .ggml_types import GgmlType
from .header import CONVERT, Entry, Part, read_part
from .values import Value

if TYPE_CHECKING:
    from ...kernels.storage import Storage

__all__ = ["GgufFile", "GgufTensor", "is_gguf", "open_gguf", "split_name"]

SUFFIX = ".gguf"
SPLIT_NO, SPLIT_COUNT, SPLIT_TENSORS = "split.no", "split.count", "split.tensors.count"
SPLIT_NAME = re.compile(r"(.*)-(\d{5})-of-(\d{5})\.gguf", re.DOTALL)  # of llama.cpp's gguf-split
NAMES = {int: "a whole number", float: "a finite number", bool: "true or false", str: "text"}
T = TypeVar("T", int, float, bool, str)


@dataclass(frozen=True, eq=False, slots=True)
class GgufTensor:
    """A tensor as it is in a file: shape outermost axis first, `offset` its first byte there."""

    name: str
    shape: tuple[int, ...]
    kind: GgmlType
    offset: int
    size: int  # bytes
    part: Part

    def __repr__(self) -> str:
        return f"GgufTensor({self.name!r}, {self.shape}, {self.kind})"

    @property
    def file(self) -> Path:
        """The file that it is in."""
        return self.part.path

    @property
    def storage(self) -> "Storage | None":
        """What computes with its bytes; None if nothing here does."""
        return self.kind.storage

    @property
    def raw(self) -> np.ndarray:
        """Its rows (rows, items) in the storage's dtype: a read-only view of the mapped file; a vector is one row.

        Of more than two axes, all but the last are one: experts (E, out, in) are E * out rows.
        """
        raw = self.part.content[self.offset : self.offset + self.size].view(self.kind.dtype)
        return raw.reshape(math.prod(self.shape[:-1]), -1)

    def numbers(self, first: int, last: int) -> np.ndarray:
        """Return some of its rows decoded, (last - first, K) float32; CheckpointError if nothing here decodes them."""
        out = np.empty((last - first, self.shape[-1]), np.float32)
        self.kind.require_storage(f"{self.file}: {self.name}").decode(out, self.raw, first)
        return out

    def forget(self) -> None:
        """Let the system take back the memory that its bytes take; they are read again when they are asked for."""
        self.part.forget(self.offset, self.size)


class _Metadata(Mapping[str, Value]):
    """Values by key, each made when it is asked for."""

    def __init__(self, part: Part) -> None:
        self._part = part

    def __getitem__(self, key: str) -> Value:
        return self._part.value(key)

    def __iter__(self) -> Iterator[str]:
        return iter(self._part.entries)

    def __len__(self) -> int:
        return len(self._part.entries)

    def __contains__(self, key: object) -> bool:
        return key in self._part.entries


class GgufFile:
    """What `open_gguf` returns: metadata and tensors of a model, from one file or from several.

    path       the file that was asked for              metadata   key -> value, of the first file
    files      all of them, in order                    tensors    name -> GgufTensor, of all files
    """

    def __init__(self, path: Path, parts: tuple[Part, ...], tensors: dict[str, GgufTensor]) -> None:
        """Join parts that were read and belong together."""
        self.path, self._parts, self.tensors = path, parts, types.MappingProxyType(tensors)
        self.metadata: Mapping[str, Value] = _Metadata(parts[0])

    def __repr__(self) -> str:
        return f"GgufFile({str(self.path)!r}, {len(self.metadata)} keys, {len(self.tensors)} tensors)"

    @property
    def files(self) -> tuple[Path, ...]:
        """All files of the model, in order."""
        return tuple(part.path for part in self._parts)

    @property
    def alignment(self) -> int:
        """Where tensors may begin: at multiples of so many bytes."""
        return self._parts[0].alignment

    @property
    def entries(self) -> Mapping[str, Entry]:
        """Of each key the type of its value, the number of its items, and where it is in the first file."""
        return types.MappingProxyType(self._parts[0].entries)

    @overload
    def require(self, key: str, kind: type[T]) -> T: ...
    @overload
    def require(self, key: str, kind: Any) -> Any: ...
    def require(self, key: str, kind: Any) -> Any:
        """Return the value of a key, which must be of a kind; CheckpointError if it is missing, or of another.

        kind: int, float (an int may stand for one, infinity and NaN may not), bool, str; list[str] gives a list,
        list[int], list[float] and list[bool] a read-only array; or several of them: int | list[int].
        """
        if key not in self.metadata:
            raise CheckpointError(f"{self._parts[0].path}: the metadata lack {key}; {CONVERT}")
        entry = self.entries[key]
        fits = next((option for option in _options(kind) if _holds(entry, option)), None)
        value = None if fits is None else _as(self.metadata[key], fits)
        if value is None:
            wanted = " or ".join(_name(option) for option in _options(kind))
            got = shown(self.metadata[key]) if entry.item is None else entry.type_name
            self._parts[0].fail(entry.at, f"{key} is {got}, but must be {wanted}", CONVERT)
        return value

    @overload
    def get(self, key: str, kind: type[T], default: T) -> T: ...
    @overload
    def get(self, key: str, kind: Any, default: Any = None) -> Any: ...
    def get(self, key: str, kind: Any, default: Any = None) -> Any:
        """Return the value of a key, or `default` if it is missing; CheckpointError if it is of another kind."""
        return self.require(key, kind) if key in self.metadata else default


# -- kinds of values -----------------------------------------------------------------------------


def _options(kind: Any) -> tuple[Any, ...]:
    return typing.get_args(kind) if isinstance(kind, types.UnionType) else (kind,)


def _holds(entry: Entry, kind: Any) -> bool:
    """Say whether the type of an entry is of a kind."""
    if typing.get_origin(kind) is list:
        (inner,) = typing.get_args(kind)
        return entry.item is not None and _is(entry.item.kind, inner)
    return entry.item is None and _is(entry.kind.kind, kind)


def _is(value: type, kind: type) -> bool:
    if kind is int or kind is float:
        return issubclass(value, (int, kind)) and value is not bool
    return value is kind


def _as(value: Any, kind: Any) -> Any:
    """Return a value as of its kind; None for a number that must be finite and is not."""
    if kind is float:
        return float(value) if math.isfinite(value) else None
    if typing.get_args(kind) == (float,):
        return value if np.isfinite(value).all() else None
    return value if typing.get_args(kind) else kind(value)


def _name(kind: Any) -> str:
    inner = typing.get_args(kind)
    return f"an array, each item {NAMES[inner[0]]}" if inner else NAMES[kind]


# -- files ---------------------------------------------------------------------------------------


def split_name(stem: str, place: int, count: int) -> str:
    """Return the name of the file at a place, from 0, of a model split into `count`: STEM-00001-of-00003.gguf."""
    return f"{stem}-{place + 1:05d}-of-{count:05d}.gguf"


def is_gguf(path: Path) -> bool:
    """Say whether a path is a file that begins as GGUF does, or is called so, whatever is wrong with it."""
    if not path.is_file() or path.suffix == SUFFIX:
        return path.is_file()
    with open(path, "rb") as file:
        return file.read(4) == b"GGUF"


def open_gguf(path: str | Path) -> GgufFile:
    """Open a GGUF file, or of a split one, given any of its files, all; CheckpointError if it breaks the format.

    Nothing but what comes before the tensors is read, so a file of any size opens at once.  OSError passes through.
    """
    path = Path(path)
    parts = _with_others(read_part(path))
    tensors: dict[str, GgufTensor] = {}
    for part in parts:
        for name, info in part.tensors.items():
            if name in tensors:
                part.fail(info.offset, f"the tensor {shown(name)} is in {tensors[name].file.name}, too", FOREIGN)
            tensors[name] = GgufTensor(name, *info, part)
    expected = _whole(parts[0], SPLIT_TENSORS, len(tensors)) if len(parts) > 1 else len(tensors)
    if expected != len(tensors):
        entry = parts[0].entries[SPLIT_TENSORS]
        parts[0].fail(entry.at, f"{SPLIT_TENSORS} is {expected}, and its files hold {len(tensors)} tensors", FOREIGN)
    return GgufFile(path, parts, tensors)


FOREIGN = "its files are not of one model; get them again"


def _whole(part: Part, key: str, default: int) -> int:
    """Return a whole number of the metadata."""
    entry = part.entries.get(key)
    if entry is None:
        return default
    if not _holds(entry, int):
        part.fail(entry.at, f"{key} is {entry.type_name}, but must be {NAMES[int]}")
    return int(typing.cast(int, part.value(key)))


def _with_others(part: Part) -> tuple[Part, ...]:
    """Return all files of the model that a file belongs to, in order."""
    count = _whole(part, SPLIT_COUNT, 1)
    if count <= 1:
        return (part,)
    place, name = part.entries[SPLIT_COUNT].at, SPLIT_NAME.fullmatch(part.path.name)
    if name is None or int(name[3]) != count:
        rule = f"named NAME-00001-of-{count:05d}.gguf and so on"
        part.fail(place, f"it is one of {count} files, which must be {rule}", "give it and the others such names")
    names = (split_name(name[1], i, count) for i in range(count))
    missing = list(itertools.islice((each for each in names if not part.path.with_name(each).is_file()), 4))
    if missing:
        which = ", ".join(missing[:3]) + " and more" * (len(missing) > 3)
        part.fail(place, f"of its {count} files {which} are not there", "put them beside it")
    paths = (part.path.with_name(split_name(name[1], i, count)) for i in range(count))
    parts = tuple(part if path == part.path else read_part(path) for path in paths)
    for i, other in enumerate(parts):
        for key, right in ((SPLIT_COUNT, count), (SPLIT_NO, i), (SPLIT_TENSORS, _whole(part, SPLIT_TENSORS, -1))):
            found = _whole(other, key, -1)
            if found != right:
                at = other.entries[key].at if key in other.entries else 0
                other.fail(
                    at, f"{key} is {found if at else 'missing'}, and by {part.path.name} must be {right}", FOREIGN
                )
    return parts
