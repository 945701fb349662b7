"""A conversation: its turns, or its plain text; what every format of rows becomes (`conversation_rows.py`)."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from .toolcalls import ToolCall

__all__ = ["Conversation", "Message", "Tools", "Turns", "turns_and_tools"]

# What chat templates read: {"role": ..., "content": ...} each, and the signatures of tools.
Turns: TypeAlias = Sequence[Mapping[str, Any]]
Tools: TypeAlias = Sequence[Mapping[str, Any]] | None


@dataclass(frozen=True)
class Message:
    """One turn.

    role        system, user, assistant or tool (the result of a call)
    content     its text; of an assistant that only calls tools, empty
    context     what the text of a user works on (Alpaca's input, Dolly's context), or None
    tool_calls  what an assistant calls
    name, tool_call_id   of a result: which tool, which call; a name also of other speakers
    extra       other keys of the turn (reasoning_content ...), as they are: templates read them
    trained     is this answer trained?  Not those of Alpaca's history, and not those of OpenAI's "weight": 0
    """

    role: str
    content: str
    context: str | None = None
    tool_calls: tuple[ToolCall, ...] = ()
    name: str | None = None
    tool_call_id: str | None = None
    trained: bool = True
    extra: Mapping[str, Any] = field(default_factory=dict, hash=False)

    def to_dict(self) -> dict[str, Any]:
        """Return the turn as chat templates want it; a context is joined to the content, and given apart as well."""
        made: dict[str, Any] = {**self.extra, "role": self.role, "content": self.content}
        if self.context:
            made.update(content=f"{self.content}\n\n{self.context}", instruction=self.content, context=self.context)
        if self.tool_calls:
            made["tool_calls"] = [
                {
                    "type": "function",
                    **({"id": call.id} if call.id else {}),
                    "function": {"name": call.name, "arguments": call.arguments},
                }
                for call in self.tool_calls
            ]
        result = {"name": self.name, "tool_call_id": self.tool_call_id}
        return {**made, **{key: value for key, value in result.items() if value is not None}}


@dataclass(frozen=True)
class Conversation:
    """The turns of a row, or its plain text.

    messages  the turns; empty if the row is plain text
    text      the plain text of a row without turns, else None
    tools     signatures of the tools that may be called, as JSON schemas, or None
    category  the row's category or pattern, or None
    place     file:line, for messages
    """

    messages: tuple[Message, ...]
    text: str | None = None
    tools: tuple[dict[str, Any], ...] | None = None
    category: str | None = None
    place: str = field(default="", compare=False)

    def to_dicts(self) -> list[dict[str, Any]]:
        """Return the turns as chat templates want them."""
        return [message.to_dict() for message in self.messages]

    @property
    def calls_tools(self) -> bool:
        """Say whether tools are called, or their signatures given, or calls are in the text of an answer."""
        answers = [message for message in self.messages if message.role == "assistant"]
        tags = ("<tool>", "<tool_call>")
        return bool(self.tools) or any(m.tool_calls or any(tag in m.content for tag in tags) for m in answers)

    def strings(self) -> Iterator[str]:
        """Yield every text of it: what a pattern is looked for in."""
        if self.text is not None:
            yield self.text
        for message in self.messages:
            yield message.content
            if message.context:
                yield message.context
            yield from (value for value in message.extra.values() if isinstance(value, str))
            for call in message.tool_calls:
                yield call.name
                yield json.dumps(call.arguments, ensure_ascii=False)


def turns_and_tools(messages: Turns | Conversation, tools: Tools) -> tuple[Turns, Tools]:
    """Return turns and tools as chat templates want them; a Conversation gives its own tools where none are named."""
    if isinstance(messages, Conversation):
        return messages.to_dicts(), tools or messages.tools
    return messages, tools
