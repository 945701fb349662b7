"""Rows of JSON from a stream of bytes, one at a time: memory holds one row, not the file.

    lines       {"text": "a"}                     a row in each line; a bad one costs that line
                {"text": "b"}
    array       [{"text": "a"}, {"text": "b"}]    its elements are the rows
    wrapper     {"data": [...], "version": 1}     the one list of rows under a key of WRAPPERS; no other key is read
    one object  {"text":                          a row over several lines
                 "a"}
    lists       [[{"role": "user", ...}, ...]]    a list of turns is a row as well: one conversation

A row in an array ends where its brackets balance, so what is wrong inside of it costs that row, not the file.  Wrong is
what JSON does not allow (NaN, text that is not UTF-8), and what no reader could be sure about: a key that occurs
twice, nesting deeper than DEPTH (untrusted.py), a row longer than MAX_ROW.
"""

import io
import itertools
import re
from collections.abc import Generator, Iterator
from typing import Any, BinaryIO

from ..errors import DataError, shown
from ..untrusted import DEPTH, parse_json

__all__ = ["MAX_ROW", "WRAPPERS", "BadRow", "is_turn", "parse_row", "parse_value", "stream_rows"]

READ = 1 << 20  # bytes read at once
MAX_ROW = 1 << 26  # bytes of a row: 64 MB
WRAPPERS = ("data", "rows", "train", "examples", "conversations")

Row = tuple[int | str, Any]  # number of its line, from 1 ("1, row 3" where rows share a line); value, or BadRow


class BadRow(Exception):
    """What is wrong with a row; the caller adds file and line."""


# -- one row -----------------------------------------------------------------------------------

_BRACKETS = re.compile(rb'"[^"\\]*(?:\\.[^"\\]*)*"|["\[\]{}]', re.DOTALL)  # a lone " begins a string that does not end
_WRAPPER = re.compile(b'"(?:%s)"[ \t\r\n]*:[ \t\r\n]*\\[' % "|".join(WRAPPERS).encode())
_NO_SPACE = re.compile(rb"[^ \t\r\n]")
_SCALAR = re.compile(rb'[^\s,:"\[\]{}]*')


def is_turn(value: Any) -> bool:
    """Say whether a value is one turn of a conversation, and not a row."""
    if not isinstance(value, dict):
        return False
    return {"from", "value"} <= value.keys() or ("role" in value and not {"content", "tool_calls"}.isdisjoint(value))


def parse_row(raw: bytes | str) -> Any:
    """Return the value of the JSON of one row, or a BadRow that says what is wrong with it."""
    try:
        return parse_value(raw)
    except ValueError as error:
        return BadRow(f"not a JSON object: {error}")


def parse_value(raw: bytes | str) -> Any:
    """Return the value of a JSON text; ValueError says what is wrong with it."""
    data = raw if isinstance(raw, bytes) else raw.encode("utf-8", "surrogatepass")
    if data.count(b"[") + data.count(b"{") > DEPTH and _depth(data) > DEPTH:
        raise ValueError(f"it is nested more than {DEPTH} deep")
    try:
        return parse_json(raw)
    except ValueError as error:
        why = str(error).replace("at line 1, column", "at column")
        if "set_int_max_str_digits" in why:
            why = "a whole number of thousands of digits"
        raise ValueError(why) from None


def _depth(data: bytes) -> int:
    depth = deepest = 0
    for match in _BRACKETS.finditer(data):
        if match[0] in b"[{":
            depth += 1
            deepest = max(deepest, depth)
        elif match[0] in b"]}":
            depth -= 1
    return deepest


# -- many --------------------------------------------------------------------------------------


def stream_rows(file: BinaryIO, name: str) -> Iterator[Row]:
    """Yield (line, value) of the rows of a file; a row that is not JSON comes as a BadRow.

    DataError naming file:line where a document breaks off, so that the rest of it cannot be found.
    """
    cursor = _Cursor(file, name)
    if cursor.peek() and not cursor.is_document():
        yield from cursor.lines()
    elif cursor.peek() == b"[":
        line = cursor.line
        cursor.take()
        turns = yield from _rows_or_turns(_elements(cursor))
        if turns is not None:
            yield line, turns
        yield from cursor.nothing_more() if turns is None else cursor.lines()
    elif cursor.peek():
        wrapper = yield from _object_rows(cursor)
        yield from cursor.nothing_more() if wrapper else cursor.lines()


def _elements(cursor: "_Cursor") -> Iterator[Row]:
    """Yield the elements of an array whose bracket was taken."""
    if cursor.peek() == b"]":
        cursor.take()
        return
    before: int | str = cursor.line
    for number in itertools.count(1):
        line, value = cursor.value()
        yield line if line != before else f"{line}, row {number}", value
        before = line
        mark = cursor.peek()
        if mark not in (b",", b"]"):
            raise cursor.error('expected "," or "]" after an element of the JSON array')
        cursor.take()
        if mark == b"]":
            return


def _rows_or_turns(elements: Iterator[Row]) -> Generator[Row, None, Any]:
    """Yield the elements as rows; or, if they are turns, yield none of them and return the one row that they are."""
    first = next(elements, None)
    if first is None:
        return None
    if not is_turn(first[1]):
        yield first
        yield from elements
        return None
    turns = [first[1], *(value for _, value in elements)]
    return next((value for value in turns if isinstance(value, BadRow)), turns)


def _object_rows(cursor: "_Cursor") -> Generator[Row, None, bool]:
    """Yield the rows of the object that begins here, and return whether it was a wrapper and not a row itself."""
    begin, wrapper = cursor.line, None
    row: dict[str, Any] = {}
    bad: BadRow | None = None
    for key in _keys(cursor):
        line = cursor.line
        if key in row or key == wrapper:
            bad = BadRow(f"not a JSON object: the key {shown(key)} is given twice")
        if key not in WRAPPERS or cursor.peek() != b"[":
            _, row[key] = cursor.value()
            bad = row[key] if isinstance(row[key], BadRow) else bad
            continue
        cursor.take()
        elements = _elements(cursor)
        if key == "conversations" and cursor.peek() == b"]":
            row[key] = list(elements)
            continue
        turns = yield from _rows_or_turns(elements)
        if turns is not None and key == "conversations":  # ShareGPT's row, not a wrapper
            row[key] = turns
            continue
        if turns is not None:
            yield line, turns
        if wrapper:
            raise cursor.error(f"there are rows under {wrapper!r} and under {key!r}; keep each in a file of its own")
        wrapper = key
    if not wrapper:
        yield begin, bad or row
    return bool(wrapper)


def _keys(cursor: "_Cursor") -> Iterator[str]:
    """Yield the keys of the object that begins here; the caller takes the value of each before the next."""
    cursor.take()
    if cursor.peek() == b"}":
        cursor.take()
        return
    while True:
        _, key = cursor.value()
        if not isinstance(key, str) or cursor.peek() != b":":
            raise cursor.error('expected a key and ":" in a JSON object')
        cursor.take()
        cursor.peek()
        yield key
        mark = cursor.peek()
        if mark not in (b",", b"}"):
            raise cursor.error('expected "," or "}" after a value of the JSON object')
        cursor.take()
        if mark == b"}":
            return


class _Cursor:
    """A place in a stream of JSON: `line` is its line, and no more than a row is in memory."""

    def __init__(self, file: BinaryIO, name: str) -> None:
        self.file, self.name = file, name
        self.buffer, self.at = b"", 0
        self._line, self._counted = 1, 0  # the line of buffer[_counted]

    @property
    def line(self) -> int:
        """Number of the line of the place, from 1."""
        self._line += self.buffer.count(b"\n", self._counted, self.at)
        self._counted = self.at
        return self._line

    def error(self, why: str) -> DataError:
        """Return the error that ends the reading here."""
        return DataError(f"{self.name}:{self.line}: {why}; correct the file")

    def more(self) -> bool:
        """Read on, at least as much again as waits; return False at the end of the file."""
        _ = self.line
        block = self.file.read(max(READ, len(self.buffer) - self.at))
        self.buffer = self.buffer[self.at :] + block
        self.at = self._counted = 0
        return bool(block)

    def peek(self) -> bytes:
        """Go to the next byte that is no white space and return it; b"" at the end."""
        while True:
            match = _NO_SPACE.search(self.buffer, self.at)
            self.at = len(self.buffer) if match is None else match.start()
            if match is not None or not self.more():
                return self.buffer[self.at : self.at + 1]

    def take(self) -> None:
        """Go one byte further."""
        self.at += 1

    def nothing_more(self) -> Iterator[Row]:
        """Yield nothing; DataError if there is more than white space."""
        if self.peek():
            raise self.error("there is text after the end of the JSON array or object")
        return iter(())

    def value(self) -> Row:
        """Return the line and the value of what begins here, and go past it; BadRow if only its brackets are right."""
        mark, line = self.peek(), self.line
        length = self._balanced() if mark in (b"[", b"{", b'"') else self._scalar()
        raw = self.buffer[self.at : self.at + length]
        self.at += length
        return line, parse_row(raw)

    def _scalar(self) -> int:
        """Return the length of a number or name."""
        while True:
            match = _SCALAR.match(self.buffer, self.at)
            length = len(match[0]) if match else 0
            if self.at + length < len(self.buffer) or length > MAX_ROW or not self.more():
                break
        if not length:
            raise self._broken("expected a value" if self.peek() else "the file ends")
        return length

    def _balanced(self) -> int:
        """Return the length of the string, list or object that begins here."""
        open_, done = bytearray(), 0
        while True:
            for match in _BRACKETS.finditer(self.buffer, self.at + done):
                mark = match[0]
                if mark == b'"':
                    break
                done = match.end() - self.at
                if mark in b"[{":
                    open_ += b"]" if mark == b"[" else b"}"
                elif mark in b"]}":
                    if open_[-1:] != mark:
                        self.at += done - 1
                        raise self._broken(f"{mark.decode()} closes what is not open")
                    del open_[-1:]
                if not open_:
                    return done
            if len(self.buffer) - self.at > MAX_ROW:
                raise self._broken(f"a row of more than {MAX_ROW >> 20} MB")
            if not self.more():
                self.at = len(self.buffer)
                raise self._broken("the file ends")

    def _broken(self, why: str) -> DataError:
        return self.error(f"the JSON breaks off here: {why}")

    def lines(self) -> Iterator[Row]:
        """Yield the rows of the lines from here on; blank lines are skipped."""
        while self.peek():
            line, end = self.line, self._line_end()
            if end < 0:
                yield line, BadRow(f"the line is longer than {MAX_ROW >> 20} MB")
                continue
            raw = self.buffer[self.at : end]
            self.at = end
            yield line, parse_row(raw)

    def _line_end(self) -> int:
        """Return where the line ends, in the buffer; -1 if it is too long, and then it is passed over."""
        too_long = False
        while True:
            end = self.buffer.find(b"\n", self.at)
            if end >= 0 or len(self.buffer) - self.at > MAX_ROW:
                too_long = too_long or end < 0 or end - self.at > MAX_ROW
                if not too_long:
                    return end
                self.at = len(self.buffer) if end < 0 else end
                if end >= 0:
                    return -1
            if not self.more():
                return -1 if too_long else len(self.buffer)

    def is_document(self) -> bool:
        """Say whether what begins here is one array or object of JSON, and not rows, one a line."""
        mark = self.peek()
        if mark != b"{":
            return mark == b"["
        while len(self.buffer) - self.at < READ and self.more():
            pass
        part = self.buffer[self.at : self.at + READ]
        first, _, rest = part.partition(b"\n")
        first, rest = first.rstrip(), rest.lstrip()
        if not rest:  # one line: one value, or the beginning of a very long one; if cut short, it is a bad row
            return len(part) == READ or (_WRAPPER.search(first) is not None and _is_balanced(first))
        # Where a row goes on in the next line, its own line ends, or the next one begins, with what joins the two.
        last, following = first[-1:], rest[:1]
        return last in b"[:" or following in b"}],:" or (last in b"{," and following == b'"')


def _is_balanced(text: bytes) -> bool:
    cursor = _Cursor(io.BytesIO(text), "")
    try:
        return bool(cursor.peek()) and cursor._balanced() == len(text)
    except DataError:
        return False
