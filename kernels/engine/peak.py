"""Peak: how fast this machine can multiply and add at all, measured with the tile on panels that stay in cache.

    2 rows columns k operations a tile; every thread repeats one tile on panels of its own; nothing reaches memory

What a training step reaches is stated as a share of this figure.  The threads are Python's, and the loop is a routine
of its own (`routines.py`): so `abi-train info` need not wait for Numba to load what kernels need.
"""

import ctypes
import functools
import os
import threading
import time

import llvmlite.ir as ir
import numba
from numba.core import cgutils

from .jit import JIT
from .number_formats import FLOAT32, AnyFormat
from .routines import BEGIN, COLUMNS, END, ROWS, TILE, compiled_functions
from .scratch import aligned_empty, aligned_zeros
from .simd import F32, I1, I64
from .threads import CORES
from .tiles import tile

# Elements of the sum, fewer where each is several parts: panels of 6 and 16 KiB with AVX2, 8 and 48 with AVX-512, 16
# and 16 with AMX.
DEPTH = 256


def _repeat_body(builder, begin, run, end, c, a, b, rows, columns, depth, times):
    """Emit `times` times the tile at the address `run`, between calls of `begin` and `end`."""
    frame = ir.FunctionType(ir.VoidType(), []).as_pointer()
    kind = ir.FunctionType(ir.VoidType(), [F32.as_pointer()] * 4 + [I64] * 5 + [I1]).as_pointer()
    once = builder.inttoptr(run, kind)
    builder.call(builder.inttoptr(begin, frame), [])
    with cgutils.for_range(builder, times):
        builder.call(once, [c, c, a, b, columns, columns, rows, columns, depth, I1(1)])
    builder.call(builder.inttoptr(end, frame), [])
    builder.ret_void()


@functools.cache
def _repeat():
    """Return the compiled loop as a function; ctypes lets other threads run while it does."""
    arguments = [I64] * 3 + [F32.as_pointer()] * 3 + [I64] * 4
    kind = ir.FunctionType(ir.VoidType(), arguments)
    address = compiled_functions("repeat", {0: (kind, _repeat_body)})[0]
    types = [ctypes.c_int64] * 3 + [ctypes.c_void_p] * 3 + [ctypes.c_int64] * 4
    return ctypes.CFUNCTYPE(None, *types)(address)


def _repeat_tile(c, a, b, depth, times, table):
    """Add the same product to c (threads, rows, columns) `times` times; a and b (threads, ...) are packed panels.

    Return the seconds that each thread took.
    """
    rows, columns = int(table[ROWS]), int(table[COLUMNS])
    loop, all_there, seconds = _loop(table), threading.Barrier(len(c)), [0.0] * len(c)

    def work(t):  # which keeps the arrays, also if nobody waits for it any more
        if t and CORES:
            os.sched_setaffinity(0, CORES)
        all_there.wait()
        start = time.perf_counter()
        loop(c[t], a[t], b[t], rows, columns, depth, times)
        seconds[t] = time.perf_counter() - start

    others = [threading.Thread(target=work, args=(t,), daemon=True) for t in range(1, len(c))]
    try:
        for other in others:
            other.start()
        work(0)
        for other in others:
            other.join()
    except BaseException:  # Ctrl-C, or no thread to be had: nobody waits at the barrier for ever
        all_there.abort()
        raise
    return seconds


def _loop(table):
    """Return what repeats the tile of a table on one thread."""
    if not JIT:

        def by_python(c, a, b, rows, columns, depth, times):
            for _ in range(times):
                tile(c, c, 0, 0, rows, columns, a, 0, b, 0, depth, True, table)

        return by_python
    repeat = functools.partial(_repeat(), *(int(table[slot]) for slot in (BEGIN, TILE, END)))
    return lambda c, a, b, *sizes: repeat(c.ctypes.data, a.ctypes.data, b.ctypes.data, *sizes)


def measured_peak(seconds: float = 0.2, number_format: AnyFormat = FLOAT32) -> float:
    """Return this machine's multiply-add peak in operations per second, with the threads now in use.

    The peak is that of a number format by the method in use, with float32 sums; a product of parts counts once.  It is
    the sum of what each thread reaches by its own clock, while all of them work.

    Runs for about `seconds` and takes the best of several rounds, because other programs only ever make a round slower.
    """
    threads = numba.get_num_threads()
    chosen = number_format.chosen
    rows, columns, table = chosen.rows, chosen.columns, chosen.tile_table
    terms = max(DEPTH // chosen.parts // chosen.unit, 1) * chosen.unit
    depth = chosen.depth_of(terms)
    c = aligned_zeros((threads, rows, columns))
    a, b = (aligned_empty((threads, depth * width)) for width in (rows, columns))  # panels begin at a cache line
    a[...], b[...] = 1, 1
    _repeat_tile(c, a, b, depth, 10, table)  # compile
    work = 2.0 * rows * columns * terms  # of a thread
    times, best, end = 100, 0.0, time.perf_counter() + seconds
    while True:
        took = _repeat_tile(c, a, b, depth, times, table)
        best = max(best, sum(work * times / each for each in took))
        if time.perf_counter() > end:
            return best
        if max(took) < seconds / 10:
            times *= 2
