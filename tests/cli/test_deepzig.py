"""`abi-train deepzig` as a user calls it: it trains, `chat` talks with what came of it, and mistakes are told."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from waiting import PATIENCE, until
from world import make_folder, write_talks

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
    assert "deepzig_conversations.jsonl (16): 14 conversations" in out
    assert "1 epoch, 4 steps of 4 conversations" in out
    assert out.count("asked    ") == 3
    assert "asked    What is Zig?" in out
    code, out, err = abi_train("chat", "deepzig-test-model", "--once", "What is Zig?", "--max-new-tokens", 5)
    assert code == 0
    assert out.endswith("\n")
    assert "</assistant>" not in out
    assert (tmp_path / "deepzig-test-model" / "report.json").is_file()
    for name in ("config.json", "model.safetensors"):  # as an interrupted run leaves it
        (tmp_path / "deepzig-test-model" / name).unlink()
    code, out, err = abi_train("chat", "deepzig-test-model", "--once", "What is Zig?", "--max-new-tokens", 5)
    assert code == 0, err


def test_lora_with_own_data_on_an_earlier_model(abi_train, rows):
    assert abi_train("deepzig", *TINY, "--output-dir", "first")[0] == 0
    code, out, _ = abi_train(
        "deepzig", *TINY, "--base", "first", "--data", rows, "--use-lora", "--lora-rank", 2, "--output-dir", "second"
    )
    assert code == 0
    assert "10,240 trained parameters" in out  # 2 of each of 7 matrices, in and out, in 2 layers of width 128 and 384
    assert "(rank 2: " in out
    assert "asked    Say" in out
    assert "the frozen weights are random" not in out
    for folder in ("second", "second/checkpoints", "second/adapter"):
        code, out, err = abi_train("chat", folder, "--once", "Say 3", "--max-new-tokens", 3)
        assert code == 0, err
    code, _, err = abi_train("generate", "second/adapter", "-p", "Say 3", "--max-new-tokens", 3)
    assert code == 0, err


def test_lora_on_random_weights_is_remarked(abi_train):
    code, out, _ = abi_train("deepzig", *TINY, "--use-lora")
    assert code == 0
    assert "the frozen weights are random" in out


def test_ctrl_c_and_resume(process, tmp_path):
    child = process("deepzig", "--epochs", 200, "--num-threads", 1)
    metrics = tmp_path / "deepzig-test-model" / "metrics.jsonl"
    assert until(lambda: metrics.is_file() and '"step"' in metrics.read_text())
    child.send_signal(signal.SIGINT)
    out, err = child.communicate(timeout=PATIENCE)
    assert child.returncode == 130, err
    assert "abi-train deepzig --resume --output-dir deepzig-test-model" in out
    assert not (tmp_path / "deepzig-test-model" / "model.safetensors").exists()
    arguments = tmp_path / "deepzig-test-model" / "training_args.json"
    stored = json.loads(arguments.read_text())
    stored["abi_py"]["epochs"] = 1  # what is done is enough, so that the test is short
    arguments.write_text(json.dumps(stored))
    child = process("deepzig", "--resume", "--output-dir", "deepzig-test-model")
    out, err = child.communicate(timeout=PATIENCE)
    assert child.returncode == 0, err
    assert (tmp_path / "deepzig-test-model" / "model.safetensors").is_file()


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
        (["--model-size", "huge"], "must be one of test, small, medium, large, seed"),
        (["--eval-split", "1"], "eval_split (1.0) must be at least 0 and below 1"),
        (["--epochs", "0"], "epochs (0) must be at least 1"),
        (["--base", "."], "there is no config.json in it"),
        (["--base", ".", "--model-size", "test"], "must be left out with --base"),
        (["--resume"], "resume takes --output-dir and nothing else"),
        (["--resume", "--output-dir", "nowhere"], "no run to go on with"),
        (["--precision", "fp8"], "must be one of fp32, bf16, fp16"),
        (["--lora-rank", "-1"], "lora_rank (-1) must be at least 1"),
    ],
)
def test_mistakes_are_one_line(abi_train, words, message, tmp_path):
    code, _, err = abi_train("deepzig", *words)
    assert code in (1, 2)
    assert message in err
    assert err.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_a_folder_that_is_taken(abi_train, tmp_path):
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "config.json").write_text("{}")
    code, _, err = abi_train("deepzig", "--output-dir", "taken")
    assert code == 2
    assert "must not hold config.json yet" in err
    (tmp_path / "taken" / "model.safetensors").touch()
    (tmp_path / "taken" / "training_args.json").write_text('{"abi_py": {}}')
    code, out, err = abi_train("deepzig", "--resume", "--output-dir", "taken")
    assert (code, err, out[:39]) == (0, "", "finished taken holds its model; nothing")
    assert "abi-train deepzig --base taken --output-dir NEW" in out
    code, _, err = abi_train("resume", "taken")
    assert (code, "go on with it by abi-train deepzig --resume --output-dir taken" in err) == (2, True)


def test_a_base_of_another_family_stays_of_it(abi_train, tmp_path):
    write_talks(tmp_path / "talks.jsonl")
    make_folder(tmp_path / "base")
    words = ["--data", "talks.jsonl", "--epochs", "1", "--max-seq-len", "96", "--output-dir", "out"]
    code, _, err = abi_train("deepzig", "--base", "base", *words)
    assert (code, err) == (0, ""), err
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert (config["model_type"], config["architectures"]) == ("qwen2", ["Qwen2ForCausalLM"])
    assert load_model(tmp_path / "out").model.config.family.value == "qwen2"
    assert "LlamaForCausalLM" not in (tmp_path / "out/README.md").read_text()
