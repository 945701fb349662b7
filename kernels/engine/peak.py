"""Peak: how fast this machine can multiply and add at all, measured with the tile on panels that stay in cache.

    2 rows columns k operations a tile; every thread repeats one tile on panels of its own; nothing reaches memory

What a training step reaches is stated as a share of this figure.  The threads are Python's, and the loop is a routine
of its own (`routines.py`): so `abi-train info` need not wait for Numba to load what kernels need.
"""

import ctypes
import functools
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
    """Add the same product to c (threads, rows, columns) `times` times; a and b (threads, ...) are packed panels."""
    rows, columns = int(table[ROWS]), int(table[COLUMNS])
    if not JIT:
        for mine, left, right in zip(c, a, b, strict=True):
            for _ in range(times):
                tile(mine, mine, 0, 0, rows, columns, left, 0, right, 0, depth, True, table)
        return
    addresses = (int(table[slot]) for slot in (BEGIN, TILE, END))
    loop = functools.partial(_repeat(), *addresses)
    calls = [(*(x[t].ctypes.data for x in (c, a, b)), rows, columns, depth, times) for t in range(len(c))]
    others = [threading.Thread(target=loop, args=each) for each in calls[1:]]
    for other in others:
        other.start()
    loop(*calls[0])
    for other in others:
        other.join()


def measured_peak(seconds: float = 0.2, number_format: AnyFormat = FLOAT32) -> float:
    """Return this machine's multiply-add peak in operations per second, with the threads now in use.

    The peak is that of a number format by the method in use, with float32 sums; a product of parts counts once.

    Runs for about `seconds` and takes the best of several rounds, because other programs only ever make a round slower.
    """
    threads = numba.get_num_threads()
    chosen = number_format.chosen
    rows, columns, table = chosen.rows, chosen.columns, chosen.table
    terms = max(DEPTH // chosen.parts // chosen.unit, 1) * chosen.unit
    depth = chosen.depth_of(terms)
    c = aligned_zeros((threads, rows, columns))
    a, b = (aligned_empty((threads, depth * width)) for width in (rows, columns))  # panels begin at a cache line
    a[...], b[...] = 1, 1
    _repeat_tile(c, a, b, depth, 10, table)  # compile
    work = 2.0 * threads * rows * columns * terms
    times, best, end = 100, 0.0, time.perf_counter() + seconds
    while True:
        start = time.perf_counter()
        _repeat_tile(c, a, b, depth, times, table)
        now = time.perf_counter()
        best = max(best, work * times / (now - start))
        if now > end:
            return best
        if now - start < seconds / 10:  # what it takes to start the threads is then below 1 %
            times *= 2
