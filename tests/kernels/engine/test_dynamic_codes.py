"""Dynamic codes: the nearest code, signs, zero, what is in the middle."""

import numpy as np
import pytest

from abi_py.gradcheck import check_close
from abi_py.kernels.engine.dynamic_codes import (
    ZERO_CODE,
    decode_ref,
    decode_signed,
    decode_unsigned,
    encode_ref,
    encode_signed,
    encode_unsigned,
)
from abi_py.kernels.engine.dynamic_map import dynamic_map
from abi_py.kernels.engine.jit import kernel, prange

SIGNS = pytest.mark.parametrize("signed", [True, False], ids=["signed", "unsigned"])


@kernel
def decoded(x, codes, signed):
    for i in prange(x.shape[0]):
        if signed:
            decode_signed(x[i], codes[i], np.float32(0.5))
        else:
            decode_unsigned(x[i], codes[i], np.float32(0.5))


@kernel
def encoded(codes, x, signed):
    for i in prange(x.shape[0]):
        if signed:
            encode_signed(codes[i], x[i], np.float32(2))
        else:
            encode_unsigned(codes[i], x[i], np.float32(2))


def codes_of(x, signed):
    """Return the codes that the kernel gives to x (n,)."""
    blocks = np.zeros((-(-x.size // 16), 16), np.float32)
    blocks.ravel()[: x.size] = x / 2
    codes = np.zeros(blocks.shape, np.uint8)
    encoded(codes, blocks, signed)
    return codes.ravel()[: x.size]


def test_the_map_is_as_the_formulas_have_it():
    signed, unsigned = dynamic_map(True), dynamic_map(False)
    assert (signed[0], signed[ZERO_CODE], signed[-1]) == (np.float32(-0.99296874), 0, 1)
    assert np.array_equal(signed[:ZERO_CODE], -signed[ZERO_CODE + 1 : -1][::-1])
    assert (unsigned[0], unsigned[-2], unsigned[-1]) == (0, np.float32(0.9964844), 1)
    check_close(signed[ZERO_CODE + 1], 5.5e-7, 1e-6)
    check_close(unsigned[1], 3.25e-7, 1e-6)


@SIGNS
def test_every_code_there_and_back(signed):
    codes = np.arange(256, dtype=np.uint8).reshape(16, 16)
    x = np.zeros((16, 16), np.float32)
    decoded(x, codes, signed)
    numbers = dynamic_map(signed)
    assert np.array_equal(decode_ref(codes.ravel(), signed), numbers)
    assert (np.abs(2 * x.ravel() - numbers) <= 1e-6 * np.abs(numbers)).all()
    assert np.array_equal(codes_of(numbers, signed), codes.ravel())
    assert np.array_equal(encode_ref(numbers, signed), codes.ravel())


@SIGNS
def test_the_nearest_code_is_found(rng, signed):
    x = rng.uniform(-1 if signed else 0, 1, 20_000) * 10.0 ** rng.uniform(-8, 0, 20_000).round(1)
    x = x.astype(np.float32)
    found, numbers = codes_of(x, signed).astype(int), dynamic_map(signed).astype(np.float64)
    nearest = np.abs(x[:, None] - numbers).argmin(1)
    moved = (x < 0) & (nearest == ZERO_CODE) if signed else (x > 0) & (nearest == 0)
    nearest = np.where(moved, ZERO_CODE - 1 if signed else 1, nearest)
    apart = np.flatnonzero(found != nearest)
    assert len(apart) < 10
    for i in apart:  # in the middle of two
        low = min(found[i], nearest[i])
        middle, distance = (numbers[low] + numbers[low + 1]) / 2, numbers[low + 1] - numbers[low]
        assert abs(found[i] - nearest[i]) == 1
        assert abs(x[i] - middle) < 1e-4 * distance
    assert (encode_ref(x.astype(np.float64), signed) == nearest).mean() > 0.9995


@SIGNS
def test_both_sides_of_every_middle(signed):
    numbers = dynamic_map(signed).astype(np.float64)
    middles, distances = (numbers[1:] + numbers[:-1]) / 2, np.diff(numbers)
    for side, code in ((-1, np.arange(255)), (1, np.arange(1, 256))):
        x = middles + side * 2e-4 * distances
        wanted = code.copy()
        if signed:
            wanted[(x < 0) & (code == ZERO_CODE)] = ZERO_CODE - 1
        else:
            wanted[(x > 0) & (code == 0)] = 1
        for found in (codes_of(x.astype(np.float32), signed), encode_ref(x, signed)):
            assert np.array_equal(found, wanted)


def test_no_sign_is_lost_and_no_square_becomes_zero():
    tiny = np.array([1e-30, 1e-10, 2.7e-7], np.float32)
    assert (codes_of(-tiny, True) == ZERO_CODE - 1).all()
    assert (codes_of(tiny, True) == ZERO_CODE).all()
    assert (codes_of(np.array([1e-38, 1e-10, 1.6e-7], np.float32), False) == 1).all()
    zero = np.zeros(3, np.float32)
    assert (codes_of(zero, True) == ZERO_CODE).all()
    assert (codes_of(zero, False) == 0).all()


@SIGNS
def test_rounding_may_leave_the_map_a_little(signed):
    above = np.float32(1) + np.array([0, 1.2e-7], np.float32)
    assert (codes_of(above, signed) == 255).all()
    if signed:
        assert (codes_of(-above, signed) == 0).all()
