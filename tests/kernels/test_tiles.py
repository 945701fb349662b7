"""Tiles: the four ways of packing and the register tile, at every edge.

What is expected stands here in NumPy: one run checks the compiled operations, one with NUMBA_DISABLE_JIT=1 their twins.
"""

import numpy as np
import pytest
from gradcheck import check_close

from abi_py.kernels._jit import helper
from abi_py.kernels.simd import LANES
from abi_py.kernels.tiles import (
    COLUMNS,
    ROWS,
    pack_a,
    pack_a_bf16,
    pack_a_transposed,
    pack_a_transposed_bf16,
    pack_b,
    pack_b_bf16,
    pack_b_transposed,
    pack_b_transposed_bf16,
    round_to_bf16_ref,
    tile,
    tile_bf16,
)

UNTOUCHED = np.float32(-77)


@helper
def packed_a(panels, at, x, i, j, count, k):
    pack_a(panels, at, x, i, j, count, k)


@helper
def packed_a_transposed(panels, at, x, i, j, count, k):
    pack_a_transposed(panels, at, x, i, j, count, k)


@helper
def packed_b(panels, at, x, i, j, count, k):
    pack_b(panels, at, x, i, j, count, k)


@helper
def packed_b_transposed(panels, at, x, i, j, count, k):
    pack_b_transposed(panels, at, x, i, j, count, k)


@helper
def packed_a_bf16(panels, at, x, i, j, count, k):
    pack_a_bf16(panels, at, x, i, j, count, k)


@helper
def packed_a_transposed_bf16(panels, at, x, i, j, count, k):
    pack_a_transposed_bf16(panels, at, x, i, j, count, k)


@helper
def packed_b_bf16(panels, at, x, i, j, count, k):
    pack_b_bf16(panels, at, x, i, j, count, k)


@helper
def packed_b_transposed_bf16(panels, at, x, i, j, count, k):
    pack_b_transposed_bf16(panels, at, x, i, j, count, k)


@helper
def one_tile_bf16(c, d, i, j, rows, cols, a, a_at, b, b_at, k, add):
    tile_bf16(c, d, i, j, rows, cols, a, a_at, b, b_at, k, add)


@helper
def one_tile(c, d, i, j, rows, cols, a, a_at, b, b_at, k, add):
    tile(c, d, i, j, rows, cols, a, a_at, b, b_at, k, add)


# -- packing -------------------------------------------------------------------------------------

# name: (function, panel width, whether the counted rows or columns are the rows of x)
PACKERS = {
    "a": (packed_a, ROWS, True),
    "a_transposed": (packed_a_transposed, ROWS, False),
    "b": (packed_b, COLUMNS, False),
    "b_transposed": (packed_b_transposed, COLUMNS, True),
}
DEPTHS = [1, LANES - 1, LANES, 2 * LANES + 3]


def matrix(rng, kind, rows, columns):
    """Return a matrix of the given kind of strides, with columns side by side."""
    if kind == "wide":
        return rng.standard_normal((rows, columns + 9)).astype(np.float32)[:, 5 : 5 + columns]
    x = rng.standard_normal((rows, columns)).astype(np.float32)
    return x[::-1] if kind == "backwards" else x


def expected_panels(block, width):
    """Panels of a block (k, count): ceil(count / width) of (k, width), filled up with zeros."""
    k, count = block.shape
    filled = np.zeros((k, -(-count // width) * width), np.float32)
    filled[:, :count] = block
    return filled.reshape(k, -1, width).swapaxes(0, 1).ravel()


@pytest.mark.parametrize("kind", ["plain", "wide", "backwards"])
@pytest.mark.parametrize("k", DEPTHS)
@pytest.mark.parametrize("name", PACKERS)
def test_packing(rng, name, k, kind):
    pack, width, rows_counted = PACKERS[name]
    at, i, j = 11, 2, 3
    for count in (1, width - 1, width, width + 1, 3 * width, 3 * width + width // 2 + 1):
        x = matrix(rng, kind, *((i + count, j + k) if rows_counted else (i + k, j + count)))
        block = x[i:, j:].T if rows_counted else x[i:, j:]  # (k, count)
        expected = expected_panels(block, width)
        panels = np.full(at + expected.size + 2 * LANES, UNTOUCHED)
        pack(panels, at, x, i, j, count, k)
        assert np.array_equal(panels[at : at + expected.size], expected)
        assert (panels[:at] == UNTOUCHED).all()
        assert (panels[at + expected.size :] == UNTOUCHED).all()


@pytest.mark.parametrize("name", PACKERS)
def test_packing_reads_nothing_beyond_the_edge(rng, name):
    """What lies past the last row and column is NaN; none of it may show in the panels."""
    pack, width, rows_counted = PACKERS[name]
    whole = np.full((4 * COLUMNS, 4 * COLUMNS), np.nan, np.float32)
    count, k = width + 3, LANES + 3
    inside = (slice(count), slice(k)) if rows_counted else (slice(k), slice(count))
    whole[inside] = 1
    panels = np.full(2 * width * k, np.nan, np.float32)
    pack(panels, 0, whole, 0, 0, count, k)
    assert np.isfinite(panels).all()


# -- tile ----------------------------------------------------------------------------------------


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
            one_tile(c, d, 2, 3, rows, cols, a.ravel(), 0, b.ravel(), 0, k, add)
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
    one_tile(c, c, 0, 0, ROWS, COLUMNS, a_panel, 7, b_panel, 3, k, True)
    check_close(c, expected + before[::-1, 4 : 4 + COLUMNS], 1e-5)
    whole[:, 4 : 4 + COLUMNS] = before[:, 4 : 4 + COLUMNS]
    assert np.array_equal(whole, before)


def test_nan_in_a_panel_stays_in_its_row_and_column(rng):
    a, b, _ = panels(rng, 5)
    a[3, 1] = np.nan
    c = np.zeros((ROWS, COLUMNS), np.float32)
    one_tile(c, c, 0, 0, ROWS, COLUMNS, a.ravel(), 0, b.ravel(), 0, 5, False)
    assert np.isnan(c[1]).all()
    assert np.isfinite(np.delete(c, 1, axis=0)).all()


# -- bfloat16: panels of pairs -------------------------------------------------------------------

PACKERS_BF16 = {
    "a": (packed_a_bf16, ROWS, True),
    "a_transposed": (packed_a_transposed_bf16, ROWS, False),
    "b": (packed_b_bf16, COLUMNS, False),
    "b_transposed": (packed_b_transposed_bf16, COLUMNS, True),
}


def pairs(block):
    """Pairs of rounded elements of a block (k, count): ((k + 1) // 2, count) float32, the first in the lower half."""
    halves = np.zeros((-(-block.shape[0] // 2) * 2, block.shape[1]), np.uint32)
    halves[: block.shape[0]] = round_to_bf16_ref(block).view(np.uint32) >> np.uint32(16)
    return (halves[::2] | halves[1::2] << np.uint32(16)).view(np.float32)


@pytest.mark.parametrize("kind", ["plain", "wide", "backwards"])
@pytest.mark.parametrize("k", [1, 2, LANES - 1, 2 * LANES, 4 * LANES + 3, 64 * LANES + 1])
@pytest.mark.parametrize("name", PACKERS_BF16)
def test_packing_pairs(rng, name, k, kind):
    pack, width, rows_counted = PACKERS_BF16[name]
    at, i, j = 11, 2, 3
    for count in (1, width - 1, width, 3 * width + width // 2 + 1):
        x = matrix(rng, kind, *((i + count, j + k) if rows_counted else (i + k, j + count)))
        expected = expected_panels(pairs(x[i:, j:].T if rows_counted else x[i:, j:]), width)
        panels = np.full(at + expected.size + 2 * LANES, UNTOUCHED)
        pack(panels, at, x, i, j, count, k)
        assert panels[at : at + expected.size].tobytes() == expected.tobytes()
        assert (panels[:at] == UNTOUCHED).all()
        assert (panels[at + expected.size :] == UNTOUCHED).all()


def test_rounding_to_pairs():
    """To nearest even, with ties both ways, infinity reached by rounding, and NaN that stays NaN."""
    bits = [0x3F808000, 0x3F818000, 0x3F808001, 0x7F7FFFFF, 0x7F800000, 0x7F800001, 0xFFFFFFFF, 0x80000000]
    expected = [0x3F80, 0x3F82, 0x3F81, 0x7F80, 0x7F80, 0x7FC0, 0xFFFF, 0x8000]
    x = np.array(bits, np.uint32).view(np.float32)[:, None].repeat(2, axis=1)  # (count, k): two equal elements
    panels = np.zeros(-(-len(bits) // ROWS) * ROWS, np.float32)
    packed_a_bf16(panels, 0, x, 0, 0, len(bits), 2)
    found = panels.view(np.uint32)[: len(bits)]
    assert [hex(value & 0xFFFF) for value in found] == [hex(value) for value in expected]
    assert [hex(value >> 16) for value in found] == [hex(value) for value in expected]


@pytest.mark.parametrize("add", [False, True])
def test_tile_of_pairs(rng, add):
    k = 37
    a, b, _ = panels(rng, k)
    expected = round_to_bf16_ref(a).astype(np.float64).T @ round_to_bf16_ref(b)
    d = rng.standard_normal((ROWS + 5, COLUMNS + 9)).astype(np.float32)
    for rows in (1, ROWS):
        for cols in (1, LANES, LANES + 1, COLUMNS):
            c = np.full_like(d, np.nan)
            one_tile_bf16(c, d, 2, 3, rows, cols, pairs(a).ravel(), 0, pairs(b).ravel(), 0, (k + 1) // 2, add)
            block = (slice(2, 2 + rows), slice(3, 3 + cols))
            check_close(c[block], expected[:rows, :cols] + (d[block] if add else 0), 1e-5)
            c[block] = np.nan
            assert np.isnan(c).all()
