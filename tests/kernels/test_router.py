"""The router: the three nails, both rules of renormalising, ties, NaN, penalties, threads."""

import numpy as np
import pytest

from abi_py.gradcheck import check_close, check_gradient
from abi_py.kernels.router import (
    dispatch_ref,
    route_backward,
    route_backward_ref,
    route_forward,
    route_forward_ref,
)

SHAPES = [(1, 1, 1), (1, 2, 5), (23, 3, 3), (67, 2, 9), (50, 8, 128), (40, 8, 256)]  # (N, K, E)


def run(logits, K, counted=None, renormalised=True):
    """Return what forward overwrites, by name."""
    N, E = logits.shape
    made = {"chosen": np.full((N, K), -1, np.int32), "weights": np.full(N * K, np.nan, np.float32)}
    made |= {"lse": np.full(N, np.nan, np.float32), "token": np.full(N * K, -1, np.int32)}
    made |= {"slot": np.full((N, K), -1, np.int32), "offsets": np.full(E + 1, -1, np.int32)}
    made |= {"load": np.full(E, np.nan), "share": np.full(E, np.nan), "squares": np.full(1, np.nan)}
    route_forward(*made.values(), logits, counted, renormalised)
    return made


@pytest.mark.parametrize("renormalised", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
def test_forward_equals_the_reference(rng, shape, renormalised):
    N, K, E = shape
    logits = 3 * rng.standard_normal((N, E)).astype(np.float32)
    counted = (rng.random(N) < 0.7).astype(np.uint8)
    made = run(logits, K, counted, renormalised)
    chosen, gates, p, lse = route_forward_ref(logits.astype(np.float64), K, renormalised)
    token, slot, offsets = dispatch_ref(chosen, E)
    for name, expected in (("chosen", chosen), ("token", token), ("slot", slot), ("offsets", offsets)):
        assert np.array_equal(made[name], expected), name
    check_close(made["weights"][slot], gates, 1e-6)
    check_close(made["lse"], lse, 1e-6)
    check_close(made["load"], np.bincount(chosen[counted == 1].ravel(), minlength=E), 0)
    check_close(made["share"], p[counted == 1].sum(0), 1e-6)
    check_close(made["squares"][0], (lse[counted == 1] ** 2).sum(), 1e-6)


@pytest.mark.parametrize("renormalised", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
def test_backward_equals_the_reference(rng, shape, renormalised):
    N, K, E = shape
    logits, dgates = rng.standard_normal((N, E)).astype(np.float32), rng.standard_normal((N, K)).astype(np.float32)
    balance, counted = rng.standard_normal(E).astype(np.float32), (rng.random(N) < 0.7).astype(np.uint8)
    made = run(logits, K, counted, renormalised)
    dweights, dlogits = np.empty(N * K, np.float32), np.full((N, E), np.nan, np.float32)
    dweights[made["slot"]] = dgates
    saved = made["lse"], made["chosen"], made["slot"], made["weights"]
    route_backward(dlogits, dweights, logits, *saved, balance, 0.3, counted, renormalised)
    forward = route_forward_ref(logits.astype(np.float64), K, renormalised)
    expected = route_backward_ref(dgates, *forward, renormalised, counted, balance, 0.3)
    assert np.abs(dlogits - expected).max() < 1e-5 * max(1.0, np.abs(expected).max())


@pytest.mark.parametrize("renormalised", [True, False])
@pytest.mark.parametrize("shape", SHAPES[1:5])
def test_derivation(rng, shape, renormalised):
    N, K, E = shape
    logits, dgates = rng.standard_normal((N, E)), rng.standard_normal((N, K))
    balance, counted, z = rng.standard_normal(E), (rng.random(N) < 0.7).astype(float), 0.3

    def value(x):
        _, gates, p, lse = route_forward_ref(x, K, renormalised)
        return (gates * dgates).sum() + (counted[:, None] * p * balance).sum() + z / 2 * (counted * lse**2).sum()

    found = route_forward_ref(logits, K, renormalised)
    dlogits = route_backward_ref(dgates, *found, renormalised, counted, balance, z)
    check_gradient(value, logits, dlogits, rng)


@pytest.mark.parametrize("renormalised", [True, False])
def test_definition(golden, renormalised):
    g = golden("router")
    logits, rule = g["logits"], "renormalised" if renormalised else "plain"
    chosen, gates, p, lse = route_forward_ref(logits, g["chosen"].shape[1], renormalised)
    assert np.array_equal(chosen, g["chosen"])
    check_close(gates, g[f"gates_{rule}"], 1e-10)
    dlogits = route_backward_ref(g["dgates"], chosen, gates, p, lse, renormalised)
    check_close(dlogits, g[f"dlogits_{rule}"], 1e-10)


def test_of_equal_logits_the_lower_number_is_chosen():
    logits = np.array([[1, 2, 2, 0, 2], [0, 0, 0, 0, 0]], np.float32)
    assert np.array_equal(run(logits, 2)["chosen"], [[1, 2], [0, 1]])


def test_far_logits_are_exact():
    logits = np.array([[1e4, -1e4, 0], [-1e4, -1e4, -1e4]], np.float32)
    made = run(logits, 2)
    check_close(made["weights"][made["slot"]], [[1, 0], [0.5, 0.5]], 1e-6)
    check_close(made["lse"], [1e4, -1e4 + np.log(3)], 1e-6)


def test_nan_stays_in_its_row_and_experts_exist(rng):
    logits = rng.standard_normal((4, 5)).astype(np.float32)
    logits[1, 3] = np.nan
    made = run(logits, 2)
    assert set(made["chosen"].ravel()) <= set(range(5))
    assert np.array_equal(np.isnan(made["weights"][made["slot"]]).all(1), [False, True, False, False])
    assert np.array_equal(np.isnan(made["lse"]), [False, True, False, False])


def test_same_bits_for_any_thread_count(rng, same_bits):
    logits, dweights = (rng.standard_normal(shape).astype(np.float32) for shape in ((301, 16), 301 * 4))
    balance = rng.standard_normal(16).astype(np.float32)

    def both():
        made, dlogits = run(logits, 4, renormalised=False), np.empty_like(logits)
        saved = made["lse"], made["chosen"], made["slot"], made["weights"]
        route_backward(dlogits, dweights, logits, *saved, balance, 0.1, None, False)
        return (*made.values(), dlogits)

    same_bits(both)


def test_what_does_not_fit_is_named(rng):
    logits = rng.standard_normal((4, 3)).astype(np.float32)
    with pytest.raises(ValueError, match=r"K \(4\) experts cannot be chosen of E \(3\)"):
        run(logits, 4)
    with pytest.raises(ValueError, match="counted has shape"):
        run(logits, 2, np.ones(3, np.uint8))
