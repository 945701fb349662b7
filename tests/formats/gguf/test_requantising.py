"""A GGUF file in another type: what is carried over, what is encoded, and what a file of importance changes."""

import numpy as np
import pytest

from abi_py.errors import CheckpointError
from abi_py.formats.gguf import F32, U32, PlannedTensor, open_gguf, write_gguf
from abi_py.formats.gguf.checking import write_checked
from abi_py.formats.gguf.ggml_types import BY_NAME
from abi_py.formats.gguf.importance import read_importance
from abi_py.formats.gguf.quantising import file_type
from abi_py.formats.gguf.requantising import convert, subject_of

METADATA = {
    **{"general.architecture": "unheard-of", "general.name": "x", "unheard-of.block_count": U32(2)},
    **{"unheard-of.attention.head_count": np.array([4, 8], np.int32), "a.key": F32(0.1), "general.file_type": U32(1)},
    **{"tokenizer.ggml.tokens": ["a", "b"], "a.list": np.arange(3, dtype=np.int16)},
}
RNG = np.random.default_rng(5)
TENSORS = {
    "token_embd.weight": (RNG.standard_normal((5, 256), np.float32), "F16"),
    "blk.0.attn_q.weight": (RNG.standard_normal((8, 512), np.float32), "F16"),
    "blk.0.attn_v.weight": (RNG.standard_normal((8, 512), np.float32), "Q8_0"),
    "blk.1.ffn_down.weight": (RNG.standard_normal((6, 96), np.float32), "F32"),
    "blk.1.ffn_up_exps.weight": (RNG.standard_normal((3, 4, 256), np.float32), "F16"),
    "blk.0.attn_norm.weight": (RNG.standard_normal(256, np.float32), "F16"),
    "blk.0.ffn_gate_inp.weight": (RNG.standard_normal((4, 256), np.float32), "F32"),
    "rope_freqs.weight": (RNG.standard_normal(16, np.float32), "F32"),
    "blk.0.ids": (np.arange(12, dtype=np.int32).reshape(3, 4), "I32"),
}


def planned(name, array, kind):
    rows = array.reshape(-1, array.shape[-1])
    return PlannedTensor(name=name, shape=array.shape, kind=BY_NAME[kind], rows=lambda a, b: rows[a:b])


@pytest.fixture
def file(tmp_path):
    write_gguf(tmp_path / "in.gguf", METADATA, [planned(name, *each) for name, each in TENSORS.items()])
    return open_gguf(tmp_path / "in.gguf")


def written(file, path, type, importance=None):
    found = convert(file, file_type(type), importance)
    done = write_checked(path, found.metadata, [move.planned() for move in found.moves])
    return found, done, open_gguf(path)


def test_everything_is_carried_over_and_matrices_are_encoded(file, tmp_path):
    plan, done, out = written(file, tmp_path / "out.gguf", "Q4_K_M")
    assert [*out.metadata] == [*METADATA, "general.quantization_version"]
    changed = {"general.file_type": 15, "general.quantization_version": 2}
    for key in out.metadata:
        assert np.array_equal(out.metadata[key], changed.get(key, METADATA.get(key)))
        assert key in changed or type(out.metadata[key]) is type(file.metadata[key])
    kinds = {name: tensor.kind.name for name, tensor in out.tensors.items()}
    assert kinds == {
        **{"token_embd.weight": "Q6_K", "blk.0.attn_q.weight": "Q4_K", "blk.0.attn_v.weight": "Q4_K"},
        **{"blk.1.ffn_down.weight": "Q8_0", "blk.1.ffn_up_exps.weight": "Q4_K", "blk.0.attn_norm.weight": "F16"},
        **{"blk.0.ffn_gate_inp.weight": "F32", "rope_freqs.weight": "F32", "blk.0.ids": "I32"},
    }
    for name in ("blk.0.attn_norm.weight", "blk.0.ffn_gate_inp.weight", "rope_freqs.weight", "blk.0.ids"):
        assert np.array_equal(out.tensors[name].raw, file.tensors[name].raw)
    for name, (array, _) in TENSORS.items():
        if kinds[name] == "Q4_K":
            found = out.tensors[name].numbers(0, len(out.tensors[name].raw)).reshape(array.shape)
            assert 0.04 < np.linalg.norm(found - array) / np.linalg.norm(array) < 0.08
            assert done.losses[name].error == pytest.approx(0.0715, abs=0.01)
    assert plan.nbytes == sum(tensor.size for tensor in out.tensors.values())
    assert plan.bits_per_weight == 8 * plan.nbytes / sum(array.size for array, _ in TENSORS.values())
    assert [move.source.name for move in plan.moves if move.is_requantised] == ["blk.0.attn_v.weight"]


def test_the_type_that_a_file_has_is_its_bytes(file, tmp_path):
    _, _, once = written(file, tmp_path / "a.gguf", "Q5_K_M")
    plan, done, _ = written(once, tmp_path / "b.gguf", "Q5_K_M")
    assert all(move.is_copy for move in plan.moves)
    assert done.by_type() == {}
    assert (tmp_path / "a.gguf").read_bytes() == (tmp_path / "b.gguf").read_bytes()


def test_heads_may_differ_from_block_to_block(file):
    assert subject_of(file).heads == 4


@pytest.mark.parametrize(
    ("metadata", "tensors", "problem"),
    [
        ({"general.type": "imatrix"}, TENSORS, "is of type 'imatrix', and no model"),
        ({}, {}, "holds no tensors"),
        ({"unheard-of.block_count": "two"}, TENSORS, "unheard-of.block_count is 'two', but must be a whole number"),
        ({"unheard-of.attention.head_count": np.empty(0, np.int32)}, TENSORS, "head_count is an empty array"),
    ],
)
def test_what_is_no_model(tmp_path, metadata, tensors, problem):
    write_gguf(tmp_path / "x.gguf", METADATA | metadata, [planned(name, *each) for name, each in tensors.items()])
    with pytest.raises(CheckpointError, match=problem):
        convert(open_gguf(tmp_path / "x.gguf"), file_type("Q8_0"))


def test_a_matrix_of_a_type_that_is_not_computed(tmp_path):
    raw = np.zeros((4, 66), np.uint8)
    name = "blk.0.attn_q.weight"
    plan = PlannedTensor(name=name, shape=(4, 256), kind=BY_NAME["IQ2_XXS"], rows=lambda a, b: raw[a:b])
    write_gguf(tmp_path / "x.gguf", METADATA, [plan])
    with pytest.raises(CheckpointError, match=r"attn_q.weight is of type IQ2_XXS, which this version does not compute"):
        convert(open_gguf(tmp_path / "x.gguf"), file_type("Q8_0"))


# -- importance ----------------------------------------------------------------------------------

SUMS = {
    "blk.0.attn_q.weight": (np.where(np.arange(512) % 8, 2.0, 5000.0)[None], [100]),
    "blk.1.ffn_up_exps.weight": (np.stack([np.full(256, 9.0), np.zeros(256), np.linspace(0, 90, 256)]), [9, 0, 30]),
}


def imatrix(path, sums=None, metadata=None, change=None):
    """Write a file of importance as llama-imatrix does."""
    arrays = {}
    for name, (values, counts) in (SUMS if sums is None else sums).items():
        one = len(counts) == 1  # ggml has no axes of size 1 at the end
        arrays[f"{name}.in_sum2"] = np.asarray(values[0] if one else values, np.float32)
        arrays[f"{name}.counts"] = np.asarray(counts if one else np.array(counts)[:, None], np.float32)
    arrays.update(change or {})
    known = {"general.type": "imatrix", "imatrix.datasets": ["some.txt"], "imatrix.chunk_count": U32(3)}
    known |= {"imatrix.chunk_size": U32(512)} | (metadata or {})
    write_gguf(path, known, [planned(name, array, "F32") for name, array in arrays.items() if array is not None])
    return path


def test_importance_is_the_mean_square(tmp_path):
    found = read_importance(imatrix(tmp_path / "i.gguf"))
    assert (found.datasets, found.chunks) == (("some.txt",), 3)
    np.testing.assert_allclose(found.columns["blk.0.attn_q.weight"][:9], [50, *[0.02] * 7, 50], rtol=1e-6)
    experts = found.columns["blk.1.ffn_up_exps.weight"]
    np.testing.assert_allclose(experts[:, [0, 255]], [[1, 1], [1, 1], [0, 3]], rtol=1e-6)


def test_importance_lowers_the_error_that_it_weighs(file, tmp_path):
    importance = read_importance(imatrix(tmp_path / "i.gguf"))
    _, _, plain = written(file, tmp_path / "plain.gguf", "Q4_K_S")
    _, _, weighed = written(file, tmp_path / "weighed.gguf", "Q4_K_S", importance)
    name = "blk.0.attn_q.weight"
    weights = importance.columns[name]
    errors = [
        float((np.square(out.tensors[name].numbers(0, 8) - file.tensors[name].numbers(0, 8)) * weights).sum())
        for out in (plain, weighed)
    ]
    assert errors[1] < 0.7 * errors[0]
    assert np.array_equal(plain.tensors["token_embd.weight"].raw, weighed.tensors["token_embd.weight"].raw)
    keys = {key: value for key, value in weighed.metadata.items() if key.startswith("quantize.imatrix.")}
    assert {key.rpartition(".")[2]: value for key, value in keys.items()} == {
        **{"file": "i.gguf", "dataset": "some.txt", "entries_count": 2, "chunks_count": 3}
    }


@pytest.mark.parametrize(
    ("sums", "metadata", "change", "problem"),
    [
        (None, {"general.type": "model"}, {}, "is no importance file"),
        ({}, {}, {"general.x": np.ones(3, np.float32)}, "general.x is neither a sum nor the count of one"),
        (None, {}, {"blk.0.attn_q.weight.counts": None}, "blk.0.attn_q.weight.counts is missing"),
        (None, {}, {"blk.0.attn_q.weight.counts": np.ones((2, 1), np.float32)}, "has 1 row and .*counts 2"),
        (None, {}, {"blk.0.attn_q.weight.counts": np.array([-1], np.float32)}, r"counts\[0, 0\] is -1"),
        ({}, {}, {}, "has the importance of no tensor"),
    ],
)
def test_a_file_of_importance_that_says_nonsense(tmp_path, sums, metadata, change, problem):
    with pytest.raises(CheckpointError, match=problem):
        read_importance(imatrix(tmp_path / "i.gguf", sums, metadata, change))


@pytest.mark.parametrize(
    ("name", "columns", "problem"),
    [
        ("blk.7.attn_q.weight", 512, "has the importance of blk.7.attn_q.weight, which the model lacks"),
        ("blk.0.attn_q.weight", 256, r"attn_q.weight has shape \(256,\), but the tensor \(8, 512\)"),
    ],
)
def test_an_importance_of_another_model_is_refused_by_name(file, tmp_path, name, columns, problem):
    importance = read_importance(imatrix(tmp_path / "i.gguf", {name: (np.ones((1, columns)), [1])}))
    with pytest.raises(CheckpointError, match=problem):
        convert(file, file_type("Q8_0"), importance)
