"""What a training step holds in memory: as much as the plan says, and not more from step to step.

Each in a process of its own, whose peak the system counts, so that no other test and no other program changes it.
"""

import json
import subprocess
import sys

import pytest

from abi_py.kernels.engine.jit import JIT

MIB = 2**20
BESIDES = 8 * MIB  # what Python and NumPy make in a step; measured: 0.2 to 0.8
PLANNED = {("fp32", 1): 366, ("fp32", 2): 404, ("bf16", 1): 327}  # MiB; a step may not need more
STEPS = """
import json, re, sys
import numpy as np
from abi_py.config import LlmTrainingConfig, Precision, TrainableModelConfig
from abi_py.model import TrainableModel
from abi_py.training.trainer import LlamaTrainer

def held(what="VmHWM"):
    with open("/proc/self/status") as status:
        return 1024 * int(re.search(what + r":\\s*(\\d+) kB", status.read())[1])

def trainer(precision, accumulated, **sizes):
    shape = {"num_heads": 8, "num_kv_heads": 8, "vocab_size": 8000, "max_seq_len": 256, **sizes}
    config = LlmTrainingConfig(batch_size=4, max_seq_len=256, grad_accum_steps=accumulated, mixed_precision=precision)
    return LlamaTrainer(TrainableModel(TrainableModelConfig(**shape)), config)

precision, accumulated = sys.argv[1], int(sys.argv[2])
ids = np.arange(1024, dtype=np.uint32).reshape(4, 256)
small = trainer(precision, accumulated, hidden_dim=64, num_layers=1, intermediate_dim=64)
for _ in range(2 * accumulated):  # loads the code of everything
    small.train_step(ids, ids)
del small
before = held("VmRSS")
large = trainer(precision, accumulated, hidden_dim=512, num_layers=4, intermediate_dim=1536)
peaks = []
for _ in range(3):
    for _ in range(accumulated):
        large.train_step(ids, ids)
    peaks.append(held() - before)
plan = large.model.memory_plan(4, 256, Precision(precision), accumulates=accumulated > 1)
print(json.dumps([sum(plan.values()), peaks]))
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the peak of a process is read from /proc")
@pytest.mark.skipif(not JIT, reason="plain Python makes arrays in every operation")
@pytest.mark.parametrize(("precision", "accumulated"), [("fp32", 1), ("fp32", 2), ("bf16", 1)])
def test_the_peak_of_a_step_is_what_is_planned(precision, accumulated):
    command = [sys.executable, "-c", STEPS, precision, str(accumulated)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    planned, peaks = json.loads(done.stdout)
    print(f"planned {planned / MIB:.1f} MiB, peaks {', '.join(f'{peak / MIB:.1f}' for peak in peaks)}")
    assert planned <= (PLANNED[precision, accumulated] + 1) * MIB
    assert planned * 0.95 < peaks[0] < planned + BESIDES  # all that is planned is touched, and little besides
    assert peaks[-1] - peaks[0] < 4 * MIB
