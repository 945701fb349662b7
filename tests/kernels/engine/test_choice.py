"""Which method multiplies bfloat16: measured once, kept, stable where methods are nearly equal, and overridden."""

import errno
import json

import numpy as np
import pytest

from abi_py.kernels.engine import choice
from abi_py.kernels.engine.cache import CacheWarning, Store
from abi_py.kernels.engine.choice import ROUNDS, TIMES, WORTH, Choice
from abi_py.kernels.engine.jit import JIT
from abi_py.kernels.engine.number_formats import BFLOAT16, FLOAT32, METHODS, TILES, NumberFormat
from abi_py.kernels.engine.simd import ISA
from abi_py.kernels.matmul import product

compiled_only = pytest.mark.skipif(not JIT, reason="nothing is measured")
both_only = pytest.mark.skipif(len(METHODS) < 2, reason="the processor has one method")


class Named(str):
    """A method, of which only the name counts; c is one that the machine has and the system refuses."""

    @property
    def file(self):
        return f"routines-{self}.o"

    @property
    def missing(self):
        return "the system refuses it" if self == "c" else ""


class Clock:
    """Seconds that pass only where something is timed."""

    now = 0.0

    def perf_counter(self):
        return self.now


@pytest.fixture
def made(tmp_path, monkeypatch):
    """Return a function that makes a choice between a, 1 operation a second, and b, `speed` of them; and its runs."""
    monkeypatch.setattr(choice, "STORE", Store(tmp_path / "cache"))
    monkeypatch.delenv("ABI_TEST", raising=False)
    clock, runs = Clock(), []
    monkeypatch.setattr(choice, "time", clock)

    def make(speed):
        def timed(method):
            def run():
                runs.append(method)
                clock.now += 1 if method == "a" else 1 / speed

            return run, 1

        return Choice("kind", "ABI_TEST", {"a": Named("a"), "b": Named("b"), "c": Named("c")}, timed)

    make.runs = runs
    return make


@compiled_only
@pytest.mark.parametrize(("speed", "taken"), [(0.5, "a"), (1, "a"), (WORTH - 0.02, "a"), (WORTH + 0.02, "b"), (2, "b")])
def test_the_faster_is_taken_and_what_is_nearly_equal_is_the_first(made, speed, taken):
    choice = made(speed)
    assert (choice.method, choice.chosen) == (taken, taken)
    assert choice.rates == pytest.approx({"a": 1, "b": speed})


@compiled_only
def test_it_is_measured_once_where_nothing_can_be_kept(made, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(choice, "STORE", Store(tmp_path / "file" / "cache"))
    with pytest.warns(CacheWarning):
        assert made(2).method == "b"
    assert len(made.runs) == 2 * ROUNDS * TIMES


@compiled_only
def test_what_was_measured_is_kept(made):
    assert made(2).method == "b"
    count = len(made.runs)
    assert made(0.5).method == "b"  # read, not measured again
    assert len(made.runs) == count
    assert json.loads(bytes(choice.STORE.read("kind.json"))) == pytest.approx({"a": 1, "b": 2})
    choice.STORE.write("kind.json", b'{"a": 1, "c": 5}')  # of other methods
    assert made(0.5).method == "a"


@compiled_only
def test_what_is_measured_is_not_yet_compiled(made):
    """The record alone does not stand for the routines of what it chose."""
    one = made(2)
    assert one.file == "kind.json"
    assert one.method == "b"
    assert one.file == made(0.5).file == "routines-b.o"


def test_the_environment_overrides(made, monkeypatch):
    monkeypatch.setenv("ABI_TEST", "b")
    assert made(0.5).method == "b"
    assert made.runs == []
    monkeypatch.setenv("ABI_TEST", "d")
    with pytest.raises(ValueError, match=r"ABI_TEST \(d\) must be one of a, b on this machine; unset it"):
        _ = made(0.5).method
    monkeypatch.setenv("ABI_TEST", "c")
    with pytest.raises(ValueError, match=r"one of a, b on this machine, because the system refuses it; unset it"):
        _ = made(0.5).method


def test_bfloat16_is_one_of_its_methods():
    assert BFLOAT16.method in METHODS
    assert BFLOAT16.table is METHODS[BFLOAT16.method].table
    assert BFLOAT16.chosen is METHODS[BFLOAT16.method]
    assert next(iter(METHODS)) == "fp32"


@both_only
def test_all_methods_compute_the_same_but_for_the_last_bits(rng):
    a, b = (rng.standard_normal((70, 700 if JIT else 20)).astype(np.float32) for _ in range(2))
    found = {}
    for name, number_format in BFLOAT16.usable.items():
        found[name] = np.empty((70, 70), np.float32)
        product(found[name], a, b, transpose_b=True, number_format=number_format)
    for name in found:
        assert np.abs(found[name] - found["fp32"]).max() < 1e-5 * np.abs(found["fp32"]).max()


@compiled_only
def test_of_two_that_measure_at_once_the_first_one_to_write_decides(made, monkeypatch):
    measure = Choice._measure

    def overtaken(self):
        choice.STORE.write("kind.json", b'{"a": 1, "b": 3}', first=True)  # another process, meanwhile
        return measure(self)

    monkeypatch.setattr(Choice, "_measure", overtaken)
    assert made(0.5).method == "b"


@compiled_only
def test_it_is_kept_where_files_cannot_be_linked(made, monkeypatch):
    def refused(*_):
        raise PermissionError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr("os.link", refused)
    first = made(0.5)
    assert first.method
    assert choice.STORE.read("kind.json") is not None
    assert choice.STORE.problem is None


def test_the_tile_is_one_that_fits():
    assert (FLOAT32.rows, FLOAT32.columns) == TILES.chosen
    assert TILES.method in TILES.methods
    assert next(iter(TILES.methods.values())) == (ISA.tile_rows, ISA.tile_columns)
    assert NumberFormat(4, 16).rows == 4
    assert set(TILES.rates) == (set(TILES.methods) if JIT and len(TILES.methods) > 1 else set())
