"""MXFP4: 32 numbers in 17 bytes, 4.25 bits a number (OCP Microscaling Formats, 1.0): sixteen values of four bits.

    bytes   0                       1 ... 16
            e, a power of two       byte k: q_k in its lower half, q_(k + 16) in its upper

    bits of q       3: sign      2 1: exponent      0: significand          0, 1/2, 1, 3/2, 2, 3, 4, 6 and the same below 0

    decode      x_k = 2^(e - 127) VALUE[q_k]; as GGUF keeps it, 2^(e - 128) times twice the value, a whole number
    encode      2^(e - 127) is the largest power of two that is at most a quarter of max |x|: so that is 4 to 8 of them
"""

import numpy as np

from .blocks import BlockStorage, in_bytes_ref, nibbles_ref, pieces_ref
from .iq4_nl import nearest_of_ref

__all__ = ["STORAGE"]

SIZES = np.array([0, 1, 2, 3, 4, 6, 8, 12], np.float32)  # twice the values
VALUES = np.concatenate([SIZES, 0 - SIZES])  # the second zero is +0 here as well
BIAS = 128  # of the exponent, for twice the values


class _MXFP4(BlockStorage):
    name, block, bytes_per_block = "mxfp4", 32, 17

    def encode_blocks_ref(self, x, importance):
        largest = np.abs(x).max(1)
        exponent = np.frexp(largest)[1] - 1  # the largest power of two that is at most this
        e = np.where(largest > 0, np.clip(exponent - 2 + BIAS - 1, 0, 254), 0)
        scaled = np.ldexp(x, (BIAS - e)[:, None])
        q = nearest_of_ref(np.abs(scaled), SIZES) + np.uint8(8) * (scaled < 0)
        return np.hstack([e[:, None].astype(np.uint8), in_bytes_ref(q, 16)])

    def decode_blocks_ref(self, blocks):
        e, q = pieces_ref(blocks, 1)
        return np.ldexp(VALUES[nibbles_ref(q, 16)], e.astype(np.int32) - BIAS)


STORAGE = _MXFP4()
