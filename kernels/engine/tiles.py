"""The register tile: the inside of every matrix product in the house.

    tile          C[rows, cols] = A B, or D[rows, cols] + A B, for one panel of A and one of B (see `panels.py`)

A tile keeps ROWS x COLUMNS sums in vector registers and reads both panels straight through, in the way of Goto and van
de Geijn, "Anatomy of High-Performance Matrix Multiplication" (2008).  Sums are float32 in any case.

What a tile multiplies is a number format (`number_formats.py`); kernels take its table.
"""

import numpy as np
from numba import types
from numba.core import cgutils

from .panels import FORMATS
from .routines import BEGIN, COLUMNS, END, FORMAT, ROWS, TILE, Routine, call_routine
from .scratch import LINE
from .simd import (
    F32,
    I1,
    I64,
    LANES,
    VECTOR,
    ZERO,
    broadcast,
    constant,
    declare,
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

__all__ = ["begin", "end", "multiply_add", "tile", "tile_routines"]


# -- plain-Python twin ---------------------------------------------------------------------------


def _tile_twin(c, d, i, j, rows, cols, a, a_at, b, b_at, k, add, table):
    left, right = a[a_at : a_at + k * table[ROWS]], b[b_at : b_at + k * table[COLUMNS]]
    block = (slice(i, i + rows), slice(j, j + cols))
    c[block] = FORMATS[table[FORMAT]].tile_ref(left, right, d[block] if add else np.zeros((rows, cols), np.float32))


# -- one register tile ---------------------------------------------------------------------------


def _tile(typing, c, d, i, j, rows, cols, a, a_at, b, b_at, k, add, table):
    signature = types.void(c, d, *[types.intp] * 4, a, types.intp, b, types.intp, types.intp, types.boolean, table)

    def codegen(context, builder, signature, arguments):
        c, d, i, j, rows, cols, a, a_at, b, b_at, k, add, table = arguments
        kinds = signature.args
        pointers = (
            pointer(context, builder, kinds[0], c, i, j),
            pointer(context, builder, kinds[1], d, i, j),
            pointer(context, builder, kinds[6], a, a_at),
            pointer(context, builder, kinds[8], b, b_at),
        )
        lengths = (row_length(context, builder, kinds[0], c), row_length(context, builder, kinds[1], d))
        values = [*pointers, *lengths, rows, cols, k, add]
        call_routine(context, builder, kinds[12], table, TILE, values)
        return context.get_dummy_value()

    return signature, codegen


def multiply_add(builder, left, right, total):
    """Emit left * right + total of vectors, rounded once where the machine can."""
    return builder.call(declare(builder, f"llvm.fmuladd.v{LANES}f32", VECTOR, [VECTOR] * 3), [left, right, total])


def _tile_body(builder, number_format, c, d, a, b, c_row, d_row, rows, cols, k, add):
    """Emit the tile for each number of vectors that `cols` may need: an edge costs what is inside the matrix."""
    for vectors in range(1, number_format.columns // LANES + 1):
        above = builder.icmp_signed(">", cols, constant(LANES * (vectors - 1)))
        below = builder.icmp_signed("<=", cols, constant(LANES * vectors))
        with builder.if_then(builder.and_(above, below)):
            _tile_of(builder, number_format, vectors, c, d, a, b, c_row, d_row, rows, cols, k, add)


FETCH_STEPS = 2  # steps of the sum between two lines of C that are fetched ahead


def _fetch_ahead(builder, step, d, d_row, height, width, k):
    """Emit the fetching of a tile of D, a cache line every FETCH_STEPS steps of the sum; return the steps done.

    All at once they would fill the buffers for lines on their way, and the panels' own lines would wait (docs/log.md).
    Where the sum is too short to spread them, nothing is gained by fetching either, and no step is done.
    """
    lines = -(-width // LINE) + 1  # of a row that begins anywhere; an address past the matrix does no harm
    steps = height * lines * FETCH_STEPS
    rows = builder.select(builder.icmp_signed("<", k, constant(steps)), constant(0), constant(height))
    with cgutils.for_range(builder, rows) as row:
        to = move(builder, d, builder.mul(d_row, row.index))
        with cgutils.for_range(builder, constant(lines)) as line:
            fetch(builder, move(builder, to, builder.mul(line.index, constant(LINE))), write=True)
            at = builder.add(builder.mul(row.index, constant(lines)), line.index)
            for s in range(FETCH_STEPS):
                step(builder.add(builder.mul(at, constant(FETCH_STEPS)), constant(s)))
    return builder.mul(rows, constant(lines * FETCH_STEPS))


def _tile_of(builder, number_format, vectors, c, d, a, b, c_row, d_row, rows, cols, k, add):
    """Emit a tile that is `vectors` wide: sums in registers over k, then one visit to C."""
    height = number_format.rows
    sums = [[cgutils.alloca_once(builder, VECTOR) for _ in range(vectors)] for _ in range(height)]
    for line in sums:
        for total in line:
            builder.store(ZERO, total)

    def step(p):
        """Emit the multiply-adds of step p of the sum."""
        a_now = move(builder, a, builder.mul(p, constant(height)))
        b_now = move(builder, b, builder.mul(p, constant(number_format.columns)))
        right = [load(builder, move(builder, b_now, LANES * v)) for v in range(vectors)]
        for r in range(height):
            left = broadcast(builder, builder.load(move(builder, a_now, r)), VECTOR)
            for v in range(vectors):
                builder.store(number_format.multiply(builder, left, right[v], builder.load(sums[r][v])), sums[r][v])

    begun = _fetch_ahead(builder, step, d, d_row, height, LANES * vectors, k)
    with cgutils.for_range_slice(builder, begun, k, constant(1), I64) as (p, _):
        step(p)

    def write(read, put):
        for r in range(height):
            with builder.if_then(builder.icmp_signed("<", constant(r), rows)):
                to = move(builder, c, builder.mul(c_row, constant(r)))
                base = move(builder, d, builder.mul(d_row, constant(r)))
                with builder.if_else(add) as (then, otherwise):
                    with then:
                        for v in range(vectors):
                            total = builder.fadd(builder.load(sums[r][v]), read(v, move(builder, base, LANES * v)))
                            put(v, total, move(builder, to, LANES * v))
                    with otherwise:
                        for v in range(vectors):
                            put(v, builder.load(sums[r][v]), move(builder, to, LANES * v))

    last = vectors - 1
    with builder.if_else(builder.icmp_signed("==", cols, constant(LANES * vectors))) as (full, edge):
        with full:
            write(lambda v, at: load(builder, at), lambda v, value, at: store(builder, value, at))
        with edge:  # only the last vector is cut
            mask = first_lanes(builder, builder.sub(cols, constant(LANES * last)))
            write(
                lambda v, at: masked_load(builder, at, mask) if v == last else load(builder, at),
                lambda v, x, at: masked_store(builder, x, at, mask) if v == last else store(builder, x, at),
            )


# tile(c, d, i, j, rows, cols, a, a_at, b, b_at, k, add, table):
# c[i:i+rows, j:j+cols] = A B, plus d[i:i+rows, j:j+cols] if `add`; d may be c.
#     a: float32 buffer with a panel of A, (k, tile's rows), at `a_at`;  b: one of B, (k, tile's columns), at `b_at`
#     c, d: float32 matrices with unit column stride;  rows and cols: at most the tile's
#     table: the table of what the panels hold; k counts their depth, in pairs for BFLOAT16
tile = with_twin(_tile_twin)(_tile)


def _frame(name, slot):
    def typed(typing, table):
        def codegen(context, builder, signature, arguments):
            call_routine(context, builder, signature.args[0], arguments[0], slot, [])
            return context.get_dummy_value()

        return types.void(table), codegen

    typed.__name__ = name
    return with_twin(lambda table: None)(typed)


# begin(table), end(table): what a thread does before its first tile of a task and after the last one.
begin, end = _frame("begin", BEGIN), _frame("end", END)


def tile_routines(number_format) -> dict[int, Routine]:
    """Return the tile of a number format, and what frames a task's tiles, which is nothing: {slot: routine}."""
    arguments = [F32.as_pointer()] * 4 + [I64] * 5 + [I1]
    nothing: Routine = ([], lambda builder: None)
    tile = arguments, lambda builder, *values: _tile_body(builder, number_format, *values)
    return {TILE: tile, BEGIN: nothing, END: nothing}
