"""Adapters that PEFT itself wrote: read, merged and gone on with; kinds that are not computed here, refused by name."""

import json

import numpy as np
import pytest
from world import make_folder, write_talks

from abi_py.cli import main
from abi_py.training.loading import load_model

IDS = [5, 9, 40, 7, 3, 12]
TARGETS = {"gpt2": ["c_attn", "c_fc", "mlp.c_proj"]}  # GPT-2's are stored (in, out)


def call(capsys, *words, code=0):
    with pytest.raises(SystemExit) as end:
        main([str(word) for word in words])
    out, err = capsys.readouterr()
    assert end.value.code == code, err
    return err if code else out


@pytest.fixture
def write(transformers, peft, torch, tmp_path):
    """Return a function that makes adapters of random values on a random model by PEFT, saves and returns them."""

    def made(kind="LoraConfig", family="llama", **settings):
        base = make_folder(tmp_path / "base", family=family)
        model = transformers.AutoModelForCausalLM.from_pretrained(base)
        torch.manual_seed(3)
        adapted = peft.get_peft_model(model, getattr(peft, kind)(task_type="CAUSAL_LM", **settings))
        for name, values in adapted.named_parameters():
            if "lora_" in name:
                torch.nn.init.normal_(values, 0, 0.2)
        adapted.save_pretrained(tmp_path / "adapter")
        return adapted.eval()

    return made


@pytest.mark.parametrize(
    "settings",
    [
        {"r": 4, "lora_alpha": 12},
        {"r": 4, "lora_alpha": 6, "use_rslora": True},
        {"r": 4, "lora_alpha": 6, "use_dora": True},
    ],
)
@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2"])
def test_they_are_read_merged_and_trained_on(write, torch, tmp_path, capsys, family, settings):
    theirs = write(family=family, target_modules=TARGETS.get(family, ["q_proj", "v_proj", "down_proj"]), **settings)
    adapter, merged, asked = tmp_path / "adapter", tmp_path / "merged", torch.tensor([IDS])
    assert json.loads((adapter / "adapter_config.json").read_text())["fan_in_fan_out"] == (family == "gpt2")
    call(capsys, "merge", adapter, "-o", merged)
    with torch.no_grad():
        wanted = theirs(input_ids=asked).logits[0].numpy()
        plain = theirs.get_base_model()
        with theirs.disable_adapter():
            assert np.abs(plain(input_ids=asked).logits[0].numpy() - wanted).max() > 0.1
        whole = theirs.generate(
            input_ids=asked, attention_mask=torch.ones_like(asked),
            do_sample=False, max_new_tokens=20, min_new_tokens=20,
        )  # fmt: skip
    for place in (adapter, merged):
        assert np.abs(load_model(place).model.forward(np.array([IDS]))[0] - wanted).max() < 2e-4
        drawn = ("--temperature", 0, "--max-new-tokens", 20, "--min-new-tokens", 20, "--json")
        ours = json.loads(call(capsys, "generate", place, "--ids", " ".join(map(str, IDS)), *drawn))["ids"]
        assert ours == whole[0, len(IDS) :].tolist()
    data = write_talks(tmp_path / "talks.jsonl")
    quick = ("--data", data, "--max-seq-len", 64, "--batch-size", 4, "--epochs", 1, "--sample-tokens", 0)
    refused = call(capsys, "run", "--base", adapter, *quick, "--out", tmp_path / "r", code=2)
    assert f"merge them first: abi-train merge {adapter}" in refused
    call(capsys, "run", "--base", merged, "--lora-rank", 2, *quick, "--out", tmp_path / "r")
    named = json.loads((tmp_path / "r/adapter/adapter_config.json").read_text())["base_model_name_or_path"]
    assert named == str(merged)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"use_qalora": True}, "use_qalora is True"),
        ({"kind": "IA3Config"}, "peft_type is 'IA3'"),
    ],
)
def test_other_kinds_are_refused_by_name(write, tmp_path, capsys, settings, said):
    write(**({} if "kind" in settings else {"r": 2, "target_modules": ["q_proj"]}), **settings)
    for verb, *words in (("generate", "--ids", "1"), ("merge", "-o", tmp_path / "m")):
        refused = call(capsys, verb, tmp_path / "adapter", *words, code=1)
        assert said in refused
        assert "merge them in PEFT (merge_and_unload)" in refused
    assert not (tmp_path / "m").exists()
