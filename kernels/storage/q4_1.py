"""Q4_1: 32 numbers in 20 bytes, 5 bits a number.

bytes   0 1         2 3         4 ... 19
        d, a half   m, a half   byte k: q_k in its lower half, q_(k + 16) in its upper

decode      x_k = d q_k + m,  0 <= q_k <= 15
encode      m is the least number, d = (largest - m) / 15;  q_k = (x_k - m) / d, rounded to the nearest.
            By importance: `fits.py`, m at most 0
"""

import numpy as np

from ..engine.jit import helper
from ..engine.simd import LANES
from .blocks import (
    BlockStorage,
    from_halves_ref,
    half_at,
    in_bytes_ref,
    inverse_ref,
    least_and_largest,
    nibbles_ref,
    over,
    pieces_ref,
    put_half,
    run_of,
    to_halves_ref,
)
from .fits import affine_fit_ref, affine_row, weights_ref

__all__ = ["STORAGE", "TRIED", "above", "from_least_ref", "scale_and_least_ref", "scales_and_leasts"]

TOP = 15
TRIED = np.arange(-18, 19, dtype=np.float32) * np.float32(0.05)  # tried beside top where there are weights
AROUND = TRIED + np.float32(TOP)


def scale_and_least_ref(x, importance, top):
    """Return d and m (n,) of blocks (n, block) that are kept as 0 ... top times d above m."""
    if importance is None:
        return (x.max(1) - x.min(1)) / np.float32(top), x.min(1) + np.float32(0)  # no -0
    weights = weights_ref(x, importance, x.shape[1], False)
    scale, offset = affine_fit_ref(x.T, weights, top, TRIED + np.float32(top))
    return scale, -offset


def from_least_ref(x, d, m, top):
    """Return (x - m) / d, rounded to whole numbers and cut to 0 ... top; (n, block) uint8."""
    with np.errstate(invalid="ignore"):
        q = (x - m[:, None]) * inverse_ref(d)[:, None] + np.float32(0.5)
    return np.clip(np.trunc(q), 0, top).astype(np.uint8)


@helper
def decode_row(out, raw):
    """Decode a row, block by block."""
    blocks = out.size // 32
    run = run_of(out.size, blocks, 2)
    for b in range(blocks):
        x, upper = out[32 * b : 32 * b + run], out[32 * b + run : 32 * b + 2 * run]
        block = raw[20 * b : 20 * b + 20]
        d, m = half_at(block, 0), half_at(block, 2)
        for k in range(run):
            q = np.int32(block[4 + k])
            x[k] = d * np.float32(q & np.int32(15)) + m
            upper[k] = d * np.float32(q >> np.int32(4)) + m


@helper
def scales_and_leasts(x, importance, top, steps):
    """Return d and m of the blocks of a row x, kept as 0 ... top times d above m; importance as in `scales_of`."""
    scales, leasts = np.empty(x.size // 32 + LANES, np.float32), np.empty(x.size // 32 + LANES, np.float32)
    if importance.size:
        affine_row(scales, leasts, x, importance, 32, 32, top, steps)
    for b in range(x.size // 32):
        if importance.size:
            leasts[b] = -leasts[b]
        else:
            least, largest = least_and_largest(x[32 * b : 32 * b + 32])
            scales[b], leasts[b] = (largest - least) / np.float32(top), least
    return scales, leasts


@helper
def above(x, inverse, m, top):
    """Return (x - m) * inverse to the nearest whole number, cut to 0 ... top, as int32."""
    q = (x - m) * inverse + np.float32(0.5)
    return np.int32(min(max(q, np.float32(0)), np.float32(top)))


@helper
def encode_row(raw, x, importance):
    """Encode a row, block by block."""
    scales, leasts = scales_and_leasts(x, importance, TOP, AROUND)
    blocks = x.size // 32
    run = run_of(x.size, blocks, 2)
    for b in range(blocks):
        numbers, others = x[32 * b : 32 * b + run], x[32 * b + run : 32 * b + 2 * run]
        block = raw[20 * b : 20 * b + 20]
        d, m = scales[b], leasts[b]
        inverse = over(np.float32(1), d)
        put_half(block, 0, d)
        put_half(block, 2, m)
        for k in range(run):
            upper = above(others[k], inverse, m, TOP) << np.int32(4)
            block[4 + k] = np.uint8(above(numbers[k], inverse, m, TOP) | upper)


def integers_of(block):
    """Emit whole numbers, scales and offsets of a block."""
    return [block.bytes(4, 16).nibbles()], [block.half(0)], [-block.half(2)]


class _Q4_1(BlockStorage):
    name, block, bytes_per_block = "q4_1", 32, 20
    halves = (0, 2)
    offsets = True
    decode_row, encode_row = staticmethod(decode_row), staticmethod(encode_row)
    integers_of = staticmethod(integers_of)

    def encode_blocks_ref(self, x, importance):
        d, m = scale_and_least_ref(x, importance, TOP)
        q = in_bytes_ref(from_least_ref(x, d, m, TOP), 16)
        return np.hstack([to_halves_ref(d)[1], to_halves_ref(m)[1], q])

    def integers_blocks_ref(self, blocks):
        d, m, q = pieces_ref(blocks, 2, 2)
        return nibbles_ref(q, 16), from_halves_ref(d), -from_halves_ref(m)


STORAGE = _Q4_1()
