"""Vectors: exp over the whole range, largest, packing, the register tile, and every instruction set on this machine.

What is expected stands here in NumPy: one run checks the compiled operations, one with NUMBA_DISABLE_JIT=1 their twins.
"""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from gradcheck import check_close

from abi_py.kernels import simd
from abi_py.kernels._jit import JIT, helper
from abi_py.kernels.simd import COLUMNS, ISAS, LANES, ROWS, exp, largest, pack_columns, pack_rows, tile

HERE = Path(__file__).resolve().parent
SAMPLES = 1_000_000 if JIT else 2_000
UNTOUCHED = np.float32(-77)


@helper
def exp_of_each(y, x):
    for i in range(x.size):
        y[i] = exp(x[i])


@helper
def largest_of(x):
    return largest(x)


@helper
def packed_rows(panel, at, width, x, i, j, rows, k):
    pack_rows(panel, at, width, x, i, j, rows, k)


@helper
def packed_columns(panel, at, width, x, i, j, columns, k):
    pack_columns(panel, at, width, x, i, j, columns, k)


@helper
def one_tile(c, d, i, j, rows, cols, a, a_at, b, b_at, k, add):
    tile(c, d, i, j, rows, cols, a, a_at, b, b_at, k, add)


def exps(x):
    x = np.asarray(x, np.float32)
    y = np.full_like(x, np.nan)
    exp_of_each(y, x)
    return y


# -- exp -----------------------------------------------------------------------------------------


def test_exp_error_bound(rng):
    spread = rng.uniform(-87.3, 88.7, SAMPLES)
    positive = rng.integers(0, 2**31 - 2**24, SAMPLES).astype(np.int32).view(np.float32)  # of every size
    sizes = np.concatenate([positive, -positive])
    x = np.concatenate([spread, sizes[np.abs(sizes) < 87.3]]).astype(np.float32)
    y, expected = exps(x).astype(np.float64), np.exp(x.astype(np.float64))
    assert np.abs(y / expected - 1).max() < 2e-7


def test_exp_around_every_reduction_step():
    """x = n ln 2 + r with |r| <= ln(2) / 2: the largest r, and so the largest error, lies half way between multiples."""
    middle = (np.arange(-125, 128) + 0.5) * np.log(2)
    x = (middle[:, None] + np.linspace(-1e-4, 1e-4, 41)).ravel().astype(np.float32)
    x = x[(x > -87.3) & (x < 88.7)]
    assert np.abs(exps(x) / np.exp(x.astype(np.float64)) - 1).max() < 2e-7


def test_exp_of_special_values():
    inf, nan = np.inf, np.nan
    x = [0.0, -0.0, inf, -inf, nan, -nan, 88.73, 1e30, -87.4, -1e30, 3e-45, -3e-45]
    y = exps(x)
    assert np.array_equal(y, np.float32([1, 1, inf, 0, nan, nan, inf, inf, 0, 0, 1, 1]), equal_nan=True)
    edge = exps([88.72, 88.72283, -87.33])
    assert np.isfinite(edge).all()
    assert (edge > 0).all()


def test_exp_never_falls():
    x = np.linspace(-90, 90, SAMPLES // 4, dtype=np.float32)
    y = exps(x)[1:].astype(np.float64)
    before = exps(x)[:-1].astype(np.float64)
    finite = np.isfinite(y)
    assert (y[finite] >= before[finite] * (1 - 2.4e-7)).all()  # never by more than the error bound


def test_exp_has_the_same_bits_in_vectors_and_alone(rng):
    x = rng.uniform(-100, 100, 5 * LANES + 3).astype(np.float32)
    together = exps(x)
    alone = np.concatenate([exps(x[i : i + 1]) for i in range(x.size)])
    assert together.tobytes() == alone.tobytes()


# -- largest -------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 2, LANES - 1, LANES, LANES + 1, 3 * LANES + 5])
def test_largest(rng, size):
    x = -1 - np.abs(rng.standard_normal(size + 1)).astype(np.float32)  # all negative: a zero that creeps in would win
    for at in range(size):
        y = x[1:].copy()
        y[at] = -0.5
        assert largest_of(y) == np.float32(-0.5)
    assert largest_of(x[1:]) == x[1:].max()  # not aligned


def test_largest_of_special_values():
    inf, nan = np.float32(np.inf), np.float32(np.nan)
    assert largest_of(np.empty(0, np.float32)) == -inf
    assert largest_of(np.full(LANES + 1, nan)) == -inf
    assert largest_of(np.full(LANES + 1, -inf)) == -inf
    x = np.arange(2 * LANES + 1, dtype=np.float32)
    x[::3] = nan
    assert largest_of(x) == np.nanmax(x)
    x[1] = inf
    assert largest_of(x) == inf


# -- packing -------------------------------------------------------------------------------------

WIDTHS = sorted({ROWS, COLUMNS, LANES})
DEPTHS = [1, LANES - 1, LANES, 2 * LANES + 3]


def matrix(rng, kind, rows, columns):
    """Return a matrix of the given kind of strides, with columns side by side."""
    if kind == "wide":
        return rng.standard_normal((rows, columns + 9)).astype(np.float32)[:, 5 : 5 + columns]
    x = rng.standard_normal((rows, columns)).astype(np.float32)
    return x[::-1] if kind == "backwards" else x


@pytest.mark.parametrize("kind", ["plain", "wide", "backwards"])
@pytest.mark.parametrize("k", DEPTHS)
@pytest.mark.parametrize("width", WIDTHS)
def test_pack_rows(rng, width, k, kind):
    at, i, j = 11, 2, 3
    x = matrix(rng, kind, i + width, j + k)
    for rows in sorted({1, width // 2 + 1, width}):
        panel = np.full(at + k * width + LANES + 5, UNTOUCHED)
        packed_rows(panel, at, width, x[: i + rows], i, j, rows, k)
        expected = np.zeros((k, width), np.float32)
        expected[:, :rows] = x[i : i + rows, j : j + k].T
        assert np.array_equal(panel[at : at + k * width].reshape(k, width), expected)
        assert (panel[:at] == UNTOUCHED).all()
        assert (panel[at + k * width + LANES - 1 :] == UNTOUCHED).all()  # as far as the docstring allows


@pytest.mark.parametrize("kind", ["plain", "wide", "backwards"])
@pytest.mark.parametrize("k", DEPTHS)
@pytest.mark.parametrize("width", WIDTHS)
def test_pack_columns(rng, width, k, kind):
    at, i, j = 11, 2, 3
    x = matrix(rng, kind, i + k, j + width)
    for columns in sorted({1, width // 2 + 1, width}):
        panel = np.full(at + k * width + LANES + 5, UNTOUCHED)
        packed_columns(panel, at, width, x[:, : j + columns], i, j, columns, k)
        expected = np.zeros((k, width), np.float32)
        expected[:, :columns] = x[i : i + k, j : j + columns]
        assert np.array_equal(panel[at : at + k * width].reshape(k, width), expected)
        assert (panel[:at] == UNTOUCHED).all()
        assert (panel[at + k * width + LANES - 1 :] == UNTOUCHED).all()


def test_panels_packed_in_ascending_order_stand_side_by_side(rng):
    k = LANES + 3
    x = rng.standard_normal((3 * ROWS, k)).astype(np.float32)
    panels = np.full(3 * ROWS * k + LANES, np.nan, np.float32)
    for r in range(0, 3 * ROWS, ROWS):
        packed_rows(panels, r * k, ROWS, x, r, 0, ROWS, k)
    expected = x.reshape(3, ROWS, k).swapaxes(1, 2)
    assert np.array_equal(panels[: x.size].reshape(3, k, ROWS), expected)


def test_packing_reads_nothing_beyond_the_edge(rng):
    """What lies past the last row and column is NaN; none of it may show in the panel."""
    whole = np.full((40, 60), np.nan, np.float32)
    whole[:5, :7] = rng.standard_normal((5, 7))
    for function in (packed_rows, packed_columns):
        panel = np.full(7 * COLUMNS + LANES, np.nan, np.float32)
        size = (5, 7) if function is packed_rows else (7, 5)
        function(panel, 0, COLUMNS, whole, 0, 0, *size)
        assert np.isfinite(panel[: size[1] * COLUMNS]).all()


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


# -- instruction sets ----------------------------------------------------------------------------


def test_description():
    said = simd.describe()
    assert said["simd"] in ISAS
    assert said["host"] in ISAS
    assert said["lanes"] == LANES
    assert said["tile"] == f"{ROWS} x {COLUMNS}"


def test_tiles_fit_the_registers():
    registers = {"avx512": 32, "avx2": 16, "neon": 32, "generic": 16}
    for name, isa in ISAS.items():
        assert isa.tile_rows * isa.tile_vectors + isa.tile_vectors + 1 <= registers[name]
        assert isa.tile_columns == isa.tile_vectors * isa.lanes


def in_child(arguments, **changes):
    """Run Python with the project on its path and other environment variables."""
    environment = {key: value for key, value in os.environ.items() if key not in ("ABI_SIMD", "NUMBA_DISABLE_JIT")}
    environment["PYTHONPATH"] = os.pathsep.join([str(HERE.parents[1]), environment.get("PYTHONPATH", "")])
    environment.update(changes)
    command = [sys.executable, *arguments]
    return subprocess.run(command, env=environment, cwd=HERE.parents[1], capture_output=True, text=True, check=False)


@pytest.mark.parametrize("path", [*ISAS, "plain Python"])
def test_every_path(path):
    """Run this file, a product and an attention with each instruction set, and with nothing compiled."""
    if not JIT or os.environ.get("ABI_SIMD"):
        pytest.skip("this is such a run already")
    selected = [
        f"{HERE}/test_simd.py",
        f"{HERE}/test_matmul.py::test_edges_of_the_tile",
        f"{HERE}/test_attention.py::test_kernels_equal_the_reference",
    ]
    changes = {"NUMBA_DISABLE_JIT": "1"} if path == "plain Python" else {"ABI_SIMD": path}
    done = in_child(["-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", "not every_path", *selected], **changes)
    assert done.returncode == 0, done.stdout + done.stderr


def test_an_unknown_instruction_set_is_refused():
    done = in_child(["-c", "import abi_py.kernels.simd"], ABI_SIMD="sse9")
    assert done.returncode != 0
    assert "ABI_SIMD (sse9) must be one of avx512, avx2, neon, generic" in done.stderr
