"""The two passes over a list of layers: embedding, branches, head.

    forward    embedding;  for each branch: out = x + f(x);  head
    backward   head;  the branches in reverse;  embedding

Batches are (B, T) ids; inside, all is rows: N = B T.  Samples never see each other, and neither do the segments of a
packed row.  Backward runs a segment of blocks forward again where gradient checkpointing has not kept it (`arena.py`),
unless the shared arrays still hold it, which they do for the last one.
"""

from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
import numpy.typing as npt

from ..kernels.engine.replay import between
from ..parameters import Buffers
from ..shape import CheckpointingStrategy, ModelShape
from .arena import Arena, Arrays, parts_of, segment_length
from .inputs import segment_starts
from .layers.experts import Experts
from .layers.layer import Branch, Layer, Noted
from .layers.run import Run
from .passes import LONG

__all__ = ["Runs", "Stack", "flops_per_token"]


def trained_below(layers: Sequence[Layer]) -> list[bool]:
    """Say of each layer whether the gradient of its input is wanted: one before it is trained, or its own norm."""
    trained = [layer.is_trained() for layer in layers]
    return [any(trained[:i]) or layer.trains_norms() for i, layer in enumerate(layers)]


def flops_per_token(layers: Sequence[Layer], seq_len: int) -> float:
    """Return the operations of forward and backward for one token of a row of seq_len; a multiply-add counts two.

    Two for each weight of a matrix in forward, two for the gradient of its input, two for its own (Kaplan et al. 2020,
    section 2.1), counting the head and not the embedding, and those of attention.
    """
    return sum(layer.flops(seq_len, below) for layer, below in zip(layers, trained_below(layers), strict=True))


class Stack:
    """A list of bound layers and the arena of their passes."""

    def __init__(self, shape: ModelShape, layers: Sequence[Layer], lender: Buffers | None = None) -> None:
        """Prepare for the passes; nothing is allocated before the first of them.

        lender   whose gradients lend memory to the activations of a run that `borrows`
        """
        self.shape, self.layers = shape, list(layers)
        self.embedding, self.branches, self.head = parts_of(layers)
        self.arena = Arena(shape, layers, lender)
        self._segments = self._cut(segment_length(shape))
        self._trained, self._below = [layer.is_trained() for layer in layers], trained_below(layers)
        self._notable = Noted(self.layers)
        self._noted = self._notable.now()  # in the present pass: ids of layers
        self._short: dict[tuple[int, int], bool] = {}  # by shape of a batch: whether passes are replayed

    def _cut(self, length: int) -> list[range]:
        """Return the branches of each segment of so many blocks."""
        number = [branch.block // length for branch in self.branches]
        return [range(number.index(i), len(number) - number[::-1].index(i)) for i in sorted(set(number))]

    def loads(self) -> np.ndarray | None:
        """Return how many tokens that are not masked chose each expert in the last forward; None without experts.

        int64 (layers with experts, E).
        """
        routing = next((layer.routing for layer in self.branches if isinstance(layer, Experts)), None)
        return routing.loads() if routing is not None else None

    # -- the passes, replayed where they are short and known ---------------------------------------

    def pass_forward(self, ids: np.ndarray, run: Run) -> None:
        """Do what `forward` does."""
        if self._is_short(run):
            self._noted = self._notable.now()
            self.arrays(run).passes.run(self.forward, (ids,), run, self._noted)
        else:
            self.forward(ids, run)

    def pass_backward(self, labels: np.ndarray, ids: np.ndarray, run: Run) -> None:
        """Do what `loss_backward` does."""
        if self._is_short(run):
            self._noted = self._notable.now()
            numbers = run.objective if self._is_noted_head(run) else None
            self.arrays(run).passes.run(self.loss_backward, (labels, ids), run, self._noted, numbers)
        else:
            self.loss_backward(labels, ids, run)

    def _is_short(self, run: Run) -> bool:
        shape = run.batch, run.length
        if shape not in self._short:
            self._short[shape] = run.batch * run.length * flops_per_token(self.layers, run.length) < LONG
        return self._short[shape]

    def _is_noted_head(self, run: Run) -> bool:
        """Say whether the head's calls follow from the objective: rows that do not count are left out of them."""
        return id(self.head) in self._noted and run.objective is not None and run.objective.whole

    def _do(self, layer: Layer, function: Callable[[Run], object], run: Run) -> None:
        """Call function(run), a pass through a layer; Python does so in a replay too, unless all of it is noted."""
        if id(layer) in self._noted:
            function(run)
        else:
            between(function, run)

    # -- their text ------------------------------------------------------------------------------

    def arrays(self, run: Run) -> Arrays:
        """Return the arrays of a pass."""
        return self.arena.arrays(len(run.positions), run.narrow, run.borrows)

    def forward(self, ids: np.ndarray, run: Run) -> np.ndarray:
        """Return hidden (N, C), the input of the head's matrix, for ids (N,); the arena keeps what backward needs."""
        arrays = self.arrays(run)
        self._do(self.embedding, partial(self.embedding.forward, arrays.saved[0].x, ids), run)
        for segment in self._segments:
            self._run(segment, arrays, run)
        self._do(self.head, lambda run: self.head.forward(arrays.head), run)
        return arrays.head.hidden

    def _run(self, segment: range, arrays: Arrays, run: Run, redo: bool = False) -> None:
        """Run the branches of a segment; a repeated run leaves out the last one's output, which is there already."""
        for i in segment:
            out = arrays.head.x if i == len(self.branches) - 1 else arrays.saved[i + 1].x
            if redo and i == segment[-1]:
                out = arrays.unread  # not needed again, and its place may hold what is
            branch = self.branches[i]
            self._do(branch, partial(branch.forward, out, arrays.saved[i], arrays.scratch[i]), run)
            run.between_layers()

    def backward(self, ids: np.ndarray, run: Run) -> None:
        """Go from the gradient of hidden, in the head's scratch, to the gradients of what is trained."""
        arrays, dx, last = self.arrays(run), self.arrays(run).dx, self._segments[-1]
        self._do(self.head, lambda run: self.head.backward(dx, arrays.head), run)
        for segment in reversed(self._segments):
            if segment is not last:
                self._run(segment, arrays, run, redo=True)
            for i in reversed(segment):
                branch, a, s = self.branches[i], arrays.saved[i], arrays.scratch[i]
                if not (self._trained[i + 1] or self._below[i + 1]):
                    return
                if self._is_shared(branch):
                    self._do(branch, partial(branch.fill, a, s), run)
                self._do(branch, partial(branch.backward, dx, a, s, below=self._below[i + 1]), run)
                run.between_layers()
        self._do(self.embedding, partial(self.embedding.backward, dx, ids), run)

    def loss_backward(self, labels: np.ndarray, ids: np.ndarray, run: Run) -> None:
        """Write losses, hits and gradients, after `forward`, for labels (N,) and the run's objective."""
        step = partial(self.head.loss_backward, labels, self.arrays(run).head)
        if self._is_noted_head(run):
            step(run)
        else:
            between(step, run)
        self.backward(ids, run)

    def _is_shared(self, branch: Branch) -> bool:
        """Say whether the next block has overwritten what `attention_only` does not keep."""
        shared = self.shape.checkpointing is CheckpointingStrategy.ATTENTION_ONLY
        return shared and branch.block != self.branches[-1].block


class Runs:
    """What kernels need to know about a model's batches; those without marks are worked out once for each shape."""

    def __init__(self) -> None:
        """Begin without any."""
        self._plain: dict[tuple[tuple[int, int], bool], Run] = {}

    def run(
        self,
        shape: tuple[int, int],
        attention_mask: npt.ArrayLike | None,
        segment_ids: npt.ArrayLike | None,
        borrows: bool = False,
    ) -> Run:
        """Return starts and positions of all rows; a run of equal segment ids (or mask values) is a segment."""
        key = shape, borrows
        if attention_mask is None and segment_ids is None and key in self._plain:
            return self._plain[key]
        starts = segment_starts(shape, attention_mask, segment_ids)
        counted = None if attention_mask is None else _counted(attention_mask)
        plain = counted is None and not starts.any()  # marks that mark nothing, as a mask of ones, are none
        if plain and key in self._plain:
            return self._plain[key]
        positions = np.arange(shape[1], dtype=np.int32) - starts
        run = Run(*shape, starts.ravel(), positions.ravel(), counted=counted, borrows=borrows)
        if plain:
            self._plain[key] = run
        return run


def _counted(attention_mask: npt.ArrayLike) -> np.ndarray | None:
    """Return which rows are no padding, uint8 (N,); None if all."""
    counted = (np.asarray(attention_mask).ravel() != 0).astype(np.uint8)
    return None if counted.all() else counted
