"""A number format that a machine can multiply in several ways: the fastest is measured once and kept.

Which way is fastest does not follow from the processor's features: its dot product of bfloat16 doubles the speed of one
processor and halves that of another.  The ways round alike and add in different orders, so their last bits differ, and
a resumed run must find the choice of the run before.  So it is made at the first use on a machine and kept beside the
compiled kernels; a variable of the environment overrides it.
"""

import functools
import json
import os
import time
from collections.abc import Callable, Hashable, Mapping
from typing import Protocol

import numpy as np

from .cache import STORE
from .jit import JIT

__all__ = ["Choice"]

ROUNDS, TIMES = 20, 100  # each method is timed in turn with the others; the best round counts, others only disturb
WORTH = 1.1  # how much faster than the first method another must be: what is nearly equal would depend on the hour


class Method(Hashable, Protocol):
    """What a choice needs to know of the number formats that it is made between."""

    fold: int
    rows: int
    columns: int
    slice_terms: int
    slab_columns: int
    block_rows: int

    def round_ref(self, x: np.ndarray) -> np.ndarray: ...

    @property
    def panels(self) -> tuple[int, int]: ...

    @property
    def table(self) -> np.ndarray: ...

    @property
    def file(self) -> str: ...


Timed = Callable[[Method], tuple[Callable[[], None], int]]


class Choice:
    """A number format with several methods; used like one, and chosen when its table is first asked for."""

    def __init__(self, name: str, variable: str, methods: Mapping[str, Method], timed: Timed) -> None:
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
            if wanted not in self.methods:
                raise ValueError(
                    f"{self.variable} ({wanted}) must be one of {', '.join(self.methods)} on this machine; unset it to "
                    "use the one that was measured to be fastest"
                )
            return wanted
        rates = self.rates or {self._first: 1.0}
        return max(rates, key=lambda name: rates[name] / (1 if name == self._first else WORTH))

    @functools.cached_property
    def rates(self) -> dict[str, float]:
        """Operations per second of each method, measured now or before; nothing where there is no choice."""
        if len(self.methods) == 1 or not JIT:
            return {}
        found = self._kept()
        if found is None:
            measured = self._measure()
            STORE.write(self._record, json.dumps(measured).encode())
            found = self._kept() or measured  # another process may have written in between
        return found

    @functools.cached_property
    def chosen(self) -> Method:
        """The method that is used."""
        return self.methods[self.method]

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
        if os.environ.get(self.variable) or len(self.methods) == 1:
            return self.chosen.file
        return self._record

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
        return rates if set(rates) == set(self.methods) else None

    def _measure(self) -> dict[str, float]:
        timed = {name: self.timed(method) for name, method in self.methods.items()}
        best = dict.fromkeys(timed, 0.0)
        for _ in range(ROUNDS):
            for name, (run, operations) in timed.items():
                began = time.perf_counter()
                for _ in range(TIMES):
                    run()
                best[name] = max(best[name], TIMES * operations / (time.perf_counter() - began))
        return best
