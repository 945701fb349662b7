"""The instruction sets: each on this machine, and what they say of themselves."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from abi_py.kernels.engine import simd
from abi_py.kernels.engine.jit import JIT
from abi_py.kernels.engine.simd import ISAS, LANES

ROOT = Path(__file__).resolve().parents[3]
TESTS = "tests/kernels"


def test_description():
    said = simd.describe()
    assert said["simd"] in ISAS
    assert said["host"] in ISAS
    assert said["lanes"] == LANES


def test_tiles_fit_the_registers():
    registers = {"avx512": 32, "avx2": 16, "neon": 32, "generic": 16}
    for name, isa in ISAS.items():
        for rows, vectors in isa.tiles:
            assert rows * vectors + vectors + 1 <= registers[name]
        assert (isa.tile_rows, isa.tile_columns) == (isa.tiles[0][0], isa.tiles[0][1] * isa.lanes)


def in_child(arguments, **changes):
    """Run Python with the project on its path and other environment variables."""
    environment = {key: value for key, value in os.environ.items() if key not in ("ABI_SIMD", "NUMBA_DISABLE_JIT")}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), environment.get("PYTHONPATH", "")])
    environment.update(changes)
    command = [sys.executable, *arguments]
    return subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("path", [*ISAS, "plain Python"])
def test_every_path(path):
    """Run this file, a product and an attention with each other instruction set, and with nothing compiled."""
    if not JIT or os.environ.get("ABI_SIMD"):
        pytest.skip("this is such a run already")
    if path == simd.describe()["simd"]:
        pytest.skip("all other tests run with it")
    selected = [
        f"{TESTS}/engine/test_simd.py",
        f"{TESTS}/engine/test_vectors.py",
        f"{TESTS}/engine/test_tiles.py",
        f"{TESTS}/test_matmul.py::test_edges_of_the_tile",
        f"{TESTS}/engine/test_panels.py",
        f"{TESTS}/test_attention.py::test_kernels_equal_the_reference",
        f"{TESTS}/test_attention.py::test_segments_equal_the_reference",
        f"{TESTS}/test_attention.py::test_stored_in_bfloat16",
        f"{TESTS}/test_cached_attention.py::test_kernel_equals_the_reference",
        f"{TESTS}/test_streamed_matmul.py",
    ]
    changes = {"NUMBA_DISABLE_JIT": "1"} if path == "plain Python" else {"ABI_SIMD": path}
    done = in_child(["-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", "not every_path", *selected], **changes)
    assert done.returncode == 0, done.stdout + done.stderr


def test_an_unknown_instruction_set_is_refused():
    done = in_child(["-c", "import abi_py.kernels.engine.simd"], ABI_SIMD="sse9")
    assert done.returncode != 0
    assert "ABI_SIMD (sse9) must be one of avx512, avx2, neon, generic" in done.stderr
