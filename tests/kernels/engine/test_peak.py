"""The measured peak: the right work is done and counted, with the threads in use."""

import os
import threading

import numba
import numpy as np
import pytest

from abi_py.kernels.engine import peak
from abi_py.kernels.engine.jit import JIT
from abi_py.kernels.engine.number_formats import BF16X3, BF16X6, BFLOAT16, FLOAT32
from abi_py.kernels.engine.threads import CORES

ROWS, COLUMNS = FLOAT32.rows, FLOAT32.columns


def test_the_tile_is_repeated_as_often_as_is_counted():
    c = np.zeros((2, ROWS, COLUMNS), np.float32)
    a, b = np.ones((2, 3 * ROWS), np.float32), np.full((2, 3 * COLUMNS), 2, np.float32)
    peak._repeat_tile(c, a, b, 3, 5, FLOAT32.table)
    assert (c == 3 * 2 * 5).all()  # depth 3, one times two, five times: nothing was left out by the compiler
    for kind in (one for choice in (BFLOAT16, BF16X3, BF16X6) for one in choice.usable.values()):
        c, depth = np.zeros((2, kind.rows, kind.columns), np.float32), kind.depth_of(2 * kind.unit)
        a, b = np.ones((2, depth * kind.rows), np.float32), np.full((2, depth * kind.columns), 2, np.float32)
        peak._repeat_tile(c, a, b, depth, 5, kind.table)
        products = {1: 1, 2: 3, 3: 6}[kind.parts]
        # A pair is 1 (or 2) in the upper half, 0 in the lower: one term for each place, or for those of all parts.
        assert (c == depth // kind.parts * products * 2 * 5).all()


def test_operations_are_counted_by_the_clock(monkeypatch):
    """With threads that take a second, or two, the figure can be worked out by hand."""
    seconds = iter(range(1000))
    calls, took = [], [1.0, 2.0]

    def repeat(c, a, b, depth, times, table):
        calls.append((len(c), depth, times))
        return took[: len(c)]

    monkeypatch.setattr(peak.time, "perf_counter", lambda: float(next(seconds)))
    monkeypatch.setattr(peak, "_repeat_tile", repeat)
    before = numba.get_num_threads()
    try:
        numba.set_num_threads(1)
        one = peak.measured_peak(3)
        numba.set_num_threads(2)
        two = peak.measured_peak(3)
    finally:
        numba.set_num_threads(before)
    assert one == 2 * ROWS * COLUMNS * peak.DEPTH * calls[1][2]  # in one second
    assert two == 1.5 * one
    assert peak.measured_peak(3, BFLOAT16) > 0
    assert {call[0] for call in calls} == {1, 2}
    took = [1.0] * before
    for choice in (BF16X3, BF16X6):
        calls.clear()
        kind, found = choice.chosen, peak.measured_peak(3, choice)
        _, depth, times = calls[1]
        threads, terms = calls[1][0], depth * kind.fold // kind.parts  # a product of parts counts once
        assert kind.depth_of(terms) == depth <= peak.DEPTH
        assert found == 2 * threads * kind.rows * kind.columns * terms * times


def test_threads_that_nobody_waits_for_end(monkeypatch):
    """Ctrl-C in the middle: the others are not left at the barrier, and keep the arrays that they write to."""
    c = np.zeros((3, ROWS, COLUMNS), np.float32)
    a, b = np.ones((3, 3 * ROWS), np.float32), np.ones((3, 3 * COLUMNS), np.float32)
    started, start = [], threading.Thread.start

    def only_one(self):
        if started:
            raise KeyboardInterrupt
        started.append(self)
        start(self)

    monkeypatch.setattr(threading.Thread, "start", only_one)
    monkeypatch.setattr(threading, "excepthook", lambda _: None)  # a broken barrier is what the thread ends with
    with pytest.raises(KeyboardInterrupt):
        peak._repeat_tile(c, a, b, 3, 5, FLOAT32.tile_table)
    started[0].join(10)
    assert not started[0].is_alive()
    assert not c.any()


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="no threads are bound to cores here")
def test_threads_run_on_all_cores_of_the_process():
    """As with OMP_PROC_BIND, which binds the thread that starts the others to one core."""
    cores, where = os.sched_getaffinity(0), []
    c = np.zeros((2, ROWS, COLUMNS), np.float32)
    a, b = np.ones((2, 3 * ROWS), np.float32), np.ones((2, 3 * COLUMNS), np.float32)
    real = peak._loop
    try:
        os.sched_setaffinity(0, {min(cores)})
        peak._loop = lambda table: lambda *arguments: where.append(os.sched_getaffinity(0))
        peak._repeat_tile(c, a, b, 3, 5, FLOAT32.tile_table)
    finally:
        peak._loop = real
        os.sched_setaffinity(0, cores)
    assert sorted(where, key=len) == sorted([{min(cores)}, set(CORES)], key=len)


@pytest.mark.skipif(not JIT, reason="plain Python has no peak")
def test_a_peak_is_plausible():
    figure = peak.measured_peak(0.02)
    assert 1e8 < figure < 1e14  # operations per second: between a toy and a large server
