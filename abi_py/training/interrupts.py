"""Ctrl-C where nobody asked for a `GracefulStop`, as in a notebook: KeyboardInterrupt, but only where nothing is torn.

Python raises it between any two instructions: also after the optimizer has changed weights and before the counters say
so, and the same gradient would be applied once more when training goes on.
"""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

__all__ = ["Interrupts"]


class Interrupts:
    """Puts SIGINT off, whatever handles it: to the end of `held`, or to the next `let_through` within."""

    def __init__(self) -> None:
        """Begin with nothing put off."""
        self._handler: Any = None  # whose turn it is
        self._waits = False

    @contextmanager
    def held(self) -> Iterator[None]:
        """Put a SIGINT off to the end of the block; a second one is not, lest something in it hangs.

        May be nested.  Signals are handled in the main thread, so that in any other there is nothing to do.
        """
        handler = signal.getsignal(signal.SIGINT)
        if threading.current_thread() is not threading.main_thread() or not callable(handler) or handler == self._note:
            yield
            return
        self._handler, self._waits = handler, False
        signal.signal(signal.SIGINT, self._note)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, handler)
            self._raise()

    @contextmanager
    def let_through(self) -> Iterator[None]:
        """Within `held`: handle what waits, and all that comes during the block, at once."""
        if signal.getsignal(signal.SIGINT) != self._note:
            yield
            return
        signal.signal(signal.SIGINT, self._handler)
        try:
            self._raise()
            yield
        finally:
            signal.signal(signal.SIGINT, self._note)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self._waits:
            self._handler(number, frame)
        self._waits = True

    def _raise(self) -> None:
        waits, self._waits = self._waits, False
        if waits:
            self._handler(signal.SIGINT, None)
