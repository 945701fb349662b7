"""Kernels give the same bits from the compiler and from the cache."""

import copy
import os
import subprocess
import sys
from pathlib import Path

import pytest

from abi_py.kernels.engine.calls import Kernel
from abi_py.kernels.engine.jit import JIT

ROOT = Path(__file__).resolve().parents[3]

BITS = """
import hashlib
import numpy as np
from abi_py.kernels.cross_entropy import cross_entropy
from abi_py.kernels.optimizers import adamw_, parameter_chunks
from abi_py.kernels.rms_norm import rms_norm_backward, rms_norm_forward
from abi_py.kernels.rope import rope_forward, rope_table
from abi_py.kernels.swiglu import swiglu_backward, swiglu_forward
rng = np.random.default_rng(3)
x, y, dx, gates, dgates = (rng.standard_normal((37, c)).astype(np.float32) for c in (48, 48, 48, 96, 96))
w, dw, r = rng.standard_normal(48).astype(np.float32), np.zeros(48, np.float32), np.empty(37, np.float32)
rms_norm_forward(y, r, x, w, 1e-5)
rms_norm_backward(dx, dw, y, x, w, r, True)
rope_forward(x, *rope_table(37, 8, 1e4), np.arange(37, dtype=np.int32), 4)
swiglu_forward(y, gates)
swiglu_backward(dgates, dx, gates)
losses, hits, labels = np.empty(37, np.float32), np.empty(37, np.uint8), np.arange(37, dtype=np.int32)
cross_entropy(gates, losses, hits, losses.copy(), labels, np.ones_like(losses), np.arange(37), 0, 0.1, 0.0, 0.5, True)
p, m, v, g = (np.abs(rng.standard_normal(1000)).astype(np.float32) for _ in range(4))
adamw_(p, m, v, g, *parameter_chunks([0], [1000], [True]), 1e-2, 0.9, 0.999, 1e-8, 0.1, 7, 0.3)
print(hashlib.sha256(b"".join(a.tobytes() for a in (x, y, dx, dw, r, gates, dgates, losses, p, m, v))).hexdigest())
"""


@pytest.mark.skipif(not JIT, reason="nothing is compiled")
def test_the_process_that_compiles_and_the_next_give_the_same_bits(tmp_path):
    environment = {**os.environ, "ABI_CACHE_DIR": str(tmp_path), "PYTHONPATH": str(ROOT)}
    runs = [
        subprocess.run([sys.executable, "-c", BITS], env=environment, capture_output=True, text=True, check=True).stdout
        for _ in range(2)
    ]
    assert list(tmp_path.rglob("*.kernel"))  # the second did load something
    assert runs[0] == runs[1]


@pytest.mark.skipif(not JIT, reason="Python's own functions")
def test_a_kernel_is_copied_as_functions_are():
    from abi_py.kernels.streamed_matmul import _streamed as kernel

    assert isinstance(kernel, Kernel)
    assert copy.deepcopy(kernel) is copy.copy(kernel) is kernel
