"""What training asks of a data set, whatever its rows are, and the batches that it is given.

    identity()        which data these are: a run that is resumed must have the same
    feed(batching)    their batches, from any of them on, in an order that depends only on (seed, epoch)

A data set of your own is an object with these two methods.  Its feed is a `Feed` that makes the batch at a position and
says where a row of it is from; going from batch to batch, to an epoch and to a position is here, once for all.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol, TypedDict

from ..reprs import Shown
from .batch import Batch, check_integer

__all__ = ["Batching", "Dataset", "Feed", "Identity"]


class Identity(TypedDict):
    """Which data these are, as plain values for JSON."""

    length: int  # rows, tokens or batches: whatever the data set counts itself in
    sha256: str  # of its content, or of samples of it


@dataclass(frozen=True, kw_only=True)
class Batching:
    """How training wants its batches."""

    batch_size: int
    seq_len: int  # tokens of a row, where rows have no length of their own
    shuffle: bool
    seed: int
    vocab_size: int  # of the model: ids must be below it
    training: bool = True  # False: an evaluation, for which nothing may be left out


class Dataset(Protocol):
    """What can be trained on and evaluated."""

    def identity(self) -> Identity:
        """Return which data these are."""

    def feed(self, batching: Batching) -> Feed:
        """Return the batches of epoch 0; ConfigError or DataError if they cannot be made for this model."""


class Feed(Shown, ABC):
    """The batches of an epoch: `for batch in feed` goes on from `position` to its end.

    Nothing but (epoch, position) is remembered, so `set_epoch` and `seek` go on with exactly the batches that would
    have come.

    epoch        number of the epoch, from 0            num_batches  batches of an epoch
    position     number of the next batch               seq_len      no row of a batch is longer
    dataset      of which the batches are               order        what decides which batch comes when
    """

    def __init__(
        self,
        dataset: Dataset,
        *,
        num_batches: int,
        batch_size: int,
        seq_len: int,
        shuffle: bool,
        seed: int,
        **more: Any,
    ) -> None:
        """Begin at the first batch of epoch 0; `more` are other settings, plain values, that `order` depends on."""
        self.dataset, self.num_batches = dataset, num_batches
        self.batch_size = check_integer("batch_size", batch_size, 1)
        self.seq_len = check_integer("seq_len", seq_len, 1)
        self.shuffle, self.seed = bool(shuffle), check_integer("seed", seed, 0, 1 << 64)
        common = {"batch_size": self.batch_size, "shuffle": self.shuffle, "seed": self.seed}
        self.order: dict[str, Any] = {**common, **more, "seq_len": self.seq_len}
        self.epoch = self.position = 0

    def _says(self) -> str:
        batches = f"{self.num_batches:,} batches of {self.batch_size} x {self.seq_len}"
        order = f"shuffled by seed {self.seed}" if self.shuffle else "in order"
        return f"{batches}, {order}; epoch {self.epoch}, next {self.position}; of {self.dataset!r}"

    @abstractmethod
    def batch_at(self, position: int) -> Batch:
        """Return the batch at a position of this epoch, 0 .. num_batches - 1."""

    @abstractmethod
    def origin(self, position: int, row: int, column: int) -> str:
        """Return where in the data column `column` of a row of the batch at `position` is from, for messages."""

    def set_epoch(self, epoch: int) -> None:
        """Go to the first batch of `epoch`."""
        self.epoch = check_integer("epoch", epoch, 0)
        self.position = 0

    def reset(self) -> None:
        """Go to the first batch of the next epoch."""
        self.set_epoch(self.epoch + 1)

    def seek(self, position: int) -> None:
        """Go to batch `position` of this epoch, 0 .. num_batches (the end); costs the same for any position."""
        self.position = check_integer("position", position, 0, self.num_batches + 1)

    def next(self) -> Batch | None:
        """Return the next batch, or None at the end of the epoch."""
        if self.position >= self.num_batches:
            return None
        batch = self.batch_at(self.position)
        self.position += 1
        return batch

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        batch = self.next()
        if batch is None:
            raise StopIteration
        return batch
