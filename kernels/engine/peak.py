"""Peak: how fast this machine can multiply and add at all, measured with the tile on panels that stay in cache.

    2 rows columns k operations a tile; every thread repeats one tile on panels of its own; nothing reaches memory

What a training step reaches is stated as a share of this figure.
"""

import time

import numba

from .jit import kernel, prange
from .number_formats import FLOAT32, AnyFormat
from .routines import COLUMNS, ROWS
from .scratch import aligned_empty, aligned_zeros
from .tiles import begin, end, tile

# Elements of the sum, fewer where each is several parts: panels of 6 and 16 KiB with AVX2, 8 and 48 with AVX-512, 16
# and 16 with AMX.
DEPTH = 256


@kernel
def _repeat_tile(c, a, b, depth, times, table):
    """Add the same product to c (threads, rows, columns) `times` times; a and b (threads, ...) are packed panels."""
    for t in prange(c.shape[0]):
        mine = c[t]
        begin(table)
        for _ in range(times):
            tile(mine, mine, 0, 0, table[ROWS], table[COLUMNS], a[t], 0, b[t], 0, depth, True, table)
        end(table)


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
    _repeat_tile(c, a, b, depth, 10, table)  # compile, wake the threads
    work = 2.0 * threads * rows * columns * terms
    times, best, end = 100, 0.0, time.perf_counter() + seconds
    while True:
        start = time.perf_counter()
        _repeat_tile(c, a, b, depth, times, table)
        now = time.perf_counter()
        best = max(best, work * times / (now - start))
        if now > end:
            return best
        if now - start < seconds / 20:
            times *= 2
