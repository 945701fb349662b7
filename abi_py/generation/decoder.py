"""The forward pass for decoding: new tokens only, over a cache of the keys and values of all earlier ones.

    prefill   the ids of one sequence, as rows; whole samples through `attention_forward`
    step      one id for each of several sequences, as rows; through `cached_attention_forward`

Both give the logits of the next token.  Each branch has a `decode` beside its forward (`model/layers/`), with the same
kernels but for that one; nothing is kept for a backward pass, so one set of arrays serves all branches.

A sequence is computed by itself when it is read, and at most FEW rows go through a step together: kernels give a row
the same bits whatever is beside it, so a prompt in a batch has the logits that it has alone.
"""

from dataclasses import dataclass
from typing import Any

import numba
import numpy as np

from ..errors import DataError
from ..kernels.engine.scratch import aligned_empty
from ..kernels.matmul import FEW
from ..model.arena import make_shape
from ..model.layers.layer import Branch
from ..model.layers.run import Chunk, KeysAndValues, Run
from ..model.transformer import Transformer

__all__ = ["FEW", "Cache", "Decoder"]

CHUNK = 512  # rows of a prompt that go through the wide products at once: bounds the memory of a long prompt
BYTES_OF_A_THREAD = 2 << 20  # weights that one thread reads in the time of a few kernel calls: fewer need no second
FIRST_CAPACITY = 256  # positions of a new cache


class Cache:
    """Keys and values of `slots` sequences: for each branch that has any two arrays (slots, G, capacity, D) float32.

    G is the number of key/value heads, so grouped-query attention shrinks the cache.  `lengths[slot]` tokens are there.
    """

    def __init__(self, branches: list[Branch], slots: int, longest: int) -> None:
        """Begin empty, with room for few positions; `longest`: no sequence has more."""
        self.slots, self.longest = slots, longest
        self.shapes = {i: found for i, branch in enumerate(branches) if (found := branch.keys_and_values)}
        self.capacity = 0
        self.lengths = np.zeros(slots, np.int32)
        self.kept: dict[int, KeysAndValues] = {}  # by the number of the branch

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays."""
        return sum(array.nbytes for pair in self.kept.values() for array in pair)

    def reserve(self, positions: int) -> None:
        """Make room for so many positions in every slot, at most `longest`; growth doubles, so copies are rare."""
        if positions <= self.capacity:
            return
        grown = max(positions, 2 * self.capacity, FIRST_CAPACITY)
        self.capacity, before = min(grown, self.longest), self.capacity
        used = int(self.lengths.max(initial=0))
        for i, (heads, width) in self.shapes.items():
            shape = self.slots, heads, self.capacity, width
            keys, values = aligned_empty(shape), aligned_empty(shape)
            if before:
                for larger, smaller in zip((keys, values), self.kept[i], strict=True):
                    larger[:, :, :used] = smaller[:, :, :used]
            self.kept[i] = keys, values


@dataclass
class Arrays:
    """The arrays of a call for some rows, of which `wide` pass the products of the feed-forward layers at once."""

    x: np.ndarray  # (rows, C)
    ids: np.ndarray  # (rows,) int32
    slots: np.ndarray  # (rows,) int32
    positions: np.ndarray  # (rows,) int32
    n: np.ndarray  # (wide, C)
    r: np.ndarray  # (wide,)
    branches: list[Any]  # of each its `Decoding`
    chunks: list[Chunk]


class Decoder:
    """A model's weights, read for decoding, and the cache of up to `slots` sequences.

    The weights are views: a model that is trained further is decoded as it is at that moment, but what a slot holds
    then belongs to older weights and must be read again (`clear`).  Those of a LoraModel on a TrainableModel are a
    merged copy, so that a token costs no more than without adapters; after further training, make a new Decoder.
    """

    def __init__(self, model: Transformer, slots: int = 1) -> None:
        """Make an empty cache; nothing is copied from a model without adapters, others are merged into a copy."""
        model = model.for_decoding()
        self.config, self._stack = model.config, model.stack
        self.cache = Cache(self._stack.branches, slots, self.config.max_seq_len)
        self._threads = max(1, sum(w.nbytes for w in model.base.values()) // BYTES_OF_A_THREAD)
        self._few = {n: self._arrays(n, n) for n in range(1, min(slots, FEW) + 1)}
        self._logits = aligned_empty((slots, self.config.vocab_size))

    def _arrays(self, rows: int, wide: int) -> Arrays:
        """Return the arrays between the kernels for `rows` tokens; branches share those of one name."""
        memory: dict[tuple[str, bool], np.ndarray] = {}
        branches = []
        for branch in self._stack.branches:
            arrays = {}
            for name, entry in branch.decoding().items():
                count, key = wide if entry.chunked else rows, (name, entry.chunked)
                if key not in memory or memory[key].size < count * entry.width:
                    memory[key] = aligned_empty(count * entry.width)
                arrays[name] = make_shape(entry, memory[key], count)
            branches.append(branch.Decoding(**arrays, **branch.parts(arrays)))
        width = self._stack.embedding.width
        cuts = range(0, rows, wide)
        return Arrays(
            x=aligned_empty((rows, width)),
            **{name: np.empty(rows, np.int32) for name in ("ids", "slots", "positions")},
            n=aligned_empty((wide, width)),
            r=aligned_empty(wide),
            branches=branches,
            chunks=[(slice(i, min(i + wide, rows)), slice(0, min(wide, rows - i))) for i in cuts],
        )

    # -- the two ways in -------------------------------------------------------------------------

    @property
    def lengths(self) -> np.ndarray:
        """Tokens that each slot holds, int32 (slots,)."""
        return self.cache.lengths

    def clear(self, slot: int, length: int = 0) -> None:
        """Forget what slot holds after its first `length` tokens."""
        self.cache.lengths[slot] = min(length, int(self.cache.lengths[slot]))

    def prefill(self, slot: int, ids: np.ndarray) -> np.ndarray:
        """Append ids (T,) to a slot and return the logits (V,) after the last: a view, valid until the next call.

        DataError for no ids, ids outside the vocabulary, or more tokens than max_seq_len.
        """
        ids = np.asarray(ids)
        self._check(ids, int(self.lengths[slot]) + ids.size)
        past = int(self.lengths[slot])
        rows = ids.size
        self.cache.reserve(past + rows)
        a = self._few[rows] if rows in self._few else self._arrays(rows, min(rows, CHUNK))
        a.ids[:], a.slots[:], a.positions[:] = ids, slot, np.arange(past, past + rows)
        starts = np.zeros(rows, np.int32) if past == 0 and rows > 1 else None
        self._run(a, starts)
        self.lengths[slot] += rows
        return self._output(a.x[-1:], a, self._logits[slot : slot + 1])[0]

    def step(self, slots: np.ndarray, ids: np.ndarray) -> np.ndarray:
        """Append ids[i] to slots[i] and return the logits (N, V): a view, valid until the next call.

        DataError for ids outside the vocabulary or a slot that holds max_seq_len tokens.
        """
        self._check(ids, int(self.lengths[slots].max()) + 1)
        self.cache.reserve(int(self.lengths[slots].max()) + 1)
        allowed = numba.get_num_threads()
        numba.set_num_threads(min(allowed, self._threads))
        try:
            for first in range(0, len(slots), FEW):
                some = slots[first : first + FEW]
                a = self._few[len(some)]
                a.ids[:], a.slots[:], a.positions[:] = ids[first : first + FEW], some, self.lengths[some]
                self._run(a, None)
                self._output(a.x, a, self._logits[first : first + len(some)])
        finally:
            numba.set_num_threads(allowed)
        self.lengths[slots] += 1
        return self._logits[: len(slots)]

    def _check(self, ids: np.ndarray, length: int) -> None:
        if ids.size == 0:
            raise DataError("there is nothing to read; give at least one token id")
        if ids.min() < 0 or ids.max() >= self.config.vocab_size:
            at = int(np.flatnonzero((ids < 0) | (ids >= self.config.vocab_size))[0])
            raise DataError(
                f"id {ids[at]} at place {at} must be 0 ... {self.config.vocab_size - 1} (vocab_size - 1); "
                "tokenize with this model's vocabulary"
            )
        if length > self.config.max_seq_len:
            raise DataError(f"{length} tokens exceed max_seq_len ({self.config.max_seq_len}); give fewer tokens")

    # -- the pass --------------------------------------------------------------------------------

    def _run(self, a: Arrays, starts: np.ndarray | None) -> None:
        """Turn a.ids into a.x, the output of the last branch; `starts`: the rows are a whole sample from position 0."""
        run = Run(1, len(a.ids), starts, a.positions, slots=a.slots)
        self._stack.embedding.forward(a.x, a.ids, run)
        for i, (branch, arrays) in enumerate(zip(self._stack.branches, a.branches, strict=True)):
            branch.decode(a.x, arrays, self.cache.kept.get(i), run, a.chunks)

    def _output(self, x: np.ndarray, a: Arrays, logits: np.ndarray) -> np.ndarray:
        """Write the logits (N, V) of the last branch's output x (N, C)."""
        self._stack.head.decode(logits, x, a.n[: len(x)], a.r[: len(x)])
        return logits
