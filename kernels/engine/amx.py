"""AMX: Intel's tile registers, eight of 16 rows of 64 bytes, multiply bfloat16 with float32 sums.

    C (16, 16) += A (16, 32) B (32, 16)        `tdpbf16ps`: 8192 multiply-adds an instruction, 16 times as many as
                                               AVX-512's on float32

The register tile is 32 x 32 sums: 2 x 2 tiles of C, two of A, two of B, which are all eight, with one load for each
multiplication.  Panels are blocks of 32 elements of the sum, 2 KiB each, so that a row of a tile is a cache line:

    A (m, k)   element (r, p) at  [r // 32][p // 32][r // 16 % 2][r % 16][p % 32]
    B (k, n)   element (p, c) at  [c // 32][p // 32][c // 16 % 2][p // 2 % 16][c % 16][p % 2]

As 16 x 16 pairs, a tile of B is a tile of A transposed.  So each of the four ways of packing reads 16 vectors of 16
pairs, side by side in a row of x or one above the other in two rows, and transposes them where rows of x are not rows
of the tile.

What `tdpbf16ps` computes, bit for bit: the even and the odd elements of 32 are summed apart, from zero, each product
added with one rounding; both sums are added, and then to C.  Denormal numbers, read or made, are zero.

Linux gives tiles to a process that asks for them (arch_prctl); permission holds for all of its threads, for those that
run already, and for forked children.  A thread configures its tiles before a task and releases them after it: until
then the system saves 8 KiB more at each switch.

LLVM ends the process when it meets these instructions for a processor without them ("Cannot select"), so nothing here
is emitted for a machine that has them not (`lacks`).
"""

import ctypes
import functools
import os
import platform

import llvmlite.binding as llvm
import llvmlite.ir as ir
import numpy as np
from numba.core import cgutils

from .panels import transposed
from .routines import BEGIN, END, PACKERS, TILE, Routine
from .simd import (
    F32,
    I1,
    I16,
    I32,
    I64,
    ISA,
    constant,
    declare,
    first_lanes,
    load,
    masked_load,
    masked_store,
    move,
)

__all__ = ["SIDE", "UNIT_TERMS", "lacks", "packers", "panels_ref", "refused", "tile_ref", "tile_routines"]

SIDE = 32  # rows and columns of the register tile
UNIT_TERMS = 32  # elements of the sum of a tile register's row
BLOCK = SIDE * UNIT_TERMS // 2  # floats of a block of a panel
HALF = BLOCK // 2  # floats of a tile register
FEATURES = "amx-tile", "amx-bf16", "avx512bf16"
ARCH_PRCTL, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA = 158, 0x1023, 18  # Linux, Documentation/arch/x86/xstate.rst

I8 = ir.IntType(8)
BYTES = I8.as_pointer()
FLOATS = ir.VectorType(F32, 16)
PAIRS = ir.VectorType(I32, 16)


# -- whether it can be used ----------------------------------------------------------------------


def lacks() -> str:
    """Say why this machine can't be asked for tiles, or return "": nothing may be emitted for one that can't."""
    if ISA.name != "avx512":
        return f"kernels use {ISA.name}, and it needs avx512"
    if (platform.system(), platform.machine()) != ("Linux", "x86_64"):
        return f"it is used on Linux and x86_64, not on {platform.system()} and {platform.machine()}"
    features = llvm.get_host_cpu_features()
    missing = [name for name in FEATURES if not features.get(name)]
    return f"the processor or the system has no {', '.join(missing)}" if missing else ""


@functools.cache
def refused() -> str:
    """Ask the system for tiles; say why it gives none, or return "": without permission their first use is fatal."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.syscall(ARCH_PRCTL, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA) == 0:
        return ""
    return f"the system refuses it: {os.strerror(ctypes.get_errno())}"  # ENOSPC: a signal stack is too small


# -- reference: what is packed, and what a tile computes, bit for bit ----------------------------


def flushed(x: np.ndarray) -> np.ndarray:
    """Return float32 x with denormal numbers made zero."""
    return np.where(np.abs(x) < np.finfo(np.float32).tiny, np.copysign(np.float32(0), x), x)


def panels_ref(block: np.ndarray, of_a: bool) -> np.ndarray:
    """Return panels, flat float32 of two bfloat16 each, of elements (k, n) float32 that are rounded."""
    k, n = block.shape
    full = np.zeros((-(-n // SIDE) * SIDE, -(-k // UNIT_TERMS) * UNIT_TERMS), np.uint16)
    full[:n, :k] = (np.ascontiguousarray(block).view(np.uint32) >> np.uint32(16)).T
    tiles = full.view(np.uint32).reshape(-1, 2, 16, full.shape[1] // UNIT_TERMS, 16)  # panel, half, lane, block, pair
    tiles = tiles.transpose(0, 3, 1, 2, 4) if of_a else tiles.transpose(0, 3, 1, 4, 2)
    return np.ascontiguousarray(tiles).ravel().view(np.float32)


def _unpacked(panel, of_a):
    """Return elements (blocks, 16 pairs, 2, 32) of a panel."""
    tiles = panel.view(np.uint32).reshape(-1, 2, 16, 16)  # block, half, and lane and pair, or pair and lane
    tiles = tiles.transpose(0, 3, 1, 2) if of_a else tiles.transpose(0, 2, 1, 3)  # block, pair, half, lane
    pairs = np.ascontiguousarray(tiles).reshape(len(tiles), 16, SIDE)
    return flushed(np.stack([pairs << np.uint32(16), pairs & np.uint32(0xFFFF0000)], axis=2).view(np.float32))


def tile_ref(a: np.ndarray, b: np.ndarray, base: np.ndarray) -> np.ndarray:
    """Return base (32, 32) + the product of a panel of A and one of B, as the processor adds."""
    c = base
    with np.errstate(all="ignore"):
        for left, right in zip(_unpacked(a, True), _unpacked(b, False), strict=True):
            sums = np.zeros((2, SIDE, SIDE), np.float32)
            for x, y in zip(left, right, strict=True):  # a product of two bfloat16 is exact in float32
                sums = flushed(sums + x[:, :, None] * y[:, None, :])
            c = flushed(flushed(c) + flushed(sums[0] + sums[1]))
    return c


# -- the tile ------------------------------------------------------------------------------------


def tile_routines() -> dict[int, Routine]:
    """Return the tile, and what frames a task's tiles: {slot of a table: routine}."""
    arguments = [F32.as_pointer()] * 4 + [I64] * 5 + [I1]
    return {TILE: (arguments, _tile_body), BEGIN: ([], _configure), END: ([], _release)}


def _configure(builder):
    """Emit `ldtilecfg`: palette 1, eight tiles of 16 rows of 64 bytes."""
    content = bytearray(64)
    content[0] = 1
    content[16:32:2] = [64] * 8  # bytes of a row, uint16
    content[48:56] = [16] * 8  # rows
    kind = ir.ArrayType(I8, 64)
    configuration = ir.GlobalVariable(builder.module, kind, "tile_configuration")
    configuration.linkage, configuration.global_constant, configuration.align = "internal", True, 64
    configuration.initializer = ir.Constant(kind, content)
    call = declare(builder, "llvm.x86.ldtilecfg", ir.VoidType(), [BYTES])
    builder.call(call, [builder.bitcast(configuration, BYTES)])


def _release(builder):
    builder.call(declare(builder, "llvm.x86.tilerelease", ir.VoidType(), []), [])


def _on_tiles(builder, name, *tiles):
    operation = declare(builder, f"llvm.x86.{name}", ir.VoidType(), [I8] * len(tiles))
    builder.call(operation, [ir.Constant(I8, tile) for tile in tiles])


def _move_tile(builder, name, tile, at, row):
    """Emit a load or store of a tile, whose rows are `row` floats apart."""
    operation = declare(builder, f"llvm.x86.{name}", ir.VoidType(), [I8, BYTES, I64])
    values = ir.Constant(I8, tile), builder.bitcast(at, BYTES), builder.mul(row, constant(4))
    builder.call(operation, values)


def _tile_body(builder, c, d, a, b, c_row, d_row, rows, cols, k, add):
    """Emit C = A B (+ D): sums in tiles 0 to 3, A in 4 and 5, B in 6 and 7; the edge of C goes through memory here."""
    memory = cgutils.alloca_once(builder, ir.ArrayType(F32, SIDE * SIDE))
    memory.align = 64
    memory = builder.bitcast(memory, F32.as_pointer())
    whole = builder.and_(*(builder.icmp_signed("==", size, constant(SIDE)) for size in (rows, cols)))

    def corners(name, at, row):
        at, row = builder.select(whole, at, memory), builder.select(whole, row, constant(SIDE))
        for tile in range(4):
            down = builder.mul(row, constant(16 * (tile // 2)))
            _move_tile(builder, name, tile, move(builder, move(builder, at, down), 16 * (tile % 2)), row)

    def at_edge(copy, matrix, row):
        with (
            builder.if_then(builder.not_(whole), likely=False),
            cgutils.for_range(builder, rows) as loop,
        ):
            far = move(builder, matrix, builder.mul(row, loop.index))
            near = move(builder, memory, builder.mul(constant(SIDE), loop.index))
            for first in (0, 16):
                mask = first_lanes(builder, builder.sub(cols, constant(first)), 16)
                copy(move(builder, far, first), move(builder, near, first), mask)

    def fetch(far, near, mask):
        builder.store(masked_load(builder, far, mask, vector=FLOATS), builder.bitcast(near, FLOATS.as_pointer()))

    def put(far, near, mask):
        masked_store(builder, load(builder, near, FLOATS), far, mask)

    with builder.if_else(add) as (then, otherwise):
        with then:
            at_edge(fetch, d, d_row)
            corners("tileloadd64", d, d_row)
        with otherwise:
            for tile in range(4):
                _on_tiles(builder, "tilezero", tile)
    with cgutils.for_range(builder, builder.sdiv(k, constant(UNIT_TERMS // 2))) as loop:
        left, right = (move(builder, x, builder.mul(loop.index, constant(BLOCK))) for x in (a, b))
        for tile, at in ((6, right), (4, left), (7, move(builder, right, HALF)), (5, move(builder, left, HALF))):
            _move_tile(builder, "tileloadd64", tile, at, constant(16))
        for tile in range(4):
            _on_tiles(builder, "tdpbf16ps", tile, 4 + tile // 2, 6 + tile % 2)
    corners("tilestored64", c, c_row)
    at_edge(put, c, c_row)


# -- packing -------------------------------------------------------------------------------------

WAYS = (  # in the order of panels.FORMS: whether x has the sum's index along its rows; whether pairs are transposed
    (True, False),
    (False, True),
    (False, False),
    (True, True),
)


def packers() -> dict[int, Routine]:
    """Return the routines that pack: {slot of a table: routine}, for float32 and bfloat16 in turn."""
    found: dict[int, Routine] = {}
    for form, ways in enumerate(WAYS):
        for index, element in enumerate((F32, I16)):
            arguments = [F32.as_pointer(), element.as_pointer(), I64, I64, I64]
            found[PACKERS + 2 * form + index] = arguments, functools.partial(_call_pack, element, *ways)
    return found


def _call_pack(element, along, turned, builder, *arguments):
    _pack_body(builder, element, along, turned, *arguments)


def _read(builder, at, vector, left):
    if left is None:
        return load(builder, at, vector)
    return masked_load(builder, at, first_lanes(builder, left, vector.count), vector=vector)


def _as_pairs(builder, element, first, second, left, left_of_second, interleaved):
    """Read 16 pairs: of 32 elements side by side, or of 16 here and 16 there.  `left` of them exist (None: all)."""
    if element == I16 and not interleaved:
        return builder.bitcast(_read(builder, first, ir.VectorType(I16, 32), left), PAIRS)
    vector = ir.VectorType(element, 16)
    lower, upper = _read(builder, first, vector, left), _read(builder, second, vector, left_of_second)
    wide = ir.VectorType(I16, 32)
    if element == I16:
        both = lower, upper
    else:  # to nearest even; NaN stays NaN, and denormal numbers become zero, as they are to the tile in any case
        round_two = declare(builder, "llvm.x86.avx512bf16.cvtne2ps2bf16.512", _BFloats(), [FLOATS, FLOATS])
        rounded = builder.bitcast(builder.call(round_two, [upper, lower]), wide)
        if not interleaved:
            return builder.bitcast(rounded, PAIRS)
        both = rounded, rounded
    lanes = [i // 2 + 16 * (i % 2) for i in range(32)]
    return builder.bitcast(builder.shuffle_vector(*both, ir.Constant(ir.VectorType(I32, 32), lanes)), PAIRS)


class _BFloats(ir.VectorType):
    """<32 x bfloat>: llvmlite has no bfloat."""

    def __init__(self):
        super().__init__(I16, 32)

    def __str__(self):
        return "<32 x bfloat>"

    _to_string = __str__

    def __eq__(self, other):
        return isinstance(other, _BFloats)

    def __hash__(self):
        return hash(_BFloats)


def _pack_body(builder, element, along, turned, to, source, row, count, k):
    """Emit packing, a block of a panel after the other; the inner loop goes where x is read from end to end."""
    blocks = builder.sdiv(builder.add(k, constant(UNIT_TERMS - 1)), constant(UNIT_TERMS))

    def line(lane, p, i, whole):
        """Read the pairs of lane i, from element p of the sum on; or the pair i of 16 lanes."""
        r, c = (builder.add(lane, constant(i)), p) if along else (builder.add(p, constant(2 * i)), lane)
        first = builder.gep(source, [builder.add(builder.mul(r, row), c)])
        second = move(builder, first, 16) if along else builder.gep(first, [row])
        if whole:
            return _as_pairs(builder, element, first, second, None, None, not along)
        if along:
            left = builder.select(builder.icmp_signed("<", r, count), builder.sub(k, p), constant(0))
            return _as_pairs(builder, element, first, second, left, builder.sub(left, constant(16)), False)
        lefts = (
            builder.select(
                builder.icmp_signed("<", builder.add(r, constant(next_one)), k), builder.sub(count, c), constant(0)
            )
            for next_one in (0, 1)
        )
        return _as_pairs(builder, element, first, second, *lefts, True)

    def block(first, p, whole):
        place = builder.add(builder.mul(builder.sdiv(first, constant(SIDE)), blocks), builder.sdiv(p, constant(32)))
        start = move(builder, to, builder.mul(place, constant(BLOCK)))
        for half in (0, 1):
            lane = builder.add(first, constant(16 * half))
            lines = [line(lane, p, i, whole) for i in range(16)]
            for i, pairs in enumerate(transposed(builder, lines) if turned else lines):
                at = move(builder, start, HALF * half + 16 * i)
                builder.store(pairs, builder.bitcast(at, PAIRS.as_pointer())).align = 4

    def visit(first, p):
        ends = (builder.icmp_signed("<=", builder.add(at, constant(32)), end) for at, end in ((first, count), (p, k)))
        with builder.if_else(builder.and_(*ends)) as (inside, edge):
            with inside:
                block(first, p, True)
            with edge:
                block(first, p, False)

    def each(end):
        return cgutils.for_range_slice(builder, constant(0), end, constant(32), I64)

    if along:
        with each(count) as (first, _), each(k) as (p, _):
            visit(first, p)
    else:
        with each(k) as (p, _), each(count) as (first, _):
            visit(first, p)
