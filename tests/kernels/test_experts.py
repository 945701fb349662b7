"""Experts: the three nails, experts without rows and with all of them, number formats, threads."""

import numpy as np
import pytest

from abi_py.gradcheck import check_close, check_gradient
from abi_py.kernels.engine.halves import round_to_bf16_ref, widen_bf16_ref
from abi_py.kernels.engine.number_formats import BFLOAT16, FLOAT32
from abi_py.kernels.experts import (
    expert_gradients,
    expert_gradients_ref,
    from_experts,
    from_experts_ref,
    to_experts,
    to_experts_ref,
)
from abi_py.kernels.router import dispatch_ref
from abi_py.kernels.swiglu import weighted_swiglu_backward_ref, weighted_swiglu_forward_ref

# (N, K, E, C, F): odd sizes, a slab and a half of columns, more than a slice of terms, one token, all experts chosen
SHAPES = [(1, 1, 1, 1, 1), (1, 3, 5, 17, 11), (37, 2, 4, 61, 29), (67, 3, 3, 530, 13), (90, 2, 7, 33, 540)]


def routes(rng, shape, loads="random"):
    """Return token and offsets of random experts, of the same few for all, or of all but one."""
    N, K, E, _, _ = shape
    chosen = np.tile(np.arange(K), (N, 1))
    if loads == "random":
        chosen = np.stack([rng.permutation(E)[:K] for _ in range(N)])
    token, _, offsets = dispatch_ref(chosen, E)
    return token.astype(np.int32), offsets.astype(np.int32)


def inputs(rng, shape, dtype=np.float32):
    N, K, E, C, F = shape
    make = lambda *sizes: rng.standard_normal(sizes).astype(dtype)  # noqa: E731
    w = {"gate": make(E, F, C), "up": make(E, F, C), "down": make(E, C, F)}
    return make(N, C), make(N * K, 2 * F), make(N * K, F), w


def products(rng, shape, loads="random", number_format=FLOAT32):
    """Return what the kernels compute, and the references of the same."""
    N, K, _, C, F = shape
    token, offsets = routes(rng, shape, loads)
    x, u, h, w = inputs(rng, shape)
    out, dh, y, dn = (np.full(size, np.nan, np.float32) for size in ((N * K, 2 * F), (N * K, F), (N, C), (N, C)))
    dgate, dup, ddown = (np.full_like(w[name], np.nan) for name in ("gate", "up", "down"))
    rows, as_asked = (token, offsets), {"number_format": number_format}
    to_experts(out, x, *rows, w["gate"], w["up"], **as_asked)
    to_experts(dh, x, *rows, w["down"], transposed=False, **as_asked)
    from_experts(y, h, *rows, w["down"], addend=x, **as_asked)
    from_experts(dn, u, *rows, w["gate"], w["up"], transposed=False, **as_asked)
    expert_gradients(dgate, u, x, *rows, dup, accumulate=False, **as_asked)
    expert_gradients(ddown, x, h, *rows, gather_left=True, accumulate=False, **as_asked)
    base = x.astype(np.float64)
    x, u, h, *matrices = (number_format.round_ref(each).astype(np.float64) for each in (x, u, h, *w.values()))
    w = dict(zip(w, matrices, strict=True))
    gathered = x[token]
    expected = (
        to_experts_ref(x, *rows, w["gate"], w["up"]),
        to_experts_ref(x, *rows, w["down"], transposed=False),
        from_experts_ref(base, h, *rows, w["down"]),
        from_experts_ref(np.zeros_like(x), u, *rows, w["gate"], w["up"], transposed=False),
        expert_gradients_ref(u[:, :F], gathered, offsets),
        expert_gradients_ref(u[:, F:], gathered, offsets),
        expert_gradients_ref(gathered, h, offsets),
    )
    return (out, dh, y, dn, dgate, dup, ddown), expected


@pytest.mark.parametrize("loads", ["random", "same"])
@pytest.mark.parametrize("number_format", [FLOAT32, BFLOAT16])
@pytest.mark.parametrize("shape", SHAPES)
def test_kernels_equal_the_reference(rng, shape, loads, number_format):
    for actual, expected in zip(*products(rng, shape, loads, number_format), strict=True):
        check_close(actual, expected, 1e-5)


@pytest.mark.parametrize("shape", SHAPES[1:3])
def test_derivation_of_the_products(rng, shape):
    N, _, _, C, F = shape
    rows = routes(rng, shape)
    x, u, h, w = inputs(rng, shape, np.float64)
    gate, up, down = w.values()
    dx = from_experts_ref(np.zeros_like(x), u, *rows, gate, up, transposed=False)
    check_gradient(lambda v: (to_experts_ref(v, *rows, gate, up) * u).sum(), x, dx, rng)
    dgate = expert_gradients_ref(u[:, :F], x[rows[0]], rows[1])
    check_gradient(lambda v: (to_experts_ref(x, *rows, v, up) * u).sum(), gate, dgate, rng)
    dout = rng.standard_normal((N, C))
    dh = to_experts_ref(dout, *rows, down, transposed=False)
    check_gradient(lambda v: (from_experts_ref(x, v, *rows, down) * dout).sum(), h, dh, rng)
    ddown = expert_gradients_ref(dout[rows[0]], h, rows[1])
    check_gradient(lambda v: (from_experts_ref(x, h, *rows, v) * dout).sum(), down, ddown, rng)


def test_definition(golden):
    """PyTorch's figures of a whole layer, from the references in the order in which the layer calls them."""
    g = golden("experts")
    token, slot, offsets = dispatch_ref(g["chosen"], len(g["gate"]))
    weights, rows = np.empty(token.size), (token, offsets)
    weights[slot] = g["gates"]
    gate_up = to_experts_ref(g["x"], *rows, g["gate"], g["up"])
    h = weighted_swiglu_forward_ref(gate_up, weights)
    check_close(from_experts_ref(g["x"], h, *rows, g["down"]), g["out"], 1e-10)
    dh = to_experts_ref(g["dout"], *rows, g["down"], transposed=False)
    dgate_up, dweights = weighted_swiglu_backward_ref(dh, gate_up, weights)
    check_close(dweights[slot], g["dgates"], 1e-10)
    dx = from_experts_ref(g["dout"], dgate_up, *rows, g["gate"], g["up"], transposed=False)
    check_close(dx, g["dx"], 1e-10)
    gathered = g["x"][token]
    dgate, dup = np.split(dgate_up, 2, axis=1)
    check_close(expert_gradients_ref(dgate, gathered, offsets), g["dgate"], 1e-10)
    check_close(expert_gradients_ref(dup, gathered, offsets), g["dup"], 1e-10)
    check_close(expert_gradients_ref(g["dout"][token], h, offsets), g["ddown"], 1e-10)


def test_an_expert_without_rows_gets_zero_or_keeps_what_it_has(rng):
    shape = 9, 2, 6, 8, 5
    rows = routes(rng, shape, "same")  # experts 2 to 5 have none
    x, u, _, w = inputs(rng, shape)
    dgate, dup = np.full_like(w["gate"], np.nan), np.full_like(w["up"], np.nan)
    expert_gradients(dgate, u, x, *rows, dup, accumulate=False)
    assert dgate[:2].all()
    assert not dgate[2:].any()
    assert not dup[2:].any()
    before = dgate.copy()
    expert_gradients(dgate, u, x, *rows, dup, accumulate=True)
    check_close(dgate[:2], 2 * before[:2], 1e-6)
    assert not dgate[2:].any()


def test_an_expert_with_few_rows_reads_its_matrix_as_it_is(rng):
    shape = 50, 2, 40, 130, 70  # about 2 or 3 rows each
    for actual, expected in zip(*products(rng, shape), strict=True):
        check_close(actual, expected, 1e-5)


def test_a_row_has_the_bits_of_the_row_alone_among_few(rng):
    _, K, E, _, F = shape = 5, 2, 4, 24, 10
    x, _, h, w = inputs(rng, shape)
    N = len(x)
    chosen = np.stack([rng.permutation(E)[:K] for _ in range(N)])

    def run(some, xs, hs):
        token, slot, offsets = dispatch_ref(some, E)
        rows = token.astype(np.int32), offsets.astype(np.int32)
        u, y = np.empty((len(xs) * K, 2 * F), np.float32), np.empty_like(xs)
        to_experts(u, xs, *rows, w["gate"], w["up"])
        sorted_h = np.empty((len(xs) * K, F), np.float32)
        sorted_h[slot.ravel()] = hs.reshape(-1, F)
        from_experts(y, sorted_h, *rows, w["down"], addend=xs)
        return u[slot], y

    together = run(chosen, x, h.reshape(N, K, F))
    for n in range(N):
        alone = run(chosen[n : n + 1], x[n : n + 1], h.reshape(N, K, F)[n : n + 1])
        assert all(np.array_equal(a[0], b[n]) for a, b in zip(alone, together, strict=True))


def test_weights_in_bfloat16(rng):
    N, K, _, _, F = shape = 33, 2, 3, 21, 18
    x, _, _, w = inputs(rng, shape)
    rows = routes(rng, shape)
    kept = (round_to_bf16_ref(w["gate"]).view(np.uint32) >> np.uint32(16)).astype(np.uint16)
    y, expected = np.empty((N * K, F), np.float32), np.empty((N * K, F), np.float32)
    to_experts(y, x, *rows, kept)
    to_experts(expected, x, *rows, widen_bf16_ref(kept))
    assert np.array_equal(y, expected)


@pytest.mark.parametrize("loads", ["random", "same"])
def test_same_bits_for_any_thread_count(rng, same_bits, loads):
    seed = int(rng.integers(1 << 31))
    same_bits(lambda: products(np.random.default_rng(seed), (150, 3, 8, 100, 70), loads)[0])


def test_nan_stays_in_its_token(rng):
    shape = 20, 2, 3, 10, 8
    x, _, h, w = inputs(rng, shape)
    token, offsets = routes(rng, shape)
    h[4] = np.nan
    y = np.empty_like(x)
    from_experts(y, h, token, offsets, w["down"], addend=x)
    assert np.array_equal(np.flatnonzero(np.isnan(y).any(1)), [token[4]])


def test_what_does_not_fit_is_named(rng):
    shape = 6, 2, 3, 8, 5
    token, offsets = routes(rng, shape)
    x, u, h, w = inputs(rng, shape)
    with pytest.raises(ValueError, match=r"y has rows of 10 numbers; 1 matrices take 5"):
        to_experts(u, x, token, offsets, w["gate"])
    with pytest.raises(ValueError, match=r"offsets must be 3 \+ 1 rising numbers from 0 to 12"):
        to_experts(u, x, token, offsets[:-1], w["gate"], w["up"])
    with pytest.raises(ValueError, match="out overlaps y"):
        from_experts(h[:6], h, token, offsets, np.zeros((3, 5, 5), np.float32))
    with pytest.raises(ValueError, match="left has 11 rows, token 12"):
        expert_gradients(w["gate"], u[:11], x, token, offsets, w["up"])
    for outside in (-1, 6):
        wrong = token.copy()
        wrong[3] = outside
        with pytest.raises(ValueError, match=rf"token names row {outside}; there are 0 \.\.\. 5"):
            expert_gradients(w["gate"], u, x, wrong, offsets, w["up"])
    with pytest.raises(TypeError, match="v is uint16 and w float32"):
        to_experts(u, x, token, offsets, w["gate"], w["up"].astype(np.uint16))
    busy = int(np.diff(offsets).argmax())
    first = offsets[busy]
    wrong = token.copy()
    wrong[[first, first + 1]] = token[[first + 1, first]]
    with pytest.raises(ValueError, match=rf"token\[{first + 1}\] is .*; an expert takes its rows in order of tokens"):
        from_experts(x, h, wrong, offsets, w["down"])
