"""IQ4_NL: 32 numbers in 18 bytes, 4.5 bits a number: sixteen values that are denser near zero.

bytes   0 1         2 ... 17
        d, a half   byte k: q_k in its lower half, q_(k + 16) in its upper

decode      x_k = d VALUES[q_k]
encode      q_k is the nearest; d is tried near the one that makes the number that is largest in size -127 d, each
            with the least-squares d of its rounding (`fits.py`), with weights x^2
"""

import numpy as np

from ..engine.jit import helper
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
from .fits import sum_ref, weights_ref

__all__ = ["STORAGE", "nearest_of", "nearest_of_ref"]

VALUES = np.array([-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113], np.float32)
RAISED = (VALUES + 128).astype(np.uint8)  # as whole numbers above 0
MIDDLES = (VALUES[:-1] + VALUES[1:]) / 2
STEPS = 127 + 4 * np.arange(-7, 8, dtype=np.float32)


def nearest_of_ref(x, middles):
    """Return how many of rising `middles` are below each x: the index of the nearest of the values they are between."""
    return np.searchsorted(middles, x).astype(np.uint8)


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
            q = block[2 + k]
            x[k] = d * VALUES[q & 15]
            upper[k] = d * VALUES[q >> 4]


@helper
def nearest_of(x, middles):
    """Return how many of rising `middles` are below x: the index of the nearest of the values that they are between."""
    q = np.int32(0)
    for middle in middles:
        q += np.int32(middle < x)
    return q


@helper
def encode_row(raw, x, importance):
    """Encode a row, block by block."""
    for b in range(x.size // 32):
        numbers, block = x[32 * b : 32 * b + 32], raw[18 * b : 18 * b + 18]
        mean = np.float32(0)
        for number in numbers:
            mean += number * number
        spread = np.float32(2) * (mean / np.float32(32))
        largest = largest_in_size(numbers)
        d, best = np.float32(0), np.float32(0)
        for step in STEPS:
            with_x, with_q, scale = np.float32(0), np.float32(0), over(-step, largest)
            for k in range(32):
                number = numbers[k]
                squared = number * number
                weight = importance[32 * b + k] * np.sqrt(spread + squared) if importance.size else squared
                kept = VALUES[nearest_of(number * scale, MIDDLES)]
                with_x += weight * number * kept
                with_q += weight * kept * kept
            trial = over(with_x, with_q)
            if trial * with_x > best:
                d, best = trial, trial * with_x
        inverse = over(np.float32(1), put_half(block, 0, d))
        for k in range(16):
            upper = nearest_of(numbers[k + 16] * inverse, MIDDLES) << np.int32(4)
            block[2 + k] = np.uint8(nearest_of(numbers[k] * inverse, MIDDLES) | upper)


def integers_of(block):
    """Emit whole numbers, scales and offsets of a block."""
    return [block.bytes(2, 16).nibbles().looked_up(RAISED)], [block.half(0)], None


class _IQ4_NL(BlockStorage):
    name, block, bytes_per_block = "iq4_nl", 32, 18
    zero = 128
    decode_row, encode_row = staticmethod(decode_row), staticmethod(encode_row)
    integers_of = staticmethod(integers_of)

    def encode_blocks_ref(self, x, importance):
        columns, weights = x.T, weights_ref(x, importance, self.block, True)
        largest = np.take_along_axis(x, np.abs(x).argmax(1)[:, None], 1)[:, 0]
        d, best = np.zeros_like(largest), np.zeros_like(largest)
        for step in STEPS:
            kept = VALUES[nearest_of_ref(columns * inverse_ref(largest, -step), MIDDLES)]
            with_x, with_q = (sum_ref(weights * other * kept) for other in (columns, kept))
            trial = np.divide(with_x, with_q, out=np.zeros_like(with_x), where=with_q != 0)
            better = trial * with_x > best
            d, best = np.where(better, trial, d), np.where(better, trial * with_x, best)
        d, packed = to_halves_ref(d)
        return np.hstack([packed, in_bytes_ref(nearest_of_ref(x * inverse_ref(d)[:, None], MIDDLES), 16)])

    def integers_blocks_ref(self, blocks):
        d, q = pieces_ref(blocks, 2)
        return RAISED[nibbles_ref(q, 16)], from_halves_ref(d), None


STORAGE = _IQ4_NL()
