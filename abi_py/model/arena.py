"""The arena: every array that a step needs between its kernels, laid out once for a number of rows and then reused.

What a layer's forward saves for its backward is its table `saved()`; gradient checkpointing is a choice of which of the
entries are kept for every block, and which are shared between blocks and computed again.  Blocks are cut into
*segments*:

    none             one segment of all blocks: nothing is computed again
    every_n_layers   segments of `checkpoint_interval` blocks: the input of each is kept, its inside is shared by all
    full             segments of one block: only the input of each block is kept
    attention_only   one segment, but what attention saves (q k v, its output, lse) is shared by all blocks

A step in bfloat16 saves the entries that are `narrow` in bfloat16 (as uint16), half the bytes; the residual stream, in
which a small share of a layer would be lost, stays float32.

Scratch is used again and again: entries that name the same `place` share its memory, because the one is read for the
last time before the other is written (a linear layer's backward reads its input before it writes the input's gradient),
or because a kernel turns the one into the other (SwiGLU's backward: dh into h).  The head works between the two passes
over the branches: the memory of its logits spans all the scratch that it does not use itself.

In a step that does not add to gradients, saved arrays lie in the memory of gradients that are not written yet
(`lent.py`), as far as they find room there.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ..config import TrainableModelConfig
from ..families import layers, tensor_table
from ..kernels.engine.scratch import aligned_empty, whole_lines
from ..parameters import Buffers, Tensor
from ..shape import CheckpointingStrategy, ModelShape, Precision
from .layers.embedding import Embedding
from .layers.head import Head, HeadScratch
from .layers.layer import Branch, Layer
from .layers.run import Entry, Form
from .lent import Piece, lay_out, lent_ranges
from .passes import Passes

Key = tuple[int, str, int, np.dtype]  # of an array that is saved: its slot (`Slots`) and type

__all__ = ["Arena", "Arrays", "memory_plan", "parts_of", "saved_bytes", "scratch_bytes"]


def parts_of(layers: Sequence[Layer]) -> tuple[Embedding, list[Branch], Head]:
    """Return the embedding, the branches and the head of a list of layers; TypeError if it is made otherwise."""
    first, *between, last = layers
    branches = [layer for layer in between if isinstance(layer, Branch)]
    if not isinstance(first, Embedding) or not isinstance(last, Head) or len(branches) < len(between):
        raise TypeError("a model is a list of layers: an Embedding, then branches, then a Head")
    return first, branches, last


def segment_length(shape: ModelShape) -> int:
    """Return how many blocks form a segment."""
    lengths = {
        CheckpointingStrategy.FULL: 1,
        CheckpointingStrategy.EVERY_N_LAYERS: min(shape.checkpoint_interval, shape.num_layers),
    }
    return lengths.get(shape.checkpointing, shape.num_layers)


def dtype(entry: Entry, narrow: bool) -> np.dtype:
    """Return what an entry is saved in; `narrow`: by a step in bfloat16."""
    return np.dtype(np.uint16 if narrow and entry.narrow else np.float32)


def make_shape(entry: Entry, memory: np.ndarray, rows: int) -> np.ndarray:
    """Return a flat piece of memory in the form of an entry, for so many rows."""
    flat = memory[: rows * entry.width]
    if entry.form is Form.ROWS:
        return flat.reshape(rows, entry.width)
    return flat.reshape(entry.width, rows) if entry.form is Form.COLUMNS else flat


class Slots:
    """Which array of memory an entry of a branch has; branches with the same slot share it."""

    def __init__(self, shape: ModelShape, branches: Sequence[Branch]) -> None:
        """Count the branches of each block."""
        self.length = segment_length(shape)
        self.attention_only = shape.checkpointing is CheckpointingStrategy.ATTENTION_ONLY
        self.place: list[int] = []  # of a branch in its block
        for i, branch in enumerate(branches):
            same = i > 0 and branches[i - 1].block == branch.block
            self.place.append(self.place[-1] + 1 if same else 0)
        self.branches = branches

    def slot(self, i: int, name: str, entry: Entry) -> tuple[int, str, int]:
        """Return the slot of an entry of the branch i: its place in the block, the entry, and which of its arrays."""
        place, block = self.place[i], self.branches[i].block
        inside = block % self.length
        first = name == "x" and place == 0
        if first and inside == 0:
            return place, name, block  # kept: where recomputation starts
        if self.attention_only and entry.again:
            return place, name, -1
        return place, name, -inside if first else inside  # inner inputs have arrays of their own, apart from the kept


@dataclass
class Needed:
    """An array that is saved: its width, that of the widest entry in it, and the first branch that uses it."""

    width: int
    first: int

    def piece(self, key: Key, rows: int) -> Piece:
        """Return what it takes of a buffer of float32."""
        return Piece(-(-rows * self.width * key[-1].itemsize // 4), self.first)


def saved_arrays(slots: Slots, narrow: bool) -> dict[Key, Needed]:
    """Return the arrays that a step saves, by slot and type; branches with the same slot share one."""
    found: dict[Key, Needed] = {}
    for i, branch in enumerate(slots.branches):
        for name, entry in branch.saved().items():
            needed = found.setdefault((*slots.slot(i, name, entry), dtype(entry, narrow)), Needed(0, i))
            needed.width = max(needed.width, entry.width)
    return found


def borrowed(arrays: Mapping[Key, Needed], rows: int, lent: Sequence[Sequence[slice]]) -> dict[Key, slice]:
    """Return which of the arrays lie in the memory of gradients, and where."""
    return lay_out({key: needed.piece(key, rows) for key, needed in arrays.items()}, lent)


def saved_bytes(
    shape: ModelShape, branches: Sequence[Branch], rows: int, narrow: bool = False, table: Sequence[Tensor] = ()
) -> int:
    """Return the bytes of saved activations for `rows` tokens, without those that the gradients of `table` hold.

    narrow   of a step in bfloat16
    """
    arrays = saved_arrays(Slots(shape, branches), narrow)
    elsewhere = borrowed(arrays, rows, lent_ranges(table, branches))
    return rows * sum(key[-1].itemsize * needed.width for key, needed in arrays.items() if key not in elsewhere)


class Places:
    """The pieces of scratch: how many floats each has, and which lie under the head's logits."""

    def __init__(self, branches: Sequence[Branch], head: Head, rows: int) -> None:
        """Lay them out for `rows` tokens; dx is the gradient that flows from branch to branch."""
        self.floats: dict[str, int] = {}
        own = {entry.place or name for name, entry in head.scratch().items()}
        for table in ({"dx": Entry(head.width)}, head.scratch(), *(branch.scratch() for branch in branches)):
            for name, entry in table.items():
                place = entry.place or name
                self.floats[place] = max(self.floats.get(place, 0), rows * entry.width)
        self.under = [place for place in self.floats if place not in own]
        for place in self.under:  # side by side: each begins at a cache line
            self.floats[place] = whole_lines(self.floats[place])
        self.logits = max(head.logit_floats(rows), sum(self.floats[place] for place in self.under))

    def make(self) -> dict[str, np.ndarray]:
        """Return the memory of each place, and `logits`, which spans those under it."""
        logits, used = aligned_empty(self.logits), 0
        memory = {"logits": logits}
        for place, size in self.floats.items():
            if place in self.under:
                memory[place], used = logits[used : used + size], used + size
            else:
                memory[place] = aligned_empty(size)
        return memory


def scratch_bytes(branches: Sequence[Branch], head: Head, rows: int) -> int:
    """Return the bytes of scratch for `rows` tokens."""
    places = Places(branches, head, rows)
    return 4 * (places.logits + sum(size for place, size in places.floats.items() if place not in places.under))


@dataclass
class Arrays:
    """The arrays of a step: of each branch what it saves and its scratch, the head's, and the stream's gradient."""

    saved: list[Any]  # of each branch its `Saved`
    scratch: list[Any]  # and its `Scratch`
    head: HeadScratch
    dx: np.ndarray  # (N, C)
    unread: np.ndarray  # (N, C): for an output that is not needed again
    passes: Passes = field(default_factory=Passes)


class Arena:
    """Activations and scratch for up to `capacity` rows; `arrays` hands them out, made once for each number of rows."""

    def __init__(self, shape: ModelShape, layers: Sequence[Layer], lender: Buffers | None = None) -> None:
        """Allocate nothing yet; the gradients of `lender` lend memory to steps that borrow."""
        self.shape, self.lender = shape, lender
        _, self.branches, self.head = parts_of(layers)
        self.slots = Slots(shape, self.branches)
        self.capacity = 0
        self._lent = lent_ranges(lender.table if lender else (), self.branches)
        self._flat: dict[Key, np.ndarray] = {}
        self._scratch: dict[str, np.ndarray] = {}
        self._arrays: dict[tuple[int, bool, bool], Arrays] = {}

    def saved(self, rows: int, narrow: bool = False, borrows: bool = False) -> list[np.ndarray]:
        """Return all arrays that a step of `rows` tokens keeps for its backward pass, each once."""
        made = self.arrays(rows, narrow, borrows).saved
        tables = [(a, branch.saved()) for a, branch in zip(made, self.branches, strict=True)]
        arrays = [getattr(a, name) for a, table in tables for name, entry in table.items() if entry.width]
        return list({array.ctypes.data: array for array in arrays}.values())

    def nbytes(self) -> int:
        """Return the bytes of all arrays but those that lie in gradients."""
        memory: dict[int, int] = {}  # what shares memory counts once
        for array in (*self._flat.values(), *self._scratch.values()):
            memory[id(array.base)] = max(memory.get(id(array.base), 0), array.nbytes)
        return sum(memory.values())

    def arrays(self, rows: int, narrow: bool = False, borrows: bool = False) -> Arrays:
        """Return the arrays for `rows` tokens of a step.

        narrow    in bfloat16
        borrows   gradients lend memory to it: they are overwritten after it, not added to
        """
        if rows > self.capacity:
            self.capacity = rows
            self._flat.clear()
            self._arrays.clear()
            self._scratch = Places(self.branches, self.head, rows).make()
        key = rows, narrow, borrows
        if key not in self._arrays:
            self._arrays[key] = self._make(*key)
        return self._arrays[key]

    def _memory(self, narrow: bool, borrows: bool) -> dict[Key, np.ndarray]:
        """Return the flat memory of each array that is saved, for `capacity` rows."""
        arrays, memory = saved_arrays(self.slots, narrow), dict[Key, np.ndarray]()
        if borrows and self.lender is not None:
            places = borrowed(arrays, self.capacity, self._lent)
            memory = {key: self.lender.gradients_memory[place].view(key[-1]) for key, place in places.items()}
        for key in arrays.keys() - memory.keys():
            if key not in self._flat:
                self._flat[key] = aligned_empty(self.capacity * arrays[key].width, key[-1])
            memory[key] = self._flat[key]
        return memory

    def _make(self, rows: int, narrow: bool, borrows: bool) -> Arrays:
        memory = self._memory(narrow, borrows)
        saved, scratch = [], []
        for i, branch in enumerate(self.branches):
            kept = {
                name: make_shape(entry, memory[(*self.slots.slot(i, name, entry), dtype(entry, narrow))], rows)
                for name, entry in branch.saved().items()
            }
            saved.append(branch.Saved(**kept, **branch.parts(kept)))
            between = self._between(branch.scratch(), rows)
            scratch.append(branch.Scratch(**between, **branch.parts(between)))
        head = HeadScratch(
            **self._between(self.head.scratch(), rows), hits=np.empty(rows, np.uint8), logits=self._scratch["logits"]
        )
        stream = self._between({"dx": Entry(self.head.width), "unread": Entry(self.head.width, place="n")}, rows)
        return Arrays(saved, scratch, head, stream["dx"], stream["unread"])

    def _between(self, table: Mapping[str, Entry], rows: int) -> dict[str, np.ndarray]:
        return {name: make_shape(entry, self._scratch[entry.place or name], rows) for name, entry in table.items()}


def memory_plan(
    config: TrainableModelConfig,
    batch_size: int,
    seq_len: int,
    precision: Precision = Precision.FP32,
    accumulates: bool = False,
    *,
    adapted: tuple[Sequence[Layer], Sequence[Tensor]] | None = None,
    frozen: int = 0,
) -> dict[str, int]:
    """Return the bytes of a training step by part, for AdamW and batches of (batch_size, seq_len); no model is needed.

    A window of several micro-batches `accumulates` gradients; those of one lend memory to saved activations.
    Of a model with adapters, its `adapted` layers with the table of what is trained, and the bytes of what is `frozen`.
    """
    made, table = adapted or (layers(config), tensor_table(config))
    _, branches, head = parts_of(made)
    rows, trained = batch_size * seq_len, sum(entry.size for entry in table)
    lender = () if accumulates else table
    return {
        "weights": 4 * trained + frozen,
        "gradients": 4 * trained,
        "moments": 8 * trained,
        "saved activations": saved_bytes(config, branches, rows, precision == Precision.BF16, lender),
        "scratch": scratch_bytes(branches, head, rows),
    }
