"""Q2_K: 256 numbers in 84 bytes, 2.625 bits a number: sixteen groups of 16 in a block.

bytes   0 ... 15                          16 ... 79                          80 81       82 83
        byte g: s_g in its lower half,    two bits: of each 128 numbers,     d, a half   d_min, a half
        m_g in its upper                  byte k holds k, k + 32, + 64, + 96

decode      x_k = (d s_g) q_k - d_min m_g,  0 <= q_k <= 3
encode      as Q4_K, with d and d_min that make the largest scale and offset 15
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
    inverse_ref,
    nearest_ref,
    pieces_ref,
    put_fields,
    run_of,
)
from .fits import affine_row
from .q4_k import groups_ref, kept_scales_ref, put_scales, quantised

__all__ = ["STORAGE"]

GROUPS = 16
TOP = 3
STEPS = np.arange(2.5, 4.05, 0.1, dtype=np.float32)


@helper
def decode_row(out, raw):
    """Decode a row, block by block."""
    blocks = out.size // 256
    run = run_of(out.size, blocks, 16)
    for b in range(blocks):
        block = raw[84 * b : 84 * b + 84]
        d, d_min = half_at(block, 80), half_at(block, 82)
        for i in range(GROUPS):  # groups of 16
            pair = np.int32(block[i])
            scale, offset = d * np.float32(pair & np.int32(15)), d_min * np.float32(pair >> np.int32(4))
            half, quarter, odd = i >> 3, i >> 1 & 3, i & 1
            two = block[16 + 32 * half + 16 * odd :]
            x, shift = out[256 * b + 16 * i : 256 * b + 16 * i + 16], np.int32(2 * quarter)
            for k in range(run):
                x[k] = scale * np.float32(np.int32(two[k]) >> shift & np.int32(3)) - offset


@helper
def encode_row(raw, x, importance):
    """Encode a row: fit all groups, then block by block."""
    scales, offsets = np.empty(x.size // 16 + LANES, np.float32), np.empty(x.size // 16 + LANES, np.float32)
    affine_row(scales, offsets, x, importance, 16, 256, TOP, STEPS)
    s, m, q = np.empty(GROUPS, np.uint8), np.empty(GROUPS, np.uint8), np.empty(256, np.uint8)
    for b in range(x.size // 256):
        block, scale, offset = raw[84 * b : 84 * b + 84], scales[16 * b : 16 * b + 16], offsets[16 * b : 16 * b + 16]
        put_scales(block, 80, s, scale, 15)
        put_scales(block, 82, m, offset, 15)
        for g in range(GROUPS):
            block[g] = np.uint8(np.int32(s[g]) | np.int32(m[g]) << np.int32(4))
        quantised(q, x[256 * b : 256 * b + 256], scale, offset, TOP)
        put_fields(block[16:], q, 32, 2, 0)


def integers_of(block):
    """Emit whole numbers, scales and offsets of a block."""
    pairs = block.bytes(0, 16)
    q = [block.bytes(16 + 32 * (i // 4), 32) >> 2 * (i % 4) & 3 for i in range(8)]
    return q, [(pairs & 15).unsigned() * block.half(80)], [(pairs >> 4).unsigned() * block.half(82)]


class _Q2_K(BlockStorage):
    name, block, bytes_per_block = "q2_k", 256, 84
    halves = (80, 82)
    group, offsets = 16, True
    decode_row, encode_row = staticmethod(decode_row), staticmethod(encode_row)
    integers_of = staticmethod(integers_of)

    def encode_blocks_ref(self, x, importance):
        scale, offset = groups_ref(x, importance, TOP, STEPS, size=16)
        d, s, scale = kept_scales_ref(scale, 15)
        d_min, m, offset = kept_scales_ref(offset, 15)
        groups = x.reshape(len(x), GROUPS, -1)
        q = nearest_ref((groups + offset[..., None]) * inverse_ref(scale)[..., None], 0, TOP)
        return np.hstack([s | m << np.uint8(4), bits_in_bytes_ref(q.reshape(len(x), -1), 32, 2), d, d_min])

    def integers_blocks_ref(self, blocks):
        pairs, q, d, d_min = pieces_ref(blocks, 16, 64, 2)
        s, m = ((x.astype(np.float32)) for x in (pairs & np.uint8(15), pairs >> np.uint8(4)))
        return bits_ref(q, 32, 2), from_halves_ref(d) * s, from_halves_ref(d_min) * m


STORAGE = _Q2_K()
