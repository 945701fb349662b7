"""LayerNorm: bring each row of x to mean 0 and variance 1, then scale and shift by learned vectors.

    forward    m = mean_i x_i     r = (mean_i (x_i - m)^2 + eps)^(-1/2)     n_i = (x_i - m) r     y_i = n_i w_i + b_i
    backward   g_i = dy_i w_i     dx_i = r (g_i - mean_j g_j - n_i mean_j g_j n_j)
                                  dw_i = sum_rows dy_i n_i     db_i = sum_rows dy_i

    x y dx dy (N, C)   w b dw db (C,)   r (N,)   N = B*T      saved for backward: x w r
    dx is overwritten, or added to if `accumulate` (the residual branch has put its share there); dw, db accumulate.

Where dx comes from: y_i = n_i w_i + b_i, so dL/dn_i = g_i.  With c_i = x_i - m and r = (mean c^2 + eps)^(-1/2),
dr/dc_i = -r^3 c_i / C, so dL/dc_i = g_i r + (sum_j g_j c_j) dr/dc_i = r (g_i - n_i mean_j g_j n_j).  And c is x less
its mean, so dx is dL/dc less its mean: that of g goes, and that of n is 0.  The mean m is computed again in backward,
which costs less than a second array of numbers for each row.
Source: Ba, Kiros and Hinton, "Layer Normalization" (2016), equation 4; eps inside the root as in PyTorch.
"""

import math

import numpy as np

from .engine.checks import Array, checked
from .engine.jit import helper, kernel, prange
from .engine.shares import add_partial_sums, partial_sums
from .engine.vectors import dot, dot3, sum_of_squares, wide_total

__all__ = ["layer_norm_backward", "layer_norm_backward_ref", "layer_norm_forward", "layer_norm_forward_ref"]


# -- reference: plain NumPy, any float dtype ---------------------------------------------------
def layer_norm_forward_ref(x: Array, w: Array, b: Array, eps: float) -> tuple[Array, Array]:
    """Return y (N, C) and r (N,) for x (N, C), w (C,) and b (C,)."""
    c = x - x.mean(-1, keepdims=True)  # (N, C)
    r = 1 / np.sqrt((c * c).mean(-1) + x.dtype.type(eps))  # (N,)
    return c * r[:, None] * w + b, r


def layer_norm_backward_ref(dy: Array, x: Array, w: Array, r: Array) -> tuple[Array, Array, Array]:
    """Return dx (N, C), dw (C,) and db (C,) for dy (N, C) and what forward saved."""
    n = (x - x.mean(-1, keepdims=True)) * r[:, None]  # (N, C)
    g = dy * w  # (N, C)
    dx = r[:, None] * (g - g.mean(-1, keepdims=True) - n * (g * n).mean(-1, keepdims=True))
    return dx, (dy * n).sum(0), dy.sum(0)


# -- kernels: Numba, float32, outputs first ----------------------------------------------------
@helper
def _normalize(to, x, m, r):
    """Overwrite one row `to` (C,) with (x - m) r; `to` may be x."""
    for j in range(x.size):
        to[j] = (x[j] - m) * r


@checked("y! x (N, C); r! (N); w b (C)")
@kernel
def layer_norm_forward(y: Array, r: Array, x: Array, w: Array, b: Array, eps: float) -> None:
    """Overwrite y (N, C) and r (N,) from x (N, C), w (C,) and b (C,).

    Mean and variance are float64, so the variance may be the mean of squares less the square of the mean.
    """
    N, C = x.shape
    for n in prange(N):
        m = wide_total(x[n]) / C
        variance = max(sum_of_squares(x[n]) / C - m * m, 0.0)  # NaN stays: it is the first of the two
        rn, mn = np.float32(1.0 / math.sqrt(variance + eps)), np.float32(m)
        r[n] = rn
        for j in range(C):
            y[n, j] = (x[n, j] - mn) * rn * w[j] + b[j]


@checked("dx! dy x (N, C); dw! db! w (C); r (N)")
@kernel
def layer_norm_backward(
    dx: Array, dw: Array, db: Array, dy: Array, x: Array, w: Array, r: Array, accumulate: bool
) -> None:
    """Overwrite dx (N, C), or add to it where `accumulate` is true, and add to dw (C,) and db (C,)."""
    N, C = x.shape
    parts = partial_sums(N)
    partial = np.empty((3, parts, C), np.float32)  # dw, db, and the normalised row at hand
    for p in prange(parts):
        part = np.int64(p)
        for j in range(C):
            partial[0, part, j] = 0
            partial[1, part, j] = 0
        normed = partial[2, part]
        for n in range(N * part // parts, N * (part + 1) // parts):
            rn = r[n]
            _normalize(normed, x[n], np.float32(wide_total(x[n]) / C), rn)
            mean = dot(dy[n], w) / np.float32(C)  # mean_j g_j
            along = dot3(dy[n], w, normed) / np.float32(C)  # mean_j g_j n_j
            if accumulate:
                for j in range(C):
                    # forward: y = n w + b, n = (x - m) r, and m and r depend on x
                    dx[n, j] += rn * (dy[n, j] * w[j] - mean - normed[j] * along)
                    partial[0, part, j] += dy[n, j] * normed[j]
                    partial[1, part, j] += dy[n, j]
            else:
                for j in range(C):
                    dx[n, j] = rn * (dy[n, j] * w[j] - mean - normed[j] * along)
                    partial[0, part, j] += dy[n, j] * normed[j]
                    partial[1, part, j] += dy[n, j]
    add_partial_sums(dw, partial[0])
    add_partial_sums(db, partial[1])
