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
from ..engine.simd import LANES
from .blocks import (
    BlockStorage,
    bits_in_bytes_ref,
    bits_ref,
    from_halves_ref,
    half_at,
    in_bytes_ref,
    inverse_ref,
    largest_in_size,
    nearest_ref,
    nibbles_ref,
    over,
    pieces_ref,
    put_fields,
    put_half,
    put_nibbles,
    run_of,
    signed,
    to_halves_ref,
    whole,
)
from .fits import columns_ref, even_fit_ref, even_row, weights_ref

__all__ = ["STORAGE", "even_groups_ref", "kept_signed_ref", "put_signed_scales", "quantised_evenly"]

GROUPS = 16
TOP = 31
STEPS = np.arange(31.1, 32.95, 0.1, dtype=np.float32)


def even_groups_ref(x, importance, top, steps):
    """Return the scales (n, 16) of the groups of 16 numbers of blocks (n, 256), of either sign."""
    scale = even_fit_ref(columns_ref(x, GROUPS), weights_ref(x, importance, GROUPS, True), top, steps)
    return scale.reshape(len(x), -1)


def kept_signed_ref(scales, top):
    """Return d as two bytes, whole numbers from -top - 1 to top, and d times them: what is kept of scales (n, 16)."""
    largest = np.take_along_axis(scales, np.abs(scales).argmax(1)[:, None], 1)[:, 0]
    below = np.float32(-top - 1)
    whole = nearest_ref(scales * inverse_ref(largest, below)[:, None], below, top)
    d, packed = to_halves_ref(largest / below)
    return packed, whole.astype(np.int8), d[:, None] * whole


@helper
def decode_row(out, raw):
    """Decode a row, block by block."""
    blocks = out.size // 256
    run = run_of(out.size, blocks, 16)
    for b in range(blocks):
        block = raw[210 * b : 210 * b + 210]
        d = half_at(block, 208)
        for i in range(GROUPS):  # groups of 16
            scale = d * np.float32(signed(block[192 + i]))
            half, quarter, odd = i >> 3, i >> 1 & 3, i & 1
            lower = block[64 * half + 32 * (quarter & 1) + 16 * odd :]
            upper = block[128 + 32 * half + 16 * odd :]
            x, up, shift = (
                out[256 * b + 16 * i : 256 * b + 16 * i + 16],
                np.int32(2 * quarter),
                np.int32(quarter >> 1 << 2),
            )
            for k in range(run):
                q = np.int32(lower[k]) >> shift & np.int32(15) | (np.int32(upper[k]) >> up & np.int32(3)) << np.int32(4)
                x[k] = scale * np.float32(q - np.int32(32))


@helper
def put_signed_scales(raw, at, kept, scales, top):
    """Write d to raw[at], raw[at + 1]; scales become d times whole numbers, -top - 1 ... top, which go to `kept`."""
    largest, below = largest_in_size(scales), np.float32(-top - 1)
    inverse = over(below, largest)
    d = put_half(raw, at, largest / below)
    for g in range(scales.size):
        kept[g] = whole(scales[g] * inverse, -top - 1, top)
        scales[g] = d * np.float32(kept[g])


@helper
def quantised_evenly(q, x, scales, top, run):
    """Write the whole numbers of a block x, raised by top + 1, to q (256,) uint8; groups of `run` numbers."""
    for g in range(scales.size):
        inverse = over(np.float32(1), scales[g])
        numbers, group = x[run * g : run * g + run], q[run * g : run * g + run]
        for k in range(run):
            group[k] = np.uint8(whole(numbers[k] * inverse, -top - 1, top) + np.int32(top + 1))


@helper
def encode_row(raw, x, importance):
    """Encode a row: fit all groups, then block by block."""
    scales = np.empty(x.size // 16 + LANES, np.float32)
    even_row(scales, x, importance, 16, 256, TOP, -TOP - 1, STEPS)
    s, q = np.empty(GROUPS, np.int32), np.empty(256, np.uint8)
    blocks = x.size // 256
    run = run_of(x.size, blocks, GROUPS)
    for b in range(blocks):
        block, own = raw[210 * b : 210 * b + 210], scales[16 * b : 16 * b + 16]
        put_signed_scales(block, 208, s, own, 127)
        quantised_evenly(q, x[256 * b : 256 * b + 256], own, TOP, run)
        put_nibbles(block[:128], q, 64)
        put_fields(block[128:], q, 32, 2, 4)
        for g in range(GROUPS):
            block[192 + g] = np.uint8(s[g] & np.int32(255))


def integers_of(block):
    """Emit whole numbers, scales and offsets of a block."""
    q = []
    for half in range(2):
        (low, high), upper = (block.bytes(64 * half + 32 * i, 32) for i in range(2)), block.bytes(128 + 32 * half, 32)
        lower = low & 15, high & 15, low >> 4, high >> 4
        q += [part | (upper >> 2 * i & 3) << 4 for i, part in enumerate(lower)]
    return q, [block.bytes(192, 16).signed() * block.half(208)], None


class _Q6_K(BlockStorage):
    name, block, bytes_per_block = "q6_k", 256, 210
    halves = (208,)
    group, zero = 16, TOP + 1
    decode_row, encode_row = staticmethod(decode_row), staticmethod(encode_row)
    integers_of = staticmethod(integers_of)

    def encode_blocks_ref(self, x, importance):
        d, s, scale = kept_signed_ref(even_groups_ref(x, importance, TOP, STEPS), 127)
        groups = x.reshape(len(x), GROUPS, -1)
        q = nearest_ref(groups * inverse_ref(scale)[..., None], -TOP - 1, TOP) + np.float32(TOP + 1)
        q = q.astype(np.uint8).reshape(len(x), -1)
        lower, upper = in_bytes_ref(q & np.uint8(15), 64), bits_in_bytes_ref(q >> np.uint8(4), 32, 2)
        return np.hstack([lower, upper, s.view(np.uint8), d])

    def integers_blocks_ref(self, blocks):
        lower, upper, s, d = pieces_ref(blocks, 128, 64, 16)
        q = nibbles_ref(lower, 64) | bits_ref(upper, 32, 2) << np.uint8(4)
        return q, from_halves_ref(d) * s.view(np.int8).astype(np.float32), None


STORAGE = _Q6_K()
