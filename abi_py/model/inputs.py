"""What comes into a model, checked once, here: ids, labels, and who sees whom."""

import math
from typing import Protocol

import numpy as np
import numpy.typing as npt

from ..errors import DataError
from ..shape import IGNORE_INDEX

__all__ = ["Limits", "as_ids", "as_labels", "as_weights", "check_ids", "check_numbers", "segment_starts"]


class Limits(Protocol):
    """What ids must fit: the shape of a model, or its embedding."""

    @property
    def vocab_size(self) -> int:
        """Ids are below it."""

    @property
    def max_seq_len(self) -> int:
        """Rows are at most so long."""


def as_ids(ids: npt.ArrayLike, limits: Limits, name: str = "input_ids") -> np.ndarray:
    """Return ids as int32 (B, T); a flat array is one sequence, or rows of max_seq_len."""
    array = np.asarray(ids)
    if array.dtype.kind not in "iu":
        raise TypeError(f"{name} has dtype {array.dtype}; token ids are integers")
    longest = limits.max_seq_len
    if array.ndim == 1:
        if array.size > longest and array.size % longest:
            raise DataError(
                f"{name} is flat with {array.size} ids, neither at most nor a multiple of max_seq_len ({longest}); "
                "reshape it to (batch, time)"
            )
        array = array.reshape(-1, min(max(array.size, 1), longest))
    if array.ndim != 2 or 0 in array.shape:
        raise DataError(f"{name} has shape {np.shape(ids)}; it must be (batch, time) with at least one id")
    if array.shape[1] > longest:
        raise DataError(
            f"{name} has {array.shape[1]} ids in a row, but max_seq_len is {longest}; cut the rows, or build the "
            "model with a larger max_seq_len"
        )
    if array.dtype == np.uint32:
        return np.ascontiguousarray(array).view(np.int32)  # an id >= 2^31 becomes negative and is refused below
    if array.dtype.itemsize > 4:
        clipped = np.clip(array, -(2**31), 2**31 - 1)  # too large stays too large
        return np.ascontiguousarray(clipped, np.int32)
    return np.ascontiguousarray(array, np.int32)


def check_ids(ids: np.ndarray, given: npt.ArrayLike, limits: Limits) -> None:
    """Raise DataError for an id outside the vocabulary; `given` is what the caller wrote."""
    if ids.view(np.uint32).max() >= limits.vocab_size:  # negative ones are large as uint32
        row, column = np.argwhere((ids < 0) | (ids >= limits.vocab_size))[0]
        found = np.asarray(given).reshape(ids.shape)[row, column]  # as the caller wrote it, not as int32
        raise DataError(
            f"input_ids[{row}, {column}] is {found}; ids must be 0 ... {limits.vocab_size - 1} "
            "(vocab_size - 1); tokenize with this model's vocabulary"
        )


def as_labels(labels: npt.ArrayLike, shape: tuple[int, ...], limits: Limits) -> np.ndarray:
    """Return labels as int32 (B, T); DataError for another shape or a label that is neither an id nor IGNORE_INDEX."""
    array = as_ids(labels, limits, "labels")
    if array.shape != shape:
        raise DataError(f"labels have shape {np.shape(labels)}, input_ids {shape}; there is one label for each id")
    if array.max() >= limits.vocab_size or array.min() < 0:
        wrong = ((array < 0) & (array != IGNORE_INDEX)) | (array >= limits.vocab_size)
        if wrong.any():
            row, column = np.argwhere(wrong)[0]
            raise DataError(
                f"labels[{row}, {column}] is {np.asarray(labels).reshape(shape)[row, column]}; labels must be "
                f"0 ... {limits.vocab_size - 1}, or {IGNORE_INDEX} where none counts"
            )
    return array


def as_weights(weights: npt.ArrayLike, shape: tuple[int, ...]) -> np.ndarray:
    """Return weights of labels as float32 (B, T); DataError for another shape or a number that is not finite."""
    array = np.asarray(weights, np.float32)
    if array.shape != shape and array.shape != (int(np.prod(shape)),):
        raise DataError(f"label_weights have shape {array.shape}, input_ids {shape}; each label has one weight")
    array = np.ascontiguousarray(array.reshape(shape))
    if not np.isfinite(array).all():
        row, column = np.argwhere(~np.isfinite(array))[0]
        raise DataError(f"label_weights[{row}, {column}] is {array[row, column]}; a weight must be a finite number")
    return array


def check_numbers(reduction: str, label_smoothing: float, z_loss: float, loss_scale: float) -> None:
    """Raise ValueError for numbers of a loss that are outside their ranges."""
    if reduction not in ("mean", "sum"):
        raise ValueError(f"reduction ({reduction}) must be mean or sum")
    if not 0 <= label_smoothing < 1:
        raise ValueError(f"label_smoothing ({label_smoothing}) must be at least 0 and below 1; try 0.1")
    if not 0 <= z_loss < math.inf:
        raise ValueError(f"z_loss ({z_loss}) must be zero or more; try 1e-4")
    if not 0 < loss_scale < math.inf:
        raise ValueError(f"loss_scale ({loss_scale}) must be a positive number; 1 leaves the gradients as they are")


def segment_starts(
    shape: tuple[int, int], attention_mask: npt.ArrayLike | None = None, segment_ids: npt.ArrayLike | None = None
) -> np.ndarray:
    """Return (B, T) int32: where in its row each token's segment began; a run of equal ids (or mask values) is one.

    DataError for marks of another shape than the ids, (B, T) or flat.
    """
    batch, time = shape
    change = np.zeros(shape, bool)
    for name, marks in (("attention_mask", attention_mask), ("segment_ids", segment_ids)):
        if marks is None:
            continue
        array = np.asarray(marks)
        if array.shape not in (shape, (batch * time,)):
            raise DataError(f"{name} has shape {array.shape}, input_ids {shape}; there is one for each id")
        array = array.reshape(shape)
        change[:, 1:] |= array[:, 1:] != array[:, :-1]
    return np.maximum.accumulate(np.where(change, np.arange(time, dtype=np.int32), 0), axis=1).astype(np.int32)
