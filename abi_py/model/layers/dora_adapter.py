"""Adapters whose rows of W + s B A have trained lengths (DoRA): what they add to the passes of a linear layer.

    forward    y += (g - 1) v + g t      v = h Wᵀ    t = u Bᵀ    u = s h Aᵀ     h = D(x)     g = m / n
               without dropout v is what y holds, so that y is g (v + t); z = v + t is saved for backward, with u
    backward   dz = g dy                 dm = Σ dy z / n
               du = s dz B               dB = dzᵀ u           dA = duᵀ h        as LoRA's, with dz in place of dy
               dx = dz W + du A          with dropout dx = dy W + D((dz - dy) W + du A)

    v t z y dy dz (N, out)   m dm g n (out,), of the columns of a part   the rest as in `adapter.py`

n, the lengths of the rows of W + s B A, are constants in backward, and so is g: `magnitude.py`.  The arithmetic is
`kernels/dora.py`.

What is saved is (R + columns, N): u, and the z of each part as (N, columns) in the memory of that many rows.

Source: Liu et al. 2024, "DoRA: Weight-Decomposed Low-Rank Adaptation"; with dropout as in PEFT 0.21.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from functools import partial
from itertools import pairwise

import numpy as np

from ...kernels.engine.replay import between, by_numpy
from ...kernels.engine.scratch import aligned_empty
from ...kernels.unchecked import dora_backward, dora_forward, product, streamed_product
from .adapter import Adapter, AdapterScratch, Group, Part, shaped
from .linear import Linear
from .magnitude import Magnitude
from .run import Run

__all__ = ["DoraAdapter"]


@dataclass(frozen=True)
class DoraAdapter(Adapter):
    """What is added to one linear layer, with the lengths of the parts of all groups in their order."""

    magnitudes: tuple[Magnitude, ...]
    width: int  # of y
    rank: int  # of all parts together

    @classmethod
    def on(cls, linear: Linear, magnitudes: Sequence[Magnitude], plain: Adapter) -> "DoraAdapter":
        """Return that of a layer, given the lengths of its parts with adapters, and their adapter without these."""
        of_plain = {each.name: getattr(plain, each.name) for each in fields(plain)}
        return cls(**of_plain, magnitudes=tuple(magnitudes), width=linear.width, rank=linear.rank)

    def _each(self) -> Iterator[tuple[Group, Part, Magnitude]]:
        parts = ((group, part) for group in self.groups for part in group.parts)
        yield from ((*pair, magnitude) for pair, magnitude in zip(parts, self.magnitudes, strict=True))

    def _z(self, saved: np.ndarray) -> list[np.ndarray]:
        """Return the z (N, out) of each part, in what is saved."""
        ends = np.cumsum([self.rank, *(len(magnitude.m) for magnitude in self.magnitudes)]).tolist()
        return [saved[first:last].reshape(saved.shape[1], -1) for first, last in pairwise(ends)]

    # -- passes ----------------------------------------------------------------------------------

    def forward(
        self, y: np.ndarray, x: np.ndarray, u: np.ndarray, s: AdapterScratch, run: Run, addend: np.ndarray | None
    ) -> None:
        """Change y (N, out), the products with the addend they began with, and overwrite u (R + columns, N)."""
        every_z, u, drops = self._z(u), u[: self.rank], self.drops(run)
        own = zip(self.magnitudes, every_z, strict=True)
        for group in self.groups:
            h = self.drop(x, group, s, run)
            product(u[group.ranks], group.a, h, transpose_b=True, number_format=run.number_format)
            for _, (magnitude, z) in zip(group.parts, own) if drops else ():
                magnitude.base.product(z, h, None, run)
        by_numpy(np.multiply, u, self.scale, out=u)
        both = {"transpose_a": True, "transpose_b": True}
        for (_, part, magnitude), z in zip(self._each(), every_z, strict=True):
            columns, t = part.columns, shaped(s.du, *z.shape)
            product(t, u[part.ranks], part.b, **both, number_format=run.number_format)
            dora_forward(y[:, columns], z, t, magnitude.g, None if addend is None else addend[:, columns], drops)

    def apart(self, addend: np.ndarray | None) -> np.ndarray | None:
        """Return a copy."""
        if addend is None:
            return None
        kept = aligned_empty(addend.shape)
        by_numpy(np.copyto, kept, addend)
        return kept

    def decode(self, y: np.ndarray, x: np.ndarray, run: Run, addend: np.ndarray | None) -> None:
        """Change y (N, out), for generation."""
        inner: dict[int, np.ndarray] = {}
        for group in self.groups:
            u = inner[id(group)] = aligned_empty((len(x), len(group.a)))
            streamed_product(u, x, group.a)
            by_numpy(np.multiply, u, self.scale[group.ranks, 0], out=u)
        for group, part, magnitude in self._each():
            ranks = slice(part.ranks.start - group.ranks.start, part.ranks.stop - group.ranks.start)
            z, t = (aligned_empty((len(x), len(magnitude.m))) for _ in range(2))
            streamed_product(t, inner[id(group)][:, ranks], part.b)
            before = None if addend is None else addend[:, part.columns]
            dora_forward(y[:, part.columns], z, t, magnitude.g, before)

    def _dz(self, u: np.ndarray, s: AdapterScratch) -> np.ndarray:
        """Return dz (N, out), which lies behind du (R, N)."""
        rows = u.shape[1]
        return shaped(s.du[self.rank * rows :], rows, self.width)

    def inner_gradient(self, dy: np.ndarray, u: np.ndarray, s: AdapterScratch, run: Run) -> None:
        """Write dz (N, out) and du (R, N) to s.du, and add to dm, or overwrite it."""
        dz = self._dz(u, s)
        if sum(len(magnitude.m) for magnitude in self.magnitudes) < self.width:
            by_numpy(np.copyto, dz, dy)  # of parts without an adapter
        for (_, part, magnitude), z in zip(self._each(), self._z(u), strict=True):
            if not run.accumulate:
                by_numpy(np.copyto, magnitude.dm, np.float32(0))
            columns = part.columns
            dora_backward(dz[:, columns], magnitude.dm, dy[:, columns], z, magnitude.g, magnitude.n)
        super().inner_gradient(dz, u[: self.rank], s, run)

    def through(self, dy: np.ndarray, u: np.ndarray, s: AdapterScratch, run: Run) -> np.ndarray:
        """Return the gradient (N, out) of x Wᵀ: dz, but with dropout dy, for there x Wᵀ is not scaled."""
        return dy if self.drops(run) else self._dz(u, s)

    def weight_gradients(self, dy: np.ndarray, x: np.ndarray, u: np.ndarray, s: AdapterScratch, run: Run) -> None:
        """Add to dA and dB, or overwrite them, given the dz and du in s.du."""
        super().weight_gradients(self._dz(u, s), x, u[: self.rank], s, run)

    def input_gradient(self, dx: np.ndarray, dy: np.ndarray, u: np.ndarray, s: AdapterScratch, run: Run) -> None:
        """Add to dx (N, in), given the dz and du in s.du."""
        if not self.drops(run):
            super().input_gradient(dx, dy, u[: self.rank], s, run)
            return
        rows, dz = u.shape[1], self._dz(u, s)
        du = shaped(s.du, self.rank, rows)
        more = shaped(s.du[(self.rank + self.width) * rows :], rows, self.width)
        by_numpy(np.subtract, dz, dy, out=more)
        for group, part, magnitude in self._each():  # forward: y = x Wᵀ + (g - 1) h Wᵀ + g u Bᵀ, u = s h Aᵀ, h = D(x)
            dh = shaped(s.dropped, *dx.shape)
            magnitude.base.product_backward(dh, more[:, part.columns], None, run)
            product(dh, du[group.ranks], group.a, transpose_a=True, addend=dh, number_format=run.number_format)
            between(partial(self.drop_backward, dh, group), run)
            by_numpy(np.add, dx, dh, out=dx)
