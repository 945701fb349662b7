"""The way of the text: documents in, ids out, in the order of the documents.

documents -> pieces -> batches of pieces -> ids of a batch -> who writes them
main thread: reads, cuts, writes        another: encodes the batch before, with the threads of the library
"""

import random
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from .batch import TokenArray
from .documents import Document, Documents
from .encoders import Encoder

__all__ = ["TRAIN", "VALID", "Divider", "Piece", "Tally", "batches", "encoded", "pieces"]

BATCH = 1 << 20  # characters, or bytes, encoded at once: two batches and their ids are what is in memory
TRAIN, VALID = 0, 1


class Divider:
    """Says of each document, as it comes, which part it belongs to.

    One document of each 1 / fraction, at a random place among them, is for validation: so the share is right to one
    document however many there are, and nothing but (fraction, seed) and the document's number decides.
    """

    def __init__(self, fraction: float, seed: int) -> None:
        self.fraction, self.random = fraction, random.Random(seed)
        self.number, self.drawn, self.next = 0, 0, -1
        self._draw()

    def _draw(self) -> None:
        if self.fraction:
            place = int((self.drawn + self.random.random()) / self.fraction)
            self.drawn, self.next = self.drawn + 1, max(place, self.next + 1)

    def part(self) -> int:
        """Return the part of the next document."""
        part = VALID if self.number == self.next else TRAIN
        if part == VALID:
            self._draw()
        self.number += 1
        return part


@dataclass
class Tally:
    """What went into one file."""

    documents: int = 0
    size: int = 0  # bytes of text
    tokens: int = 0

    def counting(self, blocks: Iterable[bytes]) -> Iterator[bytes]:
        """Yield the blocks of a document and count it and them."""
        self.documents += 1
        for block in blocks:
            self.size += len(block)
            yield block


class Piece(NamedTuple):
    """Text or bytes that are encoded by themselves."""

    content: Any
    part: int
    first: bool  # of its document
    last: bool


def pieces(documents: Documents, encoder: Encoder, divider: Divider, tallies: list[Tally]) -> Iterator[Piece]:
    """Yield the pieces of all documents, each of which is given a part and counted there."""
    for document in documents:
        part = divider.part()
        before, first = None, True
        for content in encoder.cut(Document(document.name, tallies[part].counting(document.blocks))):
            if before is not None:
                yield Piece(before, part, first, False)
                first = False
            before = content
        yield Piece(before, part, first, True)


def batches(stream: Iterable[Piece]) -> Iterator[list[Piece]]:
    """Yield lists of pieces, together as long as a batch should be."""
    batch, size = [], 0
    for piece in stream:
        batch.append(piece)
        size += len(piece.content)
        if size >= BATCH:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def encoded(stream: Iterable[list[Piece]], encoder: Encoder) -> Iterator[tuple[Piece, TokenArray]]:
    """Yield the pieces with their ids, and with those around their document; one batch is encoded while the
    one before is written and the next is read."""
    before, after = (np.array(ids, np.uint32) for ids in (encoder.before, encoder.after))

    def finished(batch: list[Piece], results: "Future[list[TokenArray]]") -> Iterator[tuple[Piece, TokenArray]]:
        for piece, ids in zip(batch, results.result(), strict=True):
            around = [before] * piece.first, [after] * piece.last
            yield piece, np.concatenate([*around[0], ids, *around[1]]) if any(around) else ids

    with ThreadPoolExecutor(1) as other:
        waiting: deque[tuple[list[Piece], Future[list[TokenArray]]]] = deque()
        for batch in stream:
            contents, beginnings = [piece.content for piece in batch], [piece.first for piece in batch]
            waiting.append((batch, other.submit(encoder.encode, contents, beginnings)))
            if len(waiting) > 1:
                yield from finished(*waiting.popleft())
        while waiting:
            yield from finished(*waiting.popleft())
