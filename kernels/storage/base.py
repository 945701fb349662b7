"""A storage: how the numbers of a matrix that is not trained are kept; nothing else knows its bytes.

    raw (M, items)    the matrix (M, K) as it is kept: a row is K / block blocks of bytes_per_block bytes, one after
                      the other, in items of `dtype`; maybe read-only, memory-mapped, with a stride between rows
    encode_ref        raw from float32, in NumPy
    decode_ref        float32 from raw, in NumPy: the definition
    decode_row        a row of raw to float32: a Numba helper, and all that a storage must write for kernels
                      that read
    encode_row        a row of float32 to raw, the bits of encode_ref; a storage without it is encoded in NumPy
    side              what rows share beside raw, of a storage that is one matrix's own (nf4.py), as kernels take it:
                      the number of the first row in the whole matrix, bytes, float32, a table; most share nothing
    decode_at         row i of raw, and what is shared, to float32: `decode_row`, unless something is

Numbers that are encoded are finite, and no larger than the storage can keep (`largest`); `encode` says which is not.

From `decode_row` follow strips of rows, the rows of an embedding, and products (`stored_matmul.py`), which decode a
strip at a time and never the whole matrix.  Where `read_by_products` is true they need not even do that: the packers
read raw as it is; where `read_by_streams` is, products of a few rows do.
"""

import functools
from collections.abc import Callable, Iterable
from typing import Any, NoReturn, TypeAlias

import numpy as np

from ..engine.jit import helper, kernel, prange
from ..engine.vectors import bits_of

__all__ = ["SIZE", "Side", "Storage", "read_only"]

Side: TypeAlias = tuple[int, np.ndarray, np.ndarray, np.ndarray]

SIZE = np.int32(0x7FFFFFFF)  # all bits of a float32 but its sign: they rise as its size does, and NaN is above infinity
LEAST_WEIGHT = np.float32(1e-6)  # of a column, where their mean is 1: one that never mattered still has numbers


def read_only(array: np.ndarray) -> np.ndarray:
    """Return the array, not copied, as kernels take what they only read: they are compiled once."""
    view = array.view()
    view.flags.writeable = False
    return view


NO_FLOATS = read_only(np.empty(0, np.float32))


class Storage:
    """How a matrix is kept; one object for each storage, by its name in `storage.STORAGES`."""

    name: str
    dtype: np.dtype  # of raw
    block = 1  # elements along a row that are kept together
    bytes_per_block: int
    largest = float(np.finfo(np.float32).max)  # the largest size of a number that is encoded
    exponent = 0  # of numbers of two bytes, the bits that are all set in NaN and infinity and in nothing else
    weighted = False  # whether an importance of columns changes what is kept
    side: Side = (0, read_only(np.empty(0, np.uint8)), NO_FLOATS, NO_FLOATS)
    read_by_products = False  # whether `matmul.product` takes raw as it is
    read_by_streams = False  # whether `streamed_product`, of at most STREAMED rows, does
    decode_row: Callable[..., None]  # Numba helper, static: decode_row(out (K,), raw (items,)), every element written
    encode_row: Callable[..., None] | None = None  # the same: encode_row(raw (items,), x (K,), importance (K,) or (0,))

    def __repr__(self) -> str:
        return self.name

    @functools.cached_property
    def decode_at(self) -> Callable[..., None]:
        """The Numba helper decode_at(out (K,), raw (M, items), i, *side)."""
        return _of_one_row(self.decode_row)

    @property
    def side_bytes(self) -> int:
        """The bytes of what a matrix's rows share, beside raw."""
        return 0

    def from_row(self, first: int) -> "Storage":
        """Return the storage of raw[first:], raw being what this one is of."""
        return self

    def nbytes(self, rows: int, columns: int) -> int:
        """Return the bytes that a matrix takes in it, with what its rows share; ValueError if blocks do not fit."""
        return rows * self.items(columns) * self.dtype.itemsize

    def encoded(self, x: np.ndarray, importance: np.ndarray | None = None) -> tuple[np.ndarray, "Storage"]:
        """Return raw of a whole matrix, float32 x (M, K), and the storage that decodes it; errors of `encode`."""
        return self.encoded_strips(x.shape, [x], importance)

    def encoded_strips(
        self, shape: tuple[int, int], strips: Iterable[np.ndarray], importance: np.ndarray | None = None
    ) -> tuple[np.ndarray, "Storage"]:
        """Return the same of strips of a matrix (M, K), each but the last of a multiple of 64 rows; one is in memory
        at a time, and may be the same array again."""
        raw, first = np.empty((shape[0], self.items(shape[1])), self.dtype), 0
        for strip in strips:
            self.encode(raw[first : first + len(strip)], strip, importance, first)
            first += len(strip)
        return raw, self

    def encoded_ref(self, x: np.ndarray) -> tuple[np.ndarray, "Storage"]:
        """Return the same in NumPy."""
        return self.encode_ref(x), self

    def encode_ref(self, x: np.ndarray, importance: np.ndarray | None = None) -> np.ndarray:
        """Return raw for float32 x (M, K): what is nearest to x, or to it in columns weighted by importance (K,).

        What `encode` refuses is not looked for; of a single number, NaN stays NaN and what is too large is infinite.
        """
        raise NotImplementedError

    def decode_ref(self, raw: np.ndarray) -> np.ndarray:
        """Return float32 (M, K)."""
        raise NotImplementedError

    def nonfinite_rows(self, raw: np.ndarray) -> np.ndarray:
        """Return which rows of raw keep NaN or infinity, (M,) bool."""
        if self.exponent:  # many times as fast as to widen them
            return (raw.view(np.uint16) & np.uint16(self.exponent) == self.exponent).any(1)
        with np.errstate(all="ignore"):
            return ~np.isfinite(self.decode_ref(raw)).all(1)

    def items(self, columns: int) -> int:
        """Return in how many items of raw a row of `columns` numbers is kept; ValueError if blocks do not fit."""
        if columns % self.block:
            raise ValueError(f"rows of {columns} numbers are no whole blocks; {self} keeps {self.block} in a block")
        return columns // self.block * self.bytes_per_block // self.dtype.itemsize

    def columns(self, raw: np.ndarray) -> int:
        """Return how many numbers a row of raw keeps."""
        return raw.shape[1] * self.dtype.itemsize // self.bytes_per_block * self.block

    def check(self, raw: np.ndarray, columns: int, name: str = "raw") -> None:
        """Raise TypeError or ValueError if raw, an argument's `name`, does not keep rows of `columns` numbers."""
        if raw.dtype != self.dtype:
            raise TypeError(f"{name} is {raw.dtype}; {self} is kept as {self.dtype}; name the storage that wrote it")
        if raw.ndim != 2 or raw.shape[1] != self.items(columns):
            items = self.items(columns)
            raise ValueError(f"{name} has shape {raw.shape}; {self} keeps rows of {columns} numbers as (M, {items})")

    def for_kernels(self, raw: np.ndarray) -> np.ndarray:
        """Return raw, not copied, as kernels take it: read-only, so that they are compiled once; float16 as int16."""
        return read_only(raw.view(np.int16 if self.dtype == np.float16 else self.dtype))

    def rows(self, out: np.ndarray, ids: np.ndarray, raw: np.ndarray) -> None:
        """Overwrite out (N, K) float32 with the rows `ids` (N,), each below M, of raw."""
        self._rows(out, ids, self.for_kernels(raw), *self.side)

    def encode(self, raw: np.ndarray, x: np.ndarray, importance: np.ndarray | None = None, first_row: int = 0) -> None:
        """Overwrite raw (M, items) with what keeps float32 x (M, K), on all threads.

        importance (K,), at least 0: how much the square of an error in a column counts, as against that in another;
        it changes what is kept where the storage is `weighted`.  `first_row` is what an error calls the first row of x.

        Raises TypeError for other dtypes, ValueError for other shapes, and for a number that is not finite or larger
        in size than `largest`: raw is then overwritten in part.
        """
        x = self.check_numbers(x)
        self.check(raw, x.shape[1])
        if len(raw) != len(x):
            raise ValueError(f"raw has {len(raw)} rows, x has {len(x)}; both must have as many")
        weights = self.weights(importance, x.shape[1])
        unfit = np.zeros(len(x), np.uint8)
        if self.encode_row is None:
            unfit[:] = (~(np.abs(x) <= self.largest)).any(1)
            raw[unfit == 0] = self.encode_ref(x[unfit == 0], weights)
        else:
            view = raw.view(np.int16) if self.dtype == np.float16 else raw
            largest = np.float32(self.largest).view(np.int32)
            self._encode(view, x, np.empty(0, np.float32) if weights is None else weights, largest, unfit)
        if unfit.any():
            self.refuse(x, int(unfit.argmax()), first_row)

    def refuse(self, x: np.ndarray, row: int, first_row: int = 0) -> NoReturn:
        """Raise the ValueError for a row of x that cannot be kept."""
        column = int(np.argmin(np.abs(x[row]) <= self.largest))
        raise ValueError(
            f"row {first_row + row}, column {column} is {x[row, column]:.9g}; {self} keeps finite numbers up to "
            f"{self.largest:g}; look for a weight that diverged, or keep the matrix as bf16 or float32"
        )

    def check_numbers(self, x: np.ndarray) -> np.ndarray:
        """Return x (M, K), read-only and not copied; TypeError unless it is float32 with rows in one piece."""
        if not isinstance(x, np.ndarray) or x.dtype != np.float32 or x.ndim != 2:
            kind = f"{x.dtype} of {x.ndim} axes" if isinstance(x, np.ndarray) else type(x).__name__
            raise TypeError(f"x is {kind}; {self} encodes float32 (M, K); use np.asarray(x, np.float32)")
        if x.size and x.shape[1] > 1 and x.strides[1] != 4:
            raise TypeError(f"the numbers of a row of x are {x.strides[1]} bytes apart; use np.ascontiguousarray(x)")
        return read_only(x)

    def weights(self, importance: np.ndarray | None, columns: int) -> np.ndarray | None:
        """Return importance (columns,) as float32 with a mean of 1 and none 0; None if nothing depends on it.

        A fit is by the weights of a few columns alone, so these may not all be 0, as they are in an expert that no
        text of a calibration reached; such columns then count alike.  ValueError for a shape or number that is wrong.
        """
        if importance is None:
            return None
        given = np.asarray(importance)
        if given.shape != (columns,):
            raise ValueError(f"importance has shape {given.shape}; rows have {columns} numbers: give it ({columns},)")
        if not (np.isfinite(given) & (given >= 0)).all():
            column = int(np.argmin(np.isfinite(given) & (given >= 0)))
            raise ValueError(f"importance[{column}] is {given[column]:g}; it must be finite and at least 0")
        if not self.weighted or not given.any():
            return None
        return np.maximum((given / given.mean(dtype=np.float64)).astype(np.float32), LEAST_WEIGHT)

    def decode(self, out: np.ndarray, raw: np.ndarray, first_row: int) -> None:
        """Overwrite out (r, K) float32 with the rows from `first_row` on."""
        self.rows(out, np.arange(first_row, first_row + len(out)), raw)

    @functools.cached_property
    def _encode(self) -> Any:
        return _encode_kernel(self.encode_row)

    @property
    def _rows(self) -> Any:
        return _rows_kernel(self.decode_at)


@helper
def _fits(x, largest):
    """Say whether all of x are at most `largest` in size, as the bits of a float32: NaN and infinity are above."""
    above = np.int32(0)
    for k in range(x.size):
        above |= np.int32(bits_of(x[k]) & SIZE > largest)
    return above == 0


def _encode_kernel(encode_row: Callable[..., None] | None) -> Any:
    @kernel
    def encode(raw, x, importance, largest, unfit):
        for i in prange(len(x)):
            if _fits(x[i], largest):
                encode_row(raw[i], x[i], importance)
            else:
                unfit[i] = 1

    return encode


@functools.cache
def _rows_kernel(decode_at: Callable[..., None]) -> Any:
    @kernel
    def rows(out, ids, raw, first, small, wide, table):
        for n in prange(ids.size):
            decode_at(out[n], raw, ids[n], first, small, wide, table)

    return rows


@functools.cache
def _of_one_row(decode_row: Callable[..., None]) -> Callable[..., None]:
    @helper
    def decode_at(out, raw, i, first, small, wide, table):
        decode_row(out, raw[i])

    return decode_at
