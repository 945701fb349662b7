"""IQ4_NL: 32 numbers in 18 bytes, 4.5 bits a number: sixteen values that are denser near zero.

bytes   0 1         2 ... 17
        d, a half   byte k: q_k in its lower half, q_(k + 16) in its upper

decode      x_k = d VALUES[q_k]
encode      q_k is the nearest; d is tried near the one that makes the number that is largest in size -127 d, each
            with the least-squares d of its rounding (`fits.py`), with weights x^2
"""

import numpy as np

from ..engine.jit import helper
from .blocks import (
    BlockStorage,
    from_halves_ref,
    half_at,
    in_bytes_ref,
    inverse_ref,
    nibbles_ref,
    pieces_ref,
    to_halves_ref,
)

__all__ = ["STORAGE", "nearest_of_ref"]

VALUES = np.array([-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113], np.float32)
STEPS = 127 + 4 * np.arange(-7, 8, dtype=np.float32)


def nearest_of_ref(x, values):
    """Return the index of the nearest of rising `values` for each x; of two as near, the lower."""
    middles = (values[:-1] + values[1:]) / 2
    return np.searchsorted(middles, x).astype(np.uint8)


@helper
def decode_row(out, raw):
    """Decode a row, block by block."""
    for b in range(out.size // 32):
        x, block = out[32 * b : 32 * b + 32], raw[18 * b : 18 * b + 18]
        d = half_at(block, 0)
        for k in range(16):
            q = block[2 + k]
            x[k] = d * VALUES[q & 15]
            x[k + 16] = d * VALUES[q >> 4]


class _IQ4_NL(BlockStorage):
    name, block, bytes_per_block = "iq4_nl", 32, 18
    decode_row = staticmethod(decode_row)

    def encode_blocks_ref(self, x, importance):
        weights = x * x if importance is None else importance * np.sqrt(np.mean(x * x, 1, keepdims=True) + x * x)
        largest = np.take_along_axis(x, np.abs(x).argmax(1)[:, None], 1)[:, 0]
        d, best = np.zeros_like(largest), np.zeros_like(largest)
        for step in STEPS:
            kept = VALUES[nearest_of_ref(x * (inverse_ref(largest) * -step)[:, None], VALUES)]
            with_x, with_q = ((weights * kept * other).sum(1) for other in (x, kept))
            trial = with_x * inverse_ref(with_q)
            better = trial * with_x > best
            d, best = np.where(better, trial, d), np.where(better, trial * with_x, best)
        d, packed = to_halves_ref(d)
        return np.hstack([packed, in_bytes_ref(nearest_of_ref(x * inverse_ref(d)[:, None], VALUES), 16)])

    def decode_blocks_ref(self, blocks):
        d, q = pieces_ref(blocks, 2)
        return from_halves_ref(d) * VALUES[nibbles_ref(q, 16)]


STORAGE = _IQ4_NL()
