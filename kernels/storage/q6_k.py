"""Q6_K: 256 numbers in 210 bytes, 6.5625 bits a number: sixteen groups of 16 in a block.

bytes   0 ... 127                                    128 ... 191                        192 ... 207   208 209
        lower four bits: of each 128 numbers, 64     upper two bits: of each 128,       s_g, int8     d, a half
        bytes hold k (lower half) and k + 64 (upper) byte k holds k, k + 32, + 64, + 96

decode      x_k = (d s_g) (q_k - 32),  0 <= q_k <= 63
encode      scales of groups by `fits.py`, with weights x^2; d makes the one that is largest in size -128;
            then q_k is rounded anew, with what was kept of both
"""

import numpy as np

from ..engine.jit import helper
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
    signed,
    to_halves_ref,
)
from .fits import even_fit_ref

__all__ = ["STORAGE", "even_groups_ref", "kept_signed_ref"]

GROUPS = 16
TOP = 31
STEPS = np.arange(31.1, 32.95, 0.1, dtype=np.float32)


def even_groups_ref(x, importance, top, steps):
    """Return the scales (n, 16) of the groups of 16 numbers of blocks (n, 256), of either sign."""
    weights = x * x if importance is None else importance * np.sqrt(2 * np.mean(x * x, 1, keepdims=True) + x * x)
    scale = even_fit_ref(x.reshape(-1, GROUPS).T, weights.reshape(-1, GROUPS).T, top, steps)
    return scale.reshape(len(x), -1)


def kept_signed_ref(scales, top):
    """Return d as two bytes, whole numbers from -top - 1 to top, and d times them: what is kept of scales (n, 16)."""
    largest = np.take_along_axis(scales, np.abs(scales).argmax(1)[:, None], 1)[:, 0]
    below = np.float32(-top - 1)
    whole = nearest_ref(scales * (inverse_ref(largest) * below)[:, None], below, top)
    d, packed = to_halves_ref(largest / below)
    return packed, whole.astype(np.int8), d[:, None] * whole


@helper
def decode_row(out, raw):
    """Decode a row, block by block."""
    for b in range(out.size // 256):
        block = raw[210 * b : 210 * b + 210]
        d = half_at(block, 208)
        for i in range(16):  # groups of 16
            scale = d * np.float32(signed(block[192 + i]))
            half, quarter, odd = i >> 3, i >> 1 & 3, i & 1
            lower = block[64 * half + 32 * (quarter & 1) + 16 * odd :]
            upper = block[128 + 32 * half + 16 * odd :]
            x, up, shift = (
                out[256 * b + 16 * i : 256 * b + 16 * i + 16],
                np.int32(2 * quarter),
                np.int32(quarter >> 1 << 2),
            )
            for k in range(16):
                q = np.int32(lower[k]) >> shift & np.int32(15) | (np.int32(upper[k]) >> up & np.int32(3)) << np.int32(4)
                x[k] = scale * np.float32(q - np.int32(32))


class _Q6_K(BlockStorage):
    name, block, bytes_per_block = "q6_k", 256, 210
    decode_row = staticmethod(decode_row)

    def encode_blocks_ref(self, x, importance):
        d, s, scale = kept_signed_ref(even_groups_ref(x, importance, TOP, STEPS), 127)
        groups = x.reshape(len(x), GROUPS, -1)
        q = nearest_ref(groups * inverse_ref(scale)[..., None], -TOP - 1, TOP) + np.float32(TOP + 1)
        q = q.astype(np.uint8).reshape(len(x), -1)
        lower, upper = in_bytes_ref(q & np.uint8(15), 64), bits_in_bytes_ref(q >> np.uint8(4), 32, 2)
        return np.hstack([lower, upper, s.view(np.uint8), d])

    def decode_blocks_ref(self, blocks):
        lower, upper, s, d = pieces_ref(blocks, 128, 64, 16)
        q = (nibbles_ref(lower, 64) | bits_ref(upper, 32, 2) << np.uint8(4)).reshape(-1, GROUPS, 16)
        scale = from_halves_ref(d) * s.view(np.int8).astype(np.float32)
        return (scale[..., None] * (q.astype(np.float32) - np.float32(TOP + 1))).reshape(len(blocks), -1)


STORAGE = _Q6_K()
