"""RoPE: turn each pair of a head's numbers by an angle that grows with the token's position.

    table      angle[t, j] = t f_j        c = a cos(angle)   s = a sin(angle)               j = 0 .. D/2 - 1
    forward    y_j = x_j c_j - x_{j+D/2} s_j         y_{j+D/2} = x_{j+D/2} c_j + x_j s_j
    backward   dx_j = dy_j c_j + dy_{j+D/2} s_j      dx_{j+D/2} = dy_{j+D/2} c_j - dy_j s_j

    x dx (N, W): the first heads*D columns of a row are `heads` heads, the others are left alone
    cos sin (length, D/2)   positions (N,) int32, each in [0, length)   N = B*T      saved for backward: nothing
    x and dx are changed in place.

A rotation is an orthogonal matrix, so its backward pass is the rotation by the opposite angle, times a again.  The
pairs are (j, j + D/2), "rotate-half", as in Hugging Face's Llama; GGUF's pairs (2j, 2j + 1) are a matter of the file
format.  Source: Su et al., "RoFormer: Enhanced Transformer with Rotary Position Embedding" (2021), equation 34.

The frequencies are f_j = theta^(-2j/D), and a = 1.  A model that was trained on rows of m tokens reads longer ones with
other frequencies (`rope_frequencies`; names and defaults are those of transformers' modeling_rope_utils.py):

    linear    f_j / s                                                 every position comes s times closer
    dynamic   f_j of theta (s n/m - (s - 1))^(D/(D-2)), n > m         so that the slowest pair turns by m/n of its angle
    yarn      (1 - g_j) f_j + g_j f_j / s                             pairs that turn often stay as they are
              g_j = (j - low) / (high - low), cut to 0 .. 1           low, high: where a pair turns beta_fast and
                                                                      beta_slow times in m tokens
              a = 0.1 ln s + 1, or (0.1 mscale ln s + 1) / (0.1 mscale_all_dim ln s + 1)
    llama3    g_j f_j + (1 - g_j) f_j / s                             the same, by the number of turns itself
              g_j = (m f_j / (2 pi) - low_freq_factor) / (high_freq_factor - low_freq_factor), cut to 0 .. 1

A pair turns b times in m tokens where m f_j = 2 pi b, so j = D ln(m / (2 pi b)) / (2 ln theta).
Sources: linear: Chen et al. 2023, "Extending Context Window of Large Language Models via Positional Interpolation",
section 2.3; dynamic and yarn: Peng et al. 2023, "YaRN", sections 3.1 to 3.4 and appendix A; llama3: Meta's
models/llama3 (`apply_scaling`); the two mscales: DeepSeek-AI 2024, "DeepSeek-V2", section 3.1.4.
"""

import math
from typing import Any

import numpy as np
import numpy.typing as npt

from .engine.checks import Array, checked
from .engine.halves import as_element
from .engine.jit import helper, kernel, prange

__all__ = [
    "rope_angles",
    "rope_backward",
    "rope_backward_ref",
    "rope_forward",
    "rope_forward_ref",
    "rope_forward_rounded",
    "rope_frequencies",
    "rope_table",
]


def rope_frequencies(head_dim: int, theta: float, scaling: Any = None, length: int = 0) -> tuple[Array, float]:
    """Return f (D/2,) float64, and the factor a of cosines and sines.

    scaling   None, or rope_type and its numbers; `original` is m
    length    n, of the row that is read: dynamic depends on it
    """
    plain = float(theta) ** (-np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)  # (D/2,)
    if scaling is None:
        return plain, 1.0
    kind, s, m = scaling["rope_type"], scaling["factor"], scaling["original"]
    if kind == "linear":
        return plain / s, 1.0
    if kind == "dynamic":
        if length <= m:
            return plain, 1.0
        base = float(theta) * (s * length / m - (s - 1)) ** (head_dim / (head_dim - 2))
        return rope_frequencies(head_dim, base)
    if kind == "yarn":
        kept, a = 1 - _ramp(head_dim, theta, m, scaling), _attention_factor(s, scaling)
    else:
        low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
        kept, a = np.clip((m * plain / (2 * math.pi) - low) / (high - low), 0, 1), 1.0
    return kept * plain + (1 - kept) * plain / s, a


def _ramp(head_dim, theta, m, scaling):
    """Return YaRN's share of the slowed frequency in each pair, (D/2,)."""

    def pair(turns):
        return head_dim * math.log(m / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low, high = pair(scaling["beta_fast"]), pair(scaling["beta_slow"])
    if scaling["truncate"]:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)  # D - 1, not D/2 - 1, in transformers
    if low == high:
        high += 0.001
    return np.clip((np.arange(head_dim // 2) - low) / (high - low), 0, 1)


def _attention_factor(s, scaling):
    """Return YaRN's a."""

    def of(mscale):
        return 1.0 if s <= 1 else 0.1 * mscale * math.log(s) + 1

    if scaling["attention_factor"] is not None:
        return scaling["attention_factor"]
    if scaling["mscale"] and scaling["mscale_all_dim"]:
        return of(scaling["mscale"]) / of(scaling["mscale_all_dim"])
    return of(1)


def rope_angles(
    positions: Array, frequencies: Array, factor: float = 1.0, dtype: npt.DTypeLike = np.float32
) -> tuple[Array, Array]:
    """Return cos and sin, each (positions, D/2) of `dtype`, times factor; the angles are in float64."""
    angles = np.asarray(positions, np.float64)[:, None] * frequencies  # (positions, D/2)
    return (np.cos(angles) * factor).astype(dtype), (np.sin(angles) * factor).astype(dtype)


def rope_table(
    length: int, head_dim: int, theta: float, dtype: npt.DTypeLike = np.float32, scaling: Any = None
) -> tuple[Array, Array]:
    """Return cos and sin, each (length, head_dim/2) of `dtype`, of the positions 0 ... length - 1; head_dim is even."""
    return rope_angles(np.arange(length), *rope_frequencies(head_dim, theta, scaling, length), dtype)


# -- reference: plain NumPy, any float dtype ---------------------------------------------------
def rope_forward_ref(x: Array, cos: Array, sin: Array, positions: Array, heads: int) -> Array:
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


def rope_backward_ref(dy: Array, cos: Array, sin: Array, positions: Array, heads: int) -> Array:
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
def rope_forward(x: Array, cos: Array, sin: Array, positions: Array, heads: int) -> None:
    """Rotate the first heads*D columns of each row of x (N, W) in place."""
    for n in prange(x.shape[0]):
        t = positions[n]
        _rotate(x[n], cos[t], sin[t], heads, np.float32(1))


@checked("y! (N, W) uint16; x! (N, W); cos sin (T, D/2); positions (N) int < T; W >= heads D")
@kernel
def rope_forward_rounded(y: Array, x: Array, cos: Array, sin: Array, positions: Array, heads: int) -> None:
    """Do that, and write x rounded to bfloat16 to y (N, W) uint16: what attention reads and backward keeps."""
    for n in prange(x.shape[0]):
        if heads > 0:  # else it is only rounded, and there may be no table
            t = positions[n]
            _rotate(x[n], cos[t], sin[t], heads, np.float32(1))
        for j in range(x.shape[1]):
            y[n, j] = as_element(y, x[n, j])


@checked("dx! (N, W); cos sin (T, D/2); positions (N) int < T; W >= heads D")
@kernel
def rope_backward(dx: Array, cos: Array, sin: Array, positions: Array, heads: int) -> None:
    """Turn the first heads*D columns of each row of dx (N, W), which hold dy, back in place."""
    for n in prange(dx.shape[0]):
        t = positions[n]
        _rotate(dx[n], cos[t], sin[t], heads, np.float32(-1))
