"""AMX: what is emitted for a processor that has it, on any machine; its tile and its twin, bit for bit, where it is."""

import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import llvmlite.binding as llvm
import numpy as np
import pytest
from numba import njit

from abi_py.gradcheck import check_close
from abi_py.kernels.engine import amx, routines
from abi_py.kernels.engine.jit import JIT
from abi_py.kernels.engine.number_formats import BF16X3, BF16X6, METHODS
from abi_py.kernels.engine.parts import bf16_parts_ref
from abi_py.kernels.engine.tiles import begin, end, tile
from abi_py.kernels.matmul import product

AMX = METHODS.get("amx")
MISSING = amx.lacks() if AMX is None else AMX.missing
here = pytest.mark.skipif(bool(MISSING), reason=f"no AMX: {MISSING}")
SCHEMES = {"bf16": amx.PLAIN, "bf16x3": amx.THREE, "bf16x6": amx.SIX}
FORMATS = {"bf16": AMX} | {str(choice): choice.methods.get("amx") for choice in (BF16X3, BF16X6)}
each_scheme = pytest.mark.parametrize("name", SCHEMES)


@pytest.mark.parametrize(("name", "products", "spared"), [("bf16", 1, 0), ("bf16x3", 3, 4), ("bf16x6", 6, 8)])
def test_emitted_for_a_processor_that_has_it(name, products, spared):
    """On any x86 build of LLVM; LLVM's verifier and code generator take all of it.

    A block of both panels has so many products, and as many loads, less those of an operand that is there from before.
    """
    llvm.initialize_all_targets()
    llvm.initialize_all_asmprinters()
    triple = "x86_64-unknown-linux-gnu"
    try:
        target = llvm.Target.from_triple(triple)
    except RuntimeError:
        pytest.skip("this LLVM has no code generator for x86")
    machine = target.create_target_machine("sapphirerapids", "", opt=3)
    emitted = {slot: routines._returning(each) for slot, each in routines_of(SCHEMES[name]).items()}
    text = llvm.parse_assembly(routines._module("amx", emitted))
    text.triple, text.data_layout = triple, str(machine.target_data)
    text.verify()
    builder = llvm.create_pass_builder(machine, llvm.create_pipeline_tuning_options(speed_level=3))
    builder.getModulePassManager().run(text, builder)
    assembly = machine.emit_assembly(text)
    names = ("ldtilecfg", "tilerelease", "tilezero", "tilestored", "tdpbf16ps", "tileloadd", "vcvtne2ps2bf16")
    found = {name: len(re.findall(rf"\b{name}\b", assembly)) for name in names}
    base_last = SCHEMES[name].base_last  # then C goes through memory, else it is loaded
    assert list(found.values())[:4] == [1, 1, 4, 8 if base_last else 4]
    loads = found["tileloadd"] - (0 if base_last else 4)
    assert found["tdpbf16ps"] >= 4 * products
    assert (found["tdpbf16ps"] - loads) % max(spared, 1) == 0  # loops may be unrolled
    assert (loads < found["tdpbf16ps"]) == (spared > 0)
    assert found["vcvtne2ps2bf16"] > 0


def routines_of(scheme):
    return amx.tile_routines(scheme) | amx.packers(scheme.parts)


def operands(rng, m, n, k, scale=1.0):
    return [(scale * rng.standard_normal(size)).astype(np.float32) for size in ((k, m), (k, n))]


def in_panels(block, of_a, name="bf16"):
    return amx.panels_ref(amx.flushed(block), of_a, SCHEMES[name])


@each_scheme
@pytest.mark.parametrize("k", [1, 32, 77])
def test_the_twin_multiplies(rng, name, k):
    """What the parts say: of bf16 the product of the first ones, of the others what they leave out beside float64's."""
    a, b = operands(rng, 32, 32, k)
    base = rng.standard_normal((32, 32)).astype(np.float32)
    scheme = SCHEMES[name]
    found = amx.tile_ref(in_panels(a, True, name), in_panels(b, False, name), base, scheme)
    left, right = (bf16_parts_ref(x.astype(np.float32), scheme.parts) for x in (a, b))
    pairs = [pair for some in scheme.passes for pair in some]
    assert len(pairs) == len(set(pairs)) == {1: 1, 2: 3, 3: 6}[scheme.parts]
    exact = sum(left[i].astype(np.float64).T @ right[j] for i, j in pairs)
    check_close(found, base + exact, 1e-6)


def test_the_twin_adds_as_the_processor_is_documented_to():
    """Even and odd elements are summed apart, so a large one swallows what is added to its own sum alone."""
    a = np.ones((4, 32), np.float32)
    a[0] = 2.0**24
    b = np.ones((4, 32), np.float32)
    found = amx.tile_ref(in_panels(a, True), in_panels(b, False), np.zeros((32, 32), np.float32))
    assert (found == np.float32(2**24 + 2)).all()  # (2^24 + 1) + (1 + 1); one after the other it would be 2^24
    tiny = np.full((1, 32), 2.0**-70, np.float32)
    assert (amx.tile_ref(in_panels(tiny, True), in_panels(tiny, False), np.zeros((32, 32), np.float32)) == 0).all()


@njit
def one_tile(c, d, i, j, rows, cols, a, b, k, add, table):
    begin(table)
    tile(c, d, i, j, rows, cols, a, 0, b, 0, k, add, table)
    end(table)


@here
@each_scheme
@pytest.mark.parametrize("scale", [1.0, 2.0**-66, 2.0**-70, 2.0**60])
def test_tile_equals_its_twin_bit_for_bit(rng, name, scale):
    """At every kind of edge; the small scales make denormal products and sums, the large one infinities."""
    for k in (1, 32, 100):
        a, b = operands(rng, 32, 32, k, scale)
        left, right = in_panels(a, True, name), in_panels(b, False, name)
        d = (scale * scale * rng.standard_normal((40, 50))).astype(np.float32)
        for rows, cols, add in ((32, 32, True), (32, 32, False), (1, 32, True), (17, 15, True), (32, 16, False)):
            c = np.full_like(d, np.nan)
            one_tile(c, d, 3, 5, rows, cols, left, right, len(left) // 32, add, FORMATS[name].table)
            block = (slice(3, 3 + rows), slice(5, 5 + cols))
            base = np.zeros((32, 32), np.float32)
            base[:rows, :cols] = d[block] if add else 0
            expected = amx.tile_ref(left, right, base, SCHEMES[name])[:rows, :cols]
            assert c[block].tobytes() == expected.tobytes()
            c[block] = np.nan
            assert np.isnan(c).all()  # nothing else was written


@here
@each_scheme
def test_nan_and_infinity_stay(rng, name):
    a, b = operands(rng, 40, 50, 33)
    a[3, 1], a[4, 2] = np.nan, np.inf
    c = np.empty((40, 50), np.float32)
    product(c, a, b, transpose_a=True, number_format=FORMATS[name])
    assert np.isnan(c[1]).all()
    assert np.isinf(c[2]).all()
    assert np.isfinite(np.delete(c, (1, 2), axis=0)).all()


@here
@each_scheme
def test_product_is_the_sum_of_its_tiles(rng, name):
    """A depth of several slices, a part whose packed A is kept for several slabs: all in the order of the twin."""
    one = FORMATS[name]
    m, n, k = (65, 2 * one.slab_columns + 33, one.slice_terms + 40) if JIT else (33, 40, 70)
    a, b = operands(rng, m, n, k)
    c = np.empty((m, n), np.float32)
    product(c, a, b, transpose_a=True, number_format=one)
    for i, j in ((0, 0), (32, 0), (32, n // 32 * 32)):
        left, right = a[:, i : i + 32], b[:, j : j + 32]
        expected = np.zeros((32, 32), np.float32)
        for first in range(0, k, one.slice_terms):
            these = slice(first, first + one.slice_terms)
            panels = in_panels(left[these], True, name), in_panels(right[these], False, name)
            expected = amx.tile_ref(*panels, expected, SCHEMES[name])
        found = c[i : i + 32, j : j + 32]
        assert found.tobytes() == expected[: found.shape[0], : found.shape[1]].tobytes()


@here
def test_every_thread_may_use_it(rng):
    """Threads of Python and of Numba that ran before the system was asked have permission as well."""
    a, b = operands(rng, 200, 300, 64)

    def compute(_):
        c = np.empty((200, 300), np.float32)
        product(c, a, b, transpose_a=True, number_format=AMX)
        return c.tobytes()

    with ThreadPoolExecutor(4) as pool:
        assert len(set(pool.map(compute, range(8)))) == 1


THREADS_FIRST = """
import os, threading
import numpy as np
from abi_py.kernels.engine.number_formats import BFLOAT16, FLOAT32
from abi_py.kernels.matmul import product
x = np.ones((200, 300), np.float32)
c = np.empty((200, 200), np.float32)
product(c, x, x, transpose_b=True, number_format=FLOAT32)  # starts Numba's threads
product(c, x, x, transpose_b=True, number_format=BFLOAT16)
assert (c == 300).all()
print(BFLOAT16.method)
"""


@here
@pytest.mark.skipif(not JIT, reason="nothing is compiled")
def test_threads_that_started_before_permission(monkeypatch):
    monkeypatch.setenv("ABI_BF16", "amx")
    done = subprocess.run([sys.executable, "-c", THREADS_FIRST], capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stdout.strip()) == (0, "amx"), done.stderr
