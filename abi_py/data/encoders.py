"""From documents to ids: two encoders with one face, bytes and tokenizers.

before            ids that begin a document: what the tokenizer's post-processor puts before a text, most often BOS
cut(document)     pieces, each encoded on its own
encode(pieces)    an array of ids for each
after             ids that end it: what the post-processor puts after a text, and the end-of-document token
"""

import array
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import numpy as np

from ..errors import ConfigError, listed
from .batch import TokenArray
from .corpus import BYTE_VOCAB_SIZE, END_OF_DOCUMENT, byte_tokens
from .documents import Document
from .pieces import TextCutter
from .places import Place
from .tokenizer import Tokenizer

__all__ = ["ByteEncoder", "Encoder", "TextEncoder"]

SHOWN_TOKENS = 8  # special tokens named in a message


class Encoder(Protocol):
    """What the writer of token files needs.

    vocab_size     every id is below it
    before, after  ids before and after each document
    forced         how many cuts were made where the ids may depend on it
    """

    vocab_size: int
    before: tuple[int, ...]
    after: tuple[int, ...]

    @property
    def forced(self) -> int: ...
    def cut(self, document: Document) -> Iterator[Any]: ...
    def encode(self, pieces: Sequence[Any], beginnings: Sequence[bool]) -> list[TokenArray]: ...


class ByteEncoder:
    """One id for a byte, 256 after each document."""

    vocab_size, forced = BYTE_VOCAB_SIZE, 0
    before: tuple[int, ...] = ()
    after: tuple[int, ...] = (END_OF_DOCUMENT,)

    def cut(self, document: Document) -> Iterator[bytes]:
        """Return the blocks as they are."""
        return document.blocks

    def encode(self, pieces: Sequence[bytes], beginnings: Sequence[bool]) -> list[TokenArray]:
        """Return the bytes of each piece as uint32."""
        return [byte_tokens(piece) for piece in pieces]


class TextEncoder:
    """The ids of a tokenizer."""

    def __init__(self, tokenizer: Tokenizer, end_of_document: str | None = None, plain: bool = False) -> None:
        """Take the name of the token after each document (None: the tokenizer's EOS, if it has one) and what special
        tokens in a text are: themselves, or with `plain` ordinary characters.

        ConfigError if there is no such token.
        """
        end = tokenizer.eos_id if end_of_document is None else tokenizer.id_of(end_of_document)
        if end is None and end_of_document is not None:
            known = listed([str(tokenizer.token_of(i)) for i in sorted(tokenizer.special_ids)], SHOWN_TOKENS)
            raise ConfigError(
                f"end_of_document ({end_of_document!r}) must be a token of {tokenizer.name}; its special tokens are "
                f"{known or 'none'}"
            )
        self.tokenizer, self.plain = tokenizer, plain
        self.vocab_size = tokenizer.vocab_size
        self.before, self.after = tokenizer.around_document(end)
        encode = tokenizer.encode_plain if plain else tokenizer.encode
        self._cutter = TextCutter(lambda text: encode(text, place=Place.AFTER_TEXT))

    @property
    def forced(self) -> int:
        """Cuts at which the ids may be others than those of the whole document."""
        return self._cutter.forced

    def cut(self, document: Document) -> Iterator[str]:
        """Return pieces whose ids, joined, are those of the document."""
        return self._cutter.cut(document)

    def encode(self, pieces: Sequence[str], beginnings: Sequence[bool]) -> list[TokenArray]:
        """Return the ids of each piece, of which some begin a document; the tokenizer divides them among the cores."""
        encode = self.tokenizer.encode_plain_batch if self.plain else self.tokenizer.encode_batch
        places = [Place.FIRST if begins else Place.AFTER_TEXT for begins in beginnings]
        encoded = encode(pieces, places=places)
        # By way of array.array, which takes a third of the time of np.array(ids).
        return [np.asarray(array.array("I", ids)).astype(np.uint32, copy=False) for ids in encoded]
