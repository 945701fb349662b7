"""What a GGUF file holds, read: by hand-written bytes whose meaning the test states itself."""

import numpy as np
import pytest
import raw_gguf as raw

from abi_py.errors import CheckpointError
from abi_py.formats.gguf import F32, I16, U8, U32, U64, open_gguf


@pytest.fixture(scope="module")
def valid(tmp_path_factory):
    path = tmp_path_factory.mktemp("gguf") / "valid.gguf"
    path.write_bytes(raw.VALID)
    return open_gguf(path)


def test_every_type_of_value_is_read(valid):
    read = dict(valid.metadata)
    arrays = {key: read.pop(key) for key in ("a.numbers", "a.floats", "a.bools", "a.none")}
    assert read == {
        **{"general.architecture": "llama", "a.u8": 200, "a.i8": -3, "a.u16": 60_000, "a.i16": -300},
        **{"a.u32": 4_000_000_000, "a.i32": -70_000, "a.f32": 0.5, "a.yes": True, "a.u64": 2**64 - 1},
        **{"a.i64": -(2**63), "a.f64": 1e-300, "a.words": ["a", "", "\u4f60\u597d", "\U0001f600"]},
        "a.nested": [[1, 2], ["x"], [[7]]],
    }
    assert [type(read[key]) for key in ("a.u8", "a.i16", "a.f32", "a.yes", "a.u64")] == [U8, I16, F32, bool, U64]
    for key, dtype, items in (
        ("a.numbers", np.int32, [1, -2, 3]),
        ("a.floats", np.float32, [0.5, 1.5]),
        ("a.bools", np.bool_, [True, False]),
        ("a.none", np.uint16, []),
    ):
        assert (arrays[key].dtype, arrays[key].tolist()) == (dtype, items)
        assert not arrays[key].flags.writeable


def test_tensors_are_views_of_the_file_outermost_axis_first(valid):
    numbers, blocks, vector = valid.tensors.values()
    assert (numbers.shape, blocks.shape, vector.shape) == ((2, 3, 32), (2, 32), (5,))
    assert [str(each.kind) for each in (numbers, blocks, vector)] == ["F32", "Q8_0", "F16"]
    np.testing.assert_array_equal(numbers.raw, raw.NUMBERS.reshape(6, 32))
    np.testing.assert_array_equal(blocks.raw, raw.BYTES.reshape(2, 34))
    np.testing.assert_array_equal(vector.raw, raw.VECTOR[None])
    assert not numbers.raw.flags.writeable
    assert not numbers.raw.flags.owndata
    content = valid.path.read_bytes()
    assert content[blocks.offset : blocks.offset + 68] == raw.BYTES.tobytes()


def test_a_value_is_asked_for_by_its_kind(valid):
    assert valid.require("a.u32", int) == 4_000_000_000
    assert type(valid.require("a.u32", int)) is int
    assert valid.require("a.u8", float) == 200.0  # a whole number may stand for a float
    assert valid.require("a.words", list[str])[0] == "a"
    assert valid.require("a.numbers", int | list[int]).tolist() == [1, -2, 3]
    assert valid.get("a.missing", int, 7) == 7
    at = raw.VALID.index(b"a.yes") + len("a.yes") + 4
    with pytest.raises(CheckpointError, match=rf"valid\.gguf: byte {at}: a\.yes is True, but must be a whole number; "):
        valid.get("a.yes", int, 3)
    with pytest.raises(
        CheckpointError, match=r"a\.words is an array of string, but must be text or an array, each item"
    ):
        valid.require("a.words", str | list[int])
    with pytest.raises(CheckpointError, match=r"the metadata lack a\.missing; convert"):
        valid.require("a.missing", int)


def test_a_float_is_finite(tmp_path):
    path = tmp_path / "x.gguf"
    path.write_bytes(raw.gguf([raw.entry("a", "f32", np.nan), raw.entry("b", "array", ("f32", [1, np.inf]))]))
    for key, kind in (("a", float), ("b", list[float])):
        with pytest.raises(CheckpointError, match=f"{key} is .*, but must be .*a finite number"):
            open_gguf(path).require(key, kind)


def test_a_number_that_does_not_fit_its_type_is_refused():
    assert U32(5) == 5
    assert F32(1e-5) == np.float32(1e-5)
    with pytest.raises(ValueError, match="-1 is no U32; it must be from 0 to 4294967295"):
        U32(-1)
