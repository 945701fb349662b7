"""Dropout: set a random share of x to zero and scale up what is left.

    mask       k_ij = 1 if hash(seed, i, j) >= rate 2^32, else 0
    forward    y_ij  = x_ij k_ij / (1 - rate)
    backward   dx_ij = dy_ij k_ij / (1 - rate)

    x y dx dy (N, C)   rate in [0, 1)   seed a non-negative integer below 2^63      saved for backward: nothing
    y and dx are overwritten; y may be x, and dx may be dy.

The mask is a function of the seed and of the element's row and column, not of a stream of numbers: backward computes
it again, and every number of threads gives the same bits.  A call needs a seed of its own.  A NaN that is dropped
stays NaN (it is multiplied by zero), so that dropout never hides a broken activation.
Source: Srivastava et al., "Dropout" (2014), in the scaled form; the row key is splitmix64 (Steele, Lea and Flood,
2014), the hash inside a row has the constants of lowbias32 (Wellons, "Prospecting for Hash Functions", 2018), keyed
between its two rounds.
"""

import numpy as np

from .engine.checks import Array, checked
from .engine.jit import JIT, helper, kernel, prange

__all__ = ["dropout_backward", "dropout_backward_ref", "dropout_forward", "dropout_forward_ref", "dropout_mask_ref"]

GOLDEN = np.uint64(0x9E3779B97F4A7C15)  # 2^64 divided by the golden ratio
MIX_1, MIX_2 = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)  # the multipliers of splitmix64
LOW_1, LOW_2 = np.uint32(0x7FEB352D), np.uint32(0x846CA68B)  # the multipliers of lowbias32
S15, S16 = np.uint32(15), np.uint32(16)
S27, S30, S31, S32 = np.uint64(27), np.uint64(30), np.uint64(31), np.uint64(32)


# -- reference: plain NumPy, any float dtype ---------------------------------------------------
def dropout_mask_ref(shape: tuple[int, int], rate: float, seed: int) -> Array:
    """Return the mask (N, C), boolean: true where the element is kept."""
    N, C = shape
    z: Array = np.full(N, seed, np.uint64) * GOLDEN + np.arange(1, N + 1, dtype=np.uint64)  # arrays wrap silently
    z = (z + GOLDEN).astype(np.uint64)
    z = (z ^ (z >> S30)) * MIX_1
    z = (z ^ (z >> S27)) * MIX_2
    z = z ^ (z >> S31)
    low, high = z.astype(np.uint32)[:, None], (z >> S32).astype(np.uint32)[:, None]  # (N, 1)
    k = np.arange(C, dtype=np.uint32) + low  # (N, C)
    k = (k ^ (k >> S16)) * LOW_1
    k = (k ^ (k >> S15) ^ high) * LOW_2
    return (k ^ (k >> S16)) >= np.uint32(rate * 2.0**32)


def dropout_forward_ref(x: Array, rate: float, seed: int) -> Array:
    """Return y (N, C) for x (N, C)."""
    return x * (dropout_mask_ref(x.shape, rate, seed) * x.dtype.type(1 / (1 - rate)))


def dropout_backward_ref(dy: Array, rate: float, seed: int) -> Array:
    """Return dx (N, C) for dy (N, C): the same mask and scale."""
    return dropout_forward_ref(dy, rate, seed)


# -- kernels: Numba, float32, outputs first ----------------------------------------------------
@helper
def _row_key(seed, n):
    z = np.uint64(seed) * GOLDEN + (np.uint64(n) + np.uint64(1)) + GOLDEN
    z = (z ^ (z >> S30)) * MIX_1
    z = (z ^ (z >> S27)) * MIX_2
    return z ^ (z >> S31)


@helper
def _masked_scale(j, low, high, threshold, scale):
    # Each step is brought back to 32 bits: Numba computes in 64, and LLVM then finds that 32 are enough.
    k = np.uint32(np.uint32(j) + low)
    k = np.uint32(np.uint32(k ^ (k >> S16)) * LOW_1)
    k = np.uint32(np.uint32(k ^ (k >> S15) ^ high) * LOW_2)
    return scale if np.uint32(k ^ (k >> S16)) >= threshold else np.float32(0)


# Plain NumPy scalars warn where the hash wraps around on purpose.
_wrapping = (lambda function: function) if JIT else np.errstate(over="ignore")


def _rate_and_seed(sizes, rate, seed, **arrays):
    if not 0 <= rate < 1:
        raise ValueError(f"rate ({rate}) must be at least 0 and below 1; try 0.1")
    if int(seed) != seed or not 0 <= seed < 2**63:
        raise ValueError(f"seed ({seed}) must be a whole number from 0 on and below 2^63")


@_wrapping
@kernel
def _dropout(y, x, rate, seed):
    N, C = x.shape
    threshold = np.uint32(rate * 2.0**32)
    scale = np.float32(1.0 / (1.0 - rate))
    for n in prange(N):
        key = _row_key(seed, n)
        low = np.uint32(key & np.uint64(0xFFFFFFFF))
        high = np.uint32(key >> S32)
        for j in range(C):
            y[n, j] = x[n, j] * _masked_scale(j, low, high, threshold, scale)


@checked("y! x (N, C)", _rate_and_seed)
def dropout_forward(y: Array, x: Array, rate: float, seed: int) -> None:
    """Overwrite y (N, C) from x (N, C)."""
    _dropout(y, x, rate, seed)


@checked("dx! dy (N, C)", _rate_and_seed)
def dropout_backward(dx: Array, dy: Array, rate: float, seed: int) -> None:
    """Overwrite dx (N, C) from dy (N, C): the mask of the forward call with the same seed."""
    _dropout(dx, dy, rate, seed)  # forward: y = x k / (1 - rate)
