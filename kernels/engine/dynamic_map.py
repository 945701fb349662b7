"""The dynamic map: 256 numbers of size at most 1 that bytes stand for, dense near 0, as bitsandbytes has it.

    for i = 0 ... 6    [0.1, 1] is cut into 2^i equal parts (unsigned: 2^(i+1)); their middles times 10^(i-6)
    signed             those, and the same below 0
    and                0 and 1

So a number of size 10^-e has 6 - e bits for where it is within its power of ten.  It is computed in the float32
arithmetic of `torch.linspace`, edges as one fused operation each, so that its bits are those of bitsandbytes' files.

Source: Dettmers et al. 2021, "8-bit Optimizers via Block-wise Quantization", section 1.3.
"""

import functools

import numpy as np

__all__ = ["dynamic_map"]

LARGEST_EXPONENT = 6
LOW, HIGH = np.float32(0.1), np.float32(1)


@functools.cache
def dynamic_map(signed: bool) -> np.ndarray:
    """Return the 256 numbers, float32, rising; read-only."""
    found = [np.zeros(1, np.float32), np.ones(1, np.float32)]
    for i in range(LARGEST_EXPONENT + 1):
        parts = 2**i if signed else 2 ** (i + 1)
        at, step = np.arange(parts + 1), np.float64((HIGH - LOW) / np.float32(parts))
        edges = np.where(at < (parts + 1) // 2, LOW + step * at, HIGH - step * (parts - at)).astype(np.float32)
        middles = np.float32(10.0 ** (i - LARGEST_EXPONENT)) * ((edges[:-1] + edges[1:]) / np.float32(2))
        found += [middles, -middles] if signed else [middles]
    numbers = np.sort(np.concatenate(found))
    numbers.flags.writeable = False
    return numbers
