"""How much an error in each column of a matrix counts, from llama.cpp's importance file ("imatrix") in GGUF's form.

    NAME.in_sum2   (G, K)   sums of the squares of the inputs of the matrix NAME, of each of G experts, or of all
    NAME.counts    (G, 1)   over how many of them

The importance of a column is the mean square of what is multiplied by it.  From `imatrix.cpp` and `quantize.cpp` of
llama.cpp; an expert that no text reached counts alike everywhere.  The form before GGUF is told by what it is not.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ...errors import CheckpointError, counted, listed
from .container import GgufFile, GgufTensor, open_gguf

__all__ = ["Importance", "read_importance"]

SUMS, COUNTS = ".in_sum2", ".counts"
HEAD = "output.weight"  # an imatrix may have it where the head is the embedding
REMEDY = "make it from this model with llama-imatrix"


@dataclass(frozen=True)
class Importance:
    """What a file says: `columns` by name, (K,) or (E, K) float32; from which texts, and how many pieces of them."""

    path: Path
    columns: Mapping[str, np.ndarray]
    datasets: tuple[str, ...]
    chunks: int

    def check(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Raise CheckpointError if it is of another model than that with tensors of these shapes."""
        unknown = sorted(name for name in self.columns if name not in shapes and name != HEAD)
        if unknown:
            raise CheckpointError(
                f"{self.path} has the importance of {listed(unknown, 3)}, which the model lacks: it is of another; "
                f"{REMEDY}"
            )
        for name, weights in self.columns.items():
            if name in shapes and weights.shape not in _fitting(shapes[name]):
                raise CheckpointError(
                    f"{self.path}: the importance of {name} has shape {weights.shape}, but the tensor {shapes[name]}: "
                    f"it is of another model; {REMEDY}"
                )


def _fitting(shape: tuple[int, ...]) -> tuple[tuple[int, ...], ...]:
    return (shape[-1:], (shape[0], shape[-1])) if len(shape) > 2 else (shape[-1:],)


def read_importance(path: str | Path) -> Importance:
    """Return what a file of importance says; CheckpointError if it is none, or says nonsense.  OSError passes."""
    file = open_gguf(path)
    kind = file.get("general.type", str, "")
    if kind != "imatrix":
        what = f"general.type is {kind!r}" if kind else "there is no general.type"
        raise CheckpointError(f"{file.path} is no importance file ({what}, not 'imatrix'); {REMEDY}")
    columns = {}
    for name in file.tensors:
        if not name.endswith(SUMS):
            if not name.endswith(COUNTS) or name.removesuffix(COUNTS) + SUMS not in file.tensors:
                raise CheckpointError(f"{file.path}: {name} is neither a sum nor the count of one; {REMEDY}")
            continue
        base = name.removesuffix(SUMS)
        sums = _numbers(file, file.tensors[name])
        if base + COUNTS not in file.tensors:
            raise CheckpointError(f"{file.path}: {base}{COUNTS} is missing; {REMEDY}")
        counts = _numbers(file, file.tensors[base + COUNTS]).reshape(-1, 1)
        if len(counts) != len(sums):
            raise CheckpointError(
                f"{file.path}: {name} has {counted(len(sums), 'row')} and {base}{COUNTS} {len(counts)}, which must be "
                f"as many; {REMEDY}"
            )
        mean = np.where(counts > 0, sums / np.where(counts > 0, counts, 1), 1).astype(np.float32)
        columns[base] = mean[0] if len(mean) == 1 else mean
    if not columns:
        raise CheckpointError(f"{file.path} has the importance of no tensor; {REMEDY}")
    datasets = tuple(file.get("imatrix.datasets", list[str], []))
    return Importance(file.path, columns, datasets, file.get("imatrix.chunk_count", int, 0))


def _numbers(file: GgufFile, tensor: GgufTensor) -> np.ndarray:
    """Return the numbers of a tensor (rows, K); CheckpointError unless they are float32, finite and at least 0."""
    if tensor.kind.name != "F32" or len(tensor.shape) > 2:
        raise CheckpointError(f"{file.path}: {tensor.name} is {tensor.kind} {tensor.shape}; it must be F32 (G, K)")
    numbers = tensor.raw
    fine = np.isfinite(numbers) & (numbers >= 0)
    if not fine.all():
        row, column = np.argwhere(~fine)[0]
        place, rule = f"{tensor.name}[{row}, {column}]", "it must be finite and at least 0"
        raise CheckpointError(f"{file.path}: {place} is {numbers[row, column]:g}; {rule}; {REMEDY}")
    return numbers
