"""Check and time the four packers and the register tile, on one thread."""

import numpy as np
from _bench import Bench

from abi_py.kernels._jit import helper
from abi_py.kernels.simd import LANES, describe
from abi_py.kernels.tiles import COLUMNS, ROWS, pack_a, pack_a_transposed, pack_b, pack_b_transposed, tile

COUNT, DEPTH = 4 * ROWS * COLUMNS, 256  # what is packed: COUNT rows or columns of A or B over DEPTH


@helper
def packed_a(panels, x):
    """Pack the rows of x as panels of A."""
    pack_a(panels, 0, x, 0, 0, x.shape[0], x.shape[1])


@helper
def packed_a_transposed(panels, x):
    """Pack the columns of x as panels of A."""
    pack_a_transposed(panels, 0, x, 0, 0, x.shape[1], x.shape[0])


@helper
def packed_b(panels, x):
    """Pack the columns of x as panels of B."""
    pack_b(panels, 0, x, 0, 0, x.shape[1], x.shape[0])


@helper
def packed_b_transposed(panels, x):
    """Pack the rows of x as panels of B."""
    pack_b_transposed(panels, 0, x, 0, 0, x.shape[0], x.shape[1])


@helper
def tiles(c, a, b, depth, times):
    """Add one product of two panels to c, `times` times."""
    for _ in range(times):
        tile(c, c, 0, 0, ROWS, COLUMNS, a, 0, b, 0, depth, True)


bench = Bench("tiles", f"Packing {COUNT} x {DEPTH} floats, and one register tile; one thread: {describe()}")
rng = np.random.default_rng(0)
tall = rng.standard_normal((COUNT, DEPTH), dtype=np.float32)
flat = rng.standard_normal((DEPTH, COUNT), dtype=np.float32)
panels = np.empty(COUNT * DEPTH + LANES, np.float32)
for name, pack, x, width in (
    ("a", packed_a, tall, ROWS),
    ("a transposed", packed_a_transposed, flat, ROWS),
    ("b", packed_b, flat, COLUMNS),
    ("b transposed", packed_b_transposed, tall, COLUMNS),
):
    pack(panels, x)
    by_depth = x.T if x is tall else x  # (DEPTH, COUNT)
    expected = by_depth.reshape(DEPTH, -1, width).swapaxes(0, 1)
    packed = panels[: x.size].reshape(expected.shape)
    bench.check(f"pack {name}", packed, expected, 0)

    def once(pack=pack, x=x):
        pack(panels, x)

    def numpy_once(expected=expected, out=packed):
        out[...] = expected

    bench.time(f"pack {name}", once, bytes_moved=8 * x.size, numpy=numpy_once)

a, b = rng.standard_normal((DEPTH, ROWS), dtype=np.float32), rng.standard_normal((DEPTH, COLUMNS), dtype=np.float32)
c = np.zeros((ROWS, COLUMNS), np.float32)
tiles(c, a.ravel(), b.ravel(), DEPTH, 1)
bench.check("tile", c, a.T.astype(np.float64) @ b.astype(np.float64), 1e-5)
flops = 2 * ROWS * COLUMNS * DEPTH * 100
bench.time("tile, 100 times", lambda: tiles(c, a.ravel(), b.ravel(), DEPTH, 100), flops=flops)
bench.finish()
