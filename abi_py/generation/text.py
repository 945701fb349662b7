"""Text around the ids: what a prompt is encoded with, and where a text ends."""

import codecs
from collections.abc import Iterable, Sequence
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from ..data.corpus import BYTE_VOCAB_SIZE, END_OF_DOCUMENT, byte_tokens, decode_bytes
from ..errors import DataError, counted

__all__ = ["ByteText", "StopText", "TextCodec", "text_codec"]

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"


class TextCodec(Protocol):
    """What generation asks of a tokenizer: `data.tokenizer.Tokenizer` has it, and so has `ByteText`."""

    eos_id: int | None

    @property
    def around(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The ids that begin a text, and those that end it."""

    @property
    def vocab_size(self) -> int:
        """The largest id plus one."""

    def encode(self, text: str, add_special_tokens: bool = ...) -> list[int]:
        """Return the ids of a text."""

    def encode_prompt(self, text: str) -> list[int]:
        """Return the ids of a text that is to be continued."""

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of ids."""

    def count_bytes(self, ids: npt.ArrayLike, before: npt.ArrayLike) -> npt.NDArray[np.int64]:
        """Return the bytes of text that each id is where it follows the id in `before` (-1: none)."""

    def stream(self, *, context: Sequence[int] = ...) -> Any:
        """Return an object whose `add(id)` and `finish()` give the text that follows `context`, piece by piece."""


class ByteText:
    """The ids of a model without a tokenizer: one for each byte, and one for the end of a document (data/corpus.py)."""

    eos_id: int | None = END_OF_DOCUMENT
    around: tuple[tuple[int, ...], tuple[int, ...]] = ((), ())
    vocab_size = BYTE_VOCAB_SIZE

    def encode(self, text: str, add_special_tokens: bool = False) -> list[int]:
        """Return the bytes of a text; nothing is ever added."""
        return byte_tokens(text).tolist()

    def encode_prompt(self, text: str) -> list[int]:
        """Return the bytes of a text."""
        return self.encode(text)

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of bytes; what is not UTF-8 gives U+FFFD."""
        return decode_bytes(np.fromiter(ids, np.int64))

    def count_bytes(self, ids: npt.ArrayLike, before: npt.ArrayLike) -> npt.NDArray[np.int64]:
        """Return 1 for each id: bits per byte are those per id, the end of a document counting as one byte."""
        return np.ones(np.shape(ids), np.int64)

    def stream(self, *, context: Sequence[int] = ()) -> "_ByteStream":
        """Return a decoder that takes ids one by one; its text is that of the continuation of `context`."""
        return _ByteStream(context)


class _ByteStream:
    def __init__(self, context: Sequence[int]) -> None:
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        for token_id in context[-4:]:  # a character has at most four bytes
            self.add(int(token_id))

    def add(self, token_id: int) -> str:
        """Take the next id; return the characters that are complete now."""
        return "" if token_id == END_OF_DOCUMENT else self._utf8.decode(bytes([min(token_id, 255)]))

    def finish(self) -> str:
        """Return what was held back: a cut character as U+FFFD."""
        rest = self._utf8.decode(b"", final=True)
        self._utf8.reset()
        return rest


def text_codec(tokenizer: Any, vocab_size: int) -> TextCodec | None:
    """Return the tokenizer, or that of byte-level models if `vocab_size` is theirs; None if there is neither.

    DataError if the tokenizer has ids that the model has not.
    """
    if tokenizer is None:
        return ByteText() if vocab_size == BYTE_VOCAB_SIZE else None
    if tokenizer.vocab_size > vocab_size:
        name = getattr(tokenizer, "name", "the tokenizer")
        raise DataError(
            f"{name} has {counted(tokenizer.vocab_size, 'id')}, the model only {vocab_size}; "
            "use the tokenizer that the model was trained with"
        )
    codec: TextCodec = tokenizer
    return codec


class StopText:
    """The text of a growing sequence, given out up to the first of some stop strings.

    What could be the beginning of a stop string is held back until it is decided.
    """

    def __init__(self, codec: TextCodec, stops: Sequence[str], context: Sequence[int] = ()) -> None:
        """Begin a text that continues that of `context`."""
        self._stream, self._stops, self._held = codec.stream(context=context), tuple(stops), ""

    def add(self, token_id: int) -> tuple[str, str | None]:
        """Take the next id; return the text that is certain now, and the stop string that was met, if one was."""
        self._held += self._stream.add(token_id)
        return self._release()

    def finish(self) -> tuple[str, str | None]:
        """Return the rest, and the stop string in it, if there is one."""
        self._held += self._stream.finish()
        text, stop = self._release()
        if stop is None:
            text, self._held = text + self._held, ""
        return text, stop

    def _release(self) -> tuple[str, str | None]:
        met = [(at, -len(stop), stop) for stop in self._stops if (at := self._held.find(stop)) >= 0]
        if met:
            at, _, stop = min(met)  # the first in the text; of two that begin there, the longer
            text, self._held = self._held[:at], ""
            return text, stop
        keep = 0
        for stop in self._stops:
            for length in range(min(len(stop) - 1, len(self._held)), keep, -1):
                if self._held.endswith(stop[:length]):
                    keep = length
                    break
        cut = len(self._held) - keep
        text, self._held = self._held[:cut], self._held[cut:]
        return text, None
