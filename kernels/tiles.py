"""The register tile and the panels it reads: the inside of every matrix product in the house.

    tile                 C[rows, cols] (+)= A B for one register tile
    pack_a               panels of A = x[i:i+m, j:j+k]        pack_a_transposed    panels of A = x[i:i+k, j:j+m]ᵀ
    pack_b               panels of B = x[i:i+k, j:j+n]        pack_b_transposed    panels of B = x[i:i+n, j:j+k]ᵀ
    ..._bf16             the same in bfloat16: panels of pairs, and the tile that multiplies them

A tile keeps ROWS x COLUMNS sums in vector registers and reads one *panel* of A and one of B straight through, in the
way of Goto and van de Geijn, "Anatomy of High-Performance Matrix Multiplication" (2008).  A panel holds ROWS rows of
A, or COLUMNS columns of B, with the sum's index p outermost; a matrix is packed as one panel after the other:

    A (m, k)    element (r, p) stands at    at + (r // ROWS * k + p) * ROWS + r % ROWS
    B (k, n)    element (p, c) stands at    at + (c // COLUMNS * k + p) * COLUMNS + c % COLUMNS

Rows and columns that fill up the last panel are zero.  Matrices have unit column stride; packing makes every other
layout the same.  A storage format is a way of packing too: for bfloat16, elements p and p + 1 of a row of A (or column
of B) are rounded to nearest even and stand together in the 32 bits of one float, the first in the lower half, so
panels are (k + 1) // 2 deep.  The tile then adds two products at once, with the processor's bfloat16 dot product
where there is one (`NATIVE_BF16`), else in float32 after shifting each half back into place.
"""

import llvmlite.binding as llvm
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

__all__ = [
    "COLUMNS",
    "NATIVE_BF16",
    "ROWS",
    "pack_a",
    "pack_a_bf16",
    "pack_a_transposed",
    "pack_a_transposed_bf16",
    "pack_b",
    "pack_b_bf16",
    "pack_b_transposed",
    "pack_b_transposed_bf16",
    "round_to_bf16_ref",
    "tile",
    "tile_bf16",
]

ROWS = ISA.tile_rows
COLUMNS = ISA.tile_columns
NATIVE_BF16 = ISA.name == "avx512" and bool(llvm.get_host_cpu_features().get("avx512bf16"))


# -- plain-Python twins: what each operation means -----------------------------------------------


def _tile_twin(c, d, i, j, rows, cols, a, a_at, b, b_at, k, add):
    left = a[a_at : a_at + k * ROWS].reshape(k, ROWS)[:, :rows]
    right = b[b_at : b_at + k * COLUMNS].reshape(k, COLUMNS)[:, :cols]
    block = (slice(i, i + rows), slice(j, j + cols))
    c[block] = left.T @ right + (d[block] if add else np.float32(0))


def round_to_bf16_ref(x):
    """Return float32 x rounded to bfloat16 (8 bits of significand), to nearest even, still float32; NaN stays NaN."""
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
    rounded = bits + np.uint32(0x7FFF) + (bits >> np.uint32(16) & np.uint32(1))
    kept = np.where(np.isnan(x), bits | np.uint32(0x400000), rounded)
    return (kept & np.uint32(0xFFFF0000)).view(np.float32)


def _pair_twin(block):
    """Turn (k, count) float32 into ((k + 1) // 2, count) pairs of bfloat16, still called float32."""
    halves = np.zeros((-(-block.shape[0] // 2) * 2, block.shape[1]), np.uint32)
    halves[: block.shape[0]] = round_to_bf16_ref(block).view(np.uint32) >> np.uint32(16)
    return (halves[::2] | halves[1::2] << np.uint32(16)).view(np.float32)


def _unpair_twin(panel):
    """Undo that: (2 k, count) float32 of (k, count) pairs."""
    bits = np.ascontiguousarray(panel).view(np.uint32)
    halves = np.empty((2 * bits.shape[0], bits.shape[1]), np.uint32)
    halves[::2], halves[1::2] = bits << np.uint32(16), bits & np.uint32(0xFFFF0000)
    return halves.view(np.float32)


def _tile_bf16_twin(c, d, i, j, rows, cols, a, a_at, b, b_at, k, add):
    left = _unpair_twin(a[a_at : a_at + k * ROWS].reshape(k, ROWS)).ravel()
    right = _unpair_twin(b[b_at : b_at + k * COLUMNS].reshape(k, COLUMNS)).ravel()
    _tile_twin(c, d, i, j, rows, cols, left, 0, right, 0, 2 * k, add)


def _pack_twin(width, transposed, bf16=False):
    def pack(panels, at, x, i, j, count, k):
        block = x[i : i + k, j : j + count] if transposed else x[i : i + count, j : j + k].T  # (k, count)
        if bf16:
            block, k = _pair_twin(block), (k + 1) // 2
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


def _make_tile(name, multiply):
    """Return the intrinsic whose LLVM function `name` adds with `multiply(builder, left, right, total)`."""

    def tile(typing, c, d, i, j, rows, cols, a, a_at, b, b_at, k, add):
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
            values = [*pointers, *lengths, rows, cols, k, add]
            call_once_built(builder, name, values, lambda inner, *args: _tile_body(inner, multiply, *args))
            return context.get_dummy_value()

        return signature, codegen

    return tile


def _multiply(builder, left, right, total):
    return builder.call(declare(builder, f"llvm.fmuladd.v{LANES}f32", VECTOR, [VECTOR] * 3), [left, right, total])


def _multiply_bf16(builder, left, right, total):
    """Add the products of both halves."""
    if NATIVE_BF16:
        halves = ir.VectorType(_BFloat16(), 2 * LANES)
        name = f"llvm.x86.avx512bf16.dpbf16ps.{32 * LANES}"
        dot = declare(builder, name, VECTOR, [VECTOR, halves, halves])
        return builder.call(dot, [total, builder.bitcast(left, halves), builder.bitcast(right, halves)])
    integers = ir.VectorType(I32, LANES)
    left, right = (builder.bitcast(x, integers) for x in (left, right))
    for half in (_lower_half, _upper_half):
        total = _multiply(builder, half(builder, left), half(builder, right), total)
    return total


def _lower_half(builder, pairs):
    return builder.bitcast(builder.shl(pairs, _each(16, pairs.type)), VECTOR)


def _upper_half(builder, pairs):
    return builder.bitcast(builder.and_(pairs, _each(0xFFFF0000, pairs.type)), VECTOR)


def _each(value, vector):
    """The constant vector of equal elements."""
    return ir.Constant(vector, [value] * vector.count)


class _BFloat16(ir.Type):
    """LLVM's `bfloat`, which llvmlite does not have."""

    null = "0.0"
    intrinsic_name = "bf16"

    def __str__(self):
        return "bfloat"

    _to_string = __str__

    def __eq__(self, other):
        return isinstance(other, _BFloat16)

    def __hash__(self):
        return hash(_BFloat16)


def _tile_body(builder, multiply, c, d, a, b, c_row, d_row, rows, cols, k, add):
    """Emit the tile for each number of vectors that `cols` may need: an edge costs what is inside the matrix."""
    for vectors in range(1, ISA.tile_vectors + 1):
        above = builder.icmp_signed(">", cols, constant(LANES * (vectors - 1)))
        below = builder.icmp_signed("<=", cols, constant(LANES * vectors))
        with builder.if_then(builder.and_(above, below)):
            _tile_of(builder, multiply, vectors, c, d, a, b, c_row, d_row, rows, cols, k, add)


def _tile_of(builder, multiply, vectors, c, d, a, b, c_row, d_row, rows, cols, k, add):
    """Emit a tile that is `vectors` wide: sums in registers over k, then one visit to C."""
    sums = [[cgutils.alloca_once(builder, VECTOR) for _ in range(vectors)] for _ in range(ROWS)]
    for line in sums:
        for total in line:
            builder.store(ZERO, total)
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
                builder.store(multiply(builder, left, right[v], builder.load(sums[r][v])), sums[r][v])

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


# tile(c, d, i, j, rows, cols, a, a_at, b, b_at, k, add):
# c[i:i+rows, j:j+cols] = A B, plus d[i:i+rows, j:j+cols] if `add`; d may be c.
#     a: float32 buffer with a panel of A, (k, ROWS), at `a_at`;  b: the same of B, (k, COLUMNS), at `b_at`
#     c, d: float32 matrices with unit column stride;  rows <= ROWS, cols <= COLUMNS
# tile_bf16: the same of panels of pairs, k pairs deep.
tile = with_twin(_tile_twin)(_make_tile("abi_tile", _multiply))
tile_bf16 = with_twin(_tile_bf16_twin)(_make_tile("abi_tile_bf16", _multiply_bf16))


# -- packing -------------------------------------------------------------------------------------


class _Float32:
    """How a packer reads float32: one element of x is one element of a panel."""

    fold = 1  # elements of x, along the sum's index, in an element of a panel

    def along(self, builder, at, vector, left=None):
        """Read a vector along the sum's index; of the elements from `at` on, only `left` exist (None: enough)."""
        if left is None:
            return load(builder, at, vector)
        return masked_load(builder, at, first_lanes(builder, left, vector.count), vector=vector)

    def across(self, builder, at, row, read, last):
        """Read a vector across: `read(at)`; the next element of the sum lies `row` floats further, unless `last`."""
        return read(at)


class _BFloat16Pairs:
    """How a packer reads bfloat16: two elements of x, rounded, are one element of a panel."""

    fold = 2

    def along(self, builder, at, vector, left=None):
        second = None if left is None else builder.sub(left, constant(vector.count))
        parts = [
            _Float32().along(builder, at, vector, left),
            _Float32().along(builder, move(builder, at, vector.count), vector, second),
        ]
        lanes = range(vector.count)
        even, odd = (
            builder.shuffle_vector(*parts, ir.Constant(ir.VectorType(I32, vector.count), [2 * i + half for i in lanes]))
            for half in (0, 1)
        )
        return _pairs(builder, even, odd)

    def across(self, builder, at, row, read, last):
        first = read(at)
        second = ir.Constant(first.type, [0.0] * first.type.count) if last else read(builder.gep(at, [row]))
        return _pairs(builder, first, second)


def _pairs(builder, even, odd):
    """Round two float32 vectors to bfloat16 and put them together: `even` in the lower halves, `odd` in the upper."""
    lower, upper = (_round_to_bf16(builder, x) for x in (even, odd))
    return builder.bitcast(builder.or_(lower, builder.shl(upper, _each(16, upper.type))), even.type)


def _round_to_bf16(builder, x):
    """Round to nearest even, into the lower 16 bits of each int32; NaN stays NaN."""
    integers = ir.VectorType(I32, x.type.count)
    bits = builder.bitcast(x, integers)
    upper = builder.lshr(bits, _each(16, integers))
    odd = builder.and_(upper, _each(1, integers))
    rounded = builder.lshr(builder.add(bits, builder.add(odd, _each(0x7FFF, integers))), _each(16, integers))
    return builder.select(builder.fcmp_unordered("uno", x, x), builder.or_(upper, _each(0x40, integers)), rounded)


def _packer(name, body, width, element):
    """Return a Numba intrinsic that calls the LLVM function `name`, whose body is emitted by `body`."""

    def typed(typing, panels, at, x, i, j, count, k):
        def codegen(context, builder, signature, arguments):
            panels, at, x, i, j, count, k = arguments
            kinds = signature.args
            to = pointer(context, builder, kinds[0], panels, at)
            source = pointer(context, builder, kinds[2], x, i, j)
            row = _row_length(context, builder, kinds[2], x)
            values = [to, source, row, count, k]
            call_once_built(builder, name, values, lambda inner, *args: body(inner, width, element, *args))
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


def _packed_depth(builder, k, fold):
    return builder.sdiv(builder.add(k, constant(fold - 1)), constant(fold))


def _pack_transposing_body(builder, width, element, to, source, row, count, k):
    """Emit packing of rows: squares of x are transposed in registers, one panel after the other."""
    fold = element.fold
    depth = _packed_depth(builder, k, fold)
    with cgutils.for_range_slice(builder, constant(0), count, constant(width), I64) as (first, _):
        panel = builder.gep(to, [builder.mul(first, depth)])
        for lane, lanes in _pieces(width):
            size = 1 << (lanes - 1).bit_length()  # side of the square
            vector = ir.VectorType(F32, size)
            top = builder.add(first, constant(lane))

            def square(p, left, lanes=lanes, size=size, vector=vector, top=top, lane=lane, panel=panel):
                """Move the square at column p of x, of which `left` columns exist (None: all)."""
                lines = []
                for r in range(size):
                    zero = ir.Constant(vector, [0.0] * size)
                    if r >= lanes:
                        lines.append(zero)
                        continue
                    index = builder.add(top, constant(r))
                    inside = builder.icmp_signed("<", index, count)
                    index = builder.select(inside, index, first)  # a row that exists; its values are then dropped
                    at = builder.gep(source, [builder.add(builder.mul(index, row), p)])
                    lines.append(builder.select(inside, element.along(builder, at, vector, left), zero))
                packed_p = builder.sdiv(p, constant(fold))
                for s, line in enumerate(_transpose(builder, lines)):
                    spot = builder.add(builder.mul(builder.add(packed_p, constant(s)), constant(width)), constant(lane))
                    spot = builder.gep(panel, [spot])
                    if left is None:
                        store(builder, _cut(builder, line, lanes), spot)
                    else:
                        with builder.if_then(builder.icmp_signed("<", constant(s * fold), left)):
                            store(builder, _cut(builder, line, lanes), spot)

            left = builder.srem(k, constant(size * fold))
            whole = builder.sub(k, left)
            with cgutils.for_range_slice(builder, constant(0), whole, constant(size * fold), I64) as (p, _):
                square(p, None)
            with builder.if_then(builder.icmp_signed(">", left, constant(0))):
                square(whole, left)


STEPS = 4  # steps of the sum dealt out at a time: two full cache lines to each panel of A


def _pack_copying_body(builder, width, element, to, source, row, count, k):
    """Emit packing of columns: a few rows of x are read from end to end and dealt out to the panels."""
    fold = element.fold
    depth = _packed_depth(builder, k, fold)

    def deal(p, steps, last=False):
        """Copy the rows of x from p on, `steps` steps of the sum, to their places in every panel."""
        lines = [builder.gep(source, [builder.mul(builder.add(p, constant(s * fold)), row)]) for s in range(steps)]
        packed_p = builder.sdiv(p, constant(fold))
        with cgutils.for_range_slice(builder, constant(0), count, constant(width), I64) as (first, _):
            panel = builder.gep(to, [builder.add(builder.mul(first, depth), builder.mul(packed_p, constant(width)))])
            inside = builder.icmp_signed("<=", builder.add(first, constant(width)), count)
            with builder.if_else(inside) as (whole, edge):
                with whole:
                    for s, line in enumerate(lines):
                        for lane, lanes in _pieces(width):
                            vector = ir.VectorType(F32, lanes)
                            at = move(builder, builder.gep(line, [first]), lane)
                            values = element.across(builder, at, row, lambda at, v=vector: load(builder, at, v), last)
                            store(builder, values, move(builder, panel, s * width + lane))
                with edge:
                    for lane, lanes in _pieces(width):
                        mask = first_lanes(builder, builder.sub(count, builder.add(first, constant(lane))))
                        for s, line in enumerate(lines):
                            at = move(builder, builder.gep(line, [first]), lane)
                            values = element.across(
                                builder, at, row, lambda at, m=mask: masked_load(builder, at, m), last
                            )
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


def _make_packer(name, width, transposed, element):
    """Return one of the packers; `transposed`: the sum's index runs over the rows of x."""
    body = _pack_copying_body if transposed else _pack_transposing_body
    twin = _pack_twin(width, transposed, bf16=element.fold == 2)
    return with_twin(twin)(_packer(name, body, width, element))


# Called as pack(panels, at, x, i, j, count, k): count rows of A or columns of B, k deep; see the top of the file.
pack_a = _make_packer("abi_pack_a", ROWS, False, _Float32())
pack_a_transposed = _make_packer("abi_pack_a_transposed", ROWS, True, _Float32())
pack_b = _make_packer("abi_pack_b", COLUMNS, True, _Float32())
pack_b_transposed = _make_packer("abi_pack_b_transposed", COLUMNS, False, _Float32())
pack_a_bf16 = _make_packer("abi_pack_a_bf16", ROWS, False, _BFloat16Pairs())
pack_a_transposed_bf16 = _make_packer("abi_pack_a_transposed_bf16", ROWS, True, _BFloat16Pairs())
pack_b_bf16 = _make_packer("abi_pack_b_bf16", COLUMNS, True, _BFloat16Pairs())
pack_b_transposed_bf16 = _make_packer("abi_pack_b_transposed_bf16", COLUMNS, False, _BFloat16Pairs())
