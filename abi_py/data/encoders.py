"""From documents to ids: two encoders with one face, bytes and tokenizers.

cut(document)    pieces, each encoded by itself           encode(pieces)    an array of ids for each
"""

import array
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import numpy as np

from ..errors import ConfigError
from .corpus import BYTE_VOCAB_SIZE, END_OF_DOCUMENT, byte_tokens
from .documents import Document
from .pieces import TextCutter
from .tokenizer import Tokenizer
from .tokens import TokenArray

__all__ = ["ByteEncoder", "Encoder", "TextEncoder"]


class Encoder(Protocol):
    """What the writer of token files needs.

    vocab_size       every id is below it
    end_of_document  the id that follows each document
    forced           how many cuts were made where the ids may depend on it
    """

    vocab_size: int
    end_of_document: int

    @property
    def forced(self) -> int: ...
    def cut(self, document: Document) -> Iterator[Any]: ...
    def encode(self, pieces: Sequence[Any]) -> list[TokenArray]: ...


class ByteEncoder:
    """One id for a byte, 256 after each document."""

    vocab_size, end_of_document, forced = BYTE_VOCAB_SIZE, END_OF_DOCUMENT, 0

    def cut(self, document: Document) -> Iterator[bytes]:
        """Return the blocks as they are."""
        return document.blocks

    def encode(self, pieces: Sequence[bytes]) -> list[TokenArray]:
        """Return the bytes of each piece as uint32."""
        return [byte_tokens(piece) for piece in pieces]


class TextEncoder:
    """The ids of a tokenizer."""

    def __init__(self, tokenizer: Tokenizer, end_of_document: str | None = None, plain: bool = False) -> None:
        """Take the name of the token after each document (None: the tokenizer's own) and what special tokens in a text
        are: themselves, or with `plain` ordinary characters.

        ConfigError if there is no such token.
        """
        end = tokenizer.eos_id if end_of_document is None else tokenizer.id_of(end_of_document)
        if end is None and end_of_document is None:
            raise ConfigError(
                f"{tokenizer.name} says nothing about an end-of-text token; name the token that follows each document "
                "with --end-of-document"
            )
        if end is None:
            known = ", ".join(str(tokenizer.token_of(i)) for i in sorted(tokenizer.special_ids)[:8])
            raise ConfigError(
                f"end_of_document ({end_of_document!r}) must be a token of {tokenizer.name}; its special tokens are "
                f"{known or 'none'}"
            )
        self.tokenizer, self.plain = tokenizer, plain
        self.vocab_size, self.end_of_document = tokenizer.vocab_size, end
        self._cutter = TextCutter(tokenizer.encode_plain if plain else tokenizer.encode)

    @property
    def forced(self) -> int:
        """Cuts at which the ids may be others than those of the whole document."""
        return self._cutter.forced

    def cut(self, document: Document) -> Iterator[str]:
        """Return pieces whose ids, joined, are those of the document."""
        return self._cutter.cut(document)

    def encode(self, pieces: Sequence[str]) -> list[TokenArray]:
        """Return the ids of each piece; the tokenizer divides them among the cores."""
        encode = self.tokenizer.encode_plain_batch if self.plain else self.tokenizer.encode_batch
        # By way of array.array, which takes a third of the time of np.array(ids).
        return [np.asarray(array.array("I", ids)).astype(np.uint32, copy=False) for ids in encode(pieces)]
