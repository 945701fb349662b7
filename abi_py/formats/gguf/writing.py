"""Writing GGUF: any number of tensors in constant memory, encoded on the way, in one indivisible step.

Each tensor is planned: its name, shape and type, and a function that gives its rows when their turn comes.  So the size
of the file is known, to the byte, before the first row is made (`plan_gguf`), and a model of any size is written with
the memory of a strip of rows.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np

from ...errors import NonFiniteError, shown
from ...files import atomic_files
from .container import SPLIT_COUNT, SPLIT_NO, SPLIT_TENSORS, split_name
from .ggml_types import GgmlType
from .header import ALIGNMENT, AXES, DEFAULT_ALIGNMENT, LEAST_ALIGNMENT, NAME_BYTES, VERSIONS
from .values import I32, U16, U32, Value, text_bytes, value_bytes

__all__ = ["PlannedFile", "PlannedTensor", "Progress", "plan_gguf", "strips", "write_gguf"]

STRIP = 1 << 22  # numbers of rows that are made, encoded and written together
TENSOR_NAME_BYTES = 63  # llama.cpp refuses longer ones (GGML_MAX_NAME)
MOST_FILES = 2**16 - 1  # a U16 counts them

Rows = Callable[[int, int], np.ndarray]
Progress = Callable[["PlannedTensor", memoryview], None]


@dataclass(frozen=True, kw_only=True, eq=False)
class PlannedTensor:
    """A tensor that will be written.

    shape       outermost axis first; of more than two, all but the last are rows: (E, out, in) has E * out of them
    rows        rows(first, last) returns those rows: (last - first, K) float32, finite, to be encoded, or
                (last - first, items) as `kind` keeps them, written as they are; a vector is one row.  Called in order
    importance  (K,), or (G, K) for G equal groups of rows (experts): how much an error in a column counts
    """

    name: str
    shape: tuple[int, ...]
    kind: GgmlType
    rows: Rows
    importance: np.ndarray | None = None

    @property
    def num_rows(self) -> int:
        """How many rows it has."""
        return math.prod(self.shape[:-1])

    @property
    def row_bytes(self) -> int:
        """In how many bytes a row is kept."""
        return self.shape[-1] // self.kind.block * self.kind.bytes

    @property
    def nbytes(self) -> int:
        """Its size in the file."""
        return self.num_rows * self.row_bytes


@dataclass(frozen=True, eq=False)
class PlannedFile:
    """One of the files that will be written: what comes before its tensors, these, and its size in bytes."""

    path: Path
    header: bytes
    tensors: tuple[PlannedTensor, ...]
    alignment: int

    @property
    def size(self) -> int:
        """Its size, padding and all."""
        return len(self.header) + sum(_padded(tensor.nbytes, self.alignment) for tensor in self.tensors)


def write_gguf(
    path: str | Path,
    metadata: Mapping[str, Value],
    tensors: Sequence[PlannedTensor],
    *,
    largest: int | None = None,
    progress: Progress | None = None,
) -> tuple[Path, ...]:
    """Write a model, and return the files that it is in: `path`, or if they would be `largest` bytes, several.

    See `plan_gguf` for what is written where.  All files appear together or none does; after an error, what was there
    before is as it was.  `progress` is told the tensor and the bytes of every strip.  NonFiniteError for a number that
    its type cannot keep, OSError for a full disk, what `rows` raises, and the errors of `plan_gguf`.
    """
    files = plan_gguf(path, metadata, tensors, largest=largest)
    with atomic_files(files[0].path) as open_new:
        for planned in files:
            file = open_new(planned.path)
            file.write(planned.header)
            for tensor in planned.tensors:
                _write(file, tensor, planned, progress)
    return tuple(planned.path for planned in files)


def _write(file: BinaryIO, tensor: PlannedTensor, planned: PlannedFile, progress: Progress | None) -> None:
    for first, last in strips(tensor):
        content = _encoded(tensor, first, last, planned.path).data.cast("B")
        file.write(content)
        if progress is not None:
            progress(tensor, content)
    file.write(bytes(-tensor.nbytes % planned.alignment))


def strips(tensor: PlannedTensor) -> Iterator[tuple[int, int]]:
    """Yield first and last row of strips, none of which is in two groups of different importance."""
    groups = len(tensor.importance) if tensor.importance is not None and tensor.importance.ndim == 2 else 1
    rows, step = tensor.num_rows // groups, max(1, STRIP // tensor.shape[-1])
    for start in range(0, tensor.num_rows, rows):
        for first in range(start, start + rows, step):
            yield first, min(first + step, start + rows)


def _encoded(tensor: PlannedTensor, first: int, last: int, path: Path) -> np.ndarray:
    """Return rows as they are kept, in one piece."""
    x, kind = tensor.rows(first, last), tensor.kind
    place = f"{path}: {tensor.name}"
    as_kept = (last - first, tensor.row_bytes // kind.dtype.itemsize)
    if x.dtype == kind.dtype and x.shape == as_kept and kind.name != "F32":
        return np.ascontiguousarray(x)
    if x.dtype != np.float32 or x.shape != (last - first, tensor.shape[-1]):
        wanted = f"float32 {(last - first, tensor.shape[-1])} or {kind.dtype} {as_kept}"
        raise TypeError(f"{place}: rows({first}, {last}) is {x.dtype} {x.shape}; it must be {wanted}")
    raw = np.empty(as_kept, kind.dtype)
    importance = tensor.importance
    if importance is not None and importance.ndim == 2:
        importance = importance[first * len(importance) // tensor.num_rows]
    try:
        kind.require_storage(place).encode(raw, np.ascontiguousarray(x), importance, first)
    except ValueError as problem:
        raise NonFiniteError(f"{place}: {problem}; nothing was saved") from None
    return raw


# -- the plan ------------------------------------------------------------------------------------


def plan_gguf(
    path: str | Path, metadata: Mapping[str, Value], tensors: Sequence[PlannedTensor], *, largest: int | None = None
) -> tuple[PlannedFile, ...]:
    """Return the files that `write_gguf` would write, with their sizes.

    One file at `path`; with `largest`, as many as it takes for none to have more bytes (unless a single tensor has),
    called NAME-00001-of-00003.gguf ... for a path NAME.gguf, the first with all metadata.  Tensors keep their order and
    begin at multiples of `general.alignment` of the metadata, 32 if they have none.  `split.*`, which tell of files and
    not of the model, are left out of what is given.  ValueError or TypeError for what cannot be written.
    """
    path = Path(path)
    entries = {key: value for key, value in metadata.items() if key not in (SPLIT_NO, SPLIT_COUNT, SPLIT_TENSORS)}
    alignment = _alignment(entries)
    _check_tensors(tensors)

    def header(place: int, count: int, group: Sequence[PlannedTensor]) -> bytes:
        if count == 1:
            return _header(entries, group, alignment)
        split = {SPLIT_NO: U16(place), SPLIT_COUNT: U16(count), SPLIT_TENSORS: I32(len(tensors))}
        kept = entries if place == 0 else {key: entries[key] for key in entries if key == ALIGNMENT}
        return _header({**kept, **split}, group, alignment)

    whole = PlannedFile(path, header(0, 1, tensors), tuple(tensors), alignment)
    if largest is None or whole.size <= largest:
        return (whole,)
    groups = _groups(tensors, largest, alignment, len(header(0, 2, tensors)), len(header(1, 2, tensors)))
    count, stem = len(groups), path.name.removesuffix(".gguf")
    if count > MOST_FILES:
        raise ValueError(f"{path} would be {count:,} files; at most {MOST_FILES:,} can be; give a larger size")
    return tuple(
        PlannedFile(path.with_name(split_name(stem, i, count)), header(i, count, group), group, alignment)
        for i, group in enumerate(groups)
    )


def _groups(
    tensors: Sequence[PlannedTensor], largest: int, alignment: int, first_header: int, header: int
) -> list[tuple[PlannedTensor, ...]]:
    """Return which tensors go together into a file, of which at most so many bytes come before them."""
    groups: list[list[PlannedTensor]] = [[]]
    used = first_header
    for tensor in tensors:
        size = _padded(tensor.nbytes, alignment)
        if groups[-1] and used + size > largest:
            groups.append([])
            used = header
        groups[-1].append(tensor)
        used += size
    return [tuple(group) for group in groups]


def _header(entries: Mapping[str, Value], tensors: Sequence[PlannedTensor], alignment: int) -> bytes:
    pieces = [b"GGUF", VERSIONS[-1].to_bytes(4, "little")]
    pieces += [len(tensors).to_bytes(8, "little"), len(entries).to_bytes(8, "little")]
    for key, value in entries.items():
        if not 0 < len(key.encode()) <= NAME_BYTES:
            raise ValueError(f"the key {shown(key)} must have 1 to {NAME_BYTES:,} bytes")
        pieces += [text_bytes(key), value_bytes(key, value)]
    offset = 0
    for tensor in tensors:
        sizes = tensor.shape[::-1]
        pieces += [text_bytes(tensor.name), len(sizes).to_bytes(4, "little")]
        pieces += [size.to_bytes(8, "little") for size in sizes]
        pieces += [tensor.kind.id.to_bytes(4, "little"), offset.to_bytes(8, "little")]
        offset += _padded(tensor.nbytes, alignment)
    content = b"".join(pieces)
    return content + bytes(-len(content) % alignment)


def _padded(size: int, alignment: int) -> int:
    return -(-size // alignment) * alignment


def _alignment(entries: Mapping[str, Value]) -> int:
    alignment = entries.get(ALIGNMENT, U32(DEFAULT_ALIGNMENT))
    if not isinstance(alignment, U32) or alignment < LEAST_ALIGNMENT or alignment & (alignment - 1):
        rule = f"a U32 that is a power of two, and at least {LEAST_ALIGNMENT}"
        raise ValueError(f"{ALIGNMENT} is {shown(alignment)}, but must be {rule}")
    return int(alignment)


def _check_tensors(tensors: Sequence[PlannedTensor]) -> None:
    seen: set[str] = set()
    for tensor in tensors:
        name, kind = shown(tensor.name), tensor.kind
        if tensor.name in seen:
            raise ValueError(f"the tensor {name} is given twice; each name must be given once")
        seen.add(tensor.name)
        if not 0 < len(tensor.name.encode()) <= TENSOR_NAME_BYTES:
            raise ValueError(f"the name {name} must have 1 to {TENSOR_NAME_BYTES} bytes, or llama.cpp refuses it")
        if not 1 <= len(tensor.shape) <= AXES or min(tensor.shape) < 1:
            raise ValueError(f"{name} has shape {tensor.shape}; it must have 1 to {AXES} axes, and none of size 0")
        if tensor.shape[-1] % kind.block:
            rule = f"{kind} keeps {kind.block} in a block; choose another type for it"
            raise ValueError(f"{name} has rows of {tensor.shape[-1]} numbers, and {rule}")
        weights = None if tensor.importance is None else tensor.importance.shape
        if weights is not None and not _fits(weights, tensor):
            rule = f"({tensor.shape[-1]},), or (G, {tensor.shape[-1]}) for G equal groups of its rows"
            raise ValueError(f"the importance of {name} has shape {weights}; it must be {rule}")
        if tensor.importance is not None and not (np.isfinite(tensor.importance) & (tensor.importance >= 0)).all():
            raise ValueError(f"the importance of {name} must be finite, and at least 0, everywhere")


def _fits(weights: tuple[int, ...], tensor: PlannedTensor) -> bool:
    return weights == tensor.shape[-1:] or (
        len(weights) == 2 and weights[1] == tensor.shape[-1] and weights[0] > 0 and tensor.num_rows % weights[0] == 0
    )
