"""A few rows times W as it is in memory: c (rows, cols) = a (rows, K) b (cols, K)ᵀ, in LLVM.

LANES rows of W are read where they lie, transposed in registers, and multiplied with all rows of a at once: nothing is
packed, so a weight costs the memory one reading.  An element is summed as in `matmul.py`.

Memory is asked twice for what is read.  The next LANES rows are fetched into the second-level cache in the order in
which they are in memory, a vector for each one read: the order that memory, and what the processor fetches by itself,
are fastest in.  From there each row's vectors are fetched into the first-level cache NEAR steps ahead; not those of
half precision, which are read about as fast without, and are pushed out again where rows are a power of two apart.
"""

import functools

import llvmlite.ir as ir
import numpy as np
from numba import types
from numba.core import cgutils

from .halves import widen_bf16_ref, widened_half
from .number_format import NumberFormat
from .panels import transposed
from .routines import TILE, entry_of, routine_table
from .simd import (
    F32,
    FP16,
    I1,
    I16,
    I32,
    I64,
    LANES,
    VECTOR,
    ZERO,
    broadcast,
    constant,
    element_type,
    fetch,
    first_lanes,
    load,
    masked_load,
    masked_store,
    move,
    pointer,
    row_length,
    with_twin,
)
from .tiles import multiply_add

__all__ = ["NAME", "STREAMED", "stream", "streams"]

STREAMED = LANES // 2  # rows of x: their sums and LANES vectors of W fit the registers
STREAMED_ELEMENTS = F32, I16  # of W; half precision has a table of its own
SLICE = NumberFormat.slice_terms  # terms that are summed before they are added to the others
NAME = "streams"  # of the routines, where compiled code is kept

VARIANTS = tuple(2**i for i in range(STREAMED.bit_length()))  # rows of x that are multiplied together
NEAR = 2  # vectors of a row


def _stream_body(together, element, builder, c, d, a, b, c_row, d_row, a_row, b_row, rows, cols, k, add):
    """Emit c (rows, cols) = a (rows, k) b (cols, k)ᵀ (+ d), rows <= together; b holds `element`."""
    span = LANES if element == F32 else 2 * LANES  # elements of a row of b that are read as one, a vector of them
    stored = ir.VectorType(element, span)
    # Rows without a gap are fetched as one, a line of memory after the other; others each at the place being read.
    whole_rows = builder.icmp_signed("==", b_row, k)
    along = builder.select(whole_rows, constant(LANES), constant(1))
    across = builder.select(whole_rows, constant(span), b_row)
    lefts = []
    for r in range(together):  # a row that exists; what comes of it is not stored
        inside = builder.icmp_signed("<", constant(r), rows)
        lefts.append(move(builder, a, builder.mul(builder.select(inside, constant(r), constant(0)), a_row)))
    totals = [cgutils.alloca_once(builder, VECTOR) for _ in range(together)]
    sums = [cgutils.alloca_once(builder, VECTOR) for _ in range(together)]

    with cgutils.for_range_slice(builder, constant(0), cols, constant(LANES), I64) as (j, _):
        mask = first_lanes(builder, builder.sub(cols, j))
        lines = []
        for lane in range(LANES):
            index = builder.add(j, constant(lane))
            index = builder.select(builder.icmp_signed("<", index, cols), index, j)
            lines.append(move(builder, b, builder.mul(index, b_row)))
        following = move(builder, lines[0], builder.mul(b_row, constant(LANES)))  # the next rows
        for r, total in enumerate(totals):
            at = move(builder, move(builder, d, builder.mul(_row(builder, r, rows), d_row)), j)
            builder.store(masked_load(builder, at, mask), total)

        def block(p, left):
            """Multiply with the columns of b from p on, a span of them, or `left`."""
            read = []
            for line in lines:
                at = move(builder, line, p)
                if left is None:
                    vector = load(builder, at, stored)
                    place = builder.add(builder.mul(p, along), builder.mul(across, constant(len(read))))
                    fetch(builder, move(builder, following, place))
                    if element != FP16:  # see above
                        fetch(builder, move(builder, at, constant(NEAR * span)), near=True)
                else:
                    vector = masked_load(builder, at, first_lanes(builder, left, span), vector=stored)
                read.append(vector)
            for term, right in enumerate(_columns(builder, element, read)):

                def multiply(term=term, right=right):
                    for at, total in zip(lefts, sums, strict=True):
                        number = builder.load(move(builder, at, builder.add(p, constant(term))))
                        both = broadcast(builder, number, VECTOR), right
                        builder.store(multiply_add(builder, *both, builder.load(total)), total)

                if left is None:
                    multiply()
                else:
                    with builder.if_then(builder.icmp_signed("<", constant(term), left)):
                        multiply()

        with cgutils.for_range_slice(builder, constant(0), k, constant(SLICE), I64) as (k0, _):
            for total in sums:
                builder.store(ZERO, total)
            rest = builder.sub(k, k0)
            terms = builder.select(builder.icmp_signed("<", rest, constant(SLICE)), rest, constant(SLICE))
            left = builder.srem(terms, constant(span))
            whole = builder.add(k0, builder.sub(terms, left))
            with cgutils.for_range_slice(builder, k0, whole, constant(span), I64) as (p, _):
                block(p, None)
            with builder.if_then(builder.icmp_signed(">", left, constant(0))):
                block(whole, left)
            more = builder.or_(add, builder.icmp_signed(">", k0, constant(0)))
            for part, total in zip(sums, totals, strict=True):
                both = builder.fadd(builder.load(part), builder.load(total))
                builder.store(builder.select(more, both, builder.load(part)), total)
        for r, total in enumerate(totals):
            with builder.if_then(builder.icmp_signed("<", constant(r), rows)):
                at = move(builder, move(builder, c, builder.mul(constant(r), c_row)), j)
                masked_store(builder, builder.load(total), at, mask)


def _row(builder, r, rows):
    return builder.select(builder.icmp_signed("<", constant(r), rows), constant(r), constant(0))


def _columns(builder, element, read):
    """Yield the columns of what was read of LANES rows, each a vector of float32: transposed in places of 32 bits.

    Two bfloat16, or two numbers of half precision, are one place until then.
    """
    places = ir.VectorType(F32, LANES)
    for line in transposed(builder, [builder.bitcast(vector, places) for vector in read]):
        if element == I16:
            yield from _both_halves(builder, line)
        elif element == FP16:
            yield from _widened(builder, line)
        else:
            yield line


def _widened(builder, line):
    """Return the first and the second number of half precision of each lane, as float32.

    They are parted by a shuffle of the whole vector, which becomes one with the last round of transposing it.
    """
    whole = ir.VectorType(I16, 2 * LANES)
    bits = builder.bitcast(line, whole)
    order = [*range(0, 2 * LANES, 2), *range(1, 2 * LANES, 2)]
    bits = builder.shuffle_vector(bits, bits, ir.Constant(ir.VectorType(I32, 2 * LANES), order))
    both = (ir.Constant(ir.VectorType(I32, LANES), list(range(at, at + LANES))) for at in (0, LANES))
    return [widened_half(builder, builder.shuffle_vector(bits, bits, lanes)) for lanes in both]


def _both_halves(builder, line):
    """Return the first and the second bfloat16 of each lane, as float32."""
    whole = ir.VectorType(I32, LANES)
    bits = builder.bitcast(line, whole)
    first = builder.shl(bits, ir.Constant(whole, [16] * LANES))
    second = builder.and_(bits, ir.Constant(whole, [0xFFFF0000] * LANES))
    return builder.bitcast(first, VECTOR), builder.bitcast(second, VECTOR)


@functools.cache
def streams(halves: bool = False) -> np.ndarray:
    """Return the table of `stream`'s routines: those for half precision, which few need, or those for all others."""
    routines = {}
    for index, element in enumerate((FP16,) if halves else STREAMED_ELEMENTS):
        for variant, together in enumerate(VARIANTS):
            arguments = [*[F32.as_pointer()] * 3, element.as_pointer(), *[I64] * 7, I1]
            routines[_slot(index, variant)] = arguments, functools.partial(_stream_body, together, element)
    return routine_table(f"{NAME}-halves" if halves else NAME, {}, routines)


def _slot(element, variant):
    return TILE + element * len(VARIANTS) + variant


def _stream_twin(c, d, i, j, rows, cols, a, b, row, add, table):
    block = slice(i, i + rows), slice(j, j + cols)
    lines = b[row : row + cols]
    w = lines.view(np.float16).astype(np.float32) if lines.dtype == np.int16 else widen_bf16_ref(lines)
    c[block] = a[i : i + rows] @ w.T + (d[block] if add else np.float32(0))


@with_twin(_stream_twin)
def stream(typing, c, d, i, j, rows, cols, a, b, row, add, table):
    """c[i : i + rows, j : j + cols] = a[i : i + rows] b[row : row + cols]ᵀ, plus d there if `add`; d may be c.

    rows <= STREAMED; float32, but b may be bfloat16 (as uint16) or half precision (as int16); table: `streams(...)`
    """

    def codegen(context, builder, signature, arguments):
        c, d, i, j, rows, cols, a, b, row, add, table = arguments
        kinds = signature.args
        given = (0, c, i, j), (1, d, i, j), (6, a, i, constant(0)), (7, b, row, constant(0))
        pointers = [pointer(context, builder, kinds[at], array, *place) for at, array, *place in given]
        lengths = [row_length(context, builder, kinds[at], array) for at, array, *_ in given]
        terms = builder.extract_value(context.make_array(kinds[6])(context, builder, a).shape, 1)
        element = element_type(kinds[7])[0]
        slot = constant(_slot(STREAMED_ELEMENTS.index(element) if element in STREAMED_ELEMENTS else 0, 0))
        for smaller in VARIANTS[:-1]:
            slot = builder.add(slot, builder.zext(builder.icmp_signed(">", rows, constant(smaller)), I64))
        address = entry_of(context, builder, kinds[10], table, slot)
        values = [*pointers, *lengths, rows, cols, terms, add]
        function = ir.FunctionType(ir.VoidType(), [value.type for value in values]).as_pointer()
        builder.call(builder.inttoptr(address, function), values)
        return context.get_dummy_value()

    return types.void(c, d, *[types.intp] * 4, a, b, types.intp, types.boolean, table), codegen
