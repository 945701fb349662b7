"""Panels: what the register tile reads, and how a matrix of any layout is packed into them.

    pack_a       panels of A = x[i:i+m, j:j+k]        pack_a_transposed    panels of A = x[i:i+k, j:j+m]ᵀ
    pack_b       panels of B = x[i:i+k, j:j+n]        pack_b_transposed    panels of B = x[i:i+n, j:j+k]ᵀ

A panel holds `rows` rows of A, or `columns` columns of B, as many as the tile of the number format has, with the sum's
index p outermost; a matrix is packed as one panel after the other:

    A (m, k)    element (r, p) is at    at + (r // rows * k + p) * rows + r % rows
    B (k, n)    element (p, c) is at    at + (c // columns * k + p) * columns + c % columns

Rows and columns that fill up the last panel are zero.  Matrices have unit column stride.

Packing also turns the numbers of x into those that the tile multiplies.  x is stored in float32, or in bfloat16 (as
uint16: the upper half of a float32).  What the panels hold is a number format (`number_formats.py`), which may put
`fold` elements of the sum into one place, and fill up the sum to whole `unit`s with zeros; panels are `panel_depth`
deep.  From a multiple of the unit on, a panel can be read on its own.

A packer is a routine (`routines.py`); the argument `table` is that of a number format.  `pack_a` and its like know from
x's type how it is stored.  `pack_stored_a` and its like take x as uint16 in any case (`as_stored`): it holds bfloat16
if the model stores the number format so, else float32.  So a kernel that reads what the model saved is compiled once,
not for each format.
"""

import functools
from typing import Any

import llvmlite.ir as ir
import numpy as np
from numba import types
from numba.core import cgutils

from .halves import bf16_bits, widen
from .jit import helper
from .routines import COLUMNS, FOLD, FORMAT, PACKERS, PARTS, ROWS, STORED, UNIT, call_routine, entry_of
from .simd import (
    F32,
    I16,
    I32,
    I64,
    LANES,
    constant,
    element_type,
    fetch,
    load_first,
    move,
    of_shape,
    pointer,
    row_length,
    store,
    with_twin,
)

__all__ = [
    "FORMATS",
    "as_stored",
    "pack_a",
    "pack_a_transposed",
    "pack_b",
    "pack_b_transposed",
    "pack_stored_a",
    "pack_stored_a_transposed",
    "pack_stored_b",
    "pack_stored_b_transposed",
    "packers",
    "panel_depth",
    "transposed",
]

PIECE = 4  # floats of 128 bits
FORMATS: list[Any] = []  # all number formats, in the order of their tables' FORMAT: the packers' twins look there


@helper
def panel_depth(k, table):
    """Return how deep panels are for a sum over k elements: places, of whole units."""
    unit = table[UNIT]
    # fold is 1 or 2; tiles are too short to wait for divisions
    return (((k + unit - 1) & -unit) >> (table[FOLD] - 1)) * table[PARTS]


# -- the plain-Python twin of the packers --------------------------------------------------------


def as_stored(x):
    """Return x, float32 or bfloat16 (as uint16), in the form that `pack_stored_a` and its like take."""
    return x if x.dtype == np.uint16 else x.view(np.uint16)


def _pack_twin(slot, transposed, stored):
    def pack(panels, at, x, i, j, count, k, table):
        if stored and table[STORED] == 0:
            x = x.view(np.float32)
        number_format = FORMATS[table[FORMAT]]
        x = number_format.elements_ref(x)
        block = x[i : i + k, j : j + count] if transposed else x[i : i + count, j : j + k].T  # (k, count)
        packed = number_format.panels_ref(block, slot == ROWS)
        panels[at : at + packed.size] = packed

    return pack


# -- what x may hold: how its elements become numbers --------------------------------------------


class _Float32Elements:
    """x is float32."""

    element = F32

    def widened(self, builder, x):
        return x

    def halves(self, builder, x):
        return bf16_bits(builder, x)


class _BFloat16Elements:
    """x is bfloat16, as uint16."""

    element = I16

    def widened(self, builder, x):
        return widen(builder, x)

    def halves(self, builder, x):
        return builder.zext(x, of_shape(x.type, I32))


ELEMENTS = (_Float32Elements(), _BFloat16Elements())  # in the order of a packer's slots


# -- packing -------------------------------------------------------------------------------------


def _packer(name, slot, stored):
    """Return a Numba intrinsic that calls a packer: the routine at `slot` for float32, the next one for bfloat16.

    With `stored`, x is uint16 in any case, and the table says what it holds.
    """

    def typed(typing, panels, at, x, i, j, count, k, table):
        def codegen(context, builder, signature, arguments):
            panels, at, x, i, j, count, k, table = arguments
            kinds = signature.args
            to = pointer(context, builder, kinds[0], panels, at)
            if stored:
                narrow = entry_of(context, builder, kinds[7], table, STORED)
                halves = builder.sub(constant(1), narrow)  # an element is 1 << halves uint16
                source = pointer(context, builder, kinds[2], x, i, builder.shl(j, halves))
                row = builder.ashr(row_length(context, builder, kinds[2], x), halves)
                place = builder.add(constant(slot), narrow)
            else:
                source = pointer(context, builder, kinds[2], x, i, j)
                row = row_length(context, builder, kinds[2], x)
                place = slot + [known.element for known in ELEMENTS].index(element_type(kinds[2])[0])
            call_routine(context, builder, kinds[7], table, place, [to, source, row, count, k])
            return context.get_dummy_value()

        return types.void(panels, types.intp, x, *[types.intp] * 4, table), codegen

    typed.__name__ = name
    return typed


def _pieces(width):
    """Cut a panel's width into vectors: (first lane, lanes) of each, whole vectors first."""
    return [(first, min(LANES, width - first)) for first in range(0, width, LANES)]


def transposed(builder, rows):
    """Transpose squares of n x n floats that are side by side in n vectors, n a power of two.

    First within pieces of 128 bits, then whole pieces: so each of log2(n) rounds of two-vector shuffles is one that
    x86 has as an instruction of its own.
    """
    piece = min(len(rows), PIECE)
    within = [_parted(builder, rows[i : i + piece], 1, piece) for i in range(0, len(rows), piece)]
    columns = [_parted(builder, vectors, piece, len(rows)) for vectors in zip(*within, strict=True)]
    return [line for lines in zip(*columns, strict=True) for line in lines]


def _parted(builder, vectors, unit, span):
    """Transpose units of lanes within spans of lanes: the even ones of two vectors, and the odd ones, in rounds."""
    if len(vectors) == 1:
        return list(vectors)
    count = vectors[0].type.count
    starts = range(0, count, span)
    found = []
    for odd in (0, unit):
        units = [[start + first for first in range(odd, span, 2 * unit)] for start in starts]
        lanes = [
            side + first + lane for block in units for side in (0, count) for first in block for lane in range(unit)
        ]
        mask = ir.Constant(ir.VectorType(I32, count), lanes)
        pairs = zip(vectors[::2], vectors[1::2], strict=True)
        found.append(_parted(builder, [builder.shuffle_vector(*pair, mask) for pair in pairs], unit, span))
    return [vector for both in zip(*found, strict=True) for vector in both]


def _cut(builder, vector, lanes, first=0):
    """Return `lanes` lanes of a vector, from `first` on."""
    if lanes == vector.type.count:
        return vector
    chosen = ir.Constant(ir.VectorType(I32, lanes), list(range(first, first + lanes)))
    return builder.shuffle_vector(vector, vector, chosen)


def _packed_depth(builder, k, fold):
    return builder.sdiv(builder.add(k, constant(fold - 1)), constant(fold))


def _read_along(builder, elements, number_format, at, size, left):
    """Read `size` places along the sum's index; of the elements from `at` on, only `left` exist (None: enough)."""
    fold = number_format.fold
    if fold > 1 and elements.element == I16:  # as they are in memory, they are pairs already
        wide = ir.VectorType(I16, fold * size)
        return builder.bitcast(load_first(builder, at, wide, left), ir.VectorType(F32, size))
    vector = ir.VectorType(elements.element, size)
    parts = []
    for part in range(fold):
        remaining = left if left is None or part == 0 else builder.sub(left, constant(part * size))
        parts.append(load_first(builder, move(builder, at, part * size), vector, remaining))
    if fold > 1:  # elements p and p + 1 are side by side: even ones to one vector, odd ones to the other
        lanes = [ir.Constant(ir.VectorType(I32, size), [fold * i + part for i in range(size)]) for part in range(fold)]
        parts = [builder.shuffle_vector(*parts, lane) for lane in lanes]
    return number_format.place(builder, elements, parts)


def _pack_transposing_body(builder, width, elements, number_format, to, source, row, count, k):
    """Emit packing of rows: squares of x are transposed in registers, one panel after the other."""
    fold = number_format.fold
    depth = _packed_depth(builder, k, fold)
    with cgutils.for_range_slice(builder, constant(0), count, constant(width), I64) as (first, _):
        panel = builder.gep(to, [builder.mul(first, depth)])
        for lane, lanes in _pieces(width):
            size = 1 << (lanes - 1).bit_length()  # side of a square
            run = max(size, LANES)  # places of whole vectors: some squares side by side
            vector = ir.VectorType(F32, run)
            top = builder.add(first, constant(lane))

            def squares(p, left, lanes=lanes, size=size, vector=vector, top=top, lane=lane, panel=panel):
                """Move the squares from column p of x on, of which `left` columns exist (None: all)."""
                lines = []
                for r in range(size):
                    zero = ir.Constant(vector, [0.0] * vector.count)
                    if r >= lanes:
                        lines.append(zero)
                        continue
                    index = builder.add(top, constant(r))
                    inside = builder.icmp_signed("<", index, count)
                    index = builder.select(inside, index, first)  # a row that exists; its values are then dropped
                    at = builder.gep(source, [builder.add(builder.mul(index, row), p)])
                    fetch(builder, builder.gep(at, [builder.mul(row, constant(AHEAD))]))
                    places = _read_along(builder, elements, number_format, at, vector.count, left)
                    lines.append(builder.select(inside, places, zero))
                packed_p = builder.sdiv(p, constant(fold))
                lines = transposed(builder, lines)
                for place in range(vector.count):
                    part = _cut(builder, lines[place % size], lanes, place // size * size)
                    spot = builder.add(packed_p, constant(place))
                    spot = builder.gep(panel, [builder.add(builder.mul(spot, constant(width)), constant(lane))])
                    if left is None:
                        store(builder, part, spot)
                    else:
                        with builder.if_then(builder.icmp_signed("<", constant(place * fold), left)):
                            store(builder, part, spot)

            left = builder.srem(k, constant(run * fold))
            whole = builder.sub(k, left)
            with cgutils.for_range_slice(builder, constant(0), whole, constant(run * fold), I64) as (p, _):
                squares(p, None)
            with builder.if_then(builder.icmp_signed(">", left, constant(0))):
                squares(whole, left)


STEPS = 4  # steps of the sum dealt out at a time: two full cache lines to each panel of A
AHEAD = 16  # rows of x between the one that is read and the one that is fetched; past the matrix that does no harm


def _pack_copying_body(builder, width, elements, number_format, to, source, row, count, k):
    """Emit packing of columns: a few rows of x are read from end to end and dealt out to the panels."""
    fold = number_format.fold
    depth = _packed_depth(builder, k, fold)

    def places(at, lanes, left, last):
        """Read a vector across the sum's index, from `fold` rows of x, or all but the last of them."""
        vector = ir.VectorType(elements.element, lanes)
        rows = [load_first(builder, at, vector, left)]
        for _ in range(1, fold):
            at = builder.gep(at, [row])
            rows.append(ir.Constant(vector, None) if last else load_first(builder, at, vector, left))
        return number_format.place(builder, elements, rows)

    def deal(p, steps, last=False):
        """Copy the rows of x from p on, `steps` steps of the sum, to their places in every panel."""
        lines = [builder.gep(source, [builder.mul(builder.add(p, constant(s * fold)), row)]) for s in range(steps)]
        packed_p, ahead = builder.sdiv(p, constant(fold)), builder.mul(row, constant(AHEAD))
        with cgutils.for_range_slice(builder, constant(0), count, constant(width), I64) as (first, _):
            panel = builder.gep(to, [builder.add(builder.mul(first, depth), builder.mul(packed_p, constant(width)))])
            inside = builder.icmp_signed("<=", builder.add(first, constant(width)), count)
            with builder.if_else(inside) as (whole, edge):
                with whole:
                    for s, line in enumerate(lines):
                        for lane, lanes in _pieces(width):
                            at = move(builder, builder.gep(line, [first]), lane)
                            fetch(builder, builder.gep(at, [ahead]))
                            store(builder, places(at, lanes, None, last), move(builder, panel, s * width + lane))
                with edge:
                    for lane, lanes in _pieces(width):
                        left = builder.sub(count, builder.add(first, constant(lane)))
                        for s, line in enumerate(lines):
                            at = move(builder, builder.gep(line, [first]), lane)
                            values = places(at, LANES, left, last)
                            store(builder, _cut(builder, values, lanes), move(builder, panel, s * width + lane))

    whole = builder.sub(k, builder.srem(k, constant(STEPS * fold)))
    paired = builder.sub(k, builder.srem(k, constant(fold)))
    with cgutils.for_range_slice(builder, constant(0), whole, constant(STEPS * fold), I64) as (p, _):
        deal(p, STEPS)
    with cgutils.for_range_slice(builder, whole, paired, constant(fold), I64) as (p, _):
        deal(p, 1)
    if fold > 1:
        with builder.if_then(builder.icmp_signed("<", paired, k)):
            deal(paired, 1, last=True)


FORMS = (  # of packing: what emits it, the slot of its panels' width, and whether the sum's index runs over rows of x
    (_pack_transposing_body, ROWS, False),
    (_pack_copying_body, ROWS, True),
    (_pack_copying_body, COLUMNS, True),
    (_pack_transposing_body, COLUMNS, False),
)


def packers(number_format):
    """Return the routines that pack into panels of a number format: {slot of its table: routine}."""
    found = {}
    for form, (body, slot, _) in enumerate(FORMS):
        width = number_format.rows if slot == ROWS else number_format.columns
        for index, elements in enumerate(ELEMENTS):
            arguments = [F32.as_pointer(), elements.element.as_pointer(), I64, I64, I64]
            found[_slot(form) + index] = arguments, functools.partial(_emit, body, width, elements, number_format)
    return found


def _slot(form):
    """Return where a form's routines begin in a table."""
    return PACKERS + len(ELEMENTS) * form


def _emit(body, width, elements, number_format, builder, *arguments):
    body(builder, width, elements, number_format, *arguments)


def _make_packer(form, stored=False):
    _, width_slot, transposed = FORMS[form]
    name = f"pack_{'stored_' if stored else ''}{form}"
    return with_twin(_pack_twin(width_slot, transposed, stored))(_packer(name, _slot(form), stored))


# Called as pack(panels, at, x, i, j, count, k, table): count rows of A or columns of B, a sum over k elements.
pack_a, pack_a_transposed, pack_b, pack_b_transposed = (_make_packer(form) for form in range(len(FORMS)))
pack_stored_a, pack_stored_a_transposed, pack_stored_b, pack_stored_b_transposed = (
    _make_packer(form, stored=True) for form in range(len(FORMS))
)
