"""SwiGLU: the gate of the Llama MLP, silu(gate) times up; of an expert's rows, times the weight of each row.

    forward    s_i = 1 / (1 + exp(-a_i))             h_i  = a_i s_i b_i                     a = gate, b = up
    backward   db_i = dh_i a_i s_i                   da_i = dh_i b_i s_i (1 + a_i (1 - s_i))

    h dh (N, F)   gate_up dgate_up (N, 2F): gate is [:, :F], up is [:, F:]   N = B*T      saved for backward: gate_up
    h and dgate_up are overwritten; backward leaves h where dh was.  What is saved may be rounded to bfloat16 (as
    uint16); forward then computes h from the rounded numbers, so that backward sees the function that forward computed.

A row n of an expert has the weight g_n that the router gives it (`router.py`):

    forward    h_n = g_n swiglu(gate_up_n)
    backward   dg_n = dh_n · swiglu(gate_up_n)       dgate_up from g_n dh_n as above

Where da comes from: ds/da = s (1 - s), so d(a s)/da = s + a s (1 - s) = s (1 + a (1 - s)).
s is computed again in backward: one exponential costs less than storing and reading (N, F) more numbers.
Source: Shazeer, "GLU Variants Improve Transformer" (2020), equation 6, with beta = 1.
"""

import numpy as np

from .engine.checks import Array, checked
from .engine.halves import as_element, as_float
from .engine.jit import helper, kernel, prange
from .engine.vectors import dot, exp

__all__ = [
    "swiglu_backward",
    "swiglu_backward_ref",
    "swiglu_forward",
    "swiglu_forward_ref",
    "swiglu_forward_rounded",
    "weighted_swiglu_backward",
    "weighted_swiglu_backward_ref",
    "weighted_swiglu_forward",
    "weighted_swiglu_forward_ref",
    "weighted_swiglu_forward_rounded",
]


# -- reference: plain NumPy, any float dtype ---------------------------------------------------
def _sigmoid(a):
    e = np.exp(-np.abs(a))  # never overflows
    return np.where(a < 0, e, 1) / (1 + e)


def swiglu_forward_ref(gate_up: Array) -> Array:
    """Return h (N, F) for gate_up (N, 2F)."""
    a, b = np.split(gate_up, 2, axis=1)  # (N, F) each
    return a * _sigmoid(a) * b


def swiglu_backward_ref(dh: Array, gate_up: Array) -> Array:
    """Return dgate_up (N, 2F) for dh (N, F) and what forward saved."""
    a, b = np.split(gate_up, 2, axis=1)  # (N, F) each
    s = _sigmoid(a)
    return np.concatenate((dh * b * s * (1 + a * (1 - s)), dh * a * s), axis=1)


def weighted_swiglu_forward_ref(gate_up: Array, weights: Array) -> Array:
    """Return h (S, F) = g silu(gate) up."""
    return weights[:, None] * swiglu_forward_ref(gate_up)


def weighted_swiglu_backward_ref(dh: Array, gate_up: Array, weights: Array) -> tuple[Array, Array]:
    """Return dgate_up (S, 2F) and dg (S,)."""
    return swiglu_backward_ref(weights[:, None] * dh, gate_up), (dh * swiglu_forward_ref(gate_up)).sum(1)


# -- kernels: Numba, float32, outputs first ----------------------------------------------------
@helper
def _gated(h, gate_up):
    """Overwrite one row h (F,) from gate_up (2F,)."""
    F = h.size
    one = np.float32(1)
    for j in range(F):
        a = as_float(gate_up[j])
        s = one / (one + exp(-a))
        h[j] = a * s * as_float(gate_up[F + j])


@helper
def _times(h, weight):
    """Multiply a row."""
    for j in range(h.size):
        h[j] *= weight


@checked("h! (N, F); gate_up (N, 2 F) float32|uint16")
@kernel
def swiglu_forward(h: Array, gate_up: Array) -> None:
    """Overwrite h (N, F) from gate_up (N, 2F), float32 or bfloat16."""
    for n in prange(h.shape[0]):
        _gated(h[n], gate_up[n])


@checked("h! (N, F); saved! (N, 2 F) uint16; gate_up (N, 2 F)")
@kernel
def swiglu_forward_rounded(h: Array, saved: Array, gate_up: Array) -> None:
    """Overwrite saved (N, 2F) uint16 with gate_up (N, 2F) rounded to bfloat16, and h (N, F) from that."""
    for n in prange(h.shape[0]):
        for j in range(gate_up.shape[1]):
            saved[n, j] = as_element(saved, gate_up[n, j])
        _gated(h[n], saved[n])


@checked("dgate_up! (N, 2 F); dh! (N, F); gate_up (N, 2 F) float32|uint16")
@kernel
def swiglu_backward(dgate_up: Array, dh: Array, gate_up: Array) -> None:
    """Overwrite dgate_up (N, 2F) from dh (N, F) and gate_up (N, 2F), float32 or bfloat16; then turn dh into h.

    The product after it reads h, whose exponential is the one that is computed here; h has the bits of forward's.
    """
    N, F = dh.shape
    one = np.float32(1)
    for n in prange(N):
        for j in range(F):
            a, b = as_float(gate_up[n, j]), as_float(gate_up[n, F + j])
            s = one / (one + exp(-a))
            d = dh[n, j] * s
            dgate_up[n, j] = d * b * (one + a * (one - s))  # forward: h = a s b
            dgate_up[n, F + j] = d * a
            dh[n, j] = a * s * b


# -- kernels: the rows of experts --------------------------------------------------------------


@checked("h! (S, F); gate_up (S, 2 F) float32|uint16; weights (S)")
@kernel
def weighted_swiglu_forward(h: Array, gate_up: Array, weights: Array) -> None:
    """Overwrite h (S, F) from gate_up (S, 2F), float32 or bfloat16, and the gates (S,)."""
    for s in prange(h.shape[0]):
        _gated(h[s], gate_up[s])
        _times(h[s], weights[s])


@checked("h! (S, F); saved! (S, 2 F) uint16; gate_up (S, 2 F); weights (S)")
@kernel
def weighted_swiglu_forward_rounded(h: Array, saved: Array, gate_up: Array, weights: Array) -> None:
    """Overwrite saved (S, 2F) uint16 with gate_up (S, 2F) rounded to bfloat16, and h (S, F) from that."""
    for s in prange(h.shape[0]):
        for j in range(gate_up.shape[1]):
            saved[s, j] = as_element(saved, gate_up[s, j])
        _gated(h[s], saved[s])
        _times(h[s], weights[s])


@checked("dgate_up! (S, 2 F); dweights! (S); dh! (S, F); gate_up (S, 2 F) float32|uint16; weights (S)")
@kernel
def weighted_swiglu_backward(dgate_up: Array, dweights: Array, dh: Array, gate_up: Array, weights: Array) -> None:
    """Overwrite dgate_up (S, 2F) and dweights (S,) from dh (S, F) and what forward read; then turn dh into h."""
    S, F = dh.shape
    one = np.float32(1)
    for row in prange(S):
        n, weight = np.int64(row), weights[row]
        for j in range(F):  # forward: h = g a s b
            a, b = as_float(gate_up[n, j]), as_float(gate_up[n, F + j])
            sigmoid = one / (one + exp(-a))
            d = dh[n, j] * sigmoid
            dgate_up[n, j] = weight * (d * b * (one + a * (one - sigmoid)))
            dgate_up[n, F + j] = d * a
            dh[n, j] = weight * (a * sigmoid * b)
        dweights[n] = dot(dgate_up[n, F:], gate_up[n, F:])
        for j in range(F):
            dgate_up[n, F + j] *= weight
