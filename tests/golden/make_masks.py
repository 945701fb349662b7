"""Make masks.json: what transformers says the model has to write, by the {% generation %} marks of a template.

    python tests/golden/make_masks.py

The templates are those of tests/data/templates, written for these tests in the style of well-known models.  The
tokenizer has one token for each byte, so that no token lies on the border of an answer.
"""

import json
from pathlib import Path

import tokenizers
import transformers

TEMPLATES = Path(__file__).parents[1] / "data/templates"
SPECIALS = {
    "qwen3": ["<|im_start|>", "<|im_end|>"],
    "deepseek_r1": ["<s>", "<｜User｜>", "<｜Assistant｜>", "<｜end▁of▁sentence｜>"],
    "gpt_oss": ["<|start|>", "<|message|>", "<|channel|>", "<|end|>", "<|return|>"],
    "gemma": ["<bos>", "<start_of_turn>", "<end_of_turn>"],
    "mistral": ["<s>", "</s>", "[INST]", "[/INST]"],
}
ROLES = {
    "qwen3": {"eos_token": "<|im_end|>"},
    "deepseek_r1": {"bos_token": "<s>", "eos_token": "<｜end▁of▁sentence｜>"},
    "gpt_oss": {"eos_token": "<|return|>"},
    "gemma": {"bos_token": "<bos>", "eos_token": "<end_of_turn>"},
    "mistral": {"bos_token": "<s>", "eos_token": "</s>"},
}


def turn(role, content, **more):
    return {"role": role, "content": content, **more}


SYSTEM, HELLO = turn("system", "Be brief."), turn("user", "Hello")
PLAIN = [HELLO, turn("assistant", "Hi!"), turn("user", "2 + 2?"), turn("assistant", "4")]
THOUGHT = [HELLO, turn("assistant", "<think>\nA greeting.\n</think>\n\nHi!"), turn("user", "2 + 2?")]
THOUGHT += [turn("assistant", "<think>\nTwo and two.\n</think>\n\n4")]
FIELDS = [HELLO, turn("assistant", "Hi!", reasoning_content="A greeting.", thinking="A greeting."), PLAIN[2]]
FIELDS += [turn("assistant", "4", reasoning_content="Two and two.", thinking="Two and two.")]
CALLS = [HELLO, turn("assistant", "", tool_calls=[{"function": {"name": "clock", "arguments": {}}}])]
CALLS += [turn("tool", "10:00"), turn("assistant", "Ten.", reasoning_content="It says 10."), *PLAIN[2:]]
SYMBOLS = [HELLO, turn("assistant", "👍"), turn("user", "<b>?</b>"), turn("assistant", "...!")]
CASES = {
    "qwen3": [PLAIN, THOUGHT, FIELDS, CALLS, SYMBOLS, [SYSTEM, *PLAIN], [SYSTEM, *THOUGHT], PLAIN[:2], FIELDS[:2]],
    "deepseek_r1": [PLAIN, THOUGHT, SYMBOLS, [SYSTEM, *PLAIN], PLAIN[:2], THOUGHT[:2]],
    "gpt_oss": [PLAIN, FIELDS, SYMBOLS, [SYSTEM, *PLAIN], PLAIN[:2], FIELDS[:2]],
    "gemma": [PLAIN, SYMBOLS, PLAIN[:2], [turn("user", " a "), turn("assistant", "\n b\n")]],
    "mistral": [PLAIN, SYMBOLS, [SYSTEM, *PLAIN], [SYSTEM, *PLAIN[:2]]],
}


def byte_tokenizer(name):
    """Return transformers' tokenizer with one token for each byte and the special tokens of a style."""
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    backend = tokenizers.Tokenizer(tokenizers.models.BPE({token: i for i, token in enumerate(alphabet)}, []))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    backend.add_special_tokens(SPECIALS[name])
    return transformers.PreTrainedTokenizerFast(tokenizer_object=backend, **ROLES[name])


def stretches(ids, mask, decode):
    """Return the text of each run of learned tokens."""
    runs, before = [], 0
    for token, learned in zip(ids, mask, strict=True):
        if learned:
            if not before:
                runs.append([])
            runs[-1].append(token)
        before = learned
    return [decode(run) for run in runs]


def main():
    rows = []
    for name, conversations in CASES.items():
        tokenizer, source = byte_tokenizer(name), (TEMPLATES / f"{name}.jinja").read_text(encoding="utf-8")
        for messages in conversations:
            made = tokenizer.apply_chat_template(
                messages, chat_template=source, return_dict=True, return_assistant_tokens_mask=True
            )
            learned = stretches(made["input_ids"], made["assistant_masks"], tokenizer.decode)
            rows.append({"template": name, "messages": messages, "text": tokenizer.decode(made["input_ids"])})
            rows[-1]["learned"] = learned
    facts = {"command": "python tests/golden/make_masks.py", "transformers": transformers.__version__}
    facts |= {"specials": SPECIALS, "roles": ROLES, "rows": rows}
    path = Path(__file__).with_name("masks.json")
    path.write_text(json.dumps(facts, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
    print(f"{path}: {len(rows)} conversations")


if __name__ == "__main__":
    main()
