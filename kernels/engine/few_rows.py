"""Few rows of x times LANES rows of W in blocks, by whole numbers, with nothing transposed but sums, in LLVM.

    for each row of W, for each 256 columns, or twice 256 side by side:
        q, scales, offsets      from raw, in registers, as the storage emits them
        for each row of x:      n_g = Σ_k p_k q_k of each group, into a table: eight vectors of four products each are
                                added up in pairs until a lane is a group
    for each row of x, for each LANES groups:
        terms                   (n_g - zero Σ p) (d scale_g), and (d Σ p) offset_g: lanes are groups
        transposed              lanes are rows of W, and groups are added one after the other

For one row of x this takes a third of the shuffles of a panel (`integers.py`), and q is never stored; but sums are
added up for each row of x anew.  The bits are the same: sums of whole numbers are exact, and all else is rounded in the
same order.
"""

import llvmlite.ir as ir
import numpy as np
from numba import types
from numba.core import cgutils

from .halves import widened_half
from .jit import helper
from .panels import transposed
from .routines import call_routine, entry_of
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
    constant,
    each,
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
from .spread import Block, Half, joined
from .whole_numbers import BLOCK_SIZE, GROUP, IN_REGISTERS, KNOWN, SCALED, WHICH, dot, grouped_ref

__all__ = ["FEW_ARGUMENTS", "FEW_COUNTS", "MOST", "arrange", "few_body", "multiply_few"]

MOST = 2  # rows of x; with more, a panel is faster
FEW_COUNTS = tuple(2**i for i in range(MOST.bit_length()))
FEW_ARGUMENTS = [*[F32.as_pointer()] * 5, *[I8.as_pointer()] * 2, *[F32.as_pointer()] * 3, *[I64] * 10, I1]
ADDED_UP = 8  # vectors of sums that are added up together
SIDES = max(LANES * 4 // SCALED, 1)  # how much of W is read side by side, as vectors are wide: 32 columns each
TWICE = SIDES * ADDED_UP * SCALED  # columns that are arranged so in x


def few_body(storage, together, builder, *arguments):
    """Emit the product of `rows` <= together rows of x with `cols` rows of W."""
    c, d, x, dx, sums, raw, following, n, scale, offset, *lengths, rows, cols, blocks, add = arguments
    c_row, d_row, x_row, dx_row, sums_row, raw_row, table_row = lengths
    inside = [builder.icmp_signed("<", constant(r), rows) for r in range(together)]
    existing = [builder.select(flag, constant(r), constant(0)) for r, flag in enumerate(inside)]
    lines_x = [move(builder, x, builder.mul(r, x_row)) for r in existing]
    plane = builder.mul(table_row, constant(LANES))
    planes = [move(builder, n, builder.mul(constant(r), plane)) for r in range(together)]
    kinds = _dots(storage, builder, lines_x, planes, raw, following, scale, offset, raw_row, table_row, cols, blocks)
    groups = builder.mul(blocks, constant(storage.block // storage.group))
    with cgutils.for_range(builder, rows) as row:
        at_c, at_d, at_dx, at_sums, at_n = (
            move(builder, at, builder.mul(row.index, step))
            for at, step in ((c, c_row), (d, d_row), (dx, dx_row), (sums, sums_row), (n, plane))
        )
        of_row = at_c, at_d, at_dx, at_sums, at_n
        _added_up(storage, builder, *of_row, scale, offset, table_row, cols, groups, add, kinds)


# -- sums of groups ------------------------------------------------------------------------------


def _dots(storage, builder, lines_x, planes, raw, following, scale, offset, raw_row, table_row, cols, blocks):
    """Emit the sums of all groups of `cols` rows of W with each of lines_x, and scales and offsets, into tables.

    Return the types of scales and of offsets as they are kept there, None where there are none: float32, or half
    precision's bits.
    """
    alone = max(ADDED_UP * SCALED // storage.block, 1)  # blocks at a time
    steps = [*[(SIDES * alone, SIDES)] * (SIDES > 1), (alone, 1), *[(1, 1)] * (alone > 1)]  # blocks, side by side
    row_bytes = builder.mul(blocks, constant(storage.bytes_per_block))
    kinds = []
    with cgutils.for_range(builder, cols) as row:
        line = builder.mul(row.index, table_row)
        tables = [move(builder, at, line) for at in planes]
        source = move(builder, raw, builder.mul(row.index, raw_row))
        ahead = move(builder, following, builder.mul(row.index, row_bytes))
        parts = [move(builder, at, line) for at in (scale, offset)]
        first = constant(0)
        for count, sides in steps:
            whole = builder.sub(blocks, builder.srem(blocks, constant(count)))
            with cgutils.for_range_slice(builder, first, whole, constant(count), I64) as (block, _):
                kinds += _unit(storage, builder, lines_x, tables, source, ahead, parts, block, count, sides)
            first = whole
    return kinds


def _unit(storage, builder, lines_x, tables, source, ahead, parts, block, count, sides):
    """Emit the same for `count` blocks of one row, the first half beside the second or not; return the types."""
    size, apart, groups = storage.bytes_per_block, count // sides, storage.block // storage.group
    begin = builder.mul(block, constant(size))
    for line in range(0, size * count, LINE_BYTES):
        fetch(builder, move(builder, move(builder, ahead, begin), line))
    at = move(builder, source, begin)
    starts = [[move(builder, at, size * (i + side * apart)) for side in range(sides)] for i in range(apart)]
    read = [storage.integers_of(Block(builder, *addresses)) for addresses in starts]
    q = _vectors_of([vector for vectors, *_ in read for vector in vectors])
    words = ir.VectorType(I32, SCALED // 4 * sides)
    first = builder.mul(block, constant(storage.block // 4))
    first_group = builder.mul(block, constant(groups))
    for line, table in zip(lines_x, tables, strict=True):
        found = []
        for i, vector in enumerate(q):
            p = load(builder, move(builder, move(builder, line, first), words.count * i), words)
            found.append(dot(builder, each(0, words), builder.bitcast(vector.value, words), p))
        _store_sums(builder, found, storage.group, move(builder, table, first_group), sides)
    kinds = []
    for to, which in zip(parts, (1, 2), strict=True):
        if read[0][which] is None:
            kinds.append(None)
            continue
        vectors = [vector for part in read for vector in part[which]]
        values = [vector.bits if isinstance(vector, Half) else vector.value for vector in vectors]
        kinds.append(getattr(values[0].type, "element", values[0].type))
        place = move(builder, builder.bitcast(to, kinds[-1].as_pointer()), first_group)
        for i, value in enumerate(values):
            _store_parts(builder, value, move(builder, place, i * groups), apart * groups, sides)
    return kinds


def _store_parts(builder, value, to, apart, sides):
    """Store a number, or a vector, of each block, `apart` places from each other."""
    lanes = getattr(value.type, "count", 1) // sides
    if lanes == apart or sides == 1:
        builder.store(value, builder.bitcast(to, value.type.as_pointer())).align = 2
        return
    for side in range(sides):  # one number of each
        builder.store(builder.extract_element(value, ir.Constant(I32, side)), move(builder, to, side * apart)).align = 2


def _vectors_of(parts):
    """Return vectors of bytes as such of SCALED bytes of each block, in order."""
    count = SCALED * parts[0].blocks // parts[0].value.type.count
    return [joined(*parts[i : i + count]) for i in range(0, len(parts), count)]


def _store_sums(builder, found, group, at, sides):
    """Emit the sums of groups from ADDED_UP vectors, or fewer, of four products in each lane."""
    given = len(found) * sides * SCALED // group
    found = [*found, *[each(0, found[0].type)] * (ADDED_UP - len(found))]
    half = found[0].type.count // sides
    while len(found) > 2:
        found = [_sums_of_neighbours(builder, *found[i : i + 2]) for i in range(0, len(found), 2)]
    starts = [side * half + vector * half * sides for side in range(sides) for vector in (0, 1)]
    if group == SCALED:  # each of both has the sums of the lower half of four vectors, then of the upper
        low, high = ([start + upper + i for start in starts for i in range(4)] for upper in (0, 4))
        sums = [builder.add(*(_shuffled(builder, *found, lanes) for lanes in (low, high)))]
    else:
        order = [start + i for start in starts for i in (0, 4, 1, 5, 2, 6, 3, 7)]
        count = len(order) // sides
        sums = [_shuffled(builder, *found, order[i : i + count]) for i in range(0, len(order), count)]
    for i, vector in enumerate(sums):
        lanes = vector.type.count
        if given < lanes:
            vector = _shuffled(builder, vector, vector, range(given))
        builder.store(vector, builder.bitcast(move(builder, at, lanes * i), vector.type.as_pointer())).align = 4


def _sums_of_neighbours(builder, x, y):
    """Emit [x0 + x1, x2 + x3, y0 + y1, y2 + y3], of each four lanes."""
    count = x.type.count
    even, odd = (
        [first + lane + i for lane in range(0, count, 4) for first in (0, count) for i in (odd, odd + 2)]
        for odd in (0, 1)
    )
    return builder.add(_shuffled(builder, x, y, even), _shuffled(builder, x, y, odd))


def _shuffled(builder, x, y, lanes):
    lanes = list(lanes)
    return builder.shuffle_vector(x, y, ir.Constant(ir.VectorType(I32, len(lanes)), lanes))


# -- sums over groups ----------------------------------------------------------------------------


def _added_up(storage, builder, c, d, dx, sums, n, scale, offset, table_row, cols, groups, add, kinds):
    """Emit c (cols,) = (d +) the sum over groups, of one row of x."""
    mask = first_lanes(builder, cols)
    total = cgutils.alloca_once(builder, VECTOR)
    builder.store(builder.select(add, masked_load(builder, d, mask), ZERO), total)
    integers = ir.VectorType(I32, LANES)
    per_scale = SCALED // storage.group

    def numbers(at, first, left, shared=1):
        """Return LANES numbers, of which `shared` neighbours are the same; zero beyond `left`."""
        at = move(builder, at, builder.sdiv(first, constant(shared)) if shared > 1 else first)
        kind = ir.VectorType(F32, LANES // shared)
        if left is None:
            found = load(builder, at, kind)
        else:
            mask = first_lanes(builder, builder.sdiv(left, constant(shared)), kind.count)
            found = masked_load(builder, at, mask, vector=kind)
        if shared == 1:
            return found
        return _shuffled(builder, found, found, [lane // shared for lane in range(LANES)])

    def kept(at, line, first, kind):
        at = builder.bitcast(move(builder, at, line), kind.as_pointer())
        vector = load(builder, move(builder, at, first), ir.VectorType(kind, LANES))
        return vector if kind == F32 else widened_half(builder, vector)

    def block(first, left):
        factors, of_groups = numbers(dx, first, left, per_scale), numbers(sums, first, left)
        terms, offs = [], []
        for lane in range(LANES):
            line = builder.mul(table_row, constant(lane))
            whole = load(builder, move(builder, move(builder, n, line), first), integers)
            if not storage.offsets:
                whole = builder.add(whole, builder.bitcast(of_groups, integers))
            factor = builder.fmul(factors, kept(scale, line, first, kinds[0]))
            terms.append(builder.fmul(builder.sitofp(whole, VECTOR), factor))
            if storage.offsets:
                offs.append(builder.fmul(of_groups, kept(offset, line, first, kinds[1])))
        terms = transposed(builder, terms)
        offs = transposed(builder, offs) if offs else offs
        for g, term in enumerate(terms):

            def add_group(g=g, term=term):
                found = builder.fadd(builder.load(total), term)
                builder.store(builder.fsub(found, offs[g]) if offs else found, total)

            if left is None:
                add_group()
            else:
                with builder.if_then(builder.icmp_signed("<", constant(g), left)):
                    add_group()

    left = builder.srem(groups, constant(LANES))
    whole = builder.sub(groups, left)
    with cgutils.for_range_slice(builder, constant(0), whole, constant(LANES), I64) as (first, _):
        block(first, None)
    with builder.if_then(builder.icmp_signed(">", left, constant(0))):
        block(whole, left)
    masked_store(builder, builder.load(total), c, mask)


# -- as operations of kernels ------------------------------------------------------------------


@helper
def arrange(to, p):
    """Write a row of bytes p (K / 4,), four in a place, in the order in which `multiply_few` reads them."""
    words, side = SCALED // 4, TWICE // 4 // SIDES
    whole = p.size // (SIDES * side) * (SIDES * side)
    for first in range(0, whole, SIDES * side):
        for i in range(ADDED_UP):
            for s in range(SIDES):
                at = first + (SIDES * i + s) * words
                source = first + s * side + i * words
                to[at : at + words] = p[source : source + words]
    to[whole:] = p[whole:]


def arranged_ref(p, back=False):
    """Return rows of bytes p (N, K) in that order, or back from it."""
    whole = p.shape[1] // TWICE * TWICE
    shape = (SIDES, ADDED_UP) if not back else (ADDED_UP, SIDES)
    units = p[:, :whole].reshape(len(p), -1, *shape, SCALED).swapaxes(2, 3).reshape(len(p), -1)
    return np.concatenate([units, p[:, whole:]], 1)


def _multiply_few_twin(c, d, i, j, rows, cols, x, dx, sums, k0, raw, begin, n, scale, offset, k, add, table):
    storage = KNOWN[table[WHICH]]
    places = slice(i, i + rows), slice(j, j + cols)
    found = storage.integers_ref(raw[j : j + cols, begin : begin + k // storage.block * storage.bytes_per_block])
    numbers = arranged_ref(np.ascontiguousarray(x[i : i + rows]).view(np.int8)[:, k0 : k0 + k], back=True)
    of_groups = sums[i : i + rows, k0 // storage.group :]
    y = d[places] if add else np.zeros((rows, cols), np.float32)
    c[places] = grouped_ref(y, numbers, dx[i : i + rows, k0 // SCALED :], of_groups, *found, storage.zero)


@with_twin(_multiply_few_twin)
def multiply_few(typing, c, d, i, j, rows, cols, x, dx, sums, k0, raw, begin, n, scale, offset, k, add, table):
    """c[i : i + rows, j : j + cols] = the product of rows of x with rows of raw, plus d there if `add`; d may be c.

    rows <= MOST, cols <= LANES; columns k0 to k0 + k, whole blocks, of x (N, K / 4) as `arrange` leaves it, of which
    raw has the bytes from `begin` on; dx, sums: as `multiply` has them; scratch: n (MOST LANES, groups), scale and
    offset (LANES, groups), where groups is a multiple of LANES and not less than those of k; table: `integers(...)`

    Meanwhile the next LANES rows of raw are fetched into the second-level cache, as `spread` does.
    """

    def codegen(context, builder, signature, arguments):
        c, d, i, j, rows, cols, x, dx, sums, k0, raw, begin, n, scale, offset, k, add, table = arguments
        kinds, zero = signature.args, constant(0)
        group, block = (entry_of(context, builder, kinds[17], table, entry) for entry in (GROUP, BLOCK_SIZE))
        given = (
            (0, c, i, j),
            (1, d, i, j),
            (6, x, i, builder.sdiv(k0, constant(4))),
            (7, dx, i, builder.sdiv(k0, constant(SCALED))),
            (8, sums, i, builder.sdiv(k0, group)),
            (10, raw, j, begin),
        )
        pointers = [pointer(context, builder, kinds[at], array, *place) for at, array, *place in given]
        following = pointer(context, builder, kinds[10], raw, builder.add(j, constant(LANES)), zero)
        pointers.append(move(builder, following, builder.mul(begin, constant(LANES))))
        tables = (12, n), (13, scale), (14, offset)
        pointers += [pointer(context, builder, kinds[at], array, zero, zero) for at, array in tables]
        lengths = [row_length(context, builder, kinds[at], array) for at, array, *_ in given]
        lengths.append(row_length(context, builder, kinds[13], scale))
        slot = constant(IN_REGISTERS)
        for smaller in FEW_COUNTS[:-1]:
            slot = builder.add(slot, builder.zext(builder.icmp_signed(">", rows, constant(smaller)), I64))
        values = [*pointers, *lengths, rows, cols, builder.sdiv(k, block), add]
        call_routine(context, builder, kinds[17], table, slot, values)
        return context.get_dummy_value()

    whole = types.intp
    kinds = c, d, whole, whole, whole, whole, x, dx, sums, whole, raw, whole, n, scale, offset, whole, types.boolean
    return types.void(*kinds, table), codegen
