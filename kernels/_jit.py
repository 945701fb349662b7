"""The two decorators, the only callers of Numba's own in the house.

    kernel     a function called from Python; loops over `prange` run on all threads
    helper     a function called from kernels, and part of them; never parallel itself

    threads_for    run what is too small to share on one thread;  threads_as_before: and what follows it
    thread_count   how many threads are in use

No fast-math flag at all.  NaN stays NaN, and bits stay what they are: Numba optimises a helper once for the process
that compiles it, and once more inside the kernel that goes into the cache, so wherever a flag leaves the compiler a
choice, the process that compiled and the next one, which loads from the cache, may choose differently (measured, see
docs/log.md).  Sums that are to be vectors are spelt out in `simd.py`.
"""

import contextlib
import time
from collections.abc import Callable, Iterator
from typing import Any

import numba
from numba import njit, prange
from numba.extending import register_jitable
from numba.np.ufunc import parallel

from ._cache import KernelCache, numba_config

__all__ = [
    "JIT",
    "PASS",
    "helper",
    "kernel",
    "prange",
    "thread_count",
    "threads_as_before",
    "threads_for",
]

JIT = not numba_config.DISABLE_JIT  # False under NUMBA_DISABLE_JIT=1: intrinsics then use their plain-Python twins


def kernel(function: Callable[..., Any]) -> Any:
    """Compile a function that Python calls, at its first call; `prange` loops in it run in parallel."""
    # A dictionary, because the types that Numba declares for `njit` lack one of the options.
    options: dict[str, Any] = {"parallel": True, "nogil": True, "no_cfunc_wrapper": True}
    compiled: Any = njit(error_model="numpy", **options)(function)
    if JIT:
        compiled._cache = KernelCache(function)  # where `cache=True` puts Numba's own
    return compiled


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
