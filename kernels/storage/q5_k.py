"""Q5_K: 256 numbers in 176 bytes, 5.5 bits a number: eight groups of 32 in a block.

bytes   0 1         2 3             4 ... 15              16 ... 47                          48 ... 175
        d, a half   d_min, a half   s_g and m_g (Q4_K)    byte k: bit g is the fifth bit     lower bits, as in Q4_K
                                                          of number k of group g

decode      x_k = (d s_g) q_k - d_min m_g,  0 <= q_k <= 31
encode      as Q4_K
"""

import numpy as np

from ..engine.jit import helper
from ..engine.simd import LANES
from .blocks import (
    BlockStorage,
    bits_in_bytes_ref,
    bits_ref,
    from_halves_ref,
    half_at,
    in_bytes_ref,
    nibbles_ref,
    pieces_ref,
    put_fields,
    put_nibbles,
)
from .fits import affine_row
from .q4_k import (
    fitted_ref,
    pair_of,
    pairs_ref,
    put_pairs,
    put_scales,
    quantised,
    scales_and_offsets,
)

__all__ = ["STORAGE"]

TOP = 31
STEPS = np.arange(30.5, 32.05, 0.1, dtype=np.float32)


@helper
def decode_row(out, raw):
    """Decode a row, block by block."""
    for b in range(out.size // 256):
        block = raw[176 * b : 176 * b + 176]
        d, d_min = half_at(block, 0), half_at(block, 2)
        fifth = block[16:48]
        for i in range(4):
            low, high = pair_of(block[4:], 2 * i), pair_of(block[4:], 2 * i + 1)
            scale, offset, scale2, offset2 = d * low[0], d_min * low[1], d * high[0], d_min * high[1]
            x, bytes_ = out[256 * b + 64 * i : 256 * b + 64 * i + 64], block[48 + 32 * i : 80 + 32 * i]
            shift = np.int32(2 * i)
            for k in range(32):
                q, f = np.int32(bytes_[k]), np.int32(fifth[k]) >> shift
                x[k] = scale * np.float32(q & np.int32(15) | (f & np.int32(1)) << np.int32(4)) - offset
                x[k + 32] = scale2 * np.float32(q >> np.int32(4) | (f & np.int32(2)) << np.int32(3)) - offset2


@helper
def encode_row(raw, x, importance):
    """Encode a row: fit all groups, then block by block."""
    scales, offsets = np.empty(x.size // 32 + LANES, np.float32), np.empty(x.size // 32 + LANES, np.float32)
    affine_row(scales, offsets, x, importance, 32, 256, TOP, STEPS)
    s, m, q = np.empty(8, np.uint8), np.empty(8, np.uint8), np.empty(256, np.uint8)
    for b in range(x.size // 256):
        block, scale, offset = raw[176 * b : 176 * b + 176], scales[8 * b : 8 * b + 8], offsets[8 * b : 8 * b + 8]
        put_scales(block, 0, s, scale, 63)
        put_scales(block, 2, m, offset, 63)
        put_pairs(block[4:], s, m)
        quantised(q, x[256 * b : 256 * b + 256], scale, offset, TOP)
        put_fields(block[16:], q, 32, 1, 4)
        put_nibbles(block[48:], q, 32)


def integers_of(block):
    """Emit whole numbers, scales and offsets of a block."""
    q, fifth = [], block.bytes(16, 32)
    for i in range(4):
        packed = block.bytes(48 + 32 * i, 32)
        q += [packed & 15 | (fifth >> 2 * i & 1) << 4, packed >> 4 | (fifth >> 2 * i + 1 & 1) << 4]
    return q, *scales_and_offsets(block)


class _Q5_K(BlockStorage):
    name, block, bytes_per_block = "q5_k", 256, 176
    halves = (0, 2)
    offsets = True
    decode_row, encode_row = staticmethod(decode_row), staticmethod(encode_row)
    integers_of = staticmethod(integers_of)

    def encode_blocks_ref(self, x, importance):
        scales, q = fitted_ref(x, importance, TOP, STEPS)
        fifth, lower = bits_in_bytes_ref(q >> np.uint8(4), 32), in_bytes_ref(q & np.uint8(15), 32)
        return np.hstack([scales, fifth, lower])

    def integers_blocks_ref(self, blocks):
        d, d_min, pairs, fifth, lower = pieces_ref(blocks, 2, 2, 12, 32)
        s, m = (x.astype(np.float32) for x in pairs_ref(pairs))
        q = nibbles_ref(lower, 32) | bits_ref(fifth, 32) << np.uint8(4)
        return q, from_halves_ref(d) * s, from_halves_ref(d_min) * m


STORAGE = _Q5_K()
