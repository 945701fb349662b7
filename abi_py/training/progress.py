"""`fit(progress=True)`: what the command line shows, from Python: on a terminal, in a pipe, in a notebook.

A notebook keeps what a cell printed.  There one line is shown that is replaced at each step (a display of plain text
that IPython updates, no widget), and what happens besides, such as an evaluation, is a line of its own.
"""

import contextlib
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

from rich.console import Console

from .console import ConsoleSink
from .events import EpochEvent, Event, EventHub, StepEvent

__all__ = ["showing"]

SECONDS = 0.2  # a notebook's line is replaced at most this often
PATIENCE = 1.0  # seconds of compiling of which nothing is said


class NotebookSink(ConsoleSink):
    """One line that is replaced, and one for each thing that happens; `display` is IPython's function."""

    def __init__(self, display: Callable[..., Any]) -> None:
        """Show nothing yet."""
        super().__init__(Console(file=sys.stdout, force_terminal=False, force_jupyter=False))
        self._display, self._handle, self._shown = display, None, 0.0
        self._line = ""

    def handle(self, event: Event) -> None:
        """Replace the line at a step; print all else."""
        if isinstance(event, StepEvent):
            self._line = self.line_of(event)
            if time.monotonic() - self._shown >= SECONDS:
                self._show()
            return
        self._show()
        if not isinstance(event, EpochEvent):  # the line has the epoch
            super().handle(event)

    def say(self, text: str) -> None:
        """Print a line as it is: rich would make HTML of it."""
        print(text, flush=True)

    def close(self) -> None:
        """Show the last step; another training begins a line of its own."""
        if self._line:
            self._show()
        self._handle, self._line = None, ""

    def _show(self) -> None:
        if not self._line:
            return
        content = {"text/plain": self._line}
        if self._handle is None:
            self._handle = self._display(content, raw=True, display_id=True)
        else:
            self._handle.update(content, raw=True)
        self._shown = time.monotonic()


def _sink() -> ConsoleSink:
    """Return what shows events where this process runs; IPython is not imported, only asked where it is there."""
    ipython: Any = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython is not None else None
    if shell is not None and getattr(shell, "kernel", None) is not None:
        from IPython.display import display  # type: ignore[import-not-found,unused-ignore]

        return NotebookSink(display)
    return ConsoleSink(Console(highlight=False, markup=False, emoji=False))


@contextlib.contextmanager
def showing(events: EventHub, progress: bool) -> Iterator[None]:
    """Show the events of a training, and compiling that takes longer than a second; nothing without `progress`."""
    if not progress:
        yield
        return
    sink = _sink()
    events.add(sink)
    try:
        with _compiling_told(lambda: sink.say("compiling kernels for this processor, once ...")):
            yield
    finally:
        sink.close()
        events.sinks.remove(sink)


@contextlib.contextmanager
def _compiling_told(tell: Callable[[], None]) -> Iterator[None]:
    """Call `tell`, once, when a kernel, with those that it calls, has been compiling for longer than PATIENCE."""
    from numba.core import event

    class Listener(event.Listener):  # type: ignore[misc]
        def __init__(self) -> None:
            self.depth, self.told = 0, False
            self.timer: threading.Timer | None = None

        def on_start(self, event: Any) -> None:
            self.depth += 1
            if self.depth == 1 and not self.told:
                self.timer = threading.Timer(PATIENCE, self.tell)
                self.timer.daemon = True
                self.timer.start()

        def on_end(self, event: Any) -> None:
            self.depth -= 1
            if self.depth == 0:
                self.cancel()

        def tell(self) -> None:
            self.told = True
            tell()

        def cancel(self) -> None:
            if self.timer is not None:
                self.timer.cancel()

    listener = Listener()
    try:
        with event.install_listener("numba:compile", listener):
            yield
    finally:
        listener.cancel()
