"""Adapters (LoRA) of the two ends of a model: the tables of the embedding, and the head's matrix.

    table     x_n += f s A[id_n] Bᵀ       A (V, R)   B (C, R)   f: the factor of the embedding itself
              dB = f dxᵀ u    dA[id_n] += f s dx_n B                u = s A[ids], computed again in backward
    head      logits += u Bᵀ              A (R, C)   B (V, R)   u = s D(hidden) Aᵀ (N, R)
              du = dlogits B    dB = dlogitsᵀ u    dA = s duᵀ D(hidden)    dhidden += D(s du A)

A row of a table's A is looked up, so it is kept (V, R), where a linear layer has (R, in), and as in PEFT there is no
dropout.  The head's B goes through the loss, chunk by chunk (`Second` of `kernels/cross_entropy.py`).
"""

from dataclasses import dataclass

import numpy as np

from ...kernels.engine.scratch import scratch
from ...kernels.unchecked import dropout_backward, dropout_forward, embedding_backward, embedding_forward, product
from .adapter import seed_of_mask
from .run import Run

__all__ = ["HeadAdapter", "HeadArrays", "TableAdapter"]


@dataclass(frozen=True)
class TableAdapter:
    """What is added to the rows of a table."""

    a: np.ndarray  # (V, R)
    da: np.ndarray
    b: np.ndarray  # (C, R)
    db: np.ndarray
    scale: float  # s

    def _inner(self, ids: np.ndarray) -> np.ndarray:
        """Return u (N, R), until the next call."""
        (u,) = scratch("adapter of a table", (len(ids), self.a.shape[1]))
        embedding_forward(u, ids, self.a)
        u *= np.float32(self.scale)
        return u

    def forward(self, x: np.ndarray, ids: np.ndarray, factor: float, run: Run) -> None:
        """Add to x (N, C) for ids (N,)."""
        u = self._inner(ids)
        u *= np.float32(factor)
        product(x, u, self.b, transpose_b=True, addend=x, number_format=run.number_format)

    def backward(self, dx: np.ndarray, ids: np.ndarray, factor: float, run: Run) -> None:
        """Add to dA, and to dB or overwrite it, given dx (N, C)."""
        u = self._inner(ids)
        u *= np.float32(factor)  # forward: x += f u Bᵀ
        base = self.db if run.accumulate else None
        product(self.db, dx, u, transpose_a=True, addend=base, number_format=run.number_format)
        product(u, dx, self.b, number_format=run.number_format)
        u *= np.float32(self.scale * factor)  # forward: u = s A[ids]
        embedding_backward(self.da, u, ids)


@dataclass
class HeadArrays:
    """What the head's adapter keeps of N rows."""

    u: np.ndarray  # (N, R)
    du: np.ndarray  # (N, R)
    kept: np.ndarray  # (N, C): D(hidden), whose own memory its gradient takes


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

    def add(self, logits: np.ndarray, s: HeadArrays, run: Run) -> None:
        """Add to logits (N, V)."""
        product(logits, s.u, self.b, transpose_b=True, addend=logits, number_format=run.number_format)

    def add_backward(self, dlogits: np.ndarray, s: HeadArrays, run: Run) -> None:
        """Write s.du, and add to dB or overwrite it, given dlogits (N, V)."""
        base = self.db if run.accumulate else None
        product(self.db, dlogits, s.u, transpose_a=True, addend=base, number_format=run.number_format)
        product(s.du, dlogits, self.b, number_format=run.number_format)

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
