"""NF4: codes, scales and numbers of bitsandbytes, what it loses and takes, parts of matrices, products, threads."""

import json

import numpy as np
import pytest

from abi_py.gradcheck import check_close
from abi_py.kernels.cross_entropy import head_loss, scratch_floats
from abi_py.kernels.engine.dynamic_map import dynamic_map
from abi_py.kernels.engine.jit import JIT
from abi_py.kernels.engine.number_formats import BFLOAT16
from abi_py.kernels.matmul import product
from abi_py.kernels.storage import OF_A_MATRIX
from abi_py.kernels.storage.nf4 import NF4, NUMBERS, VALUES
from abi_py.kernels.stored_matmul import FEW, STRIP, stored_product, stored_product_backward, stored_rows

ALL = sorted(OF_A_MATRIX)
SHAPES = [(1, 2), (3, 10), (7, 96), (5, 64), (130 if JIT else 9, 130)]


def decoded(storage, raw, rows=slice(None)):
    first, last, _ = rows.indices(len(raw))
    out = np.full((last - first, storage.columns(raw)), np.nan, np.float32)
    storage.decode(out, raw, first)
    return out


@pytest.mark.parametrize(("signed", "name"), [(True, "signed"), (False, "unsigned")])
def test_the_dynamic_map_has_the_bits_of_bitsandbytes(golden, signed, name):
    found = dynamic_map(signed)
    assert np.array_equal(found, golden("nf4")[name])
    assert found[-1] == 1
    assert found.min() == (np.float32(-0.99296874) if signed else 0)


@pytest.mark.parametrize("case", ["plain", "across"])
def test_codes_and_scales_are_those_of_bitsandbytes(golden, case, same_bits):
    stored, storage = golden("nf4"), OF_A_MATRIX["nf4"]
    for raw, kept in (storage.encoded_ref(stored[f"{case}/x"]), storage.encoded(stored[f"{case}/x"])):
        assert np.array_equal(raw.reshape(-1, 1), stored[f"{case}/codes"])
        assert np.array_equal(kept.scales(), stored[f"{case}/absmax"])
        assert np.array_equal(kept.decode_ref(raw), stored[f"{case}/values"])
        assert np.array_equal(decoded(kept, raw), stored[f"{case}/values"])
    same_bits(lambda: (storage.encoded(stored[f"{case}/x"])[0], decoded(kept, raw)))
    assert np.array_equal(VALUES, stored[f"{case}/quant_map"])


@pytest.mark.parametrize("case", ["plain", "across", "long"])
def test_scales_in_bytes_are_those_of_bitsandbytes(golden, case):
    """Its mean may end in another bit; of its own bytes the numbers are equal to the last bit."""
    stored = golden("nf4")
    theirs = {name: stored[f"{case}/double/{name}"] for name in ("codes", "absmax", "nested_absmax", "values")}
    for raw, kept in (getattr(OF_A_MATRIX["nf4-dq"], name)(stored[f"{case}/x"]) for name in ("encoded", "encoded_ref")):
        _, codes, wide, _ = kept.side
        assert np.array_equal(raw.reshape(-1, 1), theirs["codes"])
        assert np.array_equal(codes, theirs["absmax"])
        check_close(wide[1:], theirs["nested_absmax"], 1e-6)
        check_close(decoded(kept, raw), theirs["values"], 1e-6)
    state = json.loads(bytes(stored[f"{case}/double/quant_state.bitsandbytes__nf4"]))
    wide = np.append(np.float32(state["nested_offset"]), theirs["nested_absmax"])
    kept = NF4.of_bytes(theirs["absmax"], wide, stored[f"{case}/double/nested_quant_map"])
    assert np.array_equal(decoded(kept, raw), theirs["values"])
    assert np.array_equal(kept.decode_ref(raw), theirs["values"])


@pytest.mark.parametrize(("name", "bytes_of_a_number"), [("nf4", 0.5625), ("nf4-dq", 0.515869)])
def test_what_it_loses_of_normal_numbers_and_takes(rng, name, bytes_of_a_number):
    x = rng.standard_normal((256, 4096) if JIT else (16, 1024)).astype(np.float32)
    raw, kept = OF_A_MATRIX[name].encoded(x) if JIT else OF_A_MATRIX[name].encoded_ref(x)
    lost = np.linalg.norm(kept.decode_ref(raw).astype(np.float64) - x) / np.linalg.norm(x)
    assert abs(lost - 0.0919) < (0.001 if JIT else 0.004)
    assert (raw.nbytes + kept.side_bytes) / x.size == pytest.approx(bytes_of_a_number, abs=5e-6 if JIT else 1e-3)


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("shape", SHAPES)
def test_kernels_equal_the_reference(rng, name, shape, same_bits):
    x = (rng.standard_normal(shape) * 10.0 ** rng.integers(-40, 30, (shape[0], 1))).astype(np.float32)
    raw, kept = OF_A_MATRIX[name].encoded(x)
    expected, theirs = OF_A_MATRIX[name].encoded_ref(x)
    assert np.array_equal(raw, expected)
    assert all(map(np.array_equal, kept.side, theirs.side))
    kept.check(raw, shape[1])
    numbers = kept.decode_ref(raw)
    same_bits(lambda: decoded(kept, raw))
    assert np.array_equal(decoded(kept, raw), numbers)
    assert not kept.nonfinite_rows(raw).any()
    middle = slice(shape[0] // 3, shape[0] // 2 + 1)
    assert np.array_equal(decoded(kept, raw, middle), numbers[middle])
    part = kept.from_row(middle.start)
    assert np.array_equal(part.decode_ref(raw[middle]), numbers[middle])
    assert np.array_equal(decoded(part, raw[middle]), numbers[middle])
    ids = rng.integers(0, shape[0], 5).astype(np.int32)
    out = np.empty((5, shape[1]), np.float32)
    stored_rows(out, ids, raw, kept)
    assert np.array_equal(out, numbers[ids])


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("rows", [1, FEW, FEW + 1])
@pytest.mark.parametrize("number_format", [None, BFLOAT16], ids=str)
def test_products_have_the_bits_of_those_with_the_decoded_matrix(rng, name, rows, number_format, same_bits):
    shape = (STRIP + 70, 192) if JIT else (7, 10)
    raw, kept = OF_A_MATRIX[name].encoded(rng.standard_normal(shape).astype(np.float32))
    w = kept.decode_ref(raw)
    x, dy = (rng.standard_normal((rows, size)).astype(np.float32) for size in (shape[1], shape[0]))
    y, dx, whole_y, whole_dx = (np.empty_like(like) for like in (dy, x, dy, x))
    options = {} if number_format is None else {"number_format": number_format}
    product(whole_y, x, w, transpose_b=True, addend=dy, **options)
    product(whole_dx, dy, w, **options)

    def make():
        stored_product(y, x, raw, kept, dy, **options)
        stored_product_backward(dx, dy, raw, kept, **options)
        return y.copy(), dx.copy()

    same_bits(make)
    assert np.array_equal(y, whole_y) or not JIT
    assert np.array_equal(dx, whole_dx) or not JIT
    check_close(y, whole_y, 1e-5)


def test_a_head_in_nf4(rng):
    raw, kept = OF_A_MATRIX["nf4-dq"].encoded(rng.standard_normal((33, 64)).astype(np.float32))
    x, labels = rng.standard_normal((5, 64)).astype(np.float32), rng.integers(0, 33, 5)
    found, expected, hits = np.empty(5, np.float32), np.empty(5, np.float32), np.empty(5, np.uint8)
    scratch = np.empty(scratch_floats(5, 33, 64), np.float32)
    head_loss(found, hits, x, raw, labels, scratch, storage=kept)
    head_loss(expected, hits, x, kept.decode_ref(raw), labels, scratch)
    check_close(found, expected, 1e-5)


@pytest.mark.parametrize("name", ALL)
def test_no_rows_and_no_columns(name):
    for shape in ((0, 64), (3, 0)):
        raw, kept = OF_A_MATRIX[name].encoded(np.zeros(shape, np.float32))
        assert decoded(kept, raw).shape == kept.decode_ref(raw).shape == shape


@pytest.mark.parametrize("name", ALL)
def test_what_cannot_be_kept_is_named(rng, name):
    storage, x = OF_A_MATRIX[name], rng.standard_normal((3, 96)).astype(np.float32)
    for bad in (np.nan, np.inf, -np.inf):
        wrong = x.copy()
        wrong[2, 5] = bad  # in a block that begins in row 1
        with pytest.raises(ValueError, match=f"row 2, column 5 is {bad:g}; {name} keeps finite numbers"):
            storage.encoded(wrong)
        kept = NF4.of_scales(np.array([1, 1, bad, 1, 1], np.float32))
        assert kept.nonfinite_rows(np.zeros((3, 48), np.uint8)).tolist() == [False, True, False]
        assert kept.from_row(1).nonfinite_rows(np.zeros((2, 48), np.uint8)).tolist() == [True, False]
    with pytest.raises(ValueError, match=f"rows of 7 numbers are no whole blocks; {name} keeps 2 in a block"):
        storage.encoded(x[:, :7])
    with pytest.raises(TypeError, match=f"{name} keeps scales beside raw, and this one has none"):
        decoded(storage, np.zeros((1, 4), np.uint8))
    with pytest.raises(TypeError, match="keeps scales beside raw; `encoded` returns both"):
        storage.encode(np.zeros((3, 48), np.uint8), x)
    raw, kept = storage.encoded(x)
    with pytest.raises(ValueError, match=f"4 rows of 96 numbers from row 0 on, and {name} here 5 scales of {NUMBERS}"):
        kept.check(np.zeros((4, 48), np.uint8), 96)
    assert np.array_equal(storage.encoded(x, np.ones(96))[0], raw)
    with pytest.raises(ValueError, match="importance has shape"):
        storage.encoded(x, np.ones(95))
