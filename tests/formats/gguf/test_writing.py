"""GGUF files as they are written: the bytes of the specification, in strips, in parts, whole or not at all."""

import errno
import tracemalloc

import numpy as np
import pytest
import raw_gguf as raw

from abi_py.errors import CheckpointError, NonFiniteError
from abi_py.formats.finite import check_read
from abi_py.formats.gguf import (
    F32,
    F64,
    I8,
    I16,
    I32,
    I64,
    U8,
    U16,
    U32,
    U64,
    PlannedTensor,
    open_gguf,
    plan_gguf,
    write_gguf,
    writing,
)
from abi_py.formats.gguf.ggml_types import BY_NAME
from abi_py.kernels.storage import STORAGES

METADATA = {
    **{"general.architecture": "llama", "a.u8": U8(200), "a.i8": I8(-3), "a.u16": U16(60_000), "a.i16": I16(-300)},
    **{"a.u32": U32(4_000_000_000), "a.i32": I32(-70_000), "a.f32": F32(0.5), "a.yes": True, "a.u64": U64(2**64 - 1)},
    **{"a.i64": I64(-(2**63)), "a.f64": F64(1e-300), "a.words": ["a", "", "\u4f60\u597d", "\U0001f600"]},
    **{"a.numbers": np.array([1, -2, 3], np.int32), "a.floats": np.array([0.5, 1.5], np.float32)},
    **{"a.bools": np.array([True, False]), "a.none": np.empty(0, np.uint16)},
}


def planned(name, array, kind, **others):
    """Plan a tensor whose rows are those of an array, float32 or as they are kept."""
    kind = BY_NAME[kind]
    shape = (
        array.shape if array.dtype == np.float32 else (*array.shape[:-1], array.shape[-1] // kind.bytes * kind.block)
    )
    rows = array.reshape(-1, array.shape[-1])
    return PlannedTensor(name=name, shape=shape, kind=kind, rows=lambda first, last: rows[first:last], **others)


def tensors():
    chance = np.random.default_rng(0)
    return [
        planned("numbers", raw.NUMBERS, "F32"),
        planned("blocks", raw.BYTES.reshape(2, 34), "Q8_0"),
        planned("vector", raw.VECTOR.astype(np.float32), "F16"),
        planned("wide", chance.standard_normal((11, 40), np.float32), "BF16"),
    ]


def test_the_bytes_are_those_of_the_specification(tmp_path):
    entries = [entry for entry in raw.ENTRIES if b"a.nested" not in entry]
    assert write_gguf(tmp_path / "x.gguf", METADATA, tensors()[:3]) == (tmp_path / "x.gguf",)
    assert (tmp_path / "x.gguf").read_bytes() == raw.padded(raw.gguf(entries, raw.TENSORS, raw.DATA))


def test_what_was_read_is_written_again_to_the_same_bytes(tmp_path):
    write_gguf(tmp_path / "x.gguf", {**METADATA, "general.alignment": U32(64)}, tensors())
    file = open_gguf(tmp_path / "x.gguf")
    again = [
        PlannedTensor(
            name=name, shape=each.shape, kind=each.kind, rows=lambda first, last, raw=each.raw: raw[first:last]
        )
        for name, each in file.tensors.items()
    ]
    write_gguf(tmp_path / "y.gguf", file.metadata, again)
    assert (tmp_path / "y.gguf").read_bytes() == (tmp_path / "x.gguf").read_bytes()
    assert all(tensor.offset % 64 == 0 for tensor in file.tensors.values())


def test_the_size_is_known_before(tmp_path):
    for largest in (None, 10_000, 2_500, 1):
        plan = plan_gguf(tmp_path / "x.gguf", METADATA, tensors(), largest=largest)
        files = write_gguf(tmp_path / "x.gguf", METADATA, tensors(), largest=largest)
        assert [each.path for each in plan] == [*files]
        assert [each.size for each in plan] == [path.stat().st_size for path in files]


def test_strips_change_no_byte(tmp_path, monkeypatch):
    x = np.random.default_rng(1).standard_normal((7, 50), np.float32)
    calls, told = [], []

    def rows(first, last):
        calls.append((first, last))
        return x[first:last]

    plan = PlannedTensor(name="x", shape=x.shape, kind=BY_NAME["F16"], rows=rows)
    for strip in (1 << 22, 150, 1):
        monkeypatch.setattr(writing, "STRIP", strip)
        write_gguf(tmp_path / f"{strip}.gguf", {}, [plan], progress=lambda *each: told.append(each))
    assert calls == [(0, 7), (0, 3), (3, 6), (6, 7), *((i, i + 1) for i in range(7))]
    assert {tensor for tensor, _ in told} == {plan}
    assert sum(len(content) for _, content in told) == 3 * 2 * x.size
    assert len({path.read_bytes() for path in tmp_path.iterdir()}) == 1
    np.testing.assert_array_equal(open_gguf(tmp_path / "1.gguf").tensors["x"].raw, x.astype(np.float16))


def test_parts_hold_at_most_so_much_and_open_as_one(tmp_path):
    whole = write_gguf(tmp_path / "w.gguf", {"a": "b"}, tensors())
    files = write_gguf(tmp_path / "m.gguf", {"a": "b"}, tensors(), largest=1200)
    assert [path.name for path in files] == [f"m-0000{i}-of-00003.gguf" for i in (1, 2, 3)]
    assert all(path.stat().st_size <= 1200 for path in files)
    one, several = open_gguf(whole[0]), open_gguf(files[2])
    assert {key: several.metadata[key] for key in ("split.no", "split.count", "split.tensors.count")} == {
        **{"split.no": 0, "split.count": 3, "split.tensors.count": 4}
    }
    assert [*several.tensors] == [*one.tensors]
    assert all(tensor.raw.tobytes() == one.tensors[name].raw.tobytes() for name, tensor in several.tensors.items())
    joined = [
        PlannedTensor(
            name=name, shape=each.shape, kind=each.kind, rows=lambda first, last, raw=each.raw: raw[first:last]
        )
        for name, each in several.tensors.items()
    ]
    write_gguf(tmp_path / "j.gguf", several.metadata, joined)  # what is said of parts is left out
    assert (tmp_path / "j.gguf").read_bytes() == whole[0].read_bytes()


@pytest.mark.parametrize(("change", "match"), [
    ({"shape": ()}, "must have 1 to 4 axes"),
    ({"shape": (1, 1, 1, 1, 32)}, "must have 1 to 4 axes"),
    ({"shape": (0, 32)}, "none of size 0"),
    ({"shape": (2, 48)}, "rows of 48 numbers, and Q8_0 keeps 32 in a block; choose another type"),
    ({"name": "n" * 64}, "must have 1 to 63 bytes, or llama.cpp refuses it"),
    ({"name": ""}, "must have 1 to 63 bytes"),
    ({"name": "a"}, "'a' is given twice"),
    ({"importance": np.ones(31)}, r"has shape \(31,\); it must be \(32,\), or \(G, 32\) for G equal groups"),
    ({"importance": np.ones((3, 32))}, "equal groups"),
    ({"importance": np.full(32, np.nan)}, "the importance of 'b' must be finite, and at least 0, everywhere"),
])  # fmt: skip
def test_plans_that_cannot_be(tmp_path, change, match):
    kind, x = BY_NAME["Q8_0"], np.ones((2, 32), np.float32)
    good = {"name": "b", "shape": (2, 32), "kind": kind, "rows": lambda first, last: x[first:last]}
    first = PlannedTensor(**{**good, "name": "a"})
    with pytest.raises(ValueError, match=match):
        plan_gguf(tmp_path / "x.gguf", {}, [first, PlannedTensor(**{**good, **change})])


@pytest.mark.parametrize(("metadata", "error", "match"), [
    ({"a": 5}, TypeError, r"a is 5 \(int\), which has no type of GGUF's; give U32"),
    ({"a": None}, TypeError, "a is None"),
    ({"a": ["x", 1]}, TypeError, r"a is \['x', 1\] \(list\)"),
    ({"a": np.ones((2, 2))}, TypeError, "an array of numbers of one axis"),
    ({"a": "\ud83d"}, ValueError, "half of a surrogate pair"),
    ({"": True}, ValueError, "the key '' must have 1 to 65,535 bytes"),
    ({"general.alignment": U32(24)}, ValueError, "general.alignment is 24, but must be a U32 that is a power of two"),
    ({"general.alignment": U64(32)}, ValueError, "must be a U32"),
])  # fmt: skip
def test_metadata_that_cannot_be(tmp_path, metadata, error, match):
    with pytest.raises(error, match=match):
        write_gguf(tmp_path / "x.gguf", metadata, [])
    assert not [*tmp_path.iterdir()]


def test_rows_of_a_wrong_shape_or_type(tmp_path):
    for x in (np.ones((2, 31), np.float32), np.ones((2, 32)), np.ones((1, 34), np.uint8), np.ones((2, 34), np.int8)):
        plan = PlannedTensor(name="a", shape=(2, 32), kind=BY_NAME["Q8_0"], rows=lambda first, last, x=x: x)
        with pytest.raises(
            TypeError, match=r"x\.gguf: a: rows\(0, 2\) is \w+ .*; it must be float32 \(2, 32\) or uint8"
        ):
            write_gguf(tmp_path / "x.gguf", {}, [plan])
    assert not [*tmp_path.iterdir()]


def test_an_error_leaves_what_was_there(tmp_path):
    write_gguf(tmp_path / "x.gguf", METADATA, tensors())
    before = (tmp_path / "x.gguf").read_bytes()

    def rows(first, last):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_gguf(tmp_path / "x.gguf", {}, [PlannedTensor(name="a", shape=(2, 2), kind=BY_NAME["F32"], rows=rows)])
    assert (tmp_path / "x.gguf").read_bytes() == before
    assert len([*tmp_path.iterdir()]) == 1


@pytest.mark.parametrize("largest", [None, 2000])
def test_a_full_disk_leaves_nothing(tmp_path, monkeypatch, largest):
    def full(file, tensor, planned, progress):
        if tensor.name == "wide":
            raise OSError(errno.ENOSPC, "No space left on device")
        write(file, tensor, planned, progress)

    write = writing._write
    monkeypatch.setattr(writing, "_write", full)
    with pytest.raises(OSError, match="No space left") as caught:
        write_gguf(tmp_path / "x.gguf", METADATA, tensors(), largest=largest)
    assert str(caught.value.filename).startswith(str(tmp_path / "x"))
    assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize("value", [np.nan, np.inf, 1e30])
def test_no_number_that_its_type_cannot_keep_is_written(tmp_path, value):
    x = np.ones((3, 32), np.float32)
    x[1, 5] = value
    with pytest.raises(NonFiniteError, match=r"x\.gguf: a: row 1, column 5 is .*; nothing was saved"):
        write_gguf(tmp_path / "x.gguf", {}, [planned("a", x, "F16")])
    assert not [*tmp_path.iterdir()]


def test_importance_may_differ_between_groups_of_rows(tmp_path, monkeypatch):
    chance = np.random.default_rng(3)
    x, weights = chance.standard_normal((6, 256), np.float32), chance.random((2, 256), np.float32)
    monkeypatch.setattr(writing, "STRIP", 2 * 256)
    write_gguf(tmp_path / "x.gguf", {}, [planned("x", x, "Q4_K", importance=weights)])
    storage = STORAGES["q4_k"]
    wanted = np.vstack([storage.encode_ref(x[:3], weights[0]), storage.encode_ref(x[3:], weights[1])])
    np.testing.assert_array_equal(open_gguf(tmp_path / "x.gguf").tensors["x"].raw, wanted)


@pytest.mark.parametrize(("kind", "at", "largest"), [
    ("Q8_0", 34, 0x7BFF),  # d of the second block
    ("Q4_K", 146, 0x7BFF),  # d_min
    ("Q6_K", 418, 0x7BFF),
    ("F16", 0, 0x7BFF),
    ("BF16", 0, 0x7F7F),
])  # fmt: skip
def test_nan_and_infinity_in_a_file_are_found(tmp_path, kind, at, largest):
    kind, path = BY_NAME[kind], tmp_path / "x.gguf"
    raw = np.zeros((5, 512 // kind.block * kind.bytes), np.uint8)
    plan = PlannedTensor(name="x", shape=(5, 512), kind=kind, rows=lambda first, last: raw[first:last].view(kind.dtype))
    raw[3, at : at + 2].view("<u2")[:] = largest
    write_gguf(path, {}, [plan])
    check_read(path, open_gguf(path).tensors)
    raw[3, at : at + 2].view("<u2")[:] = largest + 1  # infinity
    write_gguf(path, {}, [plan])
    with pytest.raises(
        CheckpointError, match=rf"x holds NaN or infinity at \[3, {at // kind.bytes * kind.block}\], and"
    ):
        check_read(path, open_gguf(path).tensors)


def test_a_model_larger_than_the_memory_it_takes(tmp_path, monkeypatch):
    x = np.zeros((64, 4096), np.float32)
    plan = PlannedTensor(name="x", shape=(4096, 4096), kind=BY_NAME["F32"], rows=lambda first, last: x[: last - first])
    monkeypatch.setattr(writing, "STRIP", x.size)
    tracemalloc.start()
    write_gguf(tmp_path / "x.gguf", {}, [plan])
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert (tmp_path / "x.gguf").stat().st_size == 96 + 4096 * 4096 * 4  # 64 MB
    assert peak < 4 * x.nbytes
