"""Check and time the four packers, on one thread: float32 as it is, and rounded to bfloat16 pairs."""

import numpy as np
from _bench import Bench
from numba import njit

from abi_py.kernels.engine.number_formats import BFLOAT16, FLOAT32
from abi_py.kernels.engine.panels import (
    pack_a,
    pack_a_transposed,
    pack_b,
    pack_b_transposed,
)
from abi_py.kernels.engine.simd import LANES, describe

ROWS, COLUMNS = FLOAT32.rows, FLOAT32.columns
COUNT, DEPTH = 4 * ROWS * COLUMNS, 256  # what is packed: COUNT rows or columns of A or B over DEPTH


def compiled(pack, rows_counted):
    """Return a compiled function that packs a whole matrix."""

    @njit
    def call(panels, x, table):
        count, depth = x.shape if rows_counted else (x.shape[1], x.shape[0])
        pack(panels, 0, x, 0, 0, count, depth, table)

    return call


bench = Bench("panels", f"Packing {COUNT} x {DEPTH} floats; one thread: {describe()}")
rng = np.random.default_rng(0)
tall = rng.standard_normal((COUNT, DEPTH), dtype=np.float32)
flat = rng.standard_normal((DEPTH, COUNT), dtype=np.float32)
panels = np.empty(COUNT * DEPTH + LANES, np.float32)
for name, pack, x, width in (
    ("a", compiled(pack_a, True), tall, ROWS),
    ("a transposed", compiled(pack_a_transposed, False), flat, ROWS),
    ("b", compiled(pack_b, False), flat, COLUMNS),
    ("b transposed", compiled(pack_b_transposed, True), tall, COLUMNS),
):
    pack(panels, x, FLOAT32.table)
    by_depth = x.T if x is tall else x  # (DEPTH, COUNT)
    expected = by_depth.reshape(DEPTH, -1, width).swapaxes(0, 1)
    packed = panels[: x.size].reshape(expected.shape)
    bench.check(f"pack {name}", packed, expected, 0)

    def once(table, pack=pack, x=x):
        pack(panels, x, table)

    def numpy_once(expected=expected, out=packed):
        out[...] = expected

    bench.time(f"pack {name}", lambda once=once: once(FLOAT32.table), bytes_moved=8 * x.size, numpy=numpy_once)
    bench.time(f"pack {name} bf16", lambda once=once: once(BFLOAT16.table), bytes_moved=6 * x.size)
bench.finish()
