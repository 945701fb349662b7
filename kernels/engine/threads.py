"""Threads: how many a call uses, who may call at once, and what becomes of them in a fork.

    thread_count         how many threads are in use
    threads_for          run what is too small to share on one thread;  threads_as_before: and what follows it
    on_threads           make a compiled kernel one that two Python threads may call at once, and that a fork refuses

Python threads may train or generate at the same time, each with models of its own: the buffers that kernels need
between calls belong to the calling thread (`threading.local`), and its number of threads is its own in Numba too.  Of
Numba's threading layers, OpenMP and TBB take calls from several threads; its own pool, `workqueue`, ends the process,
so there calls take turns.

GNU's OpenMP does not survive a fork: the first parallel loop of the child ends it with SIGTERM, or waits for ever.  So
in a child whose parent had started threads, every kernel raises an error that names the remedy.
"""

import contextlib
import functools
import importlib
import os
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

import numba
from numba import config
from numba.np.ufunc import parallel

__all__ = [
    "CORES",
    "ONE_THREAD",
    "PASS",
    "forked",
    "on_threads",
    "taking_turns",
    "thread_count",
    "threads_as_before",
    "threads_for",
]


# The cores that this process may use; taken now, because OpenMP may bind this thread to one of them when it starts, and
# threads that Python starts later would inherit that.
CORES: frozenset[int] = frozenset(os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else ())


def thread_count() -> int:
    """Return how many threads kernels now use.

    As `numba.get_num_threads`, which takes a lock between processes at each call, 3 us; a small step asks thirty times.
    """
    if not _asking:
        numba.get_num_threads()  # starts the threads
        _asking.append(getattr(parallel, "_get_num_threads", numba.get_num_threads))
    return int(_asking[0]())


_asking: list[Callable[[], int]] = []


# -- how many threads -------------------------------------------------------------------------------

# Whether a second thread pays for small work depends on what it costs to start a parallel region, 0.5 to 20 us, fifty
# of them in a step, and that on the machine and the hour (docs/log.md).  Between these limits both are tried.
TINY, SMALL = 1e6, 100e6  # operations
TRIALS = 8  # of each
ONE_THREAD = 1 << 16  # multiply-adds of a call below which waking other threads does not pay
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


class _Small(threading.local):
    """What each Python thread knows of its small work."""

    def __init__(self) -> None:
        self.trials: dict[tuple[float, int], _Trials] = {}
        self.alone = True  # how the last ran


_small = _Small()


@contextlib.contextmanager
def threads_for(operations: float) -> Iterator[None]:
    """Run the kernels inside on one thread where there are too few operations to share; the bits are the same."""
    threads = thread_count()
    if threads == 1 or operations > SMALL:
        yield
        return
    trials = _small.trials.setdefault((operations, threads), _Trials())
    _small.alone = alone = operations < TINY or trials.alone()
    began = time.perf_counter()
    with _one_thread(alone):
        yield
    trials.took(alone, time.perf_counter() - began)


def threads_as_before(operations: float) -> contextlib.AbstractContextManager[None]:
    """Run what follows a step (norm, update) on the threads on which that ran: its results are in their caches."""
    return _one_thread(operations <= SMALL and _small.alone)


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


# -- who may call at once --------------------------------------------------------------------------

_turn = threading.Lock()
_kernels: "weakref.WeakSet[Any]" = weakref.WeakSet()  # Numba's functions, which a fork may have to make refuse


def on_threads(compiled: Any) -> Any:
    """Return Numba's parallel function so that Python threads may call it at once, and a forked child is refused."""
    _kernels.add(compiled)
    return _InTurn(compiled) if _turns_needed() else compiled


class _InTurn:
    """A kernel of which, and of all others, one call runs at a time."""

    def __init__(self, compiled: Any) -> None:
        functools.update_wrapper(self, compiled.py_func)
        self.compiled = compiled

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        with _turn:
            return self.compiled(*arguments, **named)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.compiled, name)


def taking_turns() -> contextlib.AbstractContextManager[object]:
    """Return a block in which kernels may be called by their addresses: in its turn, where calls take turns."""
    return _turn if _turns_needed() else contextlib.nullcontext()


@functools.cache
def _turns_needed() -> bool:
    """Say whether Numba is going to choose `workqueue`: it decides when the first kernel is compiled, too late here."""
    wanted = str(config.THREADING_LAYER).lower()  # type: ignore[attr-defined]
    if wanted != "default":
        return wanted in ("workqueue", "forksafe")
    priority = list(config.THREADING_LAYER_PRIORITY)  # type: ignore[attr-defined]
    return not any(_there(layer) for layer in priority[: priority.index("workqueue")])


def _there(layer: str) -> bool:
    try:
        if layer == "tbb":
            parallel._check_tbb_version_compatible()
            importlib.import_module("numba.np.ufunc.tbbpool")
        else:
            importlib.import_module("numba.np.ufunc.omppool")
    except ImportError:
        return False
    return True


# -- forks -----------------------------------------------------------------------------------------


_forked = False


def forked() -> bool:
    """Say whether this process is a forked child in which kernels refuse to run."""
    return _forked


def _in_child() -> None:
    """Begin anew in a forked child: the parent's threads are not there."""
    global _turn, _forked
    _turn = threading.Lock()  # a thread of the parent may have held it
    if parallel._is_initialized and numba.threading_layer() == "omp" and sys.platform.startswith("linux"):
        _forked = True
        for compiled in _kernels:
            compiled._clear()  # what is compiled is no longer found, and what is called to find it refuses
            compiled._compile_for_args = _refuse


def _refuse(*arguments: Any, **named: Any) -> NoReturn:
    raise RuntimeError(
        f"kernels ran before process {os.getpid()} was forked, and OpenMP's threads do not survive a fork; start "
        'processes with multiprocessing.get_context("spawn"), or fork before the first kernel runs'
    )


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_in_child)
