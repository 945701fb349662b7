"""The batches of an epoch over a sequence of token ids, in an order that can be resumed at any of them.

row r      input_ids = tokens[r S : r S + S]                          labels = tokens[r S + 1 : r S + S + 1]
batch      B rows; with shuffle they come in the order permute(position, rows, seed, epoch) of order.py

N tokens have N - 1 labels (the first token has nothing before it), (N - 1) // S full rows, and (N - 1) // (B S)
full batches.  What is left over is one short row of fewer than S labels, and full rows too few for a batch.
drop_last=True leaves them out and counts them (`dropped_tokens`); drop_last=False gives them: the short row is
padded with id 0 and labels that are not trained, and the last batch has fewer rows.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from ..errors import DataError, counted
from .batch import IGNORE_LABEL, Batch, TokenArray, check_integer
from .feed import Dataset, Feed
from .order import permute

__all__ = ["BatchIterator", "Tokens"]

ORDER_BLOCK = 16384  # rows whose order is worked out at once: about 2 ms, 128 KB


class Tokens(Dataset, Protocol):
    """The sequence of ids that batches are made of: `tokens.TokenizedDataset`."""

    tokens: TokenArray
    vocab_size: int | None
    name: str
    start: int

    def __len__(self) -> int: ...
    def num_batches(self, batch_size: int, seq_len: int, drop_last: bool = False) -> int: ...
    def fingerprint(self) -> int: ...
    def reject(self, at: int, vocab_size: int) -> None: ...


class BatchIterator(Feed):
    """The batches of an epoch, in an order that depends only on (seed, epoch).

    What is common to all feeds is in `feed.py`; `load_state_dict` goes on in another process.

    dropped_tokens  labels that an epoch does not give: 0 with drop_last=False
    """

    dataset: Tokens

    def __init__(
        self,
        dataset: Tokens,
        batch_size: int,
        seq_len: int,
        shuffle: bool = True,
        seed: int = 0,
        drop_last: bool = True,
        *,
        vocab_size: int | None = None,
    ) -> None:
        super().__init__(
            dataset,
            num_batches=dataset.num_batches(batch_size, seq_len, drop_last),
            batch_size=batch_size,
            seq_len=seq_len,
            shuffle=shuffle,
            seed=seed,
            drop_last=bool(drop_last),
        )
        self.drop_last = bool(drop_last)
        self.vocab_size = dataset.vocab_size if vocab_size is None else check_integer("vocab_size", vocab_size, 1)
        labels = len(dataset) - 1
        if self.num_batches == 0:
            need = self.batch_size * self.seq_len + 1 if self.drop_last else 2
            remedy = "use more text, a smaller batch_size or seq_len, or drop_last=False" if labels else "use more text"
            raise DataError(
                f"{dataset.name}: no batch of {counted(self.batch_size, 'row')} of {self.seq_len} comes of "
                f"{counted(len(dataset), 'token')}: it needs at least {need}; {remedy}"
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

    def _settings(self) -> dict[str, Any]:
        return {**self.order, "num_tokens": len(self.dataset), "fingerprint": self.dataset.fingerprint()}

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

    def batch_at(self, position: int) -> Batch:
        """Return the batch at a position of this epoch; DataError for an id that is not below vocab_size."""
        start = position * self.batch_size
        return self._make(self._rows_at(start, min(start + self.batch_size, self._rows)))

    def origin(self, position: int, row: int, column: int) -> str:
        """Return where a row of batch `position` of this epoch is from: data set, row of it, tokens of the file."""
        number = int(self._rows_at(position * self.batch_size + row, position * self.batch_size + row + 1)[0])
        start = self.dataset.start + number * self.seq_len
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
            self.dataset.reject(int(rows[row]) * S + column, self.vocab_size)
        # "<u4" of the file becomes the machine's own uint32 here.
        return Batch(np.ascontiguousarray(inputs, np.uint32), np.ascontiguousarray(labels, np.uint32), mask)

    def _first_bad(self, block: TokenArray) -> tuple[int, int] | None:
        if self.vocab_size is None or int(block.max()) < self.vocab_size:
            return None
        row, column = divmod(int(np.argmax(block.reshape(-1) >= self.vocab_size)), block.shape[1])
        return row, column
