"""`run` and `resume`: what they leave behind, precedence, the plan, going on, stopping."""

import dataclasses
import errno
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numba
import numpy as np
import pytest
import yaml
from waiting import PATIENCE

from abi_py.cli.describe import note_on_length
from abi_py.config import LlmTrainingConfig, load_yaml
from abi_py.data import TokenizedDataset
from abi_py.formats.safetensors import read_safetensors
from abi_py.locks import DirectoryLock
from abi_py.runs import compiling
from abi_py.runs.defaults import DERIVED
from abi_py.runs.schedule import Reschedule
from abi_py.runs.settings import RUN_SECTIONS
from abi_py.training import saving
from abi_py.training.checkpoint import verify

ROOT = Path(__file__).resolve().parents[2]


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def weights(checkpoint):
    return (checkpoint / "model.safetensors").read_bytes()


def only_checkpoint(run, step):
    return run / "checkpoints" / f"llm_step_{step}"


def test_a_run_leaves_config_metrics_report_and_checkpoints(abi_train, tmp_path, tiny):
    code, out, err = abi_train("run", *tiny)
    assert (code, err) == (0, "")
    (run,) = (tmp_path / "runs").iterdir()
    names = sorted(path.name for path in run.iterdir())
    assert names == ["checkpoints", "config.yaml", "metrics.jsonl", "model", "report.json"]

    report = json.loads((run / "report.json").read_text())
    steps = report["total_steps"]
    assert report["epochs"] == 2
    assert tmp_path / report["checkpoint"] == only_checkpoint(run, steps)
    records = lines(run / "metrics.jsonl")
    logged = [record for record in records if record["type"] == "step"]
    assert logged
    for record in logged:
        assert {"step", "loss", "learning_rate", "grad_norm", "tokens_per_second"} <= set(record)
    assert len([record for record in records if record["type"] == "evaluation"]) == 2  # one an epoch
    tensors = read_safetensors(only_checkpoint(run, steps) / "model.safetensors")
    assert all(np.isfinite(tensor).all() for tensor in tensors.values())

    config = yaml.safe_load((run / "config.yaml").read_text())
    assert set(config) == {"model", "training", "early_stopping", "data", "export"}
    assert config["training"]["decay_steps"] == steps
    assert config["model"]["vocab_size"] == 257
    for text in ("training loss", "bits per byte", "sample", "abi-train resume"):
        assert text in out
    assert "\x1b" not in out  # plain where there is no terminal


def test_each_derived_setting_is_worked_out_once_in_a_run(abi_train, monkeypatch, tmp_path):
    """The whole verb, as a user calls it: none twice, and none that was given."""
    counted, tables = {}, dict(DERIVED)

    def counting(section, each):
        def value(facts):
            counted[section, each.name] = counted.get((section, each.name), 0) + 1
            return each.value(facts)

        return dataclasses.replace(each, value=value)

    for section, table in tables.items():
        monkeypatch.setitem(DERIVED, section, tuple(counting(section, each) for each in table))
    sizes = "--hidden-dim 16 --num-heads 2 --num-kv-heads 1 --num-layers 1 --intermediate-dim 16 --max-steps 1"
    assert abi_train("run", *sizes.split(), "--corpus-bytes", 3000, "--decay-steps", 5, "--sample-tokens", 0)[0] == 0
    everything = {(section, each.name) for section, table in tables.items() for each in table}
    assert counted == dict.fromkeys(everything - {("training", "decay_steps")}, 1)
    (run,) = (tmp_path / "runs").iterdir()
    assert "vocab_size: 257" in (run / "config.yaml").read_text()


def test_flag_beats_file_beats_default(abi_train, tmp_path, tiny):
    (tmp_path / "mine.yaml").write_text("training:\n  epochs: 7\n  beta1: 0.8\nmodel:\n  rope_theta: 500.0\n")
    code, _, err = abi_train("run", *tiny, "--config", "mine.yaml", "--out", "r")
    assert (code, err) == (0, "")
    training = yaml.safe_load((tmp_path / "r/config.yaml").read_text())["training"]
    assert (training["epochs"], training["beta1"], training["beta2"]) == (2, 0.8, 0.999)


def test_the_config_of_a_run_is_a_config_file(abi_train, tmp_path, tiny):
    assert abi_train("run", *tiny, "--out", "a")[0] == 0
    assert str(tmp_path) not in (tmp_path / "a/config.yaml").read_text()  # it must not write into the first run
    assert abi_train("run", "--config", "a/config.yaml", "--out", "b")[0] == 0
    last = (tmp_path / "a/checkpoints/latest").read_text().strip()
    assert weights(tmp_path / "a/checkpoints" / last) == weights(tmp_path / "b/checkpoints" / last)


def test_the_config_of_a_run_whose_schedule_was_begun_anew(abi_train, tmp_path, tiny):
    common = [*tiny, "--corpus-bytes", 250, "--log-interval", 1, "--sample-tokens", 0]
    assert abi_train("run", *common, "--epochs", 1, "--out", "a")[0] == 0
    assert abi_train("resume", "a", "--epochs", 4, "--schedule", "restart")[0] == 0
    assert yaml.safe_load((tmp_path / "a/config.yaml").read_text())["training"]["schedule_start"] == 4
    code, out, _ = abi_train("run", "--config", "a/config.yaml", "--epochs", 1, "--out", "b")
    assert code == 0
    assert "schedule_start (4) of a/config.yaml is left out" in out
    assert "the schedule ends at step 12 (decay_steps), the run at 4: the last rate is" in out
    assert "--decay-steps 4 ends both together" in out
    assert rates(tmp_path / "b")[0] == 0.003
    out = abi_train("run", *common, "--epochs", 1, "--decay-steps", 3, "--out", "c")[1]
    assert "at step 3 (decay_steps), the run at 4: between them the rate is its minimum, 0.0003; --decay-steps 4" in out
    assert "the schedule ends" not in abi_train("run", *common, "--epochs", 1, "--out", "d")[1]


def test_unknown_key_in_a_file_has_a_suggestion(abi_train, tmp_path):
    (tmp_path / "mine.yaml").write_text("training:\n  learning_rat: 1\n")
    code, _, err = abi_train("run", "--config", "mine.yaml")
    assert code == 2
    assert "did you mean learning_rate?" in err


def test_dry_run_writes_nothing(abi_train, tmp_path, tiny):
    code, out, err = abi_train("run", *tiny, "--dry-run")
    assert (code, err) == (0, "")
    assert list(tmp_path.iterdir()) == []
    for text in ("parameters", "saved activations", "moments", "steps", "about", "MB on the disk"):
        assert text in out


@pytest.fixture
def sweep(tiny):
    """Return the flags of a tiny run without those that a range test refuses."""
    pairs = zip(tiny[::2], tiny[1::2], strict=True)
    return [word for pair in pairs if pair[0] not in ("--epochs", "--sample-tokens") for word in pair]


def test_find_lr_suggests_a_rate_and_writes_nothing(abi_train, tmp_path, sweep):
    code, out, err = abi_train("run", *sweep, "--find-lr")
    assert (code, err) == (0, "")
    assert re.search(r"^rate     --lr [\d.e-]+ \(where the loss falls fastest\)", out, re.MULTILINE)
    assert out.count("<- here") == 1
    bars = [line.count("#") for line in out.splitlines() if "#" in line]
    assert (min(bars), max(bars)) == (1, 40)  # from the lowest loss to the highest
    code, out, _ = abi_train("run", *sweep, "--find-lr", "--json")
    found = json.loads(out)
    assert len(found["rates"]) == len(found["losses"])
    assert found["suggestion"] in found["rates"]
    assert list(tmp_path.iterdir()) == []
    assert abi_train("run", *sweep, "--json")[0] == 2
    assert abi_train("run", *sweep, "--find-lr", "--dry-run")[0] == 2


@pytest.mark.parametrize("words", [("--lr", 0.1), ("--lr-schedule", "constant"), ("--log-dir", "x"), ("--epochs", 3)])
def test_find_lr_refuses_what_it_would_ignore(abi_train, sweep, words):
    code, _, err = abi_train("run", *sweep, *words, "--find-lr")
    assert code == 2
    assert "has no effect with --find-lr" in err


def test_max_steps_are_those_of_find_lr(abi_train, sweep):
    code, out, _ = abi_train("run", *sweep, "--find-lr", "--max-steps", 24, "--json")
    assert code == 0
    assert 20 <= len(json.loads(out)["rates"]) <= 24


def test_dry_run_says_where_a_cooldown_begins(abi_train, tiny):
    words = ["--lr-schedule", "wsd", "--warmup-steps", 1, "--cooldown-steps", 3, "--max-steps", 9, "--dry-run"]
    code, out, err = abi_train("run", *tiny, *words)
    assert (code, err) == (0, "")
    assert "wsd: 0.003, warm-up 1, cooldown from 6, end 9" in out


def test_dry_run_says_what_muon_costs(abi_train, tiny):
    """One moment for its matrices, so less memory; its products are counted."""
    moments = []
    for optimizer in ("adamw", "muon"):
        code, out, err = abi_train("run", *tiny, "--optimizer", optimizer, "--dry-run")
        assert (code, err) == (0, "")
        moments.append(float(re.search(r"moments[ │|]+([\d.]+) MB", out)[1]))
        words = " ".join(re.sub("[│|]", " ", out).split())
        found = re.search(r"optimizer muon for \d+ matrices, \d+% of the parameters, .* [\d.]+% of a step's", words)
        assert (found is not None) is (optimizer == "muon")
    assert moments[1] <= moments[0]


def test_dry_run_says_what_is_kept_in_8_bits(abi_train, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("Some text that is long enough to train on. " * 40)
    sizes = ["--hidden-dim", 64, "--num-layers", 2, "--max-seq-len", 32, "--batch-size", 2, "--vocab-size", 257]
    moments = []
    for optimizer in ("adamw", "adamw_8bit"):
        code, out, err = abi_train("run", text, *sizes, "--optimizer", optimizer, "--dry-run")
        assert (code, err) == (0, "")
        moments.append(float(re.search(r"moments[ │|]+([\d.]+) MB", out)[1]))
        words = " ".join(re.sub("[│|]", " ", out).split())
        found = re.search(r"optimizer adamw_8bit: moments in 8 bits of \d+ tensors, \d+% of the parameters", words)
        assert (found is not None) is (optimizer == "adamw_8bit")
    assert moments[1] < 0.6 * moments[0]


def test_dry_run_of_a_model_that_does_not_fit(abi_train, monkeypatch):
    monkeypatch.setattr("abi_py.cli.plan.available_memory", lambda: 1000)
    code, out, _ = abi_train("run", "--hidden-dim", 16384, "--num-heads", 128, "--num-layers", 80, "--dry-run")
    assert code == 0
    assert "does not fit" in out
    assert "--checkpointing full" in out


def test_text_directory_tokens_and_their_vocabulary(abi_train, tmp_path, shape):
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts/a.txt").write_text("some words to learn, and some to check\n" * 40)
    (tmp_path / "texts/b.png").write_bytes(b"\0\1")
    code, out, _ = abi_train("run", *shape, "--data", "texts", "--out", "from_text")
    assert code == 0
    assert "left out: 1 file, the first: " in out
    code, out, _ = abi_train("tokenize", "texts", "-o", "train.bin")
    assert code == 0
    command = out.splitlines()[-1].removeprefix("next: abi-train ").split()
    assert abi_train(*command, *shape, "--out", "from_tokens")[0] == 0
    (tmp_path / "ids.bin").write_bytes((np.arange(600) % 11).astype("<u4").tobytes())
    code, out, _ = abi_train("run", *shape, "--data", "ids.bin", "--out", "from_ids")
    assert code == 0
    assert load_yaml(tmp_path / "from_ids/checkpoints/llm_step_18/config.yaml")["model"]["vocab_size"] == 11
    assert "vocabulary 11" in out
    assert "sample   none" in out


def test_several_data_are_all_used_one_after_the_other(abi_train, tmp_path, shape):
    (tmp_path / "a.txt").write_text("one text " * 100)
    (tmp_path / "b.txt").write_text("and another text " * 50)
    both = ["--data", "a.txt", "--data", "b.txt"]
    code, out, _ = abi_train("run", *shape, *both, "--valid-fraction", 0, "--out", "both")
    assert code == 0
    assert f"{9 * 100 + 1 + 17 * 50 + 1:,} tokens" in out  # an end after each document
    assert abi_train("tokenize", "a.txt", "b.txt", "-o", "one.bin")[0] == 0
    assert abi_train("run", *shape, "--data", "one.bin", "--valid-fraction", 0, "--out", "one")[0] == 0
    last = (tmp_path / "one/checkpoints/latest").read_text().strip()
    assert weights(tmp_path / "both/checkpoints" / last) == weights(tmp_path / "one/checkpoints" / last)
    code, _, err = abi_train("run", *shape, *both, "--loss-on", "assistant")
    assert (code, "loss_on is for conversations" in err) == (2, True)
    (tmp_path / "talk.jsonl").write_text('{"prompt": "hello", "completion": "you"}\n')
    code, _, err = abi_train("run", *shape, *both, "--data", "talk.jsonl")
    assert code == 2
    assert "a.txt) must hold conversations as talk.jsonl does" in err.replace(f"{tmp_path}/", "")


def test_a_directory_with_a_run_is_not_overwritten(abi_train, tiny):
    assert abi_train("run", *tiny, "--out", "r", "--max-steps", 2)[0] == 0
    code, _, err = abi_train("run", *tiny, "--out", "r")
    assert code == 2
    assert "abi-train resume r" in err


def test_a_patience_is_used_though_the_file_has_early_stopping_off(abi_train, tmp_path, tiny):
    flags = ("--patience", 1, "--min-delta", 100, "--eval-interval", 2)
    assert abi_train("run", *tiny, "--out", "r", "--max-steps", 1)[0] == 0
    off = "r/config.yaml"
    code, out, _ = abi_train("run", "--config", off, "--max-steps", 0, "--decay-steps", 50, "--out", "s", *flags)
    assert code == 0
    assert "stopped early" in out
    code, _, err = abi_train("run", "--config", off, "--out", "t", "--no-early-stopping", *flags)
    assert code == 2
    assert "patience (1) acts only with enabled true (--early-stopping)" in err
    assert "stopped early" not in abi_train("run", "--config", "s/config.yaml", "--out", "t", "--no-early-stopping")[1]
    code, out, _ = abi_train("resume", "r", "--max-steps", 0, *flags)
    assert code == 0
    assert "stopped early" in out
    before = (tmp_path / "t/config.yaml").read_text()
    code, _, err = abi_train("resume", "t", "--max-steps", 0, "--patience", 1, "--eval-interval", 0)
    assert code == 2
    assert "eval_interval (0) must be above 0" in err
    assert (tmp_path / "t/config.yaml").read_text() == before


def test_what_it_says_at_the_end_is_how_to_go_on(abi_train, tiny):
    _, out, _ = abi_train("run", *tiny, "--out", "r", "--max-steps", 2)
    assert "go on    to the end of its 2 epochs: abi-train resume r --max-steps 0" in out
    _, out, _ = abi_train("resume", "r", "--max-steps", 0)
    assert "epoch 2:" in out
    assert "go on    for 2 epochs more: abi-train resume r --epochs 4" in out
    _, out, _ = abi_train("resume", "r", "--epochs", 4)
    assert "epoch 4:" in out


def test_a_run_that_ended_before_its_first_checkpoint(abi_train, tmp_path, tiny, shape, monkeypatch):
    (tmp_path / "ids.bin").write_bytes(b"\7\0\0\0" * 400)

    def fail(*words, **more):
        raise OSError(errno.ENOSPC, "the disk is full")

    with monkeypatch.context() as patched:
        patched.setattr(compiling, "compile_missing", fail)
        assert abi_train("run", *shape, "--data", "ids.bin", "--vocab-size", 8, "--out", "r")[0] == 1
        code, _, err = abi_train("run", *tiny, "--out", "r")
        assert code == 2
        assert "go on with it by abi-train resume r" in err
        code, out, err = abi_train("resume", "r")
        assert code == 1
        assert "ended before its first checkpoint; it begins again" in out
        assert "the disk is full" in err
    assert abi_train("run", "--config", "r/config.yaml", "--out", "s")[0] == 0
    assert abi_train("resume", "r")[0] == 0
    ends = [tmp_path / out / "checkpoints" for out in "rs"]
    final = (ends[0] / "latest").read_text().strip()
    assert len({(end / final / "model.safetensors").read_bytes() for end in ends}) == 1
    assert not list(tmp_path.rglob(".abi*"))


@pytest.mark.parametrize("verb", ["run", "resume", "deepzig"])
def test_a_directory_has_one_writer_and_any_number_of_readers(abi_train, tmp_path, tiny, verb):
    """The holder is named by process and host, before anything is done; its directory can be read meanwhile."""
    assert abi_train("run", *tiny, "--out", "r", "--max-steps", 1)[0] == 0
    words = {"run": ("run", *tiny, "--out", "r"), "resume": ("resume", "r", "--max-steps", 2)}
    words["deepzig"] = ("deepzig", "--output-dir", "r", "--max-samples", 8, "--epochs", 1)
    before = sorted(tmp_path.rglob("*"))
    with DirectoryLock(tmp_path / "r", "out"):
        code, _, err = abi_train(*words[verb])
        assert code == 2
        assert f"must have one writer at a time, and process {os.getpid()} on {os.uname().nodename} is writing" in err
        assert abi_train("generate", "r", "--prompt", "a", "--max-new-tokens", 2)[0] == 0
    assert sorted(tmp_path.rglob("*")) == before


def test_two_runs_begun_at_once_in_one_directory(process, tmp_path, tiny):
    """One trains to its end, the other refuses, and the result is that of the one."""
    started = [process("run", *tiny, "--seed", seed, "--out", "r", "--num-threads", 1) for seed in (1, 2)]
    codes = [child.communicate(timeout=PATIENCE) and child.returncode for child in started]
    assert sorted(codes) == [0, 2]
    winner = 1 + codes.index(0)
    assert load_yaml(tmp_path / "r/config.yaml", RUN_SECTIONS)["training"]["seed"] == winner
    assert not list(tmp_path.rglob(".abi*"))


def test_a_last_save_that_failed_is_tried_again(abi_train, tmp_path, tiny, monkeypatch):
    """A full disk at the very end: after the last steps were saved, the last evaluation could not be."""
    assert abi_train("run", *tiny, "--out", "whole")[0] == 0
    final = (tmp_path / "whole/checkpoints/latest").read_text().strip()
    last, original, saved = int(final.removeprefix("llm_step_")), saving.save_checkpoint, []

    def full(root, *, state, **settings):
        if state.global_step == last and saved:
            raise OSError(errno.ENOSPC, "No space left on device")
        saved.extend([last] if state.global_step == last else [])
        return original(root, state=state, **settings)

    with monkeypatch.context() as patch:
        patch.setattr(saving, "save_checkpoint", full)
        code, _, err = abi_train("run", *tiny, "--eval-interval", 10**6, "--out", "r")
    assert (code, "No space left on device" in err) == (1, True)
    assert not (tmp_path / "r/report.json").exists()
    assert abi_train("resume", "r")[0] == 0
    report = json.loads((tmp_path / "r/report.json").read_text())
    assert report["best_checkpoint"] == str(Path("r/checkpoints") / final)
    assert verify(tmp_path / "r/checkpoints" / final)["state"]["best_step"] == last
    assert "nothing is left to do" in abi_train("resume", "r")[1]


def test_a_run_killed_before_its_report_is_ended_by_resume(abi_train, tmp_path, tiny):
    assert abi_train("run", *tiny, "--out", "r")[0] == 0
    whole = comparable(tmp_path / "r/metrics.jsonl")
    lines = (tmp_path / "r/metrics.jsonl").read_text().splitlines(keepends=True)
    last = max(number for number, line in enumerate(lines) if '"checkpoint"' in line[:22])
    for kept in (lines[: last + 1], [*lines[:last], lines[last][:7]]):  # killed after the save, and amid its record
        (tmp_path / "r/report.json").unlink()
        (tmp_path / "r/metrics.jsonl").write_text("".join(kept))
        code, out, _ = abi_train("resume", "r")
        assert (code, "nothing is left to do" in out) == (0, False)
        assert comparable(tmp_path / "r/metrics.jsonl") == whole
        assert json.loads((tmp_path / "r/report.json").read_text())["total_steps"] == whole[-1]["total_steps"]


# What depends on the clock and the machine, and nothing else in a run's records does.
TIMES = {"time", "tokens_per_second", "gflops", "memory", "size", "total_time_ns", "avg_throughput"}


def comparable(metrics):
    records = [json.loads(line) for line in metrics.read_text().splitlines()]
    return [{key: value for key, value in record.items() if key not in TIMES} for record in records]


def test_resume_warns_before_it_prunes_a_directory_elsewhere(abi_train, tmp_path, tiny):
    words = ("--max-checkpoints", 0, "--checkpoint-interval", 1, "--out", "r", "--checkpoint-path", "far")
    assert abi_train("run", *tiny, *words, "--max-steps", 4)[0] == 0
    code, out, _ = abi_train("resume", "r", "--max-steps", 5, "--max-checkpoints", 2)
    assert code == 0
    warning = next(line for line in out.splitlines() if line.startswith("warning"))
    assert f"saved in {tmp_path / 'far'}, outside of r, and only the 2 newest and the best stay there" in warning
    assert "removes up to 3 of them" in warning
    assert "outside of" not in abi_train("resume", "r", "--max-steps", 6, "--max-checkpoints", 0)[1]


def test_a_refused_resume_leaves_the_run_as_it_was(abi_train, tmp_path, tiny):
    assert abi_train("run", *tiny, "--out", "r", "--max-steps", 3)[0] == 0
    before = (tmp_path / "r/config.yaml").read_text()
    for change in (("--batch-size", 2), ("--corpus-bytes", 2000), ("--optimizer", "sgd")):
        assert abi_train("resume", "r", "--max-steps", 4, *change)[0] != 0
        assert (tmp_path / "r/config.yaml").read_text() == before
    assert abi_train("resume", "r", "--max-steps", 4)[0] == 0


def test_a_run_whose_checkpoints_are_elsewhere(abi_train, tmp_path, tiny, monkeypatch):
    assert abi_train("run", *tiny, "--out", "r", "--checkpoint-path", "far", "--max-steps", 3)[0] == 0
    code, _, err = abi_train("run", *tiny, "--out", "r")
    assert code == 2
    assert "abi-train resume r" in err
    assert abi_train("resume", "r", "--max-steps", 4)[0] == 0
    assert json.loads((tmp_path / "r/report.json").read_text())["total_steps"] == 4
    assert (tmp_path / "far/llm_step_4").is_dir()
    (tmp_path / "r/checkpoints/llm_step_1").mkdir(parents=True)  # where they are is what config.yaml says
    monkeypatch.chdir(tmp_path / "r")
    code, out, err = abi_train("generate", "../r", "-p", "The ", "--max-new-tokens", 3)
    assert (code, bool(out)) == (0, True), err
    shutil.rmtree(tmp_path / "r/checkpoints")
    (tmp_path / "far").rename(tmp_path / "lost")
    for words in (("resume", "../r", "--max-steps", 6), ("generate", "../r", "-p", "The ", "--last")):
        code, _, err = abi_train(*words)
        assert (code, str(tmp_path / "far") in err) == (1, True), err
    assert abi_train("generate", "../r", "-p", "The ", "--max-new-tokens", 3)[0] == 0  # its model/ is there
    (tmp_path / "lost").rename(tmp_path / "r/checkpoints")
    assert abi_train("resume", "../r", "--max-steps", 5)[0] == 0


def test_a_run_whose_config_is_missing(abi_train, tmp_path, tiny):
    assert abi_train("run", *tiny, "--out", "r", "--max-steps", 2)[0] == 0
    (tmp_path / "r/config.yaml").unlink()
    code, _, err = abi_train("resume", "r", "--max-steps", 3)
    assert (code, "r/config.yaml is missing, which names the data; give --data" in err) == (1, True), err
    assert "or put it back" in err


def test_checkpoints_of_another_run_are_not_replaced(abi_train, tmp_path, tiny, uncompiled):
    (tmp_path / "far/llm_step_2").mkdir(parents=True)
    code, _, err = abi_train("run", *tiny, "--out", "r", "--checkpoint-path", "far")
    assert (code, "checkpoint_path (far) must not hold checkpoints of another run" in err) == (2, True), err
    assert not (tmp_path / "r").exists()


def test_the_header_tells_the_number_of_threads(abi_train, tiny):
    before = numba.get_num_threads()
    try:
        assert ", 1 thread," in abi_train("run", *tiny, "--out", "r", "--max-steps", 1, "--num-threads", 1)[1]
        numba.set_num_threads(before)
        assert ", 1 thread," in abi_train("resume", "r", "--max-steps", 2)[1]
    finally:
        numba.set_num_threads(before)


def test_resume_equals_never_stopped(abi_train, tmp_path, tiny):
    same = [*tiny, "--decay-steps", "60", "--warmup-steps", "4", "--grad-accum-steps", "3"]
    assert abi_train("run", *same, "--out", "whole")[0] == 0
    last = (tmp_path / "whole/checkpoints/latest").read_text().strip()
    assert abi_train("run", *same, "--out", "cut", "--max-steps", 5)[0] == 0
    code, out, _ = abi_train("resume", "cut", "--max-steps", 0)
    assert code == 0
    assert "resumed from" in out
    assert weights(tmp_path / "whole/checkpoints" / last) == weights(tmp_path / "cut/checkpoints" / last)
    steps = [record["step"] for record in lines(tmp_path / "cut/metrics.jsonl") if record["type"] == "step"]
    assert steps == sorted(set(steps))


def test_resume_takes_a_run_its_checkpoints_or_one_of_them(abi_train, tmp_path, tiny):
    assert abi_train("run", *tiny, "--out", "r")[0] == 0
    last = (tmp_path / "r/checkpoints/latest").read_text().strip()
    for where in ("r", "r/checkpoints", f"r/checkpoints/{last}"):
        code, out, _ = abi_train("resume", where)
        assert code == 0
        assert "all 2 epochs are done" in out
    (tmp_path / "r").rename(tmp_path / "moved")
    code, out, _ = abi_train("resume", "moved", "--epochs", 3)
    assert code == 0
    assert "epoch 3:" in out
    assert "(decay_steps)" in out
    assert re.search(r"the rate is its minimum, 0.0003; for more: --schedule stretch \(.*\) or restart \(0.003", out)
    assert yaml.safe_load((tmp_path / "moved/config.yaml").read_text())["training"]["epochs"] == 3


def rates(run):
    return [record["learning_rate"] for record in lines(run / "metrics.jsonl") if record["type"] == "step"]


@pytest.mark.parametrize(
    ("choice", "wanted"),
    [
        # `run` made 4 steps: a linear fall from 0.003 to 0.0003 at step 4. Then 4 more.
        ("continue", [0.0003] * 4),
        ("stretch", [0.003 - 0.0027 * step / 8 for step in (4, 5, 6, 7)]),
        ("restart", [0.003 - 0.0027 * step / 4 for step in (0, 1, 2, 3)]),
    ],
)
def test_the_schedule_of_a_run_that_is_made_longer(abi_train, tmp_path, tiny, choice, wanted):
    common = [*tiny, "--corpus-bytes", 250, "--lr-schedule", "linear", "--log-interval", 1, "--sample-tokens", 0]
    assert abi_train("run", *common, "--epochs", 1, "--out", "r")[0] == 0
    assert rates(tmp_path / "r") == pytest.approx([0.003 - 0.0027 * step / 4 for step in range(4)])
    code, out, err = abi_train("resume", "r", "--epochs", 2, "--schedule", choice)
    assert (code, err) == (0, "")
    assert f"rate     {wanted[0]:.3g} at step 5" in out
    assert "note     the schedule ends" not in out
    assert rates(tmp_path / "r")[4:] == pytest.approx(wanted)
    end = weights(only_checkpoint(tmp_path / "r", 8))
    shutil.rmtree(only_checkpoint(tmp_path / "r", 8))  # as if it had stopped before
    assert abi_train("resume", "r")[0] == 0  # remembers the choice
    assert weights(only_checkpoint(tmp_path / "r", 8)) == end


def test_one_stable_checkpoint_of_wsd_many_decays(abi_train, tmp_path, tiny):
    """A run that was planned longer, resumed before its cooldown with another end, is the run planned to that end."""
    wsd = ["--lr-schedule", "wsd", "--warmup-steps", 1, "--cooldown-share", 0.4, "--min-learning-rate", 0]
    common = [*tiny, "--corpus-bytes", 250, "--log-interval", 1, "--sample-tokens", 0, "--checkpoint-interval", 1]
    common += [*wsd, "--max-checkpoints", 0, "--epochs", 9]  # 4 steps an epoch
    for length in (6, 11, 16):
        assert abi_train("run", *common, "--max-steps", length, "--out", f"planned{length}")[0] == 0
    for length in (6, 16):
        shutil.copytree(tmp_path / "planned11", tmp_path / f"moved{length}")
        checkpoint = f"moved{length}/checkpoints/llm_step_3"
        code, out, err = abi_train("resume", checkpoint, "--max-steps", length)
        assert (code, err) == (0, "")
        assert f"rate     0.003 at step 4, 0.003 at step {length - round(0.4 * (length - 1)) + 1}, " in out
        assert "note     " not in out
        for name in ("planned", "moved"):
            assert rates(tmp_path / f"{name}{length}")[:4] == [0.003] * 4
        assert rates(tmp_path / f"planned{length}") == rates(tmp_path / f"moved{length}")
        ends = [weights(only_checkpoint(tmp_path / f"{name}{length}", length)) for name in ("planned", "moved")]
        assert ends[0] == ends[1]
    shutil.copytree(tmp_path / "planned11", tmp_path / "late")
    out = abi_train("resume", "late/checkpoints/llm_step_7", "--max-steps", 9)[1]
    assert "the cooldown to step 9 begins at step 6, before this checkpoint (step 7): the rate falls at once" in out
    shutil.copytree(tmp_path / "planned11", tmp_path / "kept")
    assert abi_train("resume", "kept/checkpoints/llm_step_3", "--max-steps", 6, "--schedule", "continue")[0] == 0
    assert rates(tmp_path / "kept") == [0.003] * 6


def test_a_period_is_stretched_in_the_ratio_of_the_runs():
    """From 25 steps, one epoch, to 50."""
    data = TokenizedDataset.from_slice(np.zeros(801, np.int64))
    sizes = {"max_seq_len": 8, "batch_size": 2, "grad_accum_steps": 2, "epochs": 1}
    before = LlmTrainingConfig(**sizes, lr_schedule="step", warmup_steps=0, decay_steps=10)
    assert Reschedule("stretch", before, {}).apply(before.replace(epochs=2), 25, data).decay_steps == 20


@pytest.mark.parametrize(("step", "more"), [(40, 5), (35, 2)])
def test_a_note_suggests_only_what_is_possible(step, more):
    """What is left is shorter than the cooldown, so the schedule cannot begin anew; it can still be stretched."""
    data = TokenizedDataset.from_slice(np.zeros(9001, np.int64))
    sizes = {"max_seq_len": 8, "batch_size": 2, "grad_accum_steps": 1}
    before = LlmTrainingConfig(
        **sizes, lr_schedule="wsd", warmup_steps=4, decay_steps=40, cooldown_steps=10, max_steps=40
    )
    after = before.replace(max_steps=40 + more)
    told = dict(Reschedule(None, before, {}).describe(after, step, data))
    assert "--schedule stretch (" in told["note"]
    assert "restart" not in told["note"]


def test_flags_that_would_change_nothing_are_refused_by_resume(abi_train, tmp_path, tiny):
    assert abi_train("run", *tiny, "--out", "r", "--epochs", 1)[0] == 0
    before = (tmp_path / "r/config.yaml").read_text()
    for flags in (["--hidden-dim", 200], ["--schedule", "restart"], ["--epochs", 1], ["--beta1", 0.5]):
        code, _, err = abi_train("resume", "r", *flags)
        name = flags[0].removeprefix("--").replace("-", "_")
        assert (code, f"{name}: without effect, because its one epoch is done" in err) == (2, True), err
    for flags, text in (
        (["--model-seed", 3], "seed (3) of the model has no effect"),
        (["--loss-on", "all"], "loss_on is for conversations"),
        (["--momentum", 0.5], "momentum (0.5) acts only with optimizer sgd"),
        (["--patience", 3, "--no-early-stopping"], "patience (3) acts only with enabled true (--early-stopping)"),
        (["--schedule", "stretch", "--decay-steps", 30], "schedule (stretch) works out decay_steps"),
    ):
        code, _, err = abi_train("resume", "r", "--epochs", 2, *flags)
        assert (code, text in err) == (2, True), err
    assert (tmp_path / "r/config.yaml").read_text() == before


def test_resume_refuses_an_end_that_is_past(abi_train, tmp_path, tiny):
    common = [*tiny, "--corpus-bytes", 250, "--sample-tokens", 0]  # 4 steps an epoch
    assert abi_train("run", *common, "--epochs", 5, "--max-steps", 10, "--out", "r")[0] == 0
    before = (tmp_path / "r/config.yaml").read_text()
    (tmp_path / "r/report.json").unlink()  # as if it had been killed
    for flags, text in (
        (["--epochs", 2, "--max-steps", 0], "epochs (2) must be above 2, the epochs that are done (step 10); give"),
        (["--max-steps", 5], "max_steps (5) must be above 10, the steps done; give --max-steps 11 or more"),
    ):
        code, _, err = abi_train("resume", "r", *flags)
        assert (code, text in err) == (2, True), err
    assert (tmp_path / "r/config.yaml").read_text() == before
    assert abi_train("resume", "r", "--epochs", 3, "--max-steps", 0)[0] == 0


def test_a_restarted_schedule_tells_its_peak(abi_train, tiny):
    common = [*tiny, "--corpus-bytes", 250, "--sample-tokens", 0]  # 4 steps an epoch
    assert abi_train("run", *common, "--epochs", 1, "--out", "r")[0] == 0
    out = abi_train("resume", "r", "--epochs", 3, "--schedule", "restart", "--warmup-steps", 2)[1]
    assert "rate     0.0015 at step 5, 0.003 at step 6, " in out


def test_resume_refuses_what_cannot_go_on(abi_train, tmp_path, tiny):
    assert abi_train("run", *tiny, "--out", "r", "--max-steps", 3)[0] == 0
    code, _, err = abi_train("resume", "r", "--hidden-dim", 32, "--max-steps", 0)
    assert code == 1
    assert "hidden_dim is 16 there and 32 here" in err
    code, _, err = abi_train("resume", "r", "--max-steps", 0, "--corpus-bytes", 2000)
    assert code == 1
    assert "not the data of the checkpoint" in err
    (tmp_path / "r/checkpoints/llm_step_3/model.safetensors").write_bytes(b"x")
    code, _, err = abi_train("resume", "r", "--max-steps", 0)
    assert code == 1
    assert "damaged" in err


def test_a_checkpoint_outside_of_its_run_needs_the_data(abi_train, tmp_path, shape):
    (tmp_path / "words.txt").write_text("words and words and other words, one after the other\n" * 50)
    assert abi_train("run", *shape, "--data", "words.txt", "--out", "r", "--max-steps", 3)[0] == 0
    (tmp_path / "far").mkdir()
    (tmp_path / "r/checkpoints/llm_step_3").rename(tmp_path / "far/llm_step_3")
    code, _, err = abi_train("resume", "far/llm_step_3", "--max-steps", 5)
    assert code == 1
    assert "--data" in err
    code, _, err = abi_train("resume", "far/llm_step_3", "--max-steps", 5, "--data", "words.txt")
    assert (code, err) == (0, "")
    assert abi_train("resume", "far", "--max-steps", 6)[0] == 0  # now it is a run of its own


@pytest.mark.parametrize("magic", [b"ABIC", b"ABLC"])
def test_resume_explains_zig_files(abi_train, tmp_path, magic):
    (tmp_path / "llm_step_1.ckpt").write_bytes(magic + bytes(60))
    code, _, err = abi_train("resume", "llm_step_1.ckpt")
    assert code == 2
    assert f"Zig {magic.decode()} file" in err
    assert "load_checkpoint" in err


def test_early_stopping_flags_switch_it_on(abi_train, tmp_path, tiny):
    code, out, _ = abi_train("run", *tiny, "--out", "r", "--patience", 1, "--min-delta", 100, "--eval-interval", 3)
    assert code == 0
    assert "stopped early" in out
    assert json.loads((tmp_path / "r/report.json").read_text())["early_stopped"] is True
    assert "abi-train resume r --no-early-stopping" in out
    code, out, _ = abi_train("resume", "r")
    assert code == 0
    assert "early stopping ended this run" in out
    assert "abi-train resume r --no-early-stopping" in out
    assert abi_train("resume", "r", "--no-early-stopping")[0] == 0
    report = json.loads((tmp_path / "r/report.json").read_text())
    assert (report["early_stopped"], report["epochs"]) == (False, 2)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_signals_save_everything(process, abi_train, tmp_path, tiny, number, code):
    child = process("run", *tiny, "--epochs", 100000, "--out", "r", "--valid-fraction", 0)
    for line in child.stdout:
        if re.match(r"step (?!1/)\d+/", line):  # the second line of a step
            break
    child.send_signal(number)
    out, err = child.communicate(timeout=PATIENCE)
    assert child.returncode == code, err
    assert "abi-train resume r" in out
    report = json.loads((tmp_path / "r/report.json").read_text())
    assert report["interrupted"] is True
    step = report["total_steps"]
    assert only_checkpoint(tmp_path / "r", step).is_dir()
    code, out, _ = abi_train("resume", "r", "--max-steps", step + 3)
    assert code == 0
    assert f"at step {step}" in out


IN_A_TERMINAL = """
import os, pty, select, sys
process, terminal = pty.fork()
if process == 0:
    os.execv(sys.executable, [sys.executable, "-m", "abi_py", *sys.argv[1:]])
while not os.path.exists("r/metrics.jsonl") or os.path.getsize("r/metrics.jsonl") < 1000:
    if select.select([terminal], [], [], 0.1)[0]:
        os.read(terminal, 10_000)
os.close(terminal)
sys.exit(os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]))
"""


def test_a_closed_terminal_saves_everything(tmp_path, tiny):
    """Its SIGHUP asks to stop; that nothing can be printed any more is no error."""
    words = [sys.executable, "-c", IN_A_TERMINAL, "run", *tiny, "--epochs", "100000", "--out", "r"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    assert subprocess.run(words, cwd=tmp_path, env=environment, timeout=PATIENCE).returncode == 129
    report = json.loads((tmp_path / "r/report.json").read_text())
    assert report["interrupted"] is True
    assert verify(report_path := tmp_path / report["checkpoint"])["state"]["global_step"] == report["total_steps"]
    assert report_path.parent == tmp_path / "r/checkpoints"


def test_a_closed_pipe_stops_the_run_and_saves(process, tmp_path, tiny):
    child = process("run", *tiny, "--epochs", 100000, "--out", "r", "--log-interval", 1)
    for line in child.stdout:
        if re.match(r"step (?!1/)\d+/", line):
            break
    child.stdout.close()
    assert child.wait(timeout=PATIENCE) == 141
    assert "Traceback" not in child.stderr.read()
    assert list((tmp_path / "r/checkpoints").glob("llm_step_*"))
    child.stdout = None  # closed above; the fixture reads what is left of stderr


def test_non_finite_training_stops_with_the_last_good_checkpoint(abi_train, tmp_path, tiny):
    code, _, err = abi_train(
        "run", *tiny, "--out", "r", "--learning-rate", 1e30, "--gradient-clip", 0, "--max-bad-steps", 2
    )
    assert code == 1
    assert "skipped 2 updates in a row" in err
    assert "; no checkpoint was saved; begin again with a lower learning_rate" in err
    assert err.count("\n") == 1


def test_ids_outside_the_vocabulary_are_told_before_compiling(abi_train, shape, tmp_path, uncompiled):
    for name, largest in (("good", 99), ("bad", 300)):
        np.full(200, largest, "<u4").tofile(tmp_path / f"{name}.bin")
    calls = (["--data", "bad.bin", "--vocab-size", "100"], ["--data", "good.bin", "--valid-data", "bad.bin"])
    for words in calls:
        code, out, err = abi_train("run", "--out", "r", *words, *shape)
        assert (code, out, len(err.splitlines())) == (1, "", 1)
        assert "bad.bin: token 0 (byte 0) is id 300, but ids must be below vocab_size (100)" in err
        assert not (tmp_path / "r").exists()


def test_other_data_are_told_before_a_resumed_run_compiles(abi_train, shape, tmp_path, request):
    (tmp_path / "a.txt").write_text("some text " * 50)
    assert abi_train("run", "--out", "r", "--data", "a.txt", *shape)[0] == 0
    (tmp_path / "a.txt").write_text("other text " * 50)
    request.getfixturevalue("uncompiled")
    code, _, err = abi_train("resume", "r", "--epochs", "9")
    assert code == 1
    assert len(err.splitlines()) == 1
    assert "these are not the data of the checkpoint" in err


@pytest.mark.parametrize(("length", "told"), [(39, False), (40, True)])
def test_a_max_seq_len_far_above_the_data_is_told(length, told):
    data = TokenizedDataset.from_slice(np.zeros(20, np.uint32))
    said = note_on_length(data, length)
    assert (said is not None) == told
    if said is not None:
        assert "max_seq_len (40) is far above the data, of which no row is longer than 20 tokens" in said
        assert "--max-seq-len 20 has room for all" in said


@pytest.mark.parametrize("name", ["config.yaml", "metrics.jsonl", "report.json", "tokenizer.json"])
@pytest.mark.parametrize(
    ("call", "setting"),
    [("run --out", "out"), ("deepzig --output-dir", "out"), ("tokenizer train a.txt -o", "out")],
)
def test_no_file_of_a_user_is_overwritten(abi_train, tmp_path, call, setting, name):
    (tmp_path / "a.txt").write_text("text")
    names = {"tokenizer": {name: "tokenizer_config.json"}}
    name = names.get(call.split()[0], {}).get(name, name)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / name).write_text("my own")
    code, _, err = abi_train(*call.split(), "mine")
    assert (code, err.count("\n")) == (2, 1)
    assert err.startswith(f"error: {setting} (mine) must not hold {name} yet, which would be overwritten; choose ")
    assert (tmp_path / "mine" / name).read_text() == "my own"
