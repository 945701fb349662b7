"""The passes that a model has by heart: what Python did once, replayed (`kernels/engine/replay.py`).

    1st pass of a kind    Python: compiles what is missing, lays out memory
    2nd                   Python, and its calls are noted
    3rd, 4th ...          the notes, on the numbers that are in the arrays now

A kind of pass is all that decides which calls Python makes, with which arrays and numbers:

    which pass     forward, or head and backward, and the objective where its numbers are in the calls
    the run        batch and length, number format, adding or overwriting, whether something is dropped, no marks
    who runs it    the Python thread, whose scratch it is, and how many threads kernels use
    the layers     which of them are noted: one that got a method of its own, as a hook, is Python's from then on
    the arrays     activations and scratch are those of one `Arrays`, which has its own passes; weights stay where
                   they are, in buffers that a model keeps for life, and so do their gradients

What else changes from pass to pass is in arrays: ids and labels are copied into those that were noted.  Masks, segments
and whatever a pass does between kernels are Python's each time, as are long passes, where nothing would be gained and
a stop may be wanted between two layers.
"""

import threading
from collections.abc import Callable, Hashable
from dataclasses import dataclass, replace

import numpy as np

from ..kernels.engine.calls import NotNumbers
from ..kernels.engine.replay import Recording, recorded, replays
from ..kernels.engine.threads import thread_count
from .layers.run import Run

__all__ = ["LONG", "Passes"]

LONG = 2e10  # operations of a step; half a second on a slow machine, and beyond it Python is below 1 %
KEPT = 12  # kinds of passes, those that were run last

PassFunction = Callable[..., object]  # function(*inputs, run)


@dataclass
class _Kind:
    """What is known of a kind of passes."""

    starts: np.ndarray | None
    positions: np.ndarray
    inputs: tuple[np.ndarray, ...]
    recording: Recording | None = None
    refused: str = ""  # why a call cannot be made again; the passes are Python's then


class _OfThread(threading.local):
    """What tells a Python thread from all others, also from one that begins after its end and has its number."""

    def __init__(self) -> None:
        self.token = object()


_mine = _OfThread()


class Passes:
    """Those over one set of arrays."""

    def __init__(self) -> None:
        """Begin without any."""
        self._known: dict[Hashable, _Kind] = {}  # the last that was run at the end

    def __len__(self) -> int:
        """Return how many kinds are known."""
        return len(self._known)

    @property
    def refused(self) -> list[str]:
        """Return why kinds of passes cannot be replayed, for those that cannot."""
        return [kind.refused for kind in self._known.values() if kind.refused]

    def run(
        self,
        function: PassFunction,
        inputs: tuple[np.ndarray, ...],
        run: Run,
        noted: frozenset[int],
        numbers: Hashable = None,
    ) -> None:
        """Do what function(*inputs, run) does.

        noted    ids of the layers whose calls are noted; the others are Python's each time
        numbers  that its calls are given besides, such as those of `run.objective`
        """
        if not replays() or run.counted is not None:
            function(*inputs, run)
            return
        shapes = tuple((x.shape, x.dtype) for x in inputs)
        what = function.__name__, noted, numbers, run.number_format, run.accumulate, run.draw is None
        key = *what, run.batch, run.length, shapes, thread_count(), _mine.token
        kind = self._known.pop(key, None)
        if kind is None or kind.starts is not run.starts or kind.positions is not run.positions:
            while len(self._known) >= KEPT:
                del self._known[next(iter(self._known))]
            self._known[key] = _Kind(run.starts, run.positions, tuple(x.copy() for x in inputs))
            function(*inputs, run)
            return
        self._known[key] = kind
        if kind.refused:
            function(*inputs, run)
            return
        for kept, x in zip(kind.inputs, inputs, strict=True):
            np.copyto(kept, x)
        if kind.recording is None:
            _note(kind, function, run)
        else:
            kind.recording.replay(run)
        run.between_layers()


def _note(kind: _Kind, function: PassFunction, run: Run) -> None:
    """Do what the function does, and note it; nothing that is noted looks at a request to stop."""
    with recorded() as notes:
        function(*kind.inputs, replace(run, check=None))
    try:
        kind.recording = Recording(notes)
    except NotNumbers as error:
        kind.refused = str(error)
