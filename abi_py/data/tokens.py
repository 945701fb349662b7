"""Token ids in a file, and the batches that are made of them.

    file       u32 little-endian, one after the other; no header          token i is bytes 4i .. 4i + 3
    row r      input_ids = tokens[r S : r S + S]                          labels = tokens[r S + 1 : r S + S + 1]
    batch      B rows; with shuffle they come in the order permute(position, rows, seed, epoch) of order.py

    N tokens have N - 1 labels (the first token has nothing before it), (N - 1) // S full rows, and (N - 1) // (B S)
    full batches.  What is left over is one short row of fewer than S labels, and full rows too few for a batch.
    drop_last=True leaves them out and counts them (`dropped_tokens`); drop_last=False gives them: the short row is
    padded with id 0 and labels that do not count, and the last batch has fewer rows.

The file is mapped into memory, never read as a whole, so a file of 100 GB opens at once.
"""

import os
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ..config import IGNORE_INDEX
from ..errors import ConfigError, DataError
from ..files import atomic_file
from .order import permute
from .sidecar import TokensInfo, read_sidecar
from .token_types import check_token_type

IGNORE_LABEL = np.uint32(IGNORE_INDEX & 0xFFFFFFFF)  # 0xFFFFFF9C: the same 32 bits in a uint32 array

ORDER_BLOCK = 16384  # rows whose order is worked out at once: about 2 ms, 128 KB
SCAN_BLOCK = 1 << 22  # tokens that check_vocab looks at and save writes at once: 16 MB
FINGERPRINT_TOKENS = 1 << 14

TokenArray = npt.NDArray[np.uint32]


def check_integer(name: str, value: int, least: int, below: int = 1 << 63) -> int:
    """Return `value` as a plain int; TypeError if it is no integer, ConfigError if not in least <= value < below."""
    if isinstance(value, (bool, np.bool_)) or not isinstance(value, (int, np.integer)):
        raise TypeError(f"{name} must be an integer, got {value!r} ({type(value).__name__})")
    if not least <= value < below:
        rule = f"at least {least}" if value < least else f"below {below}"
        raise ConfigError(f"{name} ({value}) must be {rule}")
    return int(value)


def as_tokens(tokens: npt.ArrayLike, name: str = "tokens") -> TokenArray:
    """Return token ids as a 1-D uint32 array, without a copy if they are one.

    TypeError for anything but integers in one dimension; DataError naming the first id that does not fit in 32 bits.
    """
    array = np.asarray(tokens)
    if array.ndim != 1 or (array.dtype.kind not in "iu" and array.size):
        raise TypeError(f"{name} must be one-dimensional and of integers, got shape {array.shape}, dtype {array.dtype}")
    if array.dtype == np.uint32:
        return array
    outside = (array < 0) | (array > 0xFFFFFFFF)
    if outside.any():
        at = int(np.argmax(outside))
        raise DataError(f"{name}: id {array[at]} at offset {at} is not in 0 .. 4294967295, the range of a u32 token id")
    return array.astype(np.uint32)


def check_output(path: str | os.PathLike[str]) -> Path:
    """Return `path` as a Path; DataError if it exists and is no regular file: replacing a device would remove it."""
    path = Path(path)
    if path.exists() and not path.is_file():
        raise DataError(f"{path} is not a regular file and cannot be replaced; give the name of a file")
    return path


@dataclass(frozen=True, eq=False)
class Batch:
    """B rows of T positions: what goes into the model, and what should come out.

    input_ids       (B, T) uint32
    labels          (B, T) uint32: the id that follows each position, or IGNORE_LABEL where none counts
    attention_mask  (B, T) uint8: 1 at a token, 0 at padding; None means no padding
    segment_ids     (B, T) int32: positions attend only to equal numbers, padding is -1; None: a row is one sequence

    The arrays are the batch's own; no later batch writes into them.  TypeError for another shape or dtype.
    """

    input_ids: TokenArray
    labels: TokenArray
    attention_mask: npt.NDArray[np.uint8] | None = None
    segment_ids: npt.NDArray[np.int32] | None = None

    def __post_init__(self) -> None:
        wanted = {"input_ids": np.uint32, "labels": np.uint32, "attention_mask": np.uint8, "segment_ids": np.int32}
        for name, dtype in wanted.items():
            array = getattr(self, name)
            if array is None and name in ("attention_mask", "segment_ids"):
                continue
            if array.ndim != 2 or array.shape != self.input_ids.shape or array.dtype != dtype:
                raise TypeError(
                    f"{name} must be (B, T) = {self.input_ids.shape} of {dtype.__name__}, "
                    f"got {array.shape} of {array.dtype}"
                )

    @property
    def batch_size(self) -> int:
        return int(self.input_ids.shape[0])

    @property
    def seq_len(self) -> int:
        return int(self.input_ids.shape[1])

    @property
    def num_tokens(self) -> int:
        """Number of labels that count."""
        return int(np.count_nonzero(self.labels != IGNORE_LABEL))


class TokenizedDataset:
    """A sequence of token ids, in a mapped file or in memory.

    tokens      (N,) uint32, read only; little-endian as in the file
    vocab_size  batches are checked to hold only ids below it; None = no check
    name        what error messages call it: the file's name, or "tokens"
    skipped     files that were left out when the tokens were made from a directory, each with its reason
    notes       lines about what was left out, or read in another way than one might think, when they were made
    info        what the sidecar of the file says, or None
    """

    info: TokensInfo | None = None
    notes: tuple[str, ...] = ()

    def __init__(
        self,
        tokens: TokenArray,
        vocab_size: int | None = None,
        name: str = "tokens",
        skipped: Sequence[str] = (),
        *,
        start: int = 0,
    ) -> None:
        if vocab_size is not None:
            vocab_size = check_integer("vocab_size", vocab_size, 1)
        if len(tokens) == 0:
            raise DataError(f"{name} holds no tokens; a data set needs at least two, one to read and one to predict")
        self.tokens = tokens.view()
        self.tokens.flags.writeable = False
        self.vocab_size = vocab_size
        self.name = name
        self.skipped = tuple(skipped)
        self._start = start  # offset of tokens[0] in the file, for messages
        self._asked = 0  # shuffled iterators that were made without a seed

    @classmethod
    def load(cls, path: str | os.PathLike[str], vocab_size: int | None = None) -> "TokenizedDataset":
        """Map a file of u32 little-endian token ids; takes the same time for any size.

        If PATH.json is beside it (data/sidecar.py), the vocabulary's size comes from there when `vocab_size` is None,
        and the data set keeps it as `info`.  Ids are checked against the size when batches are made; `check_vocab`
        checks all of them now.  DataError if the file is empty, its size is not a multiple of 4 or not what the sidecar
        says, or if a sample of it is of another type than u32 (token_types.py); ConfigError if `vocab_size` is smaller
        than the tokenizer's; OSError (FileNotFoundError...) passes through.
        """
        path = Path(path)
        size = os.stat(path).st_size
        if path.is_file() and size == 0:
            raise DataError(f"{path} is empty; write token ids to it with `abi-train tokenize`")
        info = read_sidecar(path)
        if info is None and path.is_file():
            check_token_type(path, vocab_size)
        if size % 4 and path.is_file():
            raise DataError(
                f"{path}: size is {size} bytes, which is not a multiple of 4, but each token is a u32 of 4 bytes; "
                f"the file is cut short or is no token file: make it again with `abi-train tokenize`"
            )
        if info is not None:
            _check_sidecar(info, path, size, vocab_size)
            vocab_size = info.vocab_size if vocab_size is None else vocab_size
        dataset = cls(np.memmap(path, dtype="<u4", mode="r"), vocab_size, str(path))
        dataset.info = info
        return dataset

    @classmethod
    def from_slice(
        cls, tokens: npt.ArrayLike, vocab_size: int | None = None, name: str = "tokens"
    ) -> "TokenizedDataset":
        """Take ids that are in memory (list, or array of any integer dtype); a uint32 array is not copied."""
        return cls(as_tokens(tokens, name), vocab_size, name)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the ids as u32 little-endian; `path` holds the old file or all of the new one, whatever happens."""
        with atomic_file(check_output(path)) as file:
            for start in range(0, len(self.tokens), SCAN_BLOCK):
                file.write(self.tokens[start : start + SCAN_BLOCK].astype("<u4", copy=False).tobytes())

    def split(self, fraction: float = 0.9) -> tuple["TokenizedDataset", "TokenizedDataset"]:
        """Return the first `fraction` of the tokens, for training, and the rest, for validation; neither is a copy.

        The parts share no token, and no label of the first is in the second.  ConfigError unless 0 < fraction < 1;
        DataError if a part would have fewer than two tokens.
        """
        if not 0.0 < fraction < 1.0:
            raise ConfigError(f"fraction ({fraction}) is the training part and must be between 0 and 1; try 0.9")
        at = round(len(self.tokens) * fraction)
        if at < 2 or len(self.tokens) - at < 2:
            raise DataError(
                f"{self.name}: {len(self.tokens)} tokens split at {fraction} leave {at} for training and "
                f"{len(self.tokens) - at} for validation, but each part needs at least 2; use more text"
            )
        return self._part(0, at), self._part(at, len(self.tokens))

    def _part(self, start: int, stop: int) -> "TokenizedDataset":
        part = self.tokens[start:stop]
        made = TokenizedDataset(part, self.vocab_size, self.name, self.skipped, start=self._start + start)
        made.info, made.notes = self.info, self.notes
        return made

    def __len__(self) -> int:
        return len(self.tokens)

    def __repr__(self) -> str:
        return f"TokenizedDataset({self.name!r}, {len(self.tokens):,} tokens, vocab_size={self.vocab_size})"

    def fingerprint(self) -> int:
        """Return a CRC-32 of the length, the beginning and the end: a cheap check that a resumed run has its data."""
        head, tail = self.tokens[:FINGERPRINT_TOKENS], self.tokens[-FINGERPRINT_TOKENS:]
        crc = zlib.crc32(len(self.tokens).to_bytes(8, "little"))
        for part in (head, tail):
            crc = zlib.crc32(part.astype("<u4", copy=False).tobytes(), crc)
        return crc

    def check_vocab(self, vocab_size: int | None = None) -> int:
        """Read all tokens and return the largest id; DataError names the first id that is not below `vocab_size`.

        `vocab_size` None takes that of the data set; if this is None too, the largest id is only reported.
        """
        vocab_size = self.vocab_size if vocab_size is None else check_integer("vocab_size", vocab_size, 1)
        largest = 0
        for start in range(0, len(self.tokens), SCAN_BLOCK):
            block = self.tokens[start : start + SCAN_BLOCK]
            largest = max(largest, int(block.max()))
            if vocab_size is not None and largest >= vocab_size:
                self._reject(start + int(np.argmax(block >= vocab_size)), vocab_size)
        return largest

    def _reject(self, at: int, vocab_size: int) -> None:
        found, offset = int(self.tokens[at]), self._start + at
        raise DataError(
            f"{self.name}: token {offset} (byte {4 * offset}) is id {found}, but ids must be below vocab_size "
            f"({vocab_size}); tokenize again with the model's vocabulary, or set vocab_size to {found + 1} or more"
        )

    def num_batches(self, batch_size: int, seq_len: int, drop_last: bool = False) -> int:
        """Return the number of batches of an epoch: of all labels, or (N - 1) // (B S) full ones to drop_last."""
        batch_size = check_integer("batch_size", batch_size, 1)
        seq_len = check_integer("seq_len", seq_len, 1)
        labels = len(self.tokens) - 1
        if drop_last:
            return labels // (batch_size * seq_len)
        rows = -(-labels // seq_len)
        return -(-rows // batch_size)

    def batches(
        self,
        batch_size: int,
        seq_len: int,
        shuffle: bool = True,
        seed: int | None = None,
        drop_last: bool = False,
        *,
        vocab_size: int | None = None,
    ) -> "BatchIterator":
        """Return an iterator over the batches of epoch 0; see BatchIterator.

        With `seed` None, the first call gives epoch 0 of seed 0, the next call epoch 1, and so on: a loop that asks for
        batches once an epoch sees a new order each time, and the same ones when the program runs again.  `vocab_size`
        None takes that of the data set.  DataError if there are too few tokens for one batch.
        """
        iterator = BatchIterator(self, batch_size, seq_len, shuffle, seed or 0, drop_last, vocab_size=vocab_size)
        if seed is None and iterator.shuffle:
            iterator.set_epoch(self._asked)
            self._asked += 1
        return iterator


def _check_sidecar(info: TokensInfo, path: Path, size: int, vocab_size: int | None) -> None:
    if size != 4 * info.tokens:
        raise DataError(
            f"{path} holds {size // 4} tokens, but {path.name}.json beside it says {info.tokens}; the file is cut "
            "short or something else made it: make both again with `abi-train tokenize --force`, or delete the .json"
        )
    if vocab_size is not None and vocab_size < info.vocab_size:
        raise ConfigError(
            f"vocab_size ({vocab_size}) must be at least {info.vocab_size}, the number of ids of the tokenizer that "
            f"made {path}; leave it out, or tokenize again with the model's tokenizer"
        )


class BatchIterator:
    """The batches of an epoch, in an order that depends only on (seed, epoch).

    `for batch in iterator` goes on from `position` to the end of the epoch; `reset()` turns to the next epoch.  Nothing
    else is remembered, so `seek`, or `load_state_dict` in another process, continues with exactly the batches that
    would have come.

    epoch           number of the epoch, from 0
    position        number of the next batch, 0 .. num_batches
    num_batches     batches of an epoch
    dropped_tokens  labels that an epoch does not give: 0 with drop_last=False
    """

    def __init__(
        self,
        dataset: TokenizedDataset,
        batch_size: int,
        seq_len: int,
        shuffle: bool = True,
        seed: int = 0,
        drop_last: bool = True,
        *,
        vocab_size: int | None = None,
    ) -> None:
        self.dataset = dataset
        self.batch_size = check_integer("batch_size", batch_size, 1)
        self.seq_len = check_integer("seq_len", seq_len, 1)
        self.seed = check_integer("seed", seed, 0, 1 << 64)
        self.shuffle = bool(shuffle)
        self.drop_last = bool(drop_last)
        self.vocab_size = dataset.vocab_size if vocab_size is None else check_integer("vocab_size", vocab_size, 1)
        self.epoch = 0
        self.position = 0
        self.num_batches = dataset.num_batches(self.batch_size, self.seq_len, self.drop_last)

        labels = len(dataset) - 1
        if self.num_batches == 0:
            need = self.batch_size * self.seq_len + 1 if self.drop_last else 2
            remedy = "use more text, a smaller batch_size or seq_len, or drop_last=False" if labels else "use more text"
            raise DataError(
                f"{dataset.name}: {len(dataset)} tokens give no batch of {self.batch_size} rows of {self.seq_len}, "
                f"which needs at least {need}; {remedy}"
            )
        self._full_rows = labels // self.seq_len
        self._rows = self._full_rows if self.drop_last else -(-labels // self.seq_len)
        self.dropped_tokens = labels - self.num_batches * self.batch_size * self.seq_len if self.drop_last else 0
        # (full_rows, S + 1): row r is tokens[r S : r S + S + 1], so neighbours share one token.  A view, not a copy.
        self._windows: TokenArray = np.empty((0, self.seq_len + 1), np.uint32)
        if self._full_rows:
            self._windows = np.lib.stride_tricks.sliding_window_view(dataset.tokens, self.seq_len + 1)[:: self.seq_len]
        self._order = np.empty(0, np.int64)  # rows at positions _order_start ... of _order_epoch; only a cache
        self._order_start = 0
        self._order_epoch = -1

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

    def _settings(self) -> dict[str, Any]:
        return {
            "seed": self.seed,
            "shuffle": self.shuffle,
            "drop_last": self.drop_last,
            "batch_size": self.batch_size,
            "seq_len": self.seq_len,
            "num_tokens": len(self.dataset),
            "fingerprint": self.dataset.fingerprint(),
        }

    def state_dict(self) -> dict[str, Any]:
        """Return the place in the data as plain ints and bools (fit for JSON), with what it depends on."""
        return {"epoch": self.epoch, "position": self.position, **self._settings()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go to the place that `state_dict` gave.

        DataError if the data, batch_size, seq_len, seed, shuffle or drop_last are not those of the state: the place
        would mean other batches.
        """
        missing = sorted({"epoch", "position", *self._settings()} - set(state))
        if missing:
            raise DataError(f"state of the data order lacks {', '.join(missing)}; it is not one made by state_dict()")
        for name, value in self._settings().items():
            if state[name] != value:
                raise DataError(
                    f"{name} is {value} here but {state[name]} in the saved state of the data order; continue with the "
                    f"same data and settings, or start at an epoch's beginning with set_epoch({state['epoch']})"
                )
        epoch = check_integer("epoch", state["epoch"], 0)
        position = check_integer("position", state["position"], 0, self.num_batches + 1)
        self.epoch, self.position = epoch, position

    def next(self) -> Batch | None:
        """Return the next batch, or None at the end of the epoch."""
        if self.position >= self.num_batches:
            return None
        start = self.position * self.batch_size
        batch = self._make(self._rows_at(start, min(start + self.batch_size, self._rows)))
        self.position += 1
        return batch

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        batch = self.next()
        if batch is None:
            raise StopIteration
        return batch

    def origin(self, position: int, row: int, column: int) -> str:
        """Return where a row of batch `position` of this epoch is from: data set, row of it, tokens of the file."""
        number = int(self._rows_at(position * self.batch_size + row, position * self.batch_size + row + 1)[0])
        start = self.dataset._start + number * self.seq_len
        return f"{self.dataset.name}, row {number}: tokens {start} to {start + self.seq_len}"

    def _rows_at(self, start: int, stop: int) -> npt.NDArray[np.int64]:
        """Return the row numbers at positions start .. stop - 1 of this epoch's order."""
        if not self.shuffle:
            return np.arange(start, stop, dtype=np.int64)
        end = self._order_start + len(self._order)
        if self._order_epoch != self.epoch or start < self._order_start or stop > end:
            positions = np.arange(start, min(self._rows, max(stop, start + ORDER_BLOCK)))
            self._order = permute(positions, self._rows, self.seed, self.epoch)
            self._order_start, self._order_epoch = start, self.epoch
        return self._order[start - self._order_start : stop - self._order_start]

    def _make(self, rows: npt.NDArray[np.int64]) -> Batch:
        """Return the batch of these rows; at most one of them is the short last row of the data."""
        S, mask = self.seq_len, None
        short = np.flatnonzero(rows == self._full_rows)
        if not short.size:
            block = self._windows[rows]  # (B, S + 1), a copy
            bad_at = self._first_bad(block)
            inputs, labels = block[:, :-1], block[:, 1:]
        else:
            tail = self.dataset.tokens[self._full_rows * S :]  # 2 .. S tokens: the last has no successor
            block = np.zeros((len(rows), S + 1), np.uint32)
            full = rows != self._full_rows
            block[full] = self._windows[rows[full]]
            block[short[0], : len(tail)] = tail
            bad_at = self._first_bad(block)
            used = len(tail) - 1
            inputs, labels = block[:, :-1].copy(), block[:, 1:].copy()
            inputs[short[0], used:] = 0
            labels[short[0], used:] = IGNORE_LABEL
            mask = np.ones((len(rows), S), np.uint8)
            mask[short[0], used:] = 0
        if bad_at is not None and self.vocab_size is not None:
            row, column = bad_at
            self.dataset._reject(int(rows[row]) * S + column, self.vocab_size)
        # "<u4" of the file becomes the machine's own uint32 here.
        return Batch(np.ascontiguousarray(inputs, np.uint32), np.ascontiguousarray(labels, np.uint32), mask)

    def _first_bad(self, block: TokenArray) -> tuple[int, int] | None:
        if self.vocab_size is None or int(block.max()) < self.vocab_size:
            return None
        row, column = divmod(int(np.argmax(block.reshape(-1) >= self.vocab_size)), block.shape[1])
        return row, column


class DataLoader:
    """A data set with the settings of its batches, which `iterator()` gives."""

    def __init__(
        self,
        dataset: TokenizedDataset,
        batch_size: int = 4,
        seq_len: int = 512,
        shuffle: bool = True,
        drop_last: bool = True,
        seed: int | None = None,
    ) -> None:
        self.dataset = dataset
        self.batch_size = check_integer("batch_size", batch_size, 1)
        self.seq_len = check_integer("seq_len", seq_len, 1)
        self.shuffle = bool(shuffle)
        self.drop_last = bool(drop_last)
        self.seed = None if seed is None else check_integer("seed", seed, 0, 1 << 64)

    def iterator(self) -> BatchIterator:
        """Return an iterator over the batches of epoch 0; without a seed, over those of the next epoch at each call."""
        return self.dataset.batches(self.batch_size, self.seq_len, self.shuffle, self.seed, self.drop_last)

    def num_batches(self) -> int:
        """Return the number of batches of an epoch."""
        return self.dataset.num_batches(self.batch_size, self.seq_len, self.drop_last)

    def num_tokens(self) -> int:
        """Return the number of tokens of the data set."""
        return len(self.dataset)
