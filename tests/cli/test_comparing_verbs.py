"""`compare` and `runs`, from the command line: a run that is trained here, and directories that are none."""

import json
import subprocess
import sys

import pytest
from rich.console import Console

from abi_py.cli import columns

CHECK = """
import sys
from abi_py.cli import main
try:
    main(['runs', {place!r}])
finally:
    assert 'numba' not in sys.modules
"""


@pytest.fixture
def two(abi_train, tiny):
    """Train two runs that differ in their learning rate."""
    for name, rate in (("slow", "1e-4"), ("fast", "1e-2")):
        assert abi_train("run", *tiny, "--out", f"runs/{name}", "--lr", rate, "--eval-interval", "5")[0] == 0


def test_compare_and_list(abi_train, two, tmp_path):
    code, out, _ = abi_train("compare", "runs/slow", "runs/fast")
    assert code == 0
    head, *rows = out.split("\n\n")[0].splitlines()
    assert head.split()[:4] == ["run", "state", "parameters", "steps"]
    assert [row.split()[:2] for row in rows] == [["slow", "finished"], ["fast", "finished"]]
    settings = out.split("Settings that differ\n")[1].splitlines()
    assert settings[0].split() == ["run", "--learning-rate"]  # min_learning_rate follows from it
    assert settings[2].split() == ["fast", "0.01"]
    assert "best     fast: validation loss" in out
    code, out, _ = abi_train("compare", "runs/slow", "runs/fast", "--json")
    found = json.loads(out)
    assert (found["best"], found["comparable_by_loss"]) == ("fast", True)
    report = json.loads((tmp_path / "runs/fast/report.json").read_text())
    assert found["runs"][1]["best"]["loss"] == report["best_val_loss"]
    assert found["runs"][1]["best"]["bits_per_byte"] == report["best_val_bits_per_byte"]
    assert found["runs"][1]["parameters"] > 1000
    code, out, _ = abi_train("runs")
    head, *rows = out.splitlines()
    assert head.split() == ["run", "state", "age", "model", "data", "steps", "loss", "size"]
    assert [row.split()[0] for row in rows] == ["fast", "slow"]
    assert all("standard library" in row for row in rows)
    first = json.loads(abi_train("runs", "--json")[1])[0]
    assert first["steps"] == report["total_steps"]
    assert first["best_loss"] == report["best_val_loss"]
    done = subprocess.run([sys.executable, "-c", CHECK.format(place=str(tmp_path / "runs"))], capture_output=True)
    assert done.returncode == 0, done.stderr


def test_a_plot_from_the_command_line(abi_train, two, tmp_path):
    pytest.importorskip("matplotlib")
    code, out, _ = abi_train("compare", "runs/slow", "--plot", "a.svg", "--by", "tokens")
    assert code == 0
    assert "plot     a.svg" in out
    assert "tokens of training" in (tmp_path / "a.svg").read_text()


def test_no_runs_yet(abi_train, tmp_path):
    code, out, _ = abi_train("runs")
    assert (code, out) == (0, "none     there is no run in runs/ yet; begin one: abi-train run\n")
    (tmp_path / "empty").mkdir()
    assert "abi-train run --out empty/NAME" in abi_train("runs", "empty")[1]
    assert json.loads(abi_train("runs", "empty", "--json")[1]) == []


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        (["runs", "missing"], "DIRECTORY (missing) must be there"),
        (["compare"], "Missing argument 'RUN...'"),
        (["compare", "."], "RUN (.) must be the directory of a run"),
        (["compare", ".", "--plot", "a.gif"], "plot (a.gif) must end in .svg or .png"),
        (["compare", ".", "--by", "step"], "by (step) has an effect only with --plot"),
    ],
)
def test_wrong_calls(abi_train, words, problem):
    code, out, err = abi_train(*words)
    assert (code, out) == (2, "")
    assert problem in err
    assert err.count("\n") == 1


def test_a_narrow_terminal_gets_the_table_in_parts(capsys):
    shown = {"run": ["a", "b"], "loss": ["1.5", ""], "settings": ["x", "y"], "time": ["10 s", "9 s"]}
    for terminal, width, most in ((True, 16, 16), (True, 80, 80), (False, 16, 40)):
        console = Console(width=width, force_terminal=terminal, no_color=True)
        columns.show_columns(console, "", shown)
        lines = capsys.readouterr().out.replace("\x1b[1m", "").replace("\x1b[0m", "").splitlines()
        assert max(map(len, lines)) <= most
        assert len([line for line in lines if line.startswith("run")]) == (3 if terminal and width == 16 else 1)
    assert lines[1:] == ["a     1.5  x         10 s", "b          y          9 s"]


def test_numbers_for_people():
    assert [columns.count(each) for each in (None, 7, 999, 1000, 9_600, 431_040, 999_700, 1.24e9)] == [
        "", "7", "999", "1.00k", "9.60k", "431k", "1.00M", "1.24B",
    ]  # fmt: skip
    assert [columns.clock(each) for each in (5.04, 59.97, 65, 3600.2)] == ["5.0 s", "1:00", "1:05", "1:00:00"]
    assert [columns.age(each) for each in (5, 300, 7300, 200_000)] == ["5 s", "5 min", "2 h", "2 d"]
    assert columns.figure(1e9, 4) == "1.00e+09"
    assert [columns.figure(each, 4) for each in (0.0, 0.0001, 1e-5)] == ["0.0000", "0.0001", "1.00e-05"]
