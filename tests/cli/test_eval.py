"""abi-train eval: texts, token files, tokenizers, JSON, and what is said about wrong calls."""

import json

import numpy as np
import pytest
import tokenizers
from test_generate import save_folder
from world import make_folder

from abi_py.data.tokenizer import Tokenizer
from abi_py.errors import ConfigError
from abi_py.generation import Generator
from abi_py.runs import compiling
from abi_py.runs.measuring import text_ids
from abi_py.runs.opening import find_tokenizer, open_data
from abi_py.runs.settings import ChatConfig, DataConfig
from abi_py.training.perplexity import evaluate_tokens

TEXT = "It is a truth universally acknowledged, that a model must be in want of a text. " * 4


@pytest.fixture
def model(tmp_path):
    (tmp_path / "t.txt").write_text(TEXT)
    return save_folder(tmp_path / "m")


def test_a_text(abi_train, model):
    code, out, _ = abi_train("eval", "m", "t.txt", "--json")
    assert code == 0
    found = json.loads(out)
    ids = np.frombuffer(TEXT.encode(), np.uint8)
    expected = evaluate_tokens(model, ids, max_seq_len=64)  # the model's max_seq_len: below 512
    assert (found["context"], found["tokens"]) == (64, expected.tokens)
    assert found["perplexity"] == pytest.approx(expected.perplexity)
    assert found["bits_per_byte"] == pytest.approx(np.log2(expected.perplexity))
    code, out, _ = abi_train("eval", "m", "t.txt", "--max-seq-len", "32", "--stride", "8")
    assert code == 0
    assert f"tokens         {len(TEXT) - 1:,} counted ({len(TEXT) - 1:,} bytes)" in out
    assert "8 apart" in out


def test_a_directory_has_an_end_between_its_documents(abi_train, model, tmp_path):
    (tmp_path / "d").mkdir()
    for name in "ab":
        (tmp_path / "d" / f"{name}.txt").write_text(TEXT)
    found = json.loads(abi_train("eval", "m", "d", "--stride", "32", "--json")[1])
    assert found["tokens"] == 2 * len(TEXT)
    assert found["bytes"] == 2 * len(TEXT)  # the end between them counts as one
    assert found["bits_per_byte"] == pytest.approx(found["loss"] / np.log(2))


def test_a_token_file(abi_train, model, tmp_path):
    for name in ("t.bin", "t.BIN"):  # a name's case says nothing, as in every verb
        np.frombuffer(TEXT.encode(), np.uint8).astype("<u4").tofile(tmp_path / name)
    one, two, three = (json.loads(abi_train("eval", "m", name, "--json")[1]) for name in ("t.txt", "t.bin", "t.BIN"))
    assert {**three, "seconds": 0, "data": ""} == {**two, "seconds": 0, "data": ""}
    for name in ("seconds", "data"):
        del one[name], two[name]
    assert one == two


def test_a_tokenizer_that_adds_bos(abi_train, tmp_path):
    vocabulary = {word: i for i, word in enumerate(["<unk>", "<s>", "a", "b", "cc"])}
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    backend.post_processor = tokenizers.processors.TemplateProcessing("<s> $A", None, [("<s>", 1)])
    backend.add_special_tokens(["<s>"])
    model = save_folder(tmp_path / "w", vocab_size=5)
    (tmp_path / "w.txt").write_text("a b cc a b cc cc")
    code, _, err = abi_train("eval", "w", "w.txt", "--max-seq-len", "4")
    assert code == 2
    assert "--tokenizer" in err
    backend.save(str(tmp_path / "w/tokenizer.json"))
    found = json.loads(abi_train("eval", "w", "w.txt", "--max-seq-len", "4", "--json")[1])
    expected = evaluate_tokens(model, np.array([1, 2, 3, 4, 2, 3, 4, 4]), max_seq_len=4, bos_id=1)
    assert (found["tokens"], found["perplexity"]) == (2, pytest.approx(expected.perplexity))


@pytest.fixture
def with_bos(abi_train, tmp_path):
    """Write a tokenizer whose post-processor adds BOS, two texts, and their token file; return the tokenizer."""
    (tmp_path / "d").mkdir()
    for name in "ab":
        (tmp_path / "d" / f"{name}.txt").write_text(TEXT)
    assert abi_train("tokenizer", "train", "d", "-o", "tok", "--vocab-size", "300")[0] == 0
    backend = tokenizers.Tokenizer.from_file(str(tmp_path / "tok/tokenizer.json"))
    backend.post_processor = tokenizers.processors.TemplateProcessing("<s> $A", None, [("<s>", 1)])
    backend.save(str(tmp_path / "tok/tokenizer.json"))
    assert abi_train("tokenize", "d", "-o", "d.bin", "--tokenizer", "tok")[0] == 0
    return Tokenizer.load(tmp_path / "tok")


def test_texts_token_files_and_prompts_begin_alike(abi_train, with_bos, tmp_path):
    begins = [1, *with_bos.encode(TEXT)]
    written = np.fromfile(tmp_path / "d.bin", "<u4").tolist()
    assert written == [*begins, with_bos.eos_id] * 2
    assert text_ids(tmp_path / "d", with_bos, []).tolist() == written[:-1]
    model = save_folder(tmp_path / "m", vocab_size=300)
    prompt = Generator(model, with_bos).run([TEXT[:20]], max_new_tokens=1)[0].prompt_ids.tolist()
    assert prompt == [1, *with_bos.encode(TEXT[:20])]


def test_a_token_file_of_another_vocabulary_is_told(abi_train, with_bos, tmp_path):
    save_folder(tmp_path / "m", vocab_size=280)
    code, _, err = abi_train("eval", "m", "d.bin")
    assert (code, err.count("\n")) == (1, 1)
    assert "d.bin was made with another tokenizer, of 300 ids, than the model's, of 280; give the texts, or" in err


def test_a_token_file_of_another_convention_is_told(abi_train, with_bos, tmp_path):
    assert abi_train("tokenize", "d", "-o", "new.bin", "--tokenizer", "tok")[0] == 0
    values = json.loads((tmp_path / "d.bin.json").read_text())
    del values["before_document"], values["after_document"]  # as it was written before
    (tmp_path / "d.bin.json").write_text(json.dumps({**values, "format": 1}))
    save_folder(tmp_path / "m", vocab_size=300)
    code, _, err = abi_train("eval", "m", "d.bin", "--tokenizer", "tok", "--stride", "32")
    assert code == 0
    assert "d.bin has ids TEXT 2 around its documents, but generate and eval put 1 TEXT 2" in err
    assert "around its documents" not in abi_train("eval", "m", "new.bin", "--tokenizer", "tok", "--stride", "32")[2]
    for path, told in (("d.bin", True), ("new.bin", False)):
        for data in (DataConfig(path=path), DataConfig(path=path, tokenizer="tok")):
            dataset = open_data(data, ChatConfig(), None, max_seq_len=32, seed=0).train
            tokenizer, problem = find_tokenizer(data, None, dataset)
            assert tokenizer.hash == with_bos.hash
            assert ("around its documents" in problem) == told
    with pytest.raises(ConfigError, match=r"d\.bin\) has ids TEXT 2 around its documents, new\.bin has 1 TEXT 2"):
        open_data(DataConfig(path="new.bin", valid_path="d.bin"), ChatConfig(), None, max_seq_len=32, seed=0)


def test_a_token_file_knows_its_tokenizer(abi_train, tmp_path):
    """Bytes are known from the sidecar's tokenizer; ids of another one are refused."""
    (tmp_path / "t.txt").write_text(TEXT)
    for name, size in (("one", 300), ("two", 301)):
        words = ["--vocab-size", size, "-o", f"{name}"]
        assert abi_train("tokenizer", "train", "t.txt", *words)[0] == 0
    assert abi_train("tokenize", "t.txt", "-o", "t.bin", "--tokenizer", "one")[0] == 0
    save_folder(tmp_path / "m", vocab_size=301)
    code, out, err = abi_train("eval", "m", "t.bin", "--stride", "32", "--json")
    assert code == 0, err
    found = json.loads(out)
    tokenizer = Tokenizer.load(tmp_path / "one")
    first = tokenizer.decode(tokenizer.encode(TEXT)[:1])  # which is predicted from nothing
    assert found["bytes"] == len(TEXT) - len(first)  # nothing for </s>
    assert found["bits_per_byte"] == pytest.approx(found["loss"] * found["tokens"] / np.log(2) / found["bytes"])
    code, _, err = abi_train("eval", "m", "t.bin", "--tokenizer", "two")
    assert code == 1
    assert "hash" in err


@pytest.mark.parametrize(
    ("words", "code", "part"),
    [
        (["m", "nothing.txt"], 2, "nothing.txt"),
        (["m", "t.txt", "--max-seq-len", "65"], 2, "max_seq_len"),
        (["m", "t.txt", "--stride", "64"], 2, "stride"),
        (["m", "empty.txt"], 1, "empty"),
        (["m", "short.txt"], 1, "fewer than one window"),
        (["m", "large.bin"], 1, "300"),
    ],
)
def test_wrong_calls(abi_train, model, uncompiled, tmp_path, words, code, part):
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "short.txt").write_text("short")
    np.full(200, 300, "<u4").tofile(tmp_path / "large.bin")
    found, out, err = abi_train("eval", *words)
    assert (found, out) == (code, "")
    assert part in err
    assert len(err.splitlines()) == 1


@pytest.fixture
def talks(abi_train, tmp_path):
    """Write conversations, a tokenizer, and train a model on them: in r."""
    turns = [("What comes after one?", "Two."), ("After two?", "Three, as all know."), ("And then?", "Four.")]
    rows = [{"prompt": question, "completion": answer} for question, answer in turns * 4]
    (tmp_path / "talks.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "t.txt").write_text(TEXT)
    assert abi_train("tokenizer", "train", "t.txt", "-o", "tok", "--vocab-size", "300")[0] == 0
    shape = "--hidden-dim 16 --num-layers 1 --num-heads 2 --num-kv-heads 1 --intermediate-dim 16 --max-seq-len 64"
    data = "--data talks.jsonl --valid-data talks.jsonl --tokenizer tok --sample-tokens 0 --epochs 1"
    code, _, err = abi_train("run", "--out", "r", *data.split(), *shape.split())
    assert code == 0, err


def test_conversations_give_the_validation_loss_of_training(abi_train, talks, tmp_path):
    lines = (tmp_path / "r/metrics.jsonl").read_text(encoding="utf-8").splitlines()
    last = [record for record in map(json.loads, lines) if record["type"] == "evaluation"][-1]
    code, out, err = abi_train("eval", "r", "talks.jsonl", "--json")
    assert code == 0, err
    found = json.loads(out)
    assert found["loss"] == pytest.approx(last["val_loss"], rel=1e-6)
    assert found["accuracy"] == pytest.approx(last["val_accuracy"])
    assert (found["windows"], found["template"]) == (12, "deepzig")
    assert found["bytes"] == 4 * len("Two.Three, as all know.Four.")
    assert found["bits_per_byte"] == pytest.approx(found["loss"] * found["tokens"] / np.log(2) / found["bytes"])
    assert last["val_bits_per_byte"] == pytest.approx(found["bits_per_byte"], rel=1e-6)
    report = json.loads((tmp_path / "r/report.json").read_text())
    assert report["best_val_bits_per_byte"] == pytest.approx(found["bits_per_byte"], rel=1e-6)
    assert "12 conversations" in err
    out = abi_train("eval", "r", "talks.jsonl")[1]
    assert "rows           12 of at most 64 tokens, the answers count" in out
    assert f"bits per byte  {found['bits_per_byte']:.4f}" in out
    other = json.loads(abi_train("eval", "r", "talks.jsonl", "--template", "llama2", "--json")[1])
    assert other["loss"] != pytest.approx(found["loss"])


def test_wrong_calls_with_conversations(abi_train, talks, model, uncompiled):
    for words, rule in (
        (["r", "talks.jsonl", "--stride", "8"], "stride (8)"),
        (["r", "talks.jsonl", "--max-seq-len", "65"], "max_seq_len (65) must be 2 ... 64"),
        (["r", "t.txt", "--template", "deepzig"], "template is for conversations"),
        (["m", "talks.jsonl"], "m reads text as bytes and has no chat template"),
    ):
        code, out, err = abi_train("eval", *words)
        assert (code, out) == (2, "")
        assert rule in err
        assert err.count("\n") == 1 + err.startswith("model: ")  # which weights of a run are used is told first
    code, _, err = abi_train("eval", "m", "talks.jsonl", "--tokenizer", "tok")
    assert code == 1
    assert "has 300 ids, the model only 257" in err


def test_a_long_text_is_cut_and_its_ids_are_those_of_the_whole(abi_train, talks, tmp_path, monkeypatch):
    longest = 0
    encode = Tokenizer.encode_batch

    def watched(self, texts, **more):
        nonlocal longest
        longest = max(longest, *map(len, texts))
        return encode(self, texts, **more)

    monkeypatch.setattr(Tokenizer, "encode_batch", watched)
    (tmp_path / "long.txt").write_text(TEXT * 300)
    tokenizer = Tokenizer.load("tok")
    ids = text_ids(tmp_path / "long.txt", tokenizer, [])
    assert longest < 20_000 < len(TEXT * 300)
    assert ids.tolist() == tokenizer.encode(TEXT * 300)


def test_a_text_in_another_encoding(abi_train, talks, model, tmp_path):
    """Bytes are measured as they stand; a tokenizer says which byte is wrong."""
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9 " * 40)
    code, out, _ = abi_train("eval", "m", "latin.txt", "--stride", "16", "--json")
    found = json.loads(out)
    assert (code, found["tokens"], found["bytes"]) == (0, 199, 199)
    assert found["bits_per_byte"] == pytest.approx(found["loss"] / np.log(2))
    code, _, err = abi_train("eval", "r", "latin.txt")
    assert code == 1
    assert "latin.txt: byte 3 is not UTF-8" in err


def test_the_loss_is_compiled_before_the_clock_runs(abi_train, tmp_path, monkeypatch):
    make_folder(tmp_path / "model", tokenizer=False, vocab_size=257)
    (tmp_path / "text.txt").write_text("a text of some words, again and again " * 9)
    asked = []
    monkeypatch.setattr(compiling, "compile_missing", lambda names, *others: asked.extend(names))
    assert abi_train("eval", "model", "text.txt", "--max-seq-len", "32")[0] == 0
    assert "cross_entropy" in asked
