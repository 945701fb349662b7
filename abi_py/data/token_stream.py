"""Text from token ids that come one by one, in whole characters: what a program shows while a model writes."""

import codecs
import re
from collections.abc import Sequence
from typing import Protocol

__all__ = ["BYTE_OF", "BYTE_TOKEN", "REPLACEMENT", "ByteStream", "TokenStream", "Vocabulary", "WindowStream"]

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
LONGEST_CHARACTER = 4  # bytes of UTF-8

BYTE_TOKEN = re.compile(r"<0x([0-9A-F]{2})>")  # a byte of a character that the vocabulary lacks


def _inside_character(token: str) -> bool:
    """Say whether a token is a byte of UTF-8 that cannot be a character's first."""
    found = BYTE_TOKEN.fullmatch(token)
    return found is not None and int(found[1], 16) & 0xC0 == 0x80


class Vocabulary(Protocol):
    """What is asked of a tokenizer (`tokenizer.Tokenizer`) here."""

    @property
    def vocab_size(self) -> int: ...
    @property
    def special_ids(self) -> frozenset[int]: ...
    @property
    def begins_after(self) -> frozenset[int]: ...
    def token_of(self, token_id: int) -> str | None: ...
    def decode_known(self, ids: list[int]) -> str: ...


class TokenStream:
    """Text of ids that come one by one: `add` gives what is complete, `finish` the rest.

    All that comes out, joined, is `decode` of all ids.  One exception: beside bytes that are not UTF-8, the
    decoders of byte-fallback tokenizers make U+FFFD of good bytes too, if they see them all at once.
    """

    def __init__(self, tokenizer: Vocabulary, skip_special_tokens: bool, context: Sequence[int] = ()) -> None:
        """Begin an empty text, or the continuation of the text of `context`, of which nothing comes out."""
        self.tokenizer = tokenizer
        self.skipped = tokenizer.special_ids if skip_special_tokens else frozenset[int]()

    def add(self, token_id: int) -> str:
        """Take the next id; return the characters that are complete now, perhaps none."""
        raise NotImplementedError

    def finish(self) -> str:
        """Return what was held back, a cut character as U+FFFD, and begin an empty text."""
        raise NotImplementedError


# ByteLevel writes each byte as a visible character: itself if it is one in Latin-1, else the next free from U+0100 on
# (the table of GPT-2's encoder).
VISIBLE = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
BYTE_OF = {chr(byte): byte for byte in VISIBLE}
BYTE_OF |= {chr(0x100 + n): byte for n, byte in enumerate(sorted(set(range(256)) - set(VISIBLE)))}


class ByteStream(TokenStream):
    """For byte-level tokenizers: bytes of each token into an incremental UTF-8 decoder."""

    def __init__(self, tokenizer: Vocabulary, skip_special_tokens: bool, context: Sequence[int] = ()) -> None:
        super().__init__(tokenizer, skip_special_tokens)
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        for token_id in context[-LONGEST_CHARACTER:]:
            self.add(int(token_id))

    def add(self, token_id: int) -> str:
        """Take the next id; return the characters that are complete now."""
        if token_id in self.skipped:
            return ""
        token = self.tokenizer.token_of(token_id)
        if token is None:
            return self.finish() + REPLACEMENT
        try:
            content = bytes(BYTE_OF[character] for character in token)
        except KeyError:  # an added token is its own text
            content = token.encode("utf-8")
        return self._utf8.decode(content)

    def finish(self) -> str:
        """Return what was held back."""
        rest = self._utf8.decode(b"", final=True)
        self._utf8.reset()
        return rest


class WindowStream(TokenStream):
    """For all others: what a new id adds to the text of the few ids before it.

    A decoder may treat the beginning of a text differently (it drops a space there), so the window begins with ids
    whose text is out already.
    """

    def __init__(self, tokenizer: Vocabulary, skip_special_tokens: bool, context: Sequence[int] = ()) -> None:
        super().__init__(tokenizer, skip_special_tokens)
        self._window = self._end_of(context)
        self._done = len(self._window) - self._cut_character()  # ids of the window whose text is out

    def _end_of(self, context: Sequence[int]) -> list[int]:
        """Return the last ids of the text so far, as many as a decoder looks at, beginning with a whole character.

        None, if what follows is the beginning of a text: where nothing but special tokens comes before it, or one
        after which the tokenizer puts a space mark.
        """
        end: list[int] = []
        for token_id in map(int, reversed(context)):
            if token_id in self.tokenizer.begins_after:
                break
            token = self.tokenizer.token_of(token_id)
            if token is None or token_id in self.tokenizer.special_ids:
                continue
            end.insert(0, token_id)
            if len(end) >= LONGEST_CHARACTER and not _inside_character(token):
                break
        return end

    def _cut_character(self) -> int:
        """Return how many ids at the end of the window are bytes of a character whose other bytes are to come."""
        tokens = [self.tokenizer.token_of(token_id) or "" for token_id in self._window]
        bytes_ = [int(found[1], 16) if (found := BYTE_TOKEN.fullmatch(token)) else 0 for token in tokens]
        utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        utf8.decode(bytes(bytes_))
        return len(utf8.getstate()[0])

    def add(self, token_id: int) -> str:
        """Take the next id; return the characters that are complete now."""
        if token_id in self.skipped:
            return ""
        if self.tokenizer.token_of(token_id) is None:
            return self.finish() + REPLACEMENT
        self._window.append(token_id)
        new = self._new_text()
        if not new or new.endswith(REPLACEMENT):  # perhaps the first bytes of a character
            return ""
        self._window = self._window[self._done :]
        self._done = len(self._window)
        return new

    def _new_text(self) -> str:
        decode = self.tokenizer.decode_known
        return decode(self._window)[len(decode(self._window[: self._done])) :]

    def finish(self) -> str:
        """Return what was held back."""
        rest = self._new_text() if len(self._window) > self._done else ""
        self._window, self._done = [], 0
        return rest
