"""What was trained here, opened by transformers and peft: the same logits and the same greedy ids."""

import pytest

from abi_py.config import LoraConfig
from abi_py.data.chat import template_for
from abi_py.data.tokenizer import Tokenizer
from abi_py.model import LoraModel
from abi_py.pipelines import train_deepzig
from abi_py.training.checkpoint import find_latest
from abi_py.training.loading import load_model

PROMPTS = ([3, 6, 9, 12], [5, 10, 15], [40, 43, 46, 49, 52])


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(
    ("family", "kind"),
    [("llama", "LlamaForCausalLM"), ("qwen2", "Qwen2ForCausalLM"), ("gpt2", "GPT2LMHeadModel")],
)
def test_a_checkpoint_opens_in_transformers(make_model, train, transformers, agree, tmp_path, tied, family, kind):
    model = make_model(tie_embeddings=tied, family=family)
    losses = train(model, tmp_path, (3, 5))
    assert losses[-1] < 0.5 < losses[0]
    theirs, told = transformers.AutoModelForCausalLM.from_pretrained(
        find_latest(tmp_path).path, output_loading_info=True, dtype="float32"
    )
    assert not any(told.values()), told  # nothing missing, unexpected, or of another shape
    assert type(theirs).__name__ == kind
    agree(model, theirs, PROMPTS)


@pytest.mark.parametrize(
    ("family", "targets"),
    [
        ("llama", ("q_proj", "v_proj", "o_proj", "up_proj", "down_proj")),
        ("gpt2", None),
        ("gpt2", ("c_attn", "mlp.c_proj")),
    ],
)
def test_an_adapter_opens_in_peft(make_model, train, transformers, peft, agree, tmp_path, family, targets):
    """From the folder that `LoraModel.save` writes, and from a checkpoint of the run."""
    base = make_model(family=family)
    train(base, tmp_path / "base", (3,))
    folder = find_latest(tmp_path / "base").path
    lora = LoraModel(base, LoraConfig(rank=4, alpha=6, target_modules=targets, dropout=0.0), str(folder))
    losses = train(lora, tmp_path / "adapter", (5,), rate=3e-2)
    assert losses[-1] < losses[0] / 2
    lora.save(tmp_path / "saved")

    def open_base():
        return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype="float32")

    for place in (tmp_path / "saved", find_latest(tmp_path / "adapter").path):
        agree(lora, peft.PeftModel.from_pretrained(open_base(), place), PROMPTS)
    merged = peft.PeftModel.from_pretrained(open_base(), tmp_path / "saved").merge_and_unload()
    agree(lora.merge(), merged, PROMPTS)


def test_a_deepzig_run_opens_in_transformers(transformers, agree, tmp_path):
    """RUN/model as it is: weights, tokenizer, chat template with tools, and the end of an answer."""
    settings = {"chat": {"max_samples": 12}, "training": {"epochs": 30, "batch_size": 4}}
    train_deepzig(settings, out=tmp_path / "run")
    folder = tmp_path / "run/model"
    theirs, told = transformers.AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True, dtype="float32")
    assert not any(told.values()), told
    tokenizer, ours = transformers.AutoTokenizer.from_pretrained(folder), Tokenizer.load(folder)
    turns = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "What is Zig?\n  Zürich, 你好"}]
    rendered = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    ids = tokenizer(rendered, add_special_tokens=False)["input_ids"]
    assert rendered.endswith("<assistant>")
    assert ours.encode(turns[1]["content"]) == tokenizer(turns[1]["content"], add_special_tokens=False)["input_ids"]
    agree(load_model(folder).model, theirs, [ids, ids[: len(ids) // 2]])
    tool = {"type": "function", "function": {"name": "clock", "description": "the time", "parameters": {}}}
    call = {"function": {"name": "clock", "arguments": {}}}
    talk = [*turns, {"role": "assistant", "content": "", "tool_calls": [call]}]
    talk.append({"role": "tool", "content": "10:00"})
    rendered = tokenizer.apply_chat_template(talk, tools=[tool], tokenize=False, add_generation_prompt=True)
    assert rendered == template_for(ours).render(talk, [tool], True)
    ends = transformers.GenerationConfig.from_pretrained(folder).eos_token_id
    assert ours.id_of("</assistant>") in ends
