"""Scratch: the arrays that kernels need between calls, which belong to the Python thread that calls.

    scratch(name, *shapes)       float32 arrays of these shapes, with anything in them

Their memory is made when a name is first asked for in a thread, made again when more is needed, and kept: a training
step allocates nothing.  It is the only state that the kernels have, and no result depends on it: who asks writes before
reading, and finds other numbers at the next call.  Two names never share memory, nor do two threads
(docs/decisions.md).
"""

import math
import threading

import numpy as np

__all__ = ["scratch"]

KEPT = 4  # shapes of a name: attention asks for two of them in turn
LINE = 16  # floats of a cache line, at which each array begins if the first one does

Shape = tuple[int, ...]


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
        starts.append(starts[-1] + -(-size // LINE) * LINE)
    memory = _mine.memory.get(name)
    if memory is None or memory.size < starts[-1]:
        memory = _mine.memory[name] = np.empty(starts[-1], np.float32)
        made.clear()
    if len(made) == KEPT:  # generation asks for other shapes as a sequence grows
        made.clear()
    arrays = tuple(memory[at : at + size].reshape(shape) for at, size, shape in zip(starts, sizes, shapes))
    made[shapes] = arrays
    return arrays
