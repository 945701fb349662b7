"""RMSNorm: bring each row of x to unit root-mean-square, then scale by a learned weight.

    forward    r = (mean_i x_i^2 + eps)^(-1/2)       y_i  = x_i r w_i
    backward   n_i = x_i r     g_i = dy_i w_i        dx_i = r (g_i - n_i mean_j g_j n_j)
                                                     dw_i = sum_rows dy_i n_i

    x y dx dy (N, C)   w dw (C,)   r (N,)   N = B*T      saved for backward: x w r
    dx is overwritten, or added to if `accumulate` (the residual branch has put its share there); dw is accumulated.
    y may be x, and dx may be dy.

A row may consist of heads, each of which is normed for itself with the one weight (queries and keys): x (N, H C) and
r (N H,), the numbers of a row side by side.  The kernels find H by the width of w; it is 1 for a norm of whole rows.

Where dx comes from: y_i = n_i w_i, so dL/dn_i = g_i.  With n_i = x_i r and dr/dx_i = -r^3 x_i / C,
dx_i = g_i r + (sum_j g_j x_j) dr/dx_i = r (g_i - n_i (sum_j g_j n_j) / C).
Source: Zhang and Sennrich, "Root Mean Square Layer Normalization" (2019), equation 4, with eps inside the root as in
Llama.
"""

import math

import numpy as np

from .engine.checks import Array, checked
from .engine.jit import helper, kernel, prange
from .engine.shares import add_partial_sums, partial_sums
from .engine.vectors import dot3, sum_of_squares

__all__ = [
    "rms_norm_backward",
    "rms_norm_backward_ref",
    "rms_norm_forward",
    "rms_norm_forward_ref",
    "rms_norm_in_place",
]


# -- reference: plain NumPy, any float dtype ---------------------------------------------------
def rms_norm_forward_ref(x: Array, w: Array, eps: float) -> tuple[Array, Array]:
    """Return y (N, C) and r (N,) for x (N, C) and w (C,)."""
    r = 1 / np.sqrt((x * x).mean(-1) + x.dtype.type(eps))  # (N,)
    return x * r[:, None] * w, r


def rms_norm_backward_ref(dy: Array, x: Array, w: Array, r: Array) -> tuple[Array, Array]:
    """Return dx (N, C) and dw (C,) for dy (N, C) and what forward saved."""
    n = x * r[:, None]  # (N, C)
    g = dy * w  # (N, C)
    dx = r[:, None] * (g - n * (g * n).mean(-1, keepdims=True))
    return dx, (dy * n).sum(0)


# -- kernels: Numba, float32, outputs first ----------------------------------------------------
@helper
def _norm(y, x, w, eps):
    """Write y (C,) from x (C,) and return 1 / rms."""
    r = np.float32(1.0 / math.sqrt(sum_of_squares(x) / x.size + eps))
    for j in range(x.size):
        y[j] = x[j] * r * w[j]
    return r


@checked("y! x (N, H C); r! (N H); w (C)")
@kernel
def rms_norm_forward(y: Array, r: Array, x: Array, w: Array, eps: float) -> None:
    """Overwrite y (N, H C) and r (N H,) from x (N, H C) and w (C,); the sum of squares runs in float64."""
    N, C = x.shape[0], w.size
    heads = x.shape[1] // C
    for n in prange(N):
        for h in range(heads):
            head = slice(h * C, (h + 1) * C)
            r[n * heads + h] = _norm(y[n, head], x[n, head], w, eps)


@checked("x! kept! (N, H C); r! (N H); w (C)")
@kernel
def rms_norm_in_place(x: Array, kept: Array, r: Array, w: Array, eps: float) -> None:
    """Do that to x itself, and write to kept (N, H C) what it was: what backward reads."""
    N, C = x.shape[0], w.size
    heads = x.shape[1] // C
    for n in prange(N):
        for j in range(x.shape[1]):  # `kept[n] = x[n]` would compile an error message as well, for two seconds
            kept[n, j] = x[n, j]
        for h in range(heads):
            head = slice(h * C, (h + 1) * C)
            r[n * heads + h] = _norm(x[n, head], kept[n, head], w, eps)


@checked("dx! dy x (N, H C); dw! w (C); r (N H)")
@kernel
def rms_norm_backward(dx: Array, dw: Array, dy: Array, x: Array, w: Array, r: Array, accumulate: bool) -> None:
    """Overwrite dx (N, H C), or add to it where `accumulate` is true, and add to dw (C,); one pass over dy and x."""
    N, C = x.shape[0], w.size
    heads = x.shape[1] // C
    parts = partial_sums(N)
    partial = np.empty((parts, C), np.float32)
    for p in prange(parts):
        part = np.int64(p)
        for j in range(C):
            partial[part, j] = 0
        for n in range(N * part // parts, N * (part + 1) // parts):
            for h in range(heads):
                head = slice(h * C, (h + 1) * C)
                xh, dyh, dxh, rh = x[n, head], dy[n, head], dx[n, head], r[n * heads + h]
                mean = dot3(dyh, w, xh) * rh / np.float32(C)  # mean_j g_j n_j
                if accumulate:
                    for j in range(C):
                        normed, g = xh[j] * rh, dyh[j]
                        dxh[j] += rh * (g * w[j] - normed * mean)  # forward: y = x r w, and r depends on x
                        partial[part, j] += g * normed
                else:
                    for j in range(C):
                        normed, g = xh[j] * rh, dyh[j]  # g before dx, which may be in its place
                        dxh[j] = rh * (g * w[j] - normed * mean)
                        partial[part, j] += g * normed
    add_partial_sums(dw, partial)
