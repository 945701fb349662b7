"""What W&B is told of a run from the command line: its name, all of its settings, its samples, and that it goes on."""

import sys
import types

import pytest


@pytest.fixture
def made(monkeypatch):
    """Put a stand-in in the place of wandb, and return how its runs were begun and what was logged."""
    begun, logged = [], []
    run = types.SimpleNamespace(log=lambda values, step: logged.append(values), finish=lambda: None, summary={})

    def init(**settings):
        begun.append(settings)
        return run

    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=init, Table=lambda columns, data: data))
    return begun, logged


def test_wandb_knows_the_run(abi_train, tiny, tmp_path, made):
    begun, logged = made
    words = "--enable-wandb --log-dir log --eval-interval 10 --sample-prompt The --sample-length 4 --max-steps 10"
    assert abi_train("run", *tiny, "--out", "my-run", *words.split())[0] == 0
    assert abi_train("resume", "my-run", "--max-steps", "15")[0] == 0
    first, second = begun
    assert first["name"] == second["name"] == "my-run"
    assert first["id"] == second["id"]
    assert first["config"]["model"]["hidden_dim"] == 16
    assert first["config"]["data"]["sample_prompts"] == ["The"]
    assert (first["config"]["training"]["max_steps"], second["config"]["training"]["max_steps"]) == (10, 15)
    assert any("samples" in values for values in logged)
    assert (tmp_path / "my-run" / "wandb.json").is_file()
