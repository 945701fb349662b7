"""A quantised file is trained further and written again, and llama.cpp answers from it as `chat` does.

Its tokenizer, its chat template and its end tokens are read by llama.cpp from the file; llama-cpp-python renders the
template.
"""

import contextlib
import ctypes
import json

import pytest
from conftest import library

from abi_py.data import Tokenizer
from abi_py.data.chat import template_for

QUESTIONS = ("What is Zig?", "Write the Fibonacci sequence in Python.", "What's the weather like in Tokyo?")
SHAPE = "--hidden-dim 256 --num-layers 2 --num-heads 4 --num-kv-heads 2 --intermediate-dim 512"
CODE = [
    {"instruction": f"Add {a} and {b} in Python.", "response": f"```python\nprint({a} + {b})\n```"}
    for a in range(8)
    for b in range(8)
]
NEW = 60


@pytest.fixture
def llama(monkeypatch):
    """Return a function that opens a file in llama.cpp."""
    llama_cpp = library("llama_cpp")
    low = llama_cpp.llama_cpp
    make = low.llama_model_default_params

    def plain():
        settings = make()
        settings.use_extra_bufts = False  # its AMX kernels take tiles that nobody has asked the system for
        return settings

    monkeypatch.setattr(low, "llama_model_default_params", plain)
    quiet = low.llama_log_callback(lambda level, text, data: None)
    low.llama_log_set(quiet, ctypes.c_void_p(0))
    threads = {"n_threads": 2, "n_threads_batch": 2}
    with contextlib.ExitStack() as stack:  # closed here: what frees a model still calls `quiet`

        def open_file(path):
            made = llama_cpp.Llama(str(path), n_ctx=512, **threads, type_k=0, type_v=0, verbose=False)
            return stack.enter_context(contextlib.closing(made))

        yield open_file
    assert quiet


def answer(model, question):
    """Return the ids of a question as llama.cpp has them, and what it answers, greedily."""
    from llama_cpp import llama_cpp as low
    from llama_cpp.llama_chat_format import Jinja2ChatFormatter

    names = {f"{role}_token": model.detokenize([i], special=True).decode()
             for role, i in (("eos", model.token_eos()), ("bos", model.token_bos()))}  # fmt: skip
    render = Jinja2ChatFormatter(template=model.metadata["tokenizer.chat_template"], **names)
    prompt = render(messages=[{"role": "user", "content": question}]).prompt
    ids, made, vocabulary = model.tokenize(prompt.encode(), add_bos=False, special=True), [], model._model.vocab
    for token in model.generate(ids, temp=0.0, top_k=1):
        if low.llama_vocab_is_eog(vocabulary, token) or len(made) == NEW:
            break
        made.append(token)
    return ids, model.detokenize(made, special=True).decode()


@pytest.mark.parametrize("type", ["F16", "Q4_K_M"])
def test_llama_cpp_answers_from_what_llm_wrote_as_chat_does(abi_train, llama, tmp_path, type):
    (tmp_path / "code.jsonl").write_text("".join(json.dumps(row) + "\n" for row in CODE))
    for words in (
        f"deepzig {SHAPE} --epochs 14 --max-samples 150 --sample-tokens 0 --out small",
        f"export small --format gguf --quantize {type} -o tiny.gguf",
        f"llm tiny.gguf --data code.jsonl --epochs 1 --lr 1e-4 --export-gguf out.gguf --quantize {type}",
    ):
        code, _, err = abi_train(*words.split())
        assert code == 0, err
    codec = Tokenizer.load(tmp_path / "out.gguf")
    encoder, theirs = template_for(codec, None).encoder(codec), llama(tmp_path / "out.gguf")
    answers = set()
    for question in QUESTIONS:
        ids, text = answer(theirs, question)
        assert encoder.encode_prompt([{"role": "user", "content": question}]).tolist() == ids
        words = ["chat", "out.gguf", "--once", question, "--temperature", "0", "--max-new-tokens", NEW]
        code, out, err = abi_train(*words)
        assert (code, out) == (0, f"{text}\n"), err
        answers.add(out)
    assert len(answers) > 1
