"""`abi-train deepzig` as a user calls it: it trains, `chat` talks with what came of it, and mistakes are told."""

import json
import os
import re
import runpy
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from waiting import PATIENCE, until
from world import make_folder, write_talks

from abi_py.config import load_yaml
from abi_py.data import Tokenizer
from abi_py.runs.settings import RUN_SECTIONS
from abi_py.training.loading import load_model

TINY = "--max-samples 16 --epochs 1 --batch-size 4 --num-threads 1".split()  # noqa: SIM905


@pytest.fixture
def rows(tmp_path):
    """Return the path of ten conversations."""
    path = tmp_path / "rows.jsonl"
    lines = [json.dumps({"instruction": f"Say {i}", "response": f"Number {i}, of course"}) for i in range(10)]
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


def test_train_and_chat(abi_train, tmp_path):
    code, out, err = abi_train("deepzig", *TINY)
    assert (code, err) == (0, "")
    assert "data     builtin:deepzig: 14 conversations" in out
    assert "1 epoch, 4 steps of at most 2,048 tokens" in out
    assert out.count("asked    ") == 3
    assert "asked    <s><user>What is Zig?</user><assistant>" in out
    assert "answers never told" in out
    for place in ("deepzig-test-model", "deepzig-test-model/model"):
        code, out, err = abi_train("chat", place, "--once", "What is Zig?", "--max-new-tokens", 5)
        assert code == 0, err
        assert out.endswith("\n")
        assert "</assistant>" not in out
    assert (tmp_path / "deepzig-test-model" / "report.json").is_file()
    shutil.rmtree(tmp_path / "deepzig-test-model/model")  # as an interrupted run leaves it
    code, out, err = abi_train("chat", "deepzig-test-model", "--once", "What is Zig?", "--max-new-tokens", 5)
    assert code == 0, err


def test_the_words_of_the_original_are_those_of_run(abi_train, tmp_path, rows):
    """The seven options of the seed, and the same run by the words of `run`, from its file, and without the preset."""
    seven = "--max-samples 8 --eval-split 0.25 --epochs 1 --batch-size 4 --output-dir a".split()  # noqa: SIM905
    assert abi_train("deepzig", "--data", rows, *seven, "--num-threads", 1)[0] == 0
    own = "--max-samples 8 --valid-fraction 0.25 -e 1 -b 4 --out b".split()  # noqa: SIM905
    assert abi_train("deepzig", rows, *own, "--num-threads", 1)[0] == 0
    assert abi_train("deepzig", "--config", "a/config.yaml", "--out", "c")[0] == 0
    assert abi_train("run", "--config", "a/config.yaml", "--out", "d")[0] == 0
    weights = {(tmp_path / name / "model/model.safetensors").read_bytes() for name in "abcd"}
    assert len(weights) == 1
    settings = [(tmp_path / name / "config.yaml").read_text() for name in "abcd"]
    assert settings[0] == settings[1] == settings[2] == settings[3]


def test_the_plan_writes_nothing(abi_train, tmp_path, rows):
    before = sorted(tmp_path.rglob("*"))
    code, out, err = abi_train("deepzig", rows, *TINY, "--model-size", "test", "--dry-run")
    assert code == 0, err
    assert "nothing was written" in out
    assert sorted(tmp_path.rglob("*")) == before


def test_run_has_what_deepzig_is_made_of(abi_train, tmp_path, rows):
    """A tokenizer trained on the data, a size, a warm-up as a share; refused beside what says the same."""
    words = ["--train-tokenizer", 300, "--model-size", "test", "--epochs", 1, "--num-threads", 1]
    code, out, err = abi_train("run", rows, *words, "--warmup-ratio", 0.5, "--valid-fraction", 0.2, "--out", "r")
    assert code == 0, err
    size = Tokenizer.load(tmp_path / "r").vocab_size
    assert 268 < size <= 300  # bytes and special tokens, and pairs of these rows
    assert f"a tokenizer of {size} tokens, trained on the data" in out
    settings = load_yaml(tmp_path / "r/config.yaml", RUN_SECTIONS)
    assert (settings["model"]["hidden_dim"], settings["model"]["vocab_size"]) == (128, size)
    assert (settings["training"]["decay_steps"], settings["training"]["warmup_steps"]) == (1, 1)
    (tmp_path / "text.txt").write_text("A fox, and a fox again.\n" * 400)
    code, out, err = abi_train("run", "text.txt", *words, "--max-seq-len", 16, "--sample-tokens", 5, "--out", "t")
    assert code == 0, err
    assert Tokenizer.load(tmp_path / "t").vocab_size <= 300
    assert abi_train("resume", "t", "--epochs", 2)[0] == 0
    assert abi_train("tokenize", "text.txt", "--tokenizer", "t", "-o", "ids.bin")[0] == 0
    for more, said in {
        ("text.txt", "--train-tokenizer", 300, "--tokenizer", "t"): "train_tokenizer (300) acts only with path",
        ("ids.bin", "--train-tokenizer", 300): "ids.bin, which holds the ids of another tokenizer",
        ("--train-tokenizer", 300): "train_tokenizer (300) acts only with path",
        ("--warmup-ratio", 0.1, "--warmup-steps", 3): "warmup_steps (3) acts only without warmup_ratio",
        ("--model-size", "test", "--base", "t"): "model_size (test) must be left out with base",
        ("text.txt", "--train-tokenizer", 300, "--vocab-size", 269): "ids, and vocab_size (269) of the model must be",
        ("text.txt", "--tokenizer", "t", "--vocab-size", 257): "and vocab_size (257) of the model must be",
        ("text.txt", "--train-tokenizer", 20): "vocab_size (20) must be at least",
    }.items():
        code, _, err = abi_train("run", *more)
        assert code in (1, 2)
        assert said in err.replace("--train-tokenizer (", "train_tokenizer (").replace("--warmup-", "warmup_"), err
        assert err.count("\n") == 1


def test_a_base_is_a_run_a_checkpoint_or_a_folder(abi_train, rows):
    assert abi_train("deepzig", *TINY, "--output-dir", "first")[0] == 0
    for place, out in (("first", "a"), ("first/checkpoints", "b"), ("first/model", "c")):
        code, _, err = abi_train("deepzig", rows, *TINY, "--base", place, "--out", out)
        assert code == 0, err
        code, _, err = abi_train("chat", out, "--once", "Say 3", "--max-new-tokens", 3)
        assert code == 0, err


def test_ctrl_c_and_resume(process, tmp_path):
    child = process("deepzig", "--epochs", 200, "--num-threads", 1)
    metrics = tmp_path / "deepzig-test-model" / "metrics.jsonl"
    assert until(lambda: metrics.is_file() and '"step"' in metrics.read_text())
    child.send_signal(signal.SIGINT)
    out, err = child.communicate(timeout=PATIENCE)
    assert child.returncode == 130, err
    assert "abi-train resume deepzig-test-model" in out
    assert not (tmp_path / "deepzig-test-model" / "model").exists()
    steps = int(re.search(r"stopped +([\d,]+) step", out)[1].replace(",", ""))
    child = process("resume", "deepzig-test-model", "--max-steps", steps + 1)
    out, err = child.communicate(timeout=PATIENCE)
    assert child.returncode == 0, err
    assert (tmp_path / "deepzig-test-model" / "model" / "model.safetensors").is_file()


def test_the_example_runs(tmp_path):
    root = Path(__file__).resolve().parents[2]
    words = ["--model-size", "test", "--max-samples", "16", "--epochs", "1", "--batch-size", "4"]
    words += ["--output-dir", "made", "--eval-split", "0.25"]
    done = subprocess.run(
        [sys.executable, root / "examples/train_medium.py", *words],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(root)},
    )
    assert done.returncode == 0, done.stderr
    assert "3 steps, training loss" in done.stdout  # 12 conversations in batches of 4
    assert "model.safetensors" in done.stdout


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--data", "nowhere.jsonl"], "nowhere.jsonl"),
        (["--model-size", "huge"], "'huge' is not one of"),
        (["--eval-split", "1"], "(1.0) must be at least 0 and below 1"),
        (["--epochs", "0"], "(0) must be at least 1"),
        (["--base", "."], "holds no model"),
        (["--resume"], "unknown flag --resume"),
        (["--mixed-precision", "fp8"], "must be one of fp32, bf16, fp16"),
        (["--lora-rank", "-1"], "(-1) must be at least 1"),
        (["builtin:other"], "must be builtin:deepzig"),
    ],
)
def test_mistakes_are_one_line(abi_train, words, message, tmp_path):
    code, _, err = abi_train("deepzig", *words)
    assert code in (1, 2)
    assert message in err
    assert err.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_a_directory_that_is_taken(abi_train, tmp_path):
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "config.json").write_text("{}")
    code, _, err = abi_train("deepzig", "--output-dir", "taken")
    assert code == 2
    assert "out (taken) must not be the folder of a model" in err


def test_a_folder_of_an_earlier_version_is_read_as_a_folder(abi_train, tmp_path, rows):
    """It has config.json at its top, and training_args.json."""
    assert abi_train("deepzig", *TINY, "--out", "new", "--format", "zig")[0] == 0
    shutil.copytree(tmp_path / "new/model", tmp_path / "old")
    (tmp_path / "old/origin.json").unlink()
    for words in (("chat", "old", "--once", "Say 3"), ("generate", "old", "-p", "Say 3")):
        code, _, err = abi_train(*words, "--max-new-tokens", 3)
        assert code == 0, err
    code, _, err = abi_train("deepzig", rows, *TINY, "--base", "old", "--out", "further")
    assert code == 0, err


def test_a_base_of_another_family_stays_of_it(abi_train, tmp_path):
    write_talks(tmp_path / "talks.jsonl")
    make_folder(tmp_path / "base")
    words = ["--data", "talks.jsonl", "--epochs", "1", "--max-seq-len", "96", "--output-dir", "out"]
    code, _, err = abi_train("deepzig", "--base", "base", *words)
    assert (code, err) == (0, ""), err
    config = json.loads((tmp_path / "out/model/config.json").read_text())
    assert (config["model_type"], config["architectures"]) == ("qwen2", ["Qwen2ForCausalLM"])
    assert load_model(tmp_path / "out/model").model.config.family.value == "qwen2"


@pytest.mark.parametrize(
    ("words", "lora"),
    [([], {}), (["--lora-rank", "3"], {"enabled": True, "rank": 3}), (["--use-lora"], {"enabled": True})],
)
def test_a_rank_switches_adapters_on_in_the_example_as_in_the_verb(words, lora, monkeypatch):
    example = runpy.run_path(str(Path(__file__).resolve().parents[2] / "examples/train_medium.py"))
    monkeypatch.setattr(sys, "argv", ["train_medium.py", *words])
    assert example["settings_of"](example["parse"]())["lora"] == lora
