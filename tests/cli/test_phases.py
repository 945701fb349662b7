"""abi-train phases: the plan of the seed's chain, one phase alone, another directory, and how it is gone on with."""

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from world import make_folder, write_talks

from abi_py.pipelines.chain import Chain

ROOT = Path(__file__).resolve().parents[2]
SEED = ROOT / "examples/csdl/csdl-14b.yaml"
CHAIN = """
common:
  data: {path: [talks.jsonl], valid_fraction: 0.1, sample_tokens: 0}
  training: {max_seq_len: 64, batch_size: 4, grad_accum_steps: 1, epochs: 1, learning_rate: 0.01, num_threads: 1}
phases:
  first: {leaves_model: model, base: {path: base}}
  two: {after: first, leaves_adapter: adapter, lora: {rank: 2, base_storage: nf4}}
"""


def test_a_plan_needs_neither_weights_nor_rows(abi_train, tmp_path):
    """The seed's chain, of which nothing is on this machine: its numbers are those of the model's shape."""
    code, out, err = abi_train("phases", str(SEED), "--dry-run")
    assert (code, err) == (0, "")
    assert "68,812,800 weights trained" in out
    assert "137,625,600 weights trained" in out
    rows = {"phase1_base_csdl": 32000, "phase2_reasoning_atlas": 6599, "phase3_content_marketing": 6464}
    for name, count in {**rows, "phase4_coder_nexus": 19507}.items():
        after = out[out.index(f"{name}: from") :].splitlines()[1]
        kept = -(-count // 20)
        assert f"{count - kept:,} rows and {kept:,} for validation, as the recipe says" in after
    assert list(tmp_path.iterdir()) == []
    code, _, err = abi_train("phases", str(SEED))
    assert code == 2
    assert "does not exist" in err or "are free there" in err


def test_the_tiny_chain_is_planned_without_words(abi_train, tmp_path):
    code, out, _ = abi_train("phases", "--dry-run")
    assert code == 0
    assert "phase1_base_csdl: from phase0_base to final_merged" in out
    assert "Rows of phase2_reasoning_atlas" in out
    assert "12.5%" in out
    assert "100.0%" in out
    assert list(tmp_path.iterdir()) == []


def test_one_phase_after_the_other(abi_train, tmp_path):
    make_folder(tmp_path / "base")
    write_talks(tmp_path / "talks.jsonl")
    (tmp_path / "r.yaml").write_text(CHAIN)
    code, _, err = abi_train("phases", "r.yaml", "--out", "o", "--only", "two")
    assert code == 2
    assert "phase two starts from what first leaves, and that is not done; first: --only first" in err
    code, out, err = abi_train("phases", "r.yaml", "-o", "o", "--only", "first")
    assert code == 0, err
    assert "it is in o/first" in out
    assert (tmp_path / "o/first/model/model.safetensors").is_file()
    code, out, err = abi_train("phases", "r.yaml", "-o", "o")
    assert code == 0, err
    assert "first: from its base to model; it is done" in out
    assert (tmp_path / "o/two/adapter/adapter_model.safetensors").is_file()
    assert "adapter  o/two/adapter: step " in out
    assert "merged into the weights" not in out  # only an adapter is left
    assert "go on with: abi-train resume" not in out


def test_the_scripts_of_the_seed_take_the_words_of_the_verb(tmp_path):
    """Each does its phase by `abi-train phases`: a dry run is one, the help is the verb's, an error is one line."""

    def call(*words):
        script = [sys.executable, str(SEED.with_name("train_phase1_base.py")), *words]
        path = {**os.environ, "PYTHONPATH": str(ROOT)}
        found = subprocess.run(script, cwd=tmp_path, capture_output=True, text=True, timeout=120, env=path)
        return found.returncode, found.stdout, found.stderr

    code, out, err = call("tiny", "-o", "o", "--dry-run")
    assert (code, err) == (0, "")
    assert "recipe   tiny: 1 phase in o" in out
    assert "phase1_base_csdl: from phase0_base to final_merged" in out
    code, out, _ = call("--dry-run")
    assert code == 0
    assert "30,400 rows and 1,600 for validation, as the recipe says" in out
    assert "Usage: abi-train phases" in call("--help")[1]
    code, _, err = call("tiny", "-o", "o")
    assert (code, err.count("\n")) == (2, 1)
    assert "first: --only phase0_base" in err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(os.name != "posix", reason="signals")
def test_a_script_that_is_stopped_says_how_to_go_on(tmp_path):
    """A training by a script: Ctrl-C and SIGTERM save, its words go on, and the bytes are those of the verb."""
    make_folder(tmp_path / "base")
    write_talks(tmp_path / "talks.jsonl")
    named = CHAIN.replace("first", "phase1_base_csdl").replace("epochs: 1,", "epochs: 30,")
    (tmp_path / "r.yaml").write_text(named.replace("num_threads: 1", "num_threads: 1, log_interval: 1"))
    path = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}
    script = [sys.executable, str(SEED.with_name("train_phase1_base.py")), "r.yaml"]

    def call(*words, number=None):
        """Return the exit code and the output of a training, which gets a signal when it has done a step."""
        child = subprocess.Popen(words, cwd=tmp_path, stdout=subprocess.PIPE, text=True, env=path)
        lines = []
        for line in child.stdout:
            lines.append(line)
            if number is not None and re.match(r"step [1-9]\d*/", line):
                child.send_signal(number)
                number = None
        child.stdout.close()
        return child.wait(timeout=120), "".join(lines)

    for number, expected in ((signal.SIGINT, 130), (signal.SIGTERM, 143)):
        code, out = call(*script, "-o", "parts", number=number)
        assert code == expected, out
        assert "go on with: abi-train phases r.yaml -o parts --only phase1_base_csdl" in out
    for words in ([*script, "-o", "parts"], [sys.executable, "-m", "abi_py", "phases", "r.yaml", "-o", "whole"]):
        code, out = call(*words)
        assert code == 0, out
    one, other = (tmp_path / place / "phase1_base_csdl/model/model.safetensors" for place in ("parts", "whole"))
    assert one.read_bytes() == other.read_bytes()


def test_ctrl_c_beside_training_says_how_to_go_on(abi_train, tmp_path, monkeypatch):
    """As in GGUF files, or between two phases; in training it is told when the step is done."""
    make_folder(tmp_path / "base")
    write_talks(tmp_path / "talks.jsonl")
    (tmp_path / "r.yaml").write_text(CHAIN)

    def stopped(*words):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Chain, "do", stopped)
        code, out, err = abi_train("phases", "r.yaml", "-o", "o")
    assert (code, err) == (130, "")
    assert out.endswith("stopped  go on with: abi-train phases r.yaml -o o\n")


def test_wrong_words(abi_train, tmp_path):
    (tmp_path / "folder").mkdir()
    for given, problem in (("nope.yaml", "there is no file of that name"), ("folder", "that is a directory")):
        code, _, err = abi_train("phases", given)
        assert code == 2
        assert f"RECIPE ({given}) must be a YAML file, or tiny, which comes with the package; {problem}" in err
    code, _, err = abi_train("phases", "--only", "phase9")
    assert code == 2
    assert "only (phase9) must be a phase of" in err
