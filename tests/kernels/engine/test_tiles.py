"""The register tile at every edge, on panels of float32 and of bfloat16 pairs.

What is expected is here in NumPy: one run checks the compiled operations, one with NUMBA_DISABLE_JIT=1 their twins.
"""

import numpy as np
import pytest
from numba import njit

from abi_py.gradcheck import check_close
from abi_py.kernels.engine.halves import round_to_bf16_ref
from abi_py.kernels.engine.number_formats import FLOAT32, METHODS
from abi_py.kernels.engine.simd import LANES
from abi_py.kernels.engine.tiles import tile

ROWS, COLUMNS = FLOAT32.rows, FLOAT32.columns


@njit
def one_tile(c, d, i, j, rows, cols, a, a_at, b, b_at, k, add, table):
    tile(c, d, i, j, rows, cols, a, a_at, b, b_at, k, add, table)


def pairs(panel):
    """Turn a panel (k, width) into one of pairs of rounded elements, ((k + 1) // 2, width)."""
    halves = np.zeros((-(-panel.shape[0] // 2) * 2, panel.shape[1]), np.uint32)
    halves[: panel.shape[0]] = round_to_bf16_ref(panel).view(np.uint32) >> np.uint32(16)
    return (halves[::2] | halves[1::2] << np.uint32(16)).view(np.float32)


def panels(rng, k):
    a = rng.standard_normal((k, ROWS)).astype(np.float32)
    b = rng.standard_normal((k, COLUMNS)).astype(np.float32)
    return a, b, a.astype(np.float64).T @ b.astype(np.float64)


@pytest.mark.parametrize("add", [False, True])
@pytest.mark.parametrize("k", [1, 2, 37])
def test_tile_at_every_edge(rng, k, add):
    a, b, expected = panels(rng, k)
    d = rng.standard_normal((ROWS + 5, COLUMNS + 9)).astype(np.float32)
    for rows in range(1, ROWS + 1):
        for cols in sorted({1, LANES - 1, LANES, LANES + 1, COLUMNS - 1, COLUMNS}):
            c = np.full_like(d, np.nan)
            one_tile(c, d, 2, 3, rows, cols, a.ravel(), 0, b.ravel(), 0, k, add, FLOAT32.table)
            block = (slice(2, 2 + rows), slice(3, 3 + cols))
            check_close(c[block], expected[:rows, :cols] + (d[block] if add else 0), 1e-5)
            c[block] = np.nan
            assert np.isnan(c).all()  # nothing else was written


def test_tile_adds_in_place_at_offsets_and_in_strided_matrices(rng):
    k = 19
    a, b, expected = panels(rng, k)
    a_panel = np.concatenate([np.full(7, np.nan, np.float32), a.ravel()])
    b_panel = np.concatenate([np.full(3, np.nan, np.float32), b.ravel()])
    whole = rng.standard_normal((ROWS, COLUMNS + 13)).astype(np.float32)
    before, c = whole.copy(), whole[::-1, 4 : 4 + COLUMNS]
    one_tile(c, c, 0, 0, ROWS, COLUMNS, a_panel, 7, b_panel, 3, k, True, FLOAT32.table)
    check_close(c, expected + before[::-1, 4 : 4 + COLUMNS], 1e-5)
    whole[:, 4 : 4 + COLUMNS] = before[:, 4 : 4 + COLUMNS]
    assert np.array_equal(whole, before)


def test_nan_in_a_panel_stays_in_its_row_and_column(rng):
    a, b, _ = panels(rng, 5)
    a[3, 1] = np.nan
    c = np.zeros((ROWS, COLUMNS), np.float32)
    one_tile(c, c, 0, 0, ROWS, COLUMNS, a.ravel(), 0, b.ravel(), 0, 5, False, FLOAT32.table)
    assert np.isnan(c[1]).all()
    assert np.isfinite(np.delete(c, 1, axis=0)).all()


@pytest.mark.skipif("dot" not in METHODS, reason="the processor has no dot product of bfloat16")
@pytest.mark.parametrize("add", [False, True])
def test_tile_of_pairs(rng, add):
    k = 37
    a, b, _ = panels(rng, k)
    expected = round_to_bf16_ref(a).astype(np.float64).T @ round_to_bf16_ref(b)
    d = rng.standard_normal((ROWS + 5, COLUMNS + 9)).astype(np.float32)
    for rows in (1, ROWS):
        for cols in (1, LANES, LANES + 1, COLUMNS):
            c = np.full_like(d, np.nan)
            place = 2, 3, rows, cols, pairs(a).ravel(), 0, pairs(b).ravel(), 0, (k + 1) // 2
            one_tile(c, d, *place, add, METHODS["dot"].table)
            block = (slice(2, 2 + rows), slice(3, 3 + cols))
            check_close(c[block], expected[:rows, :cols] + (d[block] if add else 0), 1e-5)
            c[block] = np.nan
            assert np.isnan(c).all()
