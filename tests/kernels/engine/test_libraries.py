"""A kernel becomes machine code once, as a whole, and lacks nothing when another process loads it."""

import os
import subprocess
import sys

import numba
import numpy as np
import pytest

from abi_py.kernels.engine import libraries
from abi_py.kernels.engine.jit import JIT, helper, kernel, prange

pytestmark = pytest.mark.skipif(not JIT, reason="nothing is compiled")

KERNEL = """
import numpy as np
from abi_py.kernels.engine.jit import helper, kernel, prange

@helper
def third(x):
    return x / 3

@helper
def checked(count):
    if count < 0:
        raise ValueError("too few", count)
    return count

@kernel
def fill(out, count):
    n = checked(count)
    for i in prange(len(out)):
        row = np.empty(2, np.float32)
        row[:] = third(np.float32(i))
        out[i] = row.sum() + n

out = np.zeros(5, np.float32)
fill(out, 1)
try:
    fill(out, -7)
except ValueError as error:
    print(error.args, out.tobytes().hex(), fill.compiled.stats.cache_hits)
"""


@helper
def _halved(x):
    return x / 2


@kernel
def _fill(out, factor):
    for i in prange(len(out)):
        out[i] = _halved(factor * i)


def test_a_kernel_is_optimised_once(monkeypatch):
    """Its helper, the body of its loop and what calls that on a thread are parts of it."""
    finished = []
    optimize = libraries._Library._optimize_final_module

    def counted(library):
        finished.append(library.name)
        optimize(library)

    monkeypatch.setattr(libraries._Library, "_optimize_final_module", counted)
    monkeypatch.setattr(_fill.compiled._cache, "load_overload", lambda types, target: None)
    monkeypatch.setattr(_fill.compiled._cache, "save_overload", lambda types, data: None)
    out = np.zeros(4, np.float32)
    _fill(out, np.float32(3))
    assert out.tolist() == [0, 1.5, 3, 4.5]
    assert finished == ["_fill"]


def test_what_is_compiled_elsewhere_stays_numbas():
    """A kernel's helper, too, which is finished where something else needs it."""
    _fill(np.zeros(4, np.float32), np.float32(3))

    @numba.njit
    def elsewhere(x):
        return _halved(x) + 1

    assert elsewhere(3.0) == 2.5
    (compiled,) = elsewhere.overloads.values()
    assert not isinstance(compiled.library, libraries._Library)


def test_a_kernel_from_the_cache_is_whole(tmp_path):
    """Errors of its helpers included, whose values a variable of the machine code leads to."""
    (tmp_path / "whole.py").write_text(KERNEL)
    environment = {**os.environ, "ABI_CACHE_DIR": str(tmp_path)}
    environment["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
    words = [sys.executable, str(tmp_path / "whole.py")]
    runs = [
        subprocess.run(words, env=environment, capture_output=True, text=True, check=True).stdout for _ in range(2)
    ]
    expected = (np.arange(5, dtype=np.float32) / 3 * 2 + 1).astype(np.float32)
    for run in runs:
        assert run.startswith(f"('too few', -7) {expected.tobytes().hex()}")
    assert runs[0] != runs[1]  # the second found it in the cache
