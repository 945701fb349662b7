"""Put many short sequences into few rows, so that little of a batch is padding.

    row                a a a a b b b . .        T = 9 positions, sequences a and b, two of padding
    labels             a a a - b b - - -        each the next token of its own sequence; "-" is not trained
    segment_ids        0 0 0 0 1 1 1 -1 -1      attention stays within equal numbers: the mask is block-diagonal
    attention_mask     1 1 1 1 1 1 1 0 0

Best fit, longest first: each sequence goes into the row whose free space it fills best, or opens a new row.  At most
11/9 of the least possible number of rows, plus four (Johnson, Demers, Ullman, Garey & Graham, SIAM J. Comput. 3, 1974).
RoPE sees only differences of positions, so a sequence need not start at position 0 of its row.
"""

import hashlib
from bisect import bisect_left, insort
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from ..errors import ConfigError, DataError, counted
from ..reprs import Shown
from .batch import IGNORE_LABEL, Batch, TokenArray, as_tokens, check_integer, labels_of
from .feed import Batching, Dataset, Feed, Identity
from .order import permute


@dataclass(frozen=True, eq=False)
class _Piece:
    """What is in one row: a sequence, or a part of one that is longer than a row."""

    sequence: int  # number of the sequence, in the order of add_sequence
    tokens: TokenArray  # (n,)
    trained: npt.NDArray[np.bool_] | None  # (n,): may this token be a label?  None = all


@dataclass(frozen=True)
class PackingStats:
    """Counts of a packing.

    sequences  sequences that were added          pieces     after long ones were divided: >= sequences
    rows       rows of max_seq_len positions      tokens     positions that hold a token
    padding    positions that do not              labels     labels that are trained
    cut        tokens that truncate=True removed
    """

    sequences: int
    pieces: int
    rows: int
    tokens: int
    padding: int
    labels: int
    cut: int

    @property
    def padding_fraction(self) -> float:
        """Part of all positions that is padding, 0.0 .. 1.0."""
        total = self.tokens + self.padding
        return self.padding / total if total else 0.0


@dataclass(frozen=True, eq=False)
class PackedBatches(Shown):
    """Rows of packed sequences, as batches: `get_batch(i)` for i in 0 .. num_batches - 1.

    A batch is made when it is asked for, so memory holds each token once.  Every batch has `batch_size` rows but the
    last, which has what is left (1 .. batch_size rows); no row is empty.
    """

    rows: list[list[_Piece]]
    batch_size: int
    seq_len: int
    pad_token_id: int
    stats: PackingStats

    @property
    def num_batches(self) -> int:
        return -(-len(self.rows) // self.batch_size)

    def __len__(self) -> int:
        return self.num_batches

    def get_batch(self, index: int) -> Batch:
        """Return batch `index` with attention_mask and segment_ids; IndexError outside 0 .. num_batches - 1."""
        if not 0 <= index < self.num_batches:
            raise IndexError(f"batch {index} is not in 0 .. {self.num_batches - 1}")
        rows = self.rows[index * self.batch_size : (index + 1) * self.batch_size]
        shape = (len(rows), self.seq_len)
        input_ids = np.full(shape, self.pad_token_id, np.uint32)
        labels = np.full(shape, IGNORE_LABEL, np.uint32)
        attention_mask = np.zeros(shape, np.uint8)
        segment_ids = np.full(shape, -1, np.int32)
        for b, row in enumerate(rows):
            start = 0
            for segment, piece in enumerate(row):
                stop = start + len(piece.tokens)
                input_ids[b, start:stop] = piece.tokens
                labels[b, start:stop] = labels_of(piece.tokens, piece.trained)
                attention_mask[b, start:stop] = 1
                segment_ids[b, start:stop] = segment
                start = stop
        return Batch(input_ids, labels, attention_mask, segment_ids)

    def sequence_at(self, index: int, row: int, column: int) -> int:
        """Return the number of the sequence at a position of batch `index`; for padding, of the last before it."""
        pieces = self.rows[index * self.batch_size + row]
        ends = np.cumsum([len(piece.tokens) for piece in pieces])
        return pieces[min(int(np.searchsorted(ends, column, side="right")), len(pieces) - 1)].sequence

    def identity(self) -> Identity:
        """Return the number of batches, and a SHA-256 of the first, a middle and the last one."""
        count = self.num_batches
        batches = [self.get_batch(index) for index in sorted({0, count // 2, count - 1})]
        content = b"".join(batch.input_ids.tobytes() + batch.labels.tobytes() for batch in batches)
        return {"length": count, "sha256": hashlib.sha256(content).hexdigest()}

    def feed(self, batching: Batching) -> "PackedFeed":
        """Return the batches, whose size is that of the packing."""
        return PackedFeed(self, batching, self)


class PackedFeed(Feed):
    """Packed sequences as a feed; with shuffle, the batches come in the order of (seed, epoch)."""

    def __init__(
        self,
        packed: PackedBatches,
        batching: Batching,
        dataset: Dataset,
        place: Callable[[int], str] = "sequence {}".format,
        **more: Any,
    ) -> None:
        """Begin at the first batch of epoch 0; `place(n)` says where row n of the packed `dataset` is from."""
        sizes = {"num_batches": packed.num_batches, "batch_size": packed.batch_size, "seq_len": packed.seq_len}
        super().__init__(dataset, **sizes, shuffle=batching.shuffle, seed=batching.seed, **more)
        self.packed, self.place = packed, place

    def batch_at(self, position: int) -> Batch:
        """Return the batch at a position of this epoch."""
        return self.packed.get_batch(self._index(position))

    def _index(self, position: int) -> int:
        """Return the batch at a place in the order of this epoch."""
        if not self.shuffle:
            return position
        return int(permute([position], self.num_batches, self.seed, self.epoch)[0])

    def origin(self, position: int, row: int, column: int) -> str:
        """Return where the sequence at a position of a batch of this epoch is from."""
        return self.place(self.packed.sequence_at(self._index(position), row, column))


class SequencePacker(Shown):
    """Collect sequences of token ids, then `pack` them into rows of `max_seq_len`.

    A sequence longer than a row is divided into pieces that share one token: the last token of a piece is also the
    first of the next one, where it is only read.  So every token but the first of the sequence is a label exactly once.
    With truncate=True what does not fit is cut off instead, and counted (`cut`).
    """

    def __init__(self, max_seq_len: int, pad_token_id: int = 0, *, truncate: bool = False) -> None:
        self.max_seq_len = check_integer("max_seq_len", max_seq_len, 2)
        self.pad_token_id = check_integer("pad_token_id", pad_token_id, 0, 1 << 32)
        self.truncate = bool(truncate)
        self.num_sequences = 0
        self.cut = 0
        self._pieces: list[_Piece] = []

    def add_sequence(self, tokens: npt.ArrayLike, trained: npt.ArrayLike | None = None) -> None:
        """Add one sequence (n,) of ids; `trained` (n,) bool says which of its tokens may be labels (None: all).

        trained[0] has no effect, since nothing comes before the first token.  A sequence of one token is kept, but has
        no label.  DataError if the sequence is empty or `trained` has another length; TypeError if `trained` is not
        bool.
        """
        name = f"sequence {self.num_sequences}"
        ids = as_tokens(tokens, name).copy()  # the caller may go on using its array
        if not len(ids):
            raise DataError(f"{name} is empty; leave it out, or give at least one token")
        mask: npt.NDArray[np.bool_] | None = None
        if trained is not None:
            mask = np.array(trained)
            if mask.dtype != np.bool_:
                raise TypeError(f"{name}: trained must be bool, got {mask.dtype}")
            if mask.shape != ids.shape:
                raise DataError(
                    f"{name}: trained has shape {mask.shape}, but the sequence has {counted(len(ids), 'token')}"
                )
        self.num_sequences += 1
        T, n = self.max_seq_len, len(ids)
        if n > T and self.truncate:
            self.cut += n - T
            n = T
        for start in range(0, max(n - 1, 1), T - 1):
            stop = min(start + T, n)
            part = None if mask is None else mask[start:stop]
            self._pieces.append(_Piece(self.num_sequences - 1, ids[start:stop], part))

    def pack(self, batch_size: int) -> PackedBatches:
        """Return all sequences so far as batches of `batch_size` rows; deterministic, and sequences may be added after.

        Rows, and sequences within a row, are in the order of the first of them that was added.  ConfigError if there
        are none.
        """
        batch_size = check_integer("batch_size", batch_size, 1)
        if not self._pieces:
            raise ConfigError("there is nothing to pack; call add_sequence first")
        sizes = [len(piece.tokens) for piece in self._pieces]
        rows = best_fit_decreasing(sizes, self.max_seq_len)
        tokens = sum(sizes)
        stats = PackingStats(
            sequences=self.num_sequences,
            pieces=len(sizes),
            rows=len(rows),
            tokens=tokens,
            padding=len(rows) * self.max_seq_len - tokens,
            labels=sum(
                len(p.tokens) - 1 if p.trained is None else int(np.count_nonzero(p.trained[1:])) for p in self._pieces
            ),
            cut=self.cut,
        )
        contents = [[self._pieces[i] for i in row] for row in rows]
        return PackedBatches(contents, batch_size, self.max_seq_len, self.pad_token_id, stats)


def best_fit_decreasing(sizes: list[int], capacity: int) -> list[list[int]]:
    """Return rows of indices into `sizes` such that no row's sizes (each 1 .. capacity) sum to more than `capacity`.

    Equal sizes are placed in their own order, and of equally full rows the newest is filled first.
    """
    rows: list[list[int]] = []
    open_rows: dict[int, list[int]] = {}  # free space -> rows with this much of it
    spaces: list[int] = []  # the keys of open_rows, sorted: at most `capacity` of them
    for i in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
        at = bisect_left(spaces, sizes[i])
        if at == len(spaces):
            row, space = len(rows), capacity
            rows.append([])
        else:
            space = spaces[at]
            row = open_rows[space].pop()
            if not open_rows[space]:
                del open_rows[space], spaces[at]
        rows[row].append(i)
        space -= sizes[i]
        if space:
            if space not in open_rows:
                insort(spaces, space)
                open_rows[space] = []
            open_rows[space].append(row)
    return sorted(sorted(row) for row in rows)
