"""Read instruction data: Alpaca and ShareGPT rows, as JSON lines or as one JSON array.

    Alpaca     {"instruction": "Add.", "input": "1 2", "output": "3"}
               input may be missing; system (string) and history (pairs of strings) may be there
    ShareGPT   {"conversations": [{"from": "system", "value": "..."},        at most one, and first
                                  {"from": "human", "value": "..."}, {"from": "gpt", "value": "..."}, ...]}

A conversation of k questions and answers gives k samples.  Sample i asks question i, and `history` holds the pairs
before it, so each answer is trained on once, with all that was said before.  Other keys of a row ("id", "source"...)
are not read.
"""

import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import DataError

SPEAKERS = {"human": "human", "user": "human", "gpt": "gpt", "assistant": "gpt", "system": "system"}


@dataclass(frozen=True)
class InstructionSample:
    """One question and the answer to learn.

    instruction  what is asked; never empty
    input        what the instruction works on; None if the row has none
    output       the answer; never empty
    system       the system message of the conversation, or None
    history      earlier (question, answer) pairs of the conversation, oldest first
    """

    instruction: str
    input: str | None
    output: str
    system: str | None = None
    history: tuple[tuple[str, str], ...] = field(default=())


class InstructionList(list[InstructionSample]):
    """The samples of a data set; `skipped` holds one message for each row that was left out."""

    def __init__(self, samples: Iterable[InstructionSample] = (), skipped: Iterable[str] = ()) -> None:
        super().__init__(samples)
        self.skipped: list[str] = list(skipped)


class _BadRow(Exception):
    """What is wrong with a row; the caller adds file and line."""


def parse_instruction_dataset(
    source: str | bytes | os.PathLike[str] | Iterable[str], *, skip_bad_rows: bool = False
) -> InstructionList:
    """Return the samples of `source`: a path, the text itself, or its lines.

    A str is text if it has a line break or begins with "{" or "["; otherwise it is a path.  A text that begins with "["
    is one JSON array, otherwise each line that is not blank is one JSON object.

    A bad row is a DataError naming file:line, the keys it has and those it should have; with skip_bad_rows=True it is
    left out and its message kept in `.skipped`.  DataError too if no row is left.  OSError passes through.
    """
    name, data = _read(source)
    samples, skipped = InstructionList(), []
    for line, row in _rows(data, name):
        try:
            samples.extend(_samples(row))
        except _BadRow as bad:
            message = f"{name}:{line}: {bad}"
            if not skip_bad_rows:
                raise DataError(f"{message}; correct the row, or leave out such rows with skip_bad_rows=True") from None
            skipped.append(message)
    if not samples:
        why = f"all {len(skipped)} rows are bad, the first: {skipped[0]}" if skipped else "it has no rows"
        raise DataError(f"{name} holds no samples: {why}; give Alpaca or ShareGPT rows as JSON lines or a JSON array")
    samples.skipped = skipped
    return samples


def _read(source: str | bytes | os.PathLike[str] | Iterable[str]) -> tuple[str, bytes | list[str]]:
    """Return a name for messages, and the whole text as bytes or as lines."""
    if isinstance(source, bytes):
        return "text", source
    if isinstance(source, str):
        if not source.strip() or "\n" in source or source.lstrip("\ufeff \t\r")[:1] in ("{", "["):
            return "text", source.encode("utf-8", "surrogatepass")
        source = Path(source)
    if isinstance(source, os.PathLike):
        return os.fspath(source), Path(source).read_bytes()
    return "lines", list(source)


def _rows(data: bytes | list[str], name: str) -> Iterator[tuple[int, Any]]:
    """Yield (line number, row); a row that is not JSON comes as a _BadRow for the caller to raise."""
    if isinstance(data, bytes):
        data = data.removeprefix(b"\xef\xbb\xbf")  # a byte order mark that some editors write
        if data.lstrip()[:1] == b"[":
            yield from _array_rows(data, name)
            return
    # Only "\n" ends a line: str.splitlines would also break at U+2028, which JSON allows inside a string.
    lines: list[Any] = data.split(b"\n") if isinstance(data, bytes) else data
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            yield number, json.loads(line.decode("utf-8") if isinstance(line, bytes) else line)
        except UnicodeDecodeError as error:
            yield number, _BadRow(f"byte {error.start} of the line is not UTF-8 ({error.reason})")
        except json.JSONDecodeError as error:
            yield number, _BadRow(f"not a JSON object: {error.msg} at column {error.colno}")
        except RecursionError:
            yield number, _BadRow("not a JSON object of this kind: it is nested too deeply")


def _array_rows(data: bytes, name: str) -> Iterator[tuple[int, Any]]:
    """Yield (line number, element) of one JSON array.  Where its syntax breaks the rest cannot be found: DataError."""
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise DataError(
            f"{name}:{line}: byte {error.start} of the file is not UTF-8; convert the file to UTF-8"
        ) from None
    decoder = json.JSONDecoder()
    line, counted = 1, 0

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
            why = "nested too deeply" if isinstance(error, RecursionError) else f"{error.msg} at line {error.lineno}"
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


def _samples(row: Any) -> list[InstructionSample]:
    if isinstance(row, _BadRow):
        raise row
    if not isinstance(row, dict):
        raise _BadRow(f"a row must be a JSON object, found {_kind(row)}")
    if "conversations" in row:
        return _sharegpt(row["conversations"])
    if "instruction" in row and "output" in row:
        return [_alpaca(row)]
    found = ", ".join(map(repr, row)) or "none"
    raise _BadRow(f"found the keys {found}; expected 'instruction' and 'output' (Alpaca) or 'conversations' (ShareGPT)")


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "a string", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number")


def _text(value: Any, key: str, *, may_be_empty: bool = False) -> str:
    if not isinstance(value, str):
        raise _BadRow(f"'{key}' must be a string, found {_kind(value)}")
    if not may_be_empty and not value.strip():
        raise _BadRow(f"'{key}' is empty; it must hold text")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:  # JSON can write half of a surrogate pair, which is no character
        code = f"\\u{ord(value[error.start]):04x}"
        raise _BadRow(f"'{key}' holds {code}, half of a character, at character {error.start}") from None
    return value


def _optional(row: dict[str, Any], key: str) -> str | None:
    value = row.get(key)
    return None if value is None else _text(value, key, may_be_empty=True)


def _alpaca(row: dict[str, Any]) -> InstructionSample:
    history = row.get("history")
    if history is None:
        history = []
    if not isinstance(history, list) or not all(isinstance(pair, list) and len(pair) == 2 for pair in history):
        raise _BadRow("'history' must be a list of [question, answer] pairs")
    return InstructionSample(
        instruction=_text(row["instruction"], "instruction"),
        input=_optional(row, "input"),
        output=_text(row["output"], "output"),
        system=_optional(row, "system"),
        history=tuple((_text(q, "history question"), _text(a, "history answer")) for q, a in history),
    )


def _sharegpt(turns: Any) -> list[InstructionSample]:
    if not isinstance(turns, list) or not turns:
        found = "an empty list" if turns == [] else _kind(turns)
        raise _BadRow(f"'conversations' must be a list of turns, found {found}")
    spoken = []
    for i, turn in enumerate(turns):
        if not isinstance(turn, dict) or "from" not in turn or "value" not in turn:
            found = ", ".join(map(repr, turn)) if isinstance(turn, dict) else _kind(turn)
            raise _BadRow(f"turn {i}: found {found}; expected the keys 'from' and 'value'")
        speaker = SPEAKERS.get(turn["from"]) if isinstance(turn["from"], str) else None
        if speaker is None:
            raise _BadRow(f"turn {i}: 'from' is {turn['from']!r}; expected human, gpt or system")
        spoken.append((speaker, _text(turn["value"], f"turn {i} value")))
    system = spoken.pop(0)[1] if spoken[0][0] == "system" else None
    for i, (speaker, _) in enumerate(spoken):
        wanted = "human" if i % 2 == 0 else "gpt"
        if speaker != wanted:
            at = i + (system is not None)
            raise _BadRow(
                f"turn {at} is from {speaker}, expected {wanted}: one system turn at most, then human and gpt in turn"
            )
    if not spoken or len(spoken) % 2:
        raise _BadRow("the conversation ends without an answer from gpt")
    pairs = [(spoken[i][1], spoken[i + 1][1]) for i in range(0, len(spoken), 2)]
    return [
        InstructionSample(question, None, answer, system, history=tuple(pairs[:i]))
        for i, (question, answer) in enumerate(pairs)
    ]
