"""Calls of tools inside an answer: written as text, and read back from what a model wrote.

    deepzig    prose                            qwen    prose
                                                        <tool_call>
               <tool>name</tool>                        {"name": "name", "arguments": {"city": "Rome"}}
               {"city": "Rome"}                         </tool_call>

In the DeepZig form there is an empty line before and after a call, and the arguments are one JSON object on one line.
What a template writes for the model to read is read back by `parse_signatures` and `parse_results`:

    deepzig    <system>prose                        qwen    # Tools ... <tools>
                                                            {"type": "function", "function": {"name": "name", ...}}
               <tool>name</tool>                            </tools>
               {"name": "name", ...}</system>
               </assistant><tool>result</tool>              <tool_response>
                                                            result
                                                            </tool_response>

A model makes mistakes: `parse_tool_calls` never raises for them, and never drops them.  A call that cannot be read is a
`BadToolCall` in its place among the parts, with line, column, reason, and the text as it was.
"""

import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from ..errors import ConfigError, DataError, shown
from ..untrusted import JSON
from .json_rows import parse_value

__all__ = [
    "FORMS",
    "BadToolCall",
    "ParsedAnswer",
    "ToolCall",
    "parse_results",
    "parse_signatures",
    "parse_tool_calls",
    "read_call",
    "render_tool_calls",
]

FORMS = ("deepzig", "qwen")

_SPACE = re.compile(r"\s*")


@dataclass(frozen=True)
class ToolCall:
    """One call: the tool's name, its arguments as a JSON object, and the id by which a result refers to it."""

    name: str
    arguments: dict[str, Any] = field(default_factory=dict)
    id: str | None = None


@dataclass(frozen=True)
class BadToolCall:
    """A call that cannot be read: why, where (line and column of the text, from 1), and the text as it was."""

    reason: str
    line: int
    column: int
    text: str

    def __str__(self) -> str:
        return f"line {self.line}, column {self.column}: {self.reason}; the call is {shown(self.text)}"


@dataclass(frozen=True)
class ParsedAnswer:
    """An answer in its parts, in order: prose (str), ToolCall, BadToolCall."""

    parts: tuple[str | ToolCall | BadToolCall, ...]

    @property
    def prose(self) -> str:
        """The prose, its pieces joined by an empty line."""
        return "\n\n".join(part for part in self.parts if isinstance(part, str))

    @property
    def calls(self) -> list[ToolCall]:
        """The calls that could be read."""
        return [part for part in self.parts if isinstance(part, ToolCall)]

    @property
    def problems(self) -> list[BadToolCall]:
        """The calls that could not."""
        return [part for part in self.parts if isinstance(part, BadToolCall)]


def check_form(form: str) -> None:
    """Raise ConfigError for an unknown form."""
    if form not in FORMS:
        raise ConfigError(f"form ({form!r}) must be {' or '.join(FORMS)}")


def render_tool_calls(parts: str | ToolCall | Iterable[str | ToolCall], form: str) -> str:
    """Return prose and calls as the text of an answer; DataError for a call that the form cannot hold."""
    check_form(form)
    if isinstance(parts, str | ToolCall):
        parts = [parts]
    texts = [part if isinstance(part, str) else _render(part, form) for part in parts if part != ""]
    return ("\n\n" if form == "deepzig" else "\n").join(texts)


def _render(call: ToolCall, form: str) -> str:
    if not call.name.strip() or re.search(r'[<>"\\\n]', call.name):
        raise DataError(f"a tool's name must be a word without < > \" \\ or line breaks, got {call.name!r}; rename it")
    try:
        arguments = json.dumps(call.arguments, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise DataError(f"the arguments of {call.name} must be values of JSON: {error}") from None
    if form == "deepzig":
        return f"<tool>{call.name}</tool>\n{arguments}"
    return f'<tool_call>\n{{"name": "{call.name}", "arguments": {arguments}}}\n</tool_call>'


class _Bad(Exception):
    """Why a call cannot be read, at which character, and where its text ends."""

    def __init__(self, reason: str, at: int, end: int) -> None:
        self.reason, self.at, self.end = reason, at, end


def parse_tool_calls(text: str, form: str) -> ParsedAnswer:
    """Return the prose, the calls and the broken calls of an answer that a model wrote.  Raises for no text."""
    check_form(form)
    opening = re.compile(re.escape("<tool>" if form == "deepzig" else "<tool_call>"))
    read = _read_deepzig if form == "deepzig" else _read_qwen
    parts: list[str | ToolCall | BadToolCall] = []
    at = 0
    while (found := opening.search(text, at)) is not None:
        _add_prose(parts, text[at : found.start()])
        try:
            call, at = read(text, found.end())
            parts.append(call)
        except _Bad as bad:
            before = text[: bad.at]
            column = bad.at - (before.rfind("\n") + 1) + 1
            raw = text[found.start() : bad.end].rstrip()
            parts.append(BadToolCall(bad.reason, before.count("\n") + 1, column, raw))
            at = bad.end
    _add_prose(parts, text[at:])
    return ParsedAnswer(tuple(parts))


def _add_prose(parts: list[str | ToolCall | BadToolCall], text: str) -> None:
    if text.strip():
        parts.append(text.strip())


def _read_deepzig(text: str, at: int) -> tuple[ToolCall, int]:
    """Read name, closing tag and arguments; `at` is after the opening tag."""
    close = text.find("</tool>", at)
    line_end = _line_end(text, at)
    if close < 0 or "<tool>" in text[at:close]:
        raise _Bad("<tool> is not closed by </tool>", at, line_end)
    name = text[at:close].strip()
    after = close + len("</tool>")
    start = _SPACE.match(text, after).end()  # type: ignore[union-attr]
    if not name or "\n" in name:
        raise _Bad("the name of the tool must be one word", at, _line_end(text, start))
    if text[start : start + 1] != "{":
        raise _Bad("expected a JSON object of arguments after </tool>", start, after)
    arguments, end = _read_json(text, start)
    return ToolCall(name, arguments), end


def _read_qwen(text: str, at: int) -> tuple[ToolCall, int]:
    """Read the JSON object and the closing tag; `at` is after the opening tag."""
    # Where the JSON is whole, its own end counts: a string inside of it may name the tags.
    ends = [found for tag in ("</tool_call>", "<tool_call>") if (found := text.find(tag, at)) >= 0]
    end = min(ends, default=len(text))
    end += len("</tool_call>") if text.startswith("</tool_call>", end) else 0
    start = _SPACE.match(text, at).end()  # type: ignore[union-attr]
    if text[start : start + 1] != "{":
        raise _Bad('expected a JSON object {"name": ..., "arguments": {...}} after <tool_call>', start, end)
    value, after = _read_json(text, start, end)
    close = _SPACE.match(text, after).end()  # type: ignore[union-attr]
    if not text.startswith("</tool_call>", close):
        raise _Bad("expected </tool_call> after the JSON object", close, max(end, after))
    try:
        return read_call(value), close + len("</tool_call>")
    except ValueError as error:
        raise _Bad(str(error), start, close + len("</tool_call>")) from None


def parse_signatures(text: str, form: str) -> list[dict[str, Any]]:
    """Return the signatures in the text of a conversation, as {"type": "function", "function": {...}} each.

    DataError for one that is not JSON: a template wrote it, not a model.
    """
    check_form(form)
    try:
        return list((_signatures_deepzig if form == "deepzig" else _signatures_qwen)(text))
    except _Bad as bad:
        raise DataError(f"the signature of a tool cannot be read at character {bad.at}: {bad.reason}") from None


def _signatures_deepzig(text: str) -> Iterator[dict[str, Any]]:
    opening = "<tool>"
    begins = text.find("<system>")
    at = text.find(opening, begins)
    if begins < 0 or at < 0 or "</system>" in text[begins:at]:
        return
    while text.startswith(opening, at):
        call, at = _read_deepzig(text, at + len(opening))
        yield {"type": "function", "function": call.arguments}
        at += len("\n\n")


def _signatures_qwen(text: str) -> Iterator[dict[str, Any]]:
    begins = text.find("<tools>\n")
    at = begins + len("<tools>\n")
    while begins >= 0 and text.startswith("{", at):
        value, at = _read_json(text, at)
        yield value
        at += len("\n")


_RESULTS = {
    "deepzig": re.compile(r"(?:(?<=</assistant>)|(?<=</tool>))<tool>(.*?)</tool>(?=<)", re.DOTALL),
    "qwen": re.compile(r"<tool_response>\n(.*?)\n</tool_response>", re.DOTALL),
}


def parse_results(text: str, form: str) -> list[str]:
    """Return the results of tools in the text of a conversation, in order.

    A result that has the closing tag in its own text ends there; as token ids the two are never confused.
    """
    check_form(form)
    return _RESULTS[form].findall(text)


def read_call(value: Any, call_id: str | None = None) -> ToolCall:
    """Return the call of {"name": ..., "arguments": {...}}; ValueError says what is wrong with it.

    The arguments may be a string of JSON, as the OpenAI interface writes them; missing or empty means no arguments.
    """
    if not isinstance(value, dict) or not isinstance(value.get("name"), str) or not value["name"].strip():
        raise ValueError("a tool call must have a 'name', which is a string")
    arguments = value.get("arguments")
    if arguments is None or arguments == "":
        arguments = {}
    if isinstance(arguments, str):
        try:
            arguments = parse_value(arguments)
        except ValueError as error:
            raise ValueError(f"the 'arguments' of {shown(value['name'])} are no JSON: {error}") from None
    if not isinstance(arguments, dict):
        raise ValueError(f"the 'arguments' of {shown(value['name'])} must be a JSON object")
    return ToolCall(value["name"], arguments, call_id)


def _read_json(text: str, start: int, limit: int | None = None) -> tuple[Any, int]:
    """Return the JSON value at `start` and where it ends; a broken one ends at `limit`, or with its line."""
    end = _line_end(text, start) if limit is None else limit
    try:
        return JSON.raw_decode(text, start)
    except json.JSONDecodeError as error:
        raise _Bad(f"the JSON is broken: {error.msg}", error.pos, max(end, error.pos)) from None
    except RecursionError:
        raise _Bad("the JSON is nested too deeply", start, end) from None
    except ValueError as error:
        raise _Bad(f"the JSON is broken: {error}", start, end) from None


def _line_end(text: str, at: int) -> int:
    end = text.find("\n", at)
    return len(text) if end < 0 else end
