"""Products of generation: the definition, the bits of the whole product for any number of rows, edges, threads, NaN."""

import numpy as np
import pytest

from abi_py.gradcheck import check_close
from abi_py.kernels.engine.jit import JIT
from abi_py.kernels.engine.number_formats import FLOAT32
from abi_py.kernels.engine.simd import LANES
from abi_py.kernels.engine.streams import STREAMED
from abi_py.kernels.matmul import product
from abi_py.kernels.storage.bf16 import STORAGE as BF16
from abi_py.kernels.streamed_matmul import streamed_product, streamed_product_ref

ROWS, COLUMNS, SLICE_TERMS = FLOAT32.chosen.rows, FLOAT32.chosen.columns, FLOAT32.chosen.slice_terms
SHAPES = [  # (N, M, K)
    (1, 1, 1),
    (1, LANES, LANES),
    (STREAMED, 5, 4 * LANES + 1),
    (2, 2 * LANES + 3, 7),
    (3, 7, 2 * LANES),
    (STREAMED + 1, COLUMNS + 1, 9),
    (2 * STREAMED + ROWS + 1, 2 * LANES, 3),
]
LARGE = [
    (1, 3, SLICE_TERMS),
    (STREAMED, LANES + 1, 2 * SLICE_TERMS + 5),
    (STREAMED + 3, 2 * COLUMNS + 7, SLICE_TERMS + 1),
    (5 * STREAMED + 2, 3, SLICE_TERMS + 2),
]
SHAPES += LARGE if JIT else []
compiled_only = pytest.mark.skipif(not JIT, reason="NumPy's sums depend on the shape")


def operands(rng, N, M, K):
    """Return x, w and an addend, cut out of wider arrays, and the array that out is a part of."""
    x, w = rng.standard_normal((N, K + 3)).astype(np.float32), rng.standard_normal((M, K + 9)).astype(np.float32)
    return x[:, 3:], w[::-1, 4 : 4 + K], rng.standard_normal((N + 1, M + 5)).astype(np.float32)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("add", [False, True])
@pytest.mark.parametrize("narrow", [False, True])
def test_kernel_equals_the_reference_and_has_the_bits_of_the_product(rng, shape, add, narrow, threads):
    x, w, whole = operands(rng, *shape)
    wide = w
    if narrow:
        w = BF16.encode_ref(np.ascontiguousarray(w))
        wide = BF16.decode_ref(w)
    N, M, _ = shape
    before, out = whole.copy(), whole[:N, 2 : 2 + M]
    addend = before[:N, 2 : 2 + M]
    streamed_product(out, x, w, addend=out if add else None)
    expected = streamed_product_ref(x.astype(np.float64), wide.astype(np.float64), addend if add else None)
    check_close(out, expected, 1e-5)
    packed = np.empty((N, M), np.float32)
    product(packed, x, w, transpose_b=True, addend=addend if add else None)
    assert np.array_equal(out, packed) or not JIT
    before[:N, 2 : 2 + M] = out
    assert np.array_equal(whole, before)  # nothing else was written


@pytest.mark.parametrize("shape", [shape for shape in SHAPES if shape[0] <= STREAMED], ids=str)
def test_half_precision_has_the_bits_of_what_it_decodes_to(rng, shape):
    x, w, whole = operands(rng, *shape)
    raw = np.ascontiguousarray(w).astype(np.float16)
    out, expected = np.empty((2, shape[0], shape[1]), np.float32)
    streamed_product(out, x, raw.view(np.int16), addend=whole[: shape[0], : shape[1]])
    streamed_product(expected, x, raw.astype(np.float32), addend=whole[: shape[0], : shape[1]])
    assert np.array_equal(out, expected)


@compiled_only
@pytest.mark.parametrize("columns", [1, LANES + 1])
def test_every_number_of_half_precision(columns):
    raw = np.zeros((65536, columns), np.float16)
    raw[:, 0] = np.arange(65536, dtype=np.uint16).view(np.float16)
    x, out = np.eye(1, columns, dtype=np.float32), np.empty((1, 65536), np.float32)
    streamed_product(out, x, raw.view(np.int16))
    assert np.array_equal(out[0], raw[:, 0].astype(np.float32), equal_nan=True)


def test_half_precision_with_many_rows_is_refused(rng):
    x, out = np.zeros((STREAMED + 1, 4), np.float32), np.zeros((STREAMED + 1, 3), np.float32)
    with pytest.raises(ValueError, match=r"half precision is multiplied with at most \d+ as it is; use stored_product"):
        streamed_product(out, x, np.zeros((3, 4), np.int16))


@compiled_only
@pytest.mark.parametrize("narrow", [False, True])
def test_a_row_has_the_bits_of_the_row_alone(rng, narrow):
    x, w, _ = operands(rng, 70, COLUMNS + LANES + 1, SLICE_TERMS + 3)
    w = BF16.encode_ref(np.ascontiguousarray(w)) if narrow else w
    alone = np.empty((len(x), len(w)), np.float32)
    for n in range(len(x)):
        streamed_product(alone[n : n + 1], x[n : n + 1], w)
    for rows in (2, STREAMED, STREAMED + 1, 3 * ROWS + 1, 70):
        out = np.empty((rows, len(w)), np.float32)
        streamed_product(out, x[:rows], w)
        assert out.tobytes() == alone[:rows].tobytes()


@pytest.mark.parametrize("rows", [1, STREAMED, STREAMED + 2])
def test_same_bits_for_any_number_of_threads(rng, same_bits, rows):
    x, w, _ = operands(rng, rows, *((300, 5 * LANES + 3) if JIT else (9, 5)))

    def make():
        out = np.empty((len(x), len(w)), np.float32)
        streamed_product(out, x, w)
        return out

    same_bits(make)


@pytest.mark.parametrize("rows", [3, STREAMED + 2])
def test_nan_stays_in_its_row_and_column(rng, rows):
    x, w, _ = operands(rng, rows, 7, 5)
    x[1, 2] = w[4, 0] = np.nan
    out = np.zeros((rows, 7), np.float32)
    streamed_product(out, x, w)
    expected = np.zeros((rows, 7), bool)
    expected[1], expected[:, 4] = True, True
    assert np.array_equal(np.isnan(out), expected)


def test_nothing_past_the_edges_is_read(rng):
    """What is beside the operands may be anything: NaN there reaches nothing."""
    for rows in (2, STREAMED + 1):
        x, w = np.full((rows + 1, 24), np.nan, np.float32), np.full((9, 24), np.nan, np.float32)
        x[:rows, :19], w[:7, :19] = rng.standard_normal((rows, 19)), rng.standard_normal((7, 19))
        out = np.empty((rows, 7), np.float32)
        streamed_product(out, x[:rows, :19], w[:7, :19])
        assert np.isfinite(out).all()


def test_without_rows_columns_or_terms():
    for N, M, K in ((0, 3, 2), (2, 0, 3), (2, 3, 0)):
        out = np.full((N, M), 7, np.float32)
        streamed_product(out, np.ones((N, K), np.float32), np.ones((M, K), np.float32))
        assert not out.any()


def test_wrong_arguments_are_refused(rng):
    y, x = rng.standard_normal((2, 9, 9)).astype(np.float32)
    with pytest.raises(ValueError, match="out overlaps w"):
        streamed_product(y[:2], x[:2], y)
    with pytest.raises(ValueError, match="out overlaps addend"):
        streamed_product(y[1:], x[1:], x, addend=y[:8])
