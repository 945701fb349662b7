"""What is read again after it was written: any byte that changed, and any number that its type does not explain."""

import numpy as np
import pytest

from abi_py.errors import CheckpointError
from abi_py.formats.gguf import U32, PlannedTensor, checking, open_gguf
from abi_py.formats.gguf.checking import STEPS, read_again, write_checked
from abi_py.formats.gguf.ggml_types import BY_STORAGE

ENCODED = [name for name in STEPS if name in BY_STORAGE]


def numbers(rows=16, columns=512):
    """Yield matrices of several distributions: what a type explains may not depend on one."""
    rng = np.random.default_rng(3)
    yield rng.standard_normal((rows, columns))
    yield np.clip(rng.standard_t(1, (rows, columns)), -1e3, 1e3)
    yield rng.uniform(-1, 1, (rows, columns)) * 1e-4
    yield np.abs(rng.standard_normal((rows, columns))) + rng.uniform(0, 5, (rows, 1))
    yield np.where(rng.random((rows, columns)) < 0.01, 1.0, rng.standard_normal((rows, columns)) * 0.01)
    yield rng.standard_normal((rows, columns)) * np.exp(3 * rng.standard_normal((rows, columns // 16))).repeat(16, 1)
    yield np.zeros((rows, columns))
    whole = np.clip(np.rint(rng.standard_normal((rows, columns)) * 40), -127, 127)  # as of a file of Q8_0
    whole[:, ::32], whole[:, 1::32] = 127, -127  # neither sign has a code for both
    yield whole / 127


def planned(array, storage, importance=None):
    x = np.clip(array, -6e4, 6e4).astype(np.float32)
    kind = BY_STORAGE[storage]
    return PlannedTensor(
        name="blk.0.x.weight", shape=x.shape, kind=kind, rows=lambda a, b: x[a:b], importance=importance
    )


def importances(columns=512):
    rng = np.random.default_rng(4)
    yield np.exp(2 * rng.standard_normal(columns)).astype(np.float32)
    yield (rng.random(columns) < 0.03).astype(np.float32)


@pytest.mark.parametrize("storage", ENCODED)
def test_what_the_types_explain(storage, tmp_path):
    """No distribution is taken for damage: the bounds hold for numbers of any kind, and with importance."""
    for array in numbers():
        write_checked(tmp_path / "x.gguf", {}, [planned(array, storage)])
        for weights in importances():
            write_checked(tmp_path / "x.gguf", {}, [planned(array, storage, weights)])


def test_the_relative_error_is_told(tmp_path):
    done = write_checked(tmp_path / "x.gguf", {}, [planned(next(numbers(64)), "q4_k")])
    assert done.by_type() == {"Q4_K": pytest.approx(0.0712, abs=0.002)}


@pytest.mark.parametrize("storage", ["q8_0", "q4_k", "float16"])
@pytest.mark.parametrize("place", [0, -1])
def test_a_changed_bit_is_found(storage, place, tmp_path, monkeypatch):
    """The lowest bit of a number, which its type would explain."""
    path, tensor = tmp_path / "x.gguf", planned(next(numbers()), storage)
    sums = written_sums(path, tensor, monkeypatch)
    read_again(path, {}, [tensor], sums)
    found, content = open_gguf(path).tensors[tensor.name], bytearray(path.read_bytes())
    content[found.offset + (0 if place == 0 else found.size - 1)] ^= 1
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"blk.0.x.weight does not read as it was written; do not use the file"):
        read_again(path, {}, [tensor], sums)


def written_sums(path, tensor, monkeypatch):
    sums = {}
    monkeypatch.setattr(checking, "read_again", lambda path, metadata, tensors, found: sums.update(found))
    write_checked(path, {"a": U32(1)}, [tensor])
    monkeypatch.undo()
    return sums


@pytest.mark.parametrize("storage", [name for name in ENCODED if name not in ("q2_k",)])
def test_numbers_of_another_row_are_found(storage, tmp_path):
    """As an encoder would write that takes the wrong row: the bytes are what it wrote, the numbers are not."""
    x = next(numbers()).astype(np.float32)
    calls = []

    def rows(first, last):
        calls.append(first)
        return x[first:last] if len(calls) == 1 else np.roll(x, 1, 0)[first:last]

    tensor = PlannedTensor(name="w", shape=x.shape, kind=BY_STORAGE[storage], rows=rows)
    with pytest.raises(CheckpointError, match=r"w of type \w+ is off by .* in row 0, block 0, of which"):
        write_checked(tmp_path / "x.gguf", {}, [tensor])


def test_a_changed_key_is_found(tmp_path, monkeypatch):
    path, tensor = tmp_path / "x.gguf", planned(next(numbers()), "q8_0")
    sums = written_sums(path, tensor, monkeypatch)
    with pytest.raises(CheckpointError, match="a of the metadata does not read as it was written"):
        read_again(path, {"a": U32(2)}, [tensor], sums)
