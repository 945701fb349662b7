"""No damaged file makes a reader fail with an error of another's, die, hang, or take memory out of proportion.

`ABI_FUZZ=1000000 python -m pytest tests/fuzz` tries more of them, others with `ABI_FUZZ_SEED`.
"""

import os
import sys

import fuzz
import pytest

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="limits and peak memory of a process are POSIX's")

INPUTS, SEED = int(os.environ.get("ABI_FUZZ", "8000")), int(os.environ.get("ABI_FUZZ_SEED", "0"))

BAD = """
import os, time
from abi_py.errors import DataError
from readers import Reader

def make(folder):
    (folder / "x").write_bytes(b"valid, and a hundred bytes more" * 3)

def reads(what):
    def read(folder):
        if (folder / "x").read_bytes() != b"valid, and a hundred bytes more" * 3:
            what()
    return read

def refuse():
    raise DataError("x is damaged")

READERS = (
    Reader("good", make, ("x",), reads(refuse)),
    Reader("raw", make, ("x",), reads(lambda: {}["key"])),
    Reader("dies", make, ("x",), reads(lambda: os.kill(os.getpid(), 11))),
    Reader("hangs", make, ("x",), reads(lambda: time.sleep(60))),
    Reader("takes", make, ("x",), reads(lambda: bytes(range(256)) * 1_500_000)),
)
"""


def test_no_damaged_file_does_harm():
    outcome = fuzz.campaign([], SEED, INPUTS, jobs=2)
    assert outcome.inputs == INPUTS
    assert not outcome.defects, "\n".join(fuzz.describe(outcome))


@pytest.fixture
def bad_readers(tmp_path, monkeypatch):
    (tmp_path / "bad_readers.py").write_text(BAD)
    monkeypatch.setenv("ABI_FUZZ_READERS", "bad_readers")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")]))
    monkeypatch.syspath_prepend(tmp_path)


def test_the_fuzzer_sees_what_is_wrong(bad_readers, monkeypatch):
    monkeypatch.setattr(fuzz, "SECONDS", 3.0)
    outcome = fuzz.campaign([], 0, 10, jobs=2)
    assert outcome.inputs == 10
    seen = {reader: kind for reader, kind in outcome.defects}
    assert seen.keys() == {"raw", "dies", "hangs", "takes"}
    assert seen["raw"].startswith("KeyError at ")
    assert seen["dies"].startswith("died with -11")
    assert seen["hangs"] == "took more than 3 s"
    assert " MB for a file of " in seen["takes"]


def test_an_input_is_made_from_its_number_alone(tmp_path):
    contents = []
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        worker = fuzz.Worker(["safetensors"], 7, tmp_path / name)
        if name == "a":
            worker.read(3)
        contents.append(worker.damage(5)[2].read_bytes())
    assert contents[0] == contents[1]


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="the system does not forget a peak")
def test_memory_is_seen_after_more_of_it_was_taken():
    for size in (80 << 20, 40 << 20):
        memory = fuzz.Memory()
        bytes(range(256)) * (size // 256)
        assert size < 1.1 * memory.grown() < 1.3 * size


def test_who_stops_a_run_has_its_counts(bad_readers, monkeypatch, capsys):
    problem = fuzz._Process.problem

    def stopped(process):
        if process.place() > 20:
            raise KeyboardInterrupt
        return problem(process)

    monkeypatch.setattr(fuzz._Process, "problem", stopped)
    monkeypatch.setattr(fuzz, "PROGRESS", 0.0)
    outcome = fuzz.campaign(["good", "raw"], 0, 10**9, jobs=1)
    assert outcome.counts["good"] > 10
    assert len(outcome.defects[next(iter(outcome.defects))]) > 5
    assert " inputs, " in capsys.readouterr().err
