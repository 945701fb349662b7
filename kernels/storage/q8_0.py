"""Q8_0: 32 numbers in 34 bytes, 8.5 bits a number.

    bytes   0 1         2 ... 33
            d, a half   q_0 ... q_31, int8

    decode      x_k = d q_k
    encode      d = max |x| / 127,  q_k = x_k / d rounded to the nearest, of equally near ones the larger in size
"""

import numpy as np

from .blocks import BlockStorage, from_halves_ref, inverse_ref, pieces_ref, to_halves_ref

__all__ = ["STORAGE"]


class _Q8_0(BlockStorage):
    name, block, bytes_per_block = "q8_0", 32, 34

    def encode_blocks_ref(self, x, importance):
        d = np.abs(x).max(1) / np.float32(127)
        scaled = x * inverse_ref(d)[:, None]
        size = np.abs(scaled)
        q = np.copysign(np.floor(size) + np.floor(2 * (size - np.floor(size))), scaled)
        return np.hstack([to_halves_ref(d)[1], q.astype(np.int8).view(np.uint8)])

    def decode_blocks_ref(self, blocks):
        d, q = pieces_ref(blocks, 2)
        return from_halves_ref(d) * q.view(np.int8).astype(np.float32)


STORAGE = _Q8_0()
