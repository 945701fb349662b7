"""Our reader and writer against those of the `gguf` package: stored, and where it is there, of files made by chance."""

import json
from pathlib import Path

import numpy as np
import pytest

from abi_py.formats.gguf import F32, F64, I8, I16, I32, I64, U8, U16, U32, U64, PlannedTensor, open_gguf, write_gguf
from abi_py.formats.gguf.ggml_types import BY_NAME, GGML_TYPES
from abi_py.kernels.storage import STORAGES

GOLDEN = Path(__file__).resolve().parents[2] / "golden" / "gguf.npz"
CLASSES = {"uint8": U8, "int8": I8, "uint16": U16, "int16": I16, "uint32": U32, "int32": I32, "uint64": U64}
CLASSES |= {"int64": I64, "float32": F32, "float64": F64, "bool": bool, "string": str}


@pytest.fixture(scope="module")
def golden():
    with np.load(GOLDEN) as stored:
        return dict(stored)


@pytest.fixture(scope="module")
def theirs(golden, tmp_path_factory):
    path = tmp_path_factory.mktemp("golden") / "theirs.gguf"
    path.write_bytes(golden["content"].tobytes())
    return open_gguf(path)


def test_their_file_is_read(golden, theirs):
    found = json.loads(str(golden["metadata"]))
    assert [*theirs.metadata] == [key for key, *_ in found]
    for key, kinds, value in found:
        read = theirs.metadata[key]
        if kinds[0] != "array":
            assert (read, type(read)) == (value, CLASSES[kinds[0]])
        elif kinds[1] == "string":
            assert read == value
        else:
            assert (read.dtype, read.tolist()) == (np.dtype(kinds[1]), value)
    assert theirs.alignment == 64
    assert [*theirs.tensors] == ["experts", "half", "brain", "blocks", "fours", "vector"]
    for name, tensor in theirs.tensors.items():
        assert tensor.shape == golden[name].shape
        if tensor.kind.storage_name in STORAGES:
            np.testing.assert_array_equal(tensor.storage.decode_ref(tensor.raw).reshape(tensor.shape), golden[name])


def test_the_same_bytes_are_written(golden, theirs, tmp_path):
    tensors = [
        PlannedTensor(
            name=name, shape=each.shape, kind=each.kind, rows=lambda first, last, raw=each.raw: raw[first:last]
        )
        for name, each in theirs.tensors.items()
    ]
    write_gguf(tmp_path / "x.gguf", theirs.metadata, tensors)
    assert (tmp_path / "x.gguf").read_bytes() == golden["content"].tobytes()


# -- with the package --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def gguf():
    found = pytest.importorskip("gguf", reason="pip install gguf brings it")
    if not hasattr(found, "GGUFReader"):  # this folder, which is called so, too
        pytest.skip("pip install gguf brings it")
    return found


def test_sizes_of_types(gguf):
    sizes = {each.value: (each.name, *gguf.GGML_QUANT_SIZES[each]) for each in gguf.GGMLQuantizationType}
    ours = {number: (each.name, each.block, each.bytes) for number, each in GGML_TYPES.items()}
    sizes.pop(9)  # Q8_1 has 36 bytes in ggml, which is never in a file, and 40 in the package
    assert {number: ours[number] for number in sizes} == sizes


@pytest.mark.parametrize("seed", range(12))
def test_files_by_chance(gguf, tmp_path, seed):
    chance = np.random.default_rng(seed)
    metadata = {"general.architecture": "llama", "general.alignment": U32(2 ** chance.integers(3, 8))}
    for i in range(chance.integers(20)):
        kind = chance.choice([*CLASSES])
        numbers = chance.integers(0, 100, chance.integers(1, 30))
        if kind == "string":
            metadata[f"k.{i}"] = ["\u4f60" * number for number in numbers.tolist()]
        else:
            metadata[f"k.{i}"] = numbers.astype(kind)
            metadata[f"s.{i}"] = CLASSES[kind](numbers[0])
    arrays = {}
    for i in range(chance.integers(6)):
        kind = BY_NAME[str(chance.choice(["F32", "F16", "BF16"]))]
        shape = tuple(chance.integers(1, 9, chance.integers(1, 5)).tolist())
        arrays[f"t.{i}"] = kind, chance.standard_normal(shape, np.float32)
    tensors = [
        PlannedTensor(name=name, shape=x.shape, kind=kind,
                      rows=lambda first, last, x=x: x.reshape(-1, x.shape[-1])[first:last])
        for name, (kind, x) in arrays.items()
    ]  # fmt: skip
    write_gguf(tmp_path / "x.gguf", metadata, tensors)
    read = gguf.GGUFReader(tmp_path / "x.gguf")
    found = {key: field.contents() for key, field in read.fields.items() if not key.startswith("GGUF.")}
    assert found == {key: value.tolist() if isinstance(value, np.ndarray) else value for key, value in metadata.items()}
    assert [each.name for each in read.tensors] == [*arrays]
    for each in read.tensors:
        kind, x = arrays[each.name]
        assert (each.tensor_type.name, each.shape.tolist()) == (kind.name, [*x.shape[::-1]])
        kept = gguf.quants.quantize(x, each.tensor_type)
        assert each.data.tobytes() == kept.tobytes()
