"""The forward pass for decoding: new tokens only, over a cache of the keys and values of all earlier ones.

    prefill   the ids of one sequence, as rows
    step      one id for each of several sequences, as rows

Both give the logits of the next token.  Each branch has a `decode` beside its forward (`model/layers/`), with the same
kernels but for attention's, which is `cached_attention_forward`; nothing is kept for a backward pass, so one set of
arrays serves all branches.

What is computed for a token depends, to the bit, on the token and those before it alone: not on the rows beside it, on
how a text was cut into calls, or on whether it was read or written.  So a prompt in a batch has the logits that it has
alone, and keys and values may be kept for the next prompt that begins alike (`prefixes.py`).
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numba
import numpy as np

from ..errors import DataError
from ..kernels.cached_attention import parts_of_keys
from ..kernels.engine.checksum import checksum
from ..kernels.engine.replay import between
from ..kernels.engine.scratch import aligned_empty
from ..model.arena import make_shape
from ..model.layers.layer import Branch, Layer, Noted
from ..model.layers.run import Chunk, KeysAndValues, Run
from ..model.passes import Passes
from ..model.transformer import Transformer

__all__ = ["Cache", "Decoder", "weights_mark"]

CHUNK = 512  # rows of a prompt that go through the wide products at once: bounds the memory of a long prompt
BYTES_OF_A_THREAD = 2 << 20  # weights that one thread reads in the time of a few kernel calls: fewer need no second
FIRST_CAPACITY = 256  # positions of a new cache


class Cache:
    """Keys and values of `slots` sequences: for each branch that has any two arrays (slots, G, capacity, D) float32.

    G is the number of key/value heads, so grouped-query attention shrinks the cache.  `lengths[slot]` tokens are there.
    """

    def __init__(self, branches: list[Branch], slots: int, longest: int) -> None:
        """Begin empty, without room; `longest`: no sequence has more, and until it is changed `doubles_to` is that."""
        self.slots, self.longest, self.doubles_to = slots, longest, longest
        self.shapes = {i: found for i, branch in enumerate(branches) if (found := branch.keys_and_values)}
        self.capacity = 0
        self.lengths = np.zeros(slots, np.int32)
        self.kept: dict[int, KeysAndValues] = {}  # by the number of the branch

    @property
    def bytes_of_position(self) -> int:
        """Bytes that a token of one sequence takes."""
        return sum(8 * heads * width for heads, width in self.shapes.values())

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays."""
        return sum(array.nbytes for pair in self.kept.values() for array in pair)

    def grown(self, positions: int) -> int:
        """Return the capacity for so many positions: it doubles, up to `doubles_to`, so copies are rare."""
        if positions <= self.capacity:
            return self.capacity
        return min(max(positions, min(max(2 * self.capacity, FIRST_CAPACITY), self.doubles_to)), self.longest)

    def move(self, kept: list[int], slots: int, capacity: int) -> None:
        """Go to new arrays of so many slots and positions, in which slot i holds what kept[i] held.

        What is longer than `capacity` is forgotten.  Only what a slot holds is copied: memory that nothing was written
        to costs none.
        """
        lengths = np.zeros(slots, np.int32)
        lengths[: len(kept)] = np.where(self.lengths[kept] <= capacity, self.lengths[kept], 0)
        for i, (heads, width) in self.shapes.items():
            shape = slots, heads, capacity, width
            pair = aligned_empty(shape), aligned_empty(shape)
            for slot in np.flatnonzero(lengths):
                for new, old in zip(pair, self.kept[i], strict=True):
                    new[slot, :, : lengths[slot]] = old[kept[slot], :, : lengths[slot]]
            self.kept[i] = pair
        self.lengths = lengths
        self.slots, self.capacity = slots, capacity


def weights_mark(model: Transformer) -> bytes:
    """Return a checksum of what of a model's weights can be changed: not of files that are mapped to be read."""
    trained = model.parameters.weights_flat
    others = [w for w in model.base.values() if w.flags.writeable and not np.may_share_memory(w, trained)]
    return checksum(trained, *others)


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
    steps: Passes = field(default_factory=Passes)  # over these arrays and the present cache


class Decoder:
    """A model's weights, read for decoding, and the cache of up to `slots` sequences.

    The weights are views: a model that is trained further is decoded as it is at that moment, but what a slot holds
    then belongs to older weights and must be read again (`weights_mark`).  Those of a LoraModel on a TrainableModel are
    a merged copy, so that a token costs no more than without adapters; after further training, make a new Decoder.
    What DoRA measures of its weights is measured anew by `prefill`, not at each step, which it would make slower.
    """

    def __init__(self, model: Transformer, slots: int = 1, *, integer: bool = True) -> None:
        """Make an empty cache; nothing is copied from a model without adapters, others are merged into a copy.

        With `integer`, quantised matrices are multiplied as whole numbers (`GenerationConfig.integer_products`).
        """
        self.integer = integer
        model = model.for_decoding()
        self.config, self._stack, self._model = model.config, model.stack, model
        self.cache = Cache(self._stack.branches, slots, self.config.max_seq_len)
        self._threads = max(1, sum(w.nbytes for w in model.base.values()) // BYTES_OF_A_THREAD)
        self._of_steps: dict[int, Arrays] = {}  # by the number of sequences
        self._notable = Noted(self._stack.layers)
        self._noted = self._notable.now()  # in the present step: ids of layers
        self._logits = aligned_empty((slots, self.config.vocab_size))
        angles = [angles for branch in self._stack.branches if (angles := getattr(branch, "angles", None)) is not None]
        self.longest_kept = min((each.unscaled for each in angles), default=self.config.max_seq_len)

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
            ids=np.empty(rows, np.int32),
            slots=np.empty(rows, np.int32),
            positions=np.empty(rows, np.int32),
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

    def reserve(self, positions: int) -> None:
        """Have room for so many positions in every slot; what they hold stays."""
        if positions > self.cache.capacity:
            self.move(list(range(self.cache.slots)), self.cache.slots, self.cache.grown(positions))

    def move(self, kept: list[int], slots: int, capacity: int) -> None:
        """Let the cache `move`."""
        self._of_steps.clear()  # what was noted over the old arrays goes, and they with it
        self.cache.move(kept, slots, capacity)
        if len(self._logits) != slots:
            self._logits = aligned_empty((slots, self.config.vocab_size))

    def copy(self, source: int, target: int, length: int) -> None:
        """Let a slot hold the first `length` tokens of another one, which must hold as many."""
        for keys, values in self.cache.kept.values():
            keys[target, :, :length] = keys[source, :, :length]
            values[target, :, :length] = values[source, :, :length]
        self.cache.lengths[target] = length

    def prefill(self, slot: int, ids: np.ndarray) -> np.ndarray:
        """Append ids (T,) to a slot and return the logits (V,) after the last: a view, valid until the next call.

        DataError for no ids, ids outside the vocabulary, or more tokens than max_seq_len.
        """
        ids = np.asarray(ids)
        self._check(ids, int(self.lengths[slot]) + ids.size)
        self._model.begin_pass()
        past = int(self.lengths[slot])
        rows = ids.size
        self.reserve(past + rows)
        a = self._arrays(rows, min(rows, CHUNK))
        a.ids[:], a.slots[:], a.positions[:] = ids, slot, np.arange(past, past + rows)
        run = self._run_of(a)
        self._run(a, a.ids, run)
        self.lengths[slot] += rows
        return self._output(a.x[-1:], a, self._logits[slot : slot + 1], run)[0]

    def step(self, slots: np.ndarray, ids: np.ndarray) -> np.ndarray:
        """Append ids[i] to slots[i] and return the logits (N, V): a view, valid until the next call.

        DataError for ids outside the vocabulary or a slot that holds max_seq_len tokens.
        """
        longest = int(self.lengths[slots].max()) + 1
        self._check(ids, longest)
        self.reserve(longest)
        allowed = numba.get_num_threads()
        numba.set_num_threads(min(allowed, self._threads))
        try:
            rows = len(slots)
            if rows not in self._of_steps:
                self._of_steps[rows] = self._arrays(rows, rows)
            a = self._of_steps[rows]
            a.ids[:], a.slots[:], a.positions[:] = ids, slots, self.lengths[slots]
            run = self._run_of(a)
            if self.cache.capacity <= self.longest_kept:
                self._noted = self._notable.now()
                a.steps.run(self._step, (a.ids,), run, self._noted, parts_of_keys(longest))
            else:  # angles that depend on how long a text is are made anew
                self._step(a.ids, run)
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

    def _run_of(self, a: Arrays) -> Run:
        return Run(1, len(a.ids), None, a.positions, slots=a.slots, integer=self.integer)

    def _step(self, ids: np.ndarray, run: Run) -> None:
        """Write the logits of a step: the function that `steps` replays."""
        a = self._of_steps[len(ids)]
        self._run(a, ids, run)
        self._do(self._stack.head, lambda run: self._output(a.x, a, self._logits[: len(ids)], run), run)

    def _run(self, a: Arrays, ids: np.ndarray, run: Run) -> None:
        """Turn ids into a.x, the output of the last branch."""
        embedding = self._stack.embedding
        self._do(embedding, partial(embedding.forward, a.x, ids), run)
        for i, (branch, arrays) in enumerate(zip(self._stack.branches, a.branches, strict=True)):
            self._do(branch, partial(branch.decode, a.x, arrays, self.cache.kept.get(i), chunks=a.chunks), run)

    def _do(self, layer: Layer, function: Callable[[Run], object], run: Run) -> None:
        """Call function(run), a layer's decoding; Python does so in a replay too, unless all of it is noted."""
        if id(layer) in self._noted:
            function(run)
        else:
            between(function, run)

    def _output(self, x: np.ndarray, a: Arrays, logits: np.ndarray, run: Run) -> np.ndarray:
        """Write the logits (N, V) of the last branch's output x (N, C)."""
        self._stack.head.decode(logits, x, a.n[: len(x)], a.r[: len(x)], run)
        return logits
