"""What stands between the two linear layers of a feed-forward branch: h (N, F) from u.

    gated    u is gate and up side by side, (N, 2 F), and the activation of the gate weighs up
    plain    u is (N, F)

Each has a form that saves u in bfloat16, a backward that leaves h where dh was, and its reference pair.
"""

from abc import ABC, abstractmethod
from typing import ClassVar

import numpy as np

from ...kernels.gelu import gelu_backward_ref, gelu_forward_ref
from ...kernels.swiglu import swiglu_backward_ref, swiglu_forward_ref
from ...kernels.unchecked import (
    gelu_backward,
    gelu_forward,
    gelu_forward_rounded,
    swiglu_backward,
    swiglu_forward,
    swiglu_forward_rounded,
)

__all__ = ["Activation", "Gelu", "Swiglu"]


class Activation(ABC):
    """An activation, gated or plain."""

    gated: bool
    kernels: ClassVar[tuple[str, ...]]  # those that its passes run

    @abstractmethod
    def forward(self, h: np.ndarray, u: np.ndarray) -> None:
        """Write h (N, F) from u, float32 or bfloat16."""

    @abstractmethod
    def forward_rounded(self, h: np.ndarray, saved: np.ndarray, u: np.ndarray) -> None:
        """Write u rounded to bfloat16 to saved (uint16), and h (N, F) from that."""

    @abstractmethod
    def backward(self, du: np.ndarray, dh: np.ndarray, u: np.ndarray) -> None:
        """Write du from dh (N, F) and u, float32 or bfloat16; then turn dh into h."""

    @abstractmethod
    def forward_ref(self, u: np.ndarray) -> np.ndarray:
        """Return h (N, F)."""

    @abstractmethod
    def backward_ref(self, dh: np.ndarray, u: np.ndarray) -> np.ndarray:
        """Return du, of the shape of u."""


class Swiglu(Activation):
    """silu(gate) up (`kernels/swiglu.py`)."""

    gated, only_kernels = True, True
    kernels = "swiglu_forward", "swiglu_forward_rounded", "swiglu_backward"

    def forward(self, h: np.ndarray, u: np.ndarray) -> None:
        """Write h (N, F) from gate and up (N, 2 F)."""
        swiglu_forward(h, u)

    def forward_rounded(self, h: np.ndarray, saved: np.ndarray, u: np.ndarray) -> None:
        """Write u rounded, and h (N, F) from that."""
        swiglu_forward_rounded(h, saved, u)

    def backward(self, du: np.ndarray, dh: np.ndarray, u: np.ndarray) -> None:
        """Write du (N, 2 F), and turn dh (N, F) into h."""
        swiglu_backward(du, dh, u)

    def forward_ref(self, u: np.ndarray) -> np.ndarray:
        """Return h (N, F)."""
        return swiglu_forward_ref(u)

    def backward_ref(self, dh: np.ndarray, u: np.ndarray) -> np.ndarray:
        """Return du (N, 2 F)."""
        return swiglu_backward_ref(dh, u)


class Gelu(Activation):
    """gelu(u), or gelu(gate) up if `gated` (`kernels/gelu.py`); by a tanh, unless it is `exact`."""

    only_kernels = True
    kernels = "gelu_forward", "gelu_forward_rounded", "gelu_backward"

    def __init__(self, *, exact: bool = False, gated: bool = False) -> None:
        """Choose one of the four."""
        self.exact, self.gated = exact, gated

    def forward(self, h: np.ndarray, u: np.ndarray) -> None:
        """Write h (N, F) from u."""
        gelu_forward(h, u, self.exact)

    def forward_rounded(self, h: np.ndarray, saved: np.ndarray, u: np.ndarray) -> None:
        """Write u rounded, and h (N, F) from that."""
        gelu_forward_rounded(h, saved, u, self.exact)

    def backward(self, du: np.ndarray, dh: np.ndarray, u: np.ndarray) -> None:
        """Write du, and turn dh (N, F) into h."""
        gelu_backward(du, dh, u, self.exact)

    def forward_ref(self, u: np.ndarray) -> np.ndarray:
        """Return h (N, F)."""
        return gelu_forward_ref(u, self.exact, self.gated)

    def backward_ref(self, dh: np.ndarray, u: np.ndarray) -> np.ndarray:
        """Return du, of the shape of u."""
        return gelu_backward_ref(dh, u, self.exact, self.gated)
