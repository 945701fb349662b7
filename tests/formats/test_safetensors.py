"""Our writer and reader of safetensors against the library's."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays
from safetensors.numpy import load_file, save_file

from abi_py.errors import CheckpointError
from abi_py.files import sha256_of
from abi_py.formats.safetensors import encoded_size, read_safetensors, write_safetensors

dtypes = st.sampled_from([np.float64, np.float32, np.float16, np.int64, np.int32, np.uint32, np.uint8, np.bool_])
tensors = st.dictionaries(
    st.text(st.characters(codec="utf-8", exclude_categories=["Cs"]), min_size=1, max_size=12).filter(
        lambda name: name != "__metadata__"
    ),
    dtypes.flatmap(lambda dtype: arrays(dtype, array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=4))),
    max_size=4,
)


def same(a, b):
    assert set(a) == set(b)
    for name in a:
        assert (a[name].dtype, a[name].shape) == (b[name].dtype, b[name].shape)
        assert a[name].tobytes() == b[name].tobytes()


@given(tensors)
@settings(max_examples=60)
def test_both_ways(tmp_path_factory, content):
    ours, theirs = (tmp_path_factory.getbasetemp() / name for name in ("ours", "theirs"))
    facts = write_safetensors(ours, content, {"format": "pt"})
    assert (facts["size"], facts["sha256"]) == sha256_of(ours)
    assert facts["size"] == encoded_size(content, {"format": "pt"})
    same(load_file(ours), content)
    same(read_safetensors(ours), content)
    save_file(content, theirs)
    same(read_safetensors(theirs), content)


def test_transposed_arrays_are_written_in_order(tmp_path):
    write_safetensors(tmp_path / "a", {"t": np.arange(6, dtype=np.float32).reshape(2, 3).T})
    np.testing.assert_array_equal(load_file(tmp_path / "a")["t"], [[0, 3], [1, 4], [2, 5]])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda b: b"", "header"),
        (lambda b: b[:20], "header"),
        (lambda b: b"\xff" * 8 + b[8:], "header"),
        (lambda b: b[:8] + b"?" + b[9:], "not JSON"),
        (lambda b: b[:-1], "does not fit"),
        (lambda b: b.replace(b'"F32"', b'"X32"'), "malformed"),
        (lambda b: b.replace(b"[3]", b"[4]"), "does not fit"),
    ],
)
def test_damage(tmp_path, change, message):
    path = tmp_path / "a"
    write_safetensors(path, {"w": np.zeros(3, np.float32)})
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(CheckpointError, match=message):
        read_safetensors(path)


def test_header_is_padded_to_eight_bytes(tmp_path):
    write_safetensors(tmp_path / "a", {"w": np.zeros(3, np.float32)})
    content = (tmp_path / "a").read_bytes()
    length = int.from_bytes(content[:8], "little")
    assert length % 8 == 0
    assert json.loads(content[8 : 8 + length])["w"]["data_offsets"] == [0, 12]


def test_bfloat16_is_widened(tmp_path):
    bits = np.array([[0x3F80, 0xC020, 0x7F80], [0x0000, 0x8000, 0x7FC0]], "<u2")
    header = json.dumps({"w": {"dtype": "BF16", "shape": [2, 3], "data_offsets": [0, 12]}}).encode()
    (tmp_path / "b.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bits.tobytes())
    found = read_safetensors(tmp_path / "b.safetensors")["w"]
    assert found.dtype == np.float32
    assert np.array_equal(found, np.array([[1, -2.5, np.inf], [0, -0.0, np.nan]]), equal_nan=True)
    assert np.signbit(found[1, 1])


@pytest.mark.parametrize(
    ("entries", "problem"),
    [
        ([], r"is \[\], but must be an object"),
        ({"a": {"dtype": "F32", "shape": [1]}}, "entry for 'a': lacks 'data_offsets'"),
        ({"a": {"dtype": "F32", "shape": [1], "data_offsets": ["0", 4]}}, r"data_offsets\[0\] is '0'"),
        ({"a": {"dtype": "F32", "shape": [2**40, 2**40], "data_offsets": [0, 8]}}, "does not fit shape"),
        ({"a": {"dtype": "F32", "shape": [-1, -1], "data_offsets": [0, 4]}}, "does not fit shape"),
        ({"a": {"dtype": "F32", "shape": [0, 2**62], "data_offsets": [0, 0]}}, "does not fit shape"),
        ({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8, 8]}}, "does not fit shape"),
        ({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}, "bytes .* belong to no tensor"),
        (
            {
                "a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]},
                "b": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]},
            },
            "bytes .* belong to two tensors",
        ),
        ({"__metadata__": {"a": 1}, "a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}, "__metadata__"),
    ],
)
def test_a_header_is_held_against_the_format_and_the_file(tmp_path, entries, problem):
    header = json.dumps(entries).encode()
    file = tmp_path / "x.safetensors"
    file.write_bytes(len(header).to_bytes(8, "little") + header + bytes(8))
    with pytest.raises(CheckpointError, match=problem):
        read_safetensors(file)
