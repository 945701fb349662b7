"""Threads: how many are used, that several Python threads may compute at once, and what a fork does."""

import os
import subprocess
import sys
import threading
from pathlib import Path

import numba
import numpy as np
import pytest
from waiting import PATIENCE

import abi_py
from abi_py.config import Precision
from abi_py.generation import GenerationConfig, Generator
from abi_py.kernels.engine import threads
from abi_py.kernels.engine.jit import JIT
from abi_py.kernels.engine.threads import SMALL, TINY, TRIALS, thread_count, threads_as_before, threads_for

ROOT = Path(__file__).resolve().parents[3]


# -- how many --------------------------------------------------------------------------------------


def test_what_is_small_runs_on_one_thread_and_leaves_the_number_as_it_was():
    before = numba.get_num_threads()
    with threads_for(1e3):
        assert numba.get_num_threads() == 1
    assert numba.get_num_threads() == before
    with threads_for(1e12):
        assert numba.get_num_threads() == before
    with pytest.raises(KeyError), threads_for(0):
        raise KeyError
    assert numba.get_num_threads() == before


def test_thread_count_is_numbas():
    before = numba.get_num_threads()
    try:
        for count in (1, 2):
            numba.set_num_threads(count)
            assert thread_count() == count
    finally:
        numba.set_num_threads(before)


@pytest.mark.parametrize("faster", [1, 2])
def test_both_are_tried_and_the_faster_is_kept(monkeypatch, faster):
    """A clock that gives the steps of one kind half the time; the very first of each takes long and does not count."""
    clock = [0.0]
    monkeypatch.setattr(threads, "_small", threads._Small())
    monkeypatch.setattr(threads.time, "perf_counter", lambda: clock[0])
    before, used = numba.get_num_threads(), []
    try:
        numba.set_num_threads(2)
        for number in range(2 * TRIALS + 3):
            with threads_for((TINY + SMALL) / 2):
                used.append(numba.get_num_threads())
                clock[0] += 100 if number < 2 else 1 if used[-1] == faster else 2
            with threads_as_before(SMALL):
                assert numba.get_num_threads() == used[-1]
            with threads_as_before(SMALL + 1):
                assert numba.get_num_threads() == 2
            assert numba.get_num_threads() == 2
    finally:
        numba.set_num_threads(before)
    assert used == [1, 2] * TRIALS + [faster] * 3


# -- several Python threads ------------------------------------------------------------------------


def config(seed):
    return abi_py.TrainableModelConfig(
        **{"hidden_dim": 32 + 16 * seed, "num_layers": 2, "num_heads": 2, "num_kv_heads": 1, "intermediate_dim": 48},
        **{"vocab_size": 61, "max_seq_len": 40, "seed": seed},
    )


def trained(seed, steps=30):
    """Return the weights of a model of its own after some steps, the second one in bfloat16."""
    model, random = abi_py.TrainableModel(config(seed)), np.random.default_rng(seed)
    for _ in range(steps):
        ids = random.integers(0, 61, (3, 40))
        model.zero_gradients()
        model.compute_loss(ids, ids, backward=True, precision=Precision.BF16 if seed else Precision.FP32)
        model.distribute_weights(model.collect_weights() - np.float32(0.05) * model.parameters.gradients_flat)
    return model.collect_weights().tobytes()


def written(seed):
    """Return the ids that a model of its own writes after long prompts, whose reading takes most of the time."""
    model = abi_py.TrainableModel(config(seed).replace(hidden_dim=160 + 16 * seed, num_heads=4, max_seq_len=256))
    settings = GenerationConfig(max_new_tokens=12, temperature=0.9, seed=seed)
    prompts = np.random.default_rng(seed).integers(0, 61, (30, 240)).tolist()
    return [result.ids.tolist() for result in Generator(model).run(prompts, settings)]


def at_once(function):
    """Return what two threads get that begin together."""
    results, meet = {}, threading.Barrier(2)

    def run(seed):
        meet.wait()
        results[seed] = function(seed)

    threads = [threading.Thread(target=run, args=(seed,)) for seed in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return [results[0], results[1]]


@pytest.mark.parametrize("function", [trained, written])
def test_two_threads_get_what_each_gets_alone(function):
    if not JIT and function is trained:
        pytest.skip("slow without compiling; no thread is then in a kernel for long")
    alone = [function(seed) for seed in (0, 1)]
    assert [function(seed) for seed in (1, 0)] == alone[::-1]
    assert at_once(function) == alone


def run(code, **environment):
    """Run Python code in a process of its own and return what it prints."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **environment}
    words = [sys.executable, "-W", "ignore", "-c", code]
    done = subprocess.run(words, env=environment, capture_output=True, text=True, check=False, timeout=PATIENCE)
    assert done.returncode == 0, done.stderr
    return done.stdout


MULTIPLY = """
import os, sys, threading
import numpy as np
from abi_py.kernels.matmul import matmul
x = np.random.default_rng(1).standard_normal((130, 130)).astype(np.float32)
def multiply():
    return matmul(x, x).tobytes()
"""


@pytest.mark.skipif(not JIT, reason="nothing runs in parallel")
def test_numbas_own_pool_takes_one_call_at_a_time():
    """It ends the process with SIGABRT where two threads begin parallel loops at once."""
    code = (
        MULTIPLY
        + """
expected, found = multiply(), []
def many():
    for _ in range(300):
        found.append(multiply() == expected)
threads = [threading.Thread(target=many) for _ in range(2)]
for thread in threads: thread.start()
for thread in threads: thread.join()
import numba
print(numba.threading_layer(), len(found), all(found))
"""
    )
    assert run(code, NUMBA_THREADING_LAYER="workqueue").split() == ["workqueue", "600", "True"]


# -- forks -----------------------------------------------------------------------------------------

FORK = """
def in_child():
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        try:
            print("computed" if multiply() else "")
        except RuntimeError as error:
            print(error)
        sys.stdout.flush()
        os._exit(0)
    print("exit", os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


@pytest.mark.skipif(not (JIT and hasattr(os, "fork")), reason="nothing runs in parallel, or there is no fork")
@pytest.mark.parametrize("layer", ["omp", "workqueue"])
def test_a_child_computes_or_says_why_not(layer):
    """GNU's OpenMP ends such a child with SIGTERM, or lets it wait for ever."""
    if layer == "omp":
        pytest.importorskip("numba.np.ufunc.omppool")
    lines = run(MULTIPLY + FORK + "in_child(); multiply(); in_child(); multiply()", NUMBA_THREADING_LAYER=layer)
    before, first, after, second = lines.splitlines()
    assert (before, first, second) == ("computed", "exit 0", "exit 0")
    if layer == "omp" and sys.platform == "linux":
        assert "OpenMP's threads do not survive a fork" in after
        assert 'multiprocessing.get_context("spawn")' in after
    else:
        assert after == "computed"
