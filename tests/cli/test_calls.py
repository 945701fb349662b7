"""Wrong calls, help, and the flags: made from the config classes, all of them, once."""

import errno
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from waiting import PATIENCE

from abi_py import __version__
from abi_py.cli import VERBS, cli
from abi_py.cli.options import FieldOption, in_flags
from abi_py.config import fields_of
from abi_py.runs.settings import RUN_SECTIONS

ROOT = Path(__file__).resolve().parents[2]


def verb(name):
    return cli.get_command(None, name)


def one_line(err):
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert "Traceback" not in err
    return err


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["rum"], "did you mean run?"),
        (["nope"], "the verbs are run, resume"),
        (["zzzzz"], "the verbs are run, resume"),
        (["--nope"], "--nope"),
        (["run", "--epocs", "3"], "--epochs"),
        (["run", "--epochs", "many"], "must be a whole number"),
        (["run", "--epochs", "0"], "epochs (0) must be at least 1"),
        (["run", "--optimizer", "adamx"], "did you mean adam"),
        (["run", "--optimizer", "x"], "must be one of sgd, adam, adamw, adamw_8bit, muon; choose one; see"),
        (["run", "--optimizer", "AdamW"], "did you mean adamw?"),
        (["run", "--hidden-dim", "100", "--num-heads", "8"], "hidden_dim (100) must be a multiple of num_heads (8)"),
        (["run", "--warmup-steps", "50", "--decay-steps", "20"], "warmup_steps (50) must not exceed decay_steps (20)"),
        (["run", "--mixed-precision", "fp8"], "must be one of fp32, bf16, fp16"),
        (["run", "--mixed-precision", "fp16", "--initial-loss-scale", "1000"], "must be a power of two"),
        (["run", "--mixed-precision", "fp16", "--no-nan-guard"], "must be true for fp16"),
        (["run", "--max-loss-scale", "1024"], "acts only with mixed_precision fp16"),
        (["run", "--use-gpu"], "use_gpu"),
        (["run", "--learning-rate", "-1"], "learning_rate (-1.0) must be a positive number"),
        (["run", "--valid-fraction", "1"], "valid_fraction (1.0) must be at least 0 and below 1"),
        (["run", "--valid-fraction", "0", "--early-stopping"], "early stopping"),
        (["run", "--eval-interval", "0", "--early-stopping"], "--no-early-stopping"),
        (["run", "--num-threads", "4096"], "num_threads (4096) must be at most"),
        (["run", "--vocab-size", "100"], "vocab_size (100) must be at least 257"),
        (["run", "--model-max-seq-len", "8", "--dry-run"], "must not exceed the model's (8)"),
        (["run", "--data", "missing.txt"], "missing.txt"),
        (["run", "--config", "missing.yaml"], "missing.yaml"),
        (["resume"], "RUN|CHECKPOINT"),
        (["resume", "missing"], "missing"),
        (["tokenize", "missing.txt", "-o", "x.bin"], "missing.txt"),
        (["tokenize"], "DATA"),
        (["info", "extra"], "extra"),
        (["verify", "--seed", "-1"], "--seed"),
    ],
)
def test_wrong_calls_are_one_line_and_exit_2(abi_train, tmp_path, arguments, expected):
    code, out, err = abi_train(*arguments)
    assert code == 2
    assert expected in one_line(err)
    assert out == "" or arguments[-1] == "--dry-run"
    assert list(tmp_path.iterdir()) == []  # nothing was begun


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("empty.bin", b"", "is empty"),
        ("odd.bin", b"12345", "its size is no multiple of 4"),
        ("image.txt", b"a\0b", "is not text"),
        ("short.txt", b"a", "each part needs at least 2"),
    ],
)
def test_bad_data_exits_1(abi_train, tmp_path, name, content, expected):
    (tmp_path / name).write_bytes(content)
    code, _, err = abi_train("run", "--data", name)
    assert code == 1
    assert name in err
    assert expected in one_line(err)
    assert not (tmp_path / "runs").exists()


def test_ids_beyond_the_vocabulary_name_the_offset(abi_train, tmp_path, shape):
    (tmp_path / "ids.bin").write_bytes(b"\1\0\0\0" * 200 + b"\7\0\0\0" + b"\1\0\0\0" * 200)
    code, _, err = abi_train("run", *shape, "--data", "ids.bin", "--vocab-size", "5", "--out", "r")
    assert code == 1
    assert "token 200 (byte 800) is id 7" in one_line(err)


def test_debug_shows_the_traceback(process):
    for arguments in (["--debug", "run", "--epochs", "0"], ["run", "--epochs", "0", "--debug"]):
        child = process(*arguments)
        _, err = child.communicate(timeout=PATIENCE)
        assert child.returncode == 1
        assert "Traceback" in err


def test_no_arguments_shows_the_verbs(abi_train):
    code, out, err = abi_train()
    text = out + err
    assert code == 0
    for name in VERBS:
        assert re.search(rf"^  {name}\b", text, re.MULTILINE)


def test_version(abi_train):
    assert abi_train("--version")[:2] == (0, f"abi-train, version {__version__}\n")


@pytest.mark.parametrize("name", VERBS)
def test_help_opens_with_a_command_that_is_accepted(abi_train, monkeypatch, name):
    code, out, _ = abi_train(name, "--help")
    assert code == 0
    usage, example = " ".join(out.partition("\n\n")[0].split()).split(" Example: ")
    assert usage.startswith(f"Usage: abi-train {name} ")
    assert example == verb(name).example
    words = example.split()[1:]
    assert words[0] == name
    monkeypatch.setattr("click.Path.convert", lambda self, value, param, ctx: value)  # its files need not exist
    verb(name).make_context(name, words[1:])


@pytest.mark.parametrize("name", ["run", "resume"])
def test_every_field_is_one_flag(name):
    wanted = [(section, option.name) for section, cls in RUN_SECTIONS.items() for option in fields_of(cls)]
    flags = [param for param in verb(name).params if isinstance(param, FieldOption)]
    assert sorted((flag.section, flag.field) for flag in flags) == sorted(wanted)
    spelled = [text for param in verb(name).params for text in (*param.opts, *param.secondary_opts)]
    assert len(spelled) == len(set(spelled))
    for flag in flags:
        option = next(o for o in fields_of(RUN_SECTIONS[flag.section]) if o.name == flag.field)
        assert in_flags(option.help, {each.field: each.opts[-1] for each in flags if each.section == flag.section}) in (
            flag.help
        )


def test_help_tells_the_defaults(abi_train):
    out = " ".join(abi_train("run", "--help-all")[1].split())
    tuned = "passes over the data [10; with --base 3]"
    for text in ("[steps of the whole run]", tuned, "Model:", "--lr, --learning-rate"):
        assert text in out


def test_help_loads_nothing_that_takes_long():
    code = "import sys; from abi_py.cli import main\ntry: main(['run', '--help'])\nexcept SystemExit: pass\n"
    code += "print({'numba', 'rich', 'tokenizers'} & set(sys.modules), file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "Usage: abi-train run" in done.stdout
    assert done.stderr == "set()\n"


def test_a_wrong_environment_is_a_wrong_call(process, tmp_path):
    for name in ("ABI_SIMD", "ABI_MATMUL"):
        child = process("run", env={name: "foo"})
        _, err = child.communicate(timeout=PATIENCE)
        assert child.returncode == 2
        assert f"{name} (foo) must be" in one_line(err)
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_told_with_a_remedy(abi_train, monkeypatch):
    """As a write says it: without a name."""

    def write(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("abi_py.cli.tokenizer.Verb.invoke", write)
    code, out, err = abi_train("info")
    assert (code, out) == (1, "")
    one_line(err)
    assert "writing failed: No space left on device; free some space" in err


@pytest.mark.parametrize(
    ("code", "remedy"),
    [
        (errno.EROFS, "nothing can be written there; give another path"),
        (errno.EACCES, "give another path, or change the permissions"),
        (errno.ENOTDIR, "a part of this path is a file and no directory; give another path"),
        (errno.ENOSPC, "free some space, or write somewhere else"),
    ],
)
def test_an_error_of_the_system_has_a_name_and_a_remedy(abi_train, monkeypatch, code, remedy):
    def write(*_):
        raise OSError(code, os.strerror(code), "a.bin")

    monkeypatch.setattr("abi_py.cli.tokenizer.Verb.invoke", write)
    assert abi_train("info") == (1, "", f"error: a.bin: {os.strerror(code)}; {remedy}\n")


def test_closed_streams(abi_train, monkeypatch):
    """Python sets a closed stream to None: no input is an empty one, no output an error."""
    monkeypatch.setattr("sys.stdin", None)
    code, _, err = abi_train("tokenize", "-", "-o", "a.bin")
    assert (code, err) == (1, "error: standard input is empty; a document needs at least one byte\n")
    sys.stdin.close()
    monkeypatch.setattr("sys.stdout", None)
    code, _, err = abi_train("info")
    sys.stdout.close()
    assert (code, err) == (1, "error: the standard output is closed; redirect it to a file, or to /dev/null\n")


def test_ctrl_c_while_the_command_line_is_imported(monkeypatch, capsys):
    from abi_py import __main__

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("abi_py.cli.main", interrupted)
    with pytest.raises(SystemExit) as end:
        __main__.main()
    assert (end.value.code, capsys.readouterr().err) == (130, "stopped\n")
    assert "abi-train = abi_py.__main__:main" in (ROOT / "setup.cfg").read_text()


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs a device that is always full")
@pytest.mark.parametrize("words", [["info"], ["--version"]])
def test_output_that_cannot_be_written_is_one_line(words):
    call = [sys.executable, "-m", "abi_py", *words]
    with open("/dev/full", "w") as full:
        end = subprocess.run(call, stdout=full, stderr=subprocess.PIPE, text=True, cwd=ROOT, timeout=PATIENCE)
    assert (end.returncode, one_line(end.stderr).startswith("error: writing failed: No space")) == (1, True)
