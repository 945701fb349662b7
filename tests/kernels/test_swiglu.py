"""SwiGLU: the three nails, large arguments, threads and NaN."""

import numpy as np
import pytest

from abi_py.gradcheck import check_close, check_gradient
from abi_py.kernels.engine.halves import round_to_bf16_ref, widen_bf16_ref
from abi_py.kernels.swiglu import (
    swiglu_backward,
    swiglu_backward_ref,
    swiglu_forward,
    swiglu_forward_ref,
    swiglu_forward_rounded,
    weighted_swiglu_backward,
    weighted_swiglu_backward_ref,
    weighted_swiglu_forward,
    weighted_swiglu_forward_ref,
    weighted_swiglu_forward_rounded,
)

SHAPES = [(1, 1), (3, 5), (17, 31), (67, 131)]  # (N, F)


def inputs(rng, shape, dtype=np.float32):
    N, F = shape
    return 3 * rng.standard_normal((N, 2 * F)).astype(dtype), rng.standard_normal((N, F)).astype(dtype)


def run_kernels(gate_up, dh):
    h, dgate_up = np.full_like(dh, np.nan), np.full_like(gate_up, np.nan)  # overwritten
    swiglu_forward(h, gate_up)
    again = dh.copy()
    swiglu_backward(dgate_up, again, gate_up)
    assert again[~np.isnan(h)].tobytes() == h[~np.isnan(h)].tobytes()
    assert np.isnan(again[np.isnan(h)]).all()
    return h, dgate_up


@pytest.mark.parametrize("shape", SHAPES)
def test_derivation(rng, shape):
    gate_up, dh = inputs(rng, shape, np.float64)
    check_gradient(lambda a: (swiglu_forward_ref(a) * dh).sum(), gate_up, swiglu_backward_ref(dh, gate_up), rng)


def test_definition(golden):
    g = golden("swiglu")
    check_close(swiglu_forward_ref(g["gate_up"]), g["h"], 1e-10)
    check_close(swiglu_backward_ref(g["dh"], g["gate_up"]), g["dgate_up"], 1e-10)


@pytest.mark.parametrize("shape", SHAPES)
def test_kernels_equal_the_reference(rng, shape):
    gate_up, dh = inputs(rng, shape)
    h, dgate_up = run_kernels(gate_up, dh)
    check_close(h, swiglu_forward_ref(gate_up.astype(np.float64)), 1e-5)
    check_close(dgate_up, swiglu_backward_ref(dh.astype(np.float64), gate_up.astype(np.float64)), 1e-4)


def test_gates_far_from_zero_are_exact():
    gate = np.array([-1e4, -100, -88, -30, 0, 30, 88, 100, 1e4], np.float32)
    gate_up = np.concatenate((gate, np.ones_like(gate)))[None]
    h, dgate_up = run_kernels(gate_up, np.ones((1, len(gate)), np.float32))
    check_close(h, swiglu_forward_ref(gate_up.astype(np.float64)), 1e-6)
    check_close(dgate_up, swiglu_backward_ref(np.ones((1, len(gate))), gate_up.astype(np.float64)), 1e-6)


def test_same_bits_for_any_thread_count(rng, same_bits):
    gate_up, dh = inputs(rng, SHAPES[-1])
    same_bits(lambda: run_kernels(gate_up, dh))


def test_nan_stays_nan(rng):
    gate_up, dh = inputs(rng, (2, 3))
    gate_up[0, 1] = gate_up[1, 3] = np.nan  # one gate, one up
    with np.errstate(invalid="ignore"):
        h, dgate_up = run_kernels(gate_up, dh)
    assert np.array_equal(np.argwhere(np.isnan(h)), [[0, 1], [1, 0]])
    assert np.array_equal(np.argwhere(np.isnan(dgate_up)), [[0, 1], [0, 4], [1, 0]])


def test_rounded_forward_saves_what_it_computed_from(rng):
    gate_up, dh = inputs(rng, SHAPES[-1])
    saved, h = np.zeros(gate_up.shape, np.uint16), np.full_like(dh, np.nan)
    swiglu_forward_rounded(h, saved, gate_up)
    assert np.array_equal(widen_bf16_ref(saved), round_to_bf16_ref(gate_up))
    again, dgate_up = np.full_like(dh, np.nan), np.full_like(gate_up, np.nan)
    swiglu_forward(again, saved)
    swiglu_backward(dgate_up, dh.copy(), saved)
    expected = run_kernels(round_to_bf16_ref(gate_up), dh)
    assert all(np.array_equal(x, y) for x, y in zip((h, again, dgate_up), (expected[0], *expected), strict=True))


# -- the rows of experts -------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(1, 1), (17, 31), (67, 131)])
def test_rows_with_weights(rng, shape):
    S, F = shape
    gate_up, dh, weights = rng.standard_normal((S, 2 * F)), rng.standard_normal((S, F)), rng.random(S)
    d_ref, dweights_ref = weighted_swiglu_backward_ref(dh, gate_up, weights)
    check_gradient(lambda v: (weighted_swiglu_forward_ref(v, weights) * dh).sum(), gate_up, d_ref, rng)
    check_gradient(lambda v: (weighted_swiglu_forward_ref(gate_up, v) * dh).sum(), weights, dweights_ref, rng)
    single = [each.astype(np.float32) for each in (gate_up, dh, weights)]
    h, d, dweights = np.empty_like(single[1]), np.empty_like(single[0]), np.empty_like(single[2])
    weighted_swiglu_forward(h, single[0], single[2])
    check_close(h, weighted_swiglu_forward_ref(gate_up, weights), 1e-5)
    again = single[1].copy()
    weighted_swiglu_backward(d, dweights, again, single[0], single[2])
    check_close(d, d_ref, 1e-4)
    check_close(dweights, dweights_ref, 1e-4)
    check_close(again, h, 1e-6)
    saved = np.empty((S, 2 * F), np.uint16)
    weighted_swiglu_forward_rounded(h, saved, single[0], single[2])
    assert np.array_equal(widen_bf16_ref(saved), round_to_bf16_ref(single[0]))
    check_close(h, weighted_swiglu_forward_ref(widen_bf16_ref(saved).astype(np.float64), weights), 1e-5)
