"""MXFP4: 32 numbers in 17 bytes, 4.25 bits a number (OCP Microscaling Formats, 1.0): sixteen values of four bits.

bytes   0                       1 ... 16
        e, a power of two       byte k: q_k in its lower half, q_(k + 16) in its upper

bits of q       3: sign      2 1: exponent      0: significand          0, 1/2, 1, 3/2, 2, 3, 4, 6 and the same below 0

decode      x_k = 2^(e - 127) VALUE[q_k]; as GGUF keeps it, 2^(e - 128) times twice the value, a whole number
encode      2^(e - 127) is the largest power of two that is at most a quarter of max |x|: so that is 4 to 8 of them
"""

import numpy as np

from ..engine.jit import helper
from ..engine.vectors import bits_of, float_from_bits
from .base import Storage
from .blocks import BlockStorage, in_bytes_ref, largest_in_size, nibbles_ref, pieces_ref, run_of
from .iq4_nl import nearest_of, nearest_of_ref

__all__ = ["STORAGE"]

SIZES = np.array([0, 1, 2, 3, 4, 6, 8, 12], np.float32)  # twice the values
MIDDLES = (SIZES[:-1] + SIZES[1:]) / 2
VALUES = np.concatenate([SIZES, 0 - SIZES])  # the second zero is +0 here as well
RAISED = (VALUES + 12).astype(np.uint8)  # as whole numbers from 0 on
BIAS = 128  # of the exponent, for twice the values


@helper
def decode_row(out, raw):
    """Decode a row, block by block."""
    blocks = out.size // 32
    run = run_of(out.size, blocks, 2)
    for b in range(blocks):
        x, upper = out[32 * b : 32 * b + run], out[32 * b + run : 32 * b + 2 * run]
        block = raw[17 * b : 17 * b + 17]
        e = np.int32(block[0])  # 2^(e - 128): of e < 2 a subnormal number
        d = float_from_bits(e - np.int32(1) << np.int32(23) if e > 1 else np.int32(1) << np.int32(21) + e)
        for k in range(run):
            q = block[1 + k]
            x[k] = d * VALUES[q & 15]
            upper[k] = d * VALUES[q >> 4]


@helper
def power_of_two(exponent):
    """Return 2^exponent, -149 to 127."""
    if exponent < -126:
        return float_from_bits(np.int32(1) << np.int32(exponent + 149))
    return float_from_bits(np.int32(exponent + 127) << np.int32(23))


@helper
def encode_row(raw, x, importance):
    """Encode a row, block by block."""
    for b in range(x.size // 32):
        numbers, block = x[32 * b : 32 * b + 32], raw[17 * b : 17 * b + 17]
        largest = abs(largest_in_size(numbers))
        exponent = (bits_of(largest) >> np.int32(23)) - np.int32(127)  # of a subnormal number -127, which is low enough
        e = min(max(exponent - np.int32(2 - BIAS + 1), np.int32(0)), np.int32(254)) if largest > 0 else np.int32(0)
        half, other = (BIAS - e) // 2, BIAS - e - (BIAS - e) // 2  # 2^128 is no float32
        for k in range(16):
            low, high = numbers[k], numbers[k + 16]
            q = nearest_of(abs(low) * power_of_two(half) * power_of_two(other), MIDDLES) | np.int32(8) * np.int32(
                low < 0
            )
            p = nearest_of(abs(high) * power_of_two(half) * power_of_two(other), MIDDLES) | np.int32(8) * np.int32(
                high < 0
            )
            block[1 + k] = np.uint8(q | p << np.int32(4))
        block[0] = np.uint8(e)


def integers_of(block):
    """Emit whole numbers, scales and offsets of a block."""
    return [block.bytes(1, 16).nibbles().looked_up(RAISED)], [block.power_of_two(0, BIAS)], None


class _MXFP4(BlockStorage):
    name, block, bytes_per_block = "mxfp4", 32, 17
    largest, weighted = Storage.largest, False
    zero = 12
    decode_row, encode_row = staticmethod(decode_row), staticmethod(encode_row)
    nonfinite_rows = Storage.nonfinite_rows  # its scale may also be too large for six times it to be a float32
    integers_of = staticmethod(integers_of)

    def encode_blocks_ref(self, x, importance):
        largest = np.abs(x).max(1)
        exponent = np.frexp(largest)[1] - 1  # the largest power of two that is at most this
        e = np.where(largest > 0, np.clip(exponent - 2 + BIAS - 1, 0, 254), 0)
        scaled = np.ldexp(x, (BIAS - e)[:, None])
        q = nearest_of_ref(np.abs(scaled), MIDDLES) + np.uint8(8) * (scaled < 0)
        return np.hstack([e[:, None].astype(np.uint8), in_bytes_ref(q, 16)])

    def integers_blocks_ref(self, blocks):
        e, q = pieces_ref(blocks, 1)
        return RAISED[nibbles_ref(q, 16)], np.ldexp(np.float32(1), e.astype(np.int32) - BIAS), None


STORAGE = _MXFP4()
