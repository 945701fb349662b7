"""What an object says of itself at a prompt and in a notebook: a line or a few, never its arrays, and never an error.

    class Batch(Shown): ...            Batch(input_ids=uint32 (2, 16), labels=uint32 (2, 16))

Without more, a class shows its public attributes, of a dataclass the fields that do not have their defaults.  One that
has something better to say defines `_says`.
"""

import dataclasses
import reprlib
from collections.abc import Iterator, Sized
from enum import Enum
from typing import Any

import numpy as np

__all__ = ["Shown", "short"]

LONGEST = 120  # characters of a value
FEW = 6  # members of a collection that are shown


class Shown:
    """A class whose `repr` is made of `_says`."""

    def __init_subclass__(cls, **more: Any) -> None:
        """Keep `dataclass` from giving the class a `repr` of its own."""
        super().__init_subclass__(**more)
        if "__repr__" not in vars(cls):
            cls.__repr__ = Shown.__repr__  # type: ignore[method-assign]

    def __repr__(self) -> str:
        name = type(self).__name__
        try:
            return f"{name}({self._says()})"
        except Exception:  # half made: a debugger, or a traceback's reader, looks at it before `__init__` is through
            return f"<{name}, not complete>"

    def _says(self) -> str:
        return ", ".join(f"{name}={short(value)}" for name, value in _attributes(self))


def _attributes(it: Any) -> Iterator[tuple[str, Any]]:
    """Yield what is worth showing of an object."""
    if not dataclasses.is_dataclass(it):
        yield from ((name, value) for name, value in vars(it).items() if not name.startswith("_"))
        return
    for each in dataclasses.fields(it):
        value, default = getattr(it, each.name), each.default
        if each.default_factory is not dataclasses.MISSING:
            default = each.default_factory()
        if each.repr and (isinstance(value, np.ndarray) or (value is not default and value != default)):
            yield each.name, value


def short(value: Any) -> str:
    """Return a value in a few characters: of an array its type and shape, of a long collection how long it is."""
    if isinstance(value, np.ndarray):
        return f"{value.dtype} {value.shape}"
    if isinstance(value, Enum):
        return repr(value.value)
    if isinstance(value, float | np.floating):
        return f"{value:.6g}"
    plain = isinstance(value, Sized) and not isinstance(value, str | bytes | Shown)
    if plain and (len(value) > FEW or any(isinstance(each, np.ndarray) for each in value)):
        return f"{type(value).__name__} of {len(value):,}"
    if not isinstance(value, Shown) and type(value).__repr__ is object.__repr__:
        return type(value).__name__
    text = _short.repr(value) if isinstance(value, str | bytes) else repr(value)
    return text if len(text) <= LONGEST else f"{text[: LONGEST - 3]}..."


_short = reprlib.Repr()
_short.maxstring = LONGEST
