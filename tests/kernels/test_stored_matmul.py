"""Products with frozen matrices: reference, kernels of every storage, bits of one whole product, maps, threads, NaN."""

import numpy as np
import pytest

from abi_py.gradcheck import check_close, check_gradient
from abi_py.kernels import stored_matmul
from abi_py.kernels.engine.jit import JIT
from abi_py.kernels.engine.number_formats import BFLOAT16, FLOAT16, FLOAT32, METHODS
from abi_py.kernels.matmul import product
from abi_py.kernels.storage import STORAGES
from abi_py.kernels.stored_matmul import (
    FEW,
    STRIP,
    stored_product,
    stored_product_backward,
    stored_product_backward_ref,
    stored_product_ref,
    stored_rows,
    stored_rows_ref,
)

ALL = sorted(STORAGES)
SHAPES = [(1, 1, 1), (FEW, 3, 7), (FEW + 1, 5, 3), (11, 130, 37)]  # (N, M, K)
LARGE = (FEW + 3, STRIP + FLOAT32.slice_terms + 5, 300) if JIT else (FEW + 3, 9, 5)


@pytest.fixture
def small_strips(monkeypatch):
    """Cut matrices into strips of four rows, of which plain Python is not tired."""
    monkeypatch.setattr(stored_matmul, "STRIP", 4)


def operands(rng, storage, N, M, K, dtype=np.float32):
    K = -(-K // storage.block) * storage.block
    x, dy, w = (rng.standard_normal(shape) for shape in ((N, K), (N, M), (M, K)))
    return x.astype(dtype), dy.astype(dtype), storage.encode_ref(w.astype(np.float32))


@pytest.mark.parametrize("name", ALL)
def test_derivation(rng, name):
    x, dy, raw = operands(rng, STORAGES[name], 5, 7, 3, np.float64)
    dx = stored_product_backward_ref(dy, raw, STORAGES[name])
    check_gradient(lambda x: (stored_product_ref(x, raw, STORAGES[name]) * dy).sum(), x, dx, rng)


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("add", [False, True])
def test_kernels_equal_the_reference(rng, name, shape, add, threads, small_strips):
    storage = STORAGES[name]
    x, dy, raw = operands(rng, storage, *shape)
    for call, out, given, reference in (
        (stored_product, np.full_like(dy, np.nan), x, stored_product_ref),
        (stored_product_backward, np.full_like(x, np.nan), dy, stored_product_backward_ref),
    ):
        addend = rng.standard_normal(out.shape).astype(np.float32) if add else None
        call(out, given, raw, storage, addend)
        wide = None if addend is None else addend.astype(np.float64)
        check_close(out, reference(given.astype(np.float64), raw, storage, wide), 1e-5)
        if add:  # in its place
            expected = out
            call(addend, given, raw, storage, addend)
            assert np.array_equal(addend, expected)


@pytest.mark.parametrize("name", ALL)
def test_the_rows_of_an_embedding(rng, name, threads):
    storage = STORAGES[name]
    x, _, raw = operands(rng, storage, 9, 5, 3 * storage.block)
    ids = rng.integers(0, 5, 9).astype(np.int32)
    stored_rows(x, ids, raw, storage)
    assert np.array_equal(x, stored_rows_ref(ids, raw, storage))
    with pytest.raises(ValueError, match=r"ids\[8\] is 5"):
        stored_rows(x, np.where(np.arange(9) == 8, 5, ids), raw, storage)


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("number_format", [FLOAT32, FLOAT16, *METHODS.values()], ids=str)
def test_bits_are_those_of_one_product_with_all_of_the_matrix(rng, name, number_format, same_bits):
    storage = STORAGES[name]
    x, dy, raw = operands(rng, storage, *LARGE)
    w = np.ascontiguousarray(storage.decode_ref(raw))

    def make():
        y, dx, whole_y, whole_dx = (np.empty_like(like) for like in (dy, x, dy, x))
        product(whole_y, x, w, transpose_b=True, addend=dy, number_format=number_format)
        product(whole_dx, dy, w, addend=x, number_format=number_format)
        stored_product(y, x, raw, storage, dy, number_format)
        stored_product_backward(dx, dy, raw, storage, x, number_format)
        assert np.array_equal(y, whole_y)
        assert np.array_equal(dx, whole_dx)
        return y, dx

    same_bits(make)


@pytest.mark.parametrize("name", ALL)
def test_few_rows_have_the_bits_of_rows_alone_and_of_float32(rng, name, same_bits):
    storage = STORAGES[name]
    x, dy, raw = operands(rng, storage, FEW, 133 if JIT else 7, 37)
    whole = np.empty_like(dy)

    def make():
        y = np.empty_like(dy)
        stored_product(y, x, raw, storage)
        return y

    same_bits(make)
    product(whole, x, np.ascontiguousarray(storage.decode_ref(raw)), transpose_b=True)
    assert np.array_equal(make(), whole) or not JIT
    for n in range(FEW if JIT else 0):
        alone = np.empty_like(dy[:1])
        stored_product(alone, x[n : n + 1], raw, storage)
        assert np.array_equal(alone, whole[n : n + 1])


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("rows", [2, FEW + 2])
def test_few_rows_are_rounded_to_the_number_format_too(rng, name, rows):
    storage = STORAGES[name]
    x, dy, raw = operands(rng, storage, rows, 9, 5)
    expected, y = np.empty_like(dy), np.empty_like(dy)
    product(expected, x, np.ascontiguousarray(storage.decode_ref(raw)), transpose_b=True, number_format=BFLOAT16)
    stored_product(y, x, raw, storage, number_format=BFLOAT16)
    assert np.array_equal(y, expected)


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("rows", [2, FEW + 2])
def test_maps_and_views(rng, name, rows, tmp_path, small_strips):
    """raw is a read-only map whose rows are a stride apart; x, y and the addend are columns of wider arrays."""
    storage = STORAGES[name]
    x, dy, raw = operands(rng, storage, rows, 11, 3)
    wide = np.concatenate([raw, raw], 1)
    wide.tofile(tmp_path / "raw")
    mapped = np.memmap(tmp_path / "raw", storage.dtype, "r", shape=wide.shape)[:, : raw.shape[1]]
    wide_x, wide_y = np.full((rows, x.shape[1] + 5), np.nan, np.float32), np.full((rows, 17), 7, np.float32)
    wide_x[:, 3 : 3 + x.shape[1]] = x
    y = wide_y[:, 2:13]
    y[...] = dy
    stored_product(y, wide_x[:, 3 : 3 + x.shape[1]], mapped, storage, y)
    check_close(y, stored_product_ref(x.astype(np.float64), raw, storage, dy.astype(np.float64)), 1e-5)
    assert (wide_y[:, :2] == 7).all()
    assert (wide_y[:, 13:] == 7).all()
    dx = np.empty_like(x)
    stored_product_backward(dx, dy, mapped, storage)
    check_close(dx, stored_product_backward_ref(dy.astype(np.float64), raw, storage), 1e-5)


@pytest.mark.parametrize("name", ALL)
def test_a_matrix_without_rows_or_columns(name):
    storage = STORAGES[name]
    ones = np.ones((2, 3 * storage.block), np.float32)
    stored_product_backward(ones, np.empty((2, 0), np.float32), storage.encode_ref(ones)[:0], storage)
    assert not ones.any()
    y = np.ones((2, 4), np.float32)
    stored_product(y, np.empty((2, 0), np.float32), storage.encode_ref(np.empty((4, 0), np.float32)), storage, y)
    assert (y == 1).all()


@pytest.mark.parametrize("name", [name for name in ALL if STORAGES[name].block == 1])
@pytest.mark.parametrize("rows", [3, FEW + 1])
def test_nan_stays_in_its_row_and_column(rng, name, rows):
    storage = STORAGES[name]
    x, dy, _ = operands(rng, storage, rows, 7, 5)
    w = rng.standard_normal((7, 5)).astype(np.float32)
    x[1, 2] = w[4, 0] = np.nan
    y = np.zeros_like(dy)
    stored_product(y, x, storage.encode_ref(w), storage)
    expected = np.zeros(dy.shape, bool)
    expected[1], expected[:, 4] = True, True
    assert np.array_equal(np.isnan(y), expected)


def test_wrong_arguments_are_refused(rng):
    storage = STORAGES["float16"]
    x, dy, raw = operands(rng, storage, 3, 4, 5)
    with pytest.raises(TypeError, match=r"storage is str; stored_product takes a storage \(Storage\)"):
        stored_product(dy, x, raw, "float16")
    with pytest.raises(TypeError, match=r"number_format is int; .* takes a number format \(NumberFormat or Choice\)"):
        stored_product(dy, x, raw, storage, number_format=16)
    with pytest.raises(TypeError, match="raw is float16; bf16 is kept as uint16"):
        stored_product(dy, x, raw, STORAGES["bf16"])
    with pytest.raises(ValueError, match=r"raw has shape \(4, 4\); float16 keeps rows of 5 numbers as \(M, 5\)"):
        stored_product_backward(x, dy, raw[:, :4], storage)
    with pytest.raises(ValueError, match="y overlaps x"):
        stored_product(x[:, :4], x, raw, storage)
    wide = np.zeros((3, 6), np.float32)
    with pytest.raises(ValueError, match="dx overlaps addend elsewhere"):
        stored_product_backward(wide[:, :5], dy, raw, storage, wide[:, 1:])


def test_scratch_is_a_strip_and_not_the_matrix(rng, monkeypatch):
    """However many rows the matrix has."""
    asked = []
    real = stored_matmul.scratch
    monkeypatch.setattr(stored_matmul, "scratch", lambda name, shape: asked.append(shape) or real(name, shape))
    storage = STORAGES["float16"]
    x, dy, raw = operands(rng, storage, FEW + 1, 2 * STRIP + 1 if JIT else 5, 3)
    stored_product(dy, x, raw, storage)
    stored_product_backward(x, dy, raw, storage)
    assert asked
    assert all(rows <= STRIP for rows, _ in asked)
