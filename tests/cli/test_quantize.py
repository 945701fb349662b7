"""`quantize` from the shell: what it says, what it writes, and what it refuses."""

import errno
import json
import os

import numpy as np
import pytest
from world import make_folder

from abi_py.config import TrainableModelConfig
from abi_py.formats.gguf import open_gguf, writing
from abi_py.formats.gguf.ggml_types import BY_NAME
from abi_py.model import TrainableModel
from abi_py.model.frozen import FrozenModel
from abi_py.runs import quantizing

TEXT = "the quick brown fox jumps over the lazy dog. " * 40


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """Return a GGUF file of a model whose rows are whole blocks."""
    path = tmp_path_factory.mktemp("quantize") / "in.gguf"
    shape = {"hidden_dim": 256, "intermediate_dim": 256, "vocab_size": 257, "num_layers": 1, "max_seq_len": 64}
    TrainableModel(TrainableModelConfig(**shape, num_heads=4)).export_to_gguf(path, "F16")
    return path


def test_a_file_of_fewer_bits(abi_train, source, tmp_path):
    code, out, err = abi_train("quantize", source, "out.gguf", "q4_k_m")
    assert code == 0, err
    lines = dict(line.split(maxsplit=1) for line in out.splitlines())
    assert lines.keys() == {"model", "type", "wrote", "checked", "logits"}
    assert "llama, " in lines["model"]
    assert "F16" in lines["model"]
    size = (tmp_path / "out.gguf").stat().st_size
    tensors = sum(tensor.size for tensor in open_gguf(tmp_path / "out.gguf").tensors.values())
    assert f"tensors of {tensors / 1e3:,.1f} kB" in lines["type"]
    assert f"{size / 1e3:,.1f} kB" in lines["wrote"]
    assert "Q4_K 7" in lines["checked"]
    assert "Q6_K 1." in lines["checked"]
    assert "of 16 tokens 7" in lines["logits"]
    model, quantised = TrainableModel.from_gguf(source), FrozenModel.from_gguf(tmp_path / "out.gguf")
    off = np.abs(model.forward(np.arange(9)[None]) - quantised.forward(np.arange(9)[None]))
    assert 0 < off.mean() < 0.2 * model.forward(np.arange(9)[None]).std()
    assert list(tmp_path.iterdir()) == [tmp_path / "out.gguf"]


def test_a_quantised_file_may_be_quantised_again_with_a_warning(abi_train, source, tmp_path):
    abi_train("quantize", source, "a.gguf", "Q8_0")
    code, _, err = abi_train("quantize", "a.gguf", "b.gguf", "Q4_0", "--json")
    assert code == 0
    assert "warning: tensors of Q8_0 are quantised again and keep the errors that they have" in err


def test_json(abi_train, source, tmp_path):
    (tmp_path / "text.txt").write_text(TEXT)
    code, out, _ = abi_train("quantize", source, "out.gguf", "Q8_0", "--perplexity", "text.txt", "--json")
    found = json.loads(out)
    assert code == 0
    assert (found["type"], found["files"], found["checked"]) == ("Q8_0", ["out.gguf"], True)
    assert found["bytes"] == (tmp_path / "out.gguf").stat().st_size
    assert found["errors"] == {"Q8_0": pytest.approx(0.0053, abs=0.0005)}
    assert 0 < found["logits"]["off"] < found["logits"]["explained"] < 0.2
    assert found["perplexity"] == pytest.approx(found["perplexity_of_model"], rel=0.01)
    assert found["perplexity"] != found["perplexity_of_model"]


def test_a_table_writes_nothing_where_no_place_is_given(abi_train, source, tmp_path):
    code, out, _ = abi_train("quantize", source, "--table")
    assert code == 0
    for name in quantizing.TABLE:
        assert name in out
    (tmp_path / "text.txt").write_text(TEXT)
    code, out, _ = abi_train("quantize", source, "--table", "--perplexity", "text.txt", "--json")
    rows = json.loads(out)["types"]
    assert [row["type"] for row in rows] == [*quantizing.TABLE]
    assert [*tmp_path.iterdir()] == [tmp_path / "text.txt"]
    kl = {row["type"]: row["kl"] for row in rows}
    assert kl["F16"] < kl["Q8_0"] < kl["Q6_K"] < kl["Q4_K_S"]


@pytest.mark.parametrize("columns", ["40", "80", "120"])
def test_nothing_of_a_table_is_cut_in_any_terminal(abi_train, source, tmp_path, monkeypatch, columns):
    (tmp_path / "text.txt").write_text(TEXT)
    monkeypatch.setattr(quantizing, "TABLE", ("Q8_0", "Q4_K_M"))
    monkeypatch.setenv("COLUMNS", columns)
    code, out, err = abi_train("quantize", source, "--table", "--perplexity", "text.txt")
    assert code == 0, err
    assert "\N{HORIZONTAL ELLIPSIS}" not in out
    words = {"Q8_0", "Q4_K_M", "perplexity", "difference", "largest", "8.53"}
    assert words <= {*out.replace("\N{BOX DRAWINGS LIGHT VERTICAL}", " ").split()}
    assert ("\N{BOX DRAWINGS LIGHT VERTICAL}" in out) == (columns != "40")


def _importance(name, columns):
    """Return the tensors of a file of importance, of one matrix."""
    return [
        writing.PlannedTensor(
            name=f"{name}.{each}",
            shape=(size,),
            kind=BY_NAME["F32"],
            rows=lambda first, last, size=size: np.ones((1, size), np.float32),
        )
        for each, size in (("in_sum2", columns), ("counts", 1))
    ]


@pytest.mark.parametrize("model", ["base", "base.gguf"])
def test_the_importance_of_another_model(abi_train, tmp_path, model):
    """Of a folder as of a file: which file it is, and what helps."""
    TrainableModel.from_pretrained(make_folder(tmp_path / "base")).export_to_gguf(tmp_path / "base.gguf")
    for name, columns in (("blk.0.attn_q.weight", 8), ("blk.9.attn_q.weight", 16)):
        writing.write_gguf(tmp_path / "other.gguf", {"general.type": "imatrix"}, _importance(name, columns))
        code, _, err = abi_train("quantize", model, "out.gguf", "Q8_0", "--imatrix", "other.gguf")
        assert code == 1
        assert err.startswith("error: other.gguf")
        assert "of another" in err
        assert "make it from this model with llama-imatrix" in err
    writing.write_gguf(tmp_path / "this.gguf", {"general.type": "imatrix"}, _importance("blk.0.attn_q.weight", 16))
    code, _, err = abi_train("quantize", model, "out.gguf", "Q8_0", "--imatrix", "this.gguf")
    assert code == 0
    assert "note: nothing in Q8_0 depends on an importance: --imatrix" in err


def test_a_table_of_files(abi_train, source, tmp_path):
    assert abi_train("quantize", source, "all", "--table", "--no-check")[0] == 0
    assert {path.name for path in (tmp_path / "all").iterdir()} == {f"in-{name}.gguf" for name in quantizing.TABLE}


def test_a_folder(abi_train, tmp_path):
    make_folder(tmp_path / "base")
    code, out, err = abi_train("quantize", "base", "out.gguf", "Q8_0")
    assert code == 0, err
    assert "logits" in out
    file = open_gguf(tmp_path / "out.gguf")
    assert file.metadata["tokenizer.ggml.model"] == "gpt2"
    assert file.metadata["general.name"] == "base"


def test_a_run_and_a_choice_where_there_is_none(abi_train, source, tiny, tmp_path):
    assert abi_train("run", *tiny, "--hidden-dim", "32", "--num-heads", "1", "--out", "r")[0] == 0
    for which in ("--best", "--last"):
        assert abi_train("quantize", "r", f"{which[2:]}.gguf", "Q8_0", which, "--num-threads", "1")[0] == 0
        assert open_gguf(tmp_path / f"{which[2:]}.gguf").tensors["blk.0.attn_q.weight"].kind.name == "Q8_0"
        code, _, err = abi_train("quantize", source, "x.gguf", "Q8_0", which)
        assert code == 2
        assert "is one model, not a run" in err


def test_parts(abi_train, source, tmp_path):
    code, out, _ = abi_train("quantize", source, "out.gguf", "Q8_0", "--max-shard-size", "200KB")
    names = sorted(path.name for path in tmp_path.iterdir())
    assert code == 0
    assert len(names) > 1
    assert all(name in out for name in names)


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        (["out.gguf", "Q4_K_X"], "quantize ('Q4_K_X') must be"),
        (["out.gguf"], "OUT and TYPE must be given"),
        ([], "OUT and TYPE must be given"),
        (["out", "Q8_0", "--table"], "TYPE (Q8_0) has no effect with --table"),
        (["there.gguf", "Q8_0"], "out (there.gguf) is there already; --force replaces it"),
        (["IN", "Q8_0", "--force"], "must be another file than the model that is read"),
        (["link.gguf", "Q8_0", "--force"], "must be another file than the model that is read"),
        ([".", "Q8_0"], "out (.) must be a file, and is a directory"),
        (["/dev/null", "Q8_0"], "must be a file, and is a device or a pipe"),
        (["out.gguf", "Q8_0", "--imatrix", "IN"], "is no importance file"),
        (["there.gguf", "--table"], "out (there.gguf) must be a directory with --table, and is a file"),
        (["there.gguf/x.gguf", "Q8_0"], "must be in a directory, and there.gguf is a file; give another path"),
    ],
)
def test_wrong_calls(abi_train, source, tmp_path, words, problem):
    (tmp_path / "there.gguf").write_text("mine")
    os.link(source, tmp_path / "link.gguf")
    code, _, err = abi_train("quantize", source, *[source if word == "IN" else word for word in words])
    assert code == (1 if "importance" in problem else 2)
    assert problem in err
    assert err.count("\n") == 1
    assert (tmp_path / "there.gguf").read_text() == "mine"
    assert {path.name for path in tmp_path.iterdir()} == {"there.gguf", "link.gguf"}


@pytest.mark.parametrize("problem", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()])
def test_a_full_disk_and_ctrl_c_leave_what_was_there(abi_train, source, tmp_path, monkeypatch, problem):
    (tmp_path / "out.gguf").write_text("mine")
    written = writing._encoded

    def full(tensor, *place):
        if tensor.name == "blk.0.ffn_down.weight":
            raise problem
        return written(tensor, *place)

    monkeypatch.setattr(writing, "_encoded", full)
    code, _, err = abi_train("quantize", source, "out.gguf", "Q8_0", "--force")
    assert code == (130 if isinstance(problem, KeyboardInterrupt) else 1)
    assert "Traceback" not in err
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("out.gguf", "mine")]


def test_logits_that_the_types_do_not_explain(abi_train, source, monkeypatch):
    """As if the metadata had lost something: all numbers are right, and the model computes another thing."""
    real = quantizing.FileSource.logits
    monkeypatch.setattr(quantizing.FileSource, "logits", lambda self, ids: real(self, ids) * 1.5)
    code, _, err = abi_train("quantize", source, "out.gguf", "Q8_0")
    assert code == 1
    assert "out.gguf was written, and its tensors are as near as their types keep them, but its logits are 0.33" in err
    assert abi_train("quantize", source, "out.gguf", "Q8_0", "--no-check", "--force")[0] == 0
