"""Q5_1: 32 numbers in 24 bytes, 6 bits a number.

bytes   0 1         2 3         4 ... 7                         8 ... 23
        d, a half   m, a half   bit k: the fifth bit of q_k     byte k: lower bits of q_k, and of q_(k + 16) above

decode      x_k = d q_k + m,  0 <= q_k <= 31
encode      as Q4_1, with d = (largest - m) / 31
"""

import numpy as np

from ..engine.jit import helper
from .blocks import BlockStorage, from_halves_ref, half_at, over, pieces_ref, put_half, run_of, to_halves_ref
from .q4_1 import TRIED, above, from_least_ref, scale_and_least_ref, scales_and_leasts
from .q5_0 import fifth_bits, five_bits_of, five_bits_ref, from_five_bits_ref, lower_bits, put_fifth_bits, upper_bits

__all__ = ["STORAGE"]

TOP = 31
AROUND = TRIED + np.float32(TOP)


@helper
def decode_row(out, raw):
    """Decode a row, block by block."""
    blocks = out.size // 32
    run = run_of(out.size, blocks, 2)
    for b in range(blocks):
        x, upper = out[32 * b : 32 * b + run], out[32 * b + run : 32 * b + 2 * run]
        block = raw[24 * b : 24 * b + 24]
        d, m, fifth, four = half_at(block, 0), half_at(block, 2), fifth_bits(block[4:]), block[8:]
        for k in range(run):
            q, bit = np.int32(four[k]), fifth >> np.int32(k)
            x[k] = d * np.float32(q & np.int32(15) | (bit & np.int32(1)) << np.int32(4)) + m
            bit = bit >> np.int32(16) & np.int32(1)
            upper[k] = d * np.float32(q >> np.int32(4) | bit << np.int32(4)) + m


@helper
def encode_row(raw, x, importance):
    """Encode a row, block by block."""
    scales, leasts = scales_and_leasts(x, importance, TOP, AROUND)
    blocks = x.size // 32
    run = run_of(x.size, blocks, 2)
    for b in range(blocks):
        numbers, others = x[32 * b : 32 * b + run], x[32 * b + run : 32 * b + 2 * run]
        block = raw[24 * b : 24 * b + 24]
        d, m = scales[b], leasts[b]
        inverse = over(np.float32(1), d)
        put_half(block, 0, d)
        put_half(block, 2, m)
        fifth = np.int32(0)
        for k in range(run):
            low, high = above(numbers[k], inverse, m, TOP), above(others[k], inverse, m, TOP)
            block[8 + k] = lower_bits(low, high)
            fifth |= upper_bits(low, high, k)
        put_fifth_bits(block[4:], fifth)


def integers_of(block):
    """Emit whole numbers, scales and offsets of a block."""
    return five_bits_of(block, 4), [block.half(0)], [-block.half(2)]


class _Q5_1(BlockStorage):
    name, block, bytes_per_block = "q5_1", 32, 24
    halves = (0, 2)
    offsets = True
    decode_row, encode_row = staticmethod(decode_row), staticmethod(encode_row)
    integers_of = staticmethod(integers_of)

    def encode_blocks_ref(self, x, importance):
        d, m = scale_and_least_ref(x, importance, TOP)
        q = five_bits_ref(from_least_ref(x, d, m, TOP))
        return np.hstack([to_halves_ref(d)[1], to_halves_ref(m)[1], q])

    def integers_blocks_ref(self, blocks):
        d, m, q = pieces_ref(blocks, 2, 2)
        return from_five_bits_ref(q), from_halves_ref(d), -from_halves_ref(m)


STORAGE = _Q5_1()
