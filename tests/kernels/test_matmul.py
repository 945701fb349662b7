"""Matrix products: every way of lying and every edge, against the reference in float64.

A product has no gradient of its own to prove: its backward is two more products, and those are tested by the same grid.
"""

import os
import subprocess
import sys

import numba
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from abi_py.gradcheck import check_close, check_gradient
from abi_py.kernels import matmul as module
from abi_py.kernels.engine.halves import round_to_bf16_ref, round_to_fp16_ref, widen_bf16_ref
from abi_py.kernels.engine.jit import JIT
from abi_py.kernels.engine.number_formats import FLOAT16, FLOAT32, METHODS
from abi_py.kernels.engine.scratch import scratch
from abi_py.kernels.engine.simd import LANES
from abi_py.kernels.matmul import (
    matmul,
    product,
    product_loops_ref,
    product_ref,
)

WAYS = [(False, False), (False, True), (True, False), (True, True)]

ROWS, COLUMNS, BLOCK_ROWS = FLOAT32.rows, FLOAT32.columns, FLOAT32.block_rows
SLAB_COLUMNS, SLICE_TERMS = FLOAT32.slab_columns, FLOAT32.slice_terms


def operands(rng, m, n, k, transpose_a, transpose_b, dtype=np.float32):
    a = rng.standard_normal((k, m) if transpose_a else (m, k)).astype(dtype)
    b = rng.standard_normal((n, k) if transpose_b else (k, n)).astype(dtype)
    return a, b


def exact(a, b, transpose_a=False, transpose_b=False, addend=None):
    wide = None if addend is None else addend.astype(np.float64)
    return product_ref(a.astype(np.float64), b.astype(np.float64), transpose_a, transpose_b, wide)


def check(rng, m, n, k, way):
    """Check writing, adding, and adding another matrix."""
    a, b = operands(rng, m, n, k, *way)
    before = rng.standard_normal((m, n)).astype(np.float32)
    out = np.full((m, n), np.nan, np.float32)
    assert matmul(a, b, out, *way) is out
    check_close(out, exact(a, b, *way), 1e-5)
    out[...] = before
    matmul(a, b, out, *way, accumulate=True)
    check_close(out, exact(a, b, *way, before), 1e-5)
    out[...] = np.nan
    product(out, a, b, *way, addend=before)
    check_close(out, exact(a, b, *way, before), 1e-5)


@pytest.mark.parametrize("way", WAYS)
def test_three_loops_are_the_definition(rng, way):
    for m, n, k in ((3, 5, 7), (1, 1, 1), (4, 2, 0)):
        a, b = operands(rng, m, n, k, *way, np.float64)
        d = rng.standard_normal((m, n))
        before = d.copy()
        for addend in (None, d):
            check_close(product_loops_ref(a, b, *way, addend), product_ref(a, b, *way, addend), 1e-12)
        assert np.array_equal(d, before)
    assert product_loops_ref(np.array([[1, 2]]), np.array([[3], [4]]))[0, 0] == 11


@pytest.mark.parametrize("way", WAYS)
def test_edges_of_the_tile(rng, way):
    for m in (1, ROWS - 1, ROWS + 1):
        for n in (1, COLUMNS - 1, COLUMNS, COLUMNS + LANES + 1):
            for k in (1, LANES + 1):
                check(rng, m, n, k, way)


LARGE = [
    (2 * BLOCK_ROWS + 1, 7, 5),  # several blocks of A
    (BLOCK_ROWS, COLUMNS, SLICE_TERMS),  # everything whole
    (13, 11, SLICE_TERMS + 1),  # two slices
    (3, 5, 2 * SLICE_TERMS + 3),  # three slices
    (3, 2 * SLAB_COLUMNS + COLUMNS + 1, SLICE_TERMS + 1),  # B wider than a slab
    (97, 101, 103),
    (1, 1, 3 * SLICE_TERMS),
]


@pytest.mark.skipif(not JIT, reason="slow without compiling; the small shapes take the same lines")
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("shape", LARGE)
def test_edges_of_the_blocks(rng, shape, way):
    check(rng, *shape, way)


@settings(max_examples=40 if JIT else 5, derandomize=True)
@given(
    m=st.integers(0, 40),
    n=st.integers(0, 70),
    k=st.integers(0, 40),
    way=st.sampled_from(WAYS),
    seed=st.integers(0, 2**31),
)
def test_any_small_shape(m, n, k, way, seed):
    rng = np.random.default_rng(seed)
    a, b = operands(rng, m, n, k, *way)
    before = rng.standard_normal((m, n)).astype(np.float32)
    check_close(matmul(a, b, None, *way), exact(a, b, *way), 1e-5 if k else 0)
    check_close(matmul(a, b, before.copy(), *way, accumulate=True), exact(a, b, *way, before), 1e-5)


@pytest.mark.parametrize("way", WAYS)
def test_without_depth_the_product_is_zero(rng, way):
    a, b = operands(rng, 3, 4, 0, *way)
    before = rng.standard_normal((3, 4)).astype(np.float32)
    assert not matmul(a, b, np.full((3, 4), np.nan, np.float32), *way).any()
    assert np.array_equal(matmul(a, b, before.copy(), *way, accumulate=True), before)


# -- layouts of operands --------------------------------------------------------------------------


def layouts(x):
    """Return x in every memory layout that a caller may hand over, by name."""
    rows, columns = x.shape
    wide = np.full((rows + 2, 3 * columns + 5), np.nan, np.float32)
    wide[1:-1, 3 : 3 + columns] = x
    every_other = np.full((2 * rows, 2 * columns), np.nan, np.float32)
    every_other[::2, ::2] = x
    record = np.dtype([("x", np.float32, (columns,)), ("flag", np.uint8)])
    records = np.zeros(rows, record)  # the rows of x are 4 * columns + 1 bytes apart
    records["x"] = x
    read_only = x.copy()
    read_only.setflags(write=False)
    return {
        "plain": x.copy(),
        "Fortran": np.asfortranarray(x),
        "columns of a wider matrix": wide[1:-1, 3 : 3 + columns],
        "every other element": every_other[::2, ::2],
        "rows backwards": x[::-1].copy()[::-1],
        "columns backwards": x[:, ::-1].copy()[:, ::-1],
        "field of records": records["x"],
        "read-only": read_only,
    }


def test_operands_in_any_layout(rng):
    x, y = operands(rng, 5, 13, 7, False, False)
    for transpose_a, a in ((False, x), (True, np.ascontiguousarray(x.T))):
        for transpose_b, b in ((False, y), (True, np.ascontiguousarray(y.T))):
            for name, laid in layouts(a).items():
                assert np.array_equal(laid, a), name
                check_close(matmul(laid, b, None, transpose_a, transpose_b), exact(x, y), 1e-5)
            for laid in layouts(b).values():
                check_close(matmul(a, laid, None, transpose_a, transpose_b), exact(x, y), 1e-5)


@pytest.mark.parametrize("accumulate", [False, True])
def test_out_in_any_layout(rng, accumulate):
    a, b = operands(rng, 5, 13, 7, False, False)
    before = rng.standard_normal((5, 13)).astype(np.float32)
    for name, out in layouts(before).items():
        if name == "read-only":
            continue
        whole = out.base.copy() if isinstance(out.base, np.ndarray) else None
        assert matmul(a, b, out, accumulate=accumulate) is out
        check_close(out, exact(a, b, addend=before if accumulate else None), 1e-5)
        if whole is not None and whole.dtype == np.float32:
            out[...] = before
            assert np.array_equal(out.base, whole, equal_nan=True)  # nothing beside out was written


@pytest.mark.parametrize("accumulate", [False, True])
def test_out_may_overlap_an_operand(rng, accumulate):
    x = rng.standard_normal((9, 9)).astype(np.float32)
    y = rng.standard_normal((9, 9)).astype(np.float32)
    choices = (lambda out: (out, y)), (lambda out: (y, out)), (lambda out: (out, out)), (lambda out: (out.T, y))
    for arguments in choices:
        out = x.copy()
        a, b = (np.array(part) for part in arguments(out))
        matmul(*arguments(out), out, accumulate=accumulate)
        check_close(out, exact(a, b, addend=x if accumulate else None), 1e-5)
    both = rng.standard_normal((10, 9)).astype(np.float32)
    expected = exact(both[:9], y)
    check_close(matmul(both[:9], y, both[1:]), expected, 1e-5)  # overlaps by eight rows


def test_a_product_is_not_written_over_its_operands(rng):
    y, x = rng.standard_normal((2, 9, 9)).astype(np.float32)
    before = y.copy()
    for arguments, name in (((y, y, x), "a"), ((y, x, y), "b"), ((y[1:], y[:8], x), "a")):
        with pytest.raises(ValueError, match=f"out overlaps {name}, "):
            product(*arguments)
    with pytest.raises(ValueError, match="out overlaps addend"):
        product(y[1:], x[1:], x, addend=y[:8])
    assert np.array_equal(y, before)
    product(y, x, x, addend=y)
    check_close(y, exact(x, x, addend=before), 1e-5)
    both = np.concatenate([x, x], axis=1)
    product(both[:, :9], both[:, 9:], x)  # side by side, without a number in common
    check_close(both[:, :9], exact(x, x), 1e-5)


def test_stacks_broadcast_as_in_numpy(rng):
    for left, right in (((3, 2), (3, 2)), ((3, 1), (2,)), ((), (4,)), ((5,), ()), ((0,), ()), ((2, 0, 1), (3,))):
        a = rng.standard_normal((*left, 5, 7)).astype(np.float32)
        b = rng.standard_normal((*right, 7, 4)).astype(np.float32)
        expected = a.astype(np.float64) @ b.astype(np.float64)
        check_close(matmul(a, b), expected, 1e-5)
        turned = matmul(a.swapaxes(-1, -2), b.swapaxes(-1, -2), transpose_a=True, transpose_b=True)
        check_close(turned, expected, 1e-5)
        out = np.ones(expected.shape, np.float32)
        check_close(matmul(a, b, out, accumulate=True), expected + 1, 1e-5)


# -- numbers -------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", WAYS)
def test_same_bits_for_any_thread_count(rng, same_bits, way):
    a, b = operands(rng, *((3 * BLOCK_ROWS + 5, 67, SLICE_TERMS + 9) if JIT else (31, 67, 9)), *way)
    same_bits(lambda: matmul(a, b, None, *way))


def test_same_bits_however_many_rows_go_together(rng):
    """A row of the product does not depend on the other rows: a batch of one gives the bits of a batch of many."""
    a, b = operands(rng, 2 * ROWS + 3, 53, 41, False, True)

    def multiplied(rows):
        out = np.empty((len(rows), len(b)), np.float32)
        product(out, rows, b, transpose_b=True)
        return out

    alone = np.concatenate([multiplied(a[i : i + 1]) for i in range(len(a))])
    assert multiplied(a).tobytes() == alone.tobytes()


def test_nan_and_infinity_stay_where_they_are(rng):
    a, b = operands(rng, 2 * ROWS, 2 * COLUMNS, 9, False, False)
    a[3, 4] = np.nan
    y = matmul(a, b)
    assert np.isnan(y[3]).all()
    assert np.isfinite(np.delete(y, 3, axis=0)).all()
    a[3, 4] = 0
    b[2, 5] = np.inf
    y = matmul(a, b)
    assert not np.isfinite(y[:, 5]).any()
    assert np.isfinite(np.delete(y, 5, axis=1)).all()
    b[2, 5] = 0
    out = np.zeros_like(y)
    out[1, 1] = np.nan
    assert np.argwhere(np.isnan(matmul(a, b, out.copy(), accumulate=True))).tolist() == [[1, 1]]
    assert np.isfinite(matmul(a, b, out)).all()  # overwriting forgets what was there


def test_gradients_of_a_product(rng):
    """y = x Wᵀ: dx = dy W and dw = dyᵀ x, the two products of every linear layer."""
    x, w = operands(rng, 7, 5, 11, False, True, np.float64)
    dy = rng.standard_normal((7, 5))

    def loss(x, w):
        return (product_ref(x, w, transpose_b=True) * dy).sum()

    check_gradient(lambda x: loss(x, w), x, product_ref(dy, w), rng)
    check_gradient(lambda w: loss(x, w), w, product_ref(dy, x, transpose_a=True), rng)


def test_a_thread_pool_that_shrinks_and_grows(rng):
    a, b = operands(rng, 50, 60, 70, False, False)
    expected = matmul(a, b)
    before = numba.get_num_threads()
    try:
        for count in (1, 2, 1):
            numba.set_num_threads(count)
            assert matmul(a, b).tobytes() == expected.tobytes()
    finally:
        numba.set_num_threads(before)


# -- borders -------------------------------------------------------------------------------------


def test_wrong_calls_are_refused():
    x, wide = np.ones((3, 4), np.float32), np.ones((3, 4))
    with pytest.raises(TypeError, match=r"a is float64; matmul takes float32 arrays; use a\.astype"):
        matmul(wide, x)
    with pytest.raises(TypeError, match="b is float16"):
        matmul(x, x.astype(np.float16))
    with pytest.raises(TypeError, match="b is >f4"):
        matmul(x, x.astype(">f4"))
    with pytest.raises(TypeError, match="a is list"):
        matmul([[1.0]], x)
    with pytest.raises(TypeError, match="out is float64"):
        matmul(x, x.T, np.zeros((3, 3)))
    with pytest.raises(ValueError, match=r"a has shape \(4,\); matmul takes matrices"):
        matmul(x[0], x)
    with pytest.raises(ValueError, match="a sums over 4 elements and b over 3"):
        matmul(x, x)
    with pytest.raises(ValueError, match="a sums over 3 elements and b over 4"):
        matmul(x, x, transpose_a=True, transpose_b=True)
    with pytest.raises(ValueError, match=r"out has shape \(3, 4\); the product has shape \(3, 3\)"):
        matmul(x, x, np.zeros((3, 4), np.float32), transpose_b=True)
    fixed = np.zeros((3, 3), np.float32)
    fixed.flags.writeable = False
    with pytest.raises(ValueError, match="out is read-only"):
        matmul(x, x, fixed, transpose_b=True)
    assert not fixed.any()
    with pytest.raises(ValueError, match="accumulate adds to an existing array"):
        matmul(x, x, transpose_b=True, accumulate=True)
    with pytest.raises(ValueError, match="broadcast"):
        matmul(np.ones((2, 3, 4), np.float32), np.ones((3, 4, 3), np.float32))


def test_blas_is_there_for_comparison(rng, monkeypatch):
    monkeypatch.setattr(module, "BACKEND", "blas")
    for way in WAYS:
        check(rng, 5, 13, 7, way)
        a, b = operands(rng, 3, 4, 0, *way)
        assert not matmul(a, b, None, *way).any()


def test_an_unknown_backend_is_refused():
    environment = os.environ | {"ABI_MATMUL": "mkl"}
    code = "import abi_py.kernels.matmul"
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert "ABI_MATMUL (mkl) must be numba or blas" in done.stderr
    assert done.returncode != 0


# -- bfloat16 and half precision -----------------------------------------------------------------

ROUNDINGS = {
    **{str(number_format): (number_format, round_to_bf16_ref) for number_format in METHODS.values()},
    "float16": (FLOAT16, round_to_fp16_ref),
}


@pytest.mark.parametrize("number_format", ROUNDINGS)
@pytest.mark.parametrize("way", WAYS)
def test_operands_are_rounded_and_nothing_else(rng, way, number_format, threads):
    number_format, rounding = ROUNDINGS[number_format]
    for m, n, k in ((1, 1, 1), (13, 7, 5), (2 * ROWS + 1, COLUMNS + 3, 2 * SLICE_TERMS + 3 if JIT else 9)):
        a, b = operands(rng, m, n, k, *way)
        rounded = [rounding(x).astype(np.float64) for x in (a, b)]
        addend = rng.standard_normal((m, n)).astype(np.float32)
        out = addend.copy()
        product(out, a, b, *way, addend=out, number_format=number_format)
        check_close(out, product_ref(*rounded, *way, addend), 1e-5)


@pytest.mark.parametrize("way", WAYS)
def test_operands_stored_in_bfloat16(rng, way):
    m, n, k = (2 * ROWS + 1, COLUMNS + 3, 2 * SLICE_TERMS + 3) if JIT else (5, 7, 9)
    a, b = (np.ascontiguousarray(x.view(np.uint32) >> 16).astype(np.uint16) for x in operands(rng, m, n, k, *way))
    expected = product_ref(*(widen_bf16_ref(x).astype(np.float64) for x in (a, b)), *way)
    for number_format in (FLOAT32, *METHODS.values()):
        for left, right in ((a, b), (a, widen_bf16_ref(b)), (widen_bf16_ref(a), b)):
            out = np.empty((m, n), np.float32)
            product(out, left, right, *way, number_format=number_format)
            check_close(out, expected, 1e-5)


def test_a_number_too_large_for_half_precision_becomes_infinite():
    out = np.empty((1, 1), np.float32)
    product(out, np.float32([[65520]]), np.float32([[1]]), number_format=FLOAT16)
    assert out[0, 0] == np.inf


@pytest.mark.parametrize("number_format", ROUNDINGS)
def test_rounded_products_have_the_same_bits_for_any_number_of_threads(rng, same_bits, number_format):
    a, b = operands(rng, *((301, 203, 2 * SLICE_TERMS + 5) if JIT else (31, 67, 9)), False, True)

    def make():
        out = np.empty((a.shape[0], b.shape[0]), np.float32)
        product(out, a, b, transpose_b=True, number_format=ROUNDINGS[number_format][0])
        return out

    same_bits(make)


# -- how a product is cut up ------------------------------------------------------------------------


def _cut_product(a, b, way, number_format, parts, addend):
    """Return the product of parts that are given; `product` chooses them."""
    out = np.full(addend.shape, np.nan, np.float32)
    packed = scratch("product", *module.panels(number_format))
    packed = packed[::-1] if parts.a_stays else packed
    module._product(out, addend, a, b, *packed, *way, True, number_format.table, *parts)
    return out


@pytest.mark.parametrize("way", WAYS)
def test_bits_do_not_depend_on_how_a_product_is_cut_up(rng, way):
    m, n, k = (333, 401, FLOAT32.slice_terms + 77) if JIT else (21, 67, 9)
    a, b = operands(rng, m, n, k, *way)
    addend = rng.standard_normal((m, n)).astype(np.float32)
    expected = np.empty((m, n), np.float32)
    product(expected, a, b, *way, addend=addend)
    check_close(expected, exact(a, b, *way, addend), 1e-5)
    cuts = {module._parts(m, n, 1 << 20, FLOAT32, threads) for threads in (1, 2, 3, 8, 32, 128)}
    rows, columns = FLOAT32.rows, FLOAT32.columns
    cuts |= {module.Parts(m, n, m + rows, columns, True), module.Parts(m, n, rows, columns, False)}
    assert len(cuts) > 4
    for parts in cuts:
        assert np.array_equal(_cut_product(a, b, way, FLOAT32, parts, addend), expected), parts


@pytest.mark.parametrize("way", WAYS)
def test_bits_do_not_depend_on_tile_and_blocks(rng, way, tiles):
    m, n, k = (71, 131, FLOAT32.slice_terms + 19) if JIT else (13, 37, 9)
    a, b = operands(rng, m, n, k, *way)
    found = []
    for number_format in tiles:
        out = np.ones((m, n), np.float32)
        product(out, a, b, *way, addend=out, number_format=number_format)
        found.append(out)
    check_close(found[0], exact(a, b, *way, np.ones((m, n), np.float32)), 1e-5)
    if JIT:  # a tile's twin is NumPy's product, whose last bits depend on the shape
        assert all(np.array_equal(x, found[0]) for x in found)
    for x in found:
        check_close(x, found[0], 1e-6)


@pytest.mark.parametrize("threads", [1, 2, 8, 32, 128])
def test_parts_cover_a_product_and_keep_threads_busy(threads):
    for m, n, k in ((2048, 1536, 512), (2048, 512, 1536), (512, 512, 2048), (384, 32000, 512), (32000, 512, 384)):
        parts = module._parts(m, n, k, FLOAT32, threads)
        count = -(-m // parts.rows) * -(-n // parts.columns)
        turns = -(-count // threads)
        assert m * n / (threads * turns * parts.rows * parts.columns) > 0.7  # of the slowest thread's time all work
        most = FLOAT32.panels[::-1] if parts.a_stays else FLOAT32.panels
        assert parts.block_rows * FLOAT32.slice_terms <= most[0]
        assert parts.slab_columns * FLOAT32.slice_terms <= most[1]
    parts = module._parts(8, 8, 8, FLOAT32, threads)
    assert parts.rows >= 8
    assert parts.columns >= 8  # too small to be shared: one part
