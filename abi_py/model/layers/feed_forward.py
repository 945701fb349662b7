"""The feed-forward branch: out = x + z, z = h w_downᵀ, h = act(n w_gateᵀ) * (n w_upᵀ), n = norm(x).

Without a gate, h = act(n w_upᵀ).  A norm after the branch takes z before it is added: out = x + after(z).

What is cheap to compute again (the normed rows, the activation's output) is not saved.  In bfloat16, gate_up is saved
rounded, and what follows reads it rounded, in forward and in backward.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ...kernels.engine.replay import by_numpy
from ...parameters import INITIAL_STD, TensorSpec
from .. import reference
from .activation import Activation, Swiglu
from .layer import Branch
from .linear import Linear, Projection, adapter_scratch
from .norm import Norm
from .run import Chunk, Entry, Form, KeysAndValues, Run

__all__ = ["FeedForward"]


class FeedForward(Branch):
    """Two linear layers with an activation between them, of the inner width F."""

    @dataclass
    class Saved:
        """What forward keeps, for N rows."""

        x: np.ndarray  # (N, C): input of the branch
        r: np.ndarray  # (N,): 1 / rms of x
        gate_up: np.ndarray  # (N, 2 F); without a gate up (N, F)
        z: np.ndarray  # (N, C), and
        r_z: np.ndarray  # (N,), of the norm after the branch, if there is one
        u_gate_up: np.ndarray  # (R of gate and up, N): inner values of the adapters
        u_down: np.ndarray  # (R, N)

    @dataclass
    class Scratch:
        """Arrays between two operations, for N rows."""

        n: np.ndarray  # (N, C): normed rows
        dn: np.ndarray  # (N, C)
        dz: np.ndarray  # (N, C), with a norm after the branch
        h: np.ndarray  # (N, F): act(gate) * up
        dh: np.ndarray  # (N, F), in the memory of h: its kernel turns the one into the other
        gate_up: np.ndarray  # (N, 2 F), or (N, F): before it is rounded, in bfloat16
        dgate_up: np.ndarray  # the same
        du: np.ndarray  # flat, as `AdapterScratch` has it
        dropped: np.ndarray

    @dataclass
    class Decoding:
        """Arrays of generation, for the rows of a chunk."""

        n: np.ndarray  # (rows, C)
        r: np.ndarray  # (rows,)
        gate_up: np.ndarray  # (rows, 2 F), or (rows, F)
        h: np.ndarray  # (rows, F)
        z: np.ndarray  # (rows, C), and
        r_z: np.ndarray  # (rows,), with a norm after the branch

    only_kernels = True
    reference = reference.feed_forward_forward, reference.feed_forward_backward

    def __init__(
        self,
        at: str,
        block: int,
        width: int,
        inner: int,
        norm: Norm,
        *,
        activation: Activation | None = None,
        bias: bool = False,
        after: Norm | None = None,
        out_std: float = INITIAL_STD,
    ) -> None:
        """Describe it.

        activation  SwiGLU if not given; a plain one has no w_gate
        bias        biases on all of its matrices
        after       a norm of what is added to x
        out_std     of the initial w_down
        """
        super().__init__(at, block)
        self.width, self.inner, self.norm, self.after = width, inner, norm, after
        self.inner_norms = (after,) if after else ()
        self.activation = activation or Swiglu()
        names = ("gate", "up") if self.activation.gated else ("up",)
        self.gate_up = Linear(width, *(Projection(f"w_{name}", inner, f"b_{name}" * bias) for name in names))
        self.down = Linear(inner, Projection("w_down", width, "b_down" * bias, out_std))
        self.linears = self.gate_up, self.down

    # -- description -----------------------------------------------------------------------------

    def tensors(self) -> tuple[TensorSpec, ...]:
        """Return its tensors."""
        norms = (spec for norm in (self.norm, *self.inner_norms) for spec in norm.tensors())
        return (*self.gate_up.tensors(), *self.down.tensors(), *norms)

    def pieces(self) -> tuple[object, ...]:
        """Return its linear layers, its norms and its activation."""
        return (*super().pieces(), self.activation)

    def kernels(self) -> set[str]:
        """Return those of its norms, biases and activation."""
        return super().kernels() | {*self.activation.kernels}

    def saved(self) -> dict[str, Entry]:
        """Return what forward keeps."""
        return {
            "x": Entry(self.width),
            "r": Entry(1, Form.NUMBERS),
            "gate_up": Entry(self.gate_up.width, narrow=True),
            "z": Entry(self.width if self.after else 0),
            "r_z": Entry(1 if self.after else 0, Form.NUMBERS),
            "u_gate_up": self.gate_up.saved(),
            "u_down": self.down.saved(),
        }

    def scratch(self) -> dict[str, Entry]:
        """Return the arrays between operations: what forward rounds is float32 where, later, its gradient is."""
        return {
            "n": Entry(self.width),
            "dn": Entry(self.width, place="n"),
            "dz": Entry(self.width if self.after else 0, place="n"),
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
            "z": Entry(self.width if self.after else 0, chunked=True),
            "r_z": Entry(1 if self.after else 0, Form.NUMBERS, chunked=True),
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
            self.activation.forward_rounded(s.h, a.gate_up, gate_up)
        else:
            self.activation.forward(s.h, gate_up)
        if self.after is None:
            self.down.forward(out, s.h, a.u_down, s, run, addend=a.x)
            return
        self.down.forward(a.z, s.h, a.u_down, s, run)
        self.after.forward(out, a.r_z, a.z)
        by_numpy(np.add, out, a.x, out=out)

    def backward(self, dx: np.ndarray, a: Saved, s: Scratch, run: Run, below: bool) -> None:
        """Turn dx (N, C) from the gradient of out into that of a.x, in place."""
        dz = dx
        if self.after is not None:  # forward: out = x + after(z)
            dz = s.dz
            self.after.backward(dz, dx, a.z, a.r_z, False)
        if not (below or self.gate_up.is_trained()):  # forward: z = h w_downᵀ
            self.activation.forward(s.h, a.gate_up)
            self.down.backward(None, dz, s.h, a.u_down, s, run)
            return
        # forward: z = h w_downᵀ, h = act(gate_up); s.h has the place of s.dh, and the activation's backward fills it
        self.down.inner_gradient(dz, a.u_down, s, run)
        self.down.input_gradient(s.dh, dz, a.u_down, s, run)
        self.activation.backward(s.dgate_up, s.dh, a.gate_up)
        self.down.weight_gradients(dz, s.h, a.u_down, s, run)
        # forward: gate_up = n [w_gate w_up]ᵀ, n = norm(x)
        self.norm.forward(s.n, a.r, a.x)
        self.gate_up.backward(s.dn if below else None, s.dgate_up, s.n, a.u_gate_up, s, run)
        if below:
            self.norm.backward(dx, s.dn, a.x, a.r, True)

    def decode(self, x: np.ndarray, s: Decoding, kept: KeysAndValues | None, run: Run, chunks: Sequence[Chunk]) -> None:
        """Turn x (rows, C) into out in place."""
        for rows, few in chunks:
            self.norm.forward(s.n[few], s.r[few], x[rows])
            self.gate_up.decode(s.gate_up[few], s.n[few], run)
            self.activation.forward(s.h[few], s.gate_up[few])
            if self.after is None:
                self.down.decode(x[rows], s.h[few], run, addend=x[rows])
                continue
            self.down.decode(s.z[few], s.h[few], run)
            self.after.forward(s.z[few], s.r_z[few], s.z[few])
            by_numpy(np.add, x[rows], s.z[few], out=x[rows])
