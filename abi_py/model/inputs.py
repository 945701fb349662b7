"""What comes into a model, checked once, here: ids, labels, and who sees whom."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from ..config import IGNORE_INDEX, TrainableModelConfig
from ..errors import DataError
from ..kernels.engine.number_formats import BFLOAT16, FLOAT32
from ..kernels.rope import rope_table

__all__ = ["Layout", "Layouts", "as_ids", "as_labels", "check_ids", "segment_starts"]


def as_ids(ids: npt.ArrayLike, config: TrainableModelConfig, name: str = "input_ids") -> np.ndarray:
    """Return ids as int32 (B, T); a flat array is one sequence, or rows of max_seq_len."""
    array = np.asarray(ids)
    if array.dtype.kind not in "iu":
        raise TypeError(f"{name} has dtype {array.dtype}; token ids are integers")
    longest = config.max_seq_len
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


def check_ids(ids: np.ndarray, given: npt.ArrayLike, config: TrainableModelConfig) -> None:
    """Raise DataError for an id outside the vocabulary; `given` is what the caller wrote."""
    if ids.view(np.uint32).max() >= config.vocab_size:  # negative ones are large as uint32
        row, column = np.argwhere((ids < 0) | (ids >= config.vocab_size))[0]
        found = np.asarray(given).reshape(ids.shape)[row, column]  # as the caller wrote it, not as int32
        raise DataError(
            f"input_ids[{row}, {column}] is {found}; ids must be 0 ... {config.vocab_size - 1} "
            "(vocab_size - 1); tokenize with this model's vocabulary"
        )


def as_labels(labels: npt.ArrayLike, shape: tuple[int, ...], config: TrainableModelConfig) -> np.ndarray:
    """Return labels as int32 (B, T); DataError for another shape or a label that is neither an id nor IGNORE_INDEX."""
    array = as_ids(labels, config, "labels")
    if array.shape != shape:
        raise DataError(f"labels have shape {np.shape(labels)}, input_ids {shape}; there is one label for each id")
    if array.max() >= config.vocab_size or array.min() < 0:
        wrong = ((array < 0) & (array != IGNORE_INDEX)) | (array >= config.vocab_size)
        if wrong.any():
            row, column = np.argwhere(wrong)[0]
            raise DataError(
                f"labels[{row}, {column}] is {np.asarray(labels).reshape(shape)[row, column]}; labels must be "
                f"0 ... {config.vocab_size - 1}, or {IGNORE_INDEX} where none counts"
            )
    return array


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


@dataclass(frozen=True)
class Layout:
    """What kernels need to know about the rows of a batch: N = batch * T."""

    batch: int
    starts: np.ndarray  # (N,) int32: first position of its sample that a row sees
    positions: np.ndarray  # (N,) int32: position of a row within its segment
    cos: np.ndarray  # (at least T, D/2)
    sin: np.ndarray
    number_format: Any = FLOAT32  # what the products of linear layers multiply: of kernels/engine/number_formats.py
    draw: int | None = None  # number of the training pass, which decides the masks of dropout; None: nothing is dropped

    @property
    def narrow(self) -> bool:
        """Say whether activations are saved in bfloat16."""
        return self.number_format is BFLOAT16


class Angles:
    """RoPE's table, as long as was needed so far: a context of a million tokens costs nothing until it is used."""

    def __init__(self, config: TrainableModelConfig) -> None:
        """Begin with an empty table."""
        self._config = config
        self._table: tuple[np.ndarray, np.ndarray] = rope_table(0, config.resolved_head_dim, config.rope_theta)

    def upto(self, length: int) -> tuple[np.ndarray, np.ndarray]:
        """Return cos and sin, (at least `length`, D/2) float32; a row's bits do not depend on the table's length."""
        if len(self._table[0]) < length:
            c = self._config
            grown = min(max(2 * len(self._table[0]), length), c.max_seq_len)
            self._table = rope_table(grown, c.resolved_head_dim, c.rope_theta)
        return self._table


class Layouts:
    """The layouts of a model's batches; those without marks are made once for each shape."""

    def __init__(self, config: TrainableModelConfig) -> None:
        """Begin without any."""
        self._angles = Angles(config)
        self._plain: dict[tuple[int, int], Layout] = {}

    def layout(
        self, shape: tuple[int, int], attention_mask: npt.ArrayLike | None, segment_ids: npt.ArrayLike | None
    ) -> Layout:
        """Return starts and positions of all rows; a run of equal segment ids (or mask values) is a segment."""
        plain = attention_mask is None and segment_ids is None
        if plain and shape in self._plain:
            return self._plain[shape]
        starts = segment_starts(shape, attention_mask, segment_ids)
        positions = np.arange(shape[1], dtype=np.int32) - starts
        layout = Layout(shape[0], starts.ravel(), positions.ravel(), *self._angles.upto(shape[1]))
        if plain:
            self._plain[shape] = layout
        return layout
