"""Replay: noted calls, made again by address, do what Python's calls do, and fail as they fail."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from abi_py.kernels.engine import threads
from abi_py.kernels.engine.calls import NotNumbers, words_of
from abi_py.kernels.engine.jit import JIT, kernel, prange
from abi_py.kernels.engine.replay import Recording, between, by_numpy, recorded, replays
from abi_py.kernels.unchecked import global_norm, product, rms_norm_forward

ROOT = Path(__file__).resolve().parents[3]
pytestmark = pytest.mark.skipif(not JIT, reason="nothing is compiled, so nothing is replayed")


@kernel
def mixed(y, pair, flag, number, small, whole, factor):
    """Write to y what all kinds of arguments say."""
    for i in prange(y.shape[0]):
        for j in range(y.shape[1]):
            y[i, j] = pair[0][j] * pair[1] + (number if flag else factor) + small + whole


@kernel
def failing(y, least):
    """Add 1, and raise if y[0] is below `least`."""
    for i in prange(y.size):
        y[i] += 1
    if y[0] < least:
        raise ValueError("too small")


def test_every_kind_of_argument_arrives():
    """Arrays with strides, tuples, booleans, and numbers of 8 to 64 bits, negative ones too."""
    rng = np.random.default_rng(0)
    wide = rng.standard_normal((3, 10)).astype(np.float32)
    for flag in (True, False):
        y, again = wide[:, 2:7], np.zeros((3, 5), np.float32)
        numbers = -2.5, np.int8(-3), -(2**40), np.float32(0.1)
        calls = (rng.standard_normal(10).astype(np.float32)[::2], 7), flag, *numbers
        with recorded() as notes:
            mixed(y, *calls)
        again[...] = y
        y[...] = 0
        Recording(notes).replay()
        np.testing.assert_array_equal(y, again)
        expected = calls[0][0] * 7 + (-2.5 if flag else np.float32(0.1)) - 3 - 2.0**40
        np.testing.assert_allclose(y, np.broadcast_to(expected, y.shape), rtol=1e-6)


def test_the_order_is_kept_and_what_is_between_runs_again():
    """Kernels, NumPy, Python with what it is given, and kernels again; those that Python calls are its own."""
    rng = np.random.default_rng(1)
    x, w, r = rng.standard_normal((6, 8)).astype(np.float32), np.ones(8, np.float32), np.zeros(6, np.float32)
    n, y, seen = np.zeros_like(x), np.zeros((6, 6), np.float32), []

    def look(step):
        seen.append(step)
        product(y, n, n, transpose_b=True)
        y[0, 0] += step

    def text(step):
        rms_norm_forward(n, r, x, w, 1e-5)
        by_numpy(np.multiply, n, np.float32(2), out=n)
        between(look, step)
        rms_norm_forward(n, r, n, w, 1e-5)

    with recorded() as notes:
        text(1)
    assert len(notes) == 4
    recording = Recording(notes)
    for step in (2, 3):
        x *= np.float32(1.1)
        text(step)
        expected = n.copy(), y.copy(), r.copy()
        for array in (n, y, r):
            array.fill(np.nan)
        recording.replay(step)
        for found, wanted in zip((n, y, r), expected, strict=True):
            assert found.tobytes() == wanted.tobytes()
    assert seen == [1, 2, 2, 3, 3]


def test_what_a_kernel_raises_is_raised_and_what_came_after_is_not_called():
    first, second, third = (np.full(1, 5.0, np.float32) for _ in range(3))
    with recorded() as notes:
        for y in (first, second, third):
            failing(y, 3.0)
    recording = Recording(notes)
    second[0] = -7
    with pytest.raises(ValueError, match="too small"):
        recording.replay()
    assert (first[0], third[0]) == (7, 6)
    second[0] = 1.5  # 2.5 is below 3; what failed is called again, by Python, and 3.5 is not
    recording.replay()
    assert third[0] == 7


def test_a_call_that_returns_something_or_has_other_arguments_is_refused():
    with recorded() as notes:
        global_norm(np.ones(4, np.float32))
    with pytest.raises(NotNumbers, match="global_norm returns"):
        Recording(notes)
    with pytest.raises(NotNumbers):
        words_of("text", "text")


def test_nothing_is_noted_outside():
    x = np.ones(1, np.float32)
    with recorded() as notes:
        pass
    failing(x, 0.0)
    assert notes == []


def test_the_arrays_of_a_recording_live_as_long_as_it_does():
    y = np.ones(1, np.float32)
    with recorded() as notes:
        failing(y[:], 0.0)
    recording = Recording(notes)
    del notes
    recording.replay()
    assert y[0] == 3


def test_calls_take_turns_where_they_must(monkeypatch):
    """With Numba's own pool the lock is held while calls are made."""
    monkeypatch.setattr(threads, "_turns_needed", lambda: True)
    y = np.ones(1, np.float32)
    held = []
    with recorded() as notes:
        failing(y, 0.0)
        between(lambda: held.append(threads._turn.locked()))
    recording = Recording(notes)
    table = recording._parts[0]
    walk = table._walk
    table._walk = lambda *where: held.append(threads._turn.locked()) or walk(*where)
    recording.replay()
    assert held == [False, True, False]


CHILD = """
import os, sys, numpy as np
from abi_py.kernels.engine.replay import replays
from abi_py.kernels.unchecked import global_norm
global_norm(np.ones(4, np.float32))
assert replays()
if os.fork() == 0:
    os._exit(int(replays()))
sys.exit(os.waitstatus_to_exitcode(os.wait()[1]))
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="there forked threads can be lived with")
def test_a_forked_child_replays_nothing():
    """Its parent's threads are not there; the kernels themselves say so."""
    environment = {**os.environ, "NUMBA_THREADING_LAYER": "omp"}
    subprocess.run([sys.executable, "-W", "ignore", "-c", CHILD], env=environment, cwd=ROOT, check=True)


@pytest.mark.parametrize(("value", "says"), [("0", "False"), ("1", "True"), ("yes", "must be 0 or 1")])
def test_the_setting(value, says):
    code = "from abi_py.kernels.engine.replay import replays; print(replays())"
    environment = {**os.environ, "ABI_REPLAY": value}
    found = subprocess.run([sys.executable, "-c", code], env=environment, cwd=ROOT, capture_output=True, text=True)
    assert says in found.stdout + found.stderr


def test_replays_here():
    assert replays() == (os.environ.get("ABI_REPLAY") != "0")
