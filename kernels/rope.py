"""RoPE: turn each pair of a head's numbers by an angle that grows with the token's position.

    table      angle[t, j] = t theta^(-2j/D)         c = cos(angle)   s = sin(angle)        j = 0 .. D/2 - 1
    forward    y_j = x_j c_j - x_{j+D/2} s_j         y_{j+D/2} = x_{j+D/2} c_j + x_j s_j
    backward   dx_j = dy_j c_j + dy_{j+D/2} s_j      dx_{j+D/2} = dy_{j+D/2} c_j - dy_j s_j

    x dx (N, W): the first heads*D columns of a row are `heads` heads, the others are left alone
    cos sin (length, D/2)   positions (N,) int32, each in [0, length)   N = B*T      saved for backward: nothing
    x and dx are changed in place.

A rotation is an orthogonal matrix, so its backward pass is the rotation by the opposite angle.  The pairs are
(j, j + D/2), "rotate-half", as in Hugging Face's Llama; GGUF's pairs (2j, 2j + 1) are a matter of the file format.
Source: Su et al., "RoFormer: Enhanced Transformer with Rotary Position Embedding" (2021), equation 34.
"""

import numpy as np

from .engine.checks import checked
from .engine.halves import as_element
from .engine.jit import helper, kernel, prange

__all__ = [
    "rope_backward",
    "rope_backward_ref",
    "rope_forward",
    "rope_forward_ref",
    "rope_forward_rounded",
    "rope_table",
]


def rope_table(length, head_dim, theta, dtype=np.float32):
    """Return cos and sin, each (length, head_dim/2) of `dtype`, of the angles in float64; head_dim is even."""
    frequencies = float(theta) ** (-np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)  # (D/2,)
    angles = np.arange(length, dtype=np.float64)[:, None] * frequencies  # (length, D/2)
    return np.cos(angles).astype(dtype), np.sin(angles).astype(dtype)


# -- reference: plain NumPy, any float dtype ---------------------------------------------------
def rope_forward_ref(x, cos, sin, positions, heads):
    """Return y (N, W): the first heads*D columns of x (N, W) rotated, the others copied."""
    half = cos.shape[1]
    y = x.copy()
    pairs = x[:, : heads * 2 * half].reshape(-1, heads, 2, half)  # (N, heads, 2, D/2)
    turned = y[:, : heads * 2 * half].reshape(-1, heads, 2, half)
    c, s = cos[positions][:, None], sin[positions][:, None]  # (N, 1, D/2)
    turned[:, :, 0] = pairs[:, :, 0] * c - pairs[:, :, 1] * s
    turned[:, :, 1] = pairs[:, :, 1] * c + pairs[:, :, 0] * s
    y[:, : heads * 2 * half] = turned.reshape(len(x), -1)  # reshape copies where W > heads*D
    return y


def rope_backward_ref(dy, cos, sin, positions, heads):
    """Return dx (N, W) for dy (N, W): the rotation by the opposite angle."""
    return rope_forward_ref(dy, cos, -sin, positions, heads)


# -- kernels: Numba, float32, outputs first ----------------------------------------------------
@helper
def _rotate(row, cos, sin, heads, sign):
    """Rotate the heads of one row in place, by the angle (sign 1) or back (-1)."""
    half = cos.size
    for h in range(heads):
        pair = row[h * 2 * half : (h + 1) * 2 * half]
        for j in range(half):
            a = pair[j]
            b = pair[half + j]
            s = sign * sin[j]
            pair[j] = a * cos[j] - b * s
            pair[half + j] = b * cos[j] + a * s


@checked("x! (N, W); cos sin (T, D/2); positions (N) int < T; W >= heads D")
@kernel
def rope_forward(x, cos, sin, positions, heads):
    """Rotate the first heads*D columns of each row of x (N, W) in place."""
    for n in prange(x.shape[0]):
        t = positions[n]
        _rotate(x[n], cos[t], sin[t], heads, np.float32(1))


@checked("y! (N, W) uint16; x! (N, W); cos sin (T, D/2); positions (N) int < T; W >= heads D")
@kernel
def rope_forward_rounded(y, x, cos, sin, positions, heads):
    """Do that, and write x rounded to bfloat16 to y (N, W) uint16: what attention reads and backward keeps."""
    for n in prange(x.shape[0]):
        if heads > 0:  # else it is only rounded, and there may be no table
            t = positions[n]
            _rotate(x[n], cos[t], sin[t], heads, np.float32(1))
        for j in range(x.shape[1]):
            y[n, j] = as_element(y, x[n, j])


@checked("dx! (N, W); cos sin (T, D/2); positions (N) int < T; W >= heads D")
@kernel
def rope_backward(dx, cos, sin, positions, heads):
    """Turn the first heads*D columns of each row of dx (N, W), which hold dy, back in place."""
    for n in prange(dx.shape[0]):
        t = positions[n]
        _rotate(dx[n], cos[t], sin[t], heads, np.float32(-1))
