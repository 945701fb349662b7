"""Scratch: the arrays that kernels need between calls, which belong to the Python thread that calls.

    scratch(name, *shape)       a float32 array of this shape, with anything in it

An array is made when its name is first asked for in a thread, made again when a larger one is needed, and kept: a
training step allocates nothing.  It is the only state that the kernels have, and no result depends on it: whoever asks
writes before reading, and finds other numbers at the next call.  Two threads never share an array
(docs/decisions.md).
"""

import math
import threading

import numpy as np

__all__ = ["scratch"]


class _OfThread(threading.local):
    """What a Python thread has been given so far, by name: memory, and the last array over it."""

    def __init__(self) -> None:
        self.memory: dict[str, np.ndarray] = {}
        self.arrays: dict[str, np.ndarray] = {}


_mine = _OfThread()


def scratch(name: str, *shape: int) -> np.ndarray:
    """Return the calling thread's array of this name: C-contiguous float32 of this shape, with undefined contents."""
    array = _mine.arrays.get(name)
    if array is not None and array.shape == shape:
        return array
    size = math.prod(shape)
    memory = _mine.memory.get(name)
    if memory is None or memory.size < size:
        memory = _mine.memory[name] = np.empty(size, np.float32)
    array = _mine.arrays[name] = memory[:size].reshape(shape)
    return array
