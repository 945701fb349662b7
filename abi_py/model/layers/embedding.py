"""The embedding: ids to rows, and, where a family learns them, positions to rows.

    x_n = scale W[id_n] + P[t_n]      W (V, C)   P (max_seq_len, C)   t_n: position of a row within its segment
"""

from collections.abc import Callable, Mapping

import numpy as np

from ...kernels.embedding import embedding_backward_ref, embedding_forward_ref
from ...kernels.engine.replay import by_numpy
from ...kernels.engine.scratch import scratch
from ...kernels.storage.float32 import STORAGE as FLOAT32
from ...kernels.unchecked import embedding_backward, embedding_forward, embedding_forward_adding
from ...parameters import TensorSpec, Weight
from .end_adapters import TableAdapter
from .layer import Layer
from .linear import Joined
from .run import Run

__all__ = ["Embedding"]


class Embedding(Layer):
    """Rows of W, times a scale that is rounded to float32, and those of P; gradients are always added to."""

    only_kernels = True
    name = "token_embedding"
    positions = "position_embedding"

    def __init__(
        self, vocab_size: int, width: int, max_seq_len: int, *, learned_positions: bool = False, scale: float = 1.0
    ) -> None:
        """Describe it."""
        super().__init__("")
        self.vocab_size, self.width, self.max_seq_len = vocab_size, width, max_seq_len
        self.learned_positions, self.scale = learned_positions, float(np.float32(scale))
        self.adapters: dict[str, TableAdapter] = {}  # by the name of a table

    def tensors(self) -> tuple[TensorSpec, ...]:
        """Return its tensors."""
        named = {self.name: self.vocab_size} | ({self.positions: self.max_seq_len} if self.learned_positions else {})
        return tuple(TensorSpec(name, (rows, self.width), embedding=True) for name, rows in named.items())

    def bind(self, weights: Callable[[str], Weight]) -> None:
        """Take its weights; positions in another storage than float32 are copied to that: they are few."""
        self.weights = [weights(spec.name) for spec in self.tensors()]
        self.weight, *others = self.weights
        self.table = Joined(None, self.weight.w, self.weight.dw, self.weight.storage)
        for each in others:
            self._positions = np.require(each.w, requirements="W")  # kernels take no others: of a file, a copy
            if each.storage is not FLOAT32:
                self._positions = np.empty((self.max_seq_len, self.width), np.float32)
                each.storage.decode(self._positions, each.w, 0)

    def pieces(self) -> tuple[object, ...]:
        """Return its adapters."""
        return tuple(self.adapters.values())

    def is_trained(self) -> bool:
        """Say whether a table is trained, or has an adapter."""
        return bool(self.adapters) or super().is_trained()

    def kernels(self) -> set[str]:
        """Return that of learned positions."""
        return {"embedding_forward_adding"} if self.learned_positions else set()

    def flops(self, seq_len: int, below: bool) -> float:
        """Return those of adapters: rows are copied."""
        return sum(adapter.flops() for adapter in self.adapters.values())

    def forward(self, x: np.ndarray, ids: np.ndarray, run: Run) -> None:
        """Write x (N, C) for ids (N,)."""
        self.table.rows(x, ids)
        if self.scale != 1:
            by_numpy(np.multiply, x, np.float32(self.scale), out=x)
        if self.name in self.adapters:
            self.adapters[self.name].forward(x, ids, self.scale, run)
        if self.positions in self.adapters:
            (rows,) = scratch("rows of positions", x.shape)
            embedding_forward(rows, run.positions, self._positions)
            self.adapters[self.positions].forward(rows, run.positions, 1.0, run)
            x += rows
        elif self.learned_positions:
            embedding_forward_adding(x, run.positions, self._positions)

    def backward(self, dx: np.ndarray, ids: np.ndarray, run: Run) -> None:
        """Add to the gradients of what is trained; dx, which nothing reads after this, is scaled in place."""
        for name, adapter in self.adapters.items():
            rows, scale = (run.positions, 1.0) if name == self.positions else (ids, self.scale)
            adapter.backward(dx, rows, scale, run)
        gradients = [weight.dw for weight in self.weights]
        if self.learned_positions and gradients[1] is not None:  # forward: x = ... + P[t]
            embedding_backward(gradients[1], dx, run.positions)
        if gradients[0] is not None:  # forward: x = scale W[ids]
            if self.scale != 1:
                by_numpy(np.multiply, dx, np.float32(self.scale), out=dx)
            embedding_backward(gradients[0], dx, ids)

    def forward_ref(self, w: Mapping[str, np.ndarray], ids: np.ndarray, positions: np.ndarray) -> np.ndarray:
        """Return x (N, C) for ids and positions (N,), given its weights by name."""
        x = embedding_forward_ref(ids, w[self.name]) * self.scale
        return x + embedding_forward_ref(positions, w[self.positions]) if self.learned_positions else x

    def backward_ref(self, dx: np.ndarray, ids: np.ndarray, positions: np.ndarray) -> dict[str, np.ndarray]:
        """Return the gradients of its weights by name."""
        found = {self.name: embedding_backward_ref(dx * self.scale, ids, self.vocab_size)}
        if self.learned_positions:
            found[self.positions] = embedding_backward_ref(dx, positions, self.max_seq_len)
        return found
