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
from ..engine.vectors import bits_of, float_from_bits
from .base import SIZE, Storage

__all__ = ["LARGEST_HALF", "STORAGE", "from_half", "to_half"]

UP = np.int32(13)  # bits from float16's significand to float32's
MOVED = np.int32(0x8FFFE000 - 2**32)  # where sign, exponent and significand then are; the sign was extended
SCALE = np.float32(2.0**112)
SPECIAL = np.float32(65536)
INFINITY = np.int32(0x7F800000)
TOO_LARGE = np.int32(0x47800000)  # 2^16; what is below and rounds up to it carries into infinity
SMALLEST = np.int32(0x38800000)  # 2^-14
LARGEST_HALF = 65504.0
ONE_HALF = np.float32(0.5)
BIASES = np.int32((127 - 15) << 23)


@helper
def from_half(bits):
    """Return the float32 of half precision's bits, an int32 that may be sign-extended."""
    moved = (bits << UP) & MOVED
    number = float_from_bits(moved) * SCALE
    return number if abs(number) < SPECIAL else float_from_bits(moved | INFINITY)


@helper
def to_half(x):
    """Return the bits of a float32 in half precision, rounded to nearest even, as an int32 from 0 to 65535."""
    bits = bits_of(x)
    size = bits & SIZE
    sign = (bits ^ size) >> np.int32(16) & np.int32(0x8000)
    if size >= TOO_LARGE:  # NaN is above infinity
        return sign | (np.int32(0x7E00) if size > INFINITY else np.int32(0x7C00))
    if size < SMALLEST:  # a multiple of 2^-24, as all float32 between 1/2 and 1 are
        return sign | bits_of(float_from_bits(size) + ONE_HALF) - bits_of(ONE_HALF)
    return sign | (size + (size >> UP & np.int32(1)) + np.int32(0xFFF) - BIASES) >> UP


@helper
def encode_row(raw, x, importance):
    """Turn a row of float32 into float16, as int16."""
    for k in range(x.size):
        half = to_half(x[k])
        raw[k] = np.int16(half - np.int32(65536) if half > np.int32(32767) else half)


@helper
def decode_row(out, raw):
    """Turn a row of float16, as int16, into float32."""
    for k in range(out.size):
        out[k] = from_half(np.int32(raw[k]))


class _Float16(Storage):
    name, dtype, bytes_per_block = "float16", np.dtype(np.float16), 2
    largest, exponent = LARGEST_HALF, 0x7C00
    read_by_streams = True
    decode_row, encode_row = staticmethod(decode_row), staticmethod(encode_row)

    def encode_ref(self, x, importance=None):
        with np.errstate(over="ignore"):
            return np.asarray(x, np.float32).astype(np.float16)

    def decode_ref(self, raw):
        return raw.astype(np.float32)


STORAGE = _Float16()
