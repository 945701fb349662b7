"""Tables with a row for each of several runs: as wide as the terminal, whole lines in a pipe, numbers for people."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console

__all__ = ["age", "clock", "count", "figure", "show_columns"]

GAP = 2  # between columns


def show_columns(console: "Console", title: str, columns: Mapping[str, Sequence[str]]) -> None:
    """Print columns of texts, those that consist of numbers to the right.

    Where a terminal is too narrow the table goes on below, with the first column repeated; no word is broken.  In a
    pipe a row is one line, however long: programs read it.
    """
    from rich.cells import cell_len, set_cell_size
    from rich.text import Text

    (first, labels), *rest = columns.items()
    room = console.width if console.is_terminal else None

    def width(name: str, cells: Sequence[str]) -> int:
        return max(map(cell_len, (name, *cells)))

    parts: list[list[tuple[str, Sequence[str]]]] = [[]]
    used = width(first, labels)
    for name, cells in rest:
        wide = GAP + width(name, cells)
        if parts[-1] and room is not None and used + wide > room:
            parts.append([])
            used = width(first, labels)
        parts[-1].append((name, cells))
        used += wide
    for number, part in enumerate(parts):
        shown = [(first, labels), *part]
        if number or title:
            console.print(Text(f"\n{title}" if not number and title else "", "bold"), soft_wrap=True)
        for row in range(-1, len(labels)):
            line = ""
            for name, cells in shown:
                text, wide = name if row < 0 else cells[row], width(name, cells)
                right = name != first and any(cells) and all(not cell or cell[0].isdigit() for cell in cells)
                line += " " * (wide - cell_len(text)) + text if right else set_cell_size(text, wide)
                line += " " * GAP
            console.print(Text(line.rstrip(), "bold" if row < 0 else ""), soft_wrap=True)


def count(number: float | None) -> str:
    """Return a count in three digits: 512, 9.6k, 431k, 1.24M."""
    if number is None:
        return ""
    for unit, factor in (("T", 1e12), ("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= factor * 0.9995:
            return f"{number / factor:#.3g}".rstrip(".") + unit
    return f"{number:.0f}"


def figure(value: float | None, digits: int) -> str:
    """Return a number with so many digits behind the point; nothing for None."""
    if value is None:
        return ""
    fits = abs(value) < 1e6 and (value == 0 or abs(value) >= 0.5 / 10**digits)
    return f"{value:,.{digits}f}" if fits else f"{value:.2e}"


def clock(seconds: float) -> str:
    """Return a time as 12.3 s, 4:05 or 1:04:05."""
    if seconds < 59.95:  # what rounds to 60.0 is a minute
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def age(seconds: float) -> str:
    """Return how long ago something was."""
    for unit, factor in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * factor:
            return f"{seconds // factor:.0f} {unit}"
    return f"{max(seconds, 0):.0f} s"
