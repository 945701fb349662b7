"""The pages are run: their Python blocks, in order, page by page, and every abi-train command is at least parsed."""

import math
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from waiting import PATIENCE

from abi_py.cli import VERBS, cli

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted(ROOT.glob("docs/*.md")), ROOT / "kernels/README.md"]
TINY = (
    "--hidden-dim 16 --num-layers 1 --num-heads 2 --num-kv-heads 1 --intermediate-dim 16 "
    "--max-seq-len 16 --batch-size 4 --epochs 1 --corpus-bytes 3000"
)


def blocks(page, *languages):
    """Return (line, text) of the fenced blocks in these languages."""
    found, text = [], page.read_text(encoding="utf-8")
    for match in re.finditer(r"^```(\w+)\n(.*?)^```", text, re.MULTILINE | re.DOTALL):
        if match[1] in languages:
            found.append((text.count("\n", 0, match.start()) + 2, match[2]))
    return found


def commands(page):
    """Return the abi-train command lines of a page, as lists of words; output lines and comments left out."""
    found = []
    for line, text in blocks(page, "bash", "console"):
        for number, row in enumerate(text.splitlines()):
            row = row.removeprefix("$ ").strip()
            for part in re.split(r"&&|\||;", row):
                words = shlex.split(part, comments=True) if part.strip().startswith("abi-train") else []
                if words:
                    found.append((line + number, words))
    return found


def ids(page):
    return str(page.relative_to(ROOT))


@pytest.mark.parametrize("page", PAGES, ids=ids)
def test_python_blocks_run(page, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    names = {"__name__": "__main__"}
    for line, text in blocks(page, "python"):
        code = compile("\n" * (line - 1) + text, str(page), "exec")  # so that a traceback names the page's line
        exec(code, names)


@pytest.mark.parametrize("page", PAGES, ids=ids)
def test_commands_are_accepted(page, monkeypatch):
    monkeypatch.setattr("click.Path.convert", lambda self, value, param, ctx: value)  # its files need not exist
    for line, words in commands(page):
        if len(words) == 1 or words[1].startswith("-"):
            continue
        assert words[1] in VERBS, f"{page.name}:{line}: no such verb: {' '.join(words)}"
        if "--help" in words:
            continue
        try:
            cli.get_command(None, words[1]).make_context(words[1], words[2:])
        except Exception as error:
            pytest.fail(f"{page.name}:{line}: {' '.join(words)}: {error}")


def test_the_main_command_of_the_readme_works(tmp_path):
    (_, first), *_ = blocks(ROOT / "README.md", "bash")
    install, run = first.strip().split(" && ")
    assert install.startswith("pip install")
    assert run == "abi-train run"
    words = [sys.executable, "-m", "abi_py", *run.split()[1:], *TINY.split()]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, timeout=PATIENCE, env=environment)
    assert done.returncode == 0, done.stderr
    assert "Report" in done.stdout


def test_the_demo_learns(tmp_path):
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, ROOT / "examples/train_demo.py"], cwd=tmp_path, capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr
    assert "98,624 parameters" in done.stdout  # the size of the ABI's demo
    losses = [float(match) for match in re.findall(r"^epoch \d/5: loss=([\d.]+)", done.stdout, re.MULTILINE)]
    assert len(losses) == 5
    assert losses[-1] < 0.2 * math.log(256)  # chance; the ABI's settings end at 0.99 of it, these at 0.11
    right = [int(match) for match in re.findall(r"\.\.\. (\d+) of 16 right$", done.stdout, re.MULTILINE)]
    assert len(right) == 4
    assert sum(right) >= 32
    assert list(tmp_path.iterdir()) == []


def test_speed_table_is_made_from_the_results():
    done = subprocess.run([sys.executable, ROOT / "bench/speed_tables.py", "--check"], check=False)
    assert done.returncode == 0, "run `python bench/speed_tables.py`"
