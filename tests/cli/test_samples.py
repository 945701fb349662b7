"""Samples while a model is trained: after every evaluation, for every prompt, and without a trace in the training."""

import json

import numpy as np

from abi_py.formats.safetensors import read_safetensors


def records(directory, kind):
    lines = (directory / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [record for record in map(json.loads, lines) if record["type"] == kind]


def weights(directory):
    newest = max((directory / "checkpoints").glob("llm_step_*"), key=lambda path: int(path.name.rpartition("_")[2]))
    return read_safetensors(newest / "model.safetensors")


def test_samples_come_after_evaluations_and_change_nothing(abi_train, tmp_path, tiny):
    flags = ["--eval-interval", "2", "--max-steps", "6"]
    assert abi_train("run", "--out", "a", *tiny, *flags)[0] == 0
    asked = ["--sample-prompt", "The ", "--sample-prompt", "é\x1b", "--sample-length", "5"]
    code, out, _ = abi_train("run", "--out", "b", *tiny, *flags, *asked)
    assert code == 0
    steps = [record["step"] for record in records(tmp_path / "b", "evaluation")]
    samples = records(tmp_path / "b", "sample")
    assert len(steps) >= 3
    expected = [(step, prompt) for step in steps for prompt in ("The ", "é\x1b")]
    assert [(record["step"], record["prompt"]) for record in samples] == expected
    assert "'The ' -> '" in out
    assert "\x1b" not in out
    assert not records(tmp_path / "a", "sample")
    one, two = weights(tmp_path / "a"), weights(tmp_path / "b")
    assert all(np.array_equal(one[name], two[name]) for name in one)


def test_samples_that_could_never_come_are_refused(abi_train, tmp_path, tiny, shape):
    for more in (["--valid-fraction", "0"], ["--eval-interval", "0"]):
        code, _, err = abi_train("run", "--out", "r", *tiny, "--sample-prompt", "x", *more)
        assert code == 2
        assert "sample_prompts" in err
    np.arange(3000, dtype="<u4").__mod__(50).tofile(tmp_path / "t.bin")
    code, _, err = abi_train("run", "--out", "r", *shape, "--data", "t.bin", "--sample-prompt", "x")
    assert code == 2
    assert "--tokenizer" in err
    assert abi_train("run", "--out", "r", *tiny, "--sample-prompt", "")[0] == 2
    assert not (tmp_path / "r").exists()
