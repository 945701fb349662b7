"""The feed-forward branch: out = x + (silu(n w_gateᵀ) * (n w_upᵀ)) w_downᵀ, n = norm(x).

What is cheap to compute again (the normed rows, the SwiGLU output) is not saved.  In bfloat16, gate_up is saved
rounded, and what follows reads it rounded, in forward and in backward.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ...kernels.unchecked import swiglu_backward, swiglu_forward, swiglu_forward_rounded
from ...parameters import TensorSpec
from .. import reference
from .layer import Branch
from .linear import Linear, Projection, adapter_scratch
from .norm import Norm
from .run import Chunk, Entry, Form, KeysAndValues, Run

__all__ = ["FeedForward"]


class FeedForward(Branch):
    """SwiGLU of the inner width F."""

    @dataclass
    class Saved:
        """What forward keeps, for N rows."""

        x: np.ndarray  # (N, C): input of the branch
        r: np.ndarray  # (N,): 1 / rms of x
        gate_up: np.ndarray  # (N, 2 F)
        u_gate_up: np.ndarray  # (R of gate and up, N): inner values of the adapters
        u_down: np.ndarray  # (R, N)

    @dataclass
    class Scratch:
        """Arrays between two operations, for N rows."""

        n: np.ndarray  # (N, C): normed rows
        dn: np.ndarray  # (N, C)
        h: np.ndarray  # (N, F): silu(gate) * up
        dh: np.ndarray  # (N, F), in the memory of h: its kernel turns the one into the other
        gate_up: np.ndarray  # (N, 2 F): before it is rounded, in bfloat16
        dgate_up: np.ndarray  # (N, 2 F)
        du: np.ndarray  # flat, as `AdapterScratch` has it
        dropped: np.ndarray

    @dataclass
    class Decoding:
        """Arrays of generation, for the rows of a chunk."""

        n: np.ndarray  # (rows, C)
        r: np.ndarray  # (rows,)
        gate_up: np.ndarray  # (rows, 2 F)
        h: np.ndarray  # (rows, F)

    reference = reference.feed_forward_forward, reference.feed_forward_backward

    def __init__(self, at: str, block: int, width: int, inner: int, norm: Norm) -> None:
        """Describe it."""
        super().__init__(at, block)
        self.width, self.inner, self.norm = width, inner, norm
        self.gate_up = Linear(width, Projection("w_gate", inner), Projection("w_up", inner))
        self.down = Linear(inner, Projection("w_down", width))
        self.linears = self.gate_up, self.down

    # -- description -----------------------------------------------------------------------------

    def tensors(self) -> tuple[TensorSpec, ...]:
        """Return its tensors."""
        return (*self.gate_up.matrices(), *self.down.matrices(), *self.norm.tensors())

    def saved(self) -> dict[str, Entry]:
        """Return what forward keeps."""
        return {
            "x": Entry(self.width),
            "r": Entry(1, Form.NUMBERS),
            "gate_up": Entry(self.gate_up.width, narrow=True),
            "u_gate_up": self.gate_up.saved(),
            "u_down": self.down.saved(),
        }

    def scratch(self) -> dict[str, Entry]:
        """Return the arrays between operations: what forward rounds is float32 where, later, its gradient is."""
        return {
            "n": Entry(self.width),
            "dn": Entry(self.width, place="n"),
            "h": Entry(self.inner),
            "dh": Entry(self.inner, place="h"),
            "gate_up": Entry(self.gate_up.width, place="dgate_up"),
            "dgate_up": Entry(self.gate_up.width),
            **adapter_scratch(self.linears),
        }

    def decoding(self) -> dict[str, Entry]:
        """Return the arrays of generation."""
        return {
            "n": Entry(self.width, chunked=True),
            "r": Entry(1, Form.NUMBERS, chunked=True),
            "gate_up": Entry(self.gate_up.width, chunked=True),
            "h": Entry(self.inner, chunked=True),
        }

    def flops(self, seq_len: int, below: bool) -> float:
        """Return those of the products."""
        return self.gate_up.flops(below) + self.down.flops(below or self.gate_up.is_trained())

    # -- passes ----------------------------------------------------------------------------------

    def fill(self, a: Saved, s: Scratch, run: Run) -> None:
        """Do nothing: everything is kept."""

    def forward(self, out: np.ndarray, a: Saved, s: Scratch, run: Run) -> None:
        """Write out (N, C) from a.x (N, C), and fill the other arrays of a."""
        self.norm.forward(s.n, a.r, a.x)
        gate_up = s.gate_up if run.narrow else a.gate_up
        self.gate_up.forward(gate_up, s.n, a.u_gate_up, s, run)
        if run.narrow:
            swiglu_forward_rounded(s.h, a.gate_up, gate_up)
        else:
            swiglu_forward(s.h, gate_up)
        self.down.forward(out, s.h, a.u_down, s, run, addend=a.x)

    def backward(self, dx: np.ndarray, a: Saved, s: Scratch, run: Run, below: bool) -> None:
        """Turn dx (N, C) from the gradient of out into that of a.x, in place."""
        if not (below or self.gate_up.is_trained()):  # forward: out = x + h w_downᵀ
            swiglu_forward(s.h, a.gate_up)
            self.down.backward(None, dx, s.h, a.u_down, s, run)
            return
        # forward: out = x + h w_downᵀ, h = swiglu(gate_up); s.h has the place of s.dh, and swiglu_backward fills it
        self.down.inner_gradient(dx, a.u_down, s, run)
        self.down.input_gradient(s.dh, dx, a.u_down, s, run)
        swiglu_backward(s.dgate_up, s.dh, a.gate_up)
        self.down.weight_gradients(dx, s.h, a.u_down, s, run)
        # forward: gate_up = n [w_gate w_up]ᵀ, n = norm(x)
        self.norm.forward(s.n, a.r, a.x)
        self.gate_up.backward(s.dn if below else None, s.dgate_up, s.n, a.u_gate_up, s, run)
        if below:
            self.norm.backward(dx, s.dn, a.x, a.r, True)

    def decode(self, x: np.ndarray, s: Decoding, kept: KeysAndValues | None, run: Run, chunks: Sequence[Chunk]) -> None:
        """Turn x (rows, C) into out in place."""
        for rows, few in chunks:
            self.norm.forward(s.n[few], s.r[few], x[rows])
            self.gate_up.decode(s.gate_up[few], s.n[few])
            swiglu_forward(s.h[few], s.gate_up[few])
            self.down.decode(x[rows], s.h[few], addend=x[rows])
