"""Routines: compiled once, kept on disk, compiled again when the file is damaged or can't be written."""

import llvmlite.ir as ir
import numpy as np
import pytest
from numba import njit, types
from numba.extending import intrinsic

from abi_py.kernels import _routines
from abi_py.kernels._cache import CacheWarning, Store
from abi_py.kernels._jit import JIT
from abi_py.kernels._routines import FOLD, KIND, STORED, TILE, Numbers, call_routine
from abi_py.kernels.tiles import BFLOAT16, FLOAT16, FLOAT32, METHODS

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
def numbers(tmp_path, monkeypatch):
    """Make numbers with one routine, which doubles an integer, in a cache of their own; the value makes them anew."""
    monkeypatch.setattr(_routines, "STORE", Store(tmp_path / "cache"))
    return lambda: Numbers("doubles", 7, 3, 0, {TILE: ([I64.as_pointer()], double)})


def result_of(numbers):
    x = np.array([21], np.int64)
    call_doubled(x, numbers.table)
    return x[0]


def test_tables_say_what_they_are():
    kinds = {name: tuple(numbers.table[[KIND, FOLD, STORED]]) for name, numbers in METHODS.items()}
    assert kinds == {name: kind for name, kind in (("fp32", (1, 1, 1)), ("dot", (3, 2, 1))) if name in METHODS}
    assert [tuple(numbers.table[[KIND, FOLD, STORED]]) for numbers in (FLOAT32, FLOAT16)] == [(0, 1, 0), (2, 1, 0)]
    assert [str(numbers) for numbers in (FLOAT32, BFLOAT16, FLOAT16)] == ["float32", "bfloat16", "float16"]
    for numbers in (FLOAT32, BFLOAT16, FLOAT16):
        assert numbers.table is numbers.table
        assert (numbers.table[TILE:] != 0).all() == JIT


@compiled_only
def test_compiled_once_and_then_read(numbers, monkeypatch):
    assert result_of(numbers()) == 42
    assert _routines.STORE.names("") == ["routines-doubles.o"]  # and nothing half-written
    monkeypatch.setattr(_routines, "_compiled", None)  # would fail if it were called
    assert result_of(numbers()) == 42


@compiled_only
def test_a_damaged_file_is_made_again(numbers):
    assert result_of(numbers()) == 42
    file = _routines.STORE.path(numbers().file)
    whole = file.read_bytes()
    file.write_bytes(whole[:40] + b"?" + whole[41:])
    with pytest.warns(CacheWarning, match="routines-doubles.o is damaged"):
        assert result_of(numbers()) == 42
    assert file.read_bytes() == whole


@compiled_only
def test_a_cache_that_cannot_be_written_is_no_error(numbers):
    _routines.STORE.directory.write_text("a file where the directory should be")
    with pytest.warns(CacheWarning, match="neither read nor kept"):
        assert result_of(numbers()) == 42
