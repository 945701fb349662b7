"""float32: the numbers as they are, four bytes each, little-endian IEEE 754 single precision.

raw (M, K) float32      products read it as it is
"""

import numpy as np

from ..engine.jit import helper
from .base import Storage

__all__ = ["STORAGE"]


@helper
def decode_row(out, raw):
    """Copy a row."""
    for k in range(out.size):
        out[k] = raw[k]


@helper
def encode_row(raw, x, importance):
    """Copy a row."""
    for k in range(x.size):
        raw[k] = x[k]


class _Float32(Storage):
    name, dtype, bytes_per_block, read_by_products = "float32", np.dtype(np.float32), 4, True
    read_by_streams = True
    decode_row, encode_row = staticmethod(decode_row), staticmethod(encode_row)

    def encode_ref(self, x, importance=None):
        return np.asarray(x, np.float32)

    def decode_ref(self, raw):
        return raw


STORAGE = _Float32()
