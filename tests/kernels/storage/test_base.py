"""Storages: each against the definition of its numbers, kernel against reference, memory maps, strides, threads."""

import numpy as np
import pytest

from abi_py.kernels.engine import cache
from abi_py.kernels.engine.cache import Store
from abi_py.kernels.engine.jit import JIT, helper
from abi_py.kernels.storage import STORAGES, Storage, base

ALL = sorted(STORAGES)
# What 16 bits say, by the formula of IEEE 754: (bits of the exponent, bits of the significand, exponent of 1).
SIXTEEN_BITS = {"bf16": (8, 7, 127), "float16": (5, 10, 15)}
EVERY = np.arange(1 << 16, dtype=np.uint16).reshape(256, 256)


def meaning(name):
    """Return what each of EVERY means, in float64; NaN for all NaN."""
    exponent_bits, fraction_bits, bias = SIXTEEN_BITS[name]
    bits = EVERY.astype(np.int64)
    sign = np.where(bits >> 15, -1.0, 1.0)
    exponent = bits >> fraction_bits & (1 << exponent_bits) - 1
    fraction = (bits & (1 << fraction_bits) - 1) / 2.0**fraction_bits
    size = np.where(exponent, np.ldexp(1 + fraction, exponent - bias), np.ldexp(fraction, 1 - bias))
    top = (1 << exponent_bits) - 1
    size = np.where(exponent == top, np.where(fraction == 0, np.inf, np.nan), size)
    return sign * size


def decoded(storage, raw, rows=slice(None), columns=None):
    first, last, _ = rows.indices(len(raw))
    out = np.full((last - first, columns or storage.columns(raw)), np.nan, np.float32)
    storage.decode(out, raw, first)
    return out


@pytest.mark.parametrize("name", SIXTEEN_BITS)
def test_every_number_is_decoded_as_its_definition_says(name, threads):
    storage, expected = STORAGES[name], meaning(name)
    raw = EVERY.view(storage.dtype)
    for found in (storage.decode_ref(raw), decoded(storage, raw)):
        assert found.dtype == np.float32
        assert np.array_equal(found, expected, equal_nan=True)
        assert np.array_equal(np.signbit(found), EVERY >= 0x8000)  # of zeros and NaN too


@pytest.mark.parametrize("name", SIXTEEN_BITS)
def test_numbers_are_encoded_as_the_nearest_and_ties_as_the_even(rng, name):
    storage = STORAGES[name]
    known = meaning(name).ravel()[: 1 << 15]  # not negative; in order of size up to infinity
    known = known[: np.flatnonzero(np.isinf(known))[0]]
    between = (known[:-1] + known[1:]) / 2
    middle = between.astype(np.float32)
    exact = middle == between  # float32 has the middle, but of the smallest subnormals
    even = np.arange(len(between)) + (np.arange(len(between)) & 1)
    encoded = lambda x: storage.encode_ref(x[None]).view(np.uint16)[0]  # noqa: E731
    assert np.array_equal(encoded(middle[exact]), even[exact])
    assert np.array_equal(encoded(np.nextafter(middle[exact], np.float32(0))), np.arange(len(between))[exact])
    assert np.array_equal(encoded(np.nextafter(middle[exact], np.float32(np.inf))), np.arange(1, len(known))[exact])
    assert np.array_equal(encoded(-middle[exact]), 0x8000 + even[exact])
    beyond = np.float32([[np.inf, -np.inf, np.nan, 65520 if name == "float16" else 3.3999e38]])
    found = storage.decode_ref(storage.encode_ref(beyond))
    assert np.array_equal(found, [[np.inf, -np.inf, np.nan, np.inf]], equal_nan=True)


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("shape", [(1, 1), (7, 13), (130, 37)])
def test_kernel_equals_the_reference(rng, name, shape, same_bits):
    storage = STORAGES[name]
    columns = -(-shape[1] // storage.block) * storage.block
    x = (rng.standard_normal((shape[0], columns)) * 10.0 ** rng.integers(-6, 4, (shape[0], 1))).astype(np.float32)
    raw = storage.encode_ref(x)
    assert raw.dtype == storage.dtype
    assert raw.shape == (shape[0], storage.items(columns))
    assert raw.nbytes == x.size // storage.block * storage.bytes_per_block
    assert storage.columns(raw) == columns
    expected = storage.decode_ref(raw)
    same_bits(lambda: decoded(storage, raw))
    assert np.array_equal(decoded(storage, raw), expected)
    if storage.block == 1:
        assert np.array_equal(storage.encode_ref(expected), raw)  # what was kept is kept again
    middle = slice(shape[0] // 3, shape[0] // 2 + 1)
    assert np.array_equal(decoded(storage, raw, middle), expected[middle])
    ids = rng.integers(0, shape[0], 5)
    out = np.empty((5, columns), np.float32)
    storage.rows(out, ids, raw)
    assert np.array_equal(out, expected[ids])


@pytest.mark.parametrize("name", ALL)
def test_read_only_maps_and_rows_with_a_stride_are_read_where_they_are(rng, name, tmp_path):
    storage = STORAGES[name]
    raw = storage.encode_ref(rng.standard_normal((9, 2 * storage.block + 3 * storage.block)).astype(np.float32))
    raw.tofile(tmp_path / "raw")
    mapped = np.memmap(tmp_path / "raw", storage.dtype, "r", shape=raw.shape)
    half = storage.items(2 * storage.block)
    for view in (mapped, mapped[::2], mapped[1:, :half], raw[:, half:], mapped[:0]):
        assert np.array_equal(decoded(storage, view), storage.decode_ref(view))
        assert np.shares_memory(storage.for_kernels(view), view) or not view.size
    assert raw.flags.writeable  # looked at read-only, and left as it was


@pytest.mark.parametrize("name", ALL)
def test_another_dtype_or_shape_is_refused(name):
    storage = STORAGES[name]
    raw = storage.encode_ref(np.zeros((3, 4 * storage.block), np.float32))
    storage.check(raw, 4 * storage.block)
    with pytest.raises(TypeError, match=f"raw is int64; {name} is kept as "):
        storage.check(raw.astype(np.int64), 4 * storage.block)
    with pytest.raises(ValueError, match=f"{name} keeps rows of {3 * storage.block} numbers as "):
        storage.check(raw, 3 * storage.block)


class Toy(Storage):
    """A block of two numbers is a byte for their common scale 2^(byte - 128) and a signed byte for each."""

    name, dtype, block, bytes_per_block = "toy", np.dtype(np.uint8), 2, 3

    def encode_ref(self, x, importance=None):
        pairs = x.reshape(len(x), -1, 2)
        scale = np.ceil(np.log2(np.maximum(np.abs(pairs).max(-1, keepdims=True), 2.0**-100) / 127))
        bytes_ = np.round(pairs / 2.0**scale).astype(np.int8).view(np.uint8)
        return np.concatenate([(scale + 128).astype(np.uint8), bytes_], -1).reshape(len(x), -1)

    def decode_ref(self, raw):
        blocks = raw.reshape(len(raw), -1, 3)
        numbers = blocks[..., 1:].copy().view(np.int8) * 2.0 ** (blocks[..., :1].astype(np.float64) - 128)
        return numbers.reshape(len(raw), -1).astype(np.float32)


@helper
def toy_row(out, raw):
    """Write the numbers of a row."""
    for block in range(raw.size // 3):
        scale = 2.0 ** (float(raw[3 * block]) - 128.0)
        for i in range(2):
            byte = int(raw[3 * block + 1 + i])
            out[2 * block + i] = np.float32((byte - 256 if byte > 127 else byte) * scale)


Toy.decode_row = staticmethod(toy_row)


def test_a_storage_of_blocks_is_a_class_with_three_functions(rng):
    toy = Toy()
    x = rng.standard_normal((5, 6)).astype(np.float32)
    raw = np.empty((5, 9), np.uint8)
    toy.encode(raw, x)  # in NumPy
    assert np.array_equal(raw, toy.encode_ref(x))
    x[2, 3] = np.nan
    with pytest.raises(ValueError, match="row 2, column 3 is nan; toy keeps finite numbers"):
        toy.encode(raw, x)
    assert np.array_equal(decoded(toy, raw), toy.decode_ref(raw))
    with pytest.raises(ValueError, match="rows of 5 numbers are no whole blocks; toy keeps 2 in a block"):
        toy.check(raw, 5)


@pytest.mark.skipif(not JIT, reason="nothing is compiled")
def test_storages_do_not_share_compiled_code(rng, monkeypatch, tmp_path):
    """bf16 and float16 have kernels of one name with arguments of one type; in the cache they are two."""
    monkeypatch.setattr(cache, "STORE", Store(tmp_path / "cache"))
    monkeypatch.setattr(base, "_rows_kernel", base._rows_kernel.__wrapped__)  # not those that were made before
    raw = np.full((1, 1), 0x3C00, np.uint16)
    fresh = [type(STORAGES[name])() for name in ("bf16", "float16", "bf16")]
    assert [decoded(one, raw.view(one.dtype)).item() for one in fresh] == [0.0078125, 1.0, 0.0078125]
    assert len(cache.STORE.names("")) == 2
