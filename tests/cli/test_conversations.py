"""Conversations on the command line: preview shows what is trained, run trains on it, resume goes on with it."""

import gzip
import json
import re

import numpy as np
import pytest
import yaml

from abi_py.data import TokenizedDataset, Tokenizer
from abi_py.generation import Generator
from abi_py.runs.opening import open_data
from abi_py.runs.settings import ChatConfig, DataConfig

SHAPE = "--hidden-dim 16 --num-layers 1 --num-heads 2 --num-kv-heads 1 --intermediate-dim 16 --sample-tokens 8"
RUN = f"{SHAPE} --max-seq-len 64 --batch-size 4 --epochs 2".split()


@pytest.fixture
def talks(tmp_path, abi_train):
    """Write 40 rows and a tokenizer, and return the flags that name them."""
    colours = ["red", "green", "blue", "gold"]
    rows = [
        {"instruction": f"Say {colour} {i} times", "output": " ".join([colour] * i), "category": f"colour_{colour}"}
        for i in range(1, 11)
        for colour in colours
    ]
    (tmp_path / "talks.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "words.txt").write_text("red green blue gold Say times " * 50)
    code, _, err = abi_train("tokenizer", "train", "words.txt", "-o", "tok", "--vocab-size", "300")
    assert code == 0, err
    return ["talks.jsonl", "--tokenizer", "tok"]


def test_what_is_chosen_is_chosen_of_the_training_data_alone(talks):
    files = DataConfig(path=("talks.jsonl",), valid_path=("talks.jsonl",), tokenizer="tok")
    for settings, rows in (({}, 40), ({"max_samples": 7}, 7), ({"mix": ("talks.jsonl",)}, 80)):
        data = open_data(files, ChatConfig(**settings), None, max_seq_len=64, seed=0)
        train, valid = data.train, data.valid
        assert (len(train), len(valid)) == (rows, 40)


def test_preview(abi_train, talks):
    code, out, err = abi_train("preview", *talks, "-n", "2", "--max-seq-len", "16", "--batch-size", "4")
    assert (code, err) == (0, "")
    assert out.count("\u27e6") == out.count("\u27e7") == 2
    assert "<assistant>\u27e6" in out
    assert "</s>\u27e7" not in out  # both are cut at 16 tokens, and show no end that is not there
    rows = {" ".join(cells[:-1]): cells[-1] for line in out.splitlines() if "\u2502" in line
            for cells in [[cell.strip() for cell in line.strip("\u2502").split("\u2502")]]}  # fmt: skip
    assert rows["read"] == rows["trained on"] == "40"
    assert rows["bad, left out"] == "0"
    assert int(rows["truncated to --max-seq-len"].split()[0]) > 0
    assert rows["colour_red"] == "10 25.0%".replace(" ", "  ")
    assert sum(float(rows[f"colour_{c}"].split()[1][:-1]) for c in ("red", "green", "blue", "gold")) == 100.0
    assert float(rows["packed (--packing)"][:-1]) < float(rows["every row 16 wide"][:-1])
    assert "template deepzig, trained: assistant" in out


def test_preview_of_texts_says_that_run_takes_them_as_they_are(abi_train, talks, tmp_path):
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps({"text": f"red green {i}"}) + "\n" for i in range(9)))
    words = ["preview", "texts.jsonl", *talks[1:], "-n", "0"]
    code, _, err = abi_train(*words)
    assert code == 0
    assert err.startswith("texts.jsonl holds texts: abi-train run trains on them as they are")
    assert abi_train(*words, "--template", "deepzig")[2] == ""
    data = DataConfig(path=("texts.jsonl",), tokenizer="tok")
    train = open_data(data, ChatConfig(), None, max_seq_len=64, seed=0).train
    assert isinstance(train, TokenizedDataset)


def test_preview_of_everything_trained_and_filters(abi_train, talks):
    flags = ["--loss-on", "all", "--category", "*_gold", "--match", "Say gold [12] ", "--template", "alpaca"]
    code, out, _ = abi_train("preview", *talks, "-n", "9", "--max-seq-len", "256", *flags)
    assert code == 0
    assert out.count("<s>\u27e6Below is an instruction") == 2
    assert "left out by --category and --match" in out
    assert "38" in out


def test_run_and_resume(abi_train, talks, tmp_path):
    data = ["--data", *talks, "--packing", "--valid-fraction", "0.1", *RUN]
    code, out, err = abi_train("run", *data, "--out", "whole")
    assert code == 0, err
    assert "36 conversations" in out
    assert "4 more for validation" in out
    assert "asked    <s><user>Say" in out
    config = yaml.safe_load((tmp_path / "whole/config.yaml").read_text())
    assert config["chat"]["packing"] is True
    assert config["model"]["vocab_size"] == 290
    template = json.loads((tmp_path / "whole/tokenizer_config.json").read_text())["chat_template"]
    assert "<assistant>" in template

    code, out, err = abi_train("run", *data, "--out", "part", "--max-steps", "3", "--decay-steps", "18")
    assert code == 0, err
    code, out, err = abi_train("resume", "part", "--max-steps", "0")
    assert code == 0, err
    assert "all 2 epochs are done" in abi_train("resume", "part")[1]
    losses = {}
    for name in ("whole", "part"):
        rows = [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        losses[name] = [row["loss"] for row in rows if row["type"] == "step"]
    assert len(losses["part"]) == len(losses["whole"])
    assert losses["part"][0] == losses["whole"][0]  # the same rows in the same order


def test_padded_run_with_validation_data_and_a_question(abi_train, talks, tmp_path):
    rows = [{"messages": [{"role": "user", "content": "Say red"}, {"role": "assistant", "content": "red"}]}] * 3
    (tmp_path / "valid.json").write_text(json.dumps(rows))
    flags = ["--valid-data", "valid.json", "--prompt", "Say </user> gold", "--mix", "valid.json", *RUN]
    code, out, err = abi_train("run", "--data", *talks, *flags, "--out", "r")
    assert code == 0, err
    assert "43 conversations" in out
    assert "3 more for validation" in out
    assert "asked    <s><user>Say </user> gold</user><assistant>" in out
    code, out, _ = abi_train("run", "--data", *talks, *RUN, "--dry-run")
    assert code == 0
    assert "ms for a micro-batch" in out


def test_the_sample_of_the_end_stops_where_an_answer_does(abi_train, talks, monkeypatch):
    """Also where the row that it asks is cut, and shows no end."""
    asked, original = [], Generator.run
    monkeypatch.setattr(Generator, "run", lambda self, prompts, settings: asked.append(settings) or original(
        self, prompts, settings.replace(max_new_tokens=1)))  # fmt: skip
    code, out, err = abi_train("run", "--data", *talks, *RUN, "--max-seq-len", "16", "--max-steps", "1", "--out", "r")
    assert code == 0, err
    assert "\nanswer   " in out
    tokenizer = Tokenizer.load("r")
    assert {tokenizer.token_of(i) for i in asked[0].stop_ids} >= {"</assistant>", "</s>"}
    assert "1 layer, width" in out


def test_a_directory_of_conversations(abi_train, talks, tmp_path):
    (tmp_path / "many").mkdir()
    for name in ("a.jsonl", "b.jsonl"):
        (tmp_path / "many" / name).write_text((tmp_path / "talks.jsonl").read_text())
    code, out, err = abi_train("preview", "many", "--tokenizer", "tok", "-n", "0", "--max-samples", "10")
    assert code == 0, err
    assert "many/a.jsonl" in out
    assert "50.0%" in out


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ("run --data talks.jsonl", "talks.jsonl); make one with abi-train tokenizer train"),
        ("run --data words.txt --packing", "words.txt) has none; leave it out, or give a .jsonl, .json or"),
        ("run --data empty.jsonl --tokenizer tok --packing", "empty.jsonl: no conversations: there are no rows"),
        ("run --packing", "packing is for conversations, and the standard library has none"),
        ("run --data talks.jsonl --tokenizer tok --template deepzip", "template (deepzip) must be deepzig, chatml"),
        ("run --data talks.jsonl --tokenizer tok --template chatml", "needs the special tokens <|im_start|>"),
        ("run --data talks.jsonl --tokenizer tok --category x", "none of 40 rows fits category 'x'"),
        ("run --data talks.jsonl --tokenizer tok --match (", "must be a regular expression"),
        ("run --data talks.jsonl --tokenizer tok --loss-on user", "loss_on"),
        ("run --data talks.jsonl --tokenizer tok --valid-data words.txt", "must be a file of conversations"),
        ("run --data talks.jsonl --tokenizer tok --max-seq-len 4", "40 whose answers begin after max_seq_len (4)"),
        ("preview words.txt --tokenizer tok", "words.txt:1: not a JSON object"),
        ("preview tok --tokenizer tok", "data (tok) must be a file of conversations"),
        ("run --data typo.jsonl --tokenizer tok", "typo.jsonl:1: found the keys 'instrction', 'output'; expected"),
        ("preview bad.jsonl --tokenizer tok", "bad.jsonl:2: found the keys 'question'; expected"),
        ("preview empty.jsonl --tokenizer tok", "empty.jsonl: no conversations: there are no rows"),
    ],
)
def test_wrong_calls_are_one_helpful_line(abi_train, talks, tmp_path, call, message):
    (tmp_path / "bad.jsonl").write_text('{"prompt": "a", "completion": "b"}\n{"question": "c"}\n')
    (tmp_path / "empty.jsonl").write_text("\n")
    (tmp_path / "typo.jsonl").write_text('{"instrction": "a", "output": "b"}\n')
    code, out, err = abi_train(*call.split())
    assert code in (1, 2)
    assert message in err
    assert err.count("\n") == 1
    assert out == ""
    assert not (tmp_path / "runs").exists()


def test_samples_of_a_chat_run_are_answers_to_questions(abi_train, talks, tmp_path):
    """A prompt is asked through the template, and the answer ends where the template ends one."""
    question = "Say red 3 times"
    asked = ["--sample-prompt", question, "--eval-interval", "100", "--sample-length", "30", "--learning-rate", "0.02"]
    code, _, err = abi_train("run", "--data", *talks, *RUN, "--epochs", "8", *asked, "--out", "r")
    assert code == 0, err
    lines = (tmp_path / "r/metrics.jsonl").read_text(encoding="utf-8").splitlines()
    (sample,) = [record for record in map(json.loads, lines) if record["type"] == "sample"]
    assert sample["prompt"] == question
    code, answer, err = abi_train(
        "chat", "r", "--once", question, "--max-new-tokens", "30", "--temperature", "0.7"
    )
    assert code == 0, err
    assert answer == sample["text"] + "\n"
    assert "</assistant>" not in answer


@pytest.mark.parametrize("name", ["wrapped.json", "lists.json", "lines.jsonl.gz"])
def test_every_verb_reads_every_shape_of_conversations(abi_train, talks, tmp_path, name):
    """A tokenizer learns from what is said, not from the JSON around it, and the rows are those of plain JSON lines."""
    turns = [
        [{"role": "user", "content": row["instruction"]}, {"role": "assistant", "content": row["output"]}]
        for row in map(json.loads, (tmp_path / "talks.jsonl").read_text().splitlines())
    ]
    content = {
        "wrapped.json": json.dumps({"data": [{"conversations": each} for each in turns], "version": 1}, indent=2),
        "lists.json": json.dumps(turns),
        "lines.jsonl.gz": "".join(json.dumps({"prompt": t[:1], "completion": t[1:]}) + "\n" for t in turns),
    }[name].encode()
    (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith(".gz") else content)

    code, out, err = abi_train("tokenizer", "train", name, "-o", "own", "--vocab-size", "400")
    assert code == 0, err
    assert f"next: abi-train run --data {name} --tokenizer own" in out
    vocabulary = json.loads((tmp_path / "own/tokenizer.json").read_text())["model"]["vocab"]
    assert [token for token in vocabulary if len(token) > 1 and set(token) & set('{}[]":')] == []
    code, out, err = abi_train("preview", name, *talks[1:], "-n", "0", "--max-seq-len", "64")
    assert code == 0, err
    lines = abi_train("preview", *talks, "-n", "0", "--max-seq-len", "64")[1]
    assert out.partition("Lengths")[2] == lines.partition("Lengths")[2] != ""
    code, out, err = abi_train("tokenize", name, "-o", "ids.bin")
    assert code == 0, err
    assert "read as plain text, without a template: 40 conversations" in out
    text = bytes(np.fromfile(tmp_path / "ids.bin", "<u4")[:12].astype(np.uint8))
    assert text == b"Say red 1 ti"
    code, out, err = abi_train("run", "--data", name, *talks[1:], *RUN, "--dry-run")
    assert code == 0, err
    assert "38 conversations" in out


def test_every_verb_knows_the_conversations_of_the_package_by_name(abi_train, tmp_path):
    name = "builtin:deepzig"
    code, out, err = abi_train("tokenizer", "train", name, "--vocab-size", 400, "-o", "tok")
    assert code == 0, err
    assert out.splitlines()[-1] == f"next: abi-train run --data {name} --tokenizer tok"
    code, out, err = abi_train("preview", name, "--tokenizer", "tok", "--max-seq-len", 512, "-n", 1)
    assert (code, err) == (0, "")
    assert re.search(r"trained on\W+916\b", out)
    run = ["run", name, "--tokenizer", "tok", "--model-size", "test", "--max-samples", 8, "--max-steps", 1]
    assert abi_train(*run, "--sample-tokens", 0, "--out", "r")[0] == 0
    code, out, err = abi_train("eval", "r", name, "--json", "--max-seq-len", 64)
    assert code == 0, err
    assert json.loads(out)["data"] == name
    assert abi_train("tokenize", name, "--tokenizer", "tok", "-o", "ids.bin")[0] == 0
    for words in (["preview", "--tokenizer", "tok"], ["tokenize", "-o", "b.bin"], ["eval", "r"], ["run"]):
        code, out, err = abi_train(*words, "builtin:other")
        assert (code, out) == (2, "")
        assert err == (
            "error: data (builtin:other) must be builtin:deepzig or builtin:csdl; or write ./builtin:other for a "
            "file of that name\n"
        )
