"""The ABI's view of instruction data: one sample for each question and its answer.

Rows of every format that `conversation.py` reads.  A conversation of k questions and answers gives k samples.  Sample i
asks question i, and `history` holds the pairs before it, so each answer is trained on once, with all that was said
before; an answer that is not to be trained (Alpaca's own history) gives none.  To train on whole conversations, with
templates, tools and masks, use `ChatDataset`.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field

from ..errors import DataError
from ..reprs import Shown
from .conversation import Conversation
from .conversation_rows import RowReader
from .rows import BadRow, Source

__all__ = ["InstructionList", "InstructionSample", "parse_instruction_dataset"]


@dataclass(frozen=True)
class InstructionSample(Shown):
    """One question and the answer to it.

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


def parse_instruction_dataset(source: Source, *, skip_bad_rows: bool = False) -> InstructionList:
    """Return the samples of `source`: a path, the text itself, or its lines.

    A str is text if it has a line break or begins with "{" or "["; otherwise it is a path.  A text that begins with "["
    is one JSON array, otherwise each line that is not blank is one JSON object.

    A bad row is a DataError naming file:line, the keys it has and those it should have; with skip_bad_rows=True it is
    left out and its message kept in `.skipped`.  Bad is also what no sample can hold: plain text, tools, turns that are
    not question and answer in turn.  DataError too if no row is left.  OSError passes through.
    """
    rows = RowReader(source, skip_bad_rows=skip_bad_rows)
    samples = InstructionList()
    for conversation in rows:
        try:
            samples.extend(_samples(conversation))
        except BadRow as bad:
            rows.reject(f"{conversation.place}: {bad}")
    if not samples:
        skipped = rows.skipped
        why = f"no row is good, the first of {len(skipped)}: {skipped[0]}" if skipped else "it has no rows"
        raise DataError(
            f"{rows.name} holds no samples: {why}; give Alpaca or ShareGPT rows as JSON lines or a JSON array"
        )
    samples.skipped = rows.skipped
    return samples


def _samples(conversation: Conversation) -> list[InstructionSample]:
    """Return the questions and answers of a conversation; BadRow if it has a turn that is neither."""
    messages = list(conversation.messages)
    if conversation.text is not None:
        raise BadRow("plain text has no question and no answer; train on it with ChatDataset")
    if conversation.tools or any(message.role == "tool" or message.tool_calls for message in messages):
        raise BadRow("a sample cannot hold tools; train on them with ChatDataset")
    system = messages.pop(0).content if messages[0].role == "system" else None
    names = {"user": "human", "assistant": "gpt"}
    for i, message in enumerate(messages):
        speaker, wanted = names.get(message.role, message.role), "human" if i % 2 == 0 else "gpt"
        if speaker != wanted:
            at = i + (system is not None)
            raise BadRow(
                f"turn {at} is from {speaker}, expected {wanted}: one system turn at most, then human and gpt in turn"
            )
    if not messages or len(messages) % 2:
        raise BadRow("the conversation ends without an answer from gpt")
    pairs = [(messages[i].content, messages[i + 1].content) for i in range(0, len(messages), 2)]
    return [
        InstructionSample(question, messages[2 * i].context, answer, system, history=tuple(pairs[:i]))
        for i, (question, answer) in enumerate(pairs)
        if messages[2 * i + 1].trained
    ]
