"""The order of an epoch: a keyed permutation that needs no memory, however many rows there are.

    permute(position, size, seed, epoch) -> row        a bijection of 0 .. size - 1 for each (seed, epoch)

An array of shuffled row numbers would cost 8 bytes a row and would have to be made again for each resume.  A block
cipher on the set {0 .. size - 1} gives the row at any position directly:

    Feistel    x = (left, right); in turn  left ^= F(right, key),  right ^= F(left, key).  Each round undoes itself,
               so the whole is a bijection of 2^bits numbers whatever F is (Luby & Rackoff, SIAM J. Comput. 17, 1988).
    walking    where the result is not below size, encrypt again.  The cycle through a number below size comes back
               below size, so this ends, and it stays a bijection (Black & Rogaway, "Ciphers with Arbitrary Finite
               Domains", CT-RSA 2002).  bits is the least that fits (2 or more), so two encryptions do on average.
    F          the finaliser of splitmix64 (Steele, Lea & Flood, "Fast Splittable Pseudorandom Number Generators",
               OOPSLA 2014, with Stafford's variant 13 constants).

This is for mixing, not for secrecy.
"""

import numpy as np
import numpy.typing as npt

ROUNDS = 8  # 4 give Luby and Rackoff's bound; small halves (a few hundred rows) want more

_MASK = (1 << 64) - 1
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)  # 2^64 / golden ratio: the step of splitmix64
_MULTIPLY_1 = np.uint64(0xBF58476D1CE4E5B9)
_MULTIPLY_2 = np.uint64(0x94D049BB133111EB)

Words = npt.NDArray[np.uint64]


def _mix(z: Words) -> Words:
    """Return the splitmix64 finaliser of each word (n,)."""
    z = (z ^ (z >> np.uint64(30))) * _MULTIPLY_1
    z = (z ^ (z >> np.uint64(27))) * _MULTIPLY_2
    return z ^ (z >> np.uint64(31))


def _round_keys(seed: int, epoch: int) -> Words:
    # Seed and epoch go through the mixer one after the other, so (seed 0, epoch 1) and (seed 1, epoch 0) share nothing.
    state = _mix(_mix(np.array([seed & _MASK], np.uint64) + _GOLDEN) + np.uint64(epoch & _MASK))
    return _mix(state + np.arange(1, ROUNDS + 1, dtype=np.uint64) * _GOLDEN)


def permute(positions: npt.ArrayLike, size: int, seed: int, epoch: int) -> npt.NDArray[np.int64]:
    """Return the row at each of `positions` (N,) in the order of (`seed`, `epoch`), as int64 (N,).

    Every position must be in 0 .. size - 1; `seed` and `epoch` are taken modulo 2^64.
    """
    x = np.array(positions, dtype=np.uint64).reshape(-1)
    if x.size and int(x.max()) >= size:
        raise ValueError(f"position {int(x.max())} must be below size ({size})")
    bits = max(2, (size - 1).bit_length())
    right_bits = np.uint64(bits // 2)
    right_mask = np.uint64((1 << (bits // 2)) - 1)
    left_mask = np.uint64((1 << (bits - bits // 2)) - 1)
    keys = _round_keys(seed, epoch)

    def encrypt(x: Words) -> Words:
        left, right = x >> right_bits, x & right_mask
        for i in range(0, ROUNDS, 2):
            left = left ^ (_mix(right + keys[i]) & left_mask)
            right = right ^ (_mix(left + keys[i + 1]) & right_mask)
        return (left << right_bits) | right

    x = encrypt(x)
    outside = np.flatnonzero(x >= size)
    while outside.size:
        walked = encrypt(x[outside])
        x[outside] = walked
        outside = outside[walked >= size]
    return x.astype(np.int64)
