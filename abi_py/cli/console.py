"""The terminal: what is written there, and what is read from it."""

import os
import sys
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import click

from ..errors import ConfigError

if TYPE_CHECKING:
    from rich.console import Console

__all__ = [
    "make_console",
    "note",
    "printable",
    "read_stdin",
    "say",
    "show_table",
    "silence",
    "silence_stdout",
    "stderr_console",
    "utf8_output",
    "write",
]

PROSE = 30  # characters of a cell above which its column is wrapped


def make_console() -> "Console":
    """Return a console on stdout that survives a reader who goes away; NO_COLOR is obeyed.

    It prints text as it is: a path or an answer may hold what rich would take for markup.
    """
    from rich.console import Console

    class PipeConsole(Console):
        """Falls silent when the pipe breaks; `broken` tells."""

        broken = False

        def on_broken_pipe(self) -> None:
            """Send what is still to come nowhere."""
            self.broken = True
            silence(self)

    return PipeConsole(highlight=False, markup=False, emoji=False)


def stderr_console() -> "Console":
    """Return a console on stderr: for what is not the output."""
    from rich.console import Console

    return Console(stderr=True, highlight=False, markup=False, emoji=False)


def silence(console: "Console") -> None:
    """Print nothing any more: its reader has gone."""
    console.quiet = True
    silence_stdout()


def say(console: "Console", label: str, text: str) -> None:
    """Print a line of the run's header."""
    console.print(f"{label:<9}{text}", soft_wrap=True)


def show_table(console: "Console", title: str, rows: Iterable[tuple[str, ...]], columns: Sequence[str] = ()) -> None:
    """Print a table, with a header if its columns have names; numbers and names are never cut, prose is wrapped.

    A terminal too narrow for the words of a header beside each other gets them below each other; one too narrow for the
    columns gets the rows as blocks of lines.
    """
    from rich.table import Table

    rows = list(rows)
    prose = [any(len(cell) > PROSE for cell in cells) for cells in zip(*rows, strict=True)] or [False] * len(columns)
    for names in (columns, tuple(name.replace(" ", "\n") for name in columns)):
        table = Table(title=title, title_justify="left", title_style="bold", show_header=bool(columns))
        for i, is_prose in enumerate(prose):
            table.add_column(names[i] if names else "", overflow="fold", no_wrap=not is_prose)
        for row in rows:
            table.add_row(*row)
        if not columns or _width(names, rows, prose) <= console.width:
            console.print(table)
            return
    if title:
        console.print(title, soft_wrap=True)
    widest = max(map(len, columns))
    for row in rows:
        for name, cell in zip(columns, row, strict=True):
            console.print(f"{name:<{widest}}  {cell}", soft_wrap=True)
        console.print()


def _width(names: Sequence[str], rows: Sequence[tuple[str, ...]], prose: Sequence[bool]) -> int:
    """Return how wide a table must be: each column as its longest cell, of prose as its longest word."""
    from rich.cells import cell_len

    width = 1
    for i, is_prose in enumerate(prose):
        texts = [piece for row in rows for piece in (row[i].split() if is_prose else [row[i]])]
        width += 3 + max((cell_len(text) for text in (*texts, *names[i].split("\n"))), default=0)
    return width


def note(text: str) -> None:
    """Tell the user something that is not the output."""
    click.echo(text, err=True)


def silence_stdout() -> None:
    """Send what is still written to stdout nowhere: the interpreter flushes it once more at exit, and must not fail."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, sys.stdout.fileno())
    os.close(nowhere)


def printable(text: str) -> str:
    """Return text that a terminal shows and does not obey: control characters other than line ends as U+FFFD."""
    return "".join(c if c.isprintable() or c in "\n\t" else "\N{REPLACEMENT CHARACTER}" for c in text)


def write(pieces: Iterable[str]) -> None:
    """Write text to stdout at once; made printable if that is a terminal."""
    for piece in pieces:
        sys.stdout.write(printable(piece) if sys.stdout.isatty() else piece)
    sys.stdout.flush()


def read_stdin() -> str:
    """Return all of stdin as text without its last line end; ConfigError if it is a terminal, empty, or not UTF-8."""
    if sys.stdin.isatty():
        raise ConfigError("prompt () must be given: --prompt TEXT, or text on standard input")
    try:
        text = sys.stdin.buffer.read().decode("utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(f"standard input must be UTF-8 text, but byte {error.start} is not; convert it") from None
    text = text.removesuffix("\n").removesuffix("\r")
    if not text:
        raise ConfigError("prompt () must not be empty; standard input was, so give --prompt TEXT")
    return text


def utf8_output() -> None:
    """Write UTF-8 whatever the locale says: a model may write any character."""
    if isinstance(sys.stdout, os.PathLike) or not hasattr(sys.stdout, "reconfigure"):
        return
    sys.stdout.reconfigure(encoding="utf-8", errors="replace")
