"""A linear layer: parts side by side that read the same x, each a matrix, with a bias or an adapter if it has one.

    forward    y  = x Wᵀ + b + s D(x) Aᵀ Bᵀ     u  = s D(x) Aᵀ is saved for backward, as uᵀ (R, N)
    backward   dx = dy W + D(du A)              du = s dy B
               dB = dyᵀ u                       dA = duᵀ D(x)         dW = dyᵀ x and db = Σ dy, unless they are frozen

    x dx (N, in)   y dy (N, out)   W dW (out, in)   b db (out,)   A dA (R, in)   B dB (out, R)
    D: dropout, the same mask each time

W and b consist of the parts' own (q, k and v; gate and up).  Matrices of parts that are float32 neighbours in one
buffer are one matrix, and one product; any other matrix is a product of its own, which is why a bias that is stored
between two of them can never become rows of one, and why parts may be kept in different storages; for few rows of x, in
generation, those are one call of a kernel all the same.  What adapters (LoRA) add, and u, are in `adapter.py`.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar

import numpy as np

from ...kernels.storage import Storage
from ...kernels.storage.float32 import STORAGE as FLOAT32
from ...kernels.unchecked import (
    bias_backward,
    bias_forward,
    embedding_forward,
    product,
    stored_product,
    stored_product_backward,
    stored_products,
    stored_rows,
    streamed_product,
)
from ...parameters import INITIAL_STD, TensorSpec, Weight, adjoin, joined
from .adapter import Adapter, AdapterScratch
from .run import Entry, Form, Run

__all__ = ["Joined", "Linear", "Projection", "adapter_scratch"]


@dataclass(frozen=True)
class Projection:
    """A part as its layer describes it: local names, and its columns of y."""

    name: str
    width: int
    bias: str = ""  # none if empty
    std: float = INITIAL_STD  # of the initial matrix


@dataclass(frozen=True)
class Joined:
    """Matrices (out, in) or biases (out,) of neighbouring parts as one, with their gradients."""

    columns: slice | None  # of y; None: all of them
    w: np.ndarray
    dw: np.ndarray | None
    storage: Storage

    def of(self, y: np.ndarray) -> np.ndarray:
        """Return its columns of y."""
        return y if self.columns is None else y[:, self.columns]

    def product(self, y: np.ndarray, x: np.ndarray, addend: np.ndarray | None, run: Run) -> None:
        """Write y = x Wᵀ (+ addend)."""
        if self.storage is FLOAT32:
            product(y, x, self.w, transpose_b=True, addend=addend, number_format=run.number_format)
        else:
            stored_product(y, x, self.w, self.storage, addend, run.number_format)

    def product_backward(self, dx: np.ndarray, dy: np.ndarray, addend: np.ndarray | None, run: Run) -> None:
        """Write dx = dy W (+ addend)."""
        if self.storage is FLOAT32:
            product(dx, dy, self.w, addend=addend, number_format=run.number_format)
        else:
            stored_product_backward(dx, dy, self.w, self.storage, addend, run.number_format)

    def rows(self, x: np.ndarray, ids: np.ndarray) -> None:
        """Write x_n = W[id_n]."""
        if self.storage is FLOAT32:
            embedding_forward(x, ids, self.w)
        else:
            stored_rows(x, ids, self.w, self.storage)

    def decode(self, y: np.ndarray, x: np.ndarray, addend: np.ndarray | None, run: Run) -> None:
        """Write y = x Wᵀ (+ addend) for generation."""
        if self.storage is FLOAT32:
            streamed_product(y, x, self.w, addend=addend)
        else:
            stored_product(y, x, self.w, self.storage, addend, integer=run.integer)


class Linear:
    """One linear layer from `inputs` to the widths of its projections together."""

    only_kernels: ClassVar[bool] = True  # `layer.py`

    def __init__(self, inputs: int, *projections: Projection) -> None:
        """Describe it."""
        self.inputs, self.projections = inputs, projections
        self.width = sum(projection.width for projection in projections)
        self.adapter: Adapter | None = None
        self.parts: list[Weight] = []  # bound
        self.products: list[Joined] = []  # those, neighbours joined
        self.weights: list[Weight] = []  # those, and the biases
        self.rank, self.dropout = 0, False  # of its adapters together; whether something of x is dropped
        self.magnitudes = 0  # columns of y with a length of their own (DoRA)

    # -- description -----------------------------------------------------------------------------

    def tensors(self) -> tuple[TensorSpec, ...]:
        """Return its matrices, then its biases."""
        return (*self.matrices(), *self.biases())

    def matrices(self) -> tuple[TensorSpec, ...]:
        """Return its matrices, in the order of the parts."""
        return tuple(TensorSpec(p.name, (p.width, self.inputs), std=p.std, hidden=True) for p in self.projections)

    def biases(self) -> tuple[TensorSpec, ...]:
        """Return its biases."""
        return tuple(TensorSpec(p.bias, (p.width,), initial="zeros") for p in self.projections if p.bias)

    def columns(self) -> list[slice]:
        """Return each part's columns of y."""
        ends = np.cumsum([p.width for p in self.projections]).tolist()
        return [slice(first, last) for first, last in pairwise([0, *ends])]

    def saved(self) -> Entry:
        """Return what its adapters save."""
        return Entry(self.rank + self.magnitudes, Form.COLUMNS)

    def flops(self, below: bool) -> float:
        """Return its operations for each row in forward and backward; see `Layer.flops`."""
        first = sum(group.a.size for group in self.adapter.groups) if self.adapter else 0
        second = sum(part.b.size for group in self.adapter.groups for part in group.parts) if self.adapter else 0
        pairs = zip(self.projections, self.parts, strict=False)  # no parts before they are bound
        frozen = self.inputs * sum(projection.width for projection, part in pairs if part.dw is None)
        matrix, dx = self.inputs * self.width, 1 if below else 0
        again = self.inputs * self.magnitudes if self.dropout else 0  # h Wᵀ, where y is x Wᵀ
        return 2.0 * ((2 + dx) * matrix - frozen + (1 + dx) * again) + 6.0 * (first + second) - 2.0 * first * (1 - dx)

    # -- weights ---------------------------------------------------------------------------------

    def bind(self, at: str, weights: Callable[[str], Weight]) -> None:
        """Take views of its weights."""
        columns = self.columns()
        biased = [i for i, p in enumerate(self.projections) if p.bias]
        self.parts = [weights(at + p.name) for p in self.projections]
        biases = [weights(at + self.projections[i].bias) for i in biased]
        self.weights = [*self.parts, *biases]
        self.products = _join(self.parts, columns, len(columns))
        self._biases = _join(biases, [columns[i] for i in biased], len(columns))

    def is_trained(self) -> bool:
        """Say whether it has adapters, or a matrix or a bias that is not frozen."""
        own = any(weight.dw is not None for weight in self.weights) or not self.weights
        return own or self.adapter is not None

    # -- the reference, without adapters ---------------------------------------------------------

    def forward_ref(self, w: Mapping[str, np.ndarray], x: np.ndarray) -> np.ndarray:
        """Return y (N, out) of x (N, in), given its weights by local name."""
        return np.concatenate([x @ w[p.name].T + (w[p.bias] if p.bias else 0) for p in self.projections], axis=1)

    def backward_ref(
        self, w: Mapping[str, np.ndarray], dy: np.ndarray, x: np.ndarray
    ) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """Return dx (N, in), and the gradients of its weights by local name."""
        dx, gradients = np.zeros_like(x), dict[str, np.ndarray]()
        for p, columns in zip(self.projections, self.columns(), strict=True):  # forward: y = x wᵀ + b
            part = dy[:, columns]
            dx += part @ w[p.name]
            gradients |= {p.name: part.T @ x} | ({p.bias: part.sum(0)} if p.bias else {})
        return dx, gradients

    # -- passes ----------------------------------------------------------------------------------

    def forward(
        self, y: np.ndarray, x: np.ndarray, u: np.ndarray, s: AdapterScratch, run: Run, addend: np.ndarray | None = None
    ) -> None:
        """Overwrite y (N, out) from x (N, in), with addend (N, out) added; u is what the adapters save."""
        for each in self.products:
            base = None if addend is None else each.of(addend)
            each.product(each.of(y), x, base, run)
        if self.adapter is not None:
            self.adapter.forward(y, x, u, s, run, addend)
        self._add_biases(y)

    def decode(self, y: np.ndarray, x: np.ndarray, run: Run, addend: np.ndarray | None = None) -> None:
        """Overwrite y from x for generation, with addend added; few rows of x read each weight as it lies."""
        apart = addend if self.adapter is None else self.adapter.apart(addend)
        if len(self.products) == 1:
            self.products[0].decode(y, x, apart, run)
        else:
            raws, storages = zip(*((each.w, each.storage) for each in self.products), strict=True)
            stored_products(y, x, raws, storages, apart, run.integer)
        if self.adapter is not None:
            self.adapter.decode(y, x, run, apart)
        self._add_biases(y)

    def _add_biases(self, y: np.ndarray) -> None:
        """Add the biases to what the products have written."""
        for bias in self._biases:
            bias_forward(bias.of(y), bias.w)

    def backward(
        self, dx: np.ndarray | None, dy: np.ndarray, x: np.ndarray, u: np.ndarray, s: AdapterScratch, run: Run
    ) -> None:
        """Overwrite dx (N, in), unless it is None; add to the weights' gradients, or overwrite them.

        x, u and run are those of the forward call.  x is read for the last time before dx is written, so dx may be x's
        memory.
        """
        self.inner_gradient(dy, u, s, run)
        self.weight_gradients(dy, x, u, s, run)
        if dx is not None:
            self.input_gradient(dx, dy, u, s, run)

    # The parts of `backward`, for a layer whose x is there only after dx.  The other two read the du that
    # `inner_gradient` leaves in s.du.

    def inner_gradient(self, dy: np.ndarray, u: np.ndarray, s: AdapterScratch, run: Run) -> None:
        """Write du (R, N), if there are adapters, to s.du, where the other two parts read it."""
        if self.adapter is not None:
            self.adapter.inner_gradient(dy, u, s, run)

    def weight_gradients(self, dy: np.ndarray, x: np.ndarray, u: np.ndarray, s: AdapterScratch, run: Run) -> None:
        """Add to the gradients of the matrices and adapters, or overwrite them; those of biases are added to."""
        for each in self.products:
            if each.dw is not None:  # forward: y = x Wᵀ
                base = each.dw if run.accumulate else None
                product(
                    each.dw, each.of(dy), x, transpose_a=True, addend=base, number_format=run.number_format
                )
        for bias in self._biases:
            if bias.dw is not None:  # forward: y = x Wᵀ + b
                bias_backward(bias.dw, bias.of(dy))
        if self.adapter is not None:
            self.adapter.weight_gradients(dy, x, u, s, run)

    def input_gradient(self, dx: np.ndarray, dy: np.ndarray, u: np.ndarray, s: AdapterScratch, run: Run) -> None:
        """Overwrite dx (N, in)."""
        through = dy if self.adapter is None else self.adapter.through(dy, u, s, run)
        for index, each in enumerate(self.products):
            each.product_backward(dx, each.of(through), dx if index else None, run)
        if self.adapter is not None:
            self.adapter.input_gradient(dx, dy, u, s, run)


def adapter_scratch(linears: Sequence[Linear]) -> dict[str, Entry]:
    """Return the scratch that the adapters of a layer's linear layers need."""
    widest = max((linear.inputs for linear in linears if linear.dropout), default=0)
    inner = max(linear.rank + (1 + linear.dropout) * linear.width * bool(linear.magnitudes) for linear in linears)
    return {"du": Entry(inner, Form.FLAT), "dropped": Entry(widest, Form.FLAT)}


def _join(weights: Sequence[Weight], columns: Sequence[slice], parts: int) -> list[Joined]:
    """Return the weights of some of `parts` parts, with their columns of y; neighbours on both counts are one."""
    runs: list[list[int]] = []
    for i, weight in enumerate(weights):
        if runs and columns[i - 1].stop == columns[i].start and adjoin(weights[i - 1], weight):
            runs[-1].append(i)
        else:
            runs.append([i])
    found = []
    for run in runs:
        gradients = [dw for i in run if (dw := weights[i].dw) is not None]
        span = slice(columns[run[0]].start, columns[run[-1]].stop) if len(run) < parts else None
        w, dw = joined([weights[i].w for i in run]), joined(gradients) if gradients else None
        found.append(Joined(span, w, dw, weights[run[0]].storage))
    return found
