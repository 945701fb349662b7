"""How far something is: a bar on a terminal, a line now and then elsewhere."""

import contextlib
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console

__all__ = ["bytes_progress"]

LINE_SECONDS = 10.0  # where there is no terminal, a line comes at most this often
KILOBYTE, MEGABYTE = 1e3, 1e6


@contextlib.contextmanager
def bytes_progress(console: "Console", label: str, total: int | None) -> Iterator[Callable[[int, str], None]]:
    """Give a function show(bytes done, a word about it); `total` None means that nobody knows."""
    if not console.is_terminal:
        yield _Lines(console, label, total).show
        return
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    columns = (BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(
        TextColumn(label), *columns, TextColumn("{task.fields[word]}"), console=console, transient=True
    ) as progress:
        task = progress.add_task(label, total=total, word="")
        yield lambda done, word: progress.update(task, completed=done, word=word)


class _Lines:
    """Prints a line, but not often."""

    def __init__(self, console: "Console", label: str, total: int | None) -> None:
        self.console, self.label, self.total = console, label, total
        self.begun = self.shown = time.monotonic()

    def show(self, done: int, word: str) -> None:
        """Print how far it is, if the last line is long enough ago."""
        now = time.monotonic()
        if now - self.shown < LINE_SECONDS:
            return
        self.shown = now
        unit, name = (MEGABYTE, "MB") if max(done, self.total or 0) >= MEGABYTE else (KILOBYTE, "kB")
        of = f" of {self.total / unit:,.0f}" if self.total else ""
        speed = done / unit / (now - self.begun)
        self.console.print(
            f"{self.label:<9}{done / unit:,.0f}{of} {name}, {speed:.1f} {name}/s {word}".rstrip(),
            soft_wrap=True,
        )
