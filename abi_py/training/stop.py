"""Stopping on request: SIGINT, SIGTERM and SIGHUP ask the training loop to end, and are heard at once.

Python's own handlers run in the main thread between two of its instructions, so one that comes while a kernel runs
would wait for the kernel.  The system, however, writes the number of each signal to a pipe at once
(`signal.set_wakeup_fd`), and kernels let other threads run: a watcher thread reads the pipe, says that it has heard,
and ends the process when a second signal insists.  Where pipes cannot be waited for (Windows), the handlers do it.
A child that is forked meanwhile would share the pipe: it leaves it, and has the handlers of before.

What a request does: a micro-batch that takes no longer than SHORT_SECONDS is finished; a longer one is given up, as if
it had not begun, and comes first after a resume.  That is between two layers (`PassWatch`); attention over a long row,
which alone may take longer than a second, ends early by the pass's flag.
"""

import contextlib
import os
import selectors
import signal
import threading
import time
import weakref
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import Any

import numpy as np

from ..reprs import Shown

__all__ = ["HANG_UP", "SHORT_SECONDS", "SIGNALS", "GracefulStop", "PassWatch", "Stopped"]

HANG_UP = getattr(signal, "SIGHUP", None)
SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]
SHORT_SECONDS = 0.5  # a micro-batch that ends within them is not computed twice, and nobody waits for it
HEARD = "stopping after this step, or in the middle of a long one; once more to stop at once, without saving"
WAKE = b"\0"  # no signal has this number


class Stopped(Exception):
    """A pass was given up because a stop was requested; it never leaves the training loop."""


class PassWatch:
    """Gives a pass that begins now up, if a stop is requested and it has taken longer than SHORT_SECONDS.

    Called between two layers, it raises Stopped; `flag` (1,) uint8 is set from another thread, for kernels.
    """

    def __init__(self) -> None:
        """Begin to count the time."""
        self.flag = np.zeros(1, np.uint8)
        self._began = time.monotonic()

    def __call__(self) -> None:
        """Raise Stopped if the pass is to be given up: a kernel may have ended early."""
        if self.flag[0]:
            raise Stopped

    def give_up(self) -> None:
        """Set the flag, as soon as the pass is no short one any more."""
        left = SHORT_SECONDS - (time.monotonic() - self._began)
        if left <= 0:
            self.flag[0] = 1
            return
        timer = threading.Timer(left, self.flag.fill, (1,))
        timer.daemon = True
        timer.start()


class GracefulStop(Shown):
    """Context manager: the first SIGINT, SIGTERM or SIGHUP becomes a request, a second signal ends the process at once.

        with GracefulStop() as stop:
            report = trainer.fit(data, stop=stop)
        if report.interrupted:
            sys.exit(stop.exit_code)    # 130 for SIGINT, 143 for SIGTERM, 129 for SIGHUP

    `tell` is called with one line as soon as a signal is heard, by another thread.  Signals can be caught in the main
    thread only; elsewhere, `request()` does the same by hand.  A SIGHUP that is ignored, as under nohup, stays ignored;
    and as a closed terminal sends it twice (the shell, then the system), it never is the second signal.
    """

    def __init__(self, tell: Callable[[str], object] | None = None) -> None:
        """Begin without a request."""
        self.signal: int | None = None
        self.tell = tell
        self.requested = False
        self._before: dict[int, Any] = {}
        self._pipe: tuple[int, int] | None = None  # where the numbers of signals are read, where they are written
        self._fd_before = -1
        self._watcher: threading.Thread | None = None
        self._lock = threading.RLock()  # a handler may interrupt another one
        self._pass = PassWatch()  # the latest

    @property
    def exit_code(self) -> int:
        """128 + number of the signal; 0 without one."""
        return 0 if self.signal is None else 128 + self.signal

    def request(self) -> None:
        """Ask the loop to stop, as a signal would."""
        self.requested = True
        self._pass.give_up()

    def watch_pass(self) -> PassWatch:
        """Return the `check` of a pass that begins now; it gives the pass up where a stop is requested."""
        self._pass = watch = PassWatch()
        if self.requested:
            watch.give_up()
        return watch

    def __enter__(self) -> "GracefulStop":
        """Install the handlers, and begin to watch; OSError without files for a pipe, and nothing has changed."""
        if threading.current_thread() is threading.main_thread():
            try:
                for number in SIGNALS:
                    if number != HANG_UP or signal.getsignal(number) != signal.SIG_IGN:
                        self._before[number] = signal.getsignal(number)
                        signal.signal(number, self._handle)
                if os.name == "posix":
                    self._watch_signals()
            except BaseException:
                self._leave()
                raise
        return self

    def _watch_signals(self) -> None:
        self._pipe = reader, writer = os.pipe()
        for end in self._pipe:
            os.set_blocking(end, False)
        _ACTIVE.add(self)
        self._watcher = threading.Thread(target=self._watch, args=(reader,), daemon=True)
        self._watcher.start()
        self._fd_before = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Put the handlers back that were there before."""
        self._leave()

    def _leave(self) -> None:
        """End the watcher and close the pipe; the handlers go last, so that no signal finds neither new nor old."""
        try:
            if self._pipe is not None:
                reader, writer = self._pipe
                signal.set_wakeup_fd(self._fd_before)
                self._take(reader)
                self._pipe = None
                os.close(writer)  # which ends the watcher
                if self._watcher is not None:
                    self._watcher.join()
                os.close(reader)
        finally:
            self._forget()

    def _forget(self) -> None:
        """Have no part in signals any more."""
        _ACTIVE.discard(self)
        self._pipe = self._watcher = None
        before, self._before = self._before, {}
        for number, handler in before.items():
            signal.signal(number, handler)

    def _in_child(self) -> None:
        """This process was forked from the one that trains: its signals are its own, and so is the lock."""
        pipe, self._lock = self._pipe, threading.RLock()
        if pipe is not None:
            signal.set_wakeup_fd(-1)
            for end in pipe:
                os.close(end)
        self._forget()

    def _watch(self, reader: int) -> None:
        """Wait for signals until the other end is closed."""
        alive, told = True, False
        with selectors.DefaultSelector() as selector:
            selector.register(reader, selectors.EVENT_READ)
            while alive:
                selector.select()
                alive = self._take(reader)
                if told or self.tell is None or self.signal in (None, HANG_UP):  # a terminal that has gone is deaf
                    continue
                told = True
                with contextlib.suppress(OSError, ValueError):  # closed
                    self.tell(HEARD)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        """Python's turn, which comes after the system has written: what the watcher has not taken yet is taken here.

        It is left to the watcher to tell: the main thread may be in the middle of a line that it writes.
        """
        if self._pipe is None:
            self._hear(number)
            return
        reader, writer = self._pipe
        self._take(reader)
        if self.signal is None:  # it came when the system no longer wrote, or not yet
            self._hear(number)
        with contextlib.suppress(OSError):
            os.write(writer, WAKE)

    def _take(self, reader: int) -> bool:
        """Take in all signals that have arrived; return False when none can come any more."""
        with self._lock:
            while True:
                try:
                    numbers = os.read(reader, 64)
                except BlockingIOError:
                    return True
                except OSError:
                    return False
                if not numbers:
                    return False
                for number in numbers:
                    self._hear(number)

    def _hear(self, number: int) -> None:
        if self._fd_before >= 0 and number:
            with contextlib.suppress(OSError):  # who listened before, an event loop, still does
                os.write(self._fd_before, bytes([number]))
        if number not in SIGNALS:
            return
        if self.signal is None:
            self.signal = number
            self.request()
        elif number != HANG_UP:
            os._exit(128 + number)  # the user insists: no clean-up, the last checkpoint is whole anyway


_ACTIVE: weakref.WeakSet[GracefulStop] = weakref.WeakSet()  # those with a pipe


def _leave_pipes() -> None:
    for stop in list(_ACTIVE):
        stop._in_child()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_leave_pipes)
