"""GELU: an activation that weighs u by how likely a standard normal number is below it; also as a gate.

    exact      Phi(u) = (1 + erf(u / sqrt 2)) / 2                        gelu(u)  = u Phi(u)
               phi(u) = exp(-u^2 / 2) / sqrt(2 pi)                       gelu'(u) = Phi(u) + u phi(u)
    by a tanh  z = sqrt(2 / pi) (u + k u^3), k = 0.044715                gelu(u)  = u (1 + tanh z) / 2 = u s
               s = 1 / (1 + exp(-2 z)), dz = sqrt(2 / pi) (1 + 3 k u^2)  gelu'(u) = s + u s (1 - s) 2 dz

    forward    h_i = gelu(u_i)          or, with a gate a and up b,   h_i  = gelu(a_i) b_i
    backward   du_i = dh_i gelu'(u_i)                                 da_i = dh_i b_i gelu'(a_i)   db_i = dh_i gelu(a_i)

    h dh (N, F)   u du (N, F), or (N, 2F) with gate in [:, :F] and up in [:, F:]   N = B*T      saved for backward: u
    h and du are overwritten; backward leaves h where dh was.  What is saved may be rounded to bfloat16 (as uint16);
    forward then computes h from the rounded numbers, so that backward sees the function that forward computed.

Where gelu' comes from: the product rule, with Phi' = phi, and ds/dz = 2 s (1 - s).
The kernel's Phi is a polynomial times exp(-u^2 / 2), which phi needs as well: 1 - Phi(u) = exp(-u^2 / 2) p(t) / 2 for
u >= 0, t = 1 / (1 + 0.3275911 u / sqrt 2), with an error below 1e-7 (Abramowitz and Stegun 1964, formula 7.1.26; it is
that of PyTorch's vectors as well).  The reference has erf and tanh themselves.
Sources: Hendrycks and Gimpel, "Gaussian Error Linear Units" (2016), section 2; with a gate: Shazeer, "GLU Variants
Improve Transformer" (2020), equation 6.  Transformers calls them `gelu`, and `gelu_new` or `gelu_pytorch_tanh`.
"""

import math

import numpy as np

from .engine.checks import Array, checked
from .engine.halves import as_element, as_float
from .engine.jit import helper, kernel, prange
from .engine.vectors import exp, fma

__all__ = ["gelu_backward", "gelu_backward_ref", "gelu_forward", "gelu_forward_ref", "gelu_forward_rounded"]

CUBIC = 0.044715
ROOT = math.sqrt(2 / math.pi)


# -- reference: plain NumPy, any float dtype ---------------------------------------------------
def _gelu_ref(u, exact):
    """Return gelu(u) and gelu'(u)."""
    if exact:
        phi = np.exp(-u * u / 2) / math.sqrt(2 * math.pi)
        below = np.frompyfunc(math.erfc, 1, 1)(-u / math.sqrt(2)).astype(u.dtype) / 2  # Phi
        return u * below, below + u * phi
    t = np.tanh(ROOT * (u + CUBIC * u**3))
    return u * (1 + t) / 2, (1 + t) / 2 + u * (1 - t * t) / 2 * ROOT * (1 + 3 * CUBIC * u * u)


def gelu_forward_ref(u: Array, exact: bool, gated: bool) -> Array:
    """Return h (N, F) for u (N, F), or (N, 2F) if `gated`."""
    a, b = np.split(u, 2, axis=1) if gated else (u, 1)
    return _gelu_ref(a, exact)[0] * b


def gelu_backward_ref(dh: Array, u: Array, exact: bool, gated: bool) -> Array:
    """Return du, of the shape of u, for dh (N, F) and what forward saved."""
    a, b = np.split(u, 2, axis=1) if gated else (u, 1)
    value, slope = _gelu_ref(a, exact)
    da = dh * b * slope
    return np.concatenate((da, dh * value), axis=1) if gated else da


# -- kernels: Numba, float32, outputs first ----------------------------------------------------
_CUBIC, _LARGE = np.float32(CUBIC), np.float32(1e4)  # from |u| = 100 on s is 0 or 1 in any case, and u^2 may overflow
_ROOT_TWICE, _DZ_TWICE = np.float32(2 * ROOT), np.float32(6 * ROOT * CUBIC)  # 2 z = u (.. + ..), 2 dz = .. + .. u^2
_P, _HALF_ROOT = np.float32(0.3275911 / math.sqrt(2)), np.float32(1 / math.sqrt(2 * math.pi))
_A = [0.254829592, -0.284496736, 1.421413741, -1.453152027, 1.061405429]  # Abramowitz and Stegun 7.1.26
_A1, _A2, _A3, _A4, _A5 = (np.float32(a / 2) for a in _A)


@helper
def _by_tanh(u):
    """Return the factor of u in gelu(u), and gelu'(u)."""
    one, u2 = np.float32(1), u * u
    u2 = _LARGE if u2 > _LARGE else u2
    s = one / (one + exp(-u * _ROOT_TWICE * fma(_CUBIC, u2, one)))
    return s, s + u * s * (one - s) * fma(_DZ_TWICE, u2, _ROOT_TWICE)


@helper
def _exact(u):
    """Return the same without tanh: Phi(u), and gelu'(u)."""
    one, e = np.float32(1), exp(np.float32(-0.5) * u * u)
    t = one / fma(_P, abs(u), one)
    tail = t * fma(t, fma(t, fma(t, fma(t, _A5, _A4), _A3), _A2), _A1) * e
    below = tail if u < np.float32(0) else one - tail
    return below, below + u * e * _HALF_ROOT


@helper
def _activated(h, u, exact):
    """Overwrite one row h (F,) from u (F,) or (2F,)."""
    F = h.size
    if exact:
        for j in range(F):
            a = as_float(u[j])
            h[j] = a * _exact(a)[0]
    else:
        for j in range(F):
            a = as_float(u[j])
            h[j] = a * _by_tanh(a)[0]
    if u.size > F:
        for j in range(F):
            h[j] *= as_float(u[F + j])


def _gated_or_not(sizes, **_):
    if sizes["F"] and sizes["parts"] > 2:
        raise ValueError(f"u has {sizes['parts']} numbers for each of h; it takes one, or two of which one is a gate")


@checked("h! (N, F); u (N, W) float32|uint16; W = parts F", _gated_or_not)
@kernel
def gelu_forward(h: Array, u: Array, exact: bool) -> None:
    """Overwrite h (N, F) from u (N, F), or gate and up (N, 2F), float32 or bfloat16."""
    for n in prange(h.shape[0]):
        _activated(h[n], u[n], exact)


@checked("h! (N, F); saved! (N, W) uint16; u (N, W); W = parts F", _gated_or_not)
@kernel
def gelu_forward_rounded(h: Array, saved: Array, u: Array, exact: bool) -> None:
    """Overwrite saved, uint16 of the shape of u, with u rounded to bfloat16, and h (N, F) from that."""
    for n in prange(h.shape[0]):
        for j in range(u.shape[1]):
            saved[n, j] = as_element(saved, u[n, j])
        _activated(h[n], saved[n], exact)


@helper
def _backward(du, dh, u, exact):
    """Overwrite one row du with dh gelu'(u), and dh (F,) with gelu(u)."""
    if exact:
        for j in range(dh.size):
            a = as_float(u[j])
            below, slope = _exact(a)
            du[j] = dh[j] * slope  # forward: h = gelu(u)
            dh[j] = a * below
    else:
        for j in range(dh.size):
            a = as_float(u[j])
            s, slope = _by_tanh(a)
            du[j] = dh[j] * slope
            dh[j] = a * s


@checked("du! (N, W); dh! (N, F); u (N, W) float32|uint16; W = parts F", _gated_or_not)
@kernel
def gelu_backward(du: Array, dh: Array, u: Array, exact: bool) -> None:
    """Overwrite du from dh (N, F) and u, float32 or bfloat16, of the shape of du; then turn dh into h.

    The product after it reads h, whose exponential is the one that is computed here; h has the bits of forward's.
    """
    N, F = dh.shape
    for n in prange(N):
        if u.shape[1] == F:
            _backward(du[n], dh[n], u[n], exact)
        else:
            up = du[n, F:]
            for j in range(F):
                up[j] = dh[n, j]
            _backward(du[n, :F], dh[n], u[n, :F], exact)
            for j in range(F):  # forward: h = gelu(a) b
                b, value = as_float(u[n, F + j]), dh[n, j]
                du[n, j] *= b
                up[j] *= value
                dh[n, j] = value * b
