"""The two decorators, the only callers of Numba's `njit` in the house, and the key of the disk cache.

    kernel     a function called from Python; loops over `prange` run on all threads
    helper     a function called from kernels; never parallel itself

    threads_for    run what is too small to share on one thread

Numba's disk cache hashes only the file in which a function stands.  A kernel that calls a helper of another file
would keep the old helper after an edit, so everything that a compiled kernel depends on goes into the *name* of the
cache directory: the text of all of `kernels/`, the versions of Python, Numba, llvmlite and NumPy, the processor and its
features, the SIMD override, and those settings of Numba that change the code it makes.

No fast-math flag at all.  NaN stays NaN, and bits stay what they are: Numba optimises a helper once for the process
that compiles it, and once more inside the kernel that goes into the cache, so wherever a flag leaves the compiler a
choice, the process that compiled and the next one, which loads from the cache, may choose differently (measured, see
docs/log.md).  Sums that are to be vectors are spelt out in `simd.py`.
"""

import contextlib
import hashlib
import os
import platform
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import llvmlite
import llvmlite.binding as llvm
import numba
import numpy as np
from numba import config, njit, prange

__all__ = ["JIT", "PASS", "cache_directory", "helper", "kernel", "prange", "threads_for"]

numba_config: Any = config  # its fields are made at run time: type checkers know none of them

JIT = not numba_config.DISABLE_JIT  # False under NUMBA_DISABLE_JIT=1: intrinsics then use their plain-Python twins

# What Numba's environment variables (NUMBA_OPT ...) set, and its own index of cached code does not record.
NUMBA_SETTINGS = (
    *("OPT", "LOOP_VECTORIZE", "SLP_VECTORIZE", "ENABLE_AVX", "USING_SVML", "BOUNDSCHECK", "DEBUGINFO_DEFAULT"),
    *("CPU_NAME", "CPU_FEATURES"),
)


def cache_directory() -> Path:
    """Return the directory of compiled kernels; its name changes whenever anything that they depend on does.

    `ABI_CACHE_DIR` chooses the parent directory (default: `$XDG_CACHE_HOME/abi_py`, or `~/.cache/abi_py`).
    """
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).resolve().parent.glob("*.py")):
        digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    features = llvm.get_host_cpu_features().flatten()
    host = platform.machine(), llvm.get_host_cpu_name(), features
    versions = (sys.version, numba.__version__, llvmlite.__version__, np.__version__, *host)
    settings = (os.environ.get("ABI_SIMD", ""), *(getattr(numba_config, name, None) for name in NUMBA_SETTINGS))
    digest.update(repr(versions + settings).encode())
    fallback = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "abi_py"
    return Path(os.environ.get("ABI_CACHE_DIR") or fallback) / digest.hexdigest()[:16]


_CACHE_DIRECTORY = str(cache_directory())


def _compile_lazily(function: Callable[..., Any], **options: Any) -> Any:
    # Numba reads CACHE_DIR when it decorates; setting it only here leaves the user's own Numba functions alone.
    before, numba_config.CACHE_DIR = numba_config.CACHE_DIR, _CACHE_DIRECTORY
    try:
        return njit(error_model="numpy", nogil=True, cache=True, **options)(function)
    finally:
        numba_config.CACHE_DIR = before


def kernel(function: Callable[..., Any]) -> Any:
    """Compile a function that Python calls, at its first call; `prange` loops in it run in parallel."""
    return _compile_lazily(function, parallel=True)


def helper(function: Callable[..., Any]) -> Any:
    """Compile a function that kernels call; it is never parallel."""
    return _compile_lazily(function)


# Operations of a step below which one thread is faster: starting a parallel region costs 2 to 20 us, a step has some
# fifty of them, and one thread does 50 million operations in half a millisecond (docs/log.md).
SMALL = 50e6
PASS = 200  # operations of one core in the time that a pass over the weights (norm, update) takes for one of them


@contextlib.contextmanager
def threads_for(operations: float) -> Iterator[None]:
    """Run the kernels inside on one thread if there are few operations to share; the bits are the same."""
    threads = numba.get_num_threads()
    if threads == 1 or operations > SMALL:
        yield
        return
    numba.set_num_threads(1)
    try:
        yield
    finally:
        numba.set_num_threads(threads)
