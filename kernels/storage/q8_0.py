"""Q8_0: 32 numbers in 34 bytes, 8.5 bits a number.

bytes   0 1         2 ... 33
        d, a half   q_0 ... q_31, int8

decode      x_k = d q_k
encode      d = max |x| / 127,  q_k = x_k / d rounded to the nearest, of equally near ones the larger in size
"""

import numpy as np

from ..engine.jit import helper
from .blocks import (
    BlockStorage,
    from_halves_ref,
    half_at,
    inverse_ref,
    largest_in_size,
    over,
    pieces_ref,
    put_half,
    signed,
    to_halves_ref,
)

__all__ = ["STORAGE"]


@helper
def decode_row(out, raw):
    """Decode a row, block by block."""
    for b in range(out.size // 32):
        x, block = out[32 * b : 32 * b + 32], raw[34 * b : 34 * b + 34]
        d = half_at(block, 0)
        for k in range(32):
            x[k] = d * np.float32(signed(block[2 + k]))


@helper
def encode_row(raw, x, importance):
    """Encode a row, block by block."""
    for b in range(x.size // 32):
        numbers, block = x[32 * b : 32 * b + 32], raw[34 * b : 34 * b + 34]
        d = abs(largest_in_size(numbers)) / np.float32(127)
        inverse = over(np.float32(1), d)
        put_half(block, 0, d)
        for k in range(32):
            size = abs(numbers[k] * inverse)
            q = np.int32(np.floor(size) + np.floor(np.float32(2) * (size - np.floor(size))))
            block[2 + k] = np.uint8((-q if numbers[k] < 0 else q) & np.int32(255))


def integers_of(block):
    """Emit whole numbers, scales and offsets of a block."""
    return [block.bytes(2, 32) ^ 128], [block.half(0)], None


class _Q8_0(BlockStorage):
    name, block, bytes_per_block = "q8_0", 32, 34
    weighted = False
    zero = 128
    decode_row, encode_row = staticmethod(decode_row), staticmethod(encode_row)
    integers_of = staticmethod(integers_of)

    def encode_blocks_ref(self, x, importance):
        d = np.abs(x).max(1) / np.float32(127)
        scaled = x * inverse_ref(d)[:, None]
        size = np.abs(scaled)
        q = np.copysign(np.floor(size) + np.floor(2 * (size - np.floor(size))), scaled)
        return np.hstack([to_halves_ref(d)[1], q.astype(np.int8).view(np.uint8)])

    def integers_blocks_ref(self, blocks):
        d, q = pieces_ref(blocks, 2)
        return q ^ np.uint8(128), from_halves_ref(d), None


STORAGE = _Q8_0()
