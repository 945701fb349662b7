"""float16: IEEE 754 half precision, two bytes a number.

bit     15      14 ... 10     9 ... 0
        sign s  exponent e    significand f

e from 1 to 30      (-1)^s 2^(e - 15) (1 + f / 1024)        e = 0       (-1)^s 2^-14 f / 1024
e = 31              infinity if f = 0, else NaN

encode      the nearest of both neighbours, of equally near ones the even; beyond 65504 infinity
decode      exact: exponent and significand are moved to where float32 has its own, 13 bits up, which gives the
            number times 2^-112, because the exponents count from -15 and from -127.  The product with 2^112 is
            right for e = 0 as well: what is moved is then a subnormal float32.  Infinity and NaN come out as
            65536 and more; they get the exponent that means them in float32

raw (M, K) float16
"""

import numpy as np

from ..engine.jit import helper
from ..engine.vectors import float_from_bits
from .base import Storage

__all__ = ["STORAGE", "from_half"]

UP = np.int32(13)  # bits from float16's significand to float32's
MOVED = np.int32(0x8FFFE000 - 2**32)  # where sign, exponent and significand then are; the sign was extended
SCALE = np.float32(2.0**112)
SPECIAL = np.float32(65536)
INFINITY = np.int32(0x7F800000)


@helper
def from_half(bits):
    """Return the float32 of half precision's bits, an int32 that may be sign-extended."""
    moved = (bits << UP) & MOVED
    number = float_from_bits(moved) * SCALE
    return number if abs(number) < SPECIAL else float_from_bits(moved | INFINITY)


@helper
def decode_row(out, raw):
    """Turn a row of float16, as int16, into float32."""
    for k in range(out.size):
        out[k] = from_half(np.int32(raw[k]))


class _Float16(Storage):
    name, dtype, bytes_per_block = "float16", np.dtype(np.float16), 2
    decode_row = staticmethod(decode_row)

    def encode_ref(self, x):
        with np.errstate(over="ignore"):
            return np.asarray(x, np.float32).astype(np.float16)

    def decode_ref(self, raw):
        return raw.astype(np.float32)


STORAGE = _Float16()
