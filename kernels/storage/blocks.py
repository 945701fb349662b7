"""Storages of blocks: some numbers along a row share a scale, and are kept in few bits each, as GGUF files have them.

    raw (M, K / block * bytes)  uint8      a row is its blocks, one after the other

A file of this kind says what a block holds, and has twice what turns it into numbers and back: in NumPy for many blocks
at once (`integers_blocks_ref`, `encode_blocks_ref`: the definition), and as a Numba helper for a row.

In every one of them a number is a whole number, times a scale that it shares with a group of neighbours:

    x_k = scale_g (q_k - zero) - offset_g      0 <= q_k <= 255, zero the same for the whole storage; most have no offset

`integers_blocks_ref` says what q, scale and offset are, and `integers_of` emits the same for products of whole numbers
(`integer_matmul.py`), which have no time to lose.
"""

from collections.abc import Callable
from typing import Any

import numpy as np

from ..engine.jit import helper
from ..engine.vectors import bits_of, float_from_bits
from .base import SIZE, Storage
from .float16 import LARGEST_HALF, from_half, to_half

__all__ = [
    "BlockStorage",
    "bits_in_bytes_ref",
    "bits_ref",
    "from_halves_ref",
    "half_at",
    "in_bytes_ref",
    "inverse_ref",
    "largest_in_size",
    "least_and_largest",
    "nearest_ref",
    "nibbles_ref",
    "over",
    "pieces_ref",
    "put_fields",
    "put_half",
    "put_nibbles",
    "run_of",
    "signed",
    "to_halves_ref",
    "whole",
]

# -- reference: parts of blocks, (n, bytes) uint8 ----------------------------------------------


def pieces_ref(blocks, *sizes):
    """Return consecutive pieces of blocks, `sizes` bytes each; the last one is what is left."""
    return np.split(blocks, np.cumsum(sizes), axis=1)


def from_halves_ref(pairs):
    """Return the numbers (n, 1) float32 of half precision that two bytes (n, 2), little-endian, are."""
    return np.ascontiguousarray(pairs).view("<f2").astype(np.float32)


def to_halves_ref(numbers):
    """Return float32 (n,) as it is kept in half precision, at most the largest half, and its two bytes (n, 2)."""
    kept = np.clip(numbers, np.float32(-LARGEST_HALF), np.float32(LARGEST_HALF)).astype("<f2")
    return kept.astype(np.float32), kept[:, None].view(np.uint8)


def nibbles_ref(packed, run):
    """Return the half-bytes of packed (n, bytes), `run` bytes at a time: the lower halves of these, then the upper."""
    runs = packed.reshape(len(packed), -1, 1, run)
    return (runs >> np.array([[0], [4]], np.uint8) & np.uint8(15)).reshape(len(packed), -1)


def in_bytes_ref(numbers, run):
    """Return the reverse of `nibbles_ref`, of numbers (n, count) below 16."""
    low, high = np.moveaxis(numbers.astype(np.uint8).reshape(len(numbers), -1, 2, run), 2, 0)
    return (low | high << np.uint8(4)).reshape(len(numbers), -1)


def bits_ref(packed, run, width=1):
    """Return fields of `width` bits of packed (n, bytes), `run` bytes at a time: their lowest fields, then the next."""
    shifts = np.arange(0, 8, width, dtype=np.uint8)[:, None]
    runs = packed.reshape(len(packed), -1, 1, run)
    return (runs >> shifts & np.uint8((1 << width) - 1)).reshape(len(packed), -1)


def bits_in_bytes_ref(numbers, run, width=1):
    """Return the reverse of `bits_ref`, of numbers (n, count) below 2 ** width."""
    shifts = np.arange(0, 8, width, dtype=np.uint8)[:, None]
    runs = numbers.astype(np.uint8).reshape(len(numbers), -1, 8 // width, run)
    return np.bitwise_or.reduce(runs << shifts, axis=2).reshape(len(numbers), -1)


def nearest_ref(x, low, top):
    """Return the nearest whole numbers, ties to even, cut to low <= q <= top; float32."""
    return np.clip(np.rint(x), np.float32(low), np.float32(top))


def inverse_ref(d, top=1):
    """Return top / d, 0 where that is no float32: of a d that is 0 or so small that no half keeps it."""
    with np.errstate(divide="ignore", over="ignore"):
        inverse = np.float32(top) / d
    return np.where(np.isinf(inverse), np.float32(0), inverse)


# -- helpers of kernels: a block is raw from its first byte on -----------------------------------


@helper
def run_of(numbers, blocks, parts):
    """Return the length of one of `parts` runs of a block, of a row of `numbers` in blocks.

    As a constant it would be the same number, but loops over sixteen are then unrolled, and never become vectors.
    """
    return numbers // max(blocks * parts, 1)


@helper
def over(numerator, x):
    """Return numerator / x, 0 where x is 0 or the quotient is no float32."""
    quotient = numerator / x if x != 0 else np.float32(0)
    return quotient if abs(quotient) < np.float32(np.inf) else np.float32(0)


# Floats are compared as whole numbers, in whose maximum a compiler need not keep an order, so that it makes vectors.


@helper
def largest_in_size(x):
    """Return the number that is largest in size, the first of equals; x is not empty, and shorter than 2^31."""
    found = np.int64(0)
    for k in range(x.size):
        bits = np.int64(bits_of(x[k]))
        found = max(found, (bits & np.int64(SIZE)) << np.int64(32) | (np.int64(SIZE) - np.int64(k)))
    return x[np.int64(SIZE) - (found & np.int64(SIZE))]


@helper
def least_and_largest(x):
    """Return both, of x that is not empty and has no NaN; no zero is -0."""
    least, largest = SIZE, -SIZE
    for k in range(x.size):
        bits = bits_of(x[k])
        rising = bits ^ (bits >> np.int32(31) & SIZE)  # as whole numbers in the order of the floats
        least, largest = min(least, rising), max(largest, rising)
    least, largest = least ^ (least >> np.int32(31) & SIZE), largest ^ (largest >> np.int32(31) & SIZE)
    return float_from_bits(least) + np.float32(0), float_from_bits(largest) + np.float32(0)


@helper
def whole(x, low, top):
    """Return the nearest whole number, of equally near ones the even, cut to low <= q <= top, as int32."""
    return np.int32(min(max(np.rint(x), np.float32(low)), np.float32(top)))


@helper
def put_nibbles(packed, q, run):
    """Write the lower four bits of q, 2 * run at a time: `run` bytes with the first of them below the others."""
    for first in range(0, q.size, 2 * run):
        numbers, to = q[first : first + 2 * run], packed[first // 2 : first // 2 + run]
        for k in range(run):
            to[k] = np.uint8(
                np.int32(numbers[k]) & np.int32(15) | (np.int32(numbers[k + run]) & np.int32(15)) << np.int32(4)
            )


@helper
def put_fields(packed, q, run, width, shift):
    """Write `width` bits of q, from bit `shift` on, 8 / width * run at a time, to `run` bytes: the first lowest."""
    fields, mask = 8 // width, np.int32((1 << width) - 1)
    for first in range(0, q.size, fields * run):
        numbers, to = q[first : first + fields * run], packed[first // fields : first // fields + run]
        for k in range(run):
            byte = np.int32(0)
            for i in range(fields):
                byte |= (np.int32(numbers[k + i * run]) >> np.int32(shift) & mask) << np.int32(width * i)
            to[k] = np.uint8(byte)


@helper
def signed(byte):
    """Return the number that a byte is as int8."""
    return (np.int32(byte) ^ np.int32(128)) - np.int32(128)


@helper
def half_at(raw, at):
    """Return the float32 of the two bytes raw[at], raw[at + 1]."""
    return from_half(signed(raw[at + 1]) << np.int32(8) | np.int32(raw[at]))


@helper
def put_half(raw, at, x):
    """Write x in half precision, at most the largest, to the two bytes raw[at], raw[at + 1]; return what they keep."""
    bits = to_half(min(max(x, np.float32(-LARGEST_HALF)), np.float32(LARGEST_HALF)))
    raw[at], raw[at + 1] = np.uint8(bits & np.int32(255)), np.uint8(bits >> np.int32(8))
    return half_at(raw, at)


# -- the class -----------------------------------------------------------------------------------


class BlockStorage(Storage):
    """What storages of blocks have in common."""

    dtype = np.dtype(np.uint8)
    largest = LARGEST_HALF  # what a scale or a least number is at most; a fit may find a little more, which is cut
    weighted = True
    halves: tuple[int, ...] = (0,)  # where in a block its halves begin: what is kept is finite where they are
    group = 32  # numbers that share a scale: 32 or 16
    zero = 0  # the whole number that stands for 0, or for -offset
    offsets = False  # whether groups have an offset, too; zero is 0 then
    # Static: integers_of(block), an `engine.spread.Block`, returns lists of vectors: q, scale, and offset or None.
    integers_of: Callable[..., Any]

    def encode_blocks_ref(self, x, importance):
        """Return (n, bytes_per_block) uint8 of x (n, block) float32; importance: weights alike, or None."""
        raise NotImplementedError

    def integers_blocks_ref(self, blocks):
        """Return q (n, block) uint8, scale (n, block / group) float32, and offset, the same or None, of raw blocks."""
        raise NotImplementedError

    def integers_ref(self, raw):
        """Return q (M, K) uint8, scale (M, K / group) float32, and offset, the same or None."""
        blocks = np.ascontiguousarray(raw).reshape(-1, self.bytes_per_block)
        parts = self.integers_blocks_ref(blocks)
        return tuple(None if part is None else part.reshape(len(raw), -1) for part in parts)

    def decode_blocks_ref(self, blocks):
        """Return (n, block) float32 of (n, bytes_per_block) uint8."""
        q, scale, offset = self.integers_blocks_ref(blocks)
        q = q.reshape(len(q), -1, self.group).astype(np.float32) - np.float32(self.zero)
        x = scale[..., None] * q
        return (x if offset is None else x - offset[..., None]).reshape(len(blocks), -1)

    def nonfinite_rows(self, raw):
        upper = raw.reshape(len(raw), -1, self.bytes_per_block)[:, :, [at + 1 for at in self.halves]]
        return (upper & np.uint8(0x7C) == 0x7C).any((1, 2))

    def encode_ref(self, x, importance=None):
        rows = np.asarray(x, np.float32)
        shape = len(rows), self.items(rows.shape[1])
        if not rows.size:
            return np.empty(shape, self.dtype)
        weights = self.weights(importance, rows.shape[1])
        if weights is not None:
            weights = np.broadcast_to(weights, rows.shape).reshape(-1, self.block)
        with np.errstate(all="ignore"):  # of numbers whose squares are no float32; a fit then finds nothing better
            return self.encode_blocks_ref(rows.reshape(-1, self.block), weights).reshape(shape)

    def decode_ref(self, raw):
        if not raw.size:
            return np.empty((len(raw), self.columns(raw)), np.float32)
        blocks = np.ascontiguousarray(raw).reshape(-1, self.bytes_per_block)
        return self.decode_blocks_ref(blocks).reshape(len(raw), self.columns(raw))
