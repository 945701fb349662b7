"""Q4_K: 256 numbers in 144 bytes, 4.5 bits a number: eight groups of 32 in a block.

bytes   0 1         2 3             4 ... 15              16 ... 143
        d, a half   d_min, a half   s_g and m_g, packed   32 bytes for groups 2 i and 2 i + 1: lower, upper halves

s and m are eight pairs of six bits, in twelve bytes:

    byte i      (i < 4)     s_i in the lower six bits, bits 4 and 5 of s_(i + 4) above
    byte i + 4              m_i in the lower six bits, bits 4 and 5 of m_(i + 4) above
    byte i + 8              lower four bits of s_(i + 4), of m_(i + 4) above

decode      x_k = (d s_g) q_k - d_min m_g,  0 <= q_k <= 15
encode      scale and offset of each group by `fits.py`, with weights |x| + the root of the mean square of the group;
            d and d_min make the largest of them 63; then q_k is rounded anew, with what was kept of both
"""

import numpy as np

from ..engine.jit import helper
from ..engine.simd import LANES
from ..engine.spread import joined
from .blocks import (
    BlockStorage,
    from_halves_ref,
    half_at,
    in_bytes_ref,
    inverse_ref,
    nearest_ref,
    nibbles_ref,
    over,
    pieces_ref,
    put_half,
    put_nibbles,
    to_halves_ref,
    whole,
)
from .fits import affine_fit_ref, affine_row, columns_ref, weights_ref

__all__ = [
    "STORAGE",
    "fitted_ref",
    "groups_ref",
    "kept_scales_ref",
    "pair_of",
    "pairs_ref",
    "put_pairs",
    "put_scales",
    "quantised",
    "scales_and_offsets",
]

GROUPS = 8
TOP = 15
STEPS = np.arange(14, 16.05, 0.1, dtype=np.float32)


def pairs_ref(packed):
    """Return s and m (n, 8) uint8 from twelve bytes (n, 12)."""
    s, m, rest = packed.reshape(-1, 3, 4).swapaxes(0, 1)
    six, upper = np.uint8(63), np.uint8(0x30)
    s4 = rest & np.uint8(15) | s >> np.uint8(2) & upper
    m4 = rest >> np.uint8(4) | m >> np.uint8(2) & upper
    return np.hstack([s & six, s4]), np.hstack([m & six, m4])


def packed_pairs_ref(s, m):
    """Return the twelve bytes of s and m (n, 8) uint8 below 64."""
    (s, s4), (m, m4) = np.hsplit(s, 2), np.hsplit(m, 2)
    top = lambda x: x >> np.uint8(4) << np.uint8(6)  # noqa: E731
    return np.hstack([s | top(s4), m | top(m4), s4 & np.uint8(15) | (m4 & np.uint8(15)) << np.uint8(4)])


def groups_ref(x, importance, top, steps, size=32):
    """Return scales and offsets (n, block / size) of the groups of `size` numbers of blocks (n, block)."""
    scale, offset = affine_fit_ref(columns_ref(x, size), weights_ref(x, importance, size, False), top, steps)
    return scale.reshape(len(x), -1), offset.reshape(len(x), -1)


def kept_scales_ref(scales, top):
    """Return d as two bytes, whole numbers up to `top`, and d times them: what is kept of scales (n, groups) >= 0."""
    largest = scales.max(1)
    whole = nearest_ref(scales * inverse_ref(largest, top)[:, None], 0, top)
    d, packed = to_halves_ref(largest / np.float32(top))
    return packed, whole.astype(np.uint8), d[:, None] * whole


def fitted_ref(x, importance, top, steps):
    """Return d, d_min and the pairs as they are kept, and q (n, 256) uint8 up to `top`, of blocks x (n, 256)."""
    scale, offset = groups_ref(x, importance, top, steps)
    d, s, scale = kept_scales_ref(scale, 63)
    d_min, m, offset = kept_scales_ref(offset, 63)
    groups = x.reshape(len(x), GROUPS, -1)
    q = nearest_ref((groups + offset[..., None]) * inverse_ref(scale)[..., None], 0, top)
    return np.hstack([d, d_min, packed_pairs_ref(s, m)]), q.astype(np.uint8).reshape(len(x), -1)


@helper
def pair_of(packed, g):
    """Return s_g and m_g from twelve bytes."""
    i = g & 3
    s, m, rest = np.int32(packed[i]), np.int32(packed[i + 4]), np.int32(packed[i + 8])
    if g < 4:
        return np.float32(s & np.int32(63)), np.float32(m & np.int32(63))
    s, m = s >> np.int32(2) & np.int32(0x30), m >> np.int32(2) & np.int32(0x30)
    return np.float32(rest & np.int32(15) | s), np.float32(rest >> np.int32(4) | m)


@helper
def decode_row(out, raw):
    """Decode a row, block by block."""
    for b in range(out.size // 256):
        block = raw[144 * b : 144 * b + 144]
        d, d_min = half_at(block, 0), half_at(block, 2)
        for i in range(4):
            low, high = pair_of(block[4:], 2 * i), pair_of(block[4:], 2 * i + 1)
            scale, offset, scale2, offset2 = d * low[0], d_min * low[1], d * high[0], d_min * high[1]
            x, bytes_ = out[256 * b + 64 * i : 256 * b + 64 * i + 64], block[16 + 32 * i : 48 + 32 * i]
            for k in range(32):
                q = np.int32(bytes_[k])
                x[k] = scale * np.float32(q & np.int32(15)) - offset
                x[k + 32] = scale2 * np.float32(q >> np.int32(4)) - offset2


@helper
def put_scales(raw, at, kept, scales, top):
    """Write d to raw[at], raw[at + 1]; scales >= 0 become d times whole numbers up to `top`, which go to `kept`."""
    largest = scales.max()
    inverse = over(np.float32(top), largest)
    d = put_half(raw, at, largest / np.float32(top))
    for g in range(scales.size):
        kept[g] = whole(scales[g] * inverse, 0, top)
        scales[g] = d * np.float32(kept[g])


@helper
def put_pairs(packed, s, m):
    """Write eight pairs below 64 to twelve bytes."""
    four, six = np.int32(4), np.int32(6)
    for i in range(4):
        s4, m4 = np.int32(s[i + 4]), np.int32(m[i + 4])
        packed[i] = np.uint8(np.int32(s[i]) | s4 >> four << six)
        packed[i + 4] = np.uint8(np.int32(m[i]) | m4 >> four << six)
        packed[i + 8] = np.uint8((s4 & np.int32(15)) | (m4 & np.int32(15)) << four)


@helper
def quantised(q, x, scales, offsets, top):
    """Write the whole numbers of a block x, in groups of as many as `scales` has, to q (block,) uint8."""
    size = x.size // scales.size
    for g in range(scales.size):
        inverse, offset = over(np.float32(1), scales[g]), offsets[g]
        numbers, group = x[g * size : (g + 1) * size], q[g * size : (g + 1) * size]
        for k in range(size):
            group[k] = np.uint8(whole((numbers[k] + offset) * inverse, 0, top))


@helper
def encode_row(raw, x, importance):
    """Encode a row: fit all groups, then block by block."""
    scales, offsets = np.empty(x.size // 32 + LANES, np.float32), np.empty(x.size // 32 + LANES, np.float32)
    affine_row(scales, offsets, x, importance, 32, 256, TOP, STEPS)
    s, m, q = np.empty(8, np.uint8), np.empty(8, np.uint8), np.empty(256, np.uint8)
    for b in range(x.size // 256):
        block, scale, offset = raw[144 * b : 144 * b + 144], scales[8 * b : 8 * b + 8], offsets[8 * b : 8 * b + 8]
        put_scales(block, 0, s, scale, 63)
        put_scales(block, 2, m, offset, 63)
        put_pairs(block[4:], s, m)
        quantised(q, x[256 * b : 256 * b + 256], scale, offset, TOP)
        put_nibbles(block[16:], q, 32)


def scales_and_offsets(block):
    """Emit d s and d_min m of a block, from its first byte on."""
    s, m, rest = (block.bytes(4 + 4 * i, 4) for i in range(3))
    both = (s, rest & 15, block.half(0)), (m, rest >> 4, block.half(2))
    return [[joined(x & 63, y | x >> 2 & 0x30).unsigned() * d] for x, y, d in both]


def integers_of(block):
    """Emit whole numbers, scales and offsets of a block."""
    q = [part for i in range(4) for part in (block.bytes(16 + 32 * i, 32) & 15, block.bytes(16 + 32 * i, 32) >> 4)]
    return q, *scales_and_offsets(block)


class _Q4_K(BlockStorage):
    name, block, bytes_per_block = "q4_k", 256, 144
    halves = (0, 2)
    offsets = True
    decode_row, encode_row = staticmethod(decode_row), staticmethod(encode_row)
    integers_of = staticmethod(integers_of)

    def encode_blocks_ref(self, x, importance):
        scales, q = fitted_ref(x, importance, TOP, STEPS)
        return np.hstack([scales, in_bytes_ref(q, 32)])

    def integers_blocks_ref(self, blocks):
        d, d_min, pairs, q = pieces_ref(blocks, 2, 2, 12)
        s, m = (x.astype(np.float32) for x in pairs_ref(pairs))
        return nibbles_ref(q, 32), from_halves_ref(d) * s, from_halves_ref(d_min) * m


STORAGE = _Q4_K()
