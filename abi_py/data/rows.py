"""Rows of JSON from a file, a text or lines: JSON lines, or one JSON array; each with the number of its line.

What is wrong with a row is a `BadRow`, which says what but not where: whoever walks over the rows adds file and line,
and raises or counts it.  JSON lines in a file are read one at a time, so memory does not grow with the file; an array
is read as a whole.
"""

import io
import itertools
import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from ..errors import DataError

__all__ = ["BadRow", "Source", "kind", "list_keys", "open_rows", "text_value"]

Source = str | bytes | os.PathLike[str] | Iterable[str]

BYTE_ORDER_MARK = b"\xef\xbb\xbf"  # some editors write it at the beginning of a file


class BadRow(Exception):
    """What is wrong with a row; the caller adds file and line."""


def kind(value: Any) -> str:
    """Return what a JSON value is, in the words of an error message."""
    names = {dict: "an object", list: "a list", str: "a string", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number")


def list_keys(row: dict[str, Any]) -> str:
    """Return the keys of a row for an error message."""
    return ", ".join(map(repr, row)) or "none"


def text_value(value: Any, key: str, *, may_be_empty: bool = False) -> str:
    """Return a string of a row; BadRow naming `key` if it is none, is blank, or holds half a character."""
    if not isinstance(value, str):
        raise BadRow(f"'{key}' must be a string, found {kind(value)}")
    if not may_be_empty and not value.strip():
        raise BadRow(f"'{key}' is empty; it must hold text")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:  # JSON can write half of a surrogate pair, which is no character
        code = f"\\u{ord(value[error.start]):04x}"
        raise BadRow(f"'{key}' holds {code}, half of a character, at character {error.start}") from None
    return value


def open_rows(source: Source) -> tuple[str, Iterator[tuple[int, Any]]]:
    """Return a name for messages, and an iterator over (line number, value) of the rows of `source`.

    A str is text if it has a line break or begins with "{" or "["; otherwise it is a path.  What begins with "[" is one
    JSON array, otherwise each line that is not blank is one JSON object.  A line that is no JSON comes as a BadRow; an
    array that breaks off is a DataError, for the rest of it cannot be found.  OSError passes through.
    """
    if isinstance(source, str) and (
        not source.strip() or "\n" in source or source.lstrip("\ufeff \t\r")[:1] in ("{", "[")
    ):
        source = source.encode("utf-8", "surrogatepass")
    if isinstance(source, bytes):
        return "text", _stream_rows(io.BytesIO(source), "text")
    if isinstance(source, str | os.PathLike):
        path = Path(source)
        path.stat()  # a missing file is an error now, not when the first row is asked for
        return os.fspath(source), _file_rows(path, os.fspath(source))
    return "lines", _line_rows(enumerate(source, 1))


def _file_rows(path: Path, name: str) -> Iterator[tuple[int, Any]]:
    with open(path, "rb") as file:
        yield from _stream_rows(file, name)


def _stream_rows(file: BinaryIO, name: str) -> Iterator[tuple[int, Any]]:
    """Yield (line number, value) of an open file."""
    for number, line in enumerate(file, 1):
        line = line.removeprefix(BYTE_ORDER_MARK) if number == 1 else line
        if not line.strip():
            continue
        if line.lstrip()[:1] == b"[":
            yield from _array_rows(line + file.read(), name, number)
        else:
            yield from _line_rows(itertools.chain([(number, line)], enumerate(file, number + 1)))
        return


def _line_rows(lines: Iterable[tuple[int, bytes | str]]) -> Iterator[tuple[int, Any]]:
    """Yield (line number, value); only "\\n" ends a line, for JSON allows U+2028 and its like inside a string."""
    for number, line in lines:
        if not line.strip():
            continue
        try:
            yield number, json.loads(line.decode("utf-8") if isinstance(line, bytes) else line)
        except UnicodeDecodeError as error:
            yield number, BadRow(f"byte {error.start} of the line is not UTF-8 ({error.reason})")
        except json.JSONDecodeError as error:
            yield number, BadRow(f"not a JSON object: {error.msg} at column {error.colno}")
        except RecursionError:
            yield number, BadRow("not a JSON object of this kind: it is nested too deeply")


def _array_rows(data: bytes, name: str, line: int) -> Iterator[tuple[int, Any]]:
    """Yield (line number, element) of one JSON array that begins in `line`.

    Where its syntax breaks, the rest cannot be found: DataError.
    """
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        line += data.count(b"\n", 0, error.start)
        raise DataError(
            f"{name}:{line}: byte {error.start} of the file is not UTF-8; convert the file to UTF-8"
        ) from None
    decoder = json.JSONDecoder()
    offset, counted = line - 1, 0

    def skip_space(at: int) -> int:
        while at < len(text) and text[at] in " \t\r\n":
            at += 1
        return at

    at = skip_space(skip_space(0) + 1)
    first = True
    while True:
        line, counted = line + text.count("\n", counted, at), at
        if first and text[at : at + 1] == "]":
            break
        try:
            row, end = decoder.raw_decode(text, at)
        except (json.JSONDecodeError, RecursionError) as error:
            why = (
                "nested too deeply"
                if isinstance(error, RecursionError)
                else f"{error.msg} at line {offset + error.lineno}"
            )
            raise DataError(f"{name}:{line}: the JSON array breaks off here: {why}; correct the file") from None
        yield line, row
        first = False
        end = skip_space(end)
        if text[end : end + 1] == "]":
            at = end
            break
        if text[end : end + 1] != ",":
            line += text.count("\n", counted, end)
            raise DataError(f'{name}:{line}: expected "," or "]" after an element of the JSON array; correct the file')
        at = skip_space(end + 1)
    rest = skip_space(at + 1)
    if rest < len(text):
        line += text.count("\n", counted, rest)
        raise DataError(f"{name}:{line}: there is text after the end of the JSON array; correct the file")
