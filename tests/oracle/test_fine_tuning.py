"""A folder that transformers made, with tokenizer and chat template, is trained further by `abi-train run --base`.

The folder that `abi-train export` writes answers in transformers what it answers in `abi-train chat`.
"""

import json
import shutil

import pytest
import tokenizers
from tokenizers import Regex, decoders, normalizers, pre_tokenizers, trainers
from world import SPECIAL, TEMPLATE, questions, write_talks

from abi_py.cli import main

# Of Qwen2's tokenizer: transformers puts its own rules in the place of those of a tokenizer.json beside a Qwen2 model.
WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
ASKED = ("What is 2 plus 3?", "What is 5 plus 1?", "What is 4 plus 4?")


@pytest.fixture
def base(transformers, torch, tmp_path):
    """Write a Qwen2 of random weights with everything that belongs to it, as transformers does; return its folder."""
    codec = tokenizers.Tokenizer(tokenizers.models.BPE())
    codec.normalizer = normalizers.NFC()
    split = pre_tokenizers.Split(Regex(WORDS), "isolated")
    codec.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(False, use_regex=False)])
    codec.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=list(SPECIAL), initial_alphabet=alphabet)
    codec.train_from_iterator((turn["content"] for turns in questions() for turn in turns), trainer)
    settings = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>", "chat_template": TEMPLATE}
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=codec, model_max_length=128, **settings)
    torch.manual_seed(0)
    shape = {"vocab_size": 304, "hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 2}
    shape |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128}
    ids = {"bos_token_id": None, "eos_token_id": 2, "pad_token_id": 0}
    config = transformers.Qwen2Config(**shape, **ids, tie_word_embeddings=True)
    model = transformers.AutoModelForCausalLM.from_config(config)
    model.generation_config.eos_token_id = [2, 0]
    model.save_pretrained(tmp_path / "base")
    fast.save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def call(capsys, *words):
    with pytest.raises(SystemExit) as end:
        main([str(word) for word in words])
    out, err = capsys.readouterr()
    assert end.value.code == 0, err
    return out


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_folder_of_transformers_is_trained_further_and_answers_the_same(
    base, transformers, torch, tmp_path, capsys, dtype
):
    data, run, model = write_talks(tmp_path / "talks.jsonl"), tmp_path / "run", tmp_path / "model"
    settings = ["--epochs", "40", "--learning-rate", "4e-3", "--sample-tokens", "0", "--valid-fraction", "0.15"]
    call(capsys, "run", "--base", base, "--data", data, *settings, "--out", run)
    shutil.rmtree(base)
    report = json.loads((run / "report.json").read_text())
    assert report["best_val_loss"] < report["initial_val_loss"] / 2
    call(capsys, "export", run, "-o", model, "--dtype", dtype)

    theirs, told = transformers.AutoModelForCausalLM.from_pretrained(model, output_loading_info=True, dtype="float32")
    assert not any(told.values()), told
    assert theirs.generation_config.eos_token_id == [2, 0]
    codec = transformers.AutoTokenizer.from_pretrained(model)
    answers = set()
    for question in ASKED:
        turns = [{"role": "user", "content": question}]
        ids = codec.apply_chat_template(turns, add_generation_prompt=True, return_tensors="pt", return_dict=True)
        with torch.no_grad():
            whole = theirs.generate(**ids, do_sample=False, max_new_tokens=24)
        answer = codec.decode(whole[0, ids["input_ids"].shape[1] :], skip_special_tokens=True)
        ours = call(capsys, "chat", model, "--once", question, "--temperature", "0", "--max-new-tokens", "24")
        assert ours.removesuffix("\n") == answer
        answers.add(answer)
    assert len(answers) > 1
    assert any(" plus " in answer for answer in answers)
