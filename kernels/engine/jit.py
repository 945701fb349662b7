"""The two decorators, the only callers of Numba's own in the house.

    kernel     a function called from Python; loops over `prange` run on all threads
    helper     a function called from kernels, and part of them; never parallel itself

No fast-math flag at all.  NaN stays NaN, and bits stay what they are: wherever a flag leaves the compiler a choice, two
compilations of a function may choose differently, as Numba's own of a helper did (measured, see docs/log.md).  Sums
that are to be vectors are spelled out in `vectors.py`.
"""

from collections.abc import Callable
from typing import Any, TypeVar

from numba import njit, prange
from numba.extending import register_jitable

from .cache import KernelCache, numba_config
from .calls import Kernel
from .libraries import KernelCompiler
from .threads import on_threads

__all__ = ["JIT", "helper", "kernel", "prange"]

Function = TypeVar("Function", bound=Callable[..., Any])

JIT = not numba_config.DISABLE_JIT  # False under NUMBA_DISABLE_JIT=1: intrinsics then use their plain-Python twins


def kernel(function: Function) -> Function:
    """Compile a function that Python calls, at its first call; `prange` loops in it run in parallel."""
    # A dictionary, because the types that Numba declares for `njit` lack one of the options.
    options: dict[str, Any] = {"parallel": True, "nogil": True, "no_cfunc_wrapper": True}
    compiled: Any = njit(error_model="numpy", pipeline_class=KernelCompiler, **options)(function)
    if not JIT:
        return compiled
    compiled._cache = KernelCache(function)  # where `cache=True` puts Numba's own
    made: Any = Kernel(compiled, on_threads(compiled))
    return made


def helper(function: Function) -> Function:
    """Compile a function into the kernels that call it; never parallel.

    Python runs it uncompiled, and only if it uses no intrinsic.
    """
    return register_jitable(error_model="numpy")(function)
