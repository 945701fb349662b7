"""From what a caller calls data to batches in a resumable order.

Data may be a TokenizedDataset, an array or list of token ids, a DataLoader (with its own batch size and order), packed
sequences, or conversations (ChatDataset).  A feed has `epoch`, `position` (the next batch), `num_batches`, `seq_len`,
`set_epoch`, `seek`, gives batches, and says where a row of one is from (`origin`).
"""

import hashlib
from collections.abc import Iterator
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from ..config import LlmTrainingConfig, TrainableModelConfig
from ..data.batch import Batch
from ..data.chat_dataset import ChatDataset
from ..data.order import permute
from ..data.packing import PackedBatches
from ..data.token_batches import BatchIterator
from ..data.tokens import DataLoader, TokenizedDataset
from ..errors import ConfigError, DataError

__all__ = ["Data", "Feed", "PackedFeed", "PaddedFeed", "check_same_data", "describe", "open_feed"]

EDGE = 1 << 18  # tokens hashed at either end: 1 MB
SAMPLES = 64  # places between them of which one token is hashed

Data: TypeAlias = TokenizedDataset | DataLoader | PackedBatches | ChatDataset | npt.ArrayLike


class PackedFeed:
    """Packed sequences as a feed; with shuffle, the batches come in the order of (seed, epoch)."""

    def __init__(self, packed: PackedBatches, shuffle: bool, seed: int, dataset: ChatDataset | None = None) -> None:
        """Begin at the first batch of epoch 0; `dataset` is what was packed, if it is known."""
        self.packed, self.shuffle, self.seed, self.dataset = packed, shuffle, seed, dataset
        self.batch_size = packed.batch_size
        self.epoch = self.position = 0

    @property
    def num_batches(self) -> int:
        """Batches of an epoch."""
        return self.packed.num_batches

    @property
    def seq_len(self) -> int:
        """Tokens in a row."""
        return self.packed.seq_len

    def set_epoch(self, epoch: int) -> None:
        """Go to the first batch of an epoch."""
        self.epoch, self.position = epoch, 0

    def seek(self, position: int) -> None:
        """Go to a batch of this epoch."""
        self.position = position

    def __iter__(self) -> Iterator[Batch]:
        """Give the batches from `position` to the end of the epoch."""
        while self.position < self.num_batches:
            self.position += 1
            yield self.packed.get_batch(self._index(self.position - 1))

    def _index(self, position: int) -> int:
        """Return the batch at a place in the order of this epoch."""
        if not self.shuffle:
            return position
        return int(permute(np.array([position]), self.num_batches, self.seed, self.epoch)[0])

    def origin(self, position: int, row: int, column: int) -> str:
        """Return where the sequence at a position of a batch of this epoch is from."""
        sequence = self.packed.sequence_at(self._index(position), row, column)
        return f"sequence {sequence}" if self.dataset is None else self.dataset.place(sequence)


class PaddedFeed:
    """Rows of their own lengths as a feed: batches as wide as their longest row, in the order of (seed, epoch)."""

    def __init__(self, dataset: ChatDataset, batch_size: int, shuffle: bool, seed: int) -> None:
        """Begin at the first batch of epoch 0."""
        self.dataset, self.batch_size, self.shuffle, self.seed = dataset, batch_size, shuffle, seed
        self.num_batches, self.seq_len = dataset.num_batches(batch_size), dataset.max_seq_len
        self.epoch = self.position = 0
        self._plan: list[npt.NDArray[np.int64]] = []
        self._plan_epoch = -1

    def set_epoch(self, epoch: int) -> None:
        """Go to the first batch of an epoch."""
        self.epoch, self.position = epoch, 0

    def seek(self, position: int) -> None:
        """Go to a batch of this epoch."""
        self.position = position

    def __iter__(self) -> Iterator[Batch]:
        """Give the batches from `position` to the end of the epoch."""
        while self.position < self.num_batches:
            if self._plan_epoch != self.epoch:
                self._plan = self.dataset.plan(self.batch_size, self.shuffle, self.seed, self.epoch)
                self._plan_epoch = self.epoch
            rows = self._plan[self.position]
            self.position += 1
            yield self.dataset.padded(rows)

    def origin(self, position: int, row: int, column: int) -> str:
        """Return where a row of a batch of this epoch is from."""
        return self.dataset.place(int(self._plan[position][row]))


Feed: TypeAlias = BatchIterator | PackedFeed | PaddedFeed


def open_feed(data: Data, config: LlmTrainingConfig, model: TrainableModelConfig, training: bool) -> Feed:
    """Return a feed over `data`; for evaluation (`training` false) in the data's own order and with nothing left out.

    ConfigError if its sequences are longer than the model can read.
    """
    shuffle = config.shuffle and training
    feed: Feed
    if isinstance(data, PackedBatches):
        feed = PackedFeed(data, shuffle, config.seed)
    elif isinstance(data, ChatDataset):
        if data.vocab_size > model.vocab_size:
            raise ConfigError(
                f"vocab_size ({model.vocab_size}) of the model must be at least that of the conversations' tokenizer "
                f"({data.vocab_size}); set it to {data.vocab_size} or more"
            )
        if data.packing:
            feed = PackedFeed(data.packed(config.batch_size), shuffle, config.seed, data)
        else:
            feed = PaddedFeed(data, config.batch_size, shuffle, config.seed)
    elif isinstance(data, DataLoader):
        feed = data.iterator() if training else data.dataset.batches(data.batch_size, data.seq_len, False, 0, False)
        feed.vocab_size = model.vocab_size
    else:
        dataset = data if isinstance(data, TokenizedDataset) else TokenizedDataset.from_slice(data)
        sizes = (config.batch_size, config.max_seq_len)
        feed = dataset.batches(*sizes, shuffle, config.seed, drop_last=False, vocab_size=model.vocab_size)
    if feed.seq_len > model.max_seq_len:
        raise ConfigError(
            f"max_seq_len ({feed.seq_len}) of the training must not exceed the model's ({model.max_seq_len}); "
            f"set it to {model.max_seq_len} or less"
        )
    return feed


def describe(feed: Feed) -> dict[str, Any]:
    """Return what identifies the data (`identity`) and the order of its batches (`order`), as plain values for JSON.

    `batches` is how many of them an epoch has.
    """
    order: dict[str, Any] = {"batch_size": feed.batch_size, "shuffle": feed.shuffle, "seed": feed.seed}
    if isinstance(feed.dataset, ChatDataset):
        content, length = feed.dataset.fingerprint().encode(), len(feed.dataset)
        order["packing"] = feed.dataset.packing
    elif isinstance(feed, PackedFeed):
        batches = [feed.packed.get_batch(index) for index in sorted({0, feed.num_batches // 2, feed.num_batches - 1})]
        content = b"".join(batch.input_ids.tobytes() + batch.labels.tobytes() for batch in batches)
        length = feed.num_batches
    elif isinstance(feed, BatchIterator):
        tokens = feed.dataset.tokens
        length = len(tokens)
        samples = tokens[np.linspace(0, length - 1, SAMPLES).astype(np.int64)]
        content = b"".join(part.astype("<u4").tobytes() for part in (tokens[:EDGE], tokens[-EDGE:], samples))
        order["drop_last"] = feed.drop_last
    order["seq_len"] = feed.seq_len
    identity = {"length": length, "sha256": hashlib.sha256(content).hexdigest()}
    return {"identity": identity, "order": order, "batches": feed.num_batches}


def check_same_data(saved: dict[str, Any], now: dict[str, Any], inside_epoch: bool) -> None:
    """Raise if a resumed run would go on with other data (DataError), or in the middle of an epoch of another order."""
    if saved["identity"] != now["identity"]:
        raise DataError(
            f"these are not the data of the checkpoint: length {now['identity']['length']} instead of "
            f"{saved['identity']['length']}, or other content; give the same data; in Python, "
            "load_checkpoint(path, new_data=True) keeps weights and moments and begins other data at their first batch"
        )
    for name, value in now["order"].items():
        if inside_epoch and saved["order"].get(name) != value:
            raise ConfigError(
                f"{name} ({value}) must stay {saved['order'].get(name)} in the middle of an epoch: the place in "
                "the data would mean other batches; keep it; in Python, load_checkpoint(path, new_data=True) begins "
                "the data anew"
            )
