"""A document of any size as pieces of text whose ids, one after the other, are the ids of the document.

A tokenizer first cuts a text into words, so it can be given a text in pieces as long as no word, and no rule about
what is around a word, reaches over a cut.  A cut is made between a line's end and the next line, else before a
space, and only where the tokenizer shows that it does not matter:

    ids(left + right) == ids(left) + ids(right)        left, right: WINDOW characters on either side

Where that holds nowhere (a tokenizer without a first step, a text without spaces) the piece grows, up to LONGEST
characters.  Then it is cut at any character, and that is counted: `forced`.
"""

import itertools
from collections.abc import Callable, Iterator

from ..errors import DataError
from .documents import Document
from .sources import NotUtf8, decoded

__all__ = ["TextCutter"]

PIECE = 1 << 14  # characters: large enough that a call costs nothing, small enough to divide among cores
LONGEST = 1 << 22
WINDOW = 64
TRIES = 8  # line ends, and spaces, that are tried before the piece grows


class TextCutter:
    """Cuts documents into pieces; `encode` decides where (None: any line end or space will do)."""

    def __init__(self, encode: Callable[[str], list[int]] | None = None) -> None:
        self.encode = encode
        self.forced = 0

    def cut(self, document: Document) -> Iterator[str]:
        """Yield the text of a document in pieces, none empty; DataError names the byte that is not UTF-8."""
        text = ""
        for more in _text_of(document):
            text += more
            start, wanted = 0, PIECE
            while len(text) - start > wanted + WINDOW:
                at = self._cut_before(text, start, start + wanted)
                if at is None and wanted < LONGEST:
                    wanted *= 2
                    continue
                if at is None:
                    at = start + wanted
                    self.forced += 1
                yield text[start:at]
                start, wanted = at, PIECE
            text = text[start:]
        if text:
            yield text

    def _cut_before(self, text: str, start: int, end: int) -> int | None:
        """Return where to cut text[start:end], as near to its end as possible, or None."""
        for places in (_line_ends(text, start, end), _spaces(text, start, end)):
            for at in itertools.islice(places, TRIES):
                if self._fits(text, start, at):
                    return at
        return None

    def _fits(self, text: str, start: int, at: int) -> bool:
        if self.encode is None:
            return True
        left, right = text[max(start, at - WINDOW) : at], text[at : at + WINDOW]
        return self.encode(left + right) == self.encode(left) + self.encode(right)


# Runs of white space are where the rules of a tokenizer look around, and a run may be longer than the window: so a
# place is taken only if that line end, or that space, is the only white space there.


def _line_ends(text: str, start: int, end: int) -> Iterator[int]:
    """Yield the places after a line's end that has text on both sides, from `end` backwards."""
    at = text.rfind("\n", start + 2, end)
    while at >= 0:
        last = at - 2 if text[at - 1] == "\r" else at - 1
        if last > start and not text[last].isspace() and not text[at + 1].isspace():
            yield at + 1
        at = text.rfind("\n", start + 2, at)


def _spaces(text: str, start: int, end: int) -> Iterator[int]:
    """Yield the places before a single space, from `end` backwards."""
    at = text.rfind(" ", start + 1, end)
    while at >= 0:
        if not text[at - 1].isspace() and not text[at + 1].isspace():
            yield at
        at = text.rfind(" ", start + 1, at)


def _text_of(document: Document) -> Iterator[str]:
    try:
        yield from decoded(document.blocks)
    except NotUtf8 as error:
        raise DataError(
            f"{document.name}: byte {error.byte} is not UTF-8; convert the file to UTF-8 (iconv does that), or read it "
            "as bytes by leaving the tokenizer out"
        ) from None
