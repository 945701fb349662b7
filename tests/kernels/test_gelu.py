"""GELU, exact and by a tanh, with a gate and without: the three nails, large arguments, threads and NaN."""

import math

import numpy as np
import pytest

from abi_py.gradcheck import check_close, check_gradient
from abi_py.kernels.engine.halves import round_to_bf16_ref, widen_bf16_ref
from abi_py.kernels.gelu import gelu_backward, gelu_backward_ref, gelu_forward, gelu_forward_ref, gelu_forward_rounded

SHAPES = [(1, 1), (3, 5), (17, 31), (67, 131)]  # (N, F)
pytestmark = [
    pytest.mark.parametrize("exact", [False, True], ids=["tanh", "exact"]),
    pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"]),
]


def inputs(rng, shape, gated, dtype=np.float32):
    N, F = shape
    return 3 * rng.standard_normal((N, F * (1 + gated))).astype(dtype), rng.standard_normal((N, F)).astype(dtype)


def run_kernels(u, dh, exact):
    h, du = np.full_like(dh, np.nan), np.full_like(u, np.nan)  # overwritten
    gelu_forward(h, u, exact)
    again = dh.copy()
    gelu_backward(du, again, u, exact)
    assert again[~np.isnan(h)].tobytes() == h[~np.isnan(h)].tobytes()
    assert np.isnan(again[np.isnan(h)]).all()
    return h, du


@pytest.mark.parametrize("shape", SHAPES)
def test_derivation(rng, shape, exact, gated):
    u, dh = inputs(rng, shape, gated, np.float64)
    du = gelu_backward_ref(dh, u, exact, gated)
    check_gradient(lambda u: (gelu_forward_ref(u, exact, gated) * dh).sum(), u, du, rng)


def test_definition(golden, exact, gated):
    g, kind = golden("gelu"), "exact_" if exact else "tanh_"
    u, dh, h, du = (g[kind + "gated_" * gated + name] for name in ("u", "dh", "h", "du"))
    check_close(gelu_forward_ref(u, exact, gated), h, 1e-10)
    check_close(gelu_backward_ref(dh, u, exact, gated), du, 1e-10)


@pytest.mark.parametrize("shape", SHAPES)
def test_kernels_equal_the_reference(rng, shape, exact, gated):
    u, dh = inputs(rng, shape, gated)
    h, du = run_kernels(u, dh, exact)
    check_close(h, gelu_forward_ref(u.astype(np.float64), exact, gated), 1e-5)
    check_close(du, gelu_backward_ref(dh.astype(np.float64), u.astype(np.float64), exact, gated), 1e-4)


def test_every_argument_is_within_a_rounding_of_float32(exact, gated):
    """Errors of values are measured against |u|, from 1 on; those of slopes, which are around 1, are absolute."""
    u = np.concatenate((np.linspace(-10, 10, 20001), [-1e30, -1e4, -100, -38, 38, 100, 1e4, 1e30])).astype(np.float32)
    both = np.concatenate((u, np.ones_like(u)))[None] if gated else u[None]
    ones = np.ones((1, u.size), np.float32)
    with np.errstate(over="ignore"):  # without JIT
        h, du = run_kernels(both, ones, exact)
        h_ref = gelu_forward_ref(both.astype(np.float64), exact, gated)
        du_ref = gelu_backward_ref(ones.astype(np.float64), both.astype(np.float64), exact, gated)
    size = np.maximum(1, np.abs(u))
    assert (np.abs(h - h_ref) / size).max() < 5e-7
    assert (np.abs(du - du_ref)[:, : u.size]).max() < 4e-6
    assert math.isclose(h[0, -1], 1e30, rel_tol=1e-6)
    assert h[0, 20001] == 0


def test_same_bits_for_any_thread_count(rng, same_bits, exact, gated):
    u, dh = inputs(rng, SHAPES[-1], gated)
    same_bits(lambda: run_kernels(u, dh, exact))


def test_nan_stays_nan(rng, exact, gated):
    u, dh = inputs(rng, (2, 3), gated)
    u[0, 1] = np.nan
    with np.errstate(invalid="ignore"):
        h, du = run_kernels(u, dh, exact)
    assert np.array_equal(np.argwhere(np.isnan(h)), [[0, 1]])
    assert np.array_equal(np.argwhere(np.isnan(du)), [[0, 1], [0, 4]] if gated else [[0, 1]])


def test_rounded_forward_saves_what_it_computed_from(rng, exact, gated):
    u, dh = inputs(rng, SHAPES[-1], gated)
    saved, h = np.zeros(u.shape, np.uint16), np.full_like(dh, np.nan)
    gelu_forward_rounded(h, saved, u, exact)
    assert np.array_equal(widen_bf16_ref(saved), round_to_bf16_ref(u))
    again, du = np.full_like(dh, np.nan), np.full_like(u, np.nan)
    gelu_forward(again, saved, exact)
    gelu_backward(du, dh.copy(), saved, exact)
    expected = run_kernels(round_to_bf16_ref(u), dh, exact)
    assert all(np.array_equal(x, y) for x, y in zip((h, again, du), (expected[0], *expected), strict=True))


def test_three_parts_are_refused(exact, gated):
    h, u = np.zeros((2, 5), np.float32), np.zeros((2, 15), np.float32)
    h, u = (u, np.zeros((2, 45), np.float32)) if gated else (h, u)
    with pytest.raises(ValueError, match="u has 3 numbers for each of h"):
        gelu_forward(h, u, exact)
