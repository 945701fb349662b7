"""Products with frozen matrices: reference, kernels of every storage, bits of one whole product, maps, threads, NaN."""

import numpy as np
import pytest

from abi_py.gradcheck import check_close, check_gradient
from abi_py.kernels import stored_matmul
from abi_py.kernels.engine.few_rows import MOST
from abi_py.kernels.engine.jit import JIT
from abi_py.kernels.engine.number_formats import BFLOAT16, FLOAT16, FLOAT32, METHODS
from abi_py.kernels.engine.replay import recorded
from abi_py.kernels.engine.simd import LANES
from abi_py.kernels.engine.streams import STREAMED
from abi_py.kernels.matmul import product
from abi_py.kernels.storage import STORAGES
from abi_py.kernels.stored_matmul import (
    FEW,
    STRIP,
    stored_product,
    stored_product_backward,
    stored_product_backward_ref,
    stored_product_ref,
    stored_products,
    stored_products_ref,
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


TOGETHER = {  # matrices that read the same x: what each is kept in, and how many calls of a kernel few rows take,
    # by whole numbers and decoded
    "as Q4_K_M has q, k and v": ("q4_k q4_k q6_k", 1, 3),
    "groups of 16 and of 32, with offsets and without": ("q8_0 q5_1 q6_k", 1, 3),
    "half precision": ("float16 float16", 1, 1),
    "more than go into one call": ("float16 float16 float16 float16", 2, 2),
    "blocks beside what is no block": ("q8_0 bf16 bf16", 2, 2),
    "three layouts of elements": ("bf16 float32 float16", 3, 3),
}
HEIGHTS = 2 * LANES + 5, 1, LANES + 1, 3


@pytest.mark.parametrize("case", TOGETHER)
@pytest.mark.parametrize("rows", [1, MOST, MOST + 1, STREAMED + 1])
@pytest.mark.parametrize("integer", [False, True])
def test_matrices_that_read_the_same_rows(rng, case, rows, integer, same_bits):
    """Each has the bits that it has alone; x, y and the addend are columns of wider arrays."""
    storages = tuple(STORAGES[name] for name in TOGETHER[case][0].split())
    K = 512 + 256  # more than one slice of a sum
    raws = tuple(
        storage.encode_ref(rng.standard_normal((size, K)).astype(np.float32))
        for storage, size in zip(storages, HEIGHTS, strict=False)
    )
    ends = np.cumsum([0, *map(len, raws)])
    x = rng.standard_normal((rows, K + 3)).astype(np.float32)[:, 3:]
    addend = rng.standard_normal((rows, ends[-1] + 2)).astype(np.float32)[:, 1:-1]

    def make():
        y = addend.copy()
        stored_products(y, x, raws, storages, y, integer)
        return y

    if JIT:
        same_bits(make)
    for base in (None, addend):
        y, expected = np.full_like(addend, np.nan), np.full_like(addend, np.nan)
        stored_products(y, x, raws, storages, base, integer)
        for i, (raw, storage) in enumerate(zip(raws, storages, strict=True)):
            columns = slice(ends[i], ends[i + 1])
            of_it = None if base is None else base[:, columns]
            stored_product(expected[:, columns], x, raw, storage, of_it, integer=integer)
        assert np.array_equal(y, expected) or not JIT  # else NumPy's, whose bits depend on where the arrays lie
    assert np.array_equal(make(), y) or not JIT
    check_close(y, stored_products_ref(x.astype(np.float64), raws, storages, addend), 3e-2 if integer else 1e-5)


@pytest.mark.skipif(not JIT, reason="calls of kernels are noted where they are compiled")
@pytest.mark.parametrize("case", TOGETHER)
def test_matrices_that_read_the_same_rows_are_one_call(rng, case):
    storages = tuple(STORAGES[name] for name in TOGETHER[case][0].split())
    raws = tuple(storage.encode_ref(rng.standard_normal((5, 256)).astype(np.float32)) for storage in storages)
    x, y = rng.standard_normal((1, 256)).astype(np.float32), np.empty((1, 5 * len(raws)), np.float32)
    for integer, calls in ((True, TOGETHER[case][1]), (False, TOGETHER[case][2])):
        with recorded() as notes:
            stored_products(y, x, raws, storages, integer=integer)
        assert len(notes) == calls


def test_matrices_without_rows_or_columns():
    storages = STORAGES["q8_0"], STORAGES["q4_0"]
    y = np.ones((2, 4), np.float32)
    for integer in (False, True):
        stored_products(y, np.empty((2, 0), np.float32), (np.empty((2, 0), np.uint8),) * 2, storages, y, integer)
        assert (y == 1).all()
        x, nothing = np.ones((2, 32), np.float32), np.empty((2, 0), np.float32)
        stored_products(nothing, x, (np.empty((0, 34), np.uint8), np.empty((0, 18), np.uint8)), storages, None, integer)
        stored_products(nothing, x, (), (), None, integer)
        stored_products(y[:0], x[:0], (np.empty((4, 34), np.uint8),), storages[:1], None, integer)


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
    with pytest.raises(ValueError, match="y has 4 columns; the matrices have 8 rows together"):
        stored_products(dy, x, (raw, raw), (storage, storage))
    with pytest.raises(ValueError, match="2 matrices have 1 storages; name one for each"):
        stored_products(dy, x, (raw, raw), (storage,))
    with pytest.raises(TypeError, match=r"raws\[1\] is float16; bf16 is kept as uint16"):
        stored_products(dy, x, (raw, raw), (storage, STORAGES["bf16"]))
    with pytest.raises(ValueError, match=r"raws\[0\] has numbers 4 bytes apart"):
        stored_products(dy, x, (np.repeat(raw, 2, axis=1)[:, ::2],), (storage,))
    with pytest.raises(ValueError, match="y overlaps x"):
        stored_products(x[:, :4], x, (raw,), (storage,))


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
