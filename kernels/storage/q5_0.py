"""Q5_0: 32 numbers in 22 bytes, 5.5 bits a number.

bytes   0 1         2 ... 5                         6 ... 21
        d, a half   bit k: the fifth bit of q_k     byte k: lower bits of q_k in its lower half, of q_(k + 16) above

decode      x_k = d (q_k - 16),  0 <= q_k <= 31
encode      as Q4_0, with d = m / -16
"""

import numpy as np

from ..engine.jit import helper
from .blocks import (
    BlockStorage,
    from_halves_ref,
    half_at,
    in_bytes_ref,
    nibbles_ref,
    over,
    pieces_ref,
    put_half,
    run_of,
    to_halves_ref,
)
from .q4_0 import TRIED, scale_ref, scales_of, shifted, shifted_ref

__all__ = [
    "STORAGE",
    "fifth_bits",
    "five_bits_of",
    "five_bits_ref",
    "from_five_bits_ref",
    "lower_bits",
    "put_fifth_bits",
    "upper_bits",
]

TOP = 15
AROUND = TRIED + np.float32(TOP + 1)


def five_bits_ref(q):
    """Return the twenty bytes of q (n, 32) uint8: fifth bits, then lower bits."""
    return np.hstack([np.packbits(q >> np.uint8(4), axis=1, bitorder="little"), in_bytes_ref(q & np.uint8(15), 16)])


def from_five_bits_ref(packed):
    """Return q (n, 32) uint8 from twenty bytes (n, 20)."""
    fifth, lower = pieces_ref(packed, 4)
    return nibbles_ref(lower, 16) | np.unpackbits(fifth, axis=1, bitorder="little") << np.uint8(4)


@helper
def fifth_bits(packed):
    """Return the first four bytes as an int32: bit k is the fifth bit of number k."""
    word = np.int32(0)
    for i in range(4):
        word |= np.int32(packed[i]) << np.int32(8 * i)
    return word


@helper
def decode_row(out, raw):
    """Decode a row, block by block."""
    blocks = out.size // 32
    run = run_of(out.size, blocks, 2)
    for b in range(blocks):
        x, upper = out[32 * b : 32 * b + run], out[32 * b + run : 32 * b + 2 * run]
        block = raw[22 * b : 22 * b + 22]
        d, fifth, four = half_at(block, 0), fifth_bits(block[2:]), block[6:]
        for k in range(run):
            q, bit = np.int32(four[k]), fifth >> np.int32(k)
            x[k] = d * np.float32((q & np.int32(15) | (bit & np.int32(1)) << np.int32(4)) - np.int32(16))
            bit = bit >> np.int32(16) & np.int32(1)
            upper[k] = d * np.float32((q >> np.int32(4) | bit << np.int32(4)) - np.int32(16))


@helper
def lower_bits(low, high):
    """Return the byte of the lower four bits of two numbers."""
    return np.uint8(low & np.int32(15) | (high & np.int32(15)) << np.int32(4))


@helper
def upper_bits(low, high, k):
    """Return the fifth bits of numbers k and k + 16, where `fifth_bits` has them."""
    return low >> np.int32(4) << np.int32(k) | high >> np.int32(4) << np.int32(k + 16)


@helper
def put_fifth_bits(packed, word):
    """Write the four bytes that `fifth_bits` reads."""
    for i in range(4):
        packed[i] = np.uint8(word >> np.int32(8 * i) & np.int32(255))


@helper
def encode_row(raw, x, importance):
    """Encode a row, block by block."""
    scales = scales_of(x, importance, TOP, AROUND)
    blocks = x.size // 32
    run = run_of(x.size, blocks, 2)
    for b in range(blocks):
        numbers, others = x[32 * b : 32 * b + run], x[32 * b + run : 32 * b + 2 * run]
        block = raw[22 * b : 22 * b + 22]
        d = scales[b]
        inverse = over(np.float32(1), d)
        put_half(block, 0, d)
        fifth = np.int32(0)
        for k in range(run):
            low, high = shifted(numbers[k], inverse, TOP), shifted(others[k], inverse, TOP)
            block[6 + k] = lower_bits(low, high)
            fifth |= upper_bits(low, high, k)
        put_fifth_bits(block[2:], fifth)


def five_bits_of(block, at):
    """Emit the 32 numbers of twenty bytes."""
    return [block.bytes(at + 4, 16).nibbles() | block.bits(at, 32) << 4]


def integers_of(block):
    """Emit whole numbers, scales and offsets of a block."""
    return five_bits_of(block, 2), [block.half(0)], None


class _Q5_0(BlockStorage):
    name, block, bytes_per_block = "q5_0", 32, 22
    zero = 16
    decode_row, encode_row = staticmethod(decode_row), staticmethod(encode_row)
    integers_of = staticmethod(integers_of)

    def encode_blocks_ref(self, x, importance):
        d = scale_ref(x, importance, TOP)
        return np.hstack([to_halves_ref(d)[1], five_bits_ref(shifted_ref(x, d, TOP))])

    def integers_blocks_ref(self, blocks):
        d, q = pieces_ref(blocks, 2)
        return from_five_bits_ref(q), from_halves_ref(d), None


STORAGE = _Q5_0()
