"""A storage: how the numbers of a matrix that is not trained are kept; nothing else knows its bytes.

    raw (M, items)    the matrix (M, K) as it is kept: a row is K / block blocks of bytes_per_block bytes, one after
                      the other, in items of `dtype`; maybe read-only, memory-mapped, with a stride between rows
    encode_ref        raw from float32, in NumPy
    decode_ref        float32 from raw, in NumPy: the definition
    decode_row        a row of raw to float32: a Numba helper, and all that a storage must write for kernels
                      that read
    encode_row        a row of float32 to raw

From `decode_row` follow strips of rows, the rows of an embedding, and products (`stored_matmul.py`), which decode a
strip at a time and never the whole matrix.  Where `read_by_products` is true they need not even do that: the packers
read raw as it is.
"""

import functools
from collections.abc import Callable
from typing import Any

import numpy as np

from ..engine.jit import kernel, prange

__all__ = ["Storage"]


class Storage:
    """How a matrix is kept; one object for each storage, by its name in `storage.STORAGES`."""

    name: str
    dtype: np.dtype  # of raw
    block = 1  # elements along a row that are kept together
    bytes_per_block: int
    read_by_products = False  # whether `matmul.product` takes raw as it is
    decode_row: Callable[..., None]  # Numba helper, static: decode_row(out (K,), raw (items,)), every element written
    encode_row: Callable[..., None]  # the same: encode_row(raw (items,), x (K,), importance (K,) or (0,)), all finite

    def __repr__(self) -> str:
        return self.name

    def encode_ref(self, x: np.ndarray, importance: np.ndarray | None = None) -> np.ndarray:
        """Return raw for float32 x (M, K): what is nearest to x, or to it in columns weighted by importance (K,)."""
        raise NotImplementedError

    def decode_ref(self, raw: np.ndarray) -> np.ndarray:
        """Return float32 (M, K)."""
        raise NotImplementedError

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
        view = raw.view(np.int16 if self.dtype == np.float16 else self.dtype)
        view.flags.writeable = False
        return view

    def rows(self, out: np.ndarray, ids: np.ndarray, raw: np.ndarray) -> None:
        """Overwrite out (N, K) float32 with the rows `ids` (N,), each below M, of raw."""
        self._rows(out, ids, self.for_kernels(raw))

    def encode(self, raw: np.ndarray, x: np.ndarray, importance: np.ndarray | None = None) -> None:
        """Overwrite raw (M, items) with what keeps float32 x (M, K); all of x is finite.

        importance (K,) float32, at least 0: how much an error in a column counts; single numbers ignore it.
        """
        view = raw.view(np.int16) if self.dtype == np.float16 else raw
        self._encode(view, x, np.empty(0, np.float32) if importance is None else importance)

    def decode(self, out: np.ndarray, raw: np.ndarray, first_row: int) -> None:
        """Overwrite out (r, K) float32 with the rows from `first_row` on."""
        self.rows(out, np.arange(first_row, first_row + len(out)), raw)

    @functools.cached_property
    def _encode(self) -> Any:
        return _encode_kernel(self.encode_row)

    @functools.cached_property
    def _rows(self) -> Any:
        return _rows_kernel(self.decode_row)


def _encode_kernel(encode_row: Callable[..., None]) -> Any:
    @kernel
    def encode(raw, x, importance):
        for i in prange(len(x)):
            encode_row(raw[i], x[i], importance)

    return encode


def _rows_kernel(decode_row: Callable[..., None]) -> Any:
    @kernel
    def rows(out, ids, raw):
        for n in prange(ids.size):
            decode_row(out[n], raw[ids[n]])

    return rows
