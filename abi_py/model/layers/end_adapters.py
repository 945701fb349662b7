"""Adapters (LoRA) of the two ends of a model: the tables of the embedding, and the head's matrix.

    table     x_n += f s A[id_n] Bᵀ       A (V, R)   B (C, R)   f: the factor of the embedding itself
              dB = f dxᵀ u    dA[id_n] += f s dx_n B                u = s A[ids], computed again in backward
    head      logits += u Bᵀ              A (R, C)   B (V, R)   u = s D(hidden) Aᵀ (N, R)
              du = dlogits B    dB = dlogitsᵀ u    dA = s duᵀ D(hidden)    dhidden += D(s du A)

    DoRA      a table's rows become g (x_n + f s A[id_n] Bᵀ), with a g for each of its columns     (`magnitude.py`)
              the logits become g (logits + u Bᵀ), with a g for each row of the head's matrix; with dropout
              logits + (g - 1) D(hidden) Wᵀ + g u Bᵀ, as in `dora_adapter.py`

A row of a table's A is looked up, so it is kept (V, R), where a linear layer has (R, in), and as in PEFT there is no
dropout.  The head's B goes through the loss, chunk by chunk (`Second` of `kernels/cross_entropy.py`).  What DoRA's
gradient of g takes of a table, z = x_n + f s A[id_n] Bᵀ, is made again in backward.
"""

from dataclasses import dataclass

import numpy as np

from ...kernels.cross_entropy import Lengths, Second
from ...kernels.engine.scratch import scratch
from ...kernels.unchecked import (
    dora_backward,
    dora_forward,
    dropout_backward,
    dropout_forward,
    embedding_backward,
    embedding_forward,
    product,
)
from .adapter import seed_of_mask
from .magnitude import Magnitude
from .run import Run

__all__ = ["DoraHead", "DoraTable", "HeadAdapter", "HeadArrays", "TableAdapter"]


@dataclass(frozen=True)
class TableAdapter:
    """What is added to the rows of a table."""

    a: np.ndarray  # (V, R)
    da: np.ndarray
    b: np.ndarray  # (C, R)
    db: np.ndarray
    scale: float  # s

    def flops(self) -> float:
        """Return its operations for each row in forward and backward: A is looked up."""
        return 6.0 * self.b.size

    def _inner(self, ids: np.ndarray, factor: float) -> np.ndarray:
        """Return f u (N, R), until the next call."""
        (u,) = scratch("adapter of a table", (len(ids), self.a.shape[1]))
        embedding_forward(u, ids, self.a)
        u *= np.float32(self.scale)
        u *= np.float32(factor)
        return u

    def forward(self, x: np.ndarray, ids: np.ndarray, factor: float, run: Run) -> None:
        """Change x (N, C), which holds the rows ids (N,) of the table, times the factor."""
        u = self._inner(ids, factor)
        product(x, u, self.b, transpose_b=True, addend=x, number_format=run.number_format)

    def backward(self, dx: np.ndarray, ids: np.ndarray, factor: float, run: Run) -> None:
        """Add to dA, and to dB or overwrite it, given dx (N, C)."""
        u = self._inner(ids, factor)  # forward: x += f u Bᵀ
        base = self.db if run.accumulate else None
        product(self.db, dx, u, transpose_a=True, addend=base, number_format=run.number_format)
        product(u, dx, self.b, number_format=run.number_format)
        u *= np.float32(self.scale * factor)  # forward: u = s A[ids]
        embedding_backward(self.da, u, ids)


@dataclass(frozen=True)
class DoraTable(TableAdapter):
    """The same, with trained lengths of the columns."""

    lengths: Magnitude

    def flops(self) -> float:
        """Return its operations for each row in forward and backward: u Bᵀ is made twice."""
        return 8.0 * self.b.size

    def forward(self, x: np.ndarray, ids: np.ndarray, factor: float, run: Run) -> None:
        """Change x (N, C), which holds the rows ids (N,) of the table, times the factor."""
        super().forward(x, ids, factor, run)
        np.multiply(x, self.lengths.g, out=x)

    def backward(self, dx: np.ndarray, ids: np.ndarray, factor: float, run: Run) -> None:
        """Add to dA, and to dB and dm or overwrite them, given dx (N, C)."""
        (z,) = scratch("lengths of a table", dx.shape)
        self.lengths.base.rows(z, ids)
        z *= np.float32(factor)
        super().forward(z, ids, factor, run)
        if not run.accumulate:
            self.lengths.dm.fill(0)
        dora_backward(z, self.lengths.dm, dx, z, self.lengths.g, self.lengths.n)  # forward: x = g z; z becomes dz
        super().backward(z, ids, factor, run)


@dataclass
class HeadArrays:
    """What the head's adapter keeps of N rows."""

    u: np.ndarray  # (N, R)
    du: np.ndarray  # (N, R)
    kept: np.ndarray  # (N, C): D(hidden), whose own memory its gradient takes
    dh: np.ndarray  # (N, C): of lengths and dropout, what the matrix gives to that


@dataclass(frozen=True)
class HeadAdapter:
    """What is added to the logits."""

    a: np.ndarray  # (R, C)
    da: np.ndarray
    b: np.ndarray  # (V, R)
    db: np.ndarray
    scale: float  # s
    dropout: float
    seed: int  # of the masks
    streams: int  # number of masks of a pass
    stream: int  # that of this one

    def _mask(self, run: Run) -> int | None:
        """Return the seed of the mask in this pass; None where nothing is dropped."""
        if self.dropout == 0 or run.draw is None:
            return None
        return seed_of_mask(self.seed, run, self.streams, self.stream)

    def inner(self, s: HeadArrays, hidden: np.ndarray, run: Run) -> None:
        """Write s.kept and s.u from hidden (N, C)."""
        mask = self._mask(run)
        if mask is None:
            np.copyto(s.kept, hidden)
        else:
            dropout_forward(s.kept, hidden, self.dropout, mask)
        product(s.u, s.kept, self.a, transpose_b=True, number_format=run.number_format)
        s.u *= np.float32(self.scale)

    def second(self, s: HeadArrays, run: Run) -> Second:
        """Return what the loss makes its logits with, given s.u and s.kept."""
        return Second(s.u, self.b, s.du, self.db)

    # The passes with all logits, where nothing is dropped.

    def add(self, logits: np.ndarray, s: HeadArrays, run: Run) -> None:
        """Change logits (N, V), those of the matrix."""
        product(logits, s.u, self.b, transpose_b=True, addend=logits, number_format=run.number_format)

    def through(self, dlogits: np.ndarray, s: HeadArrays, run: Run) -> np.ndarray:
        """Return the gradient (N, V) of the matrix's logits, until the next call."""
        return dlogits

    def add_backward(self, dlogits: np.ndarray, s: HeadArrays, run: Run) -> None:
        """Write s.du, and add to dB or overwrite it, given what `through` has returned."""
        base = self.db if run.accumulate else None
        product(self.db, dlogits, s.u, transpose_a=True, addend=base, number_format=run.number_format)
        product(s.du, dlogits, self.b, number_format=run.number_format)

    # What both have in common.

    def inner_backward(self, dhidden: np.ndarray, s: HeadArrays, run: Run) -> None:
        """Add to dhidden (N, C), and to dA or overwrite it, given s.du; s.kept is no longer needed, and overwritten."""
        s.du *= np.float32(self.scale)  # forward: u = s D(hidden) Aᵀ
        base = self.da if run.accumulate else None
        product(self.da, s.du, s.kept, transpose_a=True, addend=base, number_format=run.number_format)
        mask = self._mask(run)
        if mask is None:
            product(dhidden, s.du, self.a, addend=dhidden, number_format=run.number_format)
            return
        product(s.kept, s.du, self.a, number_format=run.number_format)
        dropout_backward(s.kept, s.kept, self.dropout, mask)
        dhidden += s.kept


@dataclass(frozen=True)
class DoraHead(HeadAdapter):
    """The same, with trained lengths of the rows."""

    lengths: Magnitude

    def second(self, s: HeadArrays, run: Run) -> Second:
        """Return what the loss makes its logits with, given s.u and s.kept."""
        dropped = (None, None) if self._mask(run) is None else (s.kept, s.dh)
        lengths = Lengths(self.lengths.g, self.lengths.n, self.lengths.dm, *dropped)
        return super().second(s, run)._replace(lengths=lengths)

    def add(self, logits: np.ndarray, s: HeadArrays, run: Run) -> None:
        """Change logits (N, V), those of the matrix."""
        (t,) = scratch("logits of the head's adapter", logits.shape)
        product(t, s.u, self.b, transpose_b=True, number_format=run.number_format)
        dora_forward(logits, t, t, self.lengths.g)

    def through(self, dlogits: np.ndarray, s: HeadArrays, run: Run) -> np.ndarray:
        """Return the gradient (N, V) of the matrix's logits, until the next call; add to dm, or overwrite it."""
        (z,) = scratch("logits of the head's adapter", dlogits.shape)
        self.lengths.base.product(z, s.kept, None, run)
        super().add(z, s, run)
        if not run.accumulate:
            self.lengths.dm.fill(0)
        dora_backward(z, self.lengths.dm, dlogits, z, self.lengths.g, self.lengths.n)  # forward: y = g z
        return z

    def inner_backward(self, dhidden: np.ndarray, s: HeadArrays, run: Run) -> None:
        """The same; with dropout s.dh goes through the mask as well."""
        super().inner_backward(dhidden, s, run)
        mask = self._mask(run)
        if mask is not None:
            dropout_backward(s.dh, s.dh, self.dropout, mask)
            dhidden += s.dh
