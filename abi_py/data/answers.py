"""Where the answers are in a rendered conversation, for any template that does not mark them itself.

    P   the turns before the answer, with the generation prompt      what the model is asked
    U   the turns up to the answer                                   the answer as the last turn
    W   the whole conversation                                       what is trained on

Where W begins with P and U, the answer is what U has after P.  Many templates write a turn differently when others
follow it: thoughts are removed, the end token is another one, the prompt opens a thought that no rendered turn has.
Then texts are recognised by *anchors*.  The first and last letter of a message's text are exchanged for another
letter; the positions at which the rendering changes belong to that message, whatever the template does to its text.
All messages are told apart in log2(n) renderings: bit k of a message's number says whether rendering k changes it.

    begin   what follows the turn before is equal in P and W as far as the header of the answer goes
    end     what follows the last letter of the answer is equal in U and W as far as the turn goes

Nothing is assumed about how headers, ends or thoughts are written.  Where P and W part inside the generation prompt,
the rest of the prompt must be tags that open or close a thought; anything else is an error with its place.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from itertools import pairwise, takewhile
from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = ["AnswerFinder", "Lost"]

Message = Mapping[str, Any]

_TAG = re.compile(r"<[^<>\n]*>|\[[^\[\]\n]*\]")
_THOUGHT = re.compile(r"think|thought|reason", re.IGNORECASE)
_THOUGHT_WORD = re.compile(r"\b(?:think(?:ing)?|thoughts?|reasoning)\b", re.IGNORECASE)
# Letters to exchange, the safest first: one that no rule of spelling or spacing treats otherwise than its neighbour.
_SYMBOL = r"[^\s<>\[\]{}|\"'\\\x00-\x20\ufdd0-\ufdef]"
_LETTERS = tuple(map(re.compile, ("[A-Za-z0-9]", r"[^\W_]", _SYMBOL, r"[^\s\ufdd0-\ufdef]")))
_WINDOW = 256  # characters before a difference in which a name may have begun
_IDENTITIES = ("role", "name", "tool_call_id", "id", "type")  # compared with others, so never changed


class Lost(Exception):
    """An answer cannot be found: why, its number among the answers, and the position in W where that shows."""

    def __init__(self, reason: str, position: int) -> None:
        super().__init__(reason)
        self.reason, self.position, self.answer = reason, position, 0


class AnswerFinder:
    """The answers of one conversation.

    render     returns the text of some turns, with the generation prompt if asked
    messages   all turns
    specials   matches the name of a special token that the template wrote
    """

    def __init__(
        self, render: Callable[[Sequence[Message], bool], str], messages: Sequence[Message], specials: re.Pattern[str]
    ) -> None:
        self._render, self._messages, self._specials = render, messages, specials
        self.whole = render(messages, False)

    def spans(self) -> list[tuple[int, int]]:
        """Return begin and end in `whole` of each answer, without an end token of which only W knows; Lost if not."""
        found: list[tuple[int, int]] = []
        at = 0
        for i, message in enumerate(self._messages):
            if message["role"] != "assistant":
                continue
            try:
                begin = self._begin(i)
                end = self._end(i, begin)
                if not at <= begin <= end:
                    raise Lost("the turns are not written in their order", begin)
            except Lost as lost:
                lost.answer = len(found)
                raise
            found.append((begin, end))
            at = end
        return found

    # -- borders -------------------------------------------------------------------------------

    def _begin(self, i: int) -> int:
        turns = self._messages[:i]
        asked = self._render(turns, True)
        if self.whole.startswith(asked):
            return len(asked)
        in_asked, in_whole = self._after_turn_before(asked, i)
        tail = asked[in_asked:]
        common = self._common(tail, self.whole[in_whole:])
        if common < len(tail) and not self._opens_thought(asked, in_asked + common, turns):
            raise Lost("the prompt that asks for an answer is not written like the answer's turn", in_whole + common)
        return in_whole + common

    def _after_turn_before(self, asked: str, i: int) -> tuple[int, int]:
        """Return where, in the prompt and in the whole, the last text before message `i` ends: 0 if there is none."""
        for j in range(i - 1, -1, -1):
            if (in_whole := self._last_anchor(j)) is None:
                continue
            changed = self._render([*self._messages[:j], _changed(self._messages[j]), *self._messages[j + 1 : i]], True)
            places = _differences(asked, changed)
            if places is not None and len(places):
                return int(places[-1]) + 1, in_whole + 1
        return 0, 0

    def _opens_thought(self, asked: str, at: int, turns: Sequence[Message]) -> bool:
        """Say whether what the prompt alone has, from `at` on, only opens (or skips) a thought."""
        rest = asked[at:]
        words = self._specials.sub("", rest)
        if _THOUGHT_WORD.sub("", _TAG.sub("", words)).strip():
            return False
        # The header must be common; a header of another name is made of tags alone as well.
        header = self._common(asked, self._render(turns, False))
        return bool(_THOUGHT.search(rest) or asked[header:at].strip() or not rest.strip())

    def _end(self, i: int, begin: int) -> int:
        if i == len(self._messages) - 1:
            return len(self.whole)
        turns = self._messages[: i + 1]
        upto = self._render(turns, False)
        if self.whole.startswith(upto):
            return max(begin, len(upto))
        anchor = self._last_anchor(i)
        in_whole = begin if anchor is None else max(begin, anchor + 1)
        places = _differences(upto, self._render([*turns[:-1], _changed(turns[-1])], False))
        if places is None:
            raise Lost("the words of the answer decide how its turn is written", begin)
        in_upto = int(places[-1]) + 1 if len(places) else self._begin_of_turn(upto, i)
        tail, rest = upto[in_upto:], self.whole[in_whole:]
        common = self._common(tail, rest)
        if anchor is None and tail and (len(places) or not common):  # no text is left: what ends U must come next
            common = next((n for n in range(min(len(tail), len(rest)), 0, -1) if tail.endswith(rest[:n])), 0)
            found, end = common > 0, in_whole + common
        else:
            end = in_whole + common
            found = common == len(tail) or self._specials.match(self.whole, end) is not None
        if not found and end < len(self.whole):
            raise Lost("the end of the answer is written otherwise when more turns follow, by no token", end)
        return end

    def _begin_of_turn(self, upto: str, i: int) -> int:
        """Return where the answer begins in U, for an answer without a letter."""
        asked = self._render(self._messages[:i], True)
        return self._common(upto, asked)

    def _common(self, one: str, other: str) -> int:
        """Return the length of the common beginning; of a name or tag that only one has whole, nothing is common."""
        length = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False)))
        if length == min(len(one), len(other)):
            return length
        first = max(0, length - _WINDOW)
        for text in (one, other):
            for pattern in (self._specials, _TAG):
                for found in pattern.finditer(text, first, length + _WINDOW):
                    if found.start() < length < found.end():
                        length = found.start()
        return length

    # -- anchors -------------------------------------------------------------------------------

    def _last_anchor(self, i: int) -> int | None:
        places = self._anchors.get(i)
        return None if places is None else int(places[-1])

    @cached_property
    def _anchors(self) -> dict[int, npt.NDArray[np.int64]]:
        """The positions in `whole` that belong to each message; messages without a letter have none."""
        changed = list(map(_changed, self._messages))
        anchors = self._anchors_of(changed)
        if anchors is None:  # without those messages whose letters decide how the turns are written
            for i, message in enumerate(self._messages):
                alone = [*self._messages[:i], changed[i], *self._messages[i + 1 :]]
                if _differences(self.whole, self._render(alone, False)) is None:
                    changed[i] = dict(message)
            anchors = self._anchors_of(changed)
        if anchors is None:
            raise Lost("the words of the messages decide how the turns are written", 0)
        return anchors

    def _anchors_of(self, changed: Sequence[Message]) -> dict[int, npt.NDArray[np.int64]] | None:
        owner = np.zeros(len(self.whole), np.int64)
        for bit in range(len(changed).bit_length()):
            mixed = [new if (i + 1) >> bit & 1 else old for i, (old, new) in enumerate(zip(self._messages, changed))]
            places = _differences(self.whole, self._render(mixed, False))
            if places is None:
                return None
            owner[places] |= 1 << bit
        marked = np.flatnonzero(owner)
        return {int(number) - 1: marked[owner[marked] == number] for number in np.unique(owner[marked])}


def _differences(one: str, other: str) -> npt.NDArray[np.int64] | None:
    """Return the positions (n,) at which two texts of the same length differ; None if their lengths do."""
    if len(one) != len(other):
        return None
    first, second = (np.frombuffer(text.encode("utf-32-le", "surrogatepass"), "<u4") for text in (one, other))
    return np.flatnonzero(first != second)


def _changed(message: Message) -> dict[str, Any]:
    """Return a message in whose texts the first and last letter between tags are others."""
    return {key: value if key in _IDENTITIES else _change(value) for key, value in message.items()}


def _change(value: Any) -> Any:
    if isinstance(value, str):
        return _change_text(value)
    if isinstance(value, Mapping):
        return {key: inner if key in ("id", "type") else _change(inner) for key, inner in value.items()}
    return [_change(inner) for inner in value] if isinstance(value, list | tuple) else value


def _change_text(text: str) -> str:
    borders = [(0, 0), *(found.span() for found in _TAG.finditer(text)), (len(text), len(text))]
    letters = list(text)
    for (_, start), (stop, _) in pairwise(borders):
        _change_part(letters, start, stop)
    if "".join(letters) == text:  # nothing but tags
        _change_part(letters, 0, len(text))
    return "".join(letters)


def _change_part(letters: list[str], start: int, stop: int) -> None:
    """Exchange the first and the last letter between two places."""
    part = "".join(letters[start:stop])
    for pattern in _LETTERS:
        ends = pattern.search(part), pattern.search(part[::-1])
        if ends[0] and ends[1]:
            for i in {ends[0].start(), len(part) - 1 - ends[1].start()}:
                letters[start + i] = _other(part[i])
            return


def _other(letter: str) -> str:
    """Return another character of the same kind, as long in upper and lower case if there is such a neighbour."""
    if not letter.isalnum() and letter.isascii():
        return "," if letter == "." else "."
    close = [chr(ord(letter) + step) for step in (1, -1, 2, -2) if 32 <= ord(letter) + step < 0x110000]
    same = [c for c in close if c.isprintable() and not c.isspace() and _kind(c) == _kind(letter)]
    return min(same, key=lambda c: _lengths(c) != _lengths(letter), default="x")


def _kind(c: str) -> tuple[bool, bool, bool]:
    return c.isalpha(), c.isdigit(), c.islower()


def _lengths(c: str) -> tuple[int, int]:
    return len(c.upper()), len(c.lower())
