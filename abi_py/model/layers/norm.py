"""The norms: at the beginning of a branch, after one, and before the head.

A norm is a description with two passes, and the same two in float64 for `model/reference.py`.  It keeps one number for
each row, r (N,); what else its backward needs it computes again from x.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import ClassVar

import numpy as np

from ...kernels.engine.replay import by_numpy
from ...kernels.layer_norm import layer_norm_backward_ref, layer_norm_forward_ref
from ...kernels.rms_norm import rms_norm_backward_ref, rms_norm_forward_ref
from ...kernels.unchecked import (
    layer_norm_backward,
    layer_norm_forward,
    rms_norm_backward,
    rms_norm_forward,
    rms_norm_in_place,
)
from ...parameters import TensorSpec, Weight

__all__ = ["LayerNorm", "Norm", "RmsNorm"]

Weights = Mapping[str, np.ndarray]


class Norm(ABC):
    """A norm of rows (N, C) whose weight is called `name`; y may be x, and dx dy where it is not added to."""

    kernels: ClassVar[tuple[str, ...]]  # those that its two passes run

    def __init__(self, name: str, width: int, eps: float) -> None:
        """Describe it."""
        self.name, self.width, self.eps = name, width, eps
        self.weights: list[Weight] = []  # bound

    @abstractmethod
    def tensors(self) -> tuple[TensorSpec, ...]:
        """Return its tensors."""

    def bind(self, at: str, weights: Callable[[str], Weight]) -> None:
        """Take its weights."""
        self.weights = [weights(at + spec.name) for spec in self.tensors()]
        # The kernels always write the gradients; that of a frozen weight is read by nobody.
        self._dw = [np.zeros_like(each.w) if each.dw is None else each.dw for each in self.weights]

    @abstractmethod
    def forward(self, y: np.ndarray, r: np.ndarray, x: np.ndarray) -> None:
        """Write y (N, C) and r (N,) from x (N, C)."""

    @abstractmethod
    def backward(self, dx: np.ndarray, dy: np.ndarray, x: np.ndarray, r: np.ndarray, add: bool) -> None:
        """Write dx (N, C), or add to it; the weights' gradients are added to."""

    @abstractmethod
    def forward_ref(self, w: Weights, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return y (N, C) and r (N,), given its weights by local name."""

    @abstractmethod
    def backward_ref(
        self, w: Weights, dy: np.ndarray, x: np.ndarray, r: np.ndarray
    ) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """Return dx (N, C), and the gradients of its weights by local name."""


class RmsNorm(Norm):
    """RMSNorm (`kernels/rms_norm.py`): y = x r w; with `above_one` the tensor is w - 1, as Gemma stores it.

    It also takes rows of heads, x (N, H C) and r (N H,): each head is normed for itself.
    """

    only_kernels = True
    kernels = "rms_norm_forward", "rms_norm_backward"

    def __init__(self, name: str, width: int, eps: float, *, above_one: bool = False) -> None:
        """Describe it."""
        super().__init__(name, width, eps)
        self.above_one = above_one

    def tensors(self) -> tuple[TensorSpec, ...]:
        """Return its tensors."""
        return (TensorSpec(self.name, (self.width,), initial="zeros" if self.above_one else "ones"),)

    def bind(self, at: str, weights: Callable[[str], Weight]) -> None:
        """Take its weight; not before is a width believed, and memory taken."""
        super().bind(at, weights)
        if self.above_one:
            self._whole = np.empty_like(self.weights[0].w)  # w, where the tensor is w - 1

    def _w(self) -> np.ndarray:
        (weight,) = self.weights
        if not self.above_one:
            return weight.w
        by_numpy(np.add, weight.w, np.float32(1), out=self._whole)
        return self._whole

    def forward(self, y: np.ndarray, r: np.ndarray, x: np.ndarray) -> None:
        """Write y (N, C) and r = 1 / rms (N,) from x (N, C)."""
        rms_norm_forward(y, r, x, self._w(), self.eps)

    def in_place(self, x: np.ndarray, kept: np.ndarray, r: np.ndarray) -> None:
        """Norm x itself, and write r and, to kept, what x was: for `backward`."""
        rms_norm_in_place(x, kept, r, self._w(), self.eps)

    def backward(self, dx: np.ndarray, dy: np.ndarray, x: np.ndarray, r: np.ndarray, add: bool) -> None:
        """Write dx (N, C), or add to it; the weight's gradient is added to."""
        rms_norm_backward(dx, *self._dw, dy, x, self._w(), r, add)

    def forward_ref(self, w: Weights, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return y (N, C) and r (N,)."""
        y, r = rms_norm_forward_ref(x.reshape(-1, self.width), w[self.name] + self.above_one, self.eps)
        return y.reshape(x.shape), r

    def backward_ref(
        self, w: Weights, dy: np.ndarray, x: np.ndarray, r: np.ndarray
    ) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """Return dx (N, C), and the weight's gradient."""
        dy, heads = dy.reshape(-1, self.width), x.reshape(-1, self.width)
        dx, dw = rms_norm_backward_ref(dy, heads, w[self.name] + self.above_one, r)
        return dx.reshape(x.shape), {self.name: dw}


class LayerNorm(Norm):
    """LayerNorm (`kernels/layer_norm.py`): y = (x - mean) r w + b, with b called `NAME_bias`."""

    only_kernels = True
    kernels = "layer_norm_forward", "layer_norm_backward"

    def tensors(self) -> tuple[TensorSpec, ...]:
        """Return its tensors."""
        return (
            TensorSpec(self.name, (self.width,), initial="ones"),
            TensorSpec(f"{self.name}_bias", (self.width,), initial="zeros"),
        )

    def forward(self, y: np.ndarray, r: np.ndarray, x: np.ndarray) -> None:
        """Write y (N, C) and r = 1 / standard deviation (N,) from x (N, C)."""
        weight, bias = self.weights
        layer_norm_forward(y, r, x, weight.w, bias.w, self.eps)

    def backward(self, dx: np.ndarray, dy: np.ndarray, x: np.ndarray, r: np.ndarray, add: bool) -> None:
        """Write dx (N, C), or add to it; the gradients of weight and bias are added to."""
        layer_norm_backward(dx, *self._dw, dy, x, self.weights[0].w, r, add)

    def forward_ref(self, w: Weights, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return y (N, C) and r (N,)."""
        return layer_norm_forward_ref(x, w[self.name], w[f"{self.name}_bias"], self.eps)

    def backward_ref(
        self, w: Weights, dy: np.ndarray, x: np.ndarray, r: np.ndarray
    ) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """Return dx (N, C), and the gradients of weight and bias."""
        dx, dw, db = layer_norm_backward_ref(dy, x, w[self.name], r)
        return dx, {self.name: dw, f"{self.name}_bias": db}
