"""Q3_K: 256 numbers in 110 bytes, 3.4375 bits a number: sixteen groups of 16 in a block.

bytes   0 ... 31                           32 ... 95                          96 ... 107          108 109
        byte k: bit i is the third bit     lower two bits: of each 128,       s_g, packed         d, a half
        of number k + 32 i                 byte k holds k, k + 32, + 64, + 96

s are sixteen numbers of six bits: lower four bits of s_g and s_(g + 8) in byte g < 8, lower and upper half; upper
two bits of s_i, s_(i + 4), s_(i + 8), s_(i + 12) in byte 8 + i, the lowest first.

decode      x_k = (d (s_g - 32)) (q_k - 4),  0 <= q_k <= 7
encode      as Q6_K, with d that makes the scale that is largest in size -32
"""

import numpy as np

from ..engine.jit import helper
from ..engine.simd import LANES
from ..engine.spread import joined
from .blocks import (
    BlockStorage,
    bits_in_bytes_ref,
    bits_ref,
    from_halves_ref,
    half_at,
    in_bytes_ref,
    inverse_ref,
    nearest_ref,
    nibbles_ref,
    pieces_ref,
    put_fields,
    put_nibbles,
    run_of,
)
from .fits import even_row
from .q6_k import GROUPS, even_groups_ref, kept_signed_ref, put_signed_scales, quantised_evenly

__all__ = ["STORAGE"]

TOP = 3
STEPS = np.arange(2.6, 4.65, 0.1, dtype=np.float32)


@helper
def decode_row(out, raw):
    """Decode a row, block by block."""
    blocks = out.size // 256
    run = run_of(out.size, blocks, 16)
    for b in range(blocks):
        block = raw[110 * b : 110 * b + 110]
        d = half_at(block, 108)
        for i in range(GROUPS):  # groups of 16
            lower_s = np.int32(block[96 + (i & 7)]) >> np.int32(i >> 3 << 2) & np.int32(15)
            upper_s = np.int32(block[104 + (i & 3)]) >> np.int32(i >> 2 << 1) & np.int32(3)
            scale = d * np.float32((lower_s | upper_s << np.int32(4)) - np.int32(32))
            half, quarter, odd = i >> 3, i >> 1 & 3, i & 1
            third, lower = block[16 * odd :], block[32 + 32 * half + 16 * odd :]
            x, up, shift = out[256 * b + 16 * i : 256 * b + 16 * i + 16], np.int32(i >> 1), np.int32(2 * quarter)
            for k in range(run):
                q = np.int32(lower[k]) >> shift & np.int32(3) | (np.int32(third[k]) >> up & np.int32(1)) << np.int32(2)
                x[k] = scale * np.float32(q - np.int32(4))


@helper
def encode_row(raw, x, importance):
    """Encode a row: fit all groups, then block by block."""
    scales = np.empty(x.size // 16 + LANES, np.float32)
    even_row(scales, x, importance, 16, 256, TOP, -TOP - 1, STEPS)
    s, raised, q = np.empty(GROUPS, np.int32), np.empty(GROUPS, np.uint8), np.empty(256, np.uint8)
    blocks = x.size // 256
    run = run_of(x.size, blocks, GROUPS)
    for b in range(blocks):
        block, own = raw[110 * b : 110 * b + 110], scales[16 * b : 16 * b + 16]
        put_signed_scales(block, 108, s, own, 31)
        quantised_evenly(q, x[256 * b : 256 * b + 256], own, TOP, run)
        put_fields(block, q, 32, 1, 2)
        put_fields(block[32:], q, 32, 2, 0)
        for g in range(GROUPS):
            raised[g] = np.uint8(s[g] + np.int32(32))
        put_nibbles(block[96:], raised, 8)
        put_fields(block[104:], raised, 4, 2, 4)


def integers_of(block):
    """Emit whole numbers, scales and offsets of a block."""
    third, s, upper = block.bytes(0, 32), block.bytes(96, 8), block.bytes(104, 4)
    q = [block.bytes(32 + 32 * (i // 4), 32) >> 2 * (i % 4) & 3 | (third >> i & 1) << 2 for i in range(8)]
    s = joined(s & 15, s >> 4) | joined(*(upper >> 2 * i & 3 for i in range(4))) << 4
    return q, [(s - 32).signed() * block.half(108)], None


class _Q3_K(BlockStorage):
    name, block, bytes_per_block = "q3_k", 256, 110
    halves = (108,)
    group, zero = 16, TOP + 1
    decode_row, encode_row = staticmethod(decode_row), staticmethod(encode_row)
    integers_of = staticmethod(integers_of)

    def encode_blocks_ref(self, x, importance):
        d, s, scale = kept_signed_ref(even_groups_ref(x, importance, TOP, STEPS), 31)
        groups = x.reshape(len(x), GROUPS, -1)
        q = nearest_ref(groups * inverse_ref(scale)[..., None], -TOP - 1, TOP) + np.float32(TOP + 1)
        q = q.astype(np.uint8).reshape(len(x), -1)
        third, lower = bits_in_bytes_ref(q >> np.uint8(2), 32), bits_in_bytes_ref(q & np.uint8(3), 32, 2)
        s = (s + np.int8(32)).view(np.uint8)
        scales = np.hstack([in_bytes_ref(s & np.uint8(15), 8), bits_in_bytes_ref(s >> np.uint8(4), 4, 2)])
        return np.hstack([third, lower, scales, d])

    def integers_blocks_ref(self, blocks):
        third, lower, s, upper, d = pieces_ref(blocks, 32, 64, 8, 4)
        s = (nibbles_ref(s, 8) | bits_ref(upper, 4, 2) << np.uint8(4)).astype(np.float32) - np.float32(32)
        q = bits_ref(lower, 32, 2) | bits_ref(third, 32) << np.uint8(2)
        return q, from_halves_ref(d) * s, None


STORAGE = _Q3_K()
