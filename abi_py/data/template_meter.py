"""The steps that a rendering has: what can be long is paid for here before it is done (`template_sandbox.py`)."""

from collections.abc import Iterator, Mapping
from contextvars import ContextVar
from typing import Any

import jinja2.utils

__all__ = ["CHARACTERS", "METER", "Meter", "StepsExceeded", "check_number"]

STEPS = 500_000  # of a rendering without a conversation
STEPS_EACH = 4_000  # more for each element, and each 16 characters, of the conversation: loops in loops over it
CHARACTERS = 16  # in a step
LONGEST_NUMBER = 1 << 16  # bits

_VIEWS: Any = (list, tuple, set, frozenset, type({}.keys()), type({}.values()), type({}.items()))
_TEXT = (str, bytes)


class StepsExceeded(Exception):
    """A template takes more steps than its conversation explains."""


def check_number(bits: int) -> None:
    if bits > LONGEST_NUMBER:
        raise StepsExceeded


class Meter:
    """The steps that a rendering has left."""

    def __init__(self, values: Mapping[str, Any]) -> None:
        """Give as many steps as the values explain."""
        self._known: dict[int, int] = {}  # what containers of the conversation weigh: they live as long as this
        self.left = STEPS + STEPS_EACH * sum(self._measure(value) for value in values.values())

    def _measure(self, value: Any) -> int:
        if isinstance(value, str):
            return 1 + len(value) // CHARACTERS
        if not isinstance(value, dict | list | tuple):
            return 1
        weight = 1
        for part in (*value, *value.values()) if isinstance(value, dict) else value:
            weight += 1 + len(part) // CHARACTERS if type(part) is str else self._measure(part)
        self._known[id(value)] = weight
        return weight

    def spend(self, steps: int) -> None:
        """Take steps away; StepsExceeded if too few are left."""
        self.left -= steps
        if self.left < 0:
            raise StepsExceeded

    def text(self, length: int) -> None:
        """Pay for a text of `length` characters."""
        self.spend(1 + length // CHARACTERS)

    def weigh(self, value: Any) -> Any:
        """Pay for every element inside of a value, and return it."""
        if type(value) is str:
            self.left -= 1 + len(value) // CHARACTERS
            if self.left < 0:
                raise StepsExceeded
            return value
        waiting: list[Any] = [value]
        while waiting:
            part: Any = waiting.pop()
            if type(part) is int:
                self.spend(1 + part.bit_length() // 128)
            elif isinstance(part, _TEXT):
                self.spend(1 + len(part) // CHARACTERS)
            elif (known := self._known.get(id(part))) is not None:
                self.spend(known)
            elif isinstance(part, dict):
                self.spend(1 + len(part))
                waiting += [*part, *part.values()]
            elif isinstance(part, _VIEWS):
                self.spend(1 + len(part))
                waiting += part
            elif isinstance(part, jinja2.utils.Namespace):
                self.spend(1)
                waiting.append(part._Namespace__attrs)  # type: ignore[attr-defined]
            else:
                self.spend(1)
        return value

    def length(self, value: Any) -> None:
        """Pay for the elements of a sequence, not for what is inside of them."""
        if isinstance(value, str | bytes):
            self.text(len(value))
        elif hasattr(value, "__len__"):
            self.spend(1 + len(value))

    def made(self, value: Any) -> Any:
        """Pay for what an operation has made, and return it; an iterator pays as it goes."""
        if isinstance(value, str | bytes | list | tuple | dict):
            self.length(value)
        elif hasattr(value, "__next__"):
            return self._counted(value)
        return value

    def _counted(self, values: Iterator[Any]) -> Iterator[Any]:
        for value in values:
            self.spend(1)
            yield value


METER: ContextVar[Meter] = ContextVar("steps of the rendering")
