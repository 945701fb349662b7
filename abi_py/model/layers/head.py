"""The head: the last norm, the logits, and their loss in one operation (`kernels/cross_entropy.py`).

    hidden = norm(x)      logits = hidden Wᵀ      losses = cross_entropy(logits, labels)

W (V, C) is the head's own, or the embedding where the two are tied.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial

import numpy as np

from ...kernels.cross_entropy import Second, scratch_floats
from ...kernels.engine.replay import between
from ...kernels.engine.scratch import scratch
from ...kernels.storage.float32 import STORAGE as FLOAT32
from ...kernels.unchecked import head_loss, head_loss_backward, product
from ...parameters import TensorSpec, Weight
from .embedding import Embedding
from .end_adapters import HeadAdapter, HeadArrays
from .layer import Layer
from .linear import Linear, Projection
from .norm import Norm
from .run import Entry, Form, Run

__all__ = ["Head", "HeadScratch"]


def _nothing() -> np.ndarray:
    return np.empty((0, 0), np.float32)


@dataclass
class HeadScratch:
    """The head's arrays, for N rows."""

    x: np.ndarray  # (N, C): output of the last branch
    r: np.ndarray  # (N,)
    hidden: np.ndarray  # (N, C)
    dhidden: np.ndarray  # (N, C), in the memory of hidden
    losses: np.ndarray  # (N,)
    lse: np.ndarray  # (N,): log-sum-exp of the logits
    hits: np.ndarray  # (N,) uint8
    logits: np.ndarray  # (floats,): a chunk of them
    u: np.ndarray = field(default_factory=_nothing)  # (N, R), and
    du: np.ndarray = field(default_factory=_nothing)  # of its adapter: `HeadArrays`
    kept: np.ndarray = field(default_factory=_nothing)  # (N, C)
    dh: np.ndarray = field(default_factory=_nothing)  # (N, C)

    @property
    def adapter(self) -> HeadArrays:
        """Those of its adapter."""
        return HeadArrays(self.u, self.du, self.kept, self.dh)


class Head(Layer):
    """The norm and the output matrix: `output_proj`, or the embedding's if tied."""

    only_kernels = True

    def __init__(self, norm: Norm, vocab_size: int, width: int, tied: bool) -> None:
        """Describe it."""
        super().__init__("")
        self.norm, self.vocab_size, self.width, self.tied = norm, vocab_size, width, tied
        self.name = Embedding.name if tied else "output_proj"
        self._linear = Linear(width, Projection(self.name, vocab_size))
        self.adapter: HeadAdapter | None = None
        self.rank, self.dropout = 0, False  # of it; whether something of hidden is dropped
        self.magnitudes = 0  # rows of the matrix with a length of their own (DoRA)

    def tensors(self) -> tuple[TensorSpec, ...]:
        """Return its tensors."""
        own = () if self.tied else (replace(each, hidden=False) for each in self._linear.matrices())
        return (*self.norm.tensors(), *own)

    def pieces(self) -> tuple[object, ...]:
        """Return its norm, its matrix and its adapter."""
        return (self.norm, self._linear, *([self.adapter] if self.adapter else []))

    def is_trained(self) -> bool:
        """Say whether something of it is trained, or it has an adapter."""
        return self.adapter is not None or super().is_trained()

    def scratch(self) -> dict[str, Entry]:
        """Return its arrays but for hits and logits, which are no floats for each row."""
        adapted = {"u": Entry(self.rank, place="u_head"), "du": Entry(self.rank, place="du_head")}
        adapted |= {"kept": Entry(self.width, place="kept")}
        again = {"dh": Entry(self.width, place="dh_head")}
        return {
            **(adapted if self.rank else {}),
            **(again if self.magnitudes and self.dropout else {}),
            "x": Entry(self.width, place="final"),
            "r": Entry(1, Form.NUMBERS, place="r_final"),
            "hidden": Entry(self.width, place="n"),
            "dhidden": Entry(self.width, place="n"),
            "losses": Entry(1, Form.NUMBERS),
            "lse": Entry(1, Form.NUMBERS),
        }

    def logit_floats(self, rows: int) -> int:
        """Return the floats of the chunk of logits for so many rows."""
        logits = 1 if not self.magnitudes else 3 if self.dropout else 2  # of `Second`
        return int(scratch_floats(rows, self.vocab_size, self.width, logits))

    def bind(self, weights: Callable[[str], Weight]) -> None:
        """Take its weights."""
        self.norm.bind("", weights)
        self._linear.bind("", weights)
        (self.weight,), (self.matrix,) = self._linear.parts, self._linear.products
        self._storage = None if self.weight.storage is FLOAT32 else self.weight.storage
        self.weights = [*self.norm.weights, self.weight]  # a tied one too: its gradient is the sum of two

    def overwritten(self) -> set[str]:
        """Return its matrix; a tied one too: of its two uses, this is the first in a backward pass."""
        return {self.name}

    def kernels(self) -> set[str]:
        """Return those of its norm."""
        return {*self.norm.kernels}

    def flops(self, seq_len: int, below: bool) -> float:
        """Return those of the logits, their gradient, and the matrix's: in one operation, which makes dx anyway."""
        frozen = bool(self.weights) and self.weight.dw is None
        adapter = 6.0 * self.rank * (self.vocab_size + self.width)
        adapter += 4.0 * self.magnitudes * self.width if self.dropout else 0.0  # h Wᵀ, where y is x Wᵀ
        return (4.0 if frozen else 6.0) * self.vocab_size * self.width + adapter

    def forward(self, s: HeadScratch) -> np.ndarray:
        """Return hidden (N, C) from s.x (N, C)."""
        self.norm.forward(s.hidden, s.r, s.x)
        return s.hidden

    def logits(self, out: np.ndarray, s: HeadScratch, run: Run) -> None:
        """Write the logits (N, V) of s.hidden."""
        self.matrix.product(out, s.hidden, None, run)
        if self.adapter is not None:
            self.adapter.inner(s.adapter, s.hidden, run)
            self.adapter.add(out, s.adapter, run)

    def logits_backward(self, dlogits: np.ndarray, s: HeadScratch, run: Run) -> None:
        """Write s.dhidden from the gradient of the logits (N, V), and the matrix's gradient."""
        dw = self.weight.dw
        if dw is not None:  # forward: logits = hidden Wᵀ
            product(dw, dlogits, s.hidden, transpose_a=True, addend=dw if run.accumulate else None)
        through = dlogits if self.adapter is None else self.adapter.through(dlogits, s.adapter, run)
        self.matrix.product_backward(s.dhidden, through, None, run)
        if self.adapter is not None:
            self.adapter.add_backward(through, s.adapter, run)
            self.adapter.inner_backward(s.dhidden, s.adapter, run)

    def decode(self, logits: np.ndarray, x: np.ndarray, n: np.ndarray, r: np.ndarray, run: Run) -> None:
        """Write the logits (N, V) of x (N, C) for generation; n (N, C) and r (N,) are scratch."""
        self.norm.forward(n, r, x)
        self.matrix.decode(logits, n, None, run)
        if self.adapter is not None:
            u, du, kept_rows = scratch("adapter of the head", (len(x), self.rank), (len(x), self.rank), n.shape)
            kept = HeadArrays(u, du, kept_rows, _nothing())
            self.adapter.inner(kept, n, run)
            self.adapter.add(logits, kept, run)

    def loss(self, labels: np.ndarray, s: HeadScratch, smoothing: float, run: Run) -> None:
        """Write s.losses and s.hits of s.hidden for labels (N,), negative where none is trained."""
        options = smoothing, run.number_format, self._storage, run.check, self._second(s, run)
        head_loss(s.losses, s.hits, s.hidden, self.weight.w, labels, s.logits, *options)

    def _second(self, s: HeadScratch, run: Run) -> Second | None:
        """Return what the adapter adds to the logits, of s.hidden."""
        if self.adapter is None:
            return None
        self.adapter.inner(s.adapter, s.hidden, run)
        return self.adapter.second(s.adapter, run)

    def loss_backward(self, labels: np.ndarray, s: HeadScratch, run: Run) -> None:
        """Write s.losses, s.hits and s.dhidden, and the matrix's gradient: those of scale times the summed loss, where
        a label's counts `run.label_weights` times.

        The z-loss is in the gradients, and among the penalties of the run.
        """
        if run.objective is None:
            raise RuntimeError(
                "Head.loss_backward: run.objective is None, and the gradient of a loss is that of an objective; "
                "pass replace(run, objective=Objective(...)), as model.compute_loss(..., backward=True) does"
            )
        scale, smoothing, z_loss = run.objective.scale, run.objective.smoothing, run.objective.z_loss
        options = scale, smoothing, run.accumulate, run.number_format, self._storage, z_loss, s.lse, run.check
        second = self._second(s, run)
        results = s.losses, s.hits, s.dhidden, self.weight.dw
        head_loss_backward(*results, s.hidden, self.weight.w, labels, s.logits, *options, second, run.label_weights)
        if self.adapter is not None:
            self.adapter.inner_backward(s.dhidden, s.adapter, run)
        if z_loss:
            between(partial(self._penalise, labels, s.lse, z_loss), run)

    def _penalise(self, labels: np.ndarray, lse: np.ndarray, z_loss: float, run: Run) -> None:
        if run.penalties is not None:
            squares = np.square(lse, dtype=np.float64)  # 0 where a label does not count
            squares = squares if run.label_weights is None else squares * run.label_weights
            run.penalties.add("z_loss", z_loss * float(squares.sum()) / max(int(np.count_nonzero(labels >= 0)), 1))

    def backward(self, dx: np.ndarray, s: HeadScratch) -> None:
        """Write dx (N, C), the gradient of s.x, from s.dhidden."""
        self.norm.backward(dx, s.dhidden, s.x, s.r, False)  # forward: hidden = norm(x)
