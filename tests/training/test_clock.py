"""The clock: what is counted as a run's time, and as training's; speed from mark to mark."""

import pytest

from abi_py.training.clock import Clock
from abi_py.training.state import TrainingState


@pytest.fixture
def after(monkeypatch):
    """Return a function that lets so many nanoseconds go by."""
    now = [1000]
    monkeypatch.setattr("abi_py.training.clock.time.perf_counter_ns", lambda: now[0])

    def wait(nanoseconds):
        now[0] += nanoseconds

    return wait


def test_a_run_is_timed_in_the_loop_alone_and_goes_on_from_what_was_saved(after):
    clock = Clock(TrainingState(elapsed_ns=50))
    after(7)
    assert clock.elapsed() == 50
    clock.start()
    after(30)
    assert clock.elapsed() == 80
    with clock.training():
        after(10)
    assert (clock.elapsed(), clock.state.train_ns) == (90, 10)
    after(5)
    clock.stop()
    after(1000)
    assert clock.elapsed() == clock.state.elapsed_ns == 95


def test_without_a_loop_the_time_of_the_steps_counts(after):
    clock = Clock(TrainingState())
    for _ in range(3):
        after(100)
        with clock.training():
            after(10)
    assert clock.elapsed() == 30


def test_throughput_is_counted_from_the_mark_and_leaves_out_what_is_not_training(after):
    clock = Clock(TrainingState(tokens_processed=500, train_ns=70))
    clock.start()
    assert clock.measure() == 0.0
    for expected in (40.0, 60.0):  # the second step is faster: 40 and 80 tokens in a second each
        with clock.training():
            after(10**9)
        clock.state.tokens_processed += 40 if expected == 40 else 80
        after(10**12)  # an evaluation
        assert clock.measure() == clock.throughput == expected
    clock.mark()
    with clock.training():
        after(2 * 10**9)
    clock.state.tokens_processed += 10
    assert clock.measure() == 5.0
