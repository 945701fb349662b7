"""`abi-train llm`, and GGUF files wherever a folder of a model is taken."""

import errno
import json
import os

import pytest
from click.testing import CliRunner
from world import make_folder, write_talks

from abi_py.cli import cli
from abi_py.cli.llm import REFUSED, REFUSED_SWITCHES
from abi_py.data import Tokenizer
from abi_py.formats.gguf import open_gguf, writing
from abi_py.formats.gguf.values import F32, U32
from abi_py.formats.gguf.writing import write_gguf
from abi_py.model import TrainableModel

RUN = "--epochs 1 --batch-size 8 --lr 2e-3 --sample-tokens 0".split()  # noqa: SIM905
GREEDY = ("--temperature", "0", "--max-new-tokens", "6")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Write a model in F16 and in Q4_K_M, and conversations; return where."""
    place = tmp_path_factory.mktemp("gguf")
    model = TrainableModel.from_pretrained(make_folder(place / "folder", hidden_dim=256, intermediate_dim=256))
    model.export_to_gguf(place / "half.gguf", "F16", name="a half")
    model.export_to_gguf(place / "small.gguf", "Q4_K_M", name="a small one")
    write_talks(place / "talks.jsonl")
    return place


def done(abi_train, *words):
    code, out, err = abi_train(*words)
    assert code == 0, err
    return out


@pytest.mark.parametrize("base", ["small.gguf", "half.gguf", "folder"])
def test_what_is_trained_further_is_written_again_with_all_that_belongs_to_it(abi_train, made, tmp_path, base):
    words = ["--data", made / "talks.jsonl", *RUN, "--out", "r", "--export-gguf", "out.gguf"]
    out = done(abi_train, "llm", made / base, *words)
    assert "all of its weights are trained" in out
    assert "gguf     out.gguf: " in out
    file, source = open_gguf(tmp_path / "out.gguf"), Tokenizer.load(made / base)
    assert file.metadata["general.name"] == {"small.gguf": "a small one", "half.gguf": "a half"}.get(base, "folder")
    written, text = Tokenizer.load(file.path), "What is 1 plus 2?<|im_end|>\n"
    assert written.encode(text) == source.encode(text)
    assert written.chat_template == source.chat_template
    question = ("--once", "What is 1 plus 2?", *GREEDY)
    answer = done(abi_train, "chat", "out.gguf", *question)
    assert answer == done(abi_train, "chat", "r", *question)  # F32, so it is the very same model
    assert answer != done(abi_train, "chat", made / base, *question)
    assert abi_train("resume", "r", "--epochs", "2", "--schedule", "restart")[0] == 0  # which writes the file anew
    assert done(abi_train, "chat", "out.gguf", *question) == done(abi_train, "chat", "r", *question)


def test_a_place_where_no_file_can_be_made_is_told_before_training_and_after(abi_train, made, tmp_path, monkeypatch):
    (tmp_path / "shut").mkdir()
    access, words = os.access, ["llm", made / "half.gguf", "--data", made / "talks.jsonl", *RUN, "--max-steps", "1"]
    with monkeypatch.context() as patch:  # as for a user other than root
        patch.setattr(os, "access", lambda path, mode: str(path).find("shut") < 0 and access(path, mode))
        code, out, err = abi_train(*words, "--export-gguf", "shut/new/x.gguf", "--out", "a")
        assert code == 2
        assert "export_gguf_path (" in err
        assert "shut none can; give another path, or change the permissions" in err
        assert "step" not in out
    real = writing.atomic_files

    def refused(last):
        if str(last).endswith("x.gguf"):
            raise PermissionError(errno.EACCES, "Permission denied", str(last))
        return real(last)

    monkeypatch.setattr(writing, "atomic_files", refused)
    code, _, err = abi_train(*words, "--export-gguf", "x.gguf", "--out", "b")
    assert code == 1
    assert "x.gguf was not written: " in err
    assert "Permission denied; give another path, or change the permissions; the run is whole" in err
    assert "None" not in err
    assert "Errno" not in err


def test_adapters_on_quantised_weights_as_they_are(abi_train, made, tmp_path):
    words = ["--data", made / "talks.jsonl", *RUN, "--lora", "--out", "r"]
    done(abi_train, "run", "--base", made / "small.gguf", *words)
    question = ("--once", "What is 1 plus 2?", *GREEDY)
    exact = "--no-integer-products"
    on_blocks = done(abi_train, "chat", "r/adapter", *question, exact)  # the run's weights, over the file's blocks
    assert on_blocks == done(abi_train, "chat", "r/model", *question)  # and merged, float32
    more = ["--export-gguf", "out.gguf", "--quantize", "Q8_0", "--export-name", "mine"]
    done(abi_train, "llm", made / "small.gguf", *words[:-1], "r2", *more)
    file = open_gguf(tmp_path / "out.gguf")
    assert file.metadata["general.name"] == "mine"
    assert str(file.tensors["blk.0.attn_q.weight"].kind) == "Q8_0"


def test_verbs_that_take_a_folder_take_a_file(abi_train, made, tmp_path):
    path = made / "small.gguf"
    texts = [done(abi_train, "generate", path, "--prompt", "What is", *GREEDY, *more)
             for more in ([], ["--no-integer-products"])]  # fmt: skip
    assert all(texts)
    figures = json.loads(done(abi_train, "eval", path, made / "talks.jsonl", "--json"))
    assert figures["loss"] > 0
    assert "What is" in done(abi_train, "preview", made / "talks.jsonl", "--tokenizer", path, "-n", 1)
    for place, name in ((path, "a.bin"), (made / "folder", "b.bin")):
        done(abi_train, "tokenize", made / "talks.jsonl", "--tokenizer", place, "-o", name)
    assert (tmp_path / "a.bin").read_bytes() == (tmp_path / "b.bin").read_bytes()
    seen = json.loads(done(abi_train, "inspect", path, "--json"))
    assert (seen["type"], seen["metadata"]["general.name"], seen["family"]) == ("Q4_K_M", "a small one", "qwen2")
    assert seen["tokenizer"]["ids"] == Tokenizer.load(path).vocab_size
    assert set(seen["tensors"]["dtypes"]) == {"F32", "Q4_K", "Q6_K"}
    assert "general.name: a small one" in done(abi_train, "inspect", path)
    assert "compiled" not in done(abi_train, "run", "--base", path, "--data", made / "talks.jsonl", "--dry-run")


def _file(path, **metadata):
    write_gguf(path, {"general.architecture": "llama", **metadata}, [])
    return path


def test_files_that_are_no_model_say_what_they_are(abi_train, made, tmp_path, uncompiled):
    whole = (made / "small.gguf").read_bytes()
    (tmp_path / "cut.gguf").write_bytes(whole[:5000])
    (tmp_path / "short.gguf").write_bytes(whole[:-999])
    (tmp_path / "noise.gguf").write_bytes(b"nothing of the kind")
    _file(tmp_path / "lora.gguf", **{"general.type": "adapter"})
    _file(tmp_path / "odd.gguf", **{"general.architecture": "mamba"})
    shape = {"block_count": 1, "context_length": 64, "embedding_length": 32, "feed_forward_length": 32}
    heads = {"llama.attention.head_count": U32(2), "llama.vocab_size": U32(300)}
    numbers = {f"llama.{name}": U32(value) for name, value in shape.items()} | heads
    _file(tmp_path / "words.gguf", **numbers, **{"llama.attention.layer_norm_rms_epsilon": F32(1e-5)})
    said = {
        "cut.gguf": "damaged or cut short",
        "short.gguf": "short.gguf: ",
        "noise.gguf": "noise.gguf is no GGUF file",
        "lora.gguf": "holds adapters",
        "odd.gguf": "general.architecture is 'mamba'; this version reads llama",
        "words.gguf": "it holds a vocabulary and no weights",
    }
    for name, text in said.items():
        for words in (["generate", name, "--prompt", "x"], ["llm", name, "--data", made / "talks.jsonl"]):
            code, _, err = abi_train(*words)
            assert code in (1, 2)
            assert text in err, (words, err)
            assert err.count("\n") == 1
        assert abi_train("inspect", name)[0] == 1
    model = TrainableModel.from_pretrained(make_folder(tmp_path / "mute", tokenizer=False))
    model.export_to_gguf(tmp_path / "mute.gguf")
    code, _, err = abi_train("generate", "mute.gguf", "--prompt", "x")
    assert code == 2
    assert "has no tokenizer, so its ids have no text; give --tokenizer, or --ids instead of text" in err
    code, _, err = abi_train("llm", "mute.gguf", "--data", made / "talks.jsonl")
    assert code != 0
    assert "tokenizer" in err
    code, _, err = abi_train("generate", tmp_path, "--prompt", "x")
    assert "is a directory of GGUF files; give one of them" in err
    code, _, err = abi_train("generate", made / "half.gguf", "--prompt", "x", "--no-integer-products")
    assert code == 2
    assert "integer_products (false) has no effect" in err


def test_flags_of_the_original_are_taken_or_refused_with_a_reason(abi_train, made, tmp_path):
    """Those that mean something here, in its spelling; every other one has an answer of its own."""
    path, talks = made / "small.gguf", made / "talks.jsonl"
    words = f"--dataset-path {talks} --dataset-format jsonl --gradient-accumulation 1 --gradient-clip 1 --dry-run"
    done(abi_train, "llm", path, *words.split())
    for table, more in ((REFUSED, ["1"]), (REFUSED_SWITCHES, [])):
        for flag, reason in table.items():
            code, _, err = abi_train("llm", path, "--data", talks, flag, *more)
            assert (code, err) == (2, f"error: {flag} is not taken: {reason}\n")
            assert flag not in CliRunner().invoke(cli, ["llm", "--help-all"]).output
    (tmp_path / "there.gguf").write_bytes(b"")
    for words, said in (
        ("--dataset-format text", "dataset_format (text) is not that of"),
        ("--use-gpu", "use_gpu (True) must be false"),
        ("--export-gguf there.gguf", "export_gguf_path (there.gguf) is there already"),
        ("--export-gguf there.gguf/x.gguf", "must be in a directory, and there.gguf is a file; give another path"),
        ("--quantize Q8_0", "export_quantize (Q8_0) acts only with export_gguf_path"),
        ("--export-gguf new.gguf --quantize Q9", "quantize ('Q9') must be F32, F16"),
        ("--hidden-dim 8", "hidden_dim (8) of the model contradicts base"),
        ("--base x", "unknown flag --base"),
    ):
        code, _, err = abi_train("llm", path, "--data", talks, *words.split())
        assert code == 2
        assert said in err
    assert abi_train("llm", "nothing.gguf", "--data", talks)[0] == 2
    assert "data must be given" in abi_train("llm", path)[2]
