"""The embedding: ids to rows."""

from collections.abc import Callable

import numpy as np

from ...kernels.storage.float32 import STORAGE as FLOAT32
from ...kernels.unchecked import embedding_backward, embedding_forward, stored_rows
from ...parameters import TensorSpec, Weight
from .layer import Layer

__all__ = ["Embedding"]


class Embedding(Layer):
    """x = W[ids], W (V, C); its gradient is always added to."""

    name = "token_embedding"

    def __init__(self, vocab_size: int, width: int, max_seq_len: int) -> None:
        """Describe it."""
        super().__init__("")
        self.vocab_size, self.width, self.max_seq_len = vocab_size, width, max_seq_len

    def tensors(self) -> tuple[TensorSpec, ...]:
        """Return its tensors."""
        return (TensorSpec(self.name, (self.vocab_size, self.width)),)

    def bind(self, weights: Callable[[str], Weight]) -> None:
        """Take its weights."""
        self.weight = weights(self.name)
        self.weights = [self.weight]

    def flops(self, seq_len: int, below: bool) -> float:
        """Return 0: rows are copied."""
        return 0.0

    def forward(self, x: np.ndarray, ids: np.ndarray) -> None:
        """Write x (N, C) for ids (N,)."""
        if self.weight.storage is FLOAT32:
            embedding_forward(x, ids, self.weight.w)
        else:
            stored_rows(x, ids, self.weight.w, self.weight.storage)

    def backward(self, dx: np.ndarray, ids: np.ndarray) -> None:
        """Add to the gradient, if it is trained."""
        if self.weight.dw is not None:
            embedding_backward(self.weight.dw, dx, ids)
