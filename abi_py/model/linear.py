"""A linear layer is storage plus adapter: W, and on top of a frozen W the low-rank product of LoRA.

    forward    y  = x Wᵀ + s D(x) Aᵀ Bᵀ       u  = s D(x) Aᵀ is saved for backward, as uᵀ (R, N)
    backward   dx = dy W + D(du A)            du = s dy B
               dB = dyᵀ u                     dA = duᵀ D(x)           dW = dyᵀ x, unless W is frozen

    x dx (N, in)   y dy (N, out)   W dW (out, in)   A dA (R, in)   B dB (out, R)   D: dropout, the same mask each time

Projections that read the same input are one matrix W (q, k, v; gate and up), and then a joined layer has an adapter
for each of them: a *part*, with its own rows of y and of uᵀ.  Without dropout their As are one matrix as well, and one
product; with it, each has a mask of its own, as in PEFT.

Source: Hu et al. 2021, "LoRA: Low-Rank Adaptation of Large Language Models", section 4.1.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np

from ..kernels.unchecked import dropout_backward, dropout_forward, product
from .inputs import Layout

__all__ = [
    "Adapter",
    "Group",
    "Linear",
    "Part",
    "inner_gradient",
    "input_gradient",
    "linear_backward",
    "linear_forward",
    "weight_gradients",
]


@dataclass(frozen=True)
class Part:
    """The second half of one projection's adapter."""

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
    scale: float  # s
    dropout: float
    seed: int  # of the masks
    streams: int  # number of groups in the whole model

    def mask_seed(self, group: Group, layout: Layout) -> int | None:
        """Return the seed of a group's mask in this pass; None if nothing is dropped."""
        if self.dropout == 0 or layout.draw is None:
            return None
        return (self.seed + layout.draw * self.streams + group.stream) % 2**63


@dataclass(frozen=True)
class Linear:
    """One linear layer: its storage, and its adapter if it has one."""

    w: np.ndarray  # (out, in) float32
    adapter: Adapter | None = None


def linear_forward(
    y: np.ndarray,
    x: np.ndarray,
    linear: Linear,
    u: np.ndarray,
    s: Any,
    layout: Layout,
    addend: np.ndarray | None = None,
) -> None:
    """Overwrite y (N, out) from x (N, in), with addend (N, out) added; u (R, N) is what the adapter saves."""
    product(y, x, linear.w, transpose_b=True, addend=addend, number_format=layout.number_format)
    if linear.adapter is None:
        return
    for group in linear.adapter.groups:
        kept = _drop(x, linear.adapter.dropout, linear.adapter.mask_seed(group, layout), s)
        product(u[group.ranks], group.a, kept, transpose_b=True, number_format=layout.number_format)
    u *= np.float32(linear.adapter.scale)
    for group in linear.adapter.groups:
        for part in group.parts:
            target = y[:, part.columns]
            both = {"transpose_a": True, "transpose_b": True}
            product(target, u[part.ranks], part.b, **both, addend=target, number_format=layout.number_format)


def linear_backward(
    dx: np.ndarray | None,
    dw: np.ndarray | None,
    dy: np.ndarray,
    x: np.ndarray,
    linear: Linear,
    u: np.ndarray,
    s: Any,
    layout: Layout,
    accumulate: bool,
) -> None:
    """Overwrite dx (N, in), unless it is None; add to dw and the adapter's gradients, or overwrite them.

    dw is None for a frozen W.  x, u and layout are those of the forward call.  x is read for the last time before dx is
    written, so dx may be x's memory.
    """
    inner_gradient(dy, linear, u, s, layout)
    weight_gradients(dw, dy, x, linear, u, s, layout, accumulate)
    if dx is not None:
        input_gradient(dx, dy, linear, u, s, layout)


# The parts of `linear_backward`, for a layer whose x is there only after dx.  The other two read the du that
# `inner_gradient` leaves in s.du.


def inner_gradient(dy: np.ndarray, linear: Linear, u: np.ndarray, s: Any, layout: Layout) -> None:
    """Write du (R, N), if there is an adapter, to s.du, where the other two parts read it."""
    if linear.adapter is None:
        return
    du = _shaped(s.du, *u.shape)
    for group in linear.adapter.groups:
        for part in group.parts:  # forward: y = u Bᵀ
            dy_part = dy[:, part.columns]
            both = {"transpose_a": True, "transpose_b": True}
            product(du[part.ranks], part.b, dy_part, **both, number_format=layout.number_format)
    du *= np.float32(linear.adapter.scale)  # forward: u = s D(x) Aᵀ


def weight_gradients(
    dw: np.ndarray | None,
    dy: np.ndarray,
    x: np.ndarray,
    linear: Linear,
    u: np.ndarray,
    s: Any,
    layout: Layout,
    accumulate: bool,
) -> None:
    """Add to dw, unless it is None, and to the gradients of the adapter's matrices, or overwrite them."""
    if dw is not None:  # forward: y = x Wᵀ
        product(dw, dy, x, transpose_a=True, addend=dw if accumulate else None, number_format=layout.number_format)
    if linear.adapter is None:
        return
    number_format, both = layout.number_format, {"transpose_a": True, "transpose_b": True}
    du = _shaped(s.du, *u.shape)
    for group in linear.adapter.groups:
        for part in group.parts:  # forward: y = u Bᵀ
            dy_part = dy[:, part.columns]
            addend = part.db if accumulate else None
            product(part.db, dy_part, u[part.ranks], **both, addend=addend, number_format=number_format)
        kept = _drop(x, linear.adapter.dropout, linear.adapter.mask_seed(group, layout), s)
        product(group.da, du[group.ranks], kept, addend=group.da if accumulate else None, number_format=number_format)


def input_gradient(dx: np.ndarray, dy: np.ndarray, linear: Linear, u: np.ndarray, s: Any, layout: Layout) -> None:
    """Overwrite dx (N, in)."""
    product(dx, dy, linear.w, number_format=layout.number_format)
    if linear.adapter is None:
        return
    du = _shaped(s.du, *u.shape)
    for group in linear.adapter.groups:  # forward: u = s D(x) Aᵀ
        seed = linear.adapter.mask_seed(group, layout)
        if seed is None:
            product(dx, du[group.ranks], group.a, transpose_a=True, addend=dx, number_format=layout.number_format)
        else:
            part_of_dx = _shaped(s.dropped, *dx.shape)
            product(part_of_dx, du[group.ranks], group.a, transpose_a=True, number_format=layout.number_format)
            dropout_backward(part_of_dx, part_of_dx, linear.adapter.dropout, seed)
            dx += part_of_dx


def _drop(x: np.ndarray, rate: float, seed: int | None, s: Any) -> np.ndarray:
    """Return D(x): x itself where nothing is dropped, else a copy in s.dropped."""
    if seed is None:
        return x
    kept = _shaped(s.dropped, *x.shape)
    dropout_forward(kept, x, rate, seed)
    return kept


def _shaped(scratch: np.ndarray, rows: int, columns: int) -> np.ndarray:
    return scratch.reshape(-1)[: rows * columns].reshape(rows, columns)
