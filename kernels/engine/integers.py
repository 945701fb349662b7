"""Whole numbers times whole numbers, with scales of groups: the inside of `integer_matmul.py`, in LLVM.

    spread        LANES rows of raw become rows of bytes q, scales and offsets
    turn          LANES rows of 32-bit words become a panel: a vector for each column
    multiply      c (rows, LANES) = (d +) x panelᵀ, of whole numbers in bytes

A panel is LANES rows of W side by side: for every four columns a vector of 32-bit words, of which each has four
numbers q, 0 to 255, of one row; for every group of columns a vector of scales, and of offsets where there are any:

    for each group g of columns, in order:      n = Σ_k x_k (q_k - zero)                    exact, in 32 bits
                                                c += float32(n) (d scale_g)                 each operation rounded
                                                c -= (d Σ_k x_k) offset_g                   where there are offsets

where d is the scale of the row's 32 numbers.  Sums of whole numbers have the same bits in any order and by any
instruction, and what is rounded is rounded one group after the other; so a row's bits do not depend on how many rows
are multiplied, nor on the instruction set: `grouped_ref` has the same.  Nothing is fused, since not every machine can.
"""

import functools
import hashlib
import inspect
from typing import Any

import llvmlite.ir as ir
import numpy as np
from numba import types
from numba.core import cgutils

from .cache import source_hash
from .few_rows import FEW_ARGUMENTS, FEW_COUNTS, few_body
from .panels import transposed
from .routines import Routine, call_routine, entry_of, routine_table
from .scratch import LINE_BYTES
from .simd import (
    F32,
    I1,
    I8,
    I32,
    I64,
    LANES,
    VECTOR,
    ZERO,
    broadcast,
    constant,
    fetch,
    first_lanes,
    load,
    masked_load,
    masked_store,
    move,
    pointer,
    row_length,
    store,
    with_twin,
)
from .spread import Block
from .whole_numbers import (
    BLOCK_BYTES,
    BLOCK_SIZE,
    GROUP,
    IN_REGISTERS,
    KNOWN,
    MULTIPLY,
    OFFSETS,
    SCALED,
    SPREAD,
    TURN,
    WHICH,
    dot,
    grouped_ref,
)

__all__ = ["AT_ONCE", "integers", "multiply", "spread", "turn"]

AT_ONCE = 8  # rows of x that are multiplied at once: their sums of either kind fit the registers
ROW_COUNTS = tuple(2**i for i in range(AT_ONCE.bit_length()))
LANE_WORDS = ir.VectorType(I32, LANES)


# -- LLVM ----------------------------------------------------------------------------------------


def _spread_body(storage, builder, q, scale, offset, raw, following, q_row, scale_row, raw_row, rows, blocks):
    """Emit the reading of rows, block by block; with each, as many bytes from `following` on are fetched."""
    groups = storage.block // storage.group
    row_bytes = builder.mul(blocks, constant(storage.bytes_per_block))
    with cgutils.for_range(builder, rows) as row:
        lines = [builder.mul(row.index, step) for step in (q_row, scale_row, raw_row)]
        to_q = move(builder, builder.bitcast(q, I8.as_pointer()), builder.mul(lines[0], constant(4)))
        to_scale, to_offset = (move(builder, at, lines[1]) for at in (scale, offset))
        source = move(builder, raw, lines[2])
        ahead = move(builder, following, builder.mul(row.index, row_bytes))
        with cgutils.for_range(builder, blocks) as block:
            first = builder.mul(block.index, constant(storage.bytes_per_block))
            for line in range(0, storage.bytes_per_block, LINE_BYTES):
                fetch(builder, move(builder, move(builder, ahead, first), line))
            at = move(builder, source, first)
            parts = storage.integers_of(Block(builder, at))
            places = (to_q, storage.block), (to_scale, groups), (to_offset, groups)
            for vectors, (to, size) in zip(parts, places, strict=True):
                place = move(builder, to, builder.mul(block.index, constant(size)))
                for vector in vectors or ():
                    kind = vector.value.type
                    builder.store(vector.value, builder.bitcast(place, kind.as_pointer())).align = 1
                    place = move(builder, place, getattr(kind, "count", 1))


def _turn_body(builder, to, source, row, count):
    """Emit the transposing of `count` columns, rounded up to LANES, of LANES rows that are `row` words apart."""
    with cgutils.for_range_slice(builder, constant(0), count, constant(LANES), I64) as (p, _):
        starts = (move(builder, source, builder.mul(row, constant(r))) for r in range(LANES))
        lines = [load(builder, move(builder, start, p)) for start in starts]
        for column, line in enumerate(transposed(builder, lines)):
            at = builder.mul(builder.add(p, constant(column)), constant(LANES))
            store(builder, line, move(builder, to, at))


def _multiply_body(together, group, offsets, builder, *arguments):
    """Emit the product of `rows` <= together rows of x with one panel, group by group."""
    c, d, x, dx, sums, w, scales, offs, c_row, d_row, x_row, dx_row, sums_row, rows, cols, blocks, add = arguments
    mask = first_lanes(builder, cols)
    words = I32.as_pointer()
    inside = [builder.icmp_signed("<", constant(r), rows) for r in range(together)]
    # A row that exists; what comes of others is not stored.
    existing = [builder.select(flag, constant(r), constant(0)) for r, flag in enumerate(inside)]

    def lines(at, row):
        return [move(builder, at, builder.mul(r, row)) for r in existing]

    lines_x = [builder.bitcast(at, words) for at in lines(x, x_row)]
    lines_d, lines_sums = lines(dx, dx_row), lines(sums, sums_row)
    totals = [cgutils.alloca_once(builder, VECTOR) for _ in range(together)]
    for at, total in zip(lines(d, d_row), totals, strict=True):
        builder.store(builder.select(add, masked_load(builder, at, mask), ZERO), total)

    with cgutils.for_range(builder, blocks) as loop:
        factors = [broadcast(builder, builder.load(move(builder, at, loop.index)), VECTOR) for at in lines_d]
        for part in range(SCALED // group):
            at_group = builder.add(builder.mul(loop.index, constant(SCALED // group)), constant(part))
            at_panel = builder.mul(at_group, constant(LANES))
            if offsets:
                found = [ir.Constant(LANE_WORDS, [0] * LANES)] * together
            else:  # -zero Σ x
                starts = (builder.load(builder.bitcast(move(builder, at, at_group), words)) for at in lines_sums)
                found = [broadcast(builder, start, LANE_WORDS) for start in starts]
            for word in range(group // 4):
                place = builder.add(builder.mul(at_group, constant(group // 4)), constant(word))
                right = load(builder, move(builder, w, builder.mul(place, constant(LANES))), LANE_WORDS)
                for r, at in enumerate(lines_x):
                    left = broadcast(builder, builder.load(move(builder, at, place)), LANE_WORDS)
                    found[r] = dot(builder, found[r], right, left)
            scale = load(builder, move(builder, scales, at_panel))
            for number, factor, total in zip(found, factors, totals, strict=True):
                term = builder.fmul(builder.sitofp(number, VECTOR), builder.fmul(factor, scale))
                builder.store(builder.fadd(builder.load(total), term), total)
            if offsets:
                offset = load(builder, move(builder, offs, at_panel))
                for at, total in zip(lines_sums, totals, strict=True):
                    times = broadcast(builder, builder.load(move(builder, at, at_group)), VECTOR)
                    builder.store(builder.fsub(builder.load(total), builder.fmul(times, offset)), total)

    for r, (flag, total) in enumerate(zip(inside, totals, strict=True)):
        with builder.if_then(flag):
            masked_store(builder, builder.load(total), move(builder, c, builder.mul(constant(r), c_row)), mask)


@functools.cache
def integers(storage: Any) -> np.ndarray:
    """Return the table of `spread`, `turn` and `multiply` of a storage of blocks."""
    floats = F32.as_pointer()
    routines: dict[int, Routine] = {
        SPREAD: ([*[floats] * 3, *[I8.as_pointer()] * 2, *[I64] * 5], functools.partial(_spread_body, storage)),
        TURN: ([floats, floats, I64, I64], _turn_body),
    }
    for variant, together in enumerate(ROW_COUNTS):
        body = functools.partial(_multiply_body, together, storage.group, storage.offsets)
        routines[MULTIPLY + variant] = [*[floats] * 8, *[I64] * 8, I1], body
    for variant, together in enumerate(FEW_COUNTS):
        routines[IN_REGISTERS + variant] = FEW_ARGUMENTS, functools.partial(few_body, storage, together)
    header = {WHICH: len(KNOWN), GROUP: storage.group, OFFSETS: int(storage.offsets)}
    header |= {BLOCK_SIZE: storage.block, BLOCK_BYTES: storage.bytes_per_block}
    KNOWN.append(storage)
    kept_as = hashlib.sha256(source_hash(inspect.getfile(type(storage)))).hexdigest()[:8]
    return routine_table(f"integers-{storage.name}-{kept_as}", header, routines)


# -- as operations of kernels, whose arrays are float32 whatever is in them -----------------------


def _spread_twin(q, scale, offset, raw, j, rows, begin, k, table):
    storage = KNOWN[table[WHICH]]
    parts = storage.integers_ref(raw[j : j + rows, begin : begin + k // storage.block * storage.bytes_per_block])
    for to, part in zip((q.view(np.uint8), scale, offset), parts, strict=True):
        if part is not None:
            to[:rows, : part.shape[1]] = part


@with_twin(_spread_twin)
def spread(typing, q, scale, offset, raw, j, rows, begin, k, table):
    """Write q (LANES, words), four bytes in a place, scale and offset (LANES, groups) of `rows` rows of raw, from j on.

    k numbers of a row, whole blocks, from byte `begin` on; what is beyond rows and k stays; offset where there are any.
    Meanwhile the next LANES rows are fetched into the second-level cache, as they are in memory, end to end: `begin`
    rising from 0 on, all of them; where there are gaps between rows, other bytes, which does no harm.
    """

    def codegen(context, builder, signature, arguments):
        q, scale, offset, raw, j, rows, begin, k, table = arguments
        kinds = signature.args
        zero = constant(0)
        pointers = [pointer(context, builder, kinds[at], x, zero, zero) for at, x in enumerate((q, scale, offset))]
        pointers.append(pointer(context, builder, kinds[3], raw, j, begin))
        following = pointer(context, builder, kinds[3], raw, builder.add(j, constant(LANES)), zero)
        pointers.append(move(builder, following, builder.mul(begin, constant(LANES))))
        lengths = [row_length(context, builder, kinds[at], x) for at, x in ((0, q), (1, scale), (3, raw))]
        blocks = builder.sdiv(k, entry_of(context, builder, kinds[8], table, BLOCK_SIZE))
        call_routine(context, builder, kinds[8], table, SPREAD, [*pointers, *lengths, rows, blocks])
        return context.get_dummy_value()

    return types.void(q, scale, offset, raw, *[types.intp] * 4, table), codegen


def _turn_twin(panel, source, count, table):
    words = -(-count // LANES) * LANES
    panel[: words * LANES] = source[:, :words].T.ravel()


@with_twin(_turn_twin)
def turn(typing, panel, source, count, table):
    """Write `count` columns, rounded up to LANES, of source (LANES, columns) to a panel."""

    def codegen(context, builder, signature, arguments):
        panel, source, count, table = arguments
        kinds = signature.args
        to = pointer(context, builder, kinds[0], panel, constant(0))
        begin = pointer(context, builder, kinds[1], source, constant(0), constant(0))
        values = [to, begin, row_length(context, builder, kinds[1], source), count]
        call_routine(context, builder, kinds[3], table, TURN, values)
        return context.get_dummy_value()

    return types.void(panel, source, types.intp, table), codegen


def _multiply_twin(c, d, i, j, rows, cols, x, dx, sums, k0, w, scales, offs, k, add, table):
    group, places = int(table[GROUP]), (slice(i, i + rows), slice(j, j + cols))
    groups = k // group
    q = w[: k // 4 * LANES].view(np.uint8).reshape(k // 4, LANES, 4).swapaxes(0, 1).reshape(LANES, k)[:cols]
    scale, offset = (panel[: groups * LANES].reshape(groups, LANES).T[:cols] for panel in (scales, offs))
    numbers = np.ascontiguousarray(x[i : i + rows]).view(np.int8)[:, k0 : k0 + k]
    sums = np.ascontiguousarray(sums[i : i + rows, k0 // group : k0 // group + groups])
    y = d[places] if add else np.zeros((rows, cols), np.float32)
    d_block = dx[i : i + rows, k0 // SCALED :]
    if table[OFFSETS]:
        c[places] = grouped_ref(y, numbers, d_block, sums, q, scale, offset, 0)
        return
    # The sums are what whole numbers begin with; as a 257th value of q, so that `grouped_ref` need not know.
    for g in range(groups):
        columns = slice(g * group, (g + 1) * group)
        n = numbers[:, columns].astype(np.int32) @ q[:, columns].astype(np.int32).T + sums.view(np.int32)[:, g, None]
        y = y + n.astype(np.float32) * (d_block[:, g * group // SCALED, None] * scale[:, g])
    c[places] = y


@with_twin(_multiply_twin)
def multiply(typing, c, d, i, j, rows, cols, x, dx, sums, k0, w, scales, offs, k, add, table):
    """c[i : i + rows, j : j + cols] = the product of rows of x with a panel, plus d there if `add`; d may be c.

    rows <= AT_ONCE, cols <= LANES; columns k0 to k0 + k, whole blocks, of x (N, K / 4), four int8 in a place;
    dx (N, K / 32): their scales; sums (N, K / group): dx Σ x of a group, or, where there are no offsets, -zero Σ x, an
    int32; w, scales, offs: the panel of these columns; table: `integers(...)`
    """

    def codegen(context, builder, signature, arguments):
        c, d, i, j, rows, cols, x, dx, sums, k0, w, scales, offs, k, add, table = arguments
        kinds = signature.args
        group = entry_of(context, builder, kinds[15], table, GROUP)
        four, block = constant(4), constant(SCALED)
        matrices = (
            (0, c, i, j),
            (1, d, i, j),
            (6, x, i, builder.sdiv(k0, four)),
            (7, dx, i, builder.sdiv(k0, block)),
            (8, sums, i, builder.sdiv(k0, group)),
        )
        panels = (10, w), (11, scales), (12, offs)
        pointers = [pointer(context, builder, kinds[at], array, *place) for at, array, *place in matrices]
        pointers += [pointer(context, builder, kinds[at], array, constant(0)) for at, array in panels]
        lengths = [row_length(context, builder, kinds[at], array) for at, array, *_ in matrices]
        slot = constant(MULTIPLY)
        for smaller in ROW_COUNTS[:-1]:
            slot = builder.add(slot, builder.zext(builder.icmp_signed(">", rows, constant(smaller)), I64))
        values = [*pointers, *lengths, rows, cols, builder.sdiv(k, block), add]
        call_routine(context, builder, kinds[15], table, slot, values)
        return context.get_dummy_value()

    numbers = [types.intp] * 4
    panels = w, scales, offs
    return types.void(c, d, *numbers, x, dx, sums, types.intp, *panels, types.intp, types.boolean, table), codegen
