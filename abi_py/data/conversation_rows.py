"""Conversations from the rows of the usual formats.

    Alpaca              {"instruction": "Add.", "input": "1 2", "output": "3"}            input may be missing
    Dolly, custom       {"instruction": "Add.", "context": "1 2", "response": "3"}        or "input" for "context"
    ShareGPT            {"conversations": [{"from": "human", "value": "..."}, {"from": "gpt", "value": "..."}]}
    messages (OpenAI)   {"messages": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]}
    a list of turns     [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]
    prompt/completion   {"prompt": "Add 1 2.", "completion": "3"}                         or lists of turns (TRL)
    text, content       {"text": "..."}                                                   no turns: all of it is trained

A turn has `from` and `value`, or `role` and `content`, under either name of the list.  Of a prompt that is a list of
turns nothing is trained, as in TRL.

A row's format is the first of these whose keys it has, with values that are not null.  Beside them a row may have
`system` (a string), `history` (pairs of strings), `tools` (signatures, a list or its JSON), and `category` or
`pattern`.  CodeAlpaca is Alpaca.  Other keys ("id", "source"...) are not read.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

from ..errors import DataError, shown
from ..untrusted import holds_half
from .conversation import Conversation, Message
from .json_rows import is_turn, parse_value
from .rows import LEAVE_OUT, BadRow, Source, kind, list_keys, open_rows, text_value
from .toolcalls import ToolCall, read_call

__all__ = ["RowReader", "has_turns", "read_conversation"]

ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "function_call": "assistant",
    "tool": "tool",
    "function": "tool",
    "observation": "tool",
    "function_response": "tool",
}


class RowReader:
    """The conversations of a source, one after the other: `for conversation in RowReader(path)`.

    A bad row is a DataError naming file:line, the keys it has and those it should have; with skip_bad_rows it is left
    out and its message kept in `skipped`.  OSError for a source that cannot be opened comes at once.
    """

    def __init__(self, source: Source, *, skip_bad_rows: bool = False) -> None:
        """Open the source; see `rows.open_rows` for what it may be."""
        self.name, self._rows = open_rows(source)
        self.skip_bad_rows = skip_bad_rows
        self.skipped: list[str] = []
        self.count = 0

    def __iter__(self) -> Iterator[Conversation]:
        """Yield the conversations."""
        for line, row in self._rows:
            self.count += 1
            try:
                if isinstance(row, BadRow):
                    raise row
                conversation = read_conversation(row, f"{self.name}:{line}")
            except BadRow as bad:
                self.reject(f"{self.name}:{line}: {bad}")
            else:
                yield conversation

    def reject(self, message: str) -> None:
        """Raise the message about a row, or keep it if bad rows are left out."""
        if not self.skip_bad_rows:
            raise DataError(f"{message}; correct the row, or {LEAVE_OUT}")
        self.skipped.append(message)


# -- formats -----------------------------------------------------------------------------------


def read_conversation(row: Any, place: str = "") -> Conversation:
    """Return the conversation of a row, or of a list of turns; BadRow says what is wrong with it."""
    if isinstance(row, list) and row and is_turn(row[0]):
        row = {"messages": row}
    if not isinstance(row, dict):
        raise BadRow(f"a row must be a JSON object, found {kind(row)}")
    form = _format_of(row)
    if form is not None:
        messages, text = form.read(row)
        return Conversation(tuple(messages), text, _tools(row), _category(row), place)
    wanted = "; ".join(f"{' and '.join(map(repr, each.keys))} ({each.name})" for each in FORMATS)
    raise BadRow(f"found the keys {list_keys(row)}; expected {wanted}")


def has_turns(row: Any) -> bool:
    """Say whether a row is in one of the formats with turns, not plain text or something else."""
    if isinstance(row, list):
        return bool(row) and is_turn(row[0])
    form = _format_of(row) if isinstance(row, dict) else None
    return form is not None and form.has_turns


Read = tuple[list[Message], str | None]


def _instruction(answer: str, row: dict[str, Any]) -> Read:
    _refuse_both(row, "output", "response")
    asked = Message("user", text_value(row["instruction"], "instruction"), _context(row))
    return [*_before(row), asked, Message("assistant", text_value(row[answer], answer))], None


def _list_of_turns(key: str, row: dict[str, Any]) -> Read:
    if key == "messages" and row.get("functions"):
        raise BadRow("'functions' is the old form of the signatures; write them as 'tools'")
    return [*_before(row), *_turns(row[key], key)], None


def _prompt(row: dict[str, Any]) -> Read:
    prompt, completion = _said(row, "prompt", "user"), _said(row, "completion", "assistant")
    asked = [replace(each, trained=False) if each.role == "assistant" else each for each in prompt]
    return [*_before(row), *asked, *completion], None


def _said(row: dict[str, Any], key: str, role: str) -> list[Message]:
    """Return the turns of a prompt or a completion: a list of them, or the text of one."""
    if isinstance(row[key], list):
        return _turns(row[key], key)
    return [Message(role, text_value(row[key], key))]


def _plain(key: str, row: dict[str, Any]) -> Read:
    return [], text_value(row[key], key)


class Format(NamedTuple):
    """The keys of a row, what the format is called, and what reads such a row."""

    keys: tuple[str, ...]
    name: str
    read: Callable[[dict[str, Any]], Read]
    has_turns: bool = True


FORMATS = (
    Format(("instruction", "output"), "Alpaca", partial(_instruction, "output")),
    Format(("instruction", "response"), "Dolly", partial(_instruction, "response")),
    Format(("conversations",), "ShareGPT", partial(_list_of_turns, "conversations")),
    Format(("messages",), "OpenAI", partial(_list_of_turns, "messages")),
    Format(("prompt", "completion"), "prompt and completion", _prompt),
    Format(("text",), "text", partial(_plain, "text"), has_turns=False),
    Format(("content",), "content", partial(_plain, "content"), has_turns=False),
)


def _format_of(row: dict[str, Any]) -> Format | None:
    """Return the format of a row, or None if its keys are those of none."""
    # A table made of several sets has all their columns, null where a row has none: null is as good as missing.
    for present in (lambda key: row.get(key) is not None, lambda key: key in row):
        for each in FORMATS:
            if all(map(present, each.keys)):
                return each
    return None


def _refuse_both(row: dict[str, Any], one: str, other: str) -> None:
    """Raise if a row says two things where one is read."""
    if row.get(one) and row.get(other) and row[one] != row[other]:
        raise BadRow(f"it has both '{one}' and '{other}', which differ; keep one of them")


def _optional(row: dict[str, Any], key: str) -> str | None:
    value = row.get(key)
    return None if value is None else text_value(value, key, may_be_empty=True)


def _context(row: dict[str, Any]) -> str | None:
    _refuse_both(row, "input", "context")
    first, second = _optional(row, "input"), _optional(row, "context")
    return first or second or (first if first is not None else second)


def _before(row: dict[str, Any]) -> list[Message]:
    """Return what a row says before its own turns: system message and history."""
    system, history = _optional(row, "system"), row.get("history")
    messages = [Message("system", system)] if system else []
    if history is None:
        history = []
    if not isinstance(history, list) or not all(isinstance(pair, list) and len(pair) == 2 for pair in history):
        raise BadRow("'history' must be a list of [question, answer] pairs")
    for question, answer in history:
        messages.append(Message("user", text_value(question, "history question")))
        messages.append(Message("assistant", text_value(answer, "history answer"), trained=False))
    return messages


def _category(row: dict[str, Any]) -> str | None:
    value = row.get("category") if row.get("category") is not None else row.get("pattern")
    return None if value is None else text_value(value, "category", may_be_empty=True)


def _tools(row: dict[str, Any]) -> tuple[dict[str, Any], ...] | None:
    tools = row.get("tools")
    if isinstance(tools, str) and tools.strip():
        tools = _parsed(tools, "'tools' is a string, but not of JSON")
    if not tools:
        return None
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise BadRow(f"'tools' must be a list of objects, found {kind(tools)}")
    _check_characters(tools, "'tools'")
    return tuple(tools)


def _parsed(text: str, what: str) -> Any:
    try:
        return parse_value(text)
    except ValueError as error:
        raise BadRow(f"{what}: {error}") from None


def _check_characters(value: Any, what: str) -> None:
    """Raise for half of a character in any string of a value: no tokenizer could encode it."""
    if holds_half(value):
        raise BadRow(f"{what} holds half of a character (a lone surrogate)")


# -- turns -------------------------------------------------------------------------------------


def _turns(turns: Any, key: str) -> list[Message]:
    if not isinstance(turns, list) or not turns:
        found = "an empty list" if turns == [] else kind(turns)
        raise BadRow(f"'{key}' must be a list of turns, found {found}")
    names = ("from", "value") if key == "conversations" else ("role", "content")
    return [_turn(turn, i, *names) for i, turn in enumerate(turns)]


def _turn(turn: Any, i: int, speaker: str, text: str) -> Message:
    """Return turn `i`; `speaker` and `text` are the keys that it should have, if it does not have the others."""
    if is_turn(turn):
        speaker, text = ("from", "value") if turn.get("from") is not None else ("role", "content")
    calls = isinstance(turn, dict) and (turn.get("tool_calls") or turn.get("function_call"))
    if not isinstance(turn, dict) or speaker not in turn or (text not in turn and not calls):
        found = list_keys(turn) if isinstance(turn, dict) else kind(turn)
        raise BadRow(f"turn {i}: found {found}; expected the keys '{speaker}' and '{text}'")
    who = turn[speaker]
    if not isinstance(who, str) or who not in ROLES:
        raise BadRow(f"turn {i}: '{speaker}' is {shown(who)}; expected {', '.join(ROLES)}")
    if who == "function_call":
        value = text_value(turn[text], f"turn {i} {text}")
        return Message("assistant", "", tool_calls=_calls([_parsed(value, f"turn {i}: the call is no JSON")], i))
    role, value = ROLES[who], _content(turn.get(text), f"turn {i} {text}", optional=bool(calls) or ROLES[who] == "tool")
    if calls and role != "assistant":
        raise BadRow(f"turn {i}: only an assistant can call tools, this turn is from {who}")
    made = _calls(turn.get("tool_calls") or [turn["function_call"]], i) if calls else ()
    weight = turn.get("weight", 1)
    if weight is not None and weight not in (0, 1):
        raise BadRow(f"turn {i}: 'weight' is {shown(weight)}; it must be 0 or 1")
    read = {speaker, text, "role", "content", "tool_calls", "function_call", "weight", "name", "tool_call_id"}
    extra = {key: inner for key, inner in turn.items() if key not in read and inner is not None}
    _check_characters(extra, f"turn {i}")
    return Message(
        role,
        value,
        tool_calls=made,
        name=_optional(turn, "name"),
        tool_call_id=_optional(turn, "tool_call_id"),
        trained=weight is None or bool(weight),
        extra=extra,
    )


def _content(value: Any, key: str, optional: bool) -> str:
    """Return the text of a turn; a list of parts, as OpenAI writes it, is joined."""
    if isinstance(value, list):
        parts = []
        for part in value:
            if not isinstance(part, dict) or part.get("type") != "text":
                found = shown(part.get("type")) if isinstance(part, dict) else kind(part)
                raise BadRow(f"'{key}' has a part of type {found}; only text can be read")
            parts.append(text_value(part.get("text"), key, may_be_empty=True))
        value = "".join(parts)
    if value is None and optional:
        return ""
    return text_value(value, key, may_be_empty=optional)


def _calls(calls: Any, i: int) -> tuple[ToolCall, ...]:
    if not isinstance(calls, list):
        raise BadRow(f"turn {i}: 'tool_calls' must be a list, found {kind(calls)}")
    made = []
    for call in calls:
        call_id = call.get("id") if isinstance(call, dict) else None
        function = call.get("function", call) if isinstance(call, dict) else call
        try:
            made.append(read_call(function, call_id if isinstance(call_id, str) else None))
        except ValueError as error:
            raise BadRow(f"turn {i}: {error}") from None
        _check_characters([made[-1].name, made[-1].arguments, made[-1].id], f"turn {i}: the call")
    return tuple(made)
