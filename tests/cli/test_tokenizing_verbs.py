"""tokenizer, tokenize, and what run makes of their files: as a user calls them."""

import json
import os
import signal
import subprocess

import numpy as np
import pytest
from waiting import PATIENCE, until

from abi_py.data import Tokenizer, read_sidecar
from abi_py.runs.settings import read_run_config

TEXT = "Some words to learn: naïve 世界, and some more of them to check.\n"


@pytest.fixture
def texts(tmp_path, abi_train):
    """Make rows of text and a tokenizer for them."""
    rows = "".join(json.dumps({"text": f"{n}: {TEXT}"}) + "\n" for n in range(200))
    (tmp_path / "rows.jsonl").write_text(rows)
    (tmp_path / "a.txt").write_text(TEXT * 100)
    assert abi_train("tokenizer", "train", "rows.jsonl", "-o", "tok", "--vocab-size", 320)[0] == 0
    return tmp_path


def test_tokenizer_train_and_info(abi_train, texts):
    code, out, _ = abi_train("tokenizer", "info", "tok")
    assert code == 0
    for line in ("eos        2 </s>", "decoded    the same text", "template   none", "11 </tool>"):
        assert line in out
    code, out, _ = abi_train("tokenizer", "info", "tok", "--text", "<s> 世界")
    assert code == 0
    assert "[1, " in out
    assert abi_train("tokenizer", "train", "a.txt", "-o", "tok", "--vocab-size", 300)[0] == 2
    chatml = ["--special", "<|endoftext|>", "--special", "<|im_end|>"]
    code, out, _ = abi_train("tokenizer", "train", "a.txt", "-o", "tok", "--vocab-size", 9000, *chatml, "--force")
    assert code == 0
    assert "fewer than the 9,000 asked for" in out
    assert out.splitlines()[-1] == "next: abi-train tokenize a.txt --tokenizer tok -o train.bin"
    assert Tokenizer.load("tok").id_of("<|im_end|>") == 1
    code, out, _ = abi_train("tokenizer", "train", "a.txt", "-o", "ws", "--style", "deepzig-ws", "--vocab-size", 300)
    assert code == 0
    assert "decoded    another text" in out


def test_a_path_is_printed_as_it_is(abi_train, texts):
    """Brackets in it are no markup, of which rich would print nothing, or fail for an end without a beginning."""
    code, out, _ = abi_train("tokenizer", "train", "a.txt", "-o", "[red]tok[/x]", "--vocab-size", 300)
    assert code == 0
    assert out.splitlines()[0].startswith("[red]tok[/x]: 300 tokens from ")


def test_the_next_command_names_every_file_of_conversations(abi_train, texts):
    talk = json.dumps({"prompt": "How are you?", "completion": TEXT}) + "\n"
    for name in ("one.jsonl", "two.jsonl"):
        (texts / name).write_text(talk * 20)
    code, out, _ = abi_train("tokenizer", "train", "one.jsonl", "two.jsonl", "-o", "talk", "--vocab-size", 300)
    assert code == 0
    assert out.splitlines()[-1] == "next: abi-train run --data one.jsonl --data two.jsonl --tokenizer talk"


@pytest.mark.parametrize(
    ("call", "code", "message"),
    [
        (["tokenizer", "trian"], 2, "did you mean train?"),
        (["tokenizer", "train", "missing.txt", "-o", "x"], 2, "missing.txt"),
        (["tokenizer", "train", "a.txt", "-o", "x", "--vocab-size", "20"], 2, "at least 268"),
        (["tokenizer", "train", "a.txt", "-o", "x", "--style", "gpt2"], 2, "qwen2"),
        (["tokenizer", "train", "bad.txt", "-o", "x"], 1, "bad.txt: byte 3 is not UTF-8"),
        (["tokenizer", "train", "empty.txt", "-o", "x"], 1, "empty.txt is empty"),
        (["tokenizer", "info", "missing"], 1, "missing is not there"),
        (["tokenizer", "info", "a.txt"], 1, "a.txt is not JSON (Expecting value at line 1, column 1)"),
        (["tokenize", "a.txt", "-o", "x.bin", "--tokenizer", "missing"], 1, "missing is not there"),
        (["tokenize", "a.txt", "-o", "x.bin", "--plain"], 2, "plain (True) acts only with tokenizer"),
        (["tokenize", "a.txt", "-o", "x.bin", "--valid-fraction", "2"], 2, "below 1"),
        (["tokenize", "a.txt", "-o", "x.txt"], 2, "out (x.txt) must be named .bin, by which token ids are known"),
        (
            ["tokenize", "a.txt", "--tokenizer", "tok", "--end-of-document", "nope", "-o", "x.bin"],
            2,
            "<unk>, <s>, </s>, <pad>, <user>, </user>, <assistant>, </assistant> and 4 more",
        ),
        (["tokenize", "a.txt", "-o", "x.bin", "--valid-fraction", "0.1"], 1, "1 document leaves none for validation"),
        (["tokenize", "rows.jsonl", "-o", "x.bin", "--field", "body"], 1, "rows.jsonl:1: found the keys 'text'"),
        (["tokenize", "a.txt", "-o", "x.bin", "--data-format", "jsonl"], 1, "a.txt:1: not a JSON object"),
        (["run", "--data", "int64.bin"], 1, "int64.bin is no file of u32 token ids: every second id is 0"),
        (["run", "--data", "text.bin"], 1, "text.bin is no file of u32 token ids"),
        (["run", "--data", "late.bin"], 1, "late.bin: token 90000 (byte 360000) is id 900000, but ids must be below"),
        (["run", "--tokenizer", "tok"], 2, "acts only with path (--data)"),
        (["run", "--valid-data", "a.txt"], 2, "acts only with path (--data)"),
        (["run", "--data", "a.txt", "--valid-data", "missing"], 2, "missing"),
        (["run", "--data", "a.txt", "--valid-data", "a.txt", "--valid-fraction", "0.5"], 2, "without valid_path"),
    ],
)
def test_wrong_calls(abi_train, texts, call, code, message):
    (texts / "bad.txt").write_bytes(b"abc\xff")
    (texts / "empty.txt").write_bytes(b"")
    np.arange(1000, dtype="<i8").tofile(texts / "int64.bin")
    (texts / "text.bin").write_text(TEXT[:40] * 4)
    np.where(np.arange(100_000) == 90_000, 900_000, 7).astype("<u4").tofile(texts / "late.bin")
    before = sorted(os.listdir(texts))
    found, out, err = abi_train(*call)
    assert (found, out) == (code, "")
    assert message in err
    assert len(err.splitlines()) == 1
    assert sorted(os.listdir(texts)) == before


def test_bad_rows_are_counted(abi_train, texts):
    with (texts / "rows.jsonl").open("a") as file:
        file.write('{"text": ""}\n{bad\n{"text": 5}\n')
    assert abi_train("tokenize", "rows.jsonl", "-o", "x.bin")[0] == 1
    code, out, _ = abi_train("tokenize", "rows.jsonl", "-o", "x.bin", "--skip-bad-rows")
    assert code == 0
    assert "left out: 2 bad rows, the first: rows.jsonl:202: " in out
    assert "left out, without text: 1 row" in out
    code, out, _ = abi_train("tokenizer", "train", "rows.jsonl", "-o", "t2", "--vocab-size", "300", "--skip-bad-rows")
    assert code == 0
    assert "left out: 2 bad rows, the first: rows.jsonl:202: " in out


@pytest.mark.parametrize("tokenizer", [[], ["--tokenizer", "tok"]])
def test_a_run_leaves_out_bad_rows_of_texts_and_so_does_its_resume(abi_train, texts, shape, tokenizer):
    with (texts / "rows.jsonl").open("a") as file:
        file.write('{"text": %s}\n' % ("7" * 5000))
    call = ["run", *shape, "--data", "rows.jsonl", *tokenizer, "--max-steps", 1, "--out", "r"]
    code, _, err = abi_train(*call)
    assert code == 1
    assert "rows.jsonl:201: " in err
    code, out, err = abi_train(*call, "--skip-bad-rows")
    assert code == 0, err
    assert "left out: 1 bad row, the first: " in out
    assert "rows.jsonl:201: " in out
    code, _, err = abi_train("resume", "r", "--max-steps", 2)
    assert code == 0, err


def test_run_with_what_tokenize_made(abi_train, texts, shape):
    call = ["tokenize", "rows.jsonl", "--tokenizer", "tok", "-o", "train.bin", "--valid-fraction", "0.1"]
    code, out, _ = abi_train(*call)
    assert code == 0
    assert out.splitlines()[-1] == "next: abi-train run --data train.bin --valid-data valid.bin"
    info = read_sidecar("train.bin")
    assert out.startswith(f"train.bin: {info.tokens:,} tokens from 180 documents")
    assert abi_train(*call)[1].count("there already") == 2
    run = ["run", *shape, "--data", "train.bin", "--valid-data", "valid.bin", "--max-steps", 2]
    run += ["--prompt", "Some words"]
    code, out, _ = abi_train(*run, "--out", "r")
    assert code == 0
    assert f"vocabulary {info.vocab_size}" in out
    assert f"{read_sidecar('valid.bin').tokens:,} more for validation" in out
    assert "    Some words" in out  # the sample, as text
    kept = Tokenizer.load("r")
    assert kept.hash == Tokenizer.load("tok").hash == info.tokenizer.sha256
    data = read_run_config(texts / "r/config.yaml")["data"]
    assert data["valid_path"] == (str(texts / "valid.bin"),)
    code, _, err = abi_train(*run, "--out", "s", "--vocab-size", 100)
    assert code == 2
    assert "vocab_size (100) must be at least" in err
    assert abi_train("resume", "r", "--max-steps", 3)[0] == 0


def test_run_without_the_tokenizer_of_its_data(abi_train, texts, shape):
    abi_train("tokenize", "a.txt", "--tokenizer", "tok", "-o", "train.bin")
    (texts / "tok").rename(texts / "moved")
    run = ["run", *shape, "--data", "train.bin", "--max-steps", 1]
    code, out, _ = abi_train(*run, "--out", "r")
    assert code == 0
    assert "which is not there" in out
    assert "sample   none" in out
    assert abi_train(*run, "--out", "s", "--tokenizer", "moved")[0] == 0
    assert (texts / "s/tokenizer.json").is_file()
    abi_train("tokenizer", "train", "a.txt", "-o", "other", "--vocab-size", 270)
    code, _, err = abi_train(*run, "--out", "t", "--tokenizer", "other")
    assert code == 1
    assert "made with another one" in err


def test_run_on_texts_with_a_tokenizer(abi_train, texts, shape, monkeypatch):
    monkeypatch.setattr("abi_py.runs.opening.own_cache", lambda name: texts / "cache" / name)
    run = ["run", *shape, "--data", "a.txt", "--tokenizer", "tok", "--max-steps", 1]
    code, out, _ = abi_train(*run, "--out", "r")
    assert code == 0
    (made,) = (texts / "cache/tokens").glob("*.bin")
    first = made.stat()
    assert f"vocabulary {Tokenizer.load('tok').vocab_size}" in out
    assert abi_train(*run, "--out", "s")[0] == 0
    assert made.stat() == first
    abi_train("tokenizer", "train", "a.txt", "-o", "tok", "--vocab-size", 290, "--force")
    assert abi_train(*run, "--out", "t")[0] == 0
    assert made.stat() != first


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_stopping_leaves_nothing_behind(process, tmp_path, number, code):
    (tmp_path / "out").mkdir()
    child = process("tokenize", "-", "-o", "out/x.bin", stdin=subprocess.PIPE)
    child.stdin.write("x" * (1 << 21))
    child.stdin.flush()
    assert until(lambda: os.listdir(tmp_path / "out"))
    child.send_signal(number)
    child.communicate(timeout=PATIENCE)
    assert child.returncode == code
    assert os.listdir(tmp_path / "out") == []


def test_a_directory_with_and_without_a_slash_is_the_same_input(abi_train, tmp_path):
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts/a.txt").write_text("some words")
    assert abi_train("tokenize", "texts/", "-o", "t.bin")[0] == 0
    code, out, err = abi_train("tokenize", "texts", "-o", "t.bin")
    assert code == 0, err
    assert "there already" in out
