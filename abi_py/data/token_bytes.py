"""How many bytes of text a token is: what bits per byte are divided by.

    token           bytes     where
    Gworld          6         everywhere ("G" is the space of a byte-level vocabulary)
    _world          6         within a text; 5 at its beginning, where the space is the tokenizer's own
    <0xE4>          1         whether or not it and its neighbours are UTF-8
    </s>            0         a special token is no text

The bytes of all tokens together are those of the text, for every tokenizer whose ids decode to the text.
"""

from collections.abc import Iterable

import numpy as np
import numpy.typing as npt

from .token_stream import BYTE_OF, BYTE_TOKEN, Vocabulary

__all__ = ["TokenBytes"]

SPACE = next(character for character, byte in BYTE_OF.items() if byte == ord(" "))


class TokenBytes:
    """The bytes of the tokens of one tokenizer, each found out when it is first asked for."""

    def __init__(self, vocabulary: Vocabulary, edges: Iterable[int], byte_level: bool, space_added: bool) -> None:
        """Take the ids after which a text begins, and whether a byte-level tokenizer begins it with a space."""
        self._vocabulary, self._byte_level, self._space_added = vocabulary, byte_level, space_added
        self._edges = np.array([-1, *edges], np.int64)
        self._known = np.zeros(vocabulary.vocab_size, np.bool_)
        self._within, self._beginning = np.zeros((2, vocabulary.vocab_size), np.int64)
        self._anchor = self._find_anchor()

    def count(self, ids: npt.ArrayLike, before: npt.ArrayLike) -> npt.NDArray[np.int64]:
        """Return the bytes of each id where it follows the id in `before` (-1: nothing), both of one shape."""
        ids = np.asarray(ids, np.int64)
        known = (ids >= 0) & (ids < len(self._known))
        ids = np.where(known, ids, 0)
        present = np.unique(ids[known])
        for token_id in present[~self._known[present]].tolist():
            self._within[token_id], self._beginning[token_id] = self._measure(token_id)
            self._known[token_id] = True
        begins = np.isin(np.asarray(before, np.int64), self._edges)
        return np.where(known, np.where(begins, self._beginning[ids], self._within[ids]), 0)

    def _measure(self, token_id: int) -> tuple[int, int]:
        """Return the bytes of a token within a text, and at its beginning."""
        token = self._vocabulary.token_of(token_id)
        if token is None or token_id in self._vocabulary.special_ids:
            return 0, 0
        if self._byte_level:
            size = len(token) if BYTE_OF.keys() >= set(token) else len(token.encode("utf-8"))
            return size, size - (self._space_added and token.startswith(SPACE))
        anchor = self._anchor
        within = self._size([*anchor, token_id, *anchor]) - self._size([*anchor, *anchor])
        if BYTE_TOKEN.fullmatch(token) and within < len(token):  # one that is a byte to the decoder, too
            return 1, 1
        anchor_within = self._size([*anchor, *anchor]) - self._size(anchor)
        return within, self._size([token_id, *anchor]) - anchor_within

    def _size(self, ids: list[int]) -> int:
        return len(self._vocabulary.decode_known(ids).encode("utf-8"))

    def _find_anchor(self) -> list[int]:
        """Return an ordinary token that ends in a letter: beside it, others are decoded as within a text."""
        for token_id in range(self._vocabulary.vocab_size):
            token = self._vocabulary.token_of(token_id)
            if token and token[-1].isalpha() and token_id not in self._vocabulary.special_ids:
                return [token_id]
        return []
