"""Adapters (LoRA) of the parts of a linear layer: what they add to its passes.

    forward    y += u Bᵀ                u  = s D(x) Aᵀ is saved for backward, as uᵀ (R, N)
    backward   dx += D(du A)            du = s dy B
               dB = dyᵀ u               dA = duᵀ D(x)

    x dx (N, in)   y dy (N, out)   A dA (R, in)   B dB (out, R)   D: dropout, the same mask each time

B and u consist of the parts' own (q, k and v; gate and up).  The adapters of the parts see x with one mask, unless
there is dropout, where each has a mask of its own, as in PEFT: a *group* has the As that are one product.

Source: Hu et al. 2021, "LoRA: Low-Rank Adaptation of Large Language Models", section 4.1.
"""

from dataclasses import dataclass
from functools import partial
from typing import Protocol

import numpy as np

from ...kernels.engine.replay import between, by_numpy
from ...kernels.engine.scratch import aligned_empty
from ...kernels.unchecked import dropout_backward, dropout_forward, product, streamed_product
from .run import Run

__all__ = ["Adapter", "AdapterScratch", "Group", "Part", "seed_of_mask", "shaped"]


class AdapterScratch(Protocol):
    """Scratch of a layer whose linear layers may have adapters."""

    du: np.ndarray  # flat; with DoRA also what `dora_adapter.py` needs
    dropped: np.ndarray  # flat


@dataclass(frozen=True)
class Part:
    """The second half of one part's adapter."""

    columns: slice  # of y
    ranks: slice  # rows of uᵀ
    b: np.ndarray  # (out, R)
    db: np.ndarray


@dataclass(frozen=True)
class Group:
    """The first half of the adapters that see their input with the same mask."""

    ranks: slice
    a: np.ndarray  # (R, in)
    da: np.ndarray
    parts: tuple[Part, ...]
    stream: int  # tells its masks from those of all other groups


@dataclass(frozen=True)
class Adapter:
    """What is added to one linear layer."""

    groups: tuple[Group, ...]
    scale: np.ndarray  # (R, 1): s of each rank
    dropout: float
    seed: int  # of the masks
    streams: int  # number of groups in the whole model

    def drops(self, run: Run) -> bool:
        """Say whether something is dropped in this pass."""
        return self.dropout > 0 and run.draw is not None

    def mask_seed(self, group: Group, run: Run) -> int:
        """Return the seed of a group's mask in this pass, in which something is dropped."""
        return seed_of_mask(self.seed, run, self.streams, group.stream)

    def drop(self, x: np.ndarray, group: Group, s: AdapterScratch, run: Run) -> np.ndarray:
        """Return D(x): x itself where nothing is dropped, else a copy in s.dropped."""
        if not self.drops(run):
            return x
        kept = shaped(s.dropped, *x.shape)
        between(lambda run: dropout_forward(kept, x, self.dropout, self.mask_seed(group, run)), run)
        return kept

    def drop_backward(self, dx: np.ndarray, group: Group, run: Run) -> None:
        """Turn dx from the gradient of D(x) into that of x, in place."""
        dropout_backward(dx, dx, self.dropout, self.mask_seed(group, run))

    # -- passes: what they add to those of `Linear` -----------------------------------------------

    def forward(
        self, y: np.ndarray, x: np.ndarray, u: np.ndarray, s: AdapterScratch, run: Run, addend: np.ndarray | None
    ) -> None:
        """Add to y (N, out), the products with what they began with, and overwrite u (R, N)."""
        for group in self.groups:
            kept = self.drop(x, group, s, run)
            product(u[group.ranks], group.a, kept, transpose_b=True, number_format=run.number_format)
        by_numpy(np.multiply, u, self.scale, out=u)
        for group in self.groups:
            for part in group.parts:
                target = y[:, part.columns]
                both = {"transpose_a": True, "transpose_b": True}
                product(target, u[part.ranks], part.b, **both, addend=target, number_format=run.number_format)

    def apart(self, addend: np.ndarray | None) -> np.ndarray | None:
        """Return what `decode` reads as the addend, after a product that may have been written over it."""
        return addend

    def decode(self, y: np.ndarray, x: np.ndarray, run: Run, addend: np.ndarray | None) -> None:
        """Add to y (N, out), for generation; the addend is what `apart` has returned."""
        for group in self.groups:
            u = aligned_empty((len(x), len(group.a)))
            streamed_product(u, x, group.a)
            by_numpy(np.multiply, u, self.scale[group.ranks, 0], out=u)
            for part in group.parts:
                ranks = slice(part.ranks.start - group.ranks.start, part.ranks.stop - group.ranks.start)
                target = y[:, part.columns]
                streamed_product(target, u[:, ranks], part.b, addend=target)

    def through(self, dy: np.ndarray, u: np.ndarray, s: AdapterScratch, run: Run) -> np.ndarray:
        """Return the gradient (N, out) of x Wᵀ, after `inner_gradient`."""
        return dy

    def inner_gradient(self, dy: np.ndarray, u: np.ndarray, s: AdapterScratch, run: Run) -> None:
        """Write du (R, N) to s.du."""
        du = shaped(s.du, *u.shape)
        for group in self.groups:
            for part in group.parts:  # forward: y = u Bᵀ
                dy_part = dy[:, part.columns]
                product(
                    du[part.ranks], part.b, dy_part, transpose_a=True, transpose_b=True, number_format=run.number_format
                )
        by_numpy(np.multiply, du, self.scale, out=du)  # forward: u = s D(x) Aᵀ

    def weight_gradients(self, dy: np.ndarray, x: np.ndarray, u: np.ndarray, s: AdapterScratch, run: Run) -> None:
        """Add to dA and dB, or overwrite them, given the du in s.du."""
        number_format, both = run.number_format, {"transpose_a": True, "transpose_b": True}
        du = shaped(s.du, *u.shape)
        for group in self.groups:
            for part in group.parts:  # forward: y = u Bᵀ
                dy_part, base = dy[:, part.columns], part.db if run.accumulate else None
                product(part.db, dy_part, u[part.ranks], **both, addend=base, number_format=number_format)
            kept = self.drop(x, group, s, run)
            product(
                group.da,
                du[group.ranks],
                kept,
                addend=group.da if run.accumulate else None,
                number_format=number_format,
            )

    def input_gradient(self, dx: np.ndarray, dy: np.ndarray, u: np.ndarray, s: AdapterScratch, run: Run) -> None:
        """Add to dx (N, in), given the du in s.du."""
        du = shaped(s.du, *u.shape)
        for group in self.groups:  # forward: u = s D(x) Aᵀ
            if not self.drops(run):
                product(dx, du[group.ranks], group.a, transpose_a=True, addend=dx, number_format=run.number_format)
            else:
                part_of_dx = shaped(s.dropped, *dx.shape)
                product(part_of_dx, du[group.ranks], group.a, transpose_a=True, number_format=run.number_format)
                between(partial(self.drop_backward, part_of_dx, group), run)
                by_numpy(np.add, dx, part_of_dx, out=dx)


def seed_of_mask(seed: int, run: Run, streams: int, stream: int) -> int:
    """Return the seed of one of the `streams` masks of a pass, in which something is dropped."""
    return (seed + (run.draw or 0) * streams + stream) % 2**63


def shaped(scratch: np.ndarray, rows: int, columns: int) -> np.ndarray:
    """Return the beginning of scratch as a matrix."""
    return scratch.reshape(-1)[: rows * columns].reshape(rows, columns)
