"""The register tile and the panels it reads: the inside of every matrix product in the house.

    tile                 C[rows, cols] (+)= A B for one register tile
    pack_a               panels of A = x[i:i+m, j:j+k]        pack_a_transposed    panels of A = x[i:i+k, j:j+m]ᵀ
    pack_b               panels of B = x[i:i+k, j:j+n]        pack_b_transposed    panels of B = x[i:i+n, j:j+k]ᵀ

A tile keeps ROWS x COLUMNS sums in vector registers and reads one *panel* of A and one of B straight through, in the
way of Goto and van de Geijn, "Anatomy of High-Performance Matrix Multiplication" (2008).  A panel holds ROWS rows of
A, or COLUMNS columns of B, with the sum's index p outermost; a matrix is packed as one panel after the other:

    A (m, k)    element (r, p) stands at    at + (r // ROWS * k + p) * ROWS + r % ROWS
    B (k, n)    element (p, c) stands at    at + (c // COLUMNS * k + p) * COLUMNS + c % COLUMNS

Rows and columns that fill up the last panel are zero.  Matrices have unit column stride; packing makes every other
layout the same.
"""

import functools

import llvmlite.ir as ir
import numpy as np
from numba import types
from numba.core import cgutils

from .simd import (
    F32,
    I32,
    I64,
    ISA,
    LANES,
    VECTOR,
    ZERO,
    broadcast,
    call_once_built,
    constant,
    declare,
    first_lanes,
    load,
    masked_load,
    masked_store,
    move,
    pointer,
    store,
    with_twin,
)

__all__ = ["COLUMNS", "ROWS", "pack_a", "pack_a_transposed", "pack_b", "pack_b_transposed", "tile"]

ROWS = ISA.tile_rows
COLUMNS = ISA.tile_columns


# -- plain-Python twins: what each operation means -----------------------------------------------


def _tile_twin(c, d, i, j, rows, cols, a, a_at, b, b_at, k, add):
    left = a[a_at : a_at + k * ROWS].reshape(k, ROWS)[:, :rows]
    right = b[b_at : b_at + k * COLUMNS].reshape(k, COLUMNS)[:, :cols]
    block = (slice(i, i + rows), slice(j, j + cols))
    c[block] = left.T @ right + (d[block] if add else np.float32(0))


def _pack_twin(width, transposed):
    def pack(panels, at, x, i, j, count, k):
        block = x[i : i + k, j : j + count] if transposed else x[i : i + count, j : j + k].T  # (k, count)
        for c in range(0, count, width):
            panel = panels[at + c * k : at + (c + width) * k].reshape(k, width)
            part = block[:, c : c + width]
            panel[:, : part.shape[1]] = part
            panel[:, part.shape[1] :] = 0

    return pack


# -- one register tile ---------------------------------------------------------------------------


def _row_length(context, builder, array_type, array):
    """Floats from one row of a matrix to the next."""
    strides = context.make_array(array_type)(context, builder, array).strides
    return builder.sdiv(builder.extract_value(strides, 0), constant(4))


@with_twin(_tile_twin)
def tile(typing, c, d, i, j, rows, cols, a, a_at, b, b_at, k, add):
    """c[i:i+rows, j:j+cols] = A B, plus d[i:i+rows, j:j+cols] if `add`; d may be c.

    a: float32 buffer with a panel of A, (k, ROWS), at `a_at`;  b: the same of B, (k, COLUMNS), at `b_at`
    c, d: float32 matrices with unit column stride;  rows <= ROWS, cols <= COLUMNS
    """
    signature = types.void(c, d, *[types.intp] * 4, a, types.intp, b, types.intp, types.intp, types.boolean)

    def codegen(context, builder, signature, arguments):
        c, d, i, j, rows, cols, a, a_at, b, b_at, k, add = arguments
        kinds = signature.args
        pointers = (
            pointer(context, builder, kinds[0], c, i, j),
            pointer(context, builder, kinds[1], d, i, j),
            pointer(context, builder, kinds[6], a, a_at),
            pointer(context, builder, kinds[8], b, b_at),
        )
        lengths = (_row_length(context, builder, kinds[0], c), _row_length(context, builder, kinds[1], d))
        call_once_built(builder, "abi_tile", [*pointers, *lengths, rows, cols, k, add], _tile_body)
        return context.get_dummy_value()

    return signature, codegen


def _tile_body(builder, c, d, a, b, c_row, d_row, rows, cols, k, add):
    """Emit the tile for each number of vectors that `cols` may need: an edge costs what is inside the matrix."""
    for vectors in range(1, ISA.tile_vectors + 1):
        above = builder.icmp_signed(">", cols, constant(LANES * (vectors - 1)))
        below = builder.icmp_signed("<=", cols, constant(LANES * vectors))
        with builder.if_then(builder.and_(above, below)):
            _tile_of(builder, vectors, c, d, a, b, c_row, d_row, rows, cols, k, add)


def _tile_of(builder, vectors, c, d, a, b, c_row, d_row, rows, cols, k, add):
    """Emit a tile that is `vectors` wide: sums in registers over k, then one visit to C."""
    sums = [[cgutils.alloca_once(builder, VECTOR) for _ in range(vectors)] for _ in range(ROWS)]
    for line in sums:
        for total in line:
            builder.store(ZERO, total)
    fmuladd = declare(builder, f"llvm.fmuladd.v{LANES}f32", VECTOR, [VECTOR] * 3)
    prefetch = declare(builder, "llvm.prefetch.p0", ir.VoidType(), [d.type, I32, I32, I32])
    for r in range(ROWS):  # C is on its way while the sums are made; an address past the matrix does no harm
        line = move(builder, d, builder.mul(d_row, constant(r)))
        for v in range(vectors):
            flags = [ir.Constant(I32, flag) for flag in (1, 3, 1)]  # to be written, keep close, data
            builder.call(prefetch, [move(builder, line, LANES * v), *flags])
    with cgutils.for_range(builder, k) as loop:
        a_now = move(builder, a, builder.mul(loop.index, constant(ROWS)))
        b_now = move(builder, b, builder.mul(loop.index, constant(COLUMNS)))
        right = [load(builder, move(builder, b_now, LANES * v)) for v in range(vectors)]
        for r in range(ROWS):
            left = broadcast(builder, builder.load(move(builder, a_now, r)), VECTOR)
            for v in range(vectors):
                builder.store(builder.call(fmuladd, [left, right[v], builder.load(sums[r][v])]), sums[r][v])

    def write(read, put):
        for r in range(ROWS):
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


# -- packing -------------------------------------------------------------------------------------


def _packer(name, body, width):
    """Return a Numba intrinsic that calls the LLVM function `name`, whose body is emitted by `body`."""

    def typed(typing, panels, at, x, i, j, count, k):
        def codegen(context, builder, signature, arguments):
            panels, at, x, i, j, count, k = arguments
            kinds = signature.args
            to = pointer(context, builder, kinds[0], panels, at)
            source = pointer(context, builder, kinds[2], x, i, j)
            row = _row_length(context, builder, kinds[2], x)
            call_once_built(builder, name, [to, source, row, count, k], lambda b, *args: body(b, width, *args))
            return context.get_dummy_value()

        return types.void(panels, types.intp, x, *[types.intp] * 4), codegen

    return typed


def _pieces(width):
    """Cut a panel's width into vectors: (first lane, lanes) of each, whole vectors first."""
    return [(first, min(LANES, width - first)) for first in range(0, width, LANES)]


def _transpose(builder, rows):
    """Transpose n vectors of n floats, n a power of two: log2(n) rounds of two-vector shuffles (Eklundh 1972)."""
    size = len(rows)
    half = size // 2
    while half:
        mixed = list(rows)
        low = [lane if not lane & half else size + lane - half for lane in range(size)]
        high = [lane + half if not lane & half else size + lane for lane in range(size)]
        for index in range(size):
            if not index & half:
                pair = rows[index], rows[index + half]
                mixed[index] = builder.shuffle_vector(*pair, ir.Constant(ir.VectorType(I32, size), low))
                mixed[index + half] = builder.shuffle_vector(*pair, ir.Constant(ir.VectorType(I32, size), high))
        rows, half = mixed, half // 2
    return rows


def _cut(builder, vector, lanes):
    """Return the first `lanes` lanes of a vector."""
    if lanes == vector.type.count:
        return vector
    return builder.shuffle_vector(vector, vector, ir.Constant(ir.VectorType(I32, lanes), list(range(lanes))))


def _pack_transposing_body(builder, width, to, source, row, count, k):
    """Emit packing of rows: squares of x are transposed in registers, one panel after the other."""
    with cgutils.for_range_slice(builder, constant(0), count, constant(width), I64) as (first, _):
        panel = builder.gep(to, [builder.mul(first, k)])
        for lane, lanes in _pieces(width):
            size = 1 << (lanes - 1).bit_length()  # side of the square
            vector = ir.VectorType(F32, size)
            top = builder.add(first, constant(lane))

            def square(p, read, steps, lanes=lanes, size=size, vector=vector, top=top, lane=lane, panel=panel):
                lines = []
                for r in range(size):
                    zero = ir.Constant(vector, [0.0] * size)
                    if r >= lanes:
                        lines.append(zero)
                        continue
                    index = builder.add(top, constant(r))
                    inside = builder.icmp_signed("<", index, count)
                    index = builder.select(inside, index, first)  # a row that exists; its values are then dropped
                    line = read(builder.gep(source, [builder.add(builder.mul(index, row), p)]), vector)
                    lines.append(builder.select(inside, line, zero))
                for s, line in enumerate(_transpose(builder, lines)):
                    spot = builder.add(builder.mul(builder.add(p, constant(s)), constant(width)), constant(lane))
                    spot = builder.gep(panel, [spot])
                    if steps is None:
                        store(builder, _cut(builder, line, lanes), spot)
                    else:
                        with builder.if_then(builder.icmp_signed("<", constant(s), steps)):
                            store(builder, _cut(builder, line, lanes), spot)

            left = builder.srem(k, constant(size))
            whole = builder.sub(k, left)
            with cgutils.for_range_slice(builder, constant(0), whole, constant(size), I64) as (p, _):
                square(p, lambda at, vector: load(builder, at, vector), None)
            with builder.if_then(builder.icmp_signed(">", left, constant(0))):
                mask = first_lanes(builder, left, size)
                read = functools.partial(masked_load, builder, mask=mask)
                square(whole, lambda at, vector, read=read: read(at, vector=vector), left)


STEPS = 4  # rows of x dealt out at a time: two full cache lines to each panel of A


def _pack_copying_body(builder, width, to, source, row, count, k):
    """Emit packing of columns: a few rows of x are read from end to end and dealt out to the panels."""

    def deal(p, steps):
        """Copy the rows p ... p + steps - 1 to their places in every panel."""
        lines = [builder.gep(source, [builder.mul(builder.add(p, constant(s)), row)]) for s in range(steps)]
        with cgutils.for_range_slice(builder, constant(0), count, constant(width), I64) as (first, _):
            panel = builder.gep(to, [builder.add(builder.mul(first, k), builder.mul(p, constant(width)))])
            inside = builder.icmp_signed("<=", builder.add(first, constant(width)), count)
            with builder.if_else(inside) as (whole, edge):
                with whole:
                    for s, line in enumerate(lines):
                        for lane, lanes in _pieces(width):
                            at = move(builder, builder.gep(line, [first]), lane)
                            values = load(builder, at, ir.VectorType(F32, lanes))
                            store(builder, values, move(builder, panel, s * width + lane))
                with edge:
                    for lane, lanes in _pieces(width):
                        mask = first_lanes(builder, builder.sub(count, builder.add(first, constant(lane))))
                        for s, line in enumerate(lines):
                            values = masked_load(builder, move(builder, builder.gep(line, [first]), lane), mask)
                            store(builder, _cut(builder, values, lanes), move(builder, panel, s * width + lane))

    whole = builder.sub(k, builder.srem(k, constant(STEPS)))
    with cgutils.for_range_slice(builder, constant(0), whole, constant(STEPS), I64) as (p, _):
        deal(p, STEPS)
    with cgutils.for_range_slice(builder, whole, k, constant(1), I64) as (p, _):
        deal(p, 1)


# Called as pack(panels, at, x, i, j, count, k): count rows of A or columns of B, k deep; see the top of the file.
pack_a = with_twin(_pack_twin(ROWS, False))(_packer("abi_pack_a", _pack_transposing_body, ROWS))
pack_a_transposed = with_twin(_pack_twin(ROWS, True))(_packer("abi_pack_a_transposed", _pack_copying_body, ROWS))
pack_b = with_twin(_pack_twin(COLUMNS, True))(_packer("abi_pack_b", _pack_copying_body, COLUMNS))
pack_b_transposed = with_twin(_pack_twin(COLUMNS, False))(
    _packer("abi_pack_b_transposed", _pack_transposing_body, COLUMNS)
)
