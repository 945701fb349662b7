"""Global norm: definition and speed nails, sizes around a block, overflow, threads and NaN."""

import math

import numpy as np
import pytest

from abi_py.gradcheck import check_close
from abi_py.kernels.engine.shares import FEWEST_ELEMENTS as PARTIAL_SUM
from abi_py.kernels.global_norm import global_norm, global_norm_ref


def test_definition(golden):
    g = golden("global_norm")
    check_close(global_norm_ref(g["g"]), g["norm"], 1e-10)


@pytest.mark.parametrize("size", [0, 1, 7, 1009, PARTIAL_SUM, PARTIAL_SUM + 1, 2 * PARTIAL_SUM + 17])
def test_kernel_equals_the_reference(rng, size):
    g = rng.standard_normal(size).astype(np.float32)
    norm = global_norm(g)
    assert isinstance(norm, float)
    check_close(norm, global_norm_ref(g.astype(np.float64)), 1e-12)


def test_large_and_small_numbers_are_exact():
    check_close(global_norm(np.full(4, 1e30, np.float32)), 2 * float(np.float32(1e30)), 1e-12)
    check_close(global_norm(np.full(4, 1e-30, np.float32)), 2 * float(np.float32(1e-30)), 1e-12)


def test_same_bits_for_any_thread_count(rng, same_bits):
    g = rng.standard_normal(3 * PARTIAL_SUM + 17).astype(np.float32)
    same_bits(lambda: global_norm(g))


@pytest.mark.parametrize(("bad", "expected"), [(np.inf, math.inf), (-np.inf, math.inf), (np.nan, math.nan)])
def test_non_finite_elements_come_out(rng, bad, expected):
    for where in (0, 999, PARTIAL_SUM + 3):
        g = rng.standard_normal(PARTIAL_SUM + 11).astype(np.float32)
        g[where] = bad
        assert math.isnan(global_norm(g)) if math.isnan(expected) else global_norm(g) == expected
