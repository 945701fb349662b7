"""The two decorators, the only callers of Numba's own in the house, and the key of the disk cache.

    kernel     a function called from Python; loops over `prange` run on all threads
    helper     a function called from kernels, and part of them; never parallel itself

    threads_for    run what is too small to share on one thread;  threads_as_before: and what follows it
    thread_count   how many threads are in use

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
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import llvmlite
import llvmlite.binding as llvm
import numba
import numpy as np
from numba import config, njit, prange
from numba.extending import register_jitable
from numba.np.ufunc import parallel

__all__ = [
    "CACHE_DIRECTORY",
    "JIT",
    "PASS",
    "cache_directory",
    "helper",
    "kernel",
    "prange",
    "thread_count",
    "threads_as_before",
    "threads_for",
]

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


CACHE_DIRECTORY = cache_directory()  # of this process


def kernel(function: Callable[..., Any]) -> Any:
    """Compile a function that Python calls, at its first call; `prange` loops in it run in parallel."""
    # Numba reads CACHE_DIR when it decorates; setting it only here leaves the user's own Numba functions alone.
    before, numba_config.CACHE_DIR = numba_config.CACHE_DIR, str(CACHE_DIRECTORY)
    try:
        # A dictionary, because the types that Numba declares for `njit` lack one of the options.
        options: dict[str, Any] = {"parallel": True, "cache": True, "nogil": True, "no_cfunc_wrapper": True}
        return njit(error_model="numpy", **options)(function)
    finally:
        numba_config.CACHE_DIR = before


def helper(function: Callable[..., Any]) -> Any:
    """Compile a function into the kernels that call it; never parallel.

    Python runs it uncompiled, and only if it uses no intrinsic.
    """
    return register_jitable(error_model="numpy")(function)


def thread_count() -> int:
    """Return how many threads kernels now use.

    As `numba.get_num_threads`, which takes a lock between processes at each call, 3 us; a small step asks thirty times.
    """
    if not _asking:
        numba.get_num_threads()  # starts the threads
        _asking.append(getattr(parallel, "_get_num_threads", numba.get_num_threads))
    return int(_asking[0]())


_asking: list[Callable[[], int]] = []

# Whether a second thread pays for small work depends on what it costs to start a parallel region, 0.5 to 20 us, fifty
# of them in a step, and that on the machine and the hour (docs/log.md).  Between these limits both are tried.
TINY, SMALL = 1e6, 100e6  # operations
TRIALS = 8  # of each
PASS = 200  # operations of one core in the time that a pass over the weights (norm, update) takes for one of them


class _Trials:
    """Which of two numbers of threads is faster for one kind of work; the best time of each counts."""

    def __init__(self) -> None:
        self.best = {True: float("inf"), False: float("inf")}  # on one thread?
        self.count = 0

    def alone(self) -> bool:
        """Say whether the work is to run on one thread this time."""
        if self.count < 2 * TRIALS:
            return self.count % 2 == 0
        return self.best[True] < self.best[False]

    def took(self, alone: bool, seconds: float) -> None:
        """Count a time; the first of each is not: it compiles, or fills the caches."""
        if 2 <= self.count < 2 * TRIALS:
            self.best[alone] = min(self.best[alone], seconds)
        self.count += 1


_trials: dict[tuple[float, int], _Trials] = {}
_last = {"alone": True}  # how the last small work ran


@contextlib.contextmanager
def threads_for(operations: float) -> Iterator[None]:
    """Run the kernels inside on one thread where there are too few operations to share; the bits are the same."""
    threads = thread_count()
    if threads == 1 or operations > SMALL:
        yield
        return
    trials = _trials.setdefault((operations, threads), _Trials())
    _last["alone"] = alone = operations < TINY or trials.alone()
    began = time.perf_counter()
    with _one_thread(alone):
        yield
    trials.took(alone, time.perf_counter() - began)


def threads_as_before(operations: float) -> contextlib.AbstractContextManager[None]:
    """Run what follows a step (norm, update) on the threads on which that ran: its results are in their caches."""
    return _one_thread(operations <= SMALL and _last["alone"])


@contextlib.contextmanager
def _one_thread(wanted: bool) -> Iterator[None]:
    threads = thread_count()
    if not wanted or threads == 1:
        yield
        return
    numba.set_num_threads(1)
    try:
        yield
    finally:
        numba.set_num_threads(threads)
