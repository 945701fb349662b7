"""Q4_0: 32 numbers in 18 bytes, 4.5 bits a number.

bytes   0 1         2 ... 17
        d, a half   byte k: q_k in its lower half, q_(k + 16) in its upper

decode      x_k = d (q_k - 8),  0 <= q_k <= 15
encode      d = m / -8, where m is the number that is largest in size: it becomes -8 d, and what is as large on the
            other side 7 d;  q_k = x_k / d + 8, rounded to the nearest.  By importance: `fits.py`
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
    largest_in_size,
    nibbles_ref,
    over,
    pieces_ref,
    put_half,
    run_of,
    to_halves_ref,
)
from .fits import even_fit_ref, even_row, weights_ref

__all__ = ["STORAGE", "TRIED", "scale_ref", "scales_of", "shifted", "shifted_ref"]

TOP = 7
TRIED = np.arange(-9, 10, dtype=np.float32) * np.float32(0.1)  # tried beside top + 1 where there are weights
AROUND = TRIED + np.float32(TOP + 1)


def scale_ref(x, importance, top):
    """Return d (n,) of blocks (n, block) that are kept as -top - 1 ... top times d."""
    if importance is None:
        return np.take_along_axis(x, np.abs(x).argmax(1)[:, None], 1)[:, 0] / np.float32(-top - 1)
    return even_fit_ref(x.T, weights_ref(x, importance, x.shape[1], True), top, TRIED + np.float32(top + 1))


def shifted_ref(x, d, top):
    """Return x / d + top + 1, rounded to whole numbers and cut to 0 ... 2 top + 1; (n, block) uint8."""
    with np.errstate(invalid="ignore"):
        q = x * inverse_ref(d)[:, None] + (np.float32(top) + np.float32(1.5))
    return np.clip(np.trunc(q), 0, 2 * top + 1).astype(np.uint8)


@helper
def decode_row(out, raw):
    """Decode a row, block by block."""
    blocks = out.size // 32
    run = run_of(out.size, blocks, 2)
    for b in range(blocks):
        x, upper = out[32 * b : 32 * b + run], out[32 * b + run : 32 * b + 2 * run]
        block = raw[18 * b : 18 * b + 18]
        d = half_at(block, 0)
        for k in range(run):
            q = np.int32(block[2 + k])
            x[k] = d * np.float32((q & np.int32(15)) - np.int32(8))
            upper[k] = d * np.float32((q >> np.int32(4)) - np.int32(8))


@helper
def scales_of(x, importance, top, steps):
    """Return d of the blocks of a row x, kept as -top - 1 ... top times d; importance: of its columns, or empty."""
    scales = np.empty(x.size // 32 + LANES, np.float32)
    if importance.size:
        even_row(scales, x, importance, 32, 32, top, -top - 1, steps)
    else:
        for b in range(x.size // 32):
            scales[b] = largest_in_size(x[32 * b : 32 * b + 32]) / np.float32(-top - 1)
    return scales


@helper
def shifted(x, inverse, top):
    """Return x * inverse + top + 1 to the nearest whole number, cut to 0 ... 2 top + 1, as int32."""
    q = x * inverse + np.float32(top + 1.5)
    return np.int32(min(max(q, np.float32(0)), np.float32(2 * top + 1)))


@helper
def encode_row(raw, x, importance):
    """Encode a row, block by block."""
    scales = scales_of(x, importance, TOP, AROUND)
    blocks = x.size // 32
    run = run_of(x.size, blocks, 2)
    for b in range(blocks):
        numbers, others = x[32 * b : 32 * b + run], x[32 * b + run : 32 * b + 2 * run]
        block = raw[18 * b : 18 * b + 18]
        d = scales[b]
        inverse = over(np.float32(1), d)
        put_half(block, 0, d)
        for k in range(run):
            upper = shifted(others[k], inverse, TOP) << np.int32(4)
            block[2 + k] = np.uint8(shifted(numbers[k], inverse, TOP) | upper)


def integers_of(block):
    """Emit whole numbers, scales and offsets of a block."""
    return [block.bytes(2, 16).nibbles()], [block.half(0)], None


class _Q4_0(BlockStorage):
    name, block, bytes_per_block = "q4_0", 32, 18
    zero = 8
    decode_row, encode_row = staticmethod(decode_row), staticmethod(encode_row)
    integers_of = staticmethod(integers_of)

    def encode_blocks_ref(self, x, importance):
        d = scale_ref(x, importance, TOP)
        return np.hstack([to_halves_ref(d)[1], in_bytes_ref(shifted_ref(x, d, TOP), 16)])

    def integers_blocks_ref(self, blocks):
        d, q = pieces_ref(blocks, 2)
        return nibbles_ref(q, 16), from_halves_ref(d), None


STORAGE = _Q4_0()
