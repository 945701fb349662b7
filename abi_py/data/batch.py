"""A batch: ids that go into the model, and labels that should come out; the types that all of `data/` speaks of."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ..config import IGNORE_INDEX
from ..errors import ConfigError, DataError
from ..reprs import Shown

__all__ = [
    "IGNORE_INDEX",
    "IGNORE_LABEL",
    "Batch",
    "TokenArray",
    "as_tokens",
    "check_integer",
    "labels_of",
    "trained_of",
]

IGNORE_LABEL = np.uint32(IGNORE_INDEX & 0xFFFFFFFF)  # 0xFFFFFF9C: the same 32 bits in a uint32 array

TokenArray = npt.NDArray[np.uint32]


def check_integer(name: str, value: int, least: int, below: int = 1 << 63) -> int:
    """Return `value` as a plain int; TypeError if it is no integer, ConfigError if not in least <= value < below."""
    if isinstance(value, (bool, np.bool_)) or not isinstance(value, (int, np.integer)):
        raise TypeError(f"{name} must be an integer, got {value!r} ({type(value).__name__})")
    if not least <= value < below:
        rule = f"at least {least}" if value < least else f"below {below}"
        raise ConfigError(f"{name} ({value}) must be {rule}")
    return int(value)


def as_tokens(tokens: npt.ArrayLike, name: str = "tokens") -> TokenArray:
    """Return token ids as a 1-D uint32 array, without a copy if they are one.

    TypeError for anything but integers in one dimension; DataError naming the first id that does not fit in 32 bits.
    """
    array = np.asarray(tokens)
    if array.ndim != 1 or (array.dtype.kind not in "iu" and array.size):
        raise TypeError(f"{name} must be one-dimensional and of integers, got shape {array.shape}, dtype {array.dtype}")
    if array.dtype == np.uint32:
        return array
    outside = (array < 0) | (array > 0xFFFFFFFF)
    if outside.any():
        at = int(np.argmax(outside))
        raise DataError(f"{name}: id {array[at]} at offset {at} is not in 0 .. 4294967295, the range of a u32 token id")
    return array.astype(np.uint32)


def labels_of(ids: TokenArray, trained: npt.NDArray[np.bool_] | None = None) -> TokenArray:
    """Return labels (n,): the id that follows each position if it is trained, else IGNORE_LABEL; the last has none.

    trained  which ids (n,) are trained; None: all
    """
    labels = np.full(len(ids), IGNORE_LABEL, np.uint32)
    labels[:-1] = ids[1:] if trained is None else np.where(trained[1:], ids[1:], IGNORE_LABEL)
    return labels


def trained_of(labels: TokenArray) -> npt.NDArray[np.bool_]:
    """Return which tokens (n,) are trained: the inverse of `labels_of`."""
    trained = np.zeros(len(labels), np.bool_)
    trained[1:] = labels[:-1] != IGNORE_LABEL
    return trained


@dataclass(frozen=True, eq=False)
class Batch(Shown):
    """B rows of T positions: what goes into the model, and what should come out.

    input_ids       (B, T) uint32
    labels          (B, T) uint32: the id that follows each position, or IGNORE_LABEL where none is trained
    attention_mask  (B, T) uint8: 1 at a token, 0 at padding; None means no padding
    segment_ids     (B, T) int32: positions attend only to equal numbers, padding is -1; None: a row is one sequence

    The arrays are the batch's own; no later batch writes into them.  TypeError for another shape or dtype.
    """

    input_ids: TokenArray
    labels: TokenArray
    attention_mask: npt.NDArray[np.uint8] | None = None
    segment_ids: npt.NDArray[np.int32] | None = None

    def __post_init__(self) -> None:
        wanted = {"input_ids": np.uint32, "labels": np.uint32, "attention_mask": np.uint8, "segment_ids": np.int32}
        for name, dtype in wanted.items():
            array = getattr(self, name)
            if array is None and name in ("attention_mask", "segment_ids"):
                continue
            if array.ndim != 2 or array.shape != self.input_ids.shape or array.dtype != dtype:
                raise TypeError(
                    f"{name} must be (B, T) = {self.input_ids.shape} of {dtype.__name__}, "
                    f"got {array.shape} of {array.dtype}"
                )

    def _says(self) -> str:
        extra = [name for name in ("attention_mask", "segment_ids") if getattr(self, name) is not None]
        more = f", with {' and '.join(extra)}" if extra else ""
        return f"{self.batch_size} x {self.seq_len} ids, {self.num_tokens:,} trained{more}"

    @property
    def batch_size(self) -> int:
        return int(self.input_ids.shape[0])

    @property
    def seq_len(self) -> int:
        return int(self.input_ids.shape[1])

    @property
    def num_tokens(self) -> int:
        """Number of labels that are trained."""
        return int(np.count_nonzero(self.labels != IGNORE_LABEL))
