"""What is faster on a machine does not follow from its features: it is measured once, and kept.

    Measured    one of several things, chosen when it is first asked for
    Choice      a number format that a machine can multiply in several ways

The processor's dot product of bfloat16 doubles the speed of one processor and halves that of another.  The ways round
alike and add in different orders, so their last bits differ, and a resumed run must find the choice of the run before.
So it is made at the first use on a machine and kept beside the compiled kernels; of two processes that measure at once,
the second takes the choice of the first.  A variable of the environment overrides it.
"""

import functools
import json
import os
import time
from collections.abc import Callable, Hashable, Mapping
from typing import Generic, Protocol, TypeVar

import numpy as np

from .cache import STORE
from .jit import JIT

__all__ = ["Choice", "Measured"]

ROUNDS, TIMES = 20, 100  # each method is timed in turn with the others; the best round counts, others only disturb
WORTH = 1.1  # how much faster another way of multiplying must be: it changes the last bits


class Method(Hashable, Protocol):
    """What a choice needs to know of the number formats that it is made between."""

    @property
    def fold(self) -> int: ...

    @property
    def parts(self) -> int: ...

    @property
    def unit(self) -> int: ...

    @property
    def rows(self) -> int: ...

    @property
    def columns(self) -> int: ...

    @property
    def slice_terms(self) -> int: ...

    @property
    def slab_columns(self) -> int: ...

    @property
    def block_rows(self) -> int: ...

    @property
    def missing(self) -> str: ...

    def depth_of(self, terms: int) -> int: ...

    def round_ref(self, x: np.ndarray) -> np.ndarray: ...

    @property
    def panels(self) -> tuple[int, int]: ...

    @property
    def table(self) -> np.ndarray: ...

    @property
    def tile_table(self) -> np.ndarray: ...

    @property
    def file(self) -> str: ...


Option = TypeVar("Option")


class Measured(Generic[Option]):
    """One of several options; the fastest, measured when it is first asked for."""

    worth = 1.05  # how much faster than the first option another must be: what is nearly equal would depend on the hour

    def __init__(
        self,
        name: str,
        variable: str,
        methods: Mapping[str, Option],
        timed: Callable[[Option], tuple[Callable[[], None], int]],
    ) -> None:
        """Describe it; the first method is the one that every machine has.

        `timed(method)` returns a function that computes something with a method, and its operations.
        """
        self.name, self.variable, self.methods, self.timed = name, variable, methods, timed

    def __repr__(self) -> str:
        return self.name

    @functools.cached_property
    def method(self) -> str:
        """The name of the method that is used in this process; ValueError if the variable names none."""
        wanted = os.environ.get(self.variable)
        if wanted:
            if wanted not in self.usable:
                why = getattr(self.methods.get(wanted), "missing", "")
                raise ValueError(
                    f"{self.variable} ({wanted}) must be one of {', '.join(self.usable)} on this machine"
                    f"{f', because {why}' if why else ''}; unset it to use the one that was measured to be fastest"
                )
            return wanted
        rates = self.rates or {self._first: 1.0}
        return max(rates, key=lambda name: rates[name] / (1 if name == self._first else self.worth))

    @functools.cached_property
    def usable(self) -> dict[str, Option]:
        """The methods that can be used here: all."""
        return dict(self.methods)

    @functools.cached_property
    def rates(self) -> dict[str, float]:
        """Operations per second of each method, measured now or before; nothing where there is no choice."""
        if len(self.methods) == 1 or not JIT:
            return {}
        found = self._kept()
        if found is None:
            stale = STORE.read(self._record) is not None  # of other methods
            measured = self._measure()
            STORE.write(self._record, json.dumps(measured).encode(), first=not stale)
            found = self._kept() or measured  # another process may have written in between
        return found

    @functools.cached_property
    def chosen(self) -> Option:
        """The method that is used."""
        return self.methods[self.method]

    @property
    def _first(self) -> str:
        return next(iter(self.methods))

    @property
    def _record(self) -> str:
        return f"{self.name}.json"

    def _kept(self) -> dict[str, float] | None:
        content = STORE.read(self._record)
        if content is None:
            return None
        rates: dict[str, float] = json.loads(bytes(content))
        return rates if set(rates) == set(self.usable) else None

    def _measure(self) -> dict[str, float]:
        timed = {name: self.timed(method) for name, method in self.usable.items()}
        best = dict.fromkeys(timed, 0.0)
        for _ in range(ROUNDS):
            for name, (run, operations) in timed.items():
                began = time.perf_counter()
                for _ in range(TIMES):
                    run()
                best[name] = max(best[name], TIMES * operations / (time.perf_counter() - began))
        return best


class Choice(Measured[Method]):
    """A number format with several methods; used like one, and chosen when its table is first asked for."""

    def __init__(
        self,
        name: str,
        variable: str,
        methods: Mapping[str, Method],
        timed: Callable[[Method], tuple[Callable[[], None], int]],
        worth: float = WORTH,
    ) -> None:
        """Describe it; `worth` is how much faster than the first method another must be."""
        super().__init__(name, variable, methods, timed)
        self.worth = worth

    @functools.cached_property
    def usable(self) -> dict[str, Method]:
        """The methods that this machine has and the system permits."""
        return {name: method for name, method in self.methods.items() if not method.missing}

    def round_ref(self, x: np.ndarray) -> np.ndarray:
        """Return float32 x rounded to the format, still float32: all methods round alike."""
        return self.methods[self._first].round_ref(x)

    @property
    def table(self) -> np.ndarray:
        """The argument of kernels."""
        return self.chosen.table

    @property
    def file(self) -> str:
        """The name under which the cache keeps what is made last at the first use."""
        if os.environ.get(self.variable) or len(self.methods) == 1 or STORE.read(self._record) is not None:
            return self.chosen.file
        return self._record
