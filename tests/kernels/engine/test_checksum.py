"""The checksum of weights: its definition, what changes it, threads."""

import numpy as np
import pytest

from abi_py.kernels.engine.checksum import SUMMED, _checksum, checksum, checksum_ref
from abi_py.kernels.engine.jit import JIT


@pytest.mark.skipif(not JIT, reason="plain Python sums with the reference")
@pytest.mark.parametrize("size", [1, 7, SUMMED, 2 * SUMMED + 5])
def test_kernel_equals_the_reference(rng, size, same_bits):
    words = rng.integers(0, 2**32, size, dtype=np.uint32)

    def make():
        sums = np.zeros(-(-size // SUMMED), np.uint64)
        _checksum(sums, words)
        return sums

    same_bits(make)
    assert np.array_equal(make(), checksum_ref(words))
    i = size // 2
    by_hand = sum(int(word) * (at * 2654435761 % 2**32 | 1) for at, word in enumerate(words[:SUMMED])) % 2**64
    assert int(checksum_ref(words)[0]) == by_hand, i


def test_every_change_and_every_move_is_seen(rng):
    x = rng.standard_normal((7, 300)).astype(np.float32)
    before = checksum(x)
    assert checksum(x.copy()) == before
    for change in (
        lambda y: y.__setitem__((3, 5), np.nextafter(y[3, 5], np.float32(9))),
        lambda y: y.__setitem__((6, 299), -y[6, 299]),
        lambda y: y.__setitem__(slice(None), y[::-1].copy()),
        lambda y: y.__setitem__([0, 1], y[[1, 0]]),
    ):
        y = x.copy()
        change(y)
        assert checksum(y) != before
    assert checksum(x, x[:1]) != before
    assert checksum(x[:1], x) != checksum(x, x[:1])


@pytest.mark.parametrize("dtype", [np.uint8, np.float16, np.uint16])
def test_any_type_and_any_number_of_bytes(rng, dtype):
    for size in (0, 1, 2, 3, 5, 8):
        x = rng.integers(0, 200, size).astype(dtype)
        before = checksum(x)
        for i in range(size):
            y = x.copy()
            y[i] += 1
            assert checksum(y) != before
    assert checksum(np.zeros((2, 6), dtype)[:, ::2]) == checksum(np.zeros((2, 3), dtype))
