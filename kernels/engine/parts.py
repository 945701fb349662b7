"""Parts: a float32 as a sum of bfloat16 numbers, of whose products the product of two float32 is made.

    x1 = round(x)    x2 = round(x - x1)    x3 = x - x1 - x2        x = x1 + x2 + x3, and every difference is exact

With u the distance from x to its neighbours, 2^23 u <= |x| < 2^24 u, what x1 leaves is at most 2^15 u and a multiple of
u, so x2 leaves at most 2^6 u, which has 7 bits: the third part leaves nothing.  Two parts leave at most 2^-17 |x|.

    BF16X3    x y = x1 y1 + x1 y2 + x2 y1                              + a rest of at most 2^-15 |x y|
    BF16X6    x y = x1 y1 + x1 y2 + x2 y1 + x2 y2 + x1 y3 + x3 y1      + a rest of at most 2^-24 |x y|

for |x2| <= 2^-8 |x| and |x3| <= 2^-17 |x| (Henry, Tang and Heinecke 2019, "Leveraging the bfloat16 Artificial
Intelligence Datatype For Higher-Precision Computations").  A processor that multiplies bfloat16 many times as fast as
float32 makes float32 products faster by them.

All parts but the last are kept finite: next to the largest float32, rounding to nearest would make x1 infinite and the
rest of x the opposite.  So a finite x is the sum of finite parts, an infinite one has an infinite last part, and NaN
has NaN in all.  Below 2^-103 parts are denormal numbers, which matrix units take for zero: an operand then loses at
most 2^-125.
"""

import numpy as np

from .halves import bf16_bits, round_to_bf16_ref
from .simd import F32, each, of_shape

__all__ = ["bf16_parts", "bf16_parts_ref", "joined"]

LARGEST = np.uint32(0x7F7F0000).view(np.float32)  # of bfloat16


# -- reference -----------------------------------------------------------------------------------


def bf16_parts_ref(x, count, flushed=lambda rest: rest):
    """Return `count` arrays, float32 that hold bfloat16, whose sum is float32 x, or as near as so many come to it.

    `flushed(rest)` is what the second part on are made of: matrix units take denormal numbers for zero.
    """
    parts, rest = [], np.asarray(x, np.float32)
    with np.errstate(invalid="ignore", over="ignore"):
        for index in range(count):
            part = round_to_bf16_ref(rest)
            if index < count - 1:
                part = np.clip(part, -LARGEST, LARGEST)
            parts.append(part)
            rest = flushed(rest - part)
    return parts


# -- LLVM ----------------------------------------------------------------------------------------


def bf16_parts(builder, x, count):
    """Return the parts of float32 x, one or a vector: bfloat16 in the lower half of each int32, zeros above."""
    parts, rest = [], x
    for index in range(count):
        bits = bf16_bits(builder, rest)
        kind = bits.type
        if index < count - 1:
            size = builder.and_(bits, each(0x7FFF, kind))
            infinite = builder.icmp_unsigned("==", size, each(0x7F80, kind))
            bits = builder.select(infinite, builder.sub(bits, each(1, kind)), bits)
            rest = builder.fsub(rest, _widened(builder, bits))
        parts.append(bits)
    return parts


def joined(builder, parts):
    """Return the sum of parts, float32; exact for two, but infinite where they end up within 2^-17 of the largest."""
    total = _widened(builder, parts[0])
    for bits in parts[1:]:
        total = builder.fadd(total, _widened(builder, bits))
    return total


def _widened(builder, bits):
    return builder.bitcast(builder.shl(bits, each(16, bits.type)), of_shape(bits.type, F32))
