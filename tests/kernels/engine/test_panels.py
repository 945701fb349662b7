"""Panels: the four ways of packing, for each storage and each number format, at every edge.

What is expected is here in NumPy: one run checks the compiled operations, one with NUMBA_DISABLE_JIT=1 their twins.
"""

import numpy as np
import pytest
from numba import njit

from abi_py.kernels.engine.halves import round_to_bf16_ref, round_to_fp16_ref, widen_bf16_ref
from abi_py.kernels.engine.number_formats import BF16X3, BF16X6, FLOAT16, FLOAT32, METHODS
from abi_py.kernels.engine.panels import (
    as_stored,
    pack_a,
    pack_a_transposed,
    pack_b,
    pack_b_transposed,
    pack_stored_a,
    pack_stored_b,
    pack_stored_b_transposed,
    panel_depth,
)
from abi_py.kernels.engine.parts import bf16_parts_ref
from abi_py.kernels.engine.simd import LANES

UNTOUCHED = np.float32(-77)


def compiled(pack):
    """Return a compiled function that calls an operation which only compiled code can call."""

    @njit
    def call(panels, at, x, i, j, count, k, table):
        pack(panels, at, x, i, j, count, k, table)

    return call


# name: (function, whether the counted rows or columns are the rows of x)
PACKERS = {
    "a": (compiled(pack_a), True),
    "a_transposed": (compiled(pack_a_transposed), False),
    "b": (compiled(pack_b), False),
    "b_transposed": (compiled(pack_b_transposed), True),
}
STORED = {
    "a": compiled(pack_stored_a),
    "b": compiled(pack_stored_b),
    "b_transposed": compiled(pack_stored_b_transposed),
}
BY_PARTS = BF16X3.methods | {"six": BF16X6.methods.get("amx", FLOAT32)}
KINDS = {str(kind): kind for kind in (FLOAT32, *METHODS.values(), FLOAT16, *BY_PARTS.values()) if not kind.missing}
TABLES = {name: kind.table for name, kind in KINDS.items()}
DEPTHS = [1, 2, LANES - 1, LANES, 2 * LANES + 3, 4 * LANES, 64 * LANES + 1]


def matrix(rng, kind, stored, rows, columns):
    """Return a matrix of the given kind of strides and storage, with columns side by side."""
    x = rng.standard_normal((rows, columns + 9)).astype(np.float32)
    x = (x.view(np.uint32) >> 16).astype(np.uint16) if stored == "bfloat16" else x
    if kind == "wide":
        return x[:, 5 : 5 + columns]
    x = np.ascontiguousarray(x[:, :columns])
    return x[::-1] if kind == "backwards" else x


def pairs(block):
    """Pairs of rounded elements of a block (k, count): ((k + 1) // 2, count) float32, the first in the lower half."""
    halves = np.zeros((-(-block.shape[0] // 2) * 2, block.shape[1]), np.uint32)
    halves[: block.shape[0]] = round_to_bf16_ref(block).view(np.uint32) >> np.uint32(16)
    return (halves[::2] | halves[1::2] << np.uint32(16)).view(np.float32)


PLACES = {  # what the panels of each part of the elements hold
    "float32": lambda block: [block],
    "bfloat16": lambda block: [round_to_bf16_ref(block)],
    "bfloat16-pairs": lambda block: [pairs(block)],
    "bfloat16-amx": lambda block: [pairs(block)],
    "float16": lambda block: [round_to_fp16_ref(block)],
    "bf16x3": lambda block: [sum(bf16_parts_ref(block, 2))],
    "bf16x3-amx": lambda block: [pairs(part) for part in bf16_parts_ref(block, 2)],
    "bf16x6-amx": lambda block: [pairs(part) for part in bf16_parts_ref(block, 3)],
}


def width_of(name, number_format):
    """Return how many rows or columns a panel has."""
    kind = KINDS[number_format]
    return kind.rows if name.startswith("a") else kind.columns


def expected_panels(block, name, number_format):
    """Panels of a block (k, count): ceil(count / width) of (depth, width), filled up with zeros."""
    width, parts = width_of(name, number_format), PLACES[number_format](np.ascontiguousarray(widen_bf16_ref(block)))
    depth, count = panel_depth(block.shape[0], TABLES[number_format]) // len(parts), block.shape[1]
    filled = np.zeros((len(parts), depth, -(-count // width) * width), np.float32)
    for part, places in zip(filled, parts, strict=True):
        part[: len(places), :count] = places
    panels = filled.reshape(len(parts), depth, -1, width).transpose(2, 0, 1, 3)  # panel, part, place, lane
    if not number_format.endswith("-amx"):
        return panels.ravel()
    tiles = panels.reshape(len(panels), len(parts), depth // 16, 16, 2, 16)  # panel, part, block, pair, half, lane
    return tiles.transpose((0, 2, 1, 4, 5, 3) if name.startswith("a") else (0, 2, 1, 4, 3, 5)).ravel()


@pytest.mark.parametrize("kind", ["plain", "wide", "backwards"])
@pytest.mark.parametrize("stored", ["float32", "bfloat16"])
@pytest.mark.parametrize("number_format", TABLES)
@pytest.mark.parametrize("name", PACKERS)
def test_packing(rng, name, number_format, stored, kind):
    pack, rows_counted = PACKERS[name]
    width = width_of(name, number_format)
    at, i, j = 11, 2, 3
    for k in DEPTHS:
        for count in (1, width - 1, width, width + 1, 3 * width, 3 * width + width // 2 + 1):
            x = matrix(rng, kind, stored, *((i + count, j + k) if rows_counted else (i + k, j + count)))
            expected = expected_panels(x[i:, j:].T if rows_counted else x[i:, j:], name, number_format)
            panels = np.full(at + expected.size + 2 * LANES, UNTOUCHED)
            pack(panels, at, x, i, j, count, k, TABLES[number_format])
            assert panels[at : at + expected.size].tobytes() == expected.tobytes(), (k, count)
            assert (panels[:at] == UNTOUCHED).all()
            assert (panels[at + expected.size :] == UNTOUCHED).all()


@pytest.mark.parametrize("stored", ["float32", "bfloat16"])
@pytest.mark.parametrize("number_format", TABLES)
@pytest.mark.parametrize("name", PACKERS)
def test_packing_reads_nothing_beyond_the_edge(name, number_format, stored):
    """What is past the last row and column is NaN; none of it may show in the panels."""
    pack, rows_counted = PACKERS[name]
    width = width_of(name, number_format)
    nan, one = (0x7FC0, 0x3F80) if stored == "bfloat16" else (np.nan, 1)
    whole = np.full((4 * width + 64, 4 * width + 64), nan, np.uint16 if stored == "bfloat16" else np.float32)
    count, k = width + 3, LANES + 3  # an odd k: the last pair has one element
    whole[(slice(count), slice(k)) if rows_counted else (slice(k), slice(count))] = one
    panels = np.full(2 * width * panel_depth(k, TABLES[number_format]), np.nan, np.float32)
    pack(panels, 0, whole, 0, 0, count, k, TABLES[number_format])
    halves = widen_bf16_ref(panels.view(np.uint16)) if KINDS[number_format].fold == 2 else panels
    assert np.isin(halves, [0, 1]).all()


@pytest.mark.parametrize("kind", ["plain", "wide", "backwards"])
@pytest.mark.parametrize("number_format", TABLES)
@pytest.mark.parametrize("name", STORED)
def test_packing_what_is_stored_as_the_numbers_are(rng, name, number_format, kind):
    """The same panels as from the packer that knows the type, from x seen as uint16."""
    pack, rows_counted = PACKERS[name]
    width = width_of(name, number_format)
    i, j, k, count = 2, 3, 2 * LANES + 3, 2 * width + 1  # odd everywhere
    stored = "bfloat16" if number_format.startswith("bfloat16") else "float32"
    x = matrix(rng, kind, stored, *((i + count, j + k) if rows_counted else (i + k, j + count)))
    expected, panels = np.full((2, 3 * width * panel_depth(k + 32, TABLES[number_format])), UNTOUCHED)
    pack(expected, 0, x, i, j, count, k, TABLES[number_format])
    STORED[name](panels, 0, as_stored(x), i, j, count, k, TABLES[number_format])
    assert panels.tobytes() == expected.tobytes()


def packed_column(bits, kind):
    """Pack float32 given by their bits, each twice along the sum; return the panel's places as bits."""
    x = np.array(bits, np.uint32).view(np.float32)[:, None].repeat(2, axis=1)  # (count, k)
    depth = panel_depth(2, kind.table)
    panels = np.zeros(-(-len(bits) // kind.rows) * kind.rows * depth, np.float32)
    PACKERS["a"][0](panels, 0, x, 0, 0, len(bits), 2, kind.table)
    if str(kind) == "bfloat16-amx":
        return panels.view(np.uint32)[::16][: len(bits)]
    return panels.view(np.uint32).reshape(-1, kind.rows)[::depth].ravel()[: len(bits)]


def test_rounding_to_bfloat16():
    """To nearest even, with ties both ways, infinity reached by rounding, and NaN that stays NaN."""
    bits = [0x3F808000, 0x3F818000, 0x3F808001, 0x7F7FFFFF, 0x7F800000, 0x7F800001, 0xFFFFFFFF, 0x80000000]
    expected = [0x3F80, 0x3F82, 0x3F81, 0x7F80, 0x7F80, 0x7FC0, 0xFFFF, 0x8000]
    for number_format in METHODS.values():
        if number_format.missing:
            continue
        found = packed_column(bits, number_format)
        lower = expected if number_format.fold == 2 else [0] * len(expected)
        assert [hex(value >> 16) for value in found] == [hex(value) for value in expected]
        assert [hex(value & 0xFFFF) for value in found] == [hex(value) for value in lower]


def test_rounding_to_half_precision(rng):
    """As NumPy rounds, over all exponents: ties, the step to infinity at 65520, subnormal halves, zeros, infinities."""
    special = [1 + 2**-11, 1 + 3 * 2**-11, 65504, 65519.996, 65520, 1e30, 2**-14, 2**-24, 2**-25, 1.1 * 2**-25, 3e-8, 0]
    x = np.array([*special, np.inf, *(rng.standard_normal(500) * 2.0 ** rng.integers(-30, 20, 500))], np.float32)
    x = np.concatenate([x, -x])
    found = packed_column(x.view(np.uint32), FLOAT16)
    assert found.tobytes() == round_to_fp16_ref(x).tobytes()
    assert np.isnan(packed_column([0x7FC00000], FLOAT16).view(np.float32)).all()
