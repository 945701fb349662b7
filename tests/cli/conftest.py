"""What the tests of the command line share: calling it here, and in a process of its own."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from abi_py.model.presets import preset
from abi_py.runs.compiling import compile_missing, kernels_of_generation

ROOT = Path(__file__).resolve().parents[2]
SHAPE = (
    "--hidden-dim 16 --num-layers 1 --num-heads 2 --num-kv-heads 1 --intermediate-dim 16 "
    "--max-seq-len 16 --batch-size 4 --epochs 2 --sample-tokens 8"
)


@pytest.fixture(scope="session", autouse=True)
def warm():
    """Compile what generation needs before the first test, so that none finds a line about it in its output."""
    compile_missing(kernels_of_generation(preset("test")), lambda text: None)


@pytest.fixture
def tiny():
    """Return the flags of a run that takes a second."""
    return [*SHAPE.split(), "--corpus-bytes", "3000"]


@pytest.fixture
def shape():
    """Return the flags of such a run on data of your own."""
    return SHAPE.split()


@pytest.fixture
def uncompiled(monkeypatch):
    """Let nothing be compiled: what is wrong with a call must be told before."""
    from abi_py.runs import compiling

    def refuse(*words, **more):
        raise AssertionError("kernels are compiled before a wrong call is told")

    for name in ("decode_like", "compile_missing"):
        monkeypatch.setattr(compiling, name, refuse)


@pytest.fixture
def process(tmp_path):
    """Return a function that starts abi-train in a process of its own, with pipes, in an empty directory."""
    started = []

    def start(*arguments, **settings):
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "100", **settings.pop("env", {})}
        child = subprocess.Popen(
            [sys.executable, "-m", "abi_py", *map(str, arguments)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=tmp_path,
            env=environment,
            **settings,
        )
        started.append(child)
        return child

    yield start
    for child in started:
        if child.poll() is None:
            child.kill()
        child.communicate()
