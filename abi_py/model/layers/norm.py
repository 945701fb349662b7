"""The norm at the beginning of a branch: what it is called, and its weight."""

from collections.abc import Callable

import numpy as np

from ...kernels.unchecked import rms_norm_backward, rms_norm_forward
from ...parameters import TensorSpec, Weight

__all__ = ["RmsNorm"]


class RmsNorm:
    """RMSNorm (`kernels/rms_norm.py`) with the weight `name`, (C,)."""

    def __init__(self, name: str, width: int, eps: float) -> None:
        """Describe it."""
        self.name, self.width, self.eps = name, width, eps

    def tensors(self) -> tuple[TensorSpec, ...]:
        """Return its tensors."""
        return (TensorSpec(self.name, (self.width,), initial="ones"),)

    def bind(self, at: str, weights: Callable[[str], Weight]) -> None:
        """Take its weight."""
        self.weight = weights(at + self.name)
        self._w = self.weight.w
        # The kernel always writes dw; that of a frozen weight is read by nobody.
        self._dw = np.zeros_like(self._w) if self.weight.dw is None else self.weight.dw

    def forward(self, y: np.ndarray, r: np.ndarray, x: np.ndarray) -> None:
        """Write y (N, C) and r = 1 / rms (N,) from x (N, C)."""
        rms_norm_forward(y, r, x, self._w, self.eps)

    def backward(self, dx: np.ndarray, dy: np.ndarray, x: np.ndarray, r: np.ndarray, add: bool) -> None:
        """Write dx (N, C), or add to it; the weight's gradient is added to."""
        rms_norm_backward(dx, self._dw, dy, x, self._w, r, add)
