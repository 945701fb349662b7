"""Where arrays begin, and scratch: those that kernels need between calls, which belong to the Python thread that calls.

    aligned_empty, aligned_zeros   arrays that begin at a cache line
    scratch(name, *shapes)         float32 arrays of these shapes, with anything in them

NumPy's own arrays begin at a multiple of 16 bytes.  A tile of C or a panel that begins inside a cache line has every
load and store of a 64-byte vector in two lines.  So whatever products read or write, from weights to scratch, is made
here; rows begin at a line as well where their width is a multiple of 16 floats.

The memory of scratch is made when a name is first asked for in a thread, made again when more is needed, and kept: a
training step allocates nothing.  It is the only state that the kernels have, and no result depends on it: who asks
writes before reading, and finds other numbers at the next call.  Two names never share memory, nor do two threads
(docs/decisions.md).
"""

import math
import threading
from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = ["LINE_BYTES", "aligned_empty", "aligned_zeros", "scratch", "whole_lines"]

LINE_BYTES = 64  # of a cache line on x86-64, and of a 512-bit vector
LINE = LINE_BYTES // 4  # floats of one, at which each array of a name's scratch begins
KEPT = 4  # shapes of a name: attention asks for two of them in turn

Shape = tuple[int, ...]


def whole_lines(floats: int) -> int:
    """Return so many floats, rounded up to whole cache lines."""
    return -(-floats // LINE) * LINE


def aligned_empty(shape: int | Shape, dtype: npt.DTypeLike = np.float32) -> np.ndarray:
    """Return a C-contiguous array that begins at a cache line, with undefined contents."""
    return _aligned(np.empty, shape, np.dtype(dtype))


def aligned_zeros(shape: int | Shape, dtype: npt.DTypeLike = np.float32) -> np.ndarray:
    """Return a C-contiguous array that begins at a cache line, of zeros; a large one takes no memory until written."""
    return _aligned(np.zeros, shape, np.dtype(dtype))


def _aligned(make: Any, shape: int | Shape, dtype: np.dtype) -> np.ndarray:
    size = math.prod(shape) if isinstance(shape, tuple) else shape
    memory = make(size * dtype.itemsize + LINE_BYTES, np.uint8)
    start = -memory.ctypes.data % LINE_BYTES
    return memory[start : start + size * dtype.itemsize].view(dtype).reshape(shape)


class _OfThread(threading.local):
    """What a Python thread has been given so far, by name: memory, and arrays in it by their shapes."""

    def __init__(self) -> None:
        self.memory: dict[str, np.ndarray] = {}
        self.arrays: dict[str, dict[tuple[Shape, ...], tuple[np.ndarray, ...]]] = {}


_mine = _OfThread()


def scratch(name: str, *shapes: Shape) -> tuple[np.ndarray, ...]:
    """Return the calling thread's arrays of a name: C-contiguous float32 of these shapes, with undefined contents."""
    made = _mine.arrays.get(name)
    if made is None:
        made = _mine.arrays[name] = {}
    found = made.get(shapes)
    if found is not None:
        return found
    sizes = [math.prod(shape) for shape in shapes]
    starts = [0]
    for size in sizes:
        starts.append(starts[-1] + whole_lines(size))
    memory = _mine.memory.get(name)
    if memory is None or memory.size < starts[-1]:
        memory = _mine.memory[name] = aligned_empty(starts[-1])
        made.clear()
    if len(made) == KEPT:  # generation asks for other shapes as a sequence grows
        made.clear()
    arrays = tuple(memory[at : at + size].reshape(shape) for at, size, shape in zip(starts, sizes, shapes))
    made[shapes] = arrays
    return arrays
