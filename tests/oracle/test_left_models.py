"""What a run leaves, RUN/model, opened by transformers: weights, tokenizer, chat template, where a text ends.

Of every way to a run: `abi-train run` on each kind of data, `run --lora` and `deepzig`.
"""

import json

import pytest
from world import TEMPLATE, make_tokenizer, write_talks

SHAPE = "--hidden-dim 32 --num-layers 2 --num-heads 4 --num-kv-heads 2 --intermediate-dim 64".split()  # noqa: SIM905
TRAINING = "--max-seq-len 96 --batch-size 4 --learning-rate 1e-2 --sample-tokens 0".split()  # noqa: SIM905
RUN = ["run", *SHAPE, *TRAINING]
SENTENCE = "the cat sat on the mat, naïve."
ASKED = [{"role": "user", "content": "What is 2 plus 3?"}]


def write_texts(folder):
    """Write a document again and again."""
    rows = "".join(json.dumps({"text": SENTENCE}) + "\n" for _ in range(200))
    (folder / "texts.jsonl").write_text(rows, encoding="utf-8")
    return ["--data", "texts.jsonl", "--epochs", "8"]


def of_bytes(abi_train, folder):
    """A run on text, read as bytes."""
    return [*RUN, *write_texts(folder)]


def of_an_own_tokenizer(abi_train, folder):
    """A run on text, with a tokenizer of these texts."""
    words = write_texts(folder)
    assert abi_train("tokenizer", "train", "texts.jsonl", "--vocab-size", 280, "-o", "tok")[0] == 0
    return [*RUN, *words, "--tokenizer", "tok", "--epochs", "20"]


def of_token_ids(abi_train, folder):
    """A run on a .bin file whose sidecar names the tokenizer."""
    of_an_own_tokenizer(abi_train, folder)
    assert abi_train("tokenize", "texts.jsonl", "--tokenizer", "tok", "-o", "texts.bin")[0] == 0
    return [*RUN, "--data", "texts.bin", "--epochs", "20"]


def of_conversations(abi_train, folder):
    """A run on conversations."""
    tokenizer = make_tokenizer()
    tokenizer.chat_template = TEMPLATE
    tokenizer.save(folder / "tok")
    write_talks(folder / "talks.jsonl")
    return [*RUN, "--data", "talks.jsonl", "--tokenizer", "tok", "--epochs", "8"]


def of_adapters(abi_train, folder):
    """Adapters on what a run on conversations left, which has learned too little to end an answer."""
    code, _, err = abi_train(*of_conversations(abi_train, folder), "--epochs", "1", "--out", "base")
    assert code == 0, err
    assert not written(folder / "base/model", True, pytest.importorskip("transformers"))[1]
    rows = ["--data", "talks.jsonl", "--epochs", "16", "--lora-rank", "16"]
    return ["run", "--base", "base", "--lora", *rows, *TRAINING]


def of_deepzig(abi_train, folder):
    """A DeepZig run: its own tokenizer and template."""
    write_talks(folder / "talks.jsonl")
    return ["deepzig", "talks.jsonl", *SHAPE, *TRAINING, "--train-tokenizer", "300", "--epochs", "8"]


# What makes the words of a run, and whether it talks.  Each opens in transformers as it is left.
RUNS = {
    "bytes": (of_bytes, False),
    "own tokenizer": (of_an_own_tokenizer, False),
    "token ids": (of_token_ids, False),
    "conversations": (of_conversations, True),
    "lora": (of_adapters, True),
    "deepzig": (of_deepzig, True),
}


@pytest.mark.parametrize("kind", RUNS)
def test_transformers_opens_what_a_run_leaves(kind, abi_train, transformers, torch, tmp_path):
    make, talks = RUNS[kind]
    code, out, err = abi_train(*make(abi_train, tmp_path), "--out", "r")
    assert code == 0, err
    assert "model    r/model: step " in out
    folder = tmp_path / "r/model"
    opens(folder, talks, abi_train, transformers, torch)
    stops(folder, talks, transformers)
    if kind == "lora":  # a checkpoint has the adapters alone
        return
    newest = max(folder.parent.glob("checkpoints/llm_step_*"), key=lambda path: path.stat().st_mtime)
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert (folder / name).read_bytes() == (newest / name).read_bytes()
    for place in (folder, newest):
        assert (place / "README.md").read_text(encoding="utf-8").startswith("---\n")


def opens(folder, talks, abi_train, transformers, torch):
    """Nothing is missing, the ids of the ends are one, and the same 64 greedy ids are written."""
    theirs, told = transformers.AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True, dtype="float32")
    assert not any(told.values()), told
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    if talks:
        ids = tokenizer.apply_chat_template(ASKED, add_generation_prompt=True, return_dict=True)["input_ids"]
    else:
        ids = tokenizer("the ")["input_ids"]
        assert tokenizer.decode(tokenizer(SENTENCE)["input_ids"]) == SENTENCE
    ends = theirs.generation_config.eos_token_id
    assert theirs.config.eos_token_id in (ends if isinstance(ends, list) else [ends])
    assert tokenizer.eos_token_id == theirs.config.eos_token_id
    whole = theirs.generate(
        input_ids=torch.tensor([ids]), attention_mask=torch.ones(1, len(ids), dtype=torch.int64),
        do_sample=False, max_new_tokens=64, min_new_tokens=64,
    )  # fmt: skip
    asked = ["--ids", " ".join(map(str, ids)), "--temperature", "0", "--max-new-tokens", 64, "--min-new-tokens", 64]
    code, out, err = abi_train("generate", folder.parent, *asked, "--json")
    assert code == 0, err
    assert json.loads(out)["ids"] == whole[0, len(ids) :].tolist()


def stops(folder, talks, transformers):
    """Of itself, where a text or an answer ends: at an end token that is written, by no limit."""
    text, ended = written(folder, talks, transformers)
    assert ended
    assert text.rstrip().endswith(".") if talks else text.rstrip() == SENTENCE


def written(folder, talks, transformers):
    """Return what the pipeline writes, and whether the last id of that is an end token."""
    pipe = transformers.pipeline("text-generation", model=str(folder))
    asked, settings = ASKED if talks else SENTENCE[:8], {"do_sample": False, "max_new_tokens": 60}
    (made,), (ids,) = pipe(asked, **settings), pipe(asked, **settings, return_tensors=True)
    text, ends = made["generated_text"], pipe.model.generation_config.eos_token_id
    if talks:
        assert text[-1]["role"] == "assistant"
        text = text[-1]["content"]
    return text, ids["generated_token_ids"][-1] in (ends if isinstance(ends, list) else [ends])
