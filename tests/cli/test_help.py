# ruff: noqa: RUF009 (a call of `opt` declares a field, it is not a shared default)
"""What --help and --help-all show, and how they look."""

import re
from dataclasses import dataclass

import click
import pytest
from click.testing import CliRunner
from test_every_option import verbs

from abi_py.cli.options import FieldOption, Verb, config_options
from abi_py.config import OFF, ON, Config, LossOn, opt

SCREEN = 52  # lines, at 80 columns
EVERY = [pytest.param(name.split(), command, id=name) for name, command in verbs()]


def shown(abi_train, monkeypatch, words, flag="--help", columns=80):
    monkeypatch.setenv("COLUMNS", str(columns))
    code, out, err = abi_train(*words, flag)
    assert (code, err) == (0, "")
    return out


def labels(out):
    """Return the flags in the left column."""
    found = re.findall(r"^  (-\S.*?)(?:  |$)", out, re.MULTILINE)
    return {word for label in found for word in re.split(r"[ ,]+", label)}


def spelled(param):
    """Return how a flag may be written there."""
    return {*param.opts, f"--[no-]{param.opts[-1].removeprefix('--')}"}


@pytest.mark.parametrize(("words", "command"), EVERY)
def test_help_is_one_screen_with_usage_first(abi_train, monkeypatch, words, command):
    out = shown(abi_train, monkeypatch, words)
    lines = out.splitlines()
    assert lines[0].startswith(f"Usage: abi-train {' '.join(words)} ")
    assert len(lines) <= SCREEN
    assert "\n\n\n" not in out
    sections = [param for param in command.params if isinstance(param, FieldOption)]
    assert ("--help-all" in out) == bool(sections)
    for param in sections:
        assert bool(spelled(param) & labels(out)) == param.common, param.opts


@pytest.mark.parametrize("columns", [80, 140])
@pytest.mark.parametrize(("words", "command"), EVERY)
def test_no_word_is_broken_and_no_line_too_long(abi_train, monkeypatch, words, command, columns):
    flag = "--help-all" if any(isinstance(param, FieldOption) for param in command.params) else "--help"
    out = shown(abi_train, monkeypatch, words, flag, columns)
    assert out.isascii()
    assert max(map(len, out.splitlines())) < columns
    found = set(re.split(r"[\s\[\]|,;:()]+", out))
    for param in command.params:
        if not isinstance(param, click.Option) or param.hidden:
            continue
        for name in (*param.opts, *getattr(param.type, "choices", ())):
            bare = str(name).removeprefix("--")
            assert {str(name), bare, f"--{bare}", f"--{bare}."} & found, (name, words)
        for word in re.split(r"[\s\[\]|,;:()]+", param.help or ""):
            assert word in found, (word, param.opts)


@pytest.mark.parametrize(("words", "command"), EVERY)
def test_what_is_always_refused_is_in_no_help(abi_train, monkeypatch, words, command):
    fields = [param for param in command.params if isinstance(param, FieldOption)]
    found = labels(shown(abi_train, monkeypatch, words, "--help-all")) if fields else set()
    for param in fields:
        assert bool(spelled(param) & found) == (not param.hidden), param.opts


def test_what_is_hidden_answers_all_the_same(abi_train):
    for words, said in (
        (["run", "--gpu-backend", "cuda"], "gpu_backend (cuda) must be unset"),
        (["run", "--gpu-batch-threshold", "9"], "gpu_batch_threshold (9) must be 8"),
        (["chat", "nothing", "--logprobs", "2"], "nothing"),
    ):
        code, _, err = abi_train(*words)
        assert code == 2
        assert said in err


def test_a_field_says_itself_what_its_flag_is():
    @dataclass(frozen=True, kw_only=True)
    class Some(Config):
        often: int = opt(1, "a number; of many", common=True)
        this_one: str | None = opt(None, "a file: of this_one's kind", path=True, common=True)
        never: int = opt(0, "must stay 0", refused=True)
        last: LossOn = opt(LossOn.ALL, "a choice", acts={"this_one": ON, "often": OFF})
        there: bool = opt(True, "is it (or not); else not", acts={"last": LossOn.ALL}, common=True)

        def validate(self):
            pass

    command = config_options({"some": Some}, {})(Verb("v", example="v --often 2"))
    called = [CliRunner().invoke(command, [flag]) for flag in ("--help", "--help-all")]
    short, whole = (result.output.partition("Some:\n")[2] for result in called)
    assert short == (
        "  --often N        a number [1]\n"
        "  --this-one PATH  a file: of --this-one's kind\n"
        "  --[no-]there     is it [on]\n"
    )
    assert whole == (
        "  --often N             a number; of many [1]\n"
        "  --this-one PATH       a file: of --this-one's kind\n"
        "  --last assistant|all  a choice; acts only with --this-one and without --often\n"
        "                        [all]\n"
        "  --[no-]there          is it (or not); else not; acts only with --last all [on]\n"
    )


def test_the_verbs_are_grouped_and_fit(abi_train, monkeypatch):
    for columns in (80, 140):
        out = shown(abi_train, monkeypatch, [], columns=columns)
        assert max(map(len, out.splitlines())) < columns
        headings = re.findall(r"^(\S.*):$", out, re.MULTILINE)
        assert headings == ["Train", "Use", "Prepare", "Look and check", "Options"]


def test_words_without_a_flag_are_data(abi_train, tmp_path, tiny):
    (tmp_path / "a.txt").write_text("some text, some more of it. " * 100)
    (tmp_path / "b.txt").write_text("and another one. " * 100)
    shape = [word for word in tiny if word not in ("--corpus-bytes", "3000")]
    code, _, err = abi_train("run", "a.txt", "b.txt", *shape, "--out", "r", "--max-steps", "2")
    assert (code, err) == (0, "")
    assert f"{tmp_path / 'b.txt'}" in (tmp_path / "r" / "config.yaml").read_text()
    code, _, err = abi_train("run", "a.txt", "--data", "b.txt")
    assert code == 2
    assert err == (
        "error: data must be given in one way: a.txt is there as words, b.txt by --data; leave --data out, and name "
        "all of them\n"
    )


def test_a_forgotten_verb_is_found(abi_train, tmp_path):
    (tmp_path / "a b.txt").write_text("x")
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    for word, said in (
        ("a b.txt", "to train on a b.txt: abi-train run 'a b.txt'"),
        ("model", "model is a run or a model: abi-train inspect model says what can be done with it"),
    ):
        code, out, err = abi_train(word)
        assert (code, out) == (2, "")
        assert said in err
