"""DoRA: the nails, lengths of rows without B A, what changes no bit, rows of zeros, threads and NaN."""

import numpy as np
import pytest

from abi_py.gradcheck import check_close, check_gradient
from abi_py.kernels.dora import (
    column_squares,
    column_squares_ref,
    dora_backward,
    dora_backward_ref,
    dora_forward,
    dora_forward_ref,
    row_factors,
    row_factors_ref,
    row_lengths,
    row_lengths_ref,
    row_squares,
    row_squares_ref,
)

SIZES = [(1, 1, 1, 1), (5, 7, 3, 2), (37, 31, 17, 5), (131, 67, 70, 16)]  # N, M, K, R
SCALE = 0.7


def inputs(rng, N, M, K, R, dtype=np.float32):
    """Return h, W, A, B, m, the gradient of y."""
    shapes = {"h": (N, K), "w": (M, K), "a": (R, K), "b": (M, R), "m": (M,), "dy": (N, M)}
    made = {name: rng.standard_normal(shape).astype(dtype) for name, shape in shapes.items()}
    made["m"] = np.abs(made["m"]) + 1
    return made


def layer(h, w, a, b, m, n):
    """Return y (N, M) of a layer without dropout, by the reference, with n as it is given."""
    v = h @ w.T
    return dora_forward_ref(v, v, SCALE * h @ a.T @ b.T, row_factors_ref(m, n))


@pytest.mark.parametrize("sizes", SIZES)
def test_derivation(rng, sizes):
    """dm, and dz as the gradient of A, B and h, with n as a constant; y is h W'ᵀ for W' with rows of length m."""
    x = inputs(rng, *sizes, np.float64)
    dy = x.pop("dy")
    n = row_lengths_ref(x["w"], x["a"], x["b"], SCALE)
    y, z = layer(**x, n=n)
    scaled = (x["m"] / n)[:, None] * (x["w"] + SCALE * x["b"] @ x["a"])
    check_close(np.linalg.norm(scaled, axis=1), x["m"], 1e-12)
    check_close(y, x["h"] @ scaled.T, 1e-12)
    dz, dm = dora_backward_ref(dy, z, row_factors_ref(x["m"], n), n)
    gradients = {
        "m": dm,
        "b": SCALE * dz.T @ (x["h"] @ x["a"].T),
        "a": SCALE * (dz @ x["b"]).T @ x["h"],
        "h": dz @ (x["w"] + SCALE * x["b"] @ x["a"]),
    }
    for name, gradient in gradients.items():
        check_gradient(lambda value: (layer(**{**x, name: value}, n=n)[0] * dy).sum(), x[name], gradient, rng)  # noqa: B023


def test_with_dropout_the_layer_itself_reads_all_of_x(rng):
    """y = x Wᵀ + (g - 1) h Wᵀ + g t, as PEFT computes it: the gradient of x is that of both paths."""
    x = inputs(rng, 5, 7, 3, 2, np.float64)
    mask = rng.integers(0, 2, x["h"].shape) * 2.0
    n = row_lengths_ref(x["w"], x["a"], x["b"], SCALE)
    g = row_factors_ref(x["m"], n)

    def output(inner):
        h = inner * mask
        return dora_forward_ref(inner @ x["w"].T, h @ x["w"].T, SCALE * h @ x["a"].T @ x["b"].T, g)

    dz, _ = dora_backward_ref(x["dy"], output(x["h"])[1], g, n)
    change = (dz - x["dy"]) @ x["w"] + SCALE * dz @ x["b"] @ x["a"]
    check_gradient(lambda h: (output(h)[0] * x["dy"]).sum(), x["h"], x["dy"] @ x["w"] + change * mask, rng)


def lengths(x, squares=None):
    """Return n (M,) float32 by the kernels."""
    n, gram = np.empty(len(x["w"]), np.float32), x["a"] @ x["a"].T
    if squares is None:
        squares = np.empty(len(x["w"]))
        row_squares(squares, x["w"])
    row_lengths(n, squares, np.ascontiguousarray(x["a"] @ x["w"].T), x["b"], gram, SCALE)
    return n


@pytest.mark.parametrize("sizes", SIZES)
def test_lengths_of_a_tables_columns(rng, sizes):
    """They are those of the rows of Eᵀ, to which Aᵀ is A; squares are added to, so a table may come in pieces."""
    V, C, _, R = sizes
    e, a, b = (rng.standard_normal(shape).astype(np.float32) for shape in ((V, C), (V, R), (C, R)))
    squares = np.zeros(C)
    for some in (e[: V // 3], e[V // 3 :]):
        column_squares(squares, some)
    check_close(squares, column_squares_ref(e.astype(np.float64)), 1e-12)
    n, inner = np.empty(C, np.float32), np.ascontiguousarray(a.T)
    row_lengths(n, squares, inner @ e, b, inner @ a, SCALE)
    wide = [each.astype(np.float64) for each in (e.T, a.T, b)]
    check_close(n, np.linalg.norm(wide[0].T + SCALE * wide[1].T @ wide[2].T, axis=0), 1e-6)
    check_close(n, row_lengths_ref(*wide, SCALE), 1e-6)
    row_lengths(n, squares, np.zeros((R, C), np.float32), b, np.zeros((R, R), np.float32), SCALE)
    assert n.tobytes() == np.sqrt(squares).astype(np.float32).tobytes()  # A is zero: to the bit


@pytest.mark.parametrize("kind", "abm")
def test_derivation_of_a_table(rng, kind):
    """x_i = f g (E[id_i] + s A[id_i] Bᵀ) with n as a constant: dA and dB by dz, dm by z."""
    f, ids = 1.7, rng.integers(0, 9, 14)
    shapes = {"e": (9, 5), "a": (9, 2), "b": (5, 2), "m": (5,), "dx": (14, 5)}
    x = {name: rng.standard_normal(shape) for name, shape in shapes.items()}
    n = row_lengths_ref(x["e"].T, x["a"].T, x["b"], SCALE)

    def output(**given):
        t = f * SCALE * given["a"][ids] @ given["b"].T
        v = f * given["e"][ids]
        return dora_forward_ref(v, v, t, row_factors_ref(given["m"], n))

    dz, dm = dora_backward_ref(x["dx"], output(**x)[1], row_factors_ref(x["m"], n), n)
    da = np.zeros_like(x["a"])
    np.add.at(da, ids, f * SCALE * dz @ x["b"])
    wanted = {"a": da, "b": f * SCALE * dz.T @ x["a"][ids], "m": dm}[kind]
    check_gradient(lambda value: (output(**{**x, kind: value})[0] * x["dx"]).sum(), x[kind], wanted, rng)


@pytest.mark.parametrize("sizes", SIZES)
def test_kernels_equal_the_reference(rng, sizes):
    x = inputs(rng, *sizes)
    wide = {name: value.astype(np.float64) for name, value in x.items()}
    squares = np.empty(sizes[1])
    row_squares(squares, x["w"])
    check_close(squares, row_squares_ref(wide["w"]), 1e-12)
    n = lengths(x)
    check_close(n, row_lengths_ref(wide["w"], wide["a"], wide["b"], SCALE), 1e-6)
    g = np.empty_like(n)
    row_factors(g, x["m"], n)
    check_close(g, row_factors_ref(wide["m"], n.astype(np.float64)), 1e-6)

    y, t, addend = rng.standard_normal((3, *sizes[:2])).astype(np.float32)
    for given, base in ((True, None), (False, None), (False, addend)):
        out, z = y.copy(), t[::-1].copy() if given else np.full_like(t, np.nan)
        v = z.astype(np.float64) if given else y.astype(np.float64) - (0 if base is None else base)
        expected = dora_forward_ref(y.astype(np.float64), v, t.astype(np.float64), g.astype(np.float64))
        dora_forward(out, z, t, g, base, given)
        check_close(out, expected[0], 1e-5)
        check_close(z, expected[1], 1e-5)

    before = rng.standard_normal(sizes[1]).astype(np.float32)
    dm, dz = before.copy(), np.empty_like(x["dy"])
    dora_backward(dz, dm, x["dy"], z, g, n)
    expected = dora_backward_ref(wide["dy"], z.astype(np.float64), g.astype(np.float64), n.astype(np.float64))
    check_close(dz, expected[0], 1e-6)
    check_close(dm, expected[1] + before, 1e-5)
    again, in_z = x["dy"].copy(), z.copy()
    dora_backward(again, dm, again, z, g, n)
    dora_backward(in_z, dm, x["dy"], in_z, g, n)
    assert again.tobytes() == in_z.tobytes() == dz.tobytes()
    out, in_t = y.copy(), t.copy()
    dora_forward(y, z, t, g)
    dora_forward(out, in_t, in_t, g)
    assert (out.tobytes(), in_t.tobytes()) == (y.tobytes(), z.tobytes())


@pytest.mark.parametrize("given", [False, True])
def test_a_fresh_adapter_changes_no_bit(rng, given):
    """n of B = 0 is m to the bit, however long the rows are, so g is 1; y and z then hold what was there."""
    x = inputs(rng, 3, 211, 19, 4)
    x["w"] *= np.exp(20 * rng.standard_normal((211, 1))).astype(np.float32)
    x["b"][:] = 0
    m = lengths(x)
    g = np.empty_like(m)
    row_factors(g, m, lengths(x))
    assert (g == 1).all()
    y, v = rng.standard_normal((2, 3, 211)).astype(np.float32)
    out, z = y.copy(), v.copy()
    dora_forward(out, z, np.zeros_like(y), g, None, given)
    assert out.tobytes() == y.tobytes()
    assert z.tobytes() == (v if given else y).tobytes()


def test_a_row_of_zeros_has_a_factor_of_one_and_no_gradient(rng):
    x = inputs(rng, 4, 5, 6, 2)
    x["w"][2], x["b"][2], x["m"][2] = 0, 0, 0
    n, g = lengths(x), np.empty(5, np.float32)
    row_factors(g, x["m"], n)
    assert n[2] == 0
    assert g[2] == 1
    dz, dm = np.empty_like(x["dy"]), np.zeros(5, np.float32)
    dora_backward(dz, dm, x["dy"], x["dy"], g, n)
    assert dm[2] == 0
    assert np.isfinite(dm).all()
    x["b"][2] = 1  # once B has learned, the length that is trained decides
    row_factors(g, x["m"], lengths(x))
    assert g[2] == 0


def test_a_row_that_the_adapter_takes_away_is_not_below_zero(rng):
    """W + s B A = 0 up to rounding: n is about 0, and no NaN."""
    a = rng.standard_normal((2, 40)).astype(np.float32)
    b = rng.standard_normal((300, 2)).astype(np.float32)
    x = {"w": (-SCALE * b.astype(np.float64) @ a).astype(np.float32), "a": a, "b": b}
    n = lengths(x)
    assert np.isfinite(n).all()
    assert (n < 1e-2).all()


def test_columns_of_a_wider_matrix(rng):
    x = inputs(rng, 9, 5, 6, 2)
    whole = rng.standard_normal((3, 9, 12)).astype(np.float32)
    expected, g = whole.copy(), np.full(5, 1.5, np.float32)
    y, addend, dy = (each[:, 3:8] for each in whole)
    z, t = np.empty((9, 5), np.float32), np.ones((9, 5), np.float32)
    dora_forward(y, z, t, g, addend)
    expected[0, :, 3:8] += np.float32(0.5) * (expected[0] - expected[1])[:, 3:8] + np.float32(1.5)
    check_close(whole, expected, 1e-6)
    dz, dm = np.zeros((9, 12), np.float32), np.zeros(5, np.float32)
    dora_backward(dz[:, 3:8], dm, dy, z, g, lengths(x))
    assert not dz[:, :3].any()
    assert not dz[:, 8:].any()
    check_close(dz[:, 3:8], np.float32(1.5) * dy, 1e-6)


def test_same_bits_for_any_thread_count(rng, same_bits):
    x = inputs(rng, 131, 67, 70, 16)
    t, addend = rng.standard_normal((2, 131, 67)).astype(np.float32)

    def run():
        n, g = lengths(x), np.empty(67, np.float32)
        row_factors(g, x["m"], n)
        y, z, dz, dm = x["dy"] + 1, np.empty_like(t), np.empty_like(t), np.ones_like(n)
        dora_forward(y, z, t, g, addend)
        dora_backward(dz, dm, x["dy"], z, g, n)
        squares = np.zeros(67)
        column_squares(squares, t)
        return n, g, y, z, dz, dm, squares

    same_bits(run)


def test_nan_stays_in_its_row(rng):
    x = inputs(rng, 4, 3, 6, 2)
    x["b"][1, 0] = np.nan
    n, g = lengths(x), np.empty(3, np.float32)
    row_factors(g, x["m"], n)
    assert np.isnan(n).tolist() == np.isnan(g).tolist() == [False, True, False]
    dy, dm = x["dy"], np.zeros(3, np.float32)
    dora_backward(np.empty_like(dy), dm, dy, dy, g, n)
    assert np.isnan(dm).tolist() == [False, True, False]
