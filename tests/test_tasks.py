"""Enough tasks for many threads, counted; and that more threads than cores change no bit."""

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from waiting import PATIENCE

from abi_py.kernels.engine.jit import JIT

ROOT = Path(__file__).resolve().parents[1]
NAMES = ("arithmetic", "shapes", "tasks")
# Kernels that have fewer tasks than threads, or less even ones, and why (docs/5-many-cores.md).
FEW_SUMS = "norms dx"  # one thread adds the partial sums
SMALL = {"tiny": {"w_q w_k w_v dw", "w_o dw", "w_gate w_up dw", "attention dx", "embedding dx", "global norm", "AdamW"}}


@pytest.fixture(scope="module")
def tasks():
    sys.path.insert(0, str(ROOT / "bench"))
    try:
        yield importlib.import_module("tasks")
    finally:
        sys.path.remove(str(ROOT / "bench"))
        for name in NAMES:
            sys.modules.pop(name, None)


@pytest.mark.parametrize("threads", [8, 32, 128])
@pytest.mark.parametrize("name", ["tiny", "small", "deepzig", "deepzig-gqa", "long", "medium"])
def test_every_kernel_of_a_step_has_work_for_all(tasks, name, threads):
    for kernel, found in tasks.kernels(tasks.SHAPES[name], threads).items():
        if kernel in SMALL.get(name, ()) or (kernel == FEW_SUMS and threads > 32):
            continue
        assert found.tasks() >= 0.75 * threads, kernel
        assert found.imbalance(threads) <= 1.5, kernel


@pytest.mark.parametrize(("threads", "least"), [(8, 0.75), (32, 0.65), (128, 0.4)])
def test_most_of_the_threads_time_is_useful(tasks, threads, least):
    for name, shape in tasks.SHAPES.items():
        if name != "demo":  # one thread is faster there
            assert tasks.efficiency(shape, threads) >= least, name


def test_scratch_for_128_threads_fits_a_machine_that_has_them(tasks):
    assert sum(tasks.scratch_megabytes(64, 128)) < 1000
    assert sum(tasks.scratch_megabytes(64, 128)) == pytest.approx(64 * sum(tasks.scratch_megabytes(64, 2)))


def test_the_page_has_the_tables():
    done = subprocess.run([sys.executable, ROOT / "bench/tasks.py", "--check"], check=False)
    assert done.returncode == 0, "run `python bench/tasks.py --write`"


STEPS = """
import hashlib, json, sys
import numba, numpy as np
import abi_py as abi

def weights(threads, precision):
    numba.set_num_threads(threads)
    model = abi.TrainableModel(abi.TrainableModelConfig(
        hidden_dim=96, num_layers=1, num_heads=4, num_kv_heads=2, intermediate_dim=64, vocab_size=67, max_seq_len=64))
    trainer = abi.LlamaTrainer(model, abi.LlmTrainingConfig(
        batch_size=8, max_seq_len=64, grad_accum_steps=1, warmup_steps=1, mixed_precision=precision))
    ids = np.random.default_rng(0).integers(0, 67, (8, 65)).astype(np.int32)
    trainer.train_step(ids[:, :-1].copy(), ids[:, 1:].copy())
    return hashlib.sha256(model.parameters.weights_flat.tobytes()).hexdigest()

print(json.dumps({precision: [weights(threads, precision) for threads in map(int, sys.argv[1:])]
                  for precision in ("fp32", "bf16")}))
"""


@pytest.mark.skipif(not JIT, reason="threads are Numba's")
def test_more_threads_than_cores_give_the_bits_of_one():
    """A whole step of 180 million operations, beyond what runs on one thread by itself."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "NUMBA_NUM_THREADS": "32"}
    words = [sys.executable, "-c", STEPS, "1", "8", "32"]
    done = subprocess.run(words, capture_output=True, text=True, timeout=PATIENCE, env=environment)
    assert done.returncode == 0, done.stderr
    for precision, found in json.loads(done.stdout).items():
        assert len(found) == 3
        assert len(set(found)) == 1, precision
