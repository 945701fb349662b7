"""abi-train chat: one question, a pipe, a terminal; what is remembered, forgotten and refused."""

import contextlib
import io
import json
import os
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tokenizers
from test_generate import save_folder
from waiting import PATIENCE

from abi_py.data.chat import load_template
from abi_py.data.tokenizer import Tokenizer
from abi_py.generation import generate

SPECIALS = "<unk> <s> </s> <pad> <user> </user> <assistant> </assistant> <system> </system> <tool> </tool>"
FLAGS = ["--max-new-tokens", "6", "--temperature", "0"]


@pytest.fixture
def model(tmp_path):
    """Write a model with a byte-level tokenizer and the special tokens of the deepzig template."""
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    vocabulary = {token: i for i, token in enumerate([*SPECIALS.split(), *sorted(alphabet)])}
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, [], unk_token="<unk>"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    backend.add_special_tokens(SPECIALS.split())
    tokenizer = Tokenizer(backend)
    model = save_folder(tmp_path / "m", vocab_size=tokenizer.vocab_size)
    tokenizer.save(tmp_path / "m")

    def answer(*turns, system=None):
        """Return what the model says to a conversation, by way of the library."""
        roles = ["user", "assistant"] * len(turns)
        messages = [{"role": role, "content": text} for role, text in zip(roles, turns)]
        if system:
            messages.insert(0, {"role": "system", "content": system})
        encoder = load_template("deepzig").encoder(tokenizer)
        made = generate(model, encoder.encode_prompt(messages), 6, temperature=0, stop_ids=encoder.stop_ids(messages))
        return tokenizer.decode(made)

    return answer


def pipe(monkeypatch, text):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text.encode())))


def test_one_question(abi_train, model):
    code, out, _ = abi_train("chat", "m", "--once", "hi", "--system", "s", *FLAGS)
    assert (code, out) == (0, model("hi", system="s") + "\n")
    assert out != model("hi") + "\n"


def test_a_conversation_remembers_and_forgets(abi_train, model, monkeypatch):
    pipe(monkeypatch, "hi\n\nyo\n/reset\nyo\n/what\n/exit\nnever\n")
    code, out, err = abi_train("chat", "m", *FLAGS)
    first = model("hi")
    assert code == 0
    assert out == f"{first}\n{model('hi', first, 'yo')}\n{model('yo')}\n"
    assert "begins anew" in err
    assert "/what" in err


def test_the_oldest_turns_go_when_the_context_is_full(abi_train, model, monkeypatch):
    pipe(monkeypatch, "".join(f"question {i}\n" for i in range(5)))
    code, out, err = abi_train("chat", "m", "--system", "s", *FLAGS)
    assert code == 0
    assert err.count("the oldest 2 turns are forgotten") == 3  # for good: a question and its answer for each new one
    assert len(out.splitlines()) >= 5


@pytest.mark.parametrize(
    "source",
    [
        "{% if messages[0].role != 'system' %}{{ raise_exception('a system message must come first') }}{% endif %}"
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}</{{ m.role }}>{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}",
        "{% for m in messages %}<{{ m.role }}>{{ m.content | upper }}</{{ m.role }}>{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}",
    ],
    ids=["system first", "upper case"],
)
def test_the_end_of_an_answer_is_that_of_this_conversation(abi_train, model, source, monkeypatch):
    from abi_py.generation import Generator

    Path("m/chat_template.jinja").write_text(source)
    seen = []
    stream = Generator.stream
    monkeypatch.setattr(
        Generator,
        "stream",
        lambda self, asked, settings: (seen.append(settings.stop_ids), stream(self, asked, settings))[1],
    )
    code, _, err = abi_train("chat", "m", "--once", "hi", "--system", "s", *FLAGS)
    assert (code, err) == (0, "")
    assert seen == [(SPECIALS.split().index("</assistant>"), SPECIALS.split().index("</s>"))]
    content = json.loads(Path("m/config.json").read_text())
    Path("m/config.json").write_text(json.dumps({**content, "eos_token_id": [65, 66]}))
    assert abi_train("chat", "m", "--once", "hi", "--system", "s", *FLAGS)[0] == 0
    assert seen[1] == (*seen[0], 65, 66)  # the model's own ends, too


def test_too_long_a_question(abi_train, model, uncompiled):
    code, _, err = abi_train("chat", "m", "--once", "x" * 80, *FLAGS)
    assert code == 1
    assert "context of 64" in err


def test_a_model_without_a_tokenizer(abi_train, tmp_path):
    save_folder(tmp_path / "m")
    code, _, err = abi_train("chat", "m", "--once", "hi")
    assert code == 2
    assert "no chat template" in err


def test_another_folders_tokenizer_and_template(abi_train, model, tmp_path):
    (tmp_path / "other").mkdir()
    for path in [*(tmp_path / "m").glob("*token*.json"), *(tmp_path / "m").glob("chat_template*")]:
        path.rename(tmp_path / "other" / path.name)
    code, _, err = abi_train("chat", "m", "--once", "hi", *FLAGS)
    assert code == 2
    code, out, err = abi_train("chat", "m", "--once", "hi", "--tokenizer", "other", *FLAGS)
    assert (code, out, err) == (0, model("hi") + "\n", "")


def test_wrong_calls(abi_train, model, uncompiled):
    for words in (["--once", ""], ["--once", "x", "--template", "none"], ["--once", "x", "--top-k", "-1"]):
        code, out, err = abi_train("chat", "m", *words)
        assert (code, out) == (2, "")
        assert len(err.splitlines()) == 1


@pytest.mark.skipif(sys.platform == "win32", reason="terminals of POSIX")
def test_on_a_terminal_ctrl_c_stops_the_answer_and_then_the_program(model, tmp_path):
    import pty

    master, slave = pty.openpty()
    root = Path(__file__).resolve().parents[2]
    words = [sys.executable, "-m", "abi_py", "chat", "m", "--max-new-tokens", "100000000"]
    child = subprocess.Popen(
        [*words, "--stop-ids", "0"],
        stdin=slave,
        stdout=slave,
        stderr=slave,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(root), "TERM": "dumb"},
        start_new_session=True,
    )
    os.close(slave)
    seen = b""

    def read_until(part):
        nonlocal seen
        end = time.monotonic() + PATIENCE
        while part not in seen and time.monotonic() < end:
            if select.select([master], [], [], 1)[0]:  # a read of its own would wait for ever
                seen += os.read(master, 4096)
        assert part in seen
        seen = seen[seen.index(part) + len(part) :]

    try:
        read_until(b"> ")
        os.write(master, b"hi\n")
        read_until(b"hi\r\n")
        while len(seen) < 40 and select.select([master], [], [], PATIENCE)[0]:  # the answer is under way
            seen += os.read(master, 4096)
        child.send_signal(signal.SIGINT)
        read_until(b"\r\n> ")
        assert child.poll() is None
        child.send_signal(signal.SIGINT)
        with contextlib.suppress(OSError):  # it may have gone
            os.write(master, b"\n")  # a signal that comes just before the prompt waits is seen with the next line
        assert child.wait(timeout=PATIENCE) == 130
    finally:
        child.kill()
        os.close(master)


def test_a_line_that_is_not_utf8_is_named(abi_train, model, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"/reset\ncaf\xe9\n"), encoding="ascii"))
    code, _, err = abi_train("chat", "m")
    assert code == 1
    assert "standard input:2: byte 3 is not UTF-8" in err
