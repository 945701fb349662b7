"""Calls: what becomes of Python's call of a kernel, so that it can be noted and made again without Python.

    Kernel      a compiled function that Python calls
    noted       a block in which this thread's calls are listed besides being made
    words_of    the arguments of a call as Numba's compiled code takes them: one number of 64 bits for each

Numba's compiled code takes an array as its parts.  Of these the first two, which tell who owns the memory, may be
zero: then the caller sees to it that the memory stays.
"""

import inspect
import struct
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from numba import types

__all__ = ["Call", "Kernel", "NotNumbers", "noted", "words_of"]


class NotNumbers(Exception):
    """An argument is none of what `words_of` knows."""


@dataclass(frozen=True)
class Call:
    """A call that was made; the arrays that it names live as long as it does."""

    kernel: "Kernel"
    arguments: tuple[Any, ...]

    def again(self) -> None:
        """Make it once more, as Python does."""
        self.kernel.function(*self.arguments)


class _OfThread(threading.local):
    """Where the calls of a Python thread are listed."""

    notes: list[Any] | None = None


_mine = _OfThread()


class Kernel:
    """A function as Python calls it; `compiled` is Numba's, and `function` that one or what takes turns with it."""

    def __init__(self, compiled: Any, function: Any) -> None:
        """Look like what was compiled."""
        self.compiled, self.function, self.__wrapped__ = compiled, function, compiled.py_func
        for name in ("__name__", "__qualname__", "__module__", "__doc__"):
            setattr(self, name, getattr(compiled.py_func, name))

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        """Call it, and list the call where calls are noted."""
        if named:
            arguments = inspect.signature(self.compiled.py_func).bind(*arguments, **named).args
        notes = _mine.notes
        if notes is not None:
            notes.append(Call(self, arguments))
        return self.function(*arguments)

    def __getattr__(self, name: str) -> Any:
        if name == "compiled":  # not yet: while it is copied
            raise AttributeError(name)
        return getattr(self.compiled, name)

    def __reduce__(self) -> str:
        """Copy and pickle it by its name, as Python's functions."""
        return str(self.__qualname__)  # type: ignore[attr-defined]


@contextmanager
def noted(notes: list[Any] | None) -> Iterator[list[Any] | None]:
    """Append the calls of this thread to `notes`; None: to nothing.  Yields the list of the block around this one."""
    before, _mine.notes = _mine.notes, notes
    try:
        yield before
    finally:
        _mine.notes = before


def words_of(kind: types.Type, value: Any) -> list[int]:
    """Return an argument of a Numba type as whole numbers below 2^64 and from -2^63 on."""
    if isinstance(kind, types.Array):
        return [0, 0, value.size, value.itemsize, value.ctypes.data, *value.shape, *value.strides]
    if isinstance(kind, types.Boolean | types.Integer):
        return [int(value)]
    if isinstance(kind, types.Float) and kind.bitwidth in (32, 64):
        form = "<d" if kind.bitwidth == 64 else "<f"
        return [int.from_bytes(struct.pack(form, value), "little")]
    if isinstance(kind, types.BaseTuple):
        kinds: Any = kind  # one for each part
        return [word for each, part in zip(kinds, value, strict=True) for word in words_of(each, part)]
    raise NotNumbers(f"{kind} is no array, number or tuple of them")
