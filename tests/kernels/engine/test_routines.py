"""Routines: compiled once, kept on disk, compiled again when the file is damaged or can't be written."""

import llvmlite.ir as ir
import numpy as np
import pytest
from numba import njit, types
from numba.extending import intrinsic

from abi_py.kernels.engine import routines
from abi_py.kernels.engine.cache import CacheWarning, Store
from abi_py.kernels.engine.jit import JIT
from abi_py.kernels.engine.number_formats import BF16X3, BF16X6, BFLOAT16, FLOAT16, FLOAT32, METHODS
from abi_py.kernels.engine.panels import FORMATS, panel_depth
from abi_py.kernels.engine.routines import (
    BLOCK_ROWS,
    COLUMNS,
    FOLD,
    FORMAT,
    PARTS,
    ROWS,
    SLAB_COLUMNS,
    SLICE_TERMS,
    STORED,
    TILE,
    UNIT,
    call_routine,
    routine_table,
    routines_file,
)
from abi_py.kernels.stored_matmul import STRIP

I64 = ir.IntType(64)
compiled_only = pytest.mark.skipif(not JIT, reason="nothing is compiled")


def double(builder, place):
    builder.store(builder.mul(builder.load(place), ir.Constant(I64, 2)), place)


@intrinsic
def doubled(typing, x, table):
    def codegen(context, builder, signature, arguments):
        place = context.make_array(signature.args[0])(context, builder, arguments[0]).data
        call_routine(context, builder, signature.args[1], arguments[1], TILE, [place])
        return context.get_dummy_value()

    return types.void(x, table), codegen


@njit
def call_doubled(x, table):
    doubled(x, table)


@pytest.fixture
def table(tmp_path, monkeypatch):
    """Return what makes a table with one routine, which doubles an integer, in a cache of its own."""
    monkeypatch.setattr(routines, "STORE", Store(tmp_path / "cache"))
    return lambda: routine_table("doubles", {FORMAT: 7, FOLD: 3}, {TILE: ([I64.as_pointer()], double)})


def result_of(table):
    x = np.array([21], np.int64)
    call_doubled(x, table)
    return x[0]


def test_tables_say_what_they_are():
    by_parts = [choice.methods["amx"] for choice in (BF16X3, BF16X6) if "amx" in choice.methods]
    formats = (FLOAT32, FLOAT16, *METHODS.values(), *by_parts)
    assert list(METHODS) == ["fp32", "dot", "amx"][: len(METHODS)]  # a machine with AMX has the dot product too
    folds = [(1, 1, 0), (1, 1, 0), (1, 1, 1), (2, 1, 1), (2, 1, 1), (2, 2, 0), (2, 3, 0)]
    assert [tuple(one.table[[FOLD, PARTS, STORED]]) for one in formats] == folds[: len(formats)]
    assert all(FORMATS[one.table[FORMAT]] is one for one in formats)
    assert [str(number_format) for number_format in (FLOAT32, BFLOAT16, FLOAT16)] == ["float32", "bfloat16", "float16"]
    for one in formats:
        sizes = one.rows, one.columns, one.unit, one.slice_terms, one.slab_columns, one.block_rows
        assert tuple(one.table[[ROWS, COLUMNS, UNIT, SLICE_TERMS, SLAB_COLUMNS, BLOCK_ROWS]]) == sizes
        assert STRIP % one.slice_terms == 0
        assert all(one.depth_of(k) == panel_depth(k, one.table) for k in (1, 31, 32, 33, 500))
    for number_format in (FLOAT32, BFLOAT16, FLOAT16):
        assert number_format.table is number_format.table
        assert (number_format.table[TILE:] != 0).all() == JIT


@compiled_only
def test_compiled_once_and_then_read(table, monkeypatch):
    assert result_of(table()) == 42
    assert routines.STORE.names("") == ["routines-doubles.o"]  # and nothing half-written
    monkeypatch.setattr(routines, "_compiled", None)  # would fail if it were called
    assert result_of(table()) == 42


@compiled_only
def test_a_damaged_file_is_made_again(table):
    assert result_of(table()) == 42
    file = routines.STORE.path(routines_file("doubles"))
    whole = file.read_bytes()
    file.write_bytes(whole[:40] + b"?" + whole[41:])
    with pytest.warns(CacheWarning, match="routines-doubles.o is damaged"):
        assert result_of(table()) == 42
    assert file.read_bytes() == whole


@compiled_only
def test_a_cache_that_cannot_be_written_is_no_error(table):
    routines.STORE.directory.write_text("a file where the directory should be")
    with pytest.warns(CacheWarning, match="neither read nor kept"):
        assert result_of(table()) == 42
