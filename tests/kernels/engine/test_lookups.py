"""Half-bytes looked up in a table: every value, whole vectors and what is left of one."""

import numpy as np
import pytest

from abi_py.kernels.engine.jit import kernel, prange
from abi_py.kernels.engine.lookups import scaled_lookup

TABLE = np.float32([3, -1, 0, 0.5, np.inf, 1e-40, 7, 8, 9, -10, 11, 12, 13, 14, 15, np.nan])
lookup = scaled_lookup(TABLE)


@kernel
def look_up(out, packed, scale):
    for _ in prange(1):
        lookup(out, packed, scale)


@pytest.mark.parametrize("size", [0, 2, 14, 16, 30, 64, 66])
def test_every_half_byte_is_its_value_times_the_scale(rng, size):
    packed = rng.integers(0, 256, size // 2, np.uint8)
    packed[: min(16, size // 2)] = (np.arange(16) * 17).astype(np.uint8)[: size // 2]
    out = np.full(size + 1, 5, np.float32)
    look_up(out[:size], packed, np.float32(-2))
    halves = np.stack([packed >> 4, packed & 15], 1).reshape(-1)
    assert np.array_equal(out[:size], TABLE[halves] * np.float32(-2), equal_nan=True)
    assert out[size] == 5
