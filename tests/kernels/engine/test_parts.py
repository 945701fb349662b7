"""Parts: that bfloat16 numbers add up to a float32, what two or three of them leave, and the numbers at the ends."""

import llvmlite.ir as ir
import numba
import numpy as np
import pytest
from numba import types
from numba.extending import intrinsic

from abi_py.kernels.engine.halves import round_to_bf16_ref
from abi_py.kernels.engine.jit import JIT
from abi_py.kernels.engine.number_formats import BF16X3, BF16X6, FLOAT32
from abi_py.kernels.engine.parts import LARGEST, bf16_parts, bf16_parts_ref, joined
from abi_py.kernels.matmul import product

TINY = np.float32(2.0**-126)  # the smallest normal number
SPECIAL = np.float32(
    [0.0, -0.0, np.inf, -np.inf, np.nan, LARGEST, np.finfo(np.float32).max, -np.finfo(np.float32).max, 3.3961775e38,
     1.0, -1.0, TINY, -TINY, 1e-40, -1e-45, 1.0019608, 1.9960938, 65504.0, 2.0**-103, 2.0**-110]
)  # fmt: skip


def every_significand(stride=97):
    """Return numbers from 1 to 2, every `stride`-th that there is, and both signs of another size."""
    bits = np.arange(0x3F800000, 0x40000000, stride, dtype=np.uint32)
    x = bits.view(np.float32)
    return np.concatenate([x, -x * np.float32(2.0**-60)])


def test_parts_add_up():
    x = every_significand()
    parts = [part.astype(np.float64) for part in bf16_parts_ref(x, 3)]
    for part in parts:
        assert np.array_equal(round_to_bf16_ref(part.astype(np.float32)), part)
    assert np.array_equal(parts[0] + parts[1] + parts[2], x)
    size = np.abs(x.astype(np.float64))
    assert 2.0**-18 < (np.abs(parts[0] + parts[1] - x) / size).max() <= 2.0**-17
    assert (np.abs(parts[1]) / size).max() <= 2.0**-8
    assert (np.abs(parts[2]) / size).max() <= 2.0**-17


def test_what_products_of_parts_leave_out():
    """The bounds of the page, on the worst significands beside each other."""
    x = every_significand(9973)[:900]
    x1, x2, x3 = (part.astype(np.float64) for part in bf16_parts_ref(x, 3))
    exact = np.multiply.outer(x.astype(np.float64), x.astype(np.float64))
    three = np.multiply.outer(x1, x1) + np.multiply.outer(x1, x2) + np.multiply.outer(x2, x1)
    six = three + np.multiply.outer(x2, x2) + np.multiply.outer(x1, x3) + np.multiply.outer(x3, x1)
    assert 2.0**-17 < np.abs(three / exact - 1).max() <= 2.0**-15
    assert 2.0**-27 < np.abs(six / exact - 1).max() <= 2.0**-24
    two = np.multiply.outer(x1 + x2, x1 + x2)  # what is done where float32 arithmetic is as fast
    assert np.abs(two / exact - 1).max() <= 2.0**-16


def test_special_numbers_are_sums_too():
    for count in (2, 3):
        parts = bf16_parts_ref(SPECIAL, count)
        for part in parts[:-1]:
            assert np.isfinite(part[~np.isnan(SPECIAL)]).all()  # and so x2 is not the opposite infinity
        total = sum(part.astype(np.float64) for part in parts)
        finite = np.isfinite(SPECIAL) & (np.abs(SPECIAL) >= 2.0**-103)
        left = np.abs(total[finite] / SPECIAL[finite].astype(np.float64) - 1)
        assert (left == 0 if count == 3 else left <= 2.0**-17).all()
        assert np.array_equal(total[~np.isfinite(SPECIAL)], SPECIAL[~np.isfinite(SPECIAL)], equal_nan=True)
        assert np.array_equal(np.signbit(parts[0]), np.signbit(SPECIAL))


def emitted(index, count):
    """Return a compiled function of a float32: part `index` of `count`, or with index -1 their sum."""

    @intrinsic
    def part(typing, x):
        def codegen(context, builder, signature, arguments):
            parts = bf16_parts(builder, arguments[0], count)
            if index < 0:
                return joined(builder, parts)
            return builder.bitcast(builder.shl(parts[index], ir.Constant(parts[index].type, 16)), ir.FloatType())

        return types.float32(types.float32), codegen

    return numba.vectorize(lambda x: part(x))


@pytest.mark.skipif(not JIT, reason="what LLVM emits")
def test_what_is_emitted_is_the_reference():
    x = np.concatenate([SPECIAL, every_significand(9973), -every_significand(65537) * np.float32(1e-38)])
    with np.errstate(invalid="ignore", over="ignore"):
        for count in (2, 3):
            expected = bf16_parts_ref(x, count)
            for index in range(count):
                assert emitted(index, count)(x).tobytes() == expected[index].tobytes(), (index, count)
        assert np.array_equal(emitted(-1, 2)(x), BF16X3.round_ref(x), equal_nan=True)


# -- products ------------------------------------------------------------------------------------

FORMATS = {f"{choice} by {name}": one for choice in (BF16X3, BF16X6) for name, one in choice.usable.items()}
# What is left out, as a share of sum_k |a| |b|; what the page states of typical sums, as a share of the product.
BOUNDS = {"bf16x3 by fp32": 2.0**-16, "bf16x3 by amx": 2.0**-15, "bf16x6 by fp32": 0, "bf16x6 by amx": 2.0**-24}
TYPICAL = {"bf16x3 by fp32": 4e-6, "bf16x3 by amx": 4.6e-6, "bf16x6 by fp32": 4.5e-7, "bf16x6 by amx": 1.5e-7}


def sums(a, b):
    """Return the exact product, and the sum of the sizes of its terms, which errors are measured by."""
    a, b = a.astype(np.float64), b.astype(np.float64)
    return a @ b, np.abs(a) @ np.abs(b)


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("sizes", [(1, 1, 1), (3, 5, 2), (37, 53, 41), (130, 97, 700)])
def test_error_of_a_product(rng, name, sizes):
    m, n, k = sizes if JIT else tuple(min(size, 20) for size in sizes)
    for scale in (1.0, 1e-12, 1e12):
        a, b = (rng.standard_normal(size).astype(np.float32) for size in ((m, k), (k, n)))
        a *= np.float32(scale)
        exact, size = sums(a, b)
        out = np.empty((m, n), np.float32)
        product(out, a, b, number_format=FORMATS[name])
        # What is left out, and float32 sums: as an accumulator of k terms rounds at worst, and one of six products.
        assert (np.abs(out - exact) <= (BOUNDS[name] + (k + 6) * 2.0**-24) * size).all()


@pytest.mark.skipif(not JIT, reason="sums of some length")
@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("sizes", [(300, 300, 300), (33, 1000, 64), (40, 50, 5000)])
def test_typical_errors_beside_float32(rng, name, sizes):
    """What the page states: 4e-6 with three products; with six a third of float32's own, which matrix units do."""
    m, n, k = sizes
    a, b = (rng.standard_normal(size).astype(np.float32) for size in ((m, k), (k, n)))
    exact, _ = sums(a, b)
    errors = []
    for kind in (FORMATS[name], FLOAT32):
        out = np.empty((m, n), np.float32)
        product(out, a, b, number_format=kind)
        errors.append(np.linalg.norm(out - exact) / np.linalg.norm(exact))
    assert errors[0] < TYPICAL[name]
    assert errors[0] > 2e-6 or name.startswith("bf16x6")  # three products are what was measured, not something exacter
    if name == "bf16x6 by amx":
        assert errors[0] < 0.6 * errors[1]


@pytest.mark.parametrize("name", FORMATS)
def test_what_is_not_finite_stays_so(name):
    for x, expected in ((np.inf, np.inf), (-np.inf, -np.inf), (np.nan, np.nan), (0.0, 0.0), (-0.0, 0.0)):
        out = np.empty((1, 2), np.float32)
        with np.errstate(invalid="ignore"):  # NumPy's product warns of NaN
            product(out, np.float32([[x, 1.0]]), np.float32([[1.0, 1.0], [0.0, 0.0]]), number_format=FORMATS[name])
        assert np.array_equal(out, np.float32([[expected, expected]]), equal_nan=True)


@pytest.mark.parametrize("name", FORMATS)
def test_the_largest_numbers_are_multiplied(name):
    """Rounded to bfloat16 they would be infinite; x1 + x2 as a float32 is so only within 2^-17 of the end."""
    most = np.float32(3.4027e38)
    assert np.isinf(round_to_bf16_ref(most))
    out = np.empty((1, 1), np.float32)
    product(out, np.float32([[most]]), np.float32([[0.5]]), number_format=FORMATS[name])
    assert out[0, 0] == pytest.approx(0.5 * float(most), rel=2.0**-17)
    product(out, np.float32([[-most]]), np.float32([[1.0]]), number_format=FORMATS[name])
    assert out[0, 0] == pytest.approx(-float(most), rel=2.0**-16)


@pytest.mark.parametrize("name", FORMATS)
def test_infinity_times_any_number(name):
    """Up to 256 no part of y meets a part of x that would make NaN of it: a zero, or the opposite infinity."""
    y = np.float32([[1.0, -1.0, 1.0 + 2.0**-9, 1.0 - 2.0**-9, 255.9, -3e-38, 1.0 + 2.0**-23, np.inf]])
    out = np.empty(y.shape, np.float32)
    for sign in (1, -1):
        product(out, np.float32([[sign * np.inf]]), y, number_format=FORMATS[name])
        assert np.array_equal(out, sign * np.inf * y)
    product(
        out,
        np.float32([[np.inf]]),
        1e37 * (1 + np.arange(8, dtype=np.float32) / 8000)[None],
        number_format=FORMATS[name],
    )
    assert not np.isfinite(out).any()
    with np.errstate(invalid="ignore"):
        product(out, np.float32([[np.inf]]), np.zeros_like(y), number_format=FORMATS[name])
    assert np.isnan(out).all()


@pytest.mark.parametrize("name", FORMATS)
def test_denormal_numbers_are_lost_at_most(name):
    x = np.float32([[1e-40, -1e-45, 2.0**-120, 2.0**-126]]).T
    out = np.empty((4, 1), np.float32)
    product(out, x, np.float32([[1.0]]), number_format=FORMATS[name])
    assert (np.abs(out - x.astype(np.float64)) <= 2.0**-125).all()
