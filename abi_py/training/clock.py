"""The time of a run, kept in its state: the whole of it, and that of training steps alone, from which speed follows."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

from .state import TrainingState

__all__ = ["Clock"]


class Clock:
    """Adds to a state's `elapsed_ns` while it runs, and to its `train_ns` inside of `training`.

    It runs in the trainer's own loop.  A loop of the user's own never starts it: then the steps' own time counts.
    """

    def __init__(self, state: TrainingState) -> None:
        """Begin stopped."""
        self.state = state
        self.throughput = 0.0  # tokens per second of training between the mark and the last optimizer step
        self._mark = (0, 0)  # tokens and train_ns where that is counted from
        self._looked: int | None = None  # at the last look; None while the clock is stopped

    def start(self) -> None:
        """Start; throughput is counted from here."""
        self._looked = time.perf_counter_ns()
        self.mark()

    def stop(self) -> None:
        """Stop; `start` goes on."""
        self.elapsed()
        self._looked = None

    def elapsed(self) -> int:
        """Return the nanoseconds of the run up to now, earlier sessions included."""
        if self._looked is not None:
            before, self._looked = self._looked, time.perf_counter_ns()
            self.state.elapsed_ns += self._looked - before
        return max(self.state.elapsed_ns, self.state.train_ns)

    @contextmanager
    def training(self) -> Iterator[None]:
        """Count what is inside as training, not as evaluation or saving."""
        began = time.perf_counter_ns()
        yield
        self.state.train_ns += time.perf_counter_ns() - began

    def measure(self) -> float:
        """Return, and remember as `throughput`, the tokens per second of training since the mark."""
        tokens, nanoseconds = self.state.tokens_processed - self._mark[0], self.state.train_ns - self._mark[1]
        self.throughput = 1e9 * tokens / nanoseconds if nanoseconds > 0 else 0.0
        return self.throughput

    def mark(self) -> None:
        """Count throughput from here on."""
        self._mark = (self.state.tokens_processed, self.state.train_ns)
