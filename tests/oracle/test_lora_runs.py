"""A run of adapters, opened in PEFT and in transformers: the same greedy ids as `abi-train generate`."""

import json

import pytest
from world import make_folder, write_talks

from abi_py.cli import main

PROMPT, COUNT = [5, 9, 40, 7], 64


def call(capsys, *words):
    with pytest.raises(SystemExit) as end:
        main([str(word) for word in words])
    out, err = capsys.readouterr()
    assert end.value.code == 0, err
    return out


@pytest.mark.parametrize("family", ["qwen2", "gpt2", "llama"])
def test_adapter_and_merged_model_write_what_generate_does(transformers, peft, torch, tmp_path, capsys, family):
    base, run = make_folder(tmp_path / "base", family=family), tmp_path / "run"
    data = write_talks(tmp_path / "talks.jsonl")
    settings = ["--lora-rank", "4", "--learning-rate", "0.02", "--epochs", "3", "--sample-tokens", "0"]
    call(capsys, "run", "--base", base, "--data", data, *settings, "--max-seq-len", "64", "--out", run)
    ids = " ".join(map(str, PROMPT))
    words = ("--ids", ids, "--temperature", "0", "--max-new-tokens", COUNT, "--min-new-tokens", COUNT, "--json")
    ours = {name: json.loads(call(capsys, "generate", place, *words))["ids"]
            for name, place in {"run": run, "adapter": run / "adapter"}.items()}  # fmt: skip
    assert ours["run"] == ours["adapter"]
    assert len(ours["run"]) == COUNT

    load = transformers.AutoModelForCausalLM.from_pretrained
    named = json.loads((run / "adapter/adapter_config.json").read_text())["base_model_name_or_path"]
    models = {"merged": load(run / "model"), "adapted": peft.PeftModel.from_pretrained(load(named), run / "adapter")}
    for model in models.values():
        asked = torch.tensor([PROMPT])
        settings = {"do_sample": False, "max_new_tokens": COUNT, "min_new_tokens": COUNT}
        with torch.no_grad():
            whole = model.generate(input_ids=asked, attention_mask=torch.ones_like(asked), **settings)
        assert whole[0, len(PROMPT) :].tolist() == ours["run"]
    codec = transformers.AutoTokenizer.from_pretrained(run / "adapter")
    assert codec.chat_template == transformers.AutoTokenizer.from_pretrained(base).chat_template
