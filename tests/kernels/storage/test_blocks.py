"""Storages of blocks, and encoding in all: bytes and numbers of `gguf`, kernel against reference, errors, refusals."""

from pathlib import Path

import numpy as np
import pytest

from abi_py.kernels.engine.jit import JIT
from abi_py.kernels.storage import STORAGES

ALL = sorted(STORAGES)
BLOCKS = [name for name in ALL if STORAGES[name].block > 1]
WEIGHTED = [name for name in ALL if STORAGES[name].weighted]
WRITTEN = ["q8_0", "q4_0", "q4_1", "q5_0", "q5_1", "bf16"]  # by `gguf` too
PAGE = Path(__file__).resolve().parents[3] / "docs/4-storage.md"
ROWS = [[cell.strip() for cell in line.split("|")[1:-1]] for line in PAGE.read_text(encoding="utf-8").splitlines()]
TABLE = {row[0].strip("`"): row[1:] for row in ROWS if len(row) == 8 and row[0].strip("`") in STORAGES}
# The root mean square of the error over that of the numbers, of N(0, 1), U(-1, 1) and Student's t with 3 degrees of
# freedom: of ggml's own code, where it was measured.
ERRORS = {
    "q8_0": (0.00535, 0.00377, 0.00858),
    "q6_k": (0.01772, 0.01325, 0.02586),
    "q5_k": (0.03610, 0.02760, 0.04712),
    "q4_k": (0.07129, 0.05458, 0.09233),
    "q5_0": (0.04272, None, None),
    "q5_1": (0.03784, None, None),
}


def bits(numbers):
    """Return the bits of float32 numbers, one for all NaN."""
    return np.where(np.isnan(numbers), np.float32(np.nan), numbers).view(np.uint32)


def encoded(storage, x, importance=None):
    """Return what the kernel makes of x, in memory that held something else."""
    raw = np.full((len(x), storage.items(x.shape[1])), 77, storage.dtype)
    with np.errstate(all="ignore"):
        storage.encode(raw, x, importance)
    return raw


def decoded(storage, raw):
    out = np.full((len(raw), storage.columns(raw)), 77, np.float32)
    with np.errstate(all="ignore"):  # where nothing is compiled
        storage.decode(out, raw, 0)
    return out


def odd_rows(rng, columns):
    """Return rows of numbers as a storage may get them: of zeros, of one sign, one size, subnormal, the largest ..."""
    x = rng.standard_normal((16, columns)).astype(np.float32)
    x[0], x[1, : columns // 3], x[2, ::2], x[3] = 0, 0, 1, 3
    x[4], x[5], x[3, columns // 2 :] = np.abs(x[4]), -np.abs(x[5]), -3
    x[6] *= np.float32(1e-7)
    x[7] *= np.float32(1e-41)
    x[8] *= np.float32(1e-37)
    x[9] = np.clip(x[9] * np.float32(65504) / np.abs(x[9]).max(), -65504, 65504)
    x[10, ::3] = -0.0
    x[11, 1:] = 0
    x[12] = rng.standard_t(3, columns)
    x[14:] *= np.where(rng.random(columns) < 0.5, 0, np.float32([[1e-38], [1e-25]]))
    x[14:, : columns // 3] = 0
    x[13] = np.round(x[13] * 4) / 4  # numbers in the middle between two that are kept
    return x


def test_the_page_has_a_row_for_each():
    assert sorted(TABLE) == BLOCKS


# -- decode --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*BLOCKS, "bf16"])
def test_bytes_mean_what_they_mean_elsewhere(golden, name, same_bits):
    """Random bytes, among their scales infinity, NaN, zeros and subnormal halves: bit for bit the numbers of `gguf`."""
    stored, storage = golden("storages"), STORAGES[name]
    raw, values = stored[f"{name}/raw"].view(storage.dtype), stored[f"{name}/values"]
    with np.errstate(all="ignore"):
        assert np.array_equal(bits(storage.decode_ref(raw)), values)
    same_bits(lambda: bits(decoded(storage, raw)))
    assert np.array_equal(bits(decoded(storage, raw)), values)


@pytest.mark.parametrize("name", BLOCKS)
@pytest.mark.parametrize("rows", [0, 1, 7])
def test_any_bytes_are_decoded_as_the_reference_does(rng, name, rows, threads):
    storage = STORAGES[name]
    raw = rng.integers(0, 256, (rows, 3 * storage.bytes_per_block), dtype=np.uint8)
    with np.errstate(all="ignore"):
        assert np.array_equal(bits(decoded(storage, raw)), bits(storage.decode_ref(raw)))
        assert np.array_equal(bits(decoded(storage, raw[::2])), bits(storage.decode_ref(raw)[::2]))


# -- encode --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ALL)
def test_rows_that_keep_nan_or_infinity_are_found(rng, name):
    storage = STORAGES[name]
    raw = rng.integers(0, 256, (200, 2 * storage.block * storage.bytes_per_block), np.uint8)
    raw = raw[:, : 2 * storage.bytes_per_block].copy().view(storage.dtype)
    with np.errstate(all="ignore"):
        bad = ~np.isfinite(storage.decode_ref(raw)).all(1)
        assert bad.any()
        assert not bad.all()
        np.testing.assert_array_equal(storage.nonfinite_rows(raw), bad)


@pytest.mark.parametrize("name", WRITTEN)
def test_numbers_are_kept_in_the_same_bytes_as_elsewhere(golden, name):
    stored, storage = golden("storages"), STORAGES[name]
    kept = stored[f"{name}/kept"].view(storage.dtype)
    assert np.array_equal(storage.encode_ref(stored["x"]), kept)
    assert np.array_equal(encoded(storage, stored["x"]), kept)


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("blocks", [1, 3])
@pytest.mark.parametrize("weighted", [False, True])
def test_the_kernel_encodes_to_the_bytes_of_the_reference(rng, name, blocks, weighted, same_bits):
    storage = STORAGES[name]
    columns = blocks * storage.block if storage.block > 1 else 13 * blocks
    x = odd_rows(rng, columns)[:: 1 if JIT else 5]
    importance = None
    if weighted:
        importance = rng.random(columns) * 10.0 ** rng.integers(-3, 3, columns)
        importance[: columns // 2 : 5] = 0
    expected = storage.encode_ref(x, importance)
    same_bits(lambda: encoded(storage, x, importance))
    assert np.array_equal(encoded(storage, x, importance), expected)


@pytest.mark.parametrize("name", ALL)
def test_rows_with_a_stride_read_only_and_none_at_all(rng, name):
    storage = STORAGES[name]
    columns = 2 * storage.block
    wide = rng.standard_normal((7, columns + 5)).astype(np.float32)
    wide.flags.writeable = False
    x = wide[::2, 2 : 2 + columns]
    raw = np.full((8, storage.items(columns) + 3), 77, storage.dtype)
    storage.encode(raw[::2, : storage.items(columns)], x)
    assert np.array_equal(raw[::2, : storage.items(columns)], storage.encode_ref(x))
    assert (raw[1::2] == 77).all()
    assert (raw[:, storage.items(columns) :] == 77).all()
    assert encoded(storage, x[:0]).shape == (0, storage.items(columns))
    assert storage.encode_ref(x[:0]).shape == (0, storage.items(columns))
    assert storage.decode_ref(raw[:0, : storage.items(columns)]).shape == (0, columns)


@pytest.mark.parametrize("name", BLOCKS)
def test_what_was_kept_is_kept_again(rng, name):
    """Nearly: a fit may find a scale that suits the numbers that it gets even better than the one they have."""
    storage = STORAGES[name]
    x = rng.standard_normal((4, 512)).astype(np.float32)
    once = storage.decode_ref(storage.encode_ref(x))
    twice = storage.decode_ref(storage.encode_ref(once))
    assert np.linalg.norm(twice - once) < 0.2 * np.linalg.norm(once - x)


def relative_error(storage, x):
    found = decoded(storage, encoded(storage, x)).astype(np.float64)
    return np.sqrt(((found - x) ** 2).sum() / (x.astype(np.float64) ** 2).sum())


@pytest.mark.skipif(not JIT, reason="plain Python takes minutes")
@pytest.mark.parametrize("name", BLOCKS)
def test_errors_are_those_of_the_page_and_of_ggml(rng, name):
    storage, (block, size, _, *page, importance) = STORAGES[name], TABLE[name]
    assert int(block) == storage.block
    assert float(size) == storage.bytes_per_block * 8 / storage.block
    assert storage.weighted == (importance == "yes")
    n = (256, 1024)
    samples = rng.standard_normal(n), rng.uniform(-1, 1, n), rng.standard_t(3, n)
    for x, written, elsewhere in zip(samples, page, ERRORS.get(name, (None,) * 3), strict=True):
        found = relative_error(storage, x.astype(np.float32))
        assert abs(found - float(written)) <= 0.01 * found
        assert found <= 1.02 * (elsewhere or found)


@pytest.mark.parametrize("name", WEIGHTED)
def test_importance_lowers_the_error_that_it_weighs(rng, name):
    """... and only that one; nothing depends on the unit of the weights."""
    storage = STORAGES[name]
    x = rng.standard_normal((16 if JIT else 2, 512)).astype(np.float32)
    importance = np.where(rng.random(512) < 0.15, 30.0, 1.0)
    error = lambda raw: (importance * (storage.decode_ref(raw) - x) ** 2).sum()  # noqa: E731
    plain, weighted = (encoded(storage, x, given) for given in (None, importance))
    assert error(weighted) < 0.97 * error(plain)
    assert np.array_equal(encoded(storage, x, importance * 1024), weighted)


@pytest.mark.parametrize("name", ["q8_0", "mxfp4", "bf16", "float16", "float32"])
def test_importance_does_not_matter_where_it_cannot(rng, name):
    storage = STORAGES[name]
    x = rng.standard_normal((2, 64)).astype(np.float32)
    assert not storage.weighted
    assert np.array_equal(encoded(storage, x, rng.random(64)), encoded(storage, x))


@pytest.mark.parametrize("name", WEIGHTED)
def test_columns_that_never_mattered_keep_their_numbers(rng, name):
    storage = STORAGES[name]
    x = rng.standard_normal((2, 512)).astype(np.float32)
    importance = np.where(np.arange(512) < 256, 0.0, 2.0)
    found = storage.decode_ref(storage.encode_ref(x, importance))[:, :256]
    assert np.linalg.norm(found - x[:, :256]) < 0.5 * np.linalg.norm(x[:, :256])
    nothing = storage.encode_ref(x, np.zeros(512))
    assert np.array_equal(nothing, storage.encode_ref(x))


# -- what cannot be kept -------------------------------------------------------------------------


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("number", [np.nan, -np.inf, np.inf, "too large"])
def test_a_number_that_cannot_be_kept_is_named(rng, name, number, threads):
    storage = STORAGES[name]
    x = rng.standard_normal((9, 2 * storage.block + (storage.block == 1))).astype(np.float32)
    if number == "too large":
        number = -(np.float32(storage.largest).view(np.int32) + 1).view(np.float32)
    x[6, 1] = x[8, 0] = number
    message = rf"row 1006, column 1 is -?[\w.+]+; {name} keeps finite numbers up to [\d.e+]+; .* keep the matrix as "
    with pytest.raises(ValueError, match=message):
        storage.encode(np.empty((9, storage.items(x.shape[1])), storage.dtype), x, first_row=1000)


@pytest.mark.parametrize("name", ALL)
def test_the_largest_numbers_are_kept(rng, name):
    """Also where a fit would find a scale or a least number that is no half."""
    storage = STORAGES[name]
    x = rng.uniform(-1, 1, (5, 256)).astype(np.float32)
    x[1], x[2], x[3, 0] = np.abs(x[1]), -np.abs(x[2]), -1
    largest = np.float32(storage.largest)
    x = np.clip(x / np.abs(x).max(1, keepdims=True) * largest, -largest, largest)
    for importance in (None, rng.random(256) ** 8):
        found = decoded(storage, encoded(storage, x, importance))
        assert np.isfinite(found).all()
        scaled = np.float64(storage.largest)
        assert np.linalg.norm(found / scaled - x / scaled) < 0.6 * np.linalg.norm(x / scaled)


def test_wrong_arguments_are_refused(rng):
    storage = STORAGES["q4_0"]
    x, raw = np.zeros((3, 64), np.float32), np.zeros((3, 36), np.uint8)
    for wrong in (x.astype(np.float64), x[0], x.tolist()):
        with pytest.raises(TypeError, match=r"x is .*; q4_0 encodes float32 \(M, K\); use np.asarray\(x, np.float32\)"):
            storage.encode(raw, wrong)
    with pytest.raises(TypeError, match="the numbers of a row of x are 12 bytes apart"):
        storage.encode(raw, np.zeros((64, 3), np.float32).T)
    with pytest.raises(ValueError, match=r"raw has shape \(3, 35\); q4_0 keeps rows of 64 numbers as \(M, 36\)"):
        storage.encode(raw[:, :35], x)
    with pytest.raises(ValueError, match="rows of 63 numbers are no whole blocks; q4_0 keeps 32 in a block"):
        storage.encode(raw, x[:, :63])
    with pytest.raises(ValueError, match="raw has 2 rows, x has 3; both must have as many"):
        storage.encode(raw[:2], x)
    for importance, message in (
        (np.ones(63), r"importance has shape \(63,\); rows have 64 numbers: give it \(64,\)"),
        (np.where(np.arange(64) == 5, np.nan, 1), r"importance\[5\] is nan; it must be finite and at least 0"),
        (np.where(np.arange(64) == 6, -1, 1), r"importance\[6\] is -1; it must be finite and at least 0"),
    ):
        with pytest.raises(ValueError, match=message):
            storage.encode(raw, x, importance)
