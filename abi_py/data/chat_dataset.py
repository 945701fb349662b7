"""Conversations as training rows: encoded, cut to length, and put into batches, padded or packed.

    row       ids (n,) and which of them are trained (n,), n <= max_seq_len; never a row without a trained one
    too long  what fits is kept; an answer that is cut has no end, as its text goes on; a row whose answers all come
              after the cut is left out and counted
    padded    a batch is as wide as its longest row, rounded up to 8; rows of similar length come together
    packed    several rows in one, attention within each: `SequencePacker`

Padded batches of an epoch: rows in the order of (seed, epoch), in windows of 32 batches; each window is sorted by
length and cut into batches; the batches are shuffled by (seed, epoch) again.  So a place in an epoch is a number, and
a resumed run goes on with the batch that would have come.
"""

import hashlib
import math
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from ..errors import ConfigError, DataError, counted
from ..reprs import Shown
from .batch import IGNORE_LABEL, Batch, TokenArray, check_integer, labels_of, trained_of
from .chat import ChatTemplate
from .conversation import Conversation
from .feed import Batching, Feed, Identity
from .order import permute
from .packing import PackedBatches, PackedFeed, SequencePacker
from .rows import LEAVE_OUT
from .tokenizer import Tokenizer

__all__ = ["ChatDataset", "EncodingStats", "truncate"]

WINDOW = 32  # batches whose rows are sorted by length together
ROUND = 8  # widths of batches are multiples of it: few different shapes, so few layouts of the model's memory


@dataclass
class EncodingStats(Shown):
    """What became of conversations when they were encoded.

    rows       rows that are trained on                     truncated  of those, rows that were cut
    empty      no answer in them                            dropped    all of their answers after the cut
    bad        a message for each that the template refused, or whose answers cannot be found
    lengths    tokens of each conversation before the cut, empty and dropped ones too
    cut        tokens that were cut off
    """

    rows: int = 0
    truncated: int = 0
    empty: int = 0
    dropped: int = 0
    cut: int = 0
    bad: list[str] = field(default_factory=list)
    lengths: list[int] = field(default_factory=list)

    def notes(self) -> list[str]:
        """Return a phrase for each thing that was cut or left out."""
        counts = (
            (self.truncated, "cut to max_seq_len"),
            (self.dropped, "left out, their answers come after max_seq_len"),
            (self.empty, "left out, without an answer"),
            (len(self.bad), f"left out, bad, the first: {self.bad[0] if self.bad else ''}"),
        )
        return [f"{count:,} {what}" for count, what in counts if count]


def truncate(
    ids: TokenArray, trained: npt.NDArray[np.bool_], limit: int
) -> tuple[TokenArray, npt.NDArray[np.bool_]] | None:
    """Return the first `limit` tokens of a row (n,), or fewer; None if no answer is left.

    Nothing is added: a model that was shown an end token where a text goes on would learn to stop in the middle of a
    sentence.  What comes after the last trained token (a question that lost its answer) is left out.
    """
    if len(ids) <= limit:
        return ids, trained
    kept = np.flatnonzero(trained[:limit])
    if not len(kept):
        return None
    end = int(kept[-1]) + 1
    return ids[:end], trained[:end]


class ChatDataset(Shown):
    """Rows of token ids with their mask, in memory; 5 bytes a token.

    name         what messages call it                 vocab_size  ids are below it
    max_seq_len  no row is longer                      packing     rows are packed, not padded
    pad_id       what is in padding                   stats       what was left out (of the data set before a split)
    places       file:line of each row                numbers     of each row, which of the conversations it is
    """

    conversations = True  # each row has a question and an answer
    info = None  # no file of tokens says what it is

    def __init__(
        self,
        rows: Iterable[tuple[TokenArray, npt.NDArray[np.bool_]]],
        *,
        vocab_size: int,
        max_seq_len: int,
        packing: bool = False,
        pad_id: int = 0,
        name: str = "conversations",
        stats: EncodingStats | None = None,
        places: Iterable[str] | None = None,
        numbers: Iterable[int] | None = None,
    ) -> None:
        """Take rows of ids (n,) uint32 and trained (n,) bool; DataError if there are none."""
        rows = list(rows)
        if not rows:
            raise DataError(f"{name} holds no row to train on; {_why_nothing(stats, max_seq_len)}")
        self.ids: TokenArray = np.concatenate([ids for ids, _ in rows])
        self.trained: npt.NDArray[np.bool_] = np.concatenate([trained for _, trained in rows])
        self.starts = np.concatenate([[0], np.cumsum([len(ids) for ids, _ in rows])]).astype(np.int64)
        self.vocab_size, self.pad_id, self.name = vocab_size, pad_id, name
        self.max_seq_len = check_integer("max_seq_len", max_seq_len, 2)
        self.packing = bool(packing)
        self.stats = stats or EncodingStats(rows=len(rows))
        self.places = list(places) if places is not None else [""] * len(rows)
        self.numbers = list(numbers) if numbers is not None else list(range(len(rows)))
        self._packed: dict[int, PackedBatches] = {}

    @classmethod
    def encode(
        cls,
        conversations: Iterable[Conversation],
        template: ChatTemplate,
        tokenizer: Tokenizer,
        *,
        max_seq_len: int,
        loss_on: str = "assistant",
        packing: bool = False,
        skip_bad_rows: bool = False,
        name: str = "conversations",
    ) -> "ChatDataset":
        """Return the rows of conversations, in their order.

        DataError names file:line of one that the template refuses, unless bad rows are skipped; then it is counted.
        """
        encoder, stats = template.encoder(tokenizer), EncodingStats()
        rows, places, numbers = [], [], []
        for number, conversation in enumerate(conversations):
            try:
                ids, labels = encoder.encode(conversation, loss_on)
            except DataError as error:
                message = f"{conversation.place}: {error}" if conversation.place else str(error)
                if not skip_bad_rows:
                    raise DataError(f"{message}; or {LEAVE_OUT}") from None
                stats.bad.append(message)
                continue
            row = _fit(ids, trained_of(labels), max_seq_len, stats)
            if row is not None:
                rows.append(row)
                places.append(conversation.place)
                numbers.append(number)
        stats.rows = len(rows)
        return cls(
            rows,
            vocab_size=tokenizer.vocab_size,
            max_seq_len=max_seq_len,
            packing=packing,
            pad_id=tokenizer.pad_id if tokenizer.pad_id is not None else 0,
            name=name,
            stats=stats,
            places=places,
            numbers=numbers,
        )

    # -- what is in it -------------------------------------------------------------------------

    def __len__(self) -> int:
        return len(self.starts) - 1

    def _says(self) -> str:
        tokens = f"{counted(self.num_tokens, 'token')}, {self.num_targets:,} trained"
        return f"{self.name!r}, {counted(len(self), 'row')}, {tokens}"

    @property
    def num_tokens(self) -> int:
        """Tokens of all rows."""
        return len(self.ids)

    @property
    def longest_row(self) -> int:
        """The most tokens that a row can have: packed, many conversations are one."""
        return self.num_tokens if self.packing else int(self.lengths.max())

    @property
    def notes(self) -> tuple[str, ...]:
        """A phrase for each thing that was cut or left out."""
        return tuple(self.stats.notes())

    def summary(self) -> str:
        """Return what it holds, in a phrase."""
        share = f"{100 * self.num_targets / self.num_tokens:.0f}% of them trained"
        return f"{self.name}: {counted(len(self), 'conversation')}, {counted(self.num_tokens, 'token')}, {share}"

    def example(self, index: int = 0) -> tuple[TokenArray, TokenArray]:
        """Return the ids of a row before its first answer, and from there on."""
        ids, trained = self.row(index)
        return ids[: int(np.argmax(trained))], ids[int(np.argmax(trained)) :]

    @property
    def num_targets(self) -> int:
        """Tokens that are trained."""
        return int(np.count_nonzero(self.trained))

    @property
    def lengths(self) -> npt.NDArray[np.int64]:
        """Tokens of each row (rows,) int64."""
        return np.diff(self.starts)

    def row(self, index: int) -> tuple[TokenArray, npt.NDArray[np.bool_]]:
        """Return ids (n,) and trained (n,) of a row."""
        part = slice(self.starts[index], self.starts[index + 1])
        return self.ids[part], self.trained[part]

    def place(self, index: int) -> str:
        """Return where a row is from, for messages."""
        return self.places[index] or f"{self.name}, row {index}"

    def split(self, valid_fraction: float) -> tuple["ChatDataset", "ChatDataset"]:
        """Return all but the last rows, for training, and the last ceil(valid_fraction * rows), for validation.

        ConfigError unless 0 < valid_fraction < 1; DataError if there is only one row.
        """
        if not 0.0 < valid_fraction < 1.0:
            raise ConfigError(f"valid_fraction ({valid_fraction}) must be between 0 and 1; try 0.05")
        if len(self) < 2:
            raise DataError(f"{self.name} has one row, which cannot be split; use more data or valid_fraction 0")
        at = len(self) - min(len(self) - 1, math.ceil(round(valid_fraction * len(self), 9)))
        return self._part(range(at)), self._part(range(at, len(self)))

    def only(self, conversations: Collection[int], name: str | None = None) -> "ChatDataset":
        """Return the rows of these conversations, by number, in the order of this data set; DataError for none."""
        wanted = set(conversations)
        return self._part([row for row, number in enumerate(self.numbers) if number in wanted], name)

    def _part(self, rows: Sequence[int], name: str | None = None) -> "ChatDataset":
        return ChatDataset(
            [self.row(i) for i in rows],
            vocab_size=self.vocab_size,
            max_seq_len=self.max_seq_len,
            packing=self.packing,
            pad_id=self.pad_id,
            name=name or self.name,
            stats=self.stats,
            places=[self.places[i] for i in rows],
            numbers=[self.numbers[i] for i in rows],
        )

    def fingerprint(self) -> str:
        """Return a SHA-256 of ids, mask and borders of all rows."""
        digest = hashlib.sha256(self.ids.astype("<u4", copy=False).tobytes())
        digest.update(np.packbits(self.trained).tobytes())
        digest.update(self.starts.astype("<i8", copy=False).tobytes())
        return digest.hexdigest()

    def identity(self) -> Identity:
        """Return the number of rows, and a SHA-256 of their fingerprint."""
        return {"length": len(self), "sha256": hashlib.sha256(self.fingerprint().encode()).hexdigest()}

    # -- batches -------------------------------------------------------------------------------

    def num_batches(self, batch_size: int, seq_len: int = 0, drop_last: bool = False) -> int:
        """Return the number of batches of an epoch; rows have lengths of their own, so `seq_len` says nothing."""
        if self.packing:
            packed = self.packed(batch_size)
            return len(packed) - int(drop_last and packed.stats.rows % batch_size != 0)
        return len(self) // batch_size if drop_last else -(-len(self) // batch_size)

    def feed(self, batching: Batching) -> Feed:
        """Return the batches, packed or padded; ConfigError if the model has fewer ids than the tokenizer."""
        if self.vocab_size > batching.vocab_size:
            raise ConfigError(
                f"vocab_size ({batching.vocab_size}) of the model must be at least that of the conversations' "
                f"tokenizer ({self.vocab_size}); set it to {self.vocab_size} or more"
            )
        if self.packing:
            return PackedFeed(self.packed(batching.batch_size), batching, self, self.place, packing=True)
        return PaddedFeed(self, batching)

    def packed(self, batch_size: int) -> PackedBatches:
        """Return the rows packed into batches of `batch_size` rows of max_seq_len; made once for each size."""
        if batch_size not in self._packed:
            packer = SequencePacker(self.max_seq_len, self.pad_id)
            for i in range(len(self)):
                packer.add_sequence(*self.row(i))
            self._packed[batch_size] = packer.pack(batch_size)
        return self._packed[batch_size]

    def plan(self, batch_size: int, shuffle: bool, seed: int, epoch: int) -> list[npt.NDArray[np.int64]]:
        """Return the rows of each padded batch of an epoch; without shuffle, rows by length, which pads least."""
        rows, lengths = np.arange(len(self)), self.lengths
        if not shuffle:
            return _chunks(np.argsort(lengths, kind="stable"), batch_size)
        rows = permute(rows, len(self), seed, epoch)
        batches = []
        for window in _chunks(rows, WINDOW * batch_size):
            batches += _chunks(window[np.argsort(lengths[window], kind="stable")], batch_size)
        # Another key than that of the rows, or both permutations would be the same one for batches of one row.
        order = permute(np.arange(len(batches)), len(batches), seed ^ 0x5DEECE66D, epoch)
        return [batches[int(i)] for i in order]

    def padded(self, rows: npt.NDArray[np.int64]) -> Batch:
        """Return these rows as one batch, as wide as the longest; the last id of a row is a label and no input."""
        width = self._width(rows)
        input_ids = np.full((len(rows), width), self.pad_id, np.uint32)
        labels = np.full((len(rows), width), IGNORE_LABEL, np.uint32)
        mask = np.zeros((len(rows), width), np.uint8)
        for b, i in enumerate(rows):
            ids, trained = self.row(int(i))
            n = len(ids) - 1
            input_ids[b, :n], labels[b, :n], mask[b, :n] = ids[:-1], labels_of(ids, trained)[:-1], 1
        return Batch(input_ids, labels, mask)

    def _width(self, rows: npt.NDArray[np.int64]) -> int:
        longest = int(self.lengths[rows].max()) - 1
        return max(1, min(-(-longest // ROUND) * ROUND, self.max_seq_len))

    def padding(self, batch_size: int) -> dict[str, float]:
        """Return the share of positions that is padding: "full" (every row max_seq_len wide), "padded", "packed"."""
        used = self.num_tokens - len(self)  # the last id of a row is never an input
        plan = self.plan(batch_size, True, 0, 0)
        wide = sum(len(rows) * self._width(rows) for rows in plan)
        return {
            "full": 1 - used / (len(self) * self.max_seq_len),
            "padded": 1 - used / wide,
            "packed": self.packed(batch_size).stats.padding_fraction,
        }


class PaddedFeed(Feed):
    """Rows of their own lengths as a feed: batches as wide as their longest row, in the order of (seed, epoch)."""

    dataset: ChatDataset

    def __init__(self, dataset: ChatDataset, batching: Batching) -> None:
        """Begin at the first batch of epoch 0."""
        super().__init__(
            dataset,
            num_batches=dataset.num_batches(batching.batch_size),
            batch_size=batching.batch_size,
            seq_len=dataset.max_seq_len,
            shuffle=batching.shuffle,
            seed=batching.seed,
            packing=False,
        )
        self._plan: list[npt.NDArray[np.int64]] = []
        self._plan_epoch = -1

    def _rows(self, position: int) -> npt.NDArray[np.int64]:
        """Return the rows of the batch at a position of this epoch."""
        if self._plan_epoch != self.epoch:
            self._plan = self.dataset.plan(self.batch_size, self.shuffle, self.seed, self.epoch)
            self._plan_epoch = self.epoch
        return self._plan[position]

    def batch_at(self, position: int) -> Batch:
        """Return the batch at a position of this epoch."""
        return self.dataset.padded(self._rows(position))

    def origin(self, position: int, row: int, column: int) -> str:
        """Return where a row of a batch of this epoch is from."""
        return self.dataset.place(int(self._rows(position)[row]))


def _fit(
    ids: TokenArray, trained: npt.NDArray[np.bool_], limit: int, stats: EncodingStats
) -> tuple[TokenArray, npt.NDArray[np.bool_]] | None:
    """Return a row that is not too long and has a trained token, or None; count what happens."""
    stats.lengths.append(len(ids))
    if not trained.any():
        stats.empty += 1
        return None
    row = truncate(ids, trained, limit)
    if row is None:
        stats.dropped += 1
        return None
    if len(ids) > limit:
        stats.truncated += 1
        stats.cut += len(ids) - len(row[0])
    return row


def _why_nothing(stats: EncodingStats | None, max_seq_len: int) -> str:
    if stats is None or not (stats.empty or stats.dropped or stats.bad):
        return "give at least one conversation"
    parts = [f"{len(stats.bad)} bad (the first: {stats.bad[0]})"] if stats.bad else []
    parts += [f"{stats.empty} without an answer"] if stats.empty else []
    if stats.dropped:
        parts.append(f"{stats.dropped} whose answers begin after max_seq_len ({max_seq_len}): raise it")
    return "; ".join(parts)


def _chunks(rows: npt.NDArray[np.int64], size: int) -> list[npt.NDArray[np.int64]]:
    return [rows[at : at + size] for at in range(0, len(rows), size)]
