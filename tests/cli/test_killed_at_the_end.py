"""Killed at any rename while RUN/model and RUN/adapter are written: `resume` ends the run with the same bytes.

A kill right before a rename leaves the disk as it is at that moment, so the directory is copied there, and each copy
is gone on with.  Real kills, at any moment of a run, are in test_kills.py.
"""

import os
import shutil

import pytest
from world import write_talks

from abi_py.cli import training

DEEPZIG = ["deepzig", "talks.jsonl", "--batch-size", 4, "--num-threads", 1, "--sample-tokens", 0, "--max-steps", 2]


def of_all_weights(abi_train, tiny):
    return ["run", *tiny, "--max-steps", 2]


def of_adapters(abi_train, tiny):
    assert abi_train(*of_all_weights(abi_train, tiny), "--out", "base")[0] == 0
    words = ["--corpus-bytes", 3000, "--max-seq-len", 16, "--sample-tokens", 0, "--max-steps", 2]
    return ["run", "--base", "base", "--lora", *words]


def of_deepzig(abi_train, tiny):
    return DEEPZIG


def of_the_zig_form(abi_train, tiny):
    return [*DEEPZIG, "--format", "zig"]


# What makes the words of a run, and the renames in which what it leaves takes its place: one for each folder.
RUNS = {"run": (of_all_weights, 1), "lora": (of_adapters, 2), "deepzig": (of_deepzig, 1), "zig": (of_the_zig_form, 1)}


@pytest.fixture
def moments(monkeypatch, tmp_path):
    """Copy the directory of the run r to kills/N/r right before the N-th rename of `leave_model`; return the copies."""
    made = []
    leave, replace = training.leave_model, os.replace

    def copying(source, target, **more):
        made.append(tmp_path / f"kills/{len(made)}/r")
        shutil.copytree(tmp_path / "r", made[-1], symlinks=True)
        replace(source, target, **more)

    def watched(run, *arguments):
        if run.directory.absolute() != tmp_path / "r":
            return leave(run, *arguments)
        with monkeypatch.context() as patch:
            patch.setattr(os, "replace", copying)
            return leave(run, *arguments)

    monkeypatch.setattr(training, "leave_model", watched)
    return made


def left_in(run):
    """Return the files of what a run left, by name."""
    folders = [run / name for name in ("model", "adapter")]
    return {path.relative_to(run): path.read_bytes() for each in folders for path in each.rglob("*") if path.is_file()}


def check(abi_train, copies, wanted, monkeypatch):
    for copy in copies:
        monkeypatch.chdir(copy.parent)
        code, out, err = abi_train("resume", "r")
        assert code == 0, (copy, err)
        assert left_in(copy) == wanted, copy
        if "nothing is left to do" in out:  # killed after the new one had its place: the old one goes with the next
            continue
        assert "model    r/model: step " in out
        hidden = [path for path in copy.rglob(".*") if path.name.startswith(".abi")]
        assert not hidden, copy


@pytest.mark.parametrize("kind", RUNS)
def test_resume_ends_what_was_killed_while_its_model_was_written(kind, abi_train, tiny, tmp_path, moments, monkeypatch):
    make, folders = RUNS[kind]
    write_talks(tmp_path / "talks.jsonl")
    code, _, err = abi_train(*make(abi_train, tiny), "--out", "r")
    assert code == 0, err
    assert len(moments) >= folders
    wanted = left_in(tmp_path / "r")
    assert any(name.parts[0] == "adapter" for name in wanted) is (kind == "lora")
    check(abi_train, moments, wanted, monkeypatch)


def test_a_model_that_is_replaced_is_the_old_one_or_the_new_one(abi_train, tiny, tmp_path, moments, monkeypatch):
    """A run that goes on takes the place of what it left, and a kill between the two renames loses neither."""
    assert abi_train(*of_all_weights(abi_train, tiny), "--out", "r")[0] == 0
    moments.clear()
    shutil.rmtree(tmp_path / "kills")
    code, _, err = abi_train("resume", "r", "--max-steps", 4)
    assert code == 0, err
    assert len(moments) >= 2
    check(abi_train, moments, left_in(tmp_path / "r"), monkeypatch)
