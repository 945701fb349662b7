"""Vectors by hand: the few operations that LLVM does not find by itself, emitted as LLVM IR from Python.

    exp            e^x in single precision, as a polynomial that the loop vectoriser can widen (LLVM has no vector exp of its own)
    largest        the maximum of a vector
    tile           C[rows, cols] (+)= A B for one register tile: the inner loop of every matrix product in the house
    pack_rows      copy rows of a matrix into a panel, transposing on the way: panel[p, r] = x[i + r, j + p]
    pack_columns   copy columns of a matrix into a panel, as they lie:         panel[p, r] = x[i + p, j + r]

A *panel* is `k` groups of `width` floats: element (p, r) stands at `at + p * width + r`.  Elements past the edge of the matrix are
zero.  A tile keeps ROWS x COLUMNS sums in vector registers and reads one panel of A (width ROWS) and one of B (width COLUMNS), in
the way of Goto and van de Geijn, "Anatomy of High-Performance Matrix Multiplication" (2008).

The vector width and the tile follow from the host's features; `ABI_SIMD=avx512|avx2|neon|generic` overrides them, so that every
path can be tested on any machine (LLVM splits vectors that the host does not have).  Under NUMBA_DISABLE_JIT=1 the plain-Python twin of
each operation runs instead; the twins are also its definition.
"""

import math
import os
from dataclasses import dataclass
from typing import Any

import llvmlite.binding as llvm
import llvmlite.ir as ir
import numpy as np
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from ._jit import JIT, helper


@dataclass(frozen=True)
class Isa:
    """An instruction set as the kernels see it: floats per vector, and the register tile that fits its registers."""

    name: str
    lanes: int  # float32 per vector
    tile_rows: int
    tile_vectors: int

    @property
    def tile_columns(self) -> int:
        """Columns of the register tile, in floats."""
        return self.tile_vectors * self.lanes


# tile_rows * tile_vectors sums + tile_vectors of B + one of A must fit the vector registers: 32, 16, 32 and (at least) 16.
ISAS = {
    "avx512": Isa("avx512", 16, 8, 3),
    "avx2": Isa("avx2", 8, 6, 2),
    "neon": Isa("neon", 4, 8, 2),
    "generic": Isa("generic", 4, 4, 2),
}


def host_isa() -> str:
    """Name the widest instruction set of this machine that the kernels know."""
    features = llvm.get_host_cpu_features()
    if features.get("avx512f") and features.get("avx512vl"):
        return "avx512"
    if features.get("avx2") and features.get("fma"):
        return "avx2"
    if features.get("neon"):
        return "neon"
    return "generic"


def _chosen_isa() -> Isa:
    name = os.environ.get("ABI_SIMD") or host_isa()
    if name not in ISAS:
        raise ValueError(f"ABI_SIMD ({name}) must be one of {', '.join(ISAS)}; unset it to use this machine's own")
    return ISAS[name]


ISA = _chosen_isa()
LANES = ISA.lanes
ROWS = ISA.tile_rows
COLUMNS = ISA.tile_columns

_F32 = ir.FloatType()
_I32 = ir.IntType(32)
_I64 = ir.IntType(64)
_VECTOR = ir.VectorType(_F32, LANES)
_MASK = ir.VectorType(ir.IntType(1), LANES)
_ZERO = ir.Constant(_VECTOR, [0.0] * LANES)


# -- plain-Python twins: what each operation means -----------------------------------------------


def _fma_twin(a, b, c):
    return np.float32(np.float64(a) * np.float64(b) + np.float64(c))


def _float_from_bits_twin(bits):
    return np.int32(bits).view(np.float32)


def _bits_from_float_twin(value):
    return np.float32(value).view(np.int32)


def _largest_twin(x):
    return np.fmax.reduce(x, initial=np.float32(-np.inf))


def _tile_twin(c, d, i, j, rows, cols, a, a_at, b, b_at, k, add):
    left = a[a_at : a_at + k * ROWS].reshape(k, ROWS)[:, :rows]
    right = b[b_at : b_at + k * COLUMNS].reshape(k, COLUMNS)[:, :cols]
    block = (slice(i, i + rows), slice(j, j + cols))
    c[block] = left.T @ right + (d[block] if add else np.float32(0))


def _pack_rows_twin(panel, at, width, x, i, j, rows, k):
    view = panel[at : at + k * width].reshape(k, width)
    view[:, :rows] = x[i : i + rows, j : j + k].T
    view[:, rows:] = 0


def _pack_columns_twin(panel, at, width, x, i, j, columns, k):
    view = panel[at : at + k * width].reshape(k, width)
    view[:, :columns] = x[i : i + k, j : j + columns]
    view[:, columns:] = 0


def _with_twin(twin):
    """Use the LLVM version of an operation, or its twin where nothing is compiled."""
    return (lambda typed: intrinsic(typed)) if JIT else (lambda typed: twin)


# -- LLVM building blocks ------------------------------------------------------------------------


def _constant(value: int) -> ir.Constant:
    return ir.Constant(_I64, value)


def _pointer(context, builder, array_type, array, *indices):
    """Address of array[indices]; the last axis has unit stride (checked where Python meets the kernels)."""
    struct = context.make_array(array_type)(context, builder, array)
    offset = builder.mul(indices[-1], _constant(4))
    if len(indices) == 2:
        row_bytes = builder.extract_value(struct.strides, 0)
        offset = builder.add(offset, builder.mul(indices[0], row_bytes))
    base = builder.bitcast(struct.data, ir.IntType(8).as_pointer())
    return builder.bitcast(builder.gep(base, [offset]), _F32.as_pointer())


def _move(builder, pointer, floats):
    step = floats if isinstance(floats, ir.Value) else _constant(floats)
    return builder.gep(pointer, [step])


def _load(builder, pointer):
    value = builder.load(builder.bitcast(pointer, _VECTOR.as_pointer()))
    value.align = 4
    return value


def _store(builder, value, pointer):
    builder.store(value, builder.bitcast(pointer, _VECTOR.as_pointer())).align = 4


def _declare(builder, name, result, arguments):
    return cgutils.get_or_insert_function(builder.module, ir.FunctionType(result, arguments), name)


def _masked_load(builder, pointer, mask, otherwise=_ZERO):
    address = builder.bitcast(pointer, _VECTOR.as_pointer())
    name = f"llvm.masked.load.v{LANES}f32.p0"
    load = _declare(builder, name, _VECTOR, [address.type, _I32, _MASK, _VECTOR])
    return builder.call(load, [address, ir.Constant(_I32, 4), mask, otherwise])


def _masked_store(builder, value, pointer, mask):
    address = builder.bitcast(pointer, _VECTOR.as_pointer())
    name = f"llvm.masked.store.v{LANES}f32.p0"
    store = _declare(builder, name, ir.VoidType(), [_VECTOR, address.type, _I32, _MASK])
    builder.call(store, [value, address, ir.Constant(_I32, 4), mask])


def _broadcast(builder, value, vector_type):
    single = builder.insert_element(ir.Constant(vector_type, ir.Undefined), value, ir.Constant(_I32, 0))
    zeros = ir.Constant(ir.VectorType(_I32, vector_type.count), [0] * vector_type.count)
    return builder.shuffle_vector(single, ir.Constant(vector_type, ir.Undefined), zeros)


def _first_lanes(builder, count):
    """Mask of the lanes below `count`, which may be negative or larger than the vector."""
    wide = ir.VectorType(_I64, LANES)
    lanes = ir.Constant(wide, list(range(LANES)))
    return builder.icmp_signed("<", lanes, _broadcast(builder, count, wide))


def _call_once_built(builder, name, arguments, body):
    """Call a function of this module that `body(builder, *arguments)` fills in at its first use.

    Out of line, so that a kernel with seven products holds one copy of the tile: compiling takes a third of the time, and a
    call is nothing beside the loop inside.
    """
    function = builder.module.globals.get(name)
    if function is None:
        kind = ir.FunctionType(ir.VoidType(), [argument.type for argument in arguments])
        function = ir.Function(builder.module, kind, name)
        function.linkage = "internal"
        function.attributes.add("noinline")
        inside = ir.IRBuilder(function.append_basic_block("entry"))
        body(inside, *function.args)
        inside.ret_void()
    builder.call(function, arguments)


def _row_length(context, builder, array_type, array):
    """Floats from one row of a matrix to the next."""
    strides = context.make_array(array_type)(context, builder, array).strides
    return builder.sdiv(builder.extract_value(strides, 0), _constant(4))


def _transpose(builder, rows):
    """Transpose LANES vectors of LANES floats: log2(LANES) rounds of two-vector shuffles (Eklundh 1972)."""
    half = LANES // 2
    while half:
        mixed = list(rows)
        low = [lane if not lane & half else LANES + lane - half for lane in range(LANES)]
        high = [lane + half if not lane & half else LANES + lane for lane in range(LANES)]
        for index in range(LANES):
            if not index & half:
                pair = rows[index], rows[index + half]
                mixed[index] = builder.shuffle_vector(*pair, ir.Constant(ir.VectorType(_I32, LANES), low))
                mixed[index + half] = builder.shuffle_vector(*pair, ir.Constant(ir.VectorType(_I32, LANES), high))
        rows, half = mixed, half // 2
    return rows


# -- scalars: e^x --------------------------------------------------------------------------------


@_with_twin(_fma_twin)
def fma(typing, a, b, c):
    """Return a * b + c in float32; no fast-math flag, so that the split constants of `exp` stay split."""

    def codegen(context, builder, signature, arguments):
        return builder.call(_declare(builder, "llvm.fmuladd.f32", _F32, [_F32] * 3), arguments)

    return types.float32(types.float32, types.float32, types.float32), codegen


@_with_twin(_float_from_bits_twin)
def float_from_bits(typing, bits):
    """Return the float32 whose IEEE 754 representation is the int32 `bits`."""

    def codegen(context, builder, signature, arguments):
        return builder.bitcast(arguments[0], _F32)

    return types.float32(types.int32), codegen


@_with_twin(_bits_from_float_twin)
def bits_from_float(typing, value):
    """Return the IEEE 754 representation of a float32 as an int32."""

    def codegen(context, builder, signature, arguments):
        return builder.bitcast(arguments[0], _I32)

    return types.int32(types.float32), codegen


_EXP_LOW, _EXP_HIGH = np.float32(-87.33654), np.float32(88.72283)  # ln of the smallest normal and of the largest float32
_LOG2_E = np.float32(1 / math.log(2))
_LN2_HIGH = np.float32(0.693359375)  # 355 / 512: n * _LN2_HIGH is exact for |n| < 2^15 (Cody and Waite 1980)
_LN2_LOW = np.float32(math.log(2) - 0.693359375)
# e^r on |r| <= ln(2) / 2 by its Taylor series; the first term left out is r^8 / 8!, below 6e-9
_EXP_2, _EXP_3, _EXP_4, _EXP_5, _EXP_6, _EXP_7 = (np.float32(1 / math.factorial(n)) for n in range(2, 8))
_ONE, _HALF, _ZERO_F = np.float32(1), np.float32(0.5), np.float32(0)
_SHIFT = np.int32(23)


@helper
def exp(x):
    """Return e^x for a float32 x; relative error below 2e-7, 0 below -87.3, inf above 88.7, NaN for NaN.

    x = n ln 2 + r with |r| <= ln(2)/2; e^x = 2^n e^r.
    Branch-free, so that a loop over it becomes vector code.
    """
    inside = min(_EXP_HIGH, max(_EXP_LOW, x))
    n = np.floor(inside * _LOG2_E + _HALF)
    r = fma(n, -_LN2_HIGH, inside)
    r = fma(n, -_LN2_LOW, r)
    p = fma(_EXP_7, r, _EXP_6)
    p = fma(p, r, _EXP_5)
    p = fma(p, r, _EXP_4)
    p = fma(p, r, _EXP_3)
    p = fma(p, r, _EXP_2)
    p = fma(fma(p, r, _ONE), r, _ONE)
    # p's exponent field is raised by n as an integer: 2^n as a float factor would overflow at n = 128, where e^x does not yet.
    y = float_from_bits(bits_from_float(p) + (np.int32(n) << _SHIFT))
    y = y if x >= _EXP_LOW else _ZERO_F
    y = y if x <= _EXP_HIGH else np.float32(np.inf)
    return y if x == x else x


@_with_twin(_largest_twin)
def largest(typing, x):
    """Return the largest element of a contiguous float32 vector, ignoring NaN; -inf if there is none.

    LLVM does not vectorise a maximum unless NaN is declared impossible, which it is not here.
    """

    def codegen(context, builder, signature, arguments):
        (kind,) = signature.args
        size = builder.extract_value(context.make_array(kind)(context, builder, arguments[0]).shape, 0)
        start = _pointer(context, builder, kind, arguments[0], _constant(0))
        lowest = ir.Constant(_VECTOR, [float("-inf")] * LANES)
        best = cgutils.alloca_once_value(builder, lowest)
        with cgutils.for_range_slice(builder, _constant(0), size, _constant(LANES), _I64) as (at, _):
            mask = _first_lanes(builder, builder.sub(size, at))
            x = _masked_load(builder, builder.gep(start, [at]), mask, lowest)
            now = builder.load(best)
            builder.store(builder.select(builder.fcmp_ordered(">", x, now), x, now), best)
        reduce = _declare(builder, f"llvm.vector.reduce.fmax.v{LANES}f32", _F32, [_VECTOR])
        return builder.call(reduce, [builder.load(best)])

    return types.float32(x), codegen


# -- one register tile ---------------------------------------------------------------------------


@_with_twin(_tile_twin)
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
            _pointer(context, builder, kinds[0], c, i, j),
            _pointer(context, builder, kinds[1], d, i, j),
            _pointer(context, builder, kinds[6], a, a_at),
            _pointer(context, builder, kinds[8], b, b_at),
        )
        lengths = (_row_length(context, builder, kinds[0], c), _row_length(context, builder, kinds[1], d))
        _call_once_built(builder, "abi_tile", [*pointers, *lengths, rows, cols, k, add], _tile_body)
        return context.get_dummy_value()

    return signature, codegen


def _tile_body(builder, c, d, a, b, c_row, d_row, rows, cols, k, add):
    """Emit the tile for each number of vectors that `cols` columns may need: an edge costs what is inside the matrix."""
    for vectors in range(1, ISA.tile_vectors + 1):
        above = builder.icmp_signed(">", cols, _constant(LANES * (vectors - 1)))
        below = builder.icmp_signed("<=", cols, _constant(LANES * vectors))
        with builder.if_then(builder.and_(above, below)):
            _tile_of(builder, vectors, c, d, a, b, c_row, d_row, rows, cols, k, add)


def _tile_of(builder, vectors, c, d, a, b, c_row, d_row, rows, cols, k, add):
    """Emit a tile that is `vectors` wide: sums in registers over k, then one visit to C."""
    sums = [[cgutils.alloca_once_value(builder, _ZERO) for _ in range(vectors)] for _ in range(ROWS)]
    for line in sums:
        for total in line:
            builder.store(_ZERO, total)
    fmuladd = _declare(builder, f"llvm.fmuladd.v{LANES}f32", _VECTOR, [_VECTOR] * 3)
    with cgutils.for_range(builder, k) as loop:
        a_now = _move(builder, a, builder.mul(loop.index, _constant(ROWS)))
        b_now = _move(builder, b, builder.mul(loop.index, _constant(COLUMNS)))
        right = [_load(builder, _move(builder, b_now, LANES * v)) for v in range(vectors)]
        for r in range(ROWS):
            left = _broadcast(builder, builder.load(_move(builder, a_now, r)), _VECTOR)
            for v in range(vectors):
                builder.store(builder.call(fmuladd, [left, right[v], builder.load(sums[r][v])]), sums[r][v])

    def write(load, store):
        for r in range(ROWS):
            with builder.if_then(builder.icmp_signed("<", _constant(r), rows)):
                to = _move(builder, c, builder.mul(c_row, _constant(r)))
                base = _move(builder, d, builder.mul(d_row, _constant(r)))
                with builder.if_else(add) as (then, otherwise):
                    with then:
                        for v in range(vectors):
                            total = builder.fadd(builder.load(sums[r][v]), load(v, _move(builder, base, LANES * v)))
                            store(v, total, _move(builder, to, LANES * v))
                    with otherwise:
                        for v in range(vectors):
                            store(v, builder.load(sums[r][v]), _move(builder, to, LANES * v))

    last = vectors - 1
    with builder.if_else(builder.icmp_signed("==", cols, _constant(LANES * vectors))) as (full, edge):
        with full:
            write(lambda v, at: _load(builder, at), lambda v, value, at: _store(builder, value, at))
        with edge:  # only the last vector is cut
            mask = _first_lanes(builder, builder.sub(cols, _constant(LANES * last)))
            write(
                lambda v, at: _masked_load(builder, at, mask) if v == last else _load(builder, at),
                lambda v, x, at: _masked_store(builder, x, at, mask) if v == last else _store(builder, x, at),
            )


# -- packing -------------------------------------------------------------------------------------


def _packer(name, body):
    """Return a Numba intrinsic that calls the LLVM function `name`, whose body is emitted by `body`."""

    def typed(typing, panel, at, width, x, i, j, count, k):
        def codegen(context, builder, signature, arguments):
            panel, at, width, x, i, j, count, k = arguments
            kinds = signature.args
            to = _pointer(context, builder, kinds[0], panel, at)
            source = _pointer(context, builder, kinds[3], x, i, j)
            row = _row_length(context, builder, kinds[3], x)
            _call_once_built(builder, name, [to, width, source, row, count, k], body)
            return context.get_dummy_value()

        return types.void(panel, types.intp, types.intp, x, *[types.intp] * 4), codegen

    return typed


def _pack_rows_body(builder, to, width, source, row, rows, k):
    """Emit pack_rows: LANES x LANES elements at a time, transposed in registers."""

    def block(p, group, load, steps):
        """Transpose the rows from `group` on at column p, and write `steps` (None: all) of the resulting vectors."""
        lines = []
        for r in range(LANES):
            index = builder.add(group, _constant(r))
            inside = builder.icmp_signed("<", index, rows)
            index = builder.select(inside, index, _constant(0))  # a row that exists; its values are then dropped
            line = load(builder.gep(source, [builder.add(builder.mul(index, row), p)]))
            lines.append(builder.select(inside, line, _ZERO))
        for s, line in enumerate(_transpose(builder, lines)):
            spot = builder.gep(to, [builder.add(builder.mul(builder.add(p, _constant(s)), width), group)])
            if steps is None:
                _store(builder, line, spot)
            else:
                with builder.if_then(builder.icmp_signed("<", _constant(s), steps)):
                    _store(builder, line, spot)

    # Columns outermost: a store past the end of one group is mended by the next group or the next column.
    whole = builder.sub(k, builder.srem(k, _constant(LANES)))
    with cgutils.for_range_slice(builder, _constant(0), whole, _constant(LANES), _I64) as (p, _):
        with cgutils.for_range_slice(builder, _constant(0), width, _constant(LANES), _I64) as (group, _):
            block(p, group, lambda address: _load(builder, address), None)
    left = builder.sub(k, whole)
    with builder.if_then(builder.icmp_signed(">", left, _constant(0))):
        mask = _first_lanes(builder, left)
        with cgutils.for_range_slice(builder, _constant(0), width, _constant(LANES), _I64) as (group, _):
            block(whole, group, lambda address: _masked_load(builder, address, mask), left)


def _pack_columns_body(builder, to, width, source, row, columns, k):
    """Emit pack_columns: rows are copied as they lie."""
    with cgutils.for_range(builder, k) as loop:
        line = builder.gep(source, [builder.mul(loop.index, row)])
        spot = builder.gep(to, [builder.mul(loop.index, width)])
        with cgutils.for_range_slice(builder, _constant(0), width, _constant(LANES), _I64) as (group, _):
            left = builder.sub(columns, group)
            with builder.if_else(builder.icmp_signed(">=", left, _constant(LANES))) as (whole, edge):
                with whole:
                    _store(builder, _load(builder, builder.gep(line, [group])), builder.gep(spot, [group]))
                with edge:
                    value = _masked_load(builder, builder.gep(line, [group]), _first_lanes(builder, left))
                    _store(builder, value, builder.gep(spot, [group]))


# panel[p, r] = x[i + r, j + p] for r < rows and p < k, zero for rows <= r < width; and panel[p, r] = x[i + p, j + r] for
# r < columns.  Both write whole vectors, up to LANES - 1 floats past the end of a panel: the caller leaves that much room and packs
# panels in ascending order.  pack_rows(panel, at, width, x, i, j, rows, k);  pack_columns(panel, at, width, x, i, j, columns, k)
pack_rows = _with_twin(_pack_rows_twin)(_packer("abi_pack_rows", _pack_rows_body))
pack_columns = _with_twin(_pack_columns_twin)(_packer("abi_pack_columns", _pack_columns_body))


def describe() -> dict[str, Any]:
    """Say which vectors and which tile the kernels use on this machine."""
    return {"simd": ISA.name, "lanes": LANES, "tile": f"{ROWS} x {COLUMNS}", "host": host_isa()}
