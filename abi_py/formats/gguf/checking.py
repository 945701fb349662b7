"""A GGUF file read again after it was written: the bytes that were written, numbers as near as their types keep them.

    bytes      of each tensor the checksum of what was encoded is that of what is read back
    metadata   every key has the bytes that it was given
    numbers    of what was encoded, decoded again: no number is further off than one step, as wide as the largest number
               of its block makes it (STEPS).  Rounding takes half of that; the rest is what a search for scales may cut
               off the largest, and what scales lose that are whole numbers themselves.  (That of a block is a half, so
               below 2^-25 of a scale all may be lost.)
    by         errors in columns that do not matter may be of any size: then the step bounds the root mean square error
    importance in which every column counts by its importance

A step is the largest gap between neighbouring codes, over the largest code: of 16 codes from -A to A, 2 A / 15.
"""

import math
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ...errors import CheckpointError
from .container import GgufTensor, open_gguf
from .values import Value, value_bytes
from .writing import PlannedTensor, Progress, strips, write_gguf

__all__ = ["Loss", "Written", "step_of", "write_checked"]

STEPS = {  # storage -> width of a step, where the largest number of a block is 1; how often its scale is in a number
    **{"float16": (2.0**-10, 1), "bf16": (2.0**-7, 1), "mxfp4": (2 / 6, 12), "iq4_nl": (24 / 127, 127)},
    **{"q8_0": (1 / 127, 127), "q5_1": (2 / 31, 32), "q5_0": (1 / 16, 16), "q4_1": (2 / 15, 16), "q4_0": (1 / 8, 8)},
    **{"q6_k": (1 / 32, 127 * 32), "q5_k": (2 / 31, 63 * 32), "q4_k": (2 / 15, 63 * 16), "q3_k": (1 / 4, 31 * 4)},
    **{"q2_k": (2 / 3, 15 * 4), "nf4": (0.304, 0), "nf4-dq": (0.304, 0)},  # the last two are of no GGUF file
}
HALF = 2.0**-25  # what a scale that is a half may lose, however small it is
SCALE = 2.0**-10  # and of a number by its rounding: 2^-11 of it, and of an offset as much
REMEDY = "do not use the file: check the disk, and write it again"
PIECE = 1 << 18  # numbers that are compared together: what is in the cache


@dataclass(frozen=True)
class Loss:
    """What a tensor lost: its type, and the root mean square of its errors over that of its numbers."""

    kind: str
    error: float


@dataclass(frozen=True)
class Written:
    """The files that a model is in, and what its tensors lost; None where they were not read again."""

    files: tuple[Path, ...]
    losses: Mapping[str, Loss] | None = None

    def by_type(self) -> dict[str, float]:
        """Return the largest relative error of a tensor of each type that lost something."""
        most: dict[str, float] = {}
        for loss in (self.losses or {}).values():
            if loss.error:
                most[loss.kind] = max(most.get(loss.kind, 0.0), loss.error)
        return dict(sorted(most.items(), key=lambda each: -each[1]))


def step_of(storage: str, largest: np.ndarray) -> np.ndarray:
    """Return how far a number may be off in a storage, by the largest one of its block; 0 where nothing is lost."""
    if storage not in STEPS:
        return np.zeros_like(largest)
    step, multiple = STEPS[storage]
    return (step + SCALE) * largest + HALF * multiple


def write_checked(
    path: str | Path,
    metadata: Mapping[str, Value],
    tensors: Sequence[PlannedTensor],
    *,
    largest: int | None = None,
    progress: Progress | None = None,
    check: bool = True,
) -> Written:
    """Write a model as `write_gguf` does, read it again unless `check` is false, and return what came of it.

    CheckpointError, with the tensor and the row, if it does not read as it was written; the file is then left where it
    is.  Errors of `write_gguf`.
    """
    if not check:
        return Written(write_gguf(path, metadata, tensors, largest=largest, progress=progress))
    sums: dict[str, int] = {}

    def note(tensor: PlannedTensor, content: memoryview) -> None:
        sums[tensor.name] = zlib.crc32(content, sums.get(tensor.name, 0))
        if progress is not None:
            progress(tensor, content)

    files = write_gguf(path, metadata, tensors, largest=largest, progress=note)
    return Written(files, read_again(files[0], metadata, tensors, sums))


def read_again(
    path: Path, metadata: Mapping[str, Value], tensors: Sequence[PlannedTensor], sums: Mapping[str, int]
) -> dict[str, Loss]:
    """Return what each tensor of a file lost, by the checksums of their bytes; CheckpointError for what is wrong."""
    file = open_gguf(path)
    for key, value in metadata.items():
        if not key.startswith("split.") and (
            key not in file.metadata or value_bytes(key, file.metadata[key]) != value_bytes(key, value)
        ):
            raise CheckpointError(f"{path}: {key} of the metadata does not read as it was written; {REMEDY}")
    losses = {}
    for tensor in tensors:
        found = file.tensors.get(tensor.name)
        if found is None or (found.shape, found.kind) != (tensor.shape, tensor.kind):
            what = "is missing" if found is None else f"is {found.kind} {found.shape}"
            raise CheckpointError(
                f"{path}: {tensor.name} {what}, and was written as {tensor.kind} {tensor.shape}; {REMEDY}"
            )
        if _checksum(found) != sums[tensor.name]:
            raise CheckpointError(f"{found.file}: {tensor.name} does not read as it was written; {REMEDY}")
        losses[tensor.name] = Loss(str(tensor.kind), _compare(found, tensor))
        found.forget()
    return losses


def _checksum(tensor: GgufTensor) -> int:
    value, raw = 0, tensor.raw
    step = max(1, PIECE // tensor.shape[-1])
    for i, first in enumerate(range(0, len(raw), step)):
        value = zlib.crc32(raw[first : first + step].data.cast("B"), value)
        if i % 64 == 63:
            tensor.forget()
    tensor.forget()
    return value


def _compare(found: GgufTensor, tensor: PlannedTensor) -> float:
    """Return the relative error of a tensor; CheckpointError for a number that its type does not explain."""
    lost, size = 0.0, 0.0
    storage = tensor.kind.storage_name
    for start, end in strips(tensor):
        wanted = tensor.rows(start, end)
        if wanted.dtype != np.float32 or tensor.kind.name == "F32":
            continue  # bytes, as they are: the checksum speaks for them
        weights = _weights(tensor, start)
        many = max(1, PIECE // tensor.shape[-1])
        weighted = bound = 0.0
        for first in range(start, end, many):
            last = min(first + many, end)
            x, error = wanted[first - start : last - start], found.numbers(first, last)
            error -= x
            lost += float(np.vdot(error, error))
            size += float(np.vdot(x, x))
            tallest = _tallest(x, tensor.kind.block)
            if weights is None:
                off = _tallest(error, tensor.kind.block)
                allowed = step_of(storage, tallest)
                if not (off <= allowed).all():  # NaN is not
                    row, block = np.argwhere(~(off <= allowed))[0]
                    _refuse(found, first + row, block, off[row, block], allowed[row, block])
            else:
                blocks = weights.reshape(-1, tensor.kind.block).sum(1, dtype=np.float64)
                weighted += float(np.einsum("rk,rk,k->", error, error, weights))
                bound += float((step_of(storage, tallest.astype(np.float64)) ** 2 @ blocks).sum())
        found.forget()
        if weights is not None and not weighted <= bound:
            _refuse(found, start, 0, math.sqrt(weighted), math.sqrt(bound))
    return math.sqrt(lost / size) if size else 0.0


def _weights(tensor: PlannedTensor, row: int) -> np.ndarray | None:
    """Return how much the columns of a row count, if any does more than another."""
    weights = tensor.importance
    if weights is not None and weights.ndim == 2:
        weights = weights[row * len(weights) // tensor.num_rows]
    return None if weights is None or not weights.any() else weights / weights.mean(dtype=np.float64)


def _tallest(x: np.ndarray, block: int) -> np.ndarray:
    """Return the largest size of a number in each block, (rows, blocks); NaN if there is one."""
    sizes = np.abs(x).ravel()
    while block > 1:  # a power of two; neighbours in one long loop: six times as fast as a maximum over short axes
        sizes, block = np.maximum(sizes[::2], sizes[1::2]), block // 2
    return sizes.reshape(len(x), -1)


def _refuse(found: GgufTensor, row: int, block: int, off: float, allowed: float) -> None:
    raise CheckpointError(
        f"{found.file}: {found.name} of type {found.kind} is off by {off:.3g} in row {row}, block {block}, of which "
        f"its type explains {allowed:.3g}; {REMEDY}"
    )
