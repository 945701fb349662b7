"""Signals that end a verb as Ctrl-C does: what has been begun is removed on the way out."""

import contextlib
import signal
import sys
from collections.abc import Iterator

from ..training.stop import SIGNALS

__all__ = ["stopping_cleanly"]


@contextlib.contextmanager
def stopping_cleanly() -> Iterator[None]:
    """Let SIGTERM and SIGHUP, where nothing else is done about them, leave the block by an exception."""
    numbers = [number for number in SIGNALS if signal.getsignal(number) == signal.SIG_DFL]
    for number in numbers:
        signal.signal(number, lambda number, frame: sys.exit(128 + number))
    try:
        yield
    finally:
        for number in numbers:
            signal.signal(number, signal.SIG_DFL)
