"""`run --lora`: adapters on a frozen base, what resumes them, what they leave."""

import numpy as np
import pytest
import yaml

from abi_py.formats.safetensors import read_safetensors

QUICK = ["--max-seq-len", "16", "--corpus-bytes", "3000", "--sample-tokens", "0"]
LORA = ["--lora-rank", "4", "--lora-targets", "q,v_proj", "--lora-dropout", "0.1", "--learning-rate", "0.01"]


@pytest.fixture
def base(abi_train, tiny, tmp_path):
    """Train a small model of bytes; return its run."""
    assert abi_train("run", *tiny, "--out", "base")[0] == 0
    return tmp_path / "base"


def trained(abi_train, *words):
    code, out, err = abi_train(*words)
    assert (code, err) == (0, ""), err
    return out


def weights(run, step):
    return read_safetensors(run / f"checkpoints/llm_step_{step}/adapter_model.safetensors")


def test_adapters_are_trained_and_go_on_to_the_same_bits(abi_train, base, tmp_path):
    run = ("run", "--base", base, *QUICK, *LORA, "--lr-schedule", "constant")
    out = trained(abi_train, *run, "--epochs", "2", "--out", "whole")
    assert "lora     224 trained parameters, 3.93 % of 5,696 (rank 4: q_proj, v_proj)" in out
    assert "its weights stay as they are, learning rate 0.01" in out
    assert "step 0: validation loss" in out
    config = yaml.safe_load((tmp_path / "whole/config.yaml").read_text())
    assert {**config["lora"], "target_modules": ["q_proj", "v_proj"]} == config["lora"]
    assert (config["lora"]["rank"], config["lora"]["enabled"]) == (4, True)
    assert config["training"]["weight_decay"] == 0

    trained(abi_train, *run, "--epochs", "1", "--out", "parts")
    out = trained(abi_train, "resume", "parts", "--epochs", "2")
    assert "lora     224 trained" in out
    one, other = weights(tmp_path / "whole", 46), weights(tmp_path / "parts", 46)
    assert {name: array.shape for name, array in one.items()} == {name: array.shape for name, array in other.items()}
    assert all(np.array_equal(one[name], other[name]) for name in one)
    assert any(array.any() for name, array in one.items() if "lora_B" in name)


def test_what_makes_other_adapters_is_refused_by_name(abi_train, base):
    trained(abi_train, "run", "--base", base, *QUICK, *LORA, "--epochs", "1", "--out", "r")
    for words, said in (
        (("--lora-rank", "8"), "rank (8) of lora must stay 4"),
        (("--lora-alpha", "8"), "alpha (8.0) of lora must stay 16.0"),
        (("--lora-targets", "q"), "target_modules (q_proj) of lora must stay q_proj, v_proj"),
        (("--lora-dropout", "0.2"), "dropout (0.2) of lora must stay 0.1"),
        (("--lora-seed", "1"), "seed (1) of lora must stay 0"),
        (("--no-lora",), "enabled (false) of lora has no effect: this run trains adapters"),
    ):
        code, _, err = abi_train("resume", "r", "--epochs", "2", *words)
        assert (code, said in err) == (2, True), err
    code, _, err = abi_train("resume", base, "--epochs", "3", "--lora")
    assert code == 2
    assert "this run trains all weights; begin another run for that: abi-train run --base RUN --lora" in err
    trained(abi_train, "resume", "r", "--epochs", "2", "--lora", "--lora-targets", "v,q")


def test_adapters_on_random_weights_are_warned_of(abi_train, tiny):
    out = trained(abi_train, "run", *tiny, "--lora", "--out", "r")
    assert "warning  the frozen weights are random, so adapters can do little; --base names a trained model" in out
