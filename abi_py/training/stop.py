"""Stopping on request: SIGINT, SIGTERM and SIGHUP ask the training loop to end after the micro-batch in hand."""

import os
import signal
import threading
from types import FrameType, TracebackType
from typing import Any

__all__ = ["HANG_UP", "SIGNALS", "GracefulStop"]

HANG_UP = getattr(signal, "SIGHUP", None)
SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]


class GracefulStop:
    """Context manager: the first SIGINT, SIGTERM or SIGHUP becomes a request, a second signal ends the process at once.

        with GracefulStop() as stop:
            report = trainer.fit(data, stop=stop)
        if report.interrupted:
            sys.exit(stop.exit_code)    # 130 for SIGINT, 143 for SIGTERM, 129 for SIGHUP

    Signals can be caught in the main thread only; elsewhere, `request()` does the same by hand.  A SIGHUP that is
    ignored, as under nohup, stays ignored; and as a closed terminal sends it twice (the shell, then the system), it
    never is the second signal.
    """

    def __init__(self) -> None:
        """Begin without a request."""
        self.signal: int | None = None
        self.requested = False
        self._before: dict[int, Any] = {}

    @property
    def exit_code(self) -> int:
        """128 + number of the signal; 0 without one."""
        return 0 if self.signal is None else 128 + self.signal

    def request(self) -> None:
        """Ask the loop to stop, as a signal would."""
        self.requested = True

    def __enter__(self) -> "GracefulStop":
        """Install the handlers."""
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                if number != HANG_UP or signal.getsignal(number) != signal.SIG_IGN:
                    self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Put the handlers back that were there before."""
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.signal is None:
            self.signal, self.requested = number, True
        elif number != HANG_UP:
            os._exit(128 + number)  # the user insists: no clean-up, the last checkpoint is whole anyway
