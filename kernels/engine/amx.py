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

float32 by parts (`parts.py`): a block of a panel then holds all parts of its elements, one after the other, and the
tile multiplies those that a *scheme* pairs.  Consecutive pairs share an operand, so three products need 8 loads for 12
multiplications, six need 16 for 24.  Six products are to be as exact as float32, so the small ones of the whole panel
come first, and what is added to comes last.

What `tdpbf16ps` computes, bit for bit: the even and the odd elements of 32 are summed apart, from zero, each product
added with one rounding; both sums are added, and then to C.  Denormal numbers, read or made, are zero.

Linux gives tiles to a process that asks for them (arch_prctl); permission holds for all of its threads, for those that
run already, and for forked children.  A thread configures its tiles before a task and releases them after it: until
then the system saves 8 KiB more at each switch.

LLVM ends the process when it meets these instructions for a processor without them ("Cannot select"), so nothing here
is emitted for a machine that has them not (`lacks`).

Longer than 400 lines because layout, packing, tile and the reference of each are read side by side.
"""

import ctypes
import functools
import os
import platform
from typing import NamedTuple

import llvmlite.binding as llvm
import llvmlite.ir as ir
import numpy as np
from numba.core import cgutils

from .panels import transposed
from .parts import bf16_parts_ref
from .routines import BEGIN, END, PACKERS, TILE, Routine
from .simd import (
    F32,
    I1,
    I8,
    I16,
    I32,
    I64,
    ISA,
    constant,
    declare,
    fetch,
    first_lanes,
    load,
    load_first,
    masked_load,
    masked_store,
    move,
)

__all__ = [
    "PLAIN",
    "SIDE",
    "SIX",
    "THREE",
    "UNIT_TERMS",
    "Scheme",
    "lacks",
    "packers",
    "panels_ref",
    "refused",
    "tile_ref",
    "tile_routines",
]

SIDE = 32  # rows and columns of the register tile
UNIT_TERMS = 32  # elements of the sum of a tile register's row
BLOCK = SIDE * UNIT_TERMS // 2  # floats of a block of a panel
HALF = BLOCK // 2  # floats of a tile register
FEATURES = "amx-tile", "amx-bf16", "avx512bf16"
ARCH_PRCTL, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA = 158, 0x1023, 18  # Linux, Documentation/arch/x86/xstate.rst

BYTES = I8.as_pointer()
FLOATS = ir.VectorType(F32, 16)
PAIRS = ir.VectorType(I32, 16)


class Scheme(NamedTuple):
    """Which products of parts are added up, and in which order."""

    parts: int  # of an element
    passes: tuple[tuple[tuple[int, int], ...], ...]  # over two panels: pairs of a part of A and one of B
    base_last: bool  # what the product is added to comes last, not first


PLAIN = Scheme(1, (((0, 0),),), False)
THREE = Scheme(2, (((1, 0), (0, 0), (0, 1)),), False)
SIX = Scheme(3, (((2, 0), (1, 0), (1, 1), (0, 1), (0, 2)), ((0, 0),)), True)


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


def panels_ref(block: np.ndarray, of_a: bool, scheme: Scheme = PLAIN) -> np.ndarray:
    """Return panels, flat float32 of two bfloat16 each, of elements (k, n) float32."""
    parts = [_panels_of(part, of_a).reshape(-1, BLOCK) for part in bf16_parts_ref(block, scheme.parts, flushed)]
    return np.stack(parts, axis=1).ravel()


def _panels_of(block, of_a):
    """Return panels of elements (k, n) float32 that hold bfloat16."""
    k, n = block.shape
    full = np.zeros((-(-n // SIDE) * SIDE, -(-k // UNIT_TERMS) * UNIT_TERMS), np.uint16)
    full[:n, :k] = (np.ascontiguousarray(block).view(np.uint32) >> np.uint32(16)).T
    tiles = full.view(np.uint32).reshape(-1, 2, 16, full.shape[1] // UNIT_TERMS, 16)  # panel, half, lane, block, pair
    tiles = tiles.transpose(0, 3, 1, 2, 4) if of_a else tiles.transpose(0, 3, 1, 4, 2)
    return np.ascontiguousarray(tiles).ravel().view(np.float32)


def _unpacked(panel, of_a):
    """Return elements (blocks, 16 pairs, 2, 32) of one part of a panel, (blocks, BLOCK)."""
    words = np.ascontiguousarray(panel).view(np.uint32)
    tiles = words.reshape(-1, 2, 16, 16)  # block, half, and lane and pair, or pair and lane
    tiles = tiles.transpose(0, 3, 1, 2) if of_a else tiles.transpose(0, 2, 1, 3)  # block, pair, half, lane
    pairs = np.ascontiguousarray(tiles).reshape(len(tiles), 16, SIDE)
    return flushed(np.stack([pairs << np.uint32(16), pairs & np.uint32(0xFFFF0000)], axis=2).view(np.float32))


def tile_ref(a: np.ndarray, b: np.ndarray, base: np.ndarray, scheme: Scheme = PLAIN) -> np.ndarray:
    """Return base (32, 32) + the product of a panel of A and one of B, as the processor adds."""
    lefts, rights = (
        [_unpacked(panel.reshape(-1, scheme.parts, BLOCK)[:, part], of_a) for part in range(scheme.parts)]
        for panel, of_a in ((a, True), (b, False))
    )
    c = np.zeros_like(base) if scheme.base_last else base
    with np.errstate(all="ignore"):
        for pairs in scheme.passes:
            for block in range(len(lefts[0])):
                for left, right in pairs:
                    c = _multiplied(c, lefts[left][block], rights[right][block])
        return c + base if scheme.base_last else c


def _multiplied(c, left, right):
    """Return c + the product of a block of A and one of B, each (16 pairs, 2, 32)."""
    sums = np.zeros((2, SIDE, SIDE), np.float32)
    for x, y in zip(left.astype(np.float64), right.astype(np.float64), strict=True):
        # Rounded once: of these sums float64 leaves out nothing that a float32 would show.
        sums = flushed((sums + x[:, :, None] * y[:, None, :]).astype(np.float32))
    return flushed(flushed(c) + flushed(sums[0] + sums[1]))


# -- the tile ------------------------------------------------------------------------------------


def tile_routines(scheme: Scheme = PLAIN) -> dict[int, Routine]:
    """Return the tile, and what frames a task's tiles: {slot of a table: routine}."""
    arguments = [F32.as_pointer()] * 4 + [I64] * 5 + [I1]
    return {TILE: (arguments, functools.partial(_tile_body, scheme)), BEGIN: ([], _configure), END: ([], _release)}


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


FETCHED_ROWS = 4  # of C, for each step of the sum


def _fetch_ahead(builder, step, at, row, blocks):
    """Emit the fetching of a tile of C, a few rows with each step of the sum; return the steps done.

    Where the sum is too short for that, C has just been written, and no step is done.
    """
    steps = SIDE // FETCHED_ROWS
    done = builder.select(builder.icmp_signed("<", blocks, constant(steps)), constant(0), constant(steps))
    with cgutils.for_range(builder, done) as loop:
        for i in range(FETCHED_ROWS):
            line = builder.add(builder.mul(loop.index, constant(FETCHED_ROWS)), constant(i))
            first = move(builder, at, builder.mul(row, line))
            for column in (0, 16, SIDE - 1):  # a row that begins inside a cache line is in three
                fetch(builder, move(builder, first, column), write=True)
        step(loop.index)
    return done


def _tile_body(scheme, builder, c, d, a, b, c_row, d_row, rows, cols, k, add):
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

    def get(far, near, mask):
        builder.store(masked_load(builder, far, mask, vector=FLOATS), builder.bitcast(near, FLOATS.as_pointer()))

    def put(far, near, mask):
        masked_store(builder, load(builder, near, FLOATS), far, mask)

    first = builder.and_(add, builder.not_(ir.Constant(I1, scheme.base_last)))
    with builder.if_else(first) as (then, otherwise):
        with then:
            at_edge(get, d, d_row)
            corners("tileloadd64", d, d_row)
        with otherwise:
            for tile in range(4):
                _on_tiles(builder, "tilezero", tile)
    blocks = builder.sdiv(k, constant(scheme.parts * UNIT_TERMS // 2))
    below = move(builder, d, builder.mul(d_row, constant(SIDE)))  # for the tile after this one, which reads D first
    ahead = (builder.select(first, x, y) for x, y in ((below, c), (d_row, c_row)))
    step, *others = (_pass_step(builder, scheme, pairs, a, b) for pairs in scheme.passes)
    begun = _fetch_ahead(builder, step, *ahead, blocks)
    with cgutils.for_range_slice(builder, begun, blocks, constant(1), I64) as (block, _):
        step(block)
    for step in others:
        with cgutils.for_range(builder, blocks) as loop:
            step(loop.index)

    def write(builder):
        corners("tilestored64", c, c_row)
        at_edge(put, c, c_row)

    if not scheme.base_last:
        write(builder)
        return
    with builder.if_else(add) as (then, otherwise):
        with then:
            for tile in range(4):
                at = move(builder, memory, SIDE * 16 * (tile // 2) + 16 * (tile % 2))
                _move_tile(builder, "tilestored64", tile, at, constant(SIDE))
            with cgutils.for_range(builder, rows) as loop:
                near = move(builder, memory, builder.mul(constant(SIDE), loop.index))
                base, far = (move(builder, x, builder.mul(row, loop.index)) for x, row in ((d, d_row), (c, c_row)))
                for lane in (0, 16):
                    mask = first_lanes(builder, builder.sub(cols, constant(lane)), 16)
                    old = masked_load(builder, move(builder, base, lane), mask, vector=FLOATS)
                    total = builder.fadd(load(builder, move(builder, near, lane), FLOATS), old)
                    masked_store(builder, total, move(builder, far, lane), mask)
        with otherwise:
            write(builder)


def _pass_step(builder, scheme, pairs, a, b):
    """Return what emits a step of one pass over two panels: step(block), the products of pairs of parts of a block."""

    def step(block):
        stride = builder.mul(block, constant(scheme.parts * BLOCK))
        left, right = (move(builder, x, stride) for x in (a, b))
        held = None, None
        for pair in pairs:
            x, y = (move(builder, at, BLOCK * part) for at, part in zip((left, right), pair, strict=True))
            loads = ((1, 6, y), (0, 4, x), (1, 7, move(builder, y, HALF)), (0, 5, move(builder, x, HALF)))
            for operand, tile, at in loads:
                if held[operand] != pair[operand]:
                    _move_tile(builder, "tileloadd64", tile, at, constant(16))
            held = pair
            for tile in range(4):
                _on_tiles(builder, "tdpbf16ps", tile, 4 + tile // 2, 6 + tile % 2)

    return step


# -- packing -------------------------------------------------------------------------------------

WAYS = (  # in the order of panels.FORMS: whether x has the sum's index along its rows; whether pairs are transposed
    (True, False),
    (False, True),
    (False, False),
    (True, True),
)


def packers(parts: int = 1) -> dict[int, Routine]:
    """Return the routines that pack so many parts: {slot of a table: routine}, for float32 and bfloat16 in turn."""
    found: dict[int, Routine] = {}
    for form, ways in enumerate(WAYS):
        for index, element in enumerate((F32, I16)):
            arguments = [F32.as_pointer(), element.as_pointer(), I64, I64, I64]
            found[PACKERS + 2 * form + index] = arguments, functools.partial(_call_pack, element, parts, *ways)
    return found


def _call_pack(element, parts, along, turned, builder, *arguments):
    _pack_body(builder, element, parts, along, turned, *arguments)


def _as_pairs(builder, element, parts, first, second, left, left_of_second, interleaved):
    """Read 16 pairs: of 32 elements side by side, or of 16 here and 16 there.  `left` of them exist (None: all).

    Return the pairs of each part of the elements.
    """
    nothing = [ir.Constant(PAIRS, [0] * 16)] * (parts - 1)  # a bfloat16 is its own first part
    if element == I16 and not interleaved:
        return [builder.bitcast(load_first(builder, first, ir.VectorType(I16, 32), left), PAIRS), *nothing]
    vector = ir.VectorType(element, 16)
    lower, upper = load_first(builder, first, vector, left), load_first(builder, second, vector, left_of_second)
    wide = ir.VectorType(I16, 32)
    if element == I16:
        return [_interleaved(builder, lower, upper), *nothing]
    # To nearest even; NaN stays NaN, and denormal numbers become zero, as they are to the tile in any case.
    round_two = declare(builder, "llvm.x86.avx512bf16.cvtne2ps2bf16.512", _BFloats(), [FLOATS, FLOATS])
    found = []
    for part in range(parts):
        rounded = builder.bitcast(builder.call(round_two, [upper, lower]), wide)
        if part < parts - 1:
            rounded = _kept_finite(builder, rounded)
            lower, upper = (builder.fsub(x, _widened(builder, rounded, lane)) for x, lane in ((lower, 0), (upper, 16)))
        found.append(_interleaved(builder, rounded, rounded) if interleaved else builder.bitcast(rounded, PAIRS))
    return found


def _interleaved(builder, lower, upper):
    """Return pairs of the first 16 elements of a vector and 16 of the other: its first, or its last if it has 32."""
    lanes = [i // 2 + 16 * (i % 2) for i in range(32)]
    return builder.bitcast(builder.shuffle_vector(lower, upper, ir.Constant(ir.VectorType(I32, 32), lanes)), PAIRS)


def _kept_finite(builder, halves):
    """Return bfloat16 with the largest finite number in the place of infinity."""
    size = builder.and_(halves, ir.Constant(halves.type, [0x7FFF] * 32))
    infinite = builder.icmp_unsigned("==", size, ir.Constant(halves.type, [0x7F80] * 32))
    return builder.select(infinite, builder.sub(halves, ir.Constant(halves.type, [1] * 32)), halves)


def _widened(builder, halves, lane):
    """Return 16 of 32 bfloat16, from `lane` on, as float32."""
    some = builder.shuffle_vector(halves, halves, ir.Constant(PAIRS, list(range(lane, lane + 16))))
    return builder.bitcast(builder.shl(builder.zext(some, PAIRS), ir.Constant(PAIRS, [16] * 16)), FLOATS)


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


def _pack_body(builder, element, parts, along, turned, to, source, row, count, k):
    """Emit packing, a block of a panel after the other; the inner loop goes where x is read from end to end."""
    blocks = builder.sdiv(builder.add(k, constant(UNIT_TERMS - 1)), constant(UNIT_TERMS))

    def line(lane, p, i, whole):
        """Read the pairs of lane i, from element p of the sum on; or the pair i of 16 lanes."""
        r, c = (builder.add(lane, constant(i)), p) if along else (builder.add(p, constant(2 * i)), lane)
        first = builder.gep(source, [builder.add(builder.mul(r, row), c)])
        second = move(builder, first, 16) if along else builder.gep(first, [row])
        if whole:
            for at in (first, second):
                fetch(builder, builder.gep(at, [builder.mul(row, constant(SIDE))]))
            return _as_pairs(builder, element, parts, first, second, None, None, not along)
        if along:
            left = builder.select(builder.icmp_signed("<", r, count), builder.sub(k, p), constant(0))
            return _as_pairs(builder, element, parts, first, second, left, builder.sub(left, constant(16)), False)
        lefts = (
            builder.select(
                builder.icmp_signed("<", builder.add(r, constant(next_one)), k), builder.sub(count, c), constant(0)
            )
            for next_one in (0, 1)
        )
        return _as_pairs(builder, element, parts, first, second, *lefts, True)

    def block(first, p, whole):
        place = builder.add(builder.mul(builder.sdiv(first, constant(SIDE)), blocks), builder.sdiv(p, constant(32)))
        start = move(builder, to, builder.mul(place, constant(parts * BLOCK)))
        for half in (0, 1):
            lane = builder.add(first, constant(16 * half))
            lines = [line(lane, p, i, whole) for i in range(16)]
            for part, pairs in enumerate(zip(*lines, strict=True)):
                for i, each in enumerate(transposed(builder, pairs) if turned else pairs):
                    at = move(builder, start, BLOCK * part + HALF * half + 16 * i)
                    builder.store(each, builder.bitcast(at, PAIRS.as_pointer())).align = 4

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
