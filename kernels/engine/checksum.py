"""A checksum of weights, in the time of reading them once: whether they are still what something was computed with.

    checksum(*arrays)      bytes that differ where a number, or its place, differs

Of the 32-bit words w_i of an array, blocks of SUMMED words are summed up as w_i m_i modulo 2^64, with an odd number m_i
that its place decides.  One changed word always changes the sum; of other changes, one in 2^32 or fewer goes unseen.
It is no protection against somebody who wants to deceive.
"""

import hashlib

import numpy as np

from .jit import JIT, kernel, prange

__all__ = ["checksum", "checksum_ref"]

SUMMED = 65536  # words of a sum
MIX = 2654435761  # 2^32 over the golden ratio, as in Knuth's multiplicative hashing


def checksum_ref(words: np.ndarray) -> np.ndarray:
    """Return the sums of the blocks of words (P,) uint32, uint64."""
    factors = (np.arange(len(words), dtype=np.uint64) * np.uint64(MIX)) & np.uint64(0xFFFFFFFF) | np.uint64(1)
    terms = words.astype(np.uint64) * factors
    return np.array([terms[at : at + SUMMED].sum(dtype=np.uint64) for at in range(0, len(words), SUMMED)], np.uint64)


@kernel
def _checksum(sums, words):
    """Write the sums (blocks,) uint64 of words (P,) uint32."""
    for block in prange(sums.size):
        start = np.int64(block) * SUMMED
        some = words[start : min(start + SUMMED, words.size)]
        total = np.uint64(0)
        factor = np.uint32(start * MIX)
        for i in range(some.size):
            total += np.uint64(some[i]) * np.uint64(factor | np.uint32(1))
            factor = np.uint32(factor + np.uint32(MIX))
        sums[block] = total


def checksum(*arrays: np.ndarray) -> bytes:
    """Return 32 bytes that stand for the contents of some arrays, in this order."""
    digest = hashlib.sha256()
    for array in arrays:
        octets = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
        whole = octets.size // 4 * 4
        words = octets[:whole].view(np.uint32)
        sums = np.zeros(-(-words.size // SUMMED), np.uint64)
        if JIT:
            _checksum(sums, words)
        else:
            sums = checksum_ref(words)
        digest.update(np.array([octets.size]).tobytes() + sums.tobytes() + octets[whole:].tobytes())
    return digest.digest()
