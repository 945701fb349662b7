"""bfloat16: the upper half of a float32, two bytes a number.

bit     15      14 ... 7      6 ... 0
        sign    exponent      significand, of which the leading 1 is not kept

encode      the nearest of both neighbours, of equally near ones the even: add 0x7FFF and the last bit that is kept,
            and drop the lower half; NaN stays NaN (its quiet bit is set first: all that tell it may be dropped)
decode      a lower half of zeros; exact

raw (M, K) uint16, as NumPy has no such type       products read it as it is
"""

import numpy as np

from ..engine.halves import as_element, as_float, round_to_bf16_ref, widen_bf16_ref
from ..engine.jit import helper
from ..engine.parts import LARGEST
from .base import Storage

__all__ = ["STORAGE"]


@helper
def decode_row(out, raw):
    """Widen a row."""
    for k in range(out.size):
        out[k] = as_float(raw[k])


@helper
def encode_row(raw, x, importance):
    """Round a row."""
    for k in range(x.size):
        raw[k] = as_element(raw, x[k])


class _BFloat16(Storage):
    name, dtype, bytes_per_block, read_by_products = "bf16", np.dtype(np.uint16), 2, True
    read_by_streams = True
    largest, exponent = float(LARGEST), 0x7F80
    decode_row, encode_row = staticmethod(decode_row), staticmethod(encode_row)

    def encode_ref(self, x, importance=None):
        return (round_to_bf16_ref(x).view(np.uint32) >> np.uint32(16)).astype(np.uint16)

    def decode_ref(self, raw):
        return widen_bf16_ref(raw)


STORAGE = _BFloat16()
