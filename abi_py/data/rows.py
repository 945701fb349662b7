"""Rows from a file, a text or lines: JSON of every shape that json_rows.py knows, or a table; each with its line.

What is wrong with a row is a `BadRow`, which says what but not where: the caller adds file and line, and raises or
counts it.  Rows are read one at a time, so memory does not grow with the file.
"""

import io
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from ..errors import listed, shown
from .json_rows import BadRow, Row, parse_row, stream_rows
from .sources import Kind, kind_of, open_source

__all__ = ["LEAVE_OUT", "BadRow", "Source", "first_row", "kind", "list_keys", "open_rows", "text_value"]

Source = str | bytes | os.PathLike[str] | Iterable[str]

NAMED_KEYS = 8  # keys of a row named in one message
LEAVE_OUT = "leave such rows out with skip_bad_rows=True (--skip-bad-rows)"  # the remedy for a bad row


def kind(value: Any) -> str:
    """Return what a value of a row is, in the words of an error message."""
    names = {dict: "an object", list: "a list", str: "a string", bool: "true or false", type(None): "null"}
    names |= {int: "a number", float: "a number"}
    return names.get(type(value), f"a value of type {type(value).__name__}")  # tables have more types than JSON


def list_keys(row: dict[str, Any]) -> str:
    """Return the keys of a row for an error message."""
    return listed([shown(key) for key in row], NAMED_KEYS) or "none"


def text_value(value: Any, key: str, *, may_be_empty: bool = False) -> str:
    """Return a string of a row; BadRow naming `key` if it is not a string, is blank, or holds half a character."""
    if not isinstance(value, str):
        raise BadRow(f"'{key}' must be a string, found {kind(value)}")
    if not may_be_empty and not value.strip():
        raise BadRow(f"'{key}' is empty; it must hold text")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:  # JSON can write half of a surrogate pair, which is not a character
        code = f"\\u{ord(value[error.start]):04x}"
        raise BadRow(f"'{key}' holds {code}, half of a character, at character {error.start}") from None
    return value


def open_rows(source: Source) -> tuple[str, Iterator[Row]]:
    """Return a name for messages, and an iterator over (line number, value) of the rows of `source`.

    A str is text if it has a line break or begins with "{" or "["; otherwise it is a path.  A row that cannot be read
    comes as a BadRow.  The iterator raises DataError where a document breaks off, for the rest of it cannot be found,
    and for a file of another kind; OSError passes through.
    """
    if isinstance(source, str) and (
        not source.strip() or "\n" in source or source.lstrip("\ufeff \t\r")[:1] in ("{", "[")
    ):
        source = source.encode("utf-8", "surrogatepass")
    if isinstance(source, bytes):
        return "text", _stream(io.BytesIO(source), "text")
    if isinstance(source, str | os.PathLike):
        path = Path(source)
        path.stat()  # a missing file is an error now, not when the first row is asked for
        return os.fspath(source), file_rows(path)
    return "lines", _line_rows(source)


def first_row(path: str | os.PathLike[str]) -> Any:
    """Return the first row of a file, BadRow if it cannot be read, None if there is none; errors as `open_rows`."""
    return next((row for _, row in file_rows(Path(path))), None)


def file_rows(path: Path) -> Iterator[Row]:
    """Yield (line number, value) of the rows of a file; of a table, the number of the row."""
    if kind_of(path) is Kind.PARQUET:
        from .parquet import parquet_rows

        yield from parquet_rows(path)
        return
    with open(path, "rb") as file:
        yield from _stream(file, str(path))


def _stream(file: BinaryIO, name: str) -> Iterator[Row]:
    yield from stream_rows(open_source(file, name), name)


def _line_rows(lines: Iterable[str]) -> Iterator[Row]:
    """Yield (number, value) of lines; only what the caller calls a line is one, for JSON allows U+2028 in a string."""
    for number, line in enumerate(lines, 1):
        line = line.removeprefix("\ufeff") if number == 1 else line
        if line.strip():
            yield number, parse_row(line)
