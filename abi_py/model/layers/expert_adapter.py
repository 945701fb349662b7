"""Adapters (LoRA) of stacked experts: each expert has an A and a B of its own, and multiplies the rows routed to it.

    forward    y_o += u_s B_eᵀ             u_s = s x_i A_eᵀ is saved for backward
    backward   dx_i += du_s A_e            du_s = s dy_o B_e
               dB_e = Σ_{s of e} dy_oᵀ u_s          dA_e = Σ_{s of e} du_sᵀ x_i

    A dA (E, R, in)   B dB (E, out, R)   u du (S, R)   s: one of the S rows, e its expert

These are the products of `kernels/experts.py`.  Of gate and up, which have one adapter, x_i are the normed rows of the
tokens (i = token[s]) and y_o is row s; of down, x_i is row s and y_o the token's row of the output (o = token[s]).

There is no dropout: PEFT adds s B_e A_e to the matrices, which see no inputs, and computes the same.
"""

from dataclasses import dataclass, field

import numpy as np

from ...kernels.unchecked import expert_gradients, from_experts, to_experts
from .expert_products import Rows
from .run import Run

__all__ = ["ExpertAdapter"]


@dataclass(frozen=True)
class ExpertAdapter:
    """What is added to one stack of matrices, or to gate and up together."""

    a: np.ndarray  # (E, R, in)
    da: np.ndarray
    b: np.ndarray  # (E, out, R)
    db: np.ndarray
    scale: np.float32
    gathers: bool  # x are tokens' rows, and y rows of experts; else the other way round
    _counted: list[np.ndarray] = field(default_factory=lambda: [np.arange(0, dtype=np.int32)])

    @property
    def rank(self) -> int:
        """The inner width R."""
        return self.a.shape[1]

    def _places(self, rows: Rows) -> tuple[np.ndarray, np.ndarray]:
        """Return of each of the S rows which row of x it reads and which of y it is added to."""
        count = len(rows.token)
        if len(self._counted[0]) < count:
            self._counted[0] = np.arange(count, dtype=np.int32)
        own = self._counted[0][:count]
        return (rows.token, own) if self.gathers else (own, rows.token)

    def forward(self, y: np.ndarray, x: np.ndarray, u: np.ndarray, rows: Rows, run: Run) -> None:
        """Add to y, and overwrite u (S, R)."""
        inner, outer = self._places(rows)
        to_experts(u, x, inner, rows.offsets, self.a, number_format=run.number_format)
        np.multiply(u, self.scale, out=u)
        from_experts(y, u, outer, rows.offsets, self.b, addend=y, number_format=run.number_format)

    def inner_gradient(self, du: np.ndarray, dy: np.ndarray, rows: Rows, run: Run) -> None:
        """Overwrite du (S, R)."""
        _, outer = self._places(rows)
        to_experts(du, dy, outer, rows.offsets, self.b, transposed=False, number_format=run.number_format)
        np.multiply(du, self.scale, out=du)  # forward: u = s x Aᵀ

    def weight_gradients(
        self, dy: np.ndarray, x: np.ndarray, u: np.ndarray, du: np.ndarray, rows: Rows, run: Run
    ) -> None:
        """Add to dA and dB, or overwrite them; those of experts without rows too."""
        inner, outer = self._places(rows)
        options = {"accumulate": run.accumulate, "number_format": run.number_format}
        expert_gradients(self.db, dy, u, outer, rows.offsets, gather_left=True, **options)  # forward: y = u Bᵀ
        expert_gradients(self.da, du, x, inner, rows.offsets, **options)

    def input_gradient(self, dx: np.ndarray, du: np.ndarray, rows: Rows, run: Run) -> None:
        """Add to dx."""
        inner, _ = self._places(rows)
        options = {"transposed": False, "addend": dx, "number_format": run.number_format}
        from_experts(dx, du, inner, rows.offsets, self.a, **options)
