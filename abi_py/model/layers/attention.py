"""The attention branch: out = x + attention(norm(x)) w_oᵀ, on q k v = norm(x) [w_q w_k w_v]ᵀ with q and k rotated.

A family may choose more: norms of the heads of q and k before they are rotated, a window of keys, another scale of the
scores, other angles, a norm after w_o.  Each is an option of a layer, so blocks may differ.

What is cheap to compute again (the normed rows) is not saved.  In bfloat16, q k v is saved rounded, and attention reads
it rounded, in forward and in backward; what the norms of q and k read is saved as it is.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from ...kernels.engine.number_formats import AnyFormat
from ...kernels.engine.replay import by_numpy
from ...kernels.unchecked import (
    attention_backward,
    attention_forward,
    cache_append,
    cached_attention_forward,
    rope_backward,
    rope_forward,
    rope_forward_rounded,
)
from ...parameters import INITIAL_STD, TensorSpec
from .. import reference
from .layer import Branch
from .linear import Linear, Projection, adapter_scratch
from .norm import Norm, RmsNorm
from .run import Angles, Chunk, Entry, Form, KeysAndValues, Run

__all__ = ["Attention"]

NO_ANGLES = np.zeros((1, 1), np.float32)  # a table that is not read: no head is rotated


class Attention(Branch):
    """Causal attention of `heads` query heads over `kv_heads` key/value heads of width `head_dim`."""

    @dataclass
    class Saved:
        """What forward keeps, for N rows."""

        x: np.ndarray  # (N, C): input of the branch
        r: np.ndarray  # (N,): 1 / rms of x
        qkv: np.ndarray  # (N, (H + 2 G) D), after RoPE
        raw: np.ndarray  # (N, (H + G) D): q and k before their norms
        r_q: np.ndarray  # (N H,): of these norms
        r_k: np.ndarray  # (N G,)
        att: np.ndarray  # (N, H D): attention output, before w_o
        lse: np.ndarray  # (H, N): log-sum-exp of each query and head
        z: np.ndarray  # (N, C): att w_oᵀ before its norm
        r_z: np.ndarray  # (N,): of that norm
        u_qkv: np.ndarray  # (R of q, k and v, N): inner values of the adapters
        u_o: np.ndarray  # (R, N)
        q: np.ndarray  # (N, H D): columns of qkv
        k: np.ndarray  # (N, G D)
        v: np.ndarray  # (N, G D)
        raw_q: np.ndarray  # (N, H D): columns of raw
        raw_k: np.ndarray  # (N, G D)

    @dataclass
    class Scratch:
        """Arrays between two operations, for N rows."""

        n: np.ndarray  # (N, C): normed rows
        dn: np.ndarray  # (N, C)
        qkv: np.ndarray  # (N, (H + 2 G) D): before it is rounded, in bfloat16
        dqkv: np.ndarray  # (N, (H + 2 G) D)
        dz: np.ndarray  # (N, C)
        datt: np.ndarray  # (N, H D)
        du: np.ndarray  # flat, as `AdapterScratch` has it
        dropped: np.ndarray
        dq: np.ndarray  # (N, H D): columns of dqkv
        dk: np.ndarray  # (N, G D)
        dv: np.ndarray  # (N, G D)

    @dataclass
    class Decoding:
        """Arrays of generation for N rows; n and r for those of a chunk."""

        n: np.ndarray  # (rows, C)
        r: np.ndarray  # (rows,)
        qkv: np.ndarray  # (N, (H + 2 G) D)
        r_q: np.ndarray  # (N H,)
        r_k: np.ndarray  # (N G,)
        att: np.ndarray  # (N, H D)
        z: np.ndarray  # (N, C)
        r_z: np.ndarray  # (N,)
        q: np.ndarray  # (N, H D): columns of qkv
        k: np.ndarray  # (N, G D)
        v: np.ndarray  # (N, G D)

    only_kernels = True
    reference = reference.attention_forward, reference.attention_backward

    def __init__(
        self,
        at: str,
        block: int,
        width: int,
        heads: int,
        kv_heads: int,
        head_dim: int,
        norm: Norm,
        angles: Angles | None,
        qkv_bias: bool = False,
        *,
        fused: bool = False,
        o_bias: bool = False,
        qk_norm: tuple[RmsNorm, RmsNorm] | None = None,
        window: int | None = None,
        scale: float | None = None,
        after: Norm | None = None,
        out_std: float = INITIAL_STD,
    ) -> None:
        """Describe it.

        angles    RoPE's, or None where queries and keys are not rotated; layers may have tables of their own
        qkv_bias  biases on q, k and v
        fused     q, k and v are one matrix `w_qkv`, with one bias and one adapter
        o_bias    a bias on w_o
        qk_norm   of each head of q, and of each of k, before they are rotated; their width is head_dim
        window    keys that a query sees, its own among them; None: all before it
        scale     factor of the scores; None: 1 / sqrt(head_dim)
        after     a norm of what is added to x
        out_std   of the initial w_o
        """
        super().__init__(at, block)
        self.width, self.heads, self.kv_heads, self.head_dim = width, heads, kv_heads, head_dim
        self.norm, self.angles, self.qk_norm, self.after = norm, angles, qk_norm, after
        self.window, self.scale = window, scale
        self.inner_norms = (*(qk_norm or ()), *((after,) if after else ()))
        q, kv = heads * head_dim, kv_heads * head_dim
        parts = {"qkv": q + 2 * kv} if fused else {"q": q, "k": kv, "v": kv}
        projections = (Projection(f"w_{part}", size, f"b_{part}" * qkv_bias) for part, size in parts.items())
        self.qkv = Linear(width, *projections)
        self.o = Linear(q, Projection("w_o", width, "b_o" * o_bias, out_std))
        self.linears = self.qkv, self.o
        self.cuts = [q, q + kv]
        self.keys_and_values = kv_heads, head_dim

    # -- description -----------------------------------------------------------------------------

    def tensors(self) -> tuple[TensorSpec, ...]:
        """Return its tensors."""
        norms = (spec for norm in (self.norm, *self.inner_norms) for spec in norm.tensors())
        return (*self.qkv.tensors(), *self.o.tensors(), *norms)

    def pieces(self) -> tuple[object, ...]:
        """Return its linear layers, its norms and its angles."""
        return super().pieces() if self.angles is None else (*super().pieces(), self.angles)

    def kernels(self) -> set[str]:
        """Return those of its norms, biases and angles; rows of heads are another layout of what a norm takes."""
        found = super().kernels()
        if self.angles is not None:
            found |= {"rope_forward", "rope_backward"}
        if self.qk_norm:
            found |= {"rms_norm_in_place", "rms_norm_forward:heads", "rms_norm_backward:heads"}
        return found

    def saved(self) -> dict[str, Entry]:
        """Return what forward keeps."""
        return {
            "x": Entry(self.width),
            "r": Entry(1, Form.NUMBERS, again=True),
            "qkv": Entry(self.qkv.width, narrow=True, again=True),
            "raw": Entry(self.cuts[1] if self.qk_norm else 0, again=True),
            "r_q": Entry(self.heads if self.qk_norm else 0, Form.FLAT, again=True),
            "r_k": Entry(self.kv_heads if self.qk_norm else 0, Form.FLAT, again=True),
            "att": Entry(self.o.inputs, again=True),
            "lse": Entry(self.heads, Form.COLUMNS, again=True),
            "u_qkv": replace(self.qkv.saved(), again=True),
            "u_o": self.o.saved(),
            "z": Entry(self.width if self.after else 0),
            "r_z": Entry(1 if self.after else 0, Form.NUMBERS),
        }

    def scratch(self) -> dict[str, Entry]:
        """Return the arrays between operations: what forward rounds is float32 where, later, its gradient is."""
        return {
            "n": Entry(self.width),
            "dn": Entry(self.width, place="n"),
            "qkv": Entry(self.qkv.width, place="h"),
            "dqkv": Entry(self.qkv.width, place="h"),
            "dz": Entry(self.width if self.after else 0, place="h"),
            "datt": Entry(self.o.inputs, place="n"),
            **adapter_scratch(self.linears),
        }

    def decoding(self) -> dict[str, Entry]:
        """Return the arrays of generation."""
        return {
            "n": Entry(self.width, chunked=True),
            "r": Entry(1, Form.NUMBERS, chunked=True),
            "qkv": Entry(self.qkv.width),
            "r_q": Entry(self.heads if self.qk_norm else 0, Form.FLAT),
            "r_k": Entry(self.kv_heads if self.qk_norm else 0, Form.FLAT),
            "att": Entry(self.o.inputs),
            "z": Entry(self.width if self.after else 0),
            "r_z": Entry(1 if self.after else 0, Form.NUMBERS),
        }

    def parts(self, arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Return the columns of q, k and v in their common matrix, and those of q and k before their norms."""
        d = "d" if "dqkv" in arrays else ""
        views = dict(zip((d + "q", d + "k", d + "v"), np.split(arrays[d + "qkv"], self.cuts, axis=1), strict=True))
        if "raw" in arrays:
            views["raw_q"], views["raw_k"] = np.split(arrays["raw"], self.cuts[:1], axis=1)
        return views

    def flops(self, seq_len: int, below: bool) -> float:
        """Return those of the products, and of attention: a query sees (seq_len + 1) / 2 keys on average.

        With a window of w, (w + 1) / 2 on average for the first w, and w for the others.  For each query width and
        visible key two products in forward and four in backward.
        """
        further = below or self.qkv.is_trained()
        w = min(self.window or seq_len, seq_len)
        visible = (seq_len + 1) / 2 if w == seq_len else (w * (w + 1) / 2 + (seq_len - w) * w) / seq_len
        attention = (12.0 if further else 4.0) * self.o.inputs * visible
        return self.qkv.flops(below) + attention + self.o.flops(further)

    # -- passes ----------------------------------------------------------------------------------

    def _angles(self, run: Run, capacity: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray, int]:
        """Return cos, sin, the rows' places in them, and how many heads are rotated."""
        if self.angles is None:
            return NO_ANGLES, NO_ANGLES, run.positions, 0
        return *self.angles.of(run, capacity), self.heads + self.kv_heads

    def _options(self, run: Run) -> tuple[int, int, int, float | None, np.ndarray | None, AnyFormat]:
        """Return what attention takes after `starts`."""
        return run.batch, self.heads, self.kv_heads, self.scale, run.stop, run.attention_format

    def fill(self, a: Saved, s: Scratch, run: Run) -> None:
        """Compute a.r, a.qkv, a.att and a.lse from a.x."""
        self.norm.forward(s.n, a.r, a.x)
        qkv = s.qkv if run.narrow else a.qkv
        self.qkv.forward(qkv, s.n, a.u_qkv, s, run)
        if self.qk_norm:
            q, k, _ = np.split(qkv, self.cuts, axis=1)
            self.qk_norm[0].in_place(q, a.raw_q, a.r_q)
            self.qk_norm[1].in_place(k, a.raw_k, a.r_k)
        if run.narrow:
            rope_forward_rounded(a.qkv, qkv, *self._angles(run))
        elif self.angles is not None:
            rope_forward(qkv, *self._angles(run))
        attention_forward(a.att, a.lse, a.q, a.k, a.v, run.starts_within(self.window), *self._options(run))

    def forward(self, out: np.ndarray, a: Saved, s: Scratch, run: Run) -> None:
        """Write out (N, C) from a.x (N, C), and fill the other arrays of a."""
        self.fill(a, s, run)
        if self.after is None:
            self.o.forward(out, a.att, a.u_o, s, run, addend=a.x)
            return
        self.o.forward(a.z, a.att, a.u_o, s, run)
        self.after.forward(out, a.r_z, a.z)
        by_numpy(np.add, out, a.x, out=out)

    def backward(self, dx: np.ndarray, a: Saved, s: Scratch, run: Run, below: bool) -> None:
        """Turn dx (N, C) from the gradient of out into that of a.x, in place."""
        # forward: out = x + z, z = att w_oᵀ, or the norm of that
        dz = dx
        if self.after is not None:
            dz = s.dz
            self.after.backward(dz, dx, a.z, a.r_z, False)
        further = below or self.qkv.is_trained()
        self.o.backward(s.datt if further else None, dz, a.att, a.u_o, s, run)
        if not further:
            return
        # forward: att = attention(RoPE(q), RoPE(k), v)
        saved = a.q, a.k, a.v, a.att, a.lse, run.starts_within(self.window), *self._options(run)
        attention_backward(s.dq, s.dk, s.dv, s.datt, *saved)
        if self.angles is not None:
            rope_backward(s.dqkv, *self._angles(run))
        if self.qk_norm:  # forward: q = norm(raw_q), k = norm(raw_k)
            self.qk_norm[0].backward(s.dq, s.dq, a.raw_q, a.r_q, False)
            self.qk_norm[1].backward(s.dk, s.dk, a.raw_k, a.r_k, False)
        # forward: qkv = n [w_q w_k w_v]ᵀ, n = norm(x)
        self.norm.forward(s.n, a.r, a.x)
        self.qkv.backward(s.dn if below else None, s.dqkv, s.n, a.u_qkv, s, run)
        if below:
            self.norm.backward(dx, s.dn, a.x, a.r, True)

    def decode(self, x: np.ndarray, s: Decoding, kept: KeysAndValues | None, run: Run, chunks: Sequence[Chunk]) -> None:
        """Turn x (rows, C) into out in place; keys and values of the new rows are kept."""
        if kept is None or run.slots is None:
            raise RuntimeError("attention decodes over keys and values that a cache keeps")
        keys, values = kept
        for rows, few in chunks:
            self.norm.forward(s.n[few], s.r[few], x[rows])
            self.qkv.decode(s.qkv[rows], s.n[few], run)
        if self.qk_norm:
            self.qk_norm[0].forward(s.q, s.r_q, s.q)
            self.qk_norm[1].forward(s.k, s.r_k, s.k)
        if self.angles is not None:
            rope_forward(s.qkv, *self._angles(run, keys.shape[2]))
        cache_append(keys, values, s.k, s.v, run.slots, run.positions)
        cached_attention_forward(s.att, s.q, keys, values, run.slots, run.positions, self.window, self.scale)
        if self.after is None:
            self.o.decode(x, s.att, run, addend=x)
            return
        self.o.decode(s.z, s.att, run)
        self.after.forward(s.z, s.r_z, s.z)
        by_numpy(np.add, x, s.z, out=x)
