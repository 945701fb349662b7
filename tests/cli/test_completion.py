"""Shell completion: verbs, flags, choices, names of files."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import click
import pytest
from click.shell_completion import BashComplete, FishComplete, ZshComplete
from test_every_option import verbs

from abi_py.cli import VERBS, cli
from abi_py.cli.options import FieldOption
from abi_py.data.chat import template_names

ROOT = Path(__file__).resolve().parents[2]


def offered(words, incomplete="", shell=BashComplete):
    """Return what a shell is offered: pairs of kind and word."""
    found = shell(cli, {}, "abi-train", "_ABI_TRAIN_COMPLETE").get_completions(words, incomplete)
    return [(item.type, item.value) for item in found]


@pytest.mark.parametrize("shell", [BashComplete, ZshComplete, FishComplete])
def test_verbs_flags_and_choices(shell):
    assert offered([], shell=shell) == [("plain", verb) for verb in VERBS]
    assert offered([], "tok", shell) == [("plain", "tokenizer"), ("plain", "tokenize")]
    assert offered(["tokenizer"], "t", shell) == [("plain", "train")]
    assert offered(["run"], "--opt", shell) == [("plain", "--optimizer")]
    assert offered(["run"], "--no-pack", shell) == [("plain", "--no-packing")]
    assert offered(["run", "--lr-schedule"], "w", shell) == [("plain", "warmup_cosine"), ("plain", "wsd")]
    assert ("plain", "--help-all") in offered(["run"], "--help", shell)
    assert offered(["run"], "--use-gpu", shell) == []  # what can only be refused is not offered


@pytest.mark.parametrize(
    ("words", "kind"),
    [
        (["run"], "file"),
        (["run", "--data"], "file"),
        (["run", "--base"], "file"),
        (["run", "--log-dir"], "file"),
        (["run", "--out"], "dir"),
        (["run", "--learning-rate"], None),
        (["resume"], "file"),
        (["generate"], "file"),
        (["tokenizer", "train"], "file"),
    ],
)
def test_names_of_files_are_left_to_the_shell(words, kind):
    assert offered(words, "x") == ([] if kind is None else [(kind, "x")])


@pytest.mark.parametrize("verb", ["run", "deepzig", "preview", "chat", "eval"])
def test_templates_are_names_or_files(verb):
    assert offered([verb, "--template"], "qw") == [("plain", "qwen"), ("file", "qw")]
    assert [word for _, word in offered([verb, "--template"])] == [*template_names(), ""]


def test_every_choice_of_every_verb_is_offered():
    for name, command in verbs():
        for param in command.params:
            choices = getattr(param.type, "choices", ())
            if choices and isinstance(param, click.Option) and not param.hidden:
                words = [*name.split(), param.opts[-1]]
                assert [word for _, word in offered(words)] == [str(choice) for choice in choices], words


def test_what_names_a_file_says_so():
    """A field whose help speaks of a file or directory is declared as a path."""
    for name, command in verbs():
        for param in command.params:
            if isinstance(param, FieldOption) and param.type.name == "str" and not param.hidden:
                head = param.text.split(";")[0].split(",")[0]
                looks = head.startswith(("directory", "folder", "tokenizer.json", "GGUF file", "another file"))
                assert looks <= bool(param.type.option.metadata.get("path")), (name, param.opts)


@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
def test_in_bash(tmp_path):
    """The script that the docs name, in a real shell; nothing slow is imported for it."""
    (tmp_path / "abi-train").write_text(
        f"#!{sys.executable}\nimport sys\nfrom abi_py.__main__ import main\ntry: main()\nfinally:\n"
        "    print({'numba', 'rich', 'tokenizers'} & set(sys.modules), file=sys.stderr)\n"
    )
    (tmp_path / "abi-train").chmod(0o755)
    script = (
        'eval "$(_ABI_TRAIN_COMPLETE=bash_source abi-train)"\n'
        "COMP_WORDS=(abi-train run --optimizer m) COMP_CWORD=3\n"
        "_abi_train_completion abi-train\n"
        'echo "${COMPREPLY[@]}"\n'
    )
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert done.stdout == "muon\n", done.stderr
    assert set(done.stderr.splitlines()) == {"set()"}
