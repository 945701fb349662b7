"""The --lora flags of run in llm, deepzig and resume too: each makes the adapters that it says, or refuses."""

import json

import pytest
from world import make_folder, write_talks

QUICK = (
    "--data talks.jsonl --max-seq-len 64 --batch-size 8 --epochs 1 --grad-accum-steps 1 --sample-tokens 0 "
    "--max-samples 16 --lora-rank 3 --lora-alpha 7 --lora-targets q,v"
)


@pytest.mark.parametrize("verb", [["llm", "base"], ["deepzig", "--base", "base"]], ids=["llm", "deepzig"])
def test_adapters_of_that_rank_on_a_base_that_stays_and_resume_keeps_them(abi_train, tmp_path, verb):
    make_folder(tmp_path / "base")
    write_talks(tmp_path / "talks.jsonl")
    before = (tmp_path / "base/model.safetensors").read_bytes()
    code, out, err = abi_train(*verb, *QUICK.split(), "--out", "r")
    assert code == 0, err
    assert (tmp_path / "base/model.safetensors").read_bytes() == before
    written = json.loads((tmp_path / "r/adapter/adapter_config.json").read_text())
    assert (written["r"], written["lora_alpha"]) == (3, 7)
    assert {name.rpartition(".")[2] for name in written["target_modules"]} == {"q_proj", "v_proj"}
    # q has 16 rows, v those of one head for keys: 8; both read 16 numbers
    assert f"{3 * (16 + 16) + 3 * (16 + 8):,} trained parameters" in out

    for words, said in (
        (["--lora-rank", "4"], "rank (4) of lora must stay 3"),
        (["--lora-alpha", "8"], "alpha (8.0) of lora must stay 7"),
        (["--no-lora"], "enabled (false) of lora has no effect: this run trains adapters"),
    ):
        code, _, err = abi_train("resume", "r", "--epochs", "2", *words)
        assert code == 2
        assert said in err
    code, _, err = abi_train("resume", "r", "--epochs", "2", "--lora-rank", "3")
    assert code == 0, err
    again = json.loads((tmp_path / "r/adapter/adapter_config.json").read_text())
    assert again["r"] == 3
