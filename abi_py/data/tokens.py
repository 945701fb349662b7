"""Token ids in a file or in memory: a data set of which `token_batches.py` makes batches.

    file       u32 little-endian, one after the other; no header          token i is bytes 4i .. 4i + 3

The file is mapped into memory, never read as a whole, so a file of 100 GB opens at once.
"""

from __future__ import annotations

import hashlib
import os
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from ..errors import ConfigError, DataError, counted
from ..files import atomic_file
from ..reprs import Shown
from .batch import TokenArray, as_tokens, check_integer
from .feed import Batching, Identity
from .sidecar import TokensInfo, read_sidecar
from .token_batches import BatchIterator
from .token_types import check_token_type

__all__ = ["DataLoader", "TokenizedDataset", "check_output"]

SCAN_BLOCK = 1 << 22  # tokens that check_vocab looks at and save writes at once: 16 MB
FINGERPRINT_TOKENS = 1 << 14
EDGE = 1 << 18  # tokens at either end that `identity` hashes: 1 MB
SAMPLES = 64  # places between them of which it hashes one token


def check_output(path: str | os.PathLike[str]) -> Path:
    """Return `path` as a Path; DataError if it exists and is not a regular file: replacing a device would remove it."""
    path = Path(path)
    if path.exists() and not path.is_file():
        raise DataError(f"{path} is not a regular file and cannot be replaced; give the name of a file")
    return path


class TokenizedDataset(Shown):
    """A sequence of token ids, in a mapped file or in memory.

    tokens      (N,) uint32, read only; little-endian as in the file
    vocab_size  batches are checked to hold only ids below it; None = no check
    name        what error messages call it: the file's name, or "tokens"
    skipped     files that were left out when the tokens were made from a directory, each with its reason
    notes       lines about what was left out, or read in another way than one might think, when they were made
    info        what the sidecar of the file says, or None
    """

    conversations = False  # rows are cut out of a text, not conversations with an answer
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
        self.start = start  # offset of tokens[0] in the file, for messages
        self._asked = 0  # shuffled iterators that were made without a seed

    @classmethod
    def load(cls, path: str | os.PathLike[str], vocab_size: int | None = None) -> TokenizedDataset:
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
                f"{path}: size is {counted(size, 'byte')}, which is not a multiple of 4, but each token is a u32 of 4 "
                f"bytes; the file is cut short or is no token file: make it again with `abi-train tokenize`"
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
    ) -> TokenizedDataset:
        """Take ids that are in memory (list, or array of any integer dtype); a uint32 array is not copied."""
        return cls(as_tokens(tokens, name), vocab_size, name)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the ids as u32 little-endian; `path` holds the old file or all of the new one, whatever happens."""
        with atomic_file(check_output(path)) as file:
            for start in range(0, len(self.tokens), SCAN_BLOCK):
                file.write(self.tokens[start : start + SCAN_BLOCK].astype("<u4", copy=False).tobytes())

    def split(self, fraction: float = 0.9) -> tuple[TokenizedDataset, TokenizedDataset]:
        """Return the first `fraction` of the tokens, for training, and the rest, for validation; neither is a copy.

        The parts share no token, and no label of the first is in the second.  ConfigError unless 0 < fraction < 1;
        DataError if a part would have fewer than two tokens.
        """
        if not 0.0 < fraction < 1.0:
            raise ConfigError(f"fraction ({fraction}) is the training part and must be between 0 and 1; try 0.9")
        at = round(len(self.tokens) * fraction)
        if at < 2 or len(self.tokens) - at < 2:
            raise DataError(
                f"{self.name}: {counted(len(self.tokens), 'token')} split at {fraction}: {at} for training and "
                f"{len(self.tokens) - at} for validation, but each part needs at least 2; use more text"
            )
        return self._part(0, at), self._part(at, len(self.tokens))

    def _part(self, start: int, stop: int) -> TokenizedDataset:
        part = self.tokens[start:stop]
        made = TokenizedDataset(part, self.vocab_size, self.name, self.skipped, start=self.start + start)
        made.info, made.notes = self.info, self.notes
        return made

    def __len__(self) -> int:
        return len(self.tokens)

    def _says(self) -> str:
        return f"{self.name!r}, {counted(len(self.tokens), 'token')}, vocab_size={self.vocab_size}"

    @property
    def num_tokens(self) -> int:
        """Number of tokens."""
        return len(self.tokens)

    @property
    def longest_row(self) -> int:
        """The most tokens that a row can have."""
        return self.num_tokens

    def summary(self) -> str:
        """Return what it holds, in a phrase."""
        return f"{self.name}: {counted(self.num_tokens, 'token')}"

    def example(self, index: int = 0) -> None:
        """Return None: no row has a question and an answer."""

    def fingerprint(self) -> int:
        """Return a CRC-32 of the length, the beginning and the end: a cheap check that a resumed run has its data."""
        head, tail = self.tokens[:FINGERPRINT_TOKENS], self.tokens[-FINGERPRINT_TOKENS:]
        crc = zlib.crc32(len(self.tokens).to_bytes(8, "little"))
        for part in (head, tail):
            crc = zlib.crc32(part.astype("<u4", copy=False).tobytes(), crc)
        return crc

    def identity(self) -> Identity:
        """Return the number of tokens, and a SHA-256 of both ends and of samples between them."""
        tokens, length = self.tokens, len(self.tokens)
        samples = tokens[np.linspace(0, length - 1, SAMPLES).astype(np.int64)]
        content = b"".join(part.astype("<u4").tobytes() for part in (tokens[:EDGE], tokens[-EDGE:], samples))
        return {"length": length, "sha256": hashlib.sha256(content).hexdigest()}

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
                self.reject(start + int(np.argmax(block >= vocab_size)), vocab_size)
        return largest

    def reject(self, at: int, vocab_size: int) -> None:
        found, offset = int(self.tokens[at]), self.start + at
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
    ) -> BatchIterator:
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

    def feed(self, batching: Batching) -> BatchIterator:
        """Return the batches that training and evaluation see: of all labels, the tail included."""
        sizes, vocab_size = (batching.batch_size, batching.seq_len), batching.vocab_size
        return self.batches(*sizes, batching.shuffle, batching.seed, drop_last=False, vocab_size=vocab_size)


def _check_sidecar(info: TokensInfo, path: Path, size: int, vocab_size: int | None) -> None:
    if size != 4 * info.tokens:
        raise DataError(
            f"{path} holds {counted(size // 4, 'token')}, but {path.name}.json beside it says {info.tokens}; the file "
            "is cut short or something else made it: make both again with `abi-train tokenize --force`, or delete the "
            ".json"
        )
    if vocab_size is not None and vocab_size < info.vocab_size:
        raise ConfigError(
            f"vocab_size ({vocab_size}) must be at least {info.vocab_size}, the number of ids of the tokenizer that "
            f"made {path}; leave it out, or tokenize again with the model's tokenizer"
        )


class DataLoader(Shown):
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

    def identity(self) -> Identity:
        """Return that of the data set."""
        return self.dataset.identity()

    def feed(self, batching: Batching) -> BatchIterator:
        """Return the loader's own batches; for an evaluation of the same size, in order and of all labels."""
        sizes = self.batch_size, self.seq_len
        feed = self.iterator() if batching.training else self.dataset.batches(*sizes, False, 0, drop_last=False)
        feed.vocab_size = batching.vocab_size
        return feed

    def num_batches(self) -> int:
        """Return the number of batches of an epoch."""
        return self.dataset.num_batches(self.batch_size, self.seq_len, self.drop_last)

    def num_tokens(self) -> int:
        """Return the number of tokens of the data set."""
        return len(self.dataset)
