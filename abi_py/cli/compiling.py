"""The line about compiling: on a terminal a count that moves, elsewhere a line before and one after."""

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from ..errors import counted
from ..runs import compiling

if TYPE_CHECKING:
    from rich.console import Console
    from rich.live import Live

    from ..config import LlmTrainingConfig
    from ..training.session import Model

__all__ = ["compile_for_training", "compile_showing", "compiling_told", "prepare_training"]


class CompileLine:
    """Takes in what `runs/compiling.py` tells: sentences, which `say` prints, and how many kernels are done."""

    def __init__(self, console: "Console", say: Callable[[str], None]) -> None:
        """Begin without a line; the time counts from here."""
        self.console, self.say, self.began = console, say, time.monotonic()
        self.done = self.total = 0
        self._live: Live | None = None

    def tell(self, text: str) -> None:
        """Print a sentence, in place of the count."""
        self.close()
        self.say(text)

    def count(self, done: int, total: int) -> None:
        """Show how many kernels are compiled, and for how long that has taken, from now on."""
        self.done, self.total = done, total
        if self._live is None and self.console.is_terminal:
            from rich.live import Live

            self._live = Live(console=self.console, get_renderable=self._line, refresh_per_second=4, transient=True)
            self._live.start()

    def close(self) -> None:
        """Take the count down."""
        live, self._live = self._live, None
        if live is not None:
            live.stop()

    def _line(self) -> str:
        from ..training.console import clock_time

        seconds = clock_time(time.monotonic() - self.began)
        return f"{'compile':<9}{self.done} of {self.total} kernels, {seconds}"


@contextmanager
def _line(console: "Console", say: Callable[[str], None]) -> Iterator[CompileLine]:
    line = CompileLine(console, say)
    try:
        yield line
    finally:
        line.close()


def compile_showing(names: Iterable[str], console: "Console", say: Callable[[str], None]) -> None:
    """Compile those kernels that are not in the cache."""
    with _line(console, say) as line:
        compiling.compile_missing(names, line.tell, line.count)


@contextmanager
def compiling_told(say: Callable[[str], None]) -> Iterator[None]:
    """Say in one line before the first, and one after the last, how many kernels were compiled within.

    For verbs that need few kernels, each at its first call: which ones follows from the types in a file.
    """

    def tell(done: int, begun: int) -> None:
        if (done, begun) == (0, 1):
            say("compiling kernels for this processor, once; later calls find them in the cache ...")

    with compiling.counting_compilations(tell) as counter:
        yield
    if counter.done:
        say(f"{counted(counter.done, 'kernel')} compiled")


def compile_for_training(
    model: "Model", config: "LlmTrainingConfig", console: "Console", say: Callable[[str], None]
) -> None:
    """Compile the kernels of a step of this model that are not in the cache, and say so."""
    compile_showing(compiling.kernels_of_step(model, config), console, say)


def prepare_training(
    model: "Model", config: "LlmTrainingConfig", console: "Console", say: Callable[[str], None], decodes: bool
) -> None:
    """Compile, or load, everything that a training of `model` calls, and if it `decodes` the writing of texts."""
    from ..runs.rehearsal import rehearse_counting

    names = compiling.kernels_of_step(model, config)
    if decodes:
        names += compiling.kernels_of_generation(model.config)
    with _line(console, say) as line:
        compiling.compile_missing(dict.fromkeys(names), line.tell, line.count)
        rehearse_counting(model, config, decodes, line.tell, line.count)
