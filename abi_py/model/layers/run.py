"""What a pass tells its layers, and the arrays that they ask of it."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, ClassVar, Protocol

import numpy as np

from ...kernels.attention import starts_within
from ...kernels.engine.number_formats import BFLOAT16, FLOAT16, FLOAT32, AnyFormat
from ...kernels.rope import rope_angles, rope_frequencies, rope_table

__all__ = ["Angles", "Check", "Chunk", "Entry", "Form", "KeysAndValues", "Objective", "Penalties", "Run"]


class Check(Protocol):
    """Looks whether a pass is to be given up: called between layers, and asked by kernels that take long themselves.

    What it raises gives the pass up; it must raise once `flag` is set, for what a kernel wrote since is undefined.
    """

    flag: np.ndarray  # (1,) uint8, which another thread may set

    def __call__(self) -> object:
        """Raise, or let the pass go on."""


class Form(Enum):
    """How an array lies in memory, for N rows."""

    ROWS = "(N, width)"
    COLUMNS = "(width, N)"  # a row for each head or rank, so that a kernel reads it straight through
    NUMBERS = "(N,)"
    FLAT = "(N width,)"  # its user gives it a shape


@dataclass(frozen=True)
class Entry:
    """An array that a layer needs: floats for each row (row = token), and what the arena may do with it."""

    width: int
    form: Form = Form.ROWS
    narrow: bool = False  # saved: a step in bfloat16 keeps it in bfloat16 (as uint16)
    again: bool = False  # saved: `attention_only` does not keep it, `Branch.fill` computes it again
    place: str = ""  # scratch: whose memory it shares; its own name if empty
    chunked: bool = False  # decoding: only for the rows of a chunk


@dataclass(frozen=True)
class Penalties:
    """What layers add to the loss of a training step besides cross-entropy.

    A layer adds its own in `backward`, which runs once in a pass, also where forward is repeated: the gradient of
    coefficient times a mean over the tokens of the batch is multiplied by `weight`.  That is the loss scale, times the
    trained tokens where gradients are those of the summed loss; so the penalty counts as the loss of its micro-batch
    does in a window of several.
    """

    weight: float
    values: dict[str, float] = field(default_factory=dict)  # by name, times the coefficient, without `weight`

    def add(self, name: str, value: float) -> None:
        """Count a layer's penalty, its coefficient included; those of one name are summed."""
        self.values[name] = self.values.get(name, 0.0) + value


@dataclass(frozen=True)
class Objective:
    """What the head computes of the logits: `kernels/cross_entropy.py`."""

    scale: float  # of the gradients
    smoothing: float
    z_loss: float
    whole: bool  # every label counts, and for as much as any other


@dataclass(frozen=True)
class Run:
    """What kernels need to know about a pass over N = batch * length rows."""

    batch: int
    length: int
    starts: np.ndarray | None  # (N,) int32: first position of its sample that a row sees; None: over stored keys alone
    positions: np.ndarray  # (N,) int32: position of a row within its segment
    number_format: AnyFormat = FLOAT32  # what the products of linear layers multiply
    draw: int | None = None  # number of the training pass, which decides the masks of dropout; None: nothing is dropped
    accumulate: bool = True  # backward: add to the gradients of matrices, or overwrite them
    borrows: bool = False  # saved activations may lie where backward will overwrite gradients (`lent.py`)
    objective: Objective | None = None  # of the loss; None: only the gradient of what forward returned
    label_weights: np.ndarray | None = None  # (N,) float32: of each label's loss in the objective; None: all 1
    penalties: Penalties | None = None  # backward of a loss; None: only the gradient of what forward returned
    counted: np.ndarray | None = None  # (N,) uint8: 0 where the attention mask is, which penalties leave out; None: all
    integer: bool = False  # generation: quantised matrices are multiplied as whole numbers, activations as bytes
    slots: np.ndarray | None = None  # (N,) int32: where a decoder's cache keeps the sequence of a row
    check: Check | None = None  # called between layers and pieces of the head; what it raises gives the pass up
    _windows: dict[int, np.ndarray] = field(default_factory=dict, repr=False, compare=False)

    def starts_within(self, window: int | None) -> np.ndarray:
        """Return `starts` (N,) of rows that see at most `window` keys, their own among them; None: all of theirs."""
        if self.starts is None:
            raise RuntimeError("a run over stored keys has no starts; its attention takes the window itself")
        if window is None or window >= self.length:
            return self.starts
        if window not in self._windows:
            self._windows[window] = starts_within(self.starts, self.length, window)
        return self._windows[window]

    def between_layers(self) -> None:
        """Give the pass up, if whoever asked for it wants that."""
        if self.check is not None:
            self.check()

    @property
    def stop(self) -> np.ndarray | None:
        """Return what attention looks at, and ends early where it is set; None: nobody sets it."""
        return None if self.check is None else self.check.flag

    @property
    def attention_format(self) -> AnyFormat:
        """What attention multiplies: halves have too little range for it."""
        return FLOAT32 if self.number_format is FLOAT16 else self.number_format

    @property
    def narrow(self) -> bool:
        """Say whether activations are saved in bfloat16."""
        return self.number_format is BFLOAT16


class Angles:
    """RoPE's table, as long as was needed so far: a context of a million tokens costs nothing until it is used.

    With `dynamic` scaling the frequencies follow from the length of what is read.  As in transformers, that is the
    longest sample of a training batch; in generation, the length of a row's own sequence after this call, and keys that
    are kept stay as they were rotated then.  So there a token past the length before scaling is not what a pass over
    the whole text would make of it.
    """

    only_kernels: ClassVar[bool] = True  # `layer.py`: its tables are the same in every pass of a kind

    def __init__(self, head_dim: int, theta: float, longest: int, scaling: Mapping[str, Any] | None = None) -> None:
        """Begin with an empty table; it grows to `longest` at most.  scaling: as `rope_frequencies` takes it."""
        self._head_dim, self._theta, self._longest, self._scaling = head_dim, theta, longest, scaling
        dynamic = scaling is not None and scaling["rope_type"] == "dynamic"
        self._unscaled = scaling["original"] if scaling is not None and dynamic else longest  # same angles up to here
        self._table: tuple[np.ndarray, np.ndarray] | None = None
        self._last: tuple[Any, tuple[np.ndarray, np.ndarray]] | None = None  # a longer one, and what it was made for

    @property
    def unscaled(self) -> int:
        """Length of a text up to which a row's angles depend on its place alone."""
        return self._unscaled

    def of(self, run: Run, capacity: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return cos and sin, (length, D/2) float32, and the place (N,) int32 of each row in them.

        capacity   of a decoder's cache, which no position exceeds
        """
        longest = capacity or run.length
        if longest > self._unscaled:
            longest = int(run.positions.max()) + 1
        if longest <= self._unscaled:
            return *self.upto(longest), run.positions
        if run.slots is None:
            return *self._made_for(longest, lambda: self._table_of(longest)), run.positions
        made = self._made_for(run, lambda: self._rows(run.positions, run.slots))
        return *made, np.arange(len(run.positions), dtype=np.int32)

    def _made_for(self, key: Any, make: Callable[[], tuple[np.ndarray, np.ndarray]]) -> tuple[np.ndarray, np.ndarray]:
        """Return the last table where it was made for the same: all layers of a pass ask for it."""
        last = self._last
        if last is None or not (last[0] is key or (isinstance(key, int) and last[0] == key)):
            self._last = last = key, make()
        return last[1]

    def _rows(self, positions: np.ndarray, slots: Any) -> tuple[np.ndarray, np.ndarray]:
        """Return cos and sin of each row, (N, D/2), whose sequence is now as long as its slot's last position says."""
        cos, sin = np.empty((2, len(positions), self._head_dim // 2), np.float32)
        for slot in np.unique(slots):
            rows = slots == slot
            length = int(positions[rows].max()) + 1
            frequencies = rope_frequencies(self._head_dim, self._theta, self._scaling, length)
            cos[rows], sin[rows] = rope_angles(positions[rows], *frequencies)
        return cos, sin

    def _table_of(self, length: int, dtype: type = np.float32) -> tuple[np.ndarray, np.ndarray]:
        return rope_table(length, self._head_dim, self._theta, dtype, self._scaling)

    def upto(self, length: int) -> tuple[np.ndarray, np.ndarray]:
        """Return cos and sin, (at least `length`, D/2) float32; a row's bits do not depend on the table's length."""
        table = self._table
        before = 0 if table is None else len(table[0])
        if table is None or before < length:
            self._table = table = self._table_of(min(max(2 * before, length), self._unscaled))
        return table  # not what another thread may have put there since

    def reference(self, length: int) -> tuple[np.ndarray, np.ndarray]:
        """Return cos and sin, (length, D/2) float64, for rows whose longest sample has this length."""
        return self._table_of(length, np.float64)


KeysAndValues = tuple[np.ndarray, np.ndarray]  # what a decoder keeps of a branch: (slots, G, capacity, D) float32 each
Chunk = tuple[slice, slice]  # of a decoder's rows: of the long arrays, and of those that are `chunked`
