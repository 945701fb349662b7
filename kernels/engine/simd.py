"""Vectors by hand: what LLVM does not find by itself, emitted as LLVM IR from Python.

    exp        e^x in float32 as a polynomial that the loop vectoriser can widen (LLVM has no vector exp of its own)
    largest    the maximum of a vector
    total      its sum;  dot, dot3: of the products of two or three;  sum_of_squares: in float64

and the building blocks from which `tiles.py` makes the register tile.

The vector width follows from the host's features, and so does the tile; `ABI_SIMD=avx512|avx2|neon|generic` overrides
them, so that every path can be tested on any machine (LLVM splits vectors that the host does not have).  Under
NUMBA_DISABLE_JIT=1 the plain-Python twin of each operation runs instead; the twins are also its definition.
"""

import functools
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

from .jit import JIT, helper


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


# tile_rows * tile_vectors sums, tile_vectors of B and one of A must fit the vector registers: 32, 16, 32, 16 or more.
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

F32 = ir.FloatType()
I1 = ir.IntType(1)
I16 = ir.IntType(16)
I32 = ir.IntType(32)
I64 = ir.IntType(64)
VECTOR = ir.VectorType(F32, LANES)
ZERO = ir.Constant(VECTOR, [0.0] * LANES)


# -- plain-Python twins: what each operation means -----------------------------------------------


def _fma_twin(a, b, c):
    return np.float32(np.float64(a) * np.float64(b) + np.float64(c))


def _float_from_bits_twin(bits):
    return np.int32(bits).view(np.float32)


def _bits_from_float_twin(value):
    return np.float32(value).view(np.int32)


def _largest_twin(x):
    return np.fmax.reduce(x, initial=np.float32(-np.inf))


def round_to_bf16_ref(x):
    """Return float32 x rounded to bfloat16 (8 bits of significand), to nearest even, still float32; NaN stays NaN."""
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
    rounded = bits + np.uint32(0x7FFF) + (bits >> np.uint32(16) & np.uint32(1))
    kept = np.where(np.isnan(x), bits | np.uint32(0x400000), rounded)
    return (kept & np.uint32(0xFFFF0000)).view(np.float32)


def widen_bf16_ref(x):
    """Return the float32 numbers of x, if it is stored as bfloat16 (uint16), else x itself."""
    return (x.astype(np.uint32) << np.uint32(16)).view(np.float32) if x.dtype == np.uint16 else x


def _as_element_twin(array, x):
    if array.dtype != np.uint16:
        return np.float32(x)
    return np.uint16(round_to_bf16_ref(x).view(np.uint32)[0] >> np.uint32(16))


def _total_twin(*factors):
    product, *others = (widen_bf16_ref(x) for x in factors)
    for factor in others:
        product = product * factor
    return product.sum(dtype=np.float32)


def _sum_of_squares_twin(x):
    return np.square(x, dtype=np.float64).sum()


def with_twin(twin):
    """Use the LLVM version of an operation, or its twin where nothing is compiled.

    Its arrays are float32 or uint16 (bfloat16); int64 is the table of routines.  Another type would be read as if it
    were one of these, so it is refused while Numba compiles, which costs no call anything.
    """
    return (lambda typed: intrinsic(_of_known_elements(typed))) if JIT else (lambda typed: twin)


def _of_known_elements(typed):
    @functools.wraps(typed)
    def check(typing, *arguments):
        for kind in arguments:
            if isinstance(kind, types.Array) and kind.dtype not in (types.float32, types.uint16, types.int64):
                raise TypeError(
                    f"{typed.__name__.lstrip('_')} is given an array of {kind.dtype}; kernels compute in float32; "
                    "use .astype(np.float32)"
                )
        return typed(typing, *arguments)

    return check


# -- LLVM building blocks ------------------------------------------------------------------------


def constant(value: int) -> ir.Constant:
    """An i64 constant: all offsets and counts are i64."""
    return ir.Constant(I64, value)


def element_type(array_type):
    """LLVM type of the elements of a float32 or uint16 array, and their bytes."""
    return (I16, 2) if array_type.dtype == types.uint16 else (F32, 4)


def pointer(context, builder, array_type, array, *indices):
    """Address of array[indices]; the last axis has unit stride (checked where Python meets the kernels)."""
    struct = context.make_array(array_type)(context, builder, array)
    element, size = element_type(array_type)
    offset = builder.mul(indices[-1], constant(size))
    if len(indices) == 2:
        row_bytes = builder.extract_value(struct.strides, 0)
        offset = builder.add(offset, builder.mul(indices[0], row_bytes))
    base = builder.bitcast(struct.data, ir.IntType(8).as_pointer())
    return builder.bitcast(builder.gep(base, [offset]), element.as_pointer())


def row_length(context, builder, array_type, array):
    """Elements from one row of a matrix to the next."""
    strides = context.make_array(array_type)(context, builder, array).strides
    return builder.sdiv(builder.extract_value(strides, 0), constant(element_type(array_type)[1]))


def move(builder, pointer, elements):
    """The address `elements` elements (int or i64 value) further."""
    step = elements if isinstance(elements, ir.Value) else constant(elements)
    return builder.gep(pointer, [step])


def load(builder, pointer, vector=VECTOR):
    """Read a vector from any address."""
    value = builder.load(builder.bitcast(pointer, vector.as_pointer()))
    value.align = _bytes(vector)
    return value


def of_shape(kind, element):
    """The type of one `element`, or of a vector of as many as the type `kind` has."""
    return ir.VectorType(element, kind.count) if isinstance(kind, ir.VectorType) else element


def each(value, kind):
    """The constant of a type, with equal elements if it is a vector."""
    return ir.Constant(kind, [value] * kind.count if isinstance(kind, ir.VectorType) else value)


def widen(builder, x):
    """Turn bfloat16, one or a vector, stored as 16-bit integers, into float32."""
    wide = of_shape(x.type, I32)
    return builder.bitcast(builder.shl(builder.zext(x, wide), each(16, wide)), of_shape(x.type, F32))


def bf16_bits(builder, x):
    """Round float32, one or a vector, to bfloat16 (nearest even), into the lower half of each int32; NaN stays NaN."""
    kind = of_shape(x.type, I32)
    bits = builder.bitcast(x, kind)
    upper = builder.lshr(bits, each(16, kind))
    up = builder.add(builder.and_(upper, each(1, kind)), each(0x7FFF, kind))
    rounded = builder.lshr(builder.add(bits, up), each(16, kind))
    return builder.select(builder.fcmp_unordered("uno", x, x), builder.or_(upper, each(0x40, kind)), rounded)


def sum_of_lanes(builder, vector):
    """Add up a vector: the upper half to the lower, until one element is left."""
    lanes = vector.type.count
    while lanes > 1:
        lanes //= 2
        lower, upper = (ir.Constant(ir.VectorType(I32, lanes), [at + i for i in range(lanes)]) for at in (0, lanes))
        halves = builder.shuffle_vector(vector, vector, lower), builder.shuffle_vector(vector, vector, upper)
        vector = builder.fadd(*halves)
    return builder.extract_element(vector, ir.Constant(I32, 0))


def _bytes(vector):
    return 2 if vector.element == I16 else 4


def store(builder, value, pointer):
    """Write a vector of floats to any address."""
    builder.store(value, builder.bitcast(pointer, value.type.as_pointer())).align = 4


def declare(builder, name, result, arguments):
    """The LLVM function `name`, declared in this module at its first use."""
    return cgutils.get_or_insert_function(builder.module, ir.FunctionType(result, arguments), name)


def masked_load(builder, pointer, mask, otherwise=None, vector=VECTOR):
    """The lanes of `mask` from memory, the others from `otherwise` (zero if not given)."""
    address = builder.bitcast(pointer, vector.as_pointer())
    name = f"llvm.masked.load.v{vector.count}{vector.element.intrinsic_name}.p0"
    function = declare(builder, name, vector, [address.type, I32, mask.type, vector])
    if otherwise is None:
        otherwise = ir.Constant(vector, None)
    return builder.call(function, [address, ir.Constant(I32, _bytes(vector)), mask, otherwise])


def masked_store(builder, value, pointer, mask):
    """Write the lanes of `mask`; memory of the others is not touched."""
    address = builder.bitcast(pointer, value.type.as_pointer())
    name = f"llvm.masked.store.v{value.type.count}f32.p0"
    function = declare(builder, name, ir.VoidType(), [value.type, address.type, I32, mask.type])
    builder.call(function, [value, address, ir.Constant(I32, 4), mask])


def broadcast(builder, value, vector):
    """A vector with `value` in every lane."""
    single = builder.insert_element(ir.Constant(vector, ir.Undefined), value, ir.Constant(I32, 0))
    zeros = ir.Constant(ir.VectorType(I32, vector.count), [0] * vector.count)
    return builder.shuffle_vector(single, ir.Constant(vector, ir.Undefined), zeros)


def first_lanes(builder, count, lanes=LANES):
    """Mask of the lanes below `count`, which may be negative or larger than the vector."""
    wide = ir.VectorType(I64, lanes)
    return builder.icmp_signed("<", ir.Constant(wide, list(range(lanes))), broadcast(builder, count, wide))


# -- scalars: bfloat16 ---------------------------------------------------------------------------


@with_twin(widen_bf16_ref)
def as_float(typing, x):
    """Return an element of a float32 array, or of a uint16 array that holds bfloat16, as float32."""

    def codegen(context, builder, signature, arguments):
        (x,) = arguments
        if signature.args[0] != types.uint16:
            return x
        return widen(builder, x)

    return types.float32(x if x == types.uint16 else types.float32), codegen


@with_twin(_as_element_twin)
def as_element(typing, array, x):
    """Return a float32 as an element of `array`: as it is, or rounded to bfloat16 (nearest even) if that is uint16."""
    narrow = array.dtype == types.uint16

    def codegen(context, builder, signature, arguments):
        _, x = arguments
        if not narrow:
            return x
        return builder.trunc(bf16_bits(builder, x), I16)

    return (types.uint16 if narrow else types.float32)(array, types.float32), codegen


# -- scalars: e^x --------------------------------------------------------------------------------


@with_twin(_fma_twin)
def fma(typing, a, b, c):
    """Return a * b + c in float32, rounded once where the machine can."""

    def codegen(context, builder, signature, arguments):
        return builder.call(declare(builder, "llvm.fmuladd.f32", F32, [F32] * 3), arguments)

    return types.float32(types.float32, types.float32, types.float32), codegen


@with_twin(_float_from_bits_twin)
def float_from_bits(typing, bits):
    """Return the float32 whose IEEE 754 representation is the int32 `bits`."""

    def codegen(context, builder, signature, arguments):
        return builder.bitcast(arguments[0], F32)

    return types.float32(types.int32), codegen


@with_twin(_bits_from_float_twin)
def bits_from_float(typing, value):
    """Return the IEEE 754 representation of a float32 as an int32."""

    def codegen(context, builder, signature, arguments):
        return builder.bitcast(arguments[0], I32)

    return types.int32(types.float32), codegen


_EXP_LOW, _EXP_HIGH = np.float32(-87.33654), np.float32(88.72283)  # ln of the smallest normal and largest float32
_LOG2_E = np.float32(1 / math.log(2))
_LN2_HIGH = np.float32(0.693359375)  # 355 / 512: n * _LN2_HIGH is exact for |n| < 2^15 (Cody and Waite 1980)
_LN2_LOW = np.float32(math.log(2) - 0.693359375)
_TO_INTEGER = np.float32(1.5 * 2**23)  # floats of this size are whole numbers, so adding it rounds to the nearest
# e^r on |r| <= ln(2) / 2 by its Taylor series; the first term left out is r^8 / 8!, below 6e-9
_EXP_3, _EXP_4, _EXP_5, _EXP_6, _EXP_7 = (np.float32(1 / math.factorial(n)) for n in range(3, 8))
_ONE, _HALF, _ZERO_F, _INFINITY = np.float32(1), np.float32(0.5), np.float32(0), np.float32(np.inf)
_SHIFT = np.int32(23)


@helper
def exp(x):
    """Return e^x for a float32 x; relative error below 2e-7, 0 below -87.3, inf above 88.7, NaN for NaN.

    x = n ln 2 + r with |r| <= ln(2)/2; e^x = 2^n e^r.  e^r is summed in pairs (after Estrin 1960): five operations that
    wait for each other, where Horner's scheme has seven.  Branch-free, so that a loop over it becomes vector code.  NaN
    fails both comparisons and leaves as x times infinity.
    """
    shifted = fma(x, _LOG2_E, _TO_INTEGER)
    n = shifted - _TO_INTEGER
    r = fma(n, -_LN2_HIGH, x)
    r = fma(n, -_LN2_LOW, r)
    r2 = r * r
    p = fma(fma(_EXP_7, r, _EXP_6), r2, fma(_EXP_5, r, _EXP_4))
    p = fma(fma(p, r2, fma(_EXP_3, r, _HALF)), r2, r) + _ONE
    # p's exponent field is raised by n as an integer: 2^n as a factor would overflow at n = 128, where e^x does not.
    # The last bits of `shifted` are n.
    y = float_from_bits(bits_from_float(p) + (bits_from_float(shifted) << _SHIFT))
    y = _ZERO_F if x < _EXP_LOW else y
    return y if x <= _EXP_HIGH else x * _INFINITY


if not JIT:
    exp = np.errstate(over="ignore", invalid="ignore")(exp)  # NumPy's scalars warn of overflows that are meant


@with_twin(_largest_twin)
def largest(typing, x):
    """Return the largest element of a contiguous float32 vector, ignoring NaN; -inf if there is none.

    LLVM does not vectorise a maximum unless NaN is declared impossible, which it is not here.
    """

    def codegen(context, builder, signature, arguments):
        lowest = ir.Constant(VECTOR, [float("-inf")] * LANES)
        best = cgutils.alloca_once_value(builder, lowest)

        def visit(vectors):
            now = builder.load(best)
            builder.store(builder.select(builder.fcmp_ordered(">", vectors[0], now), vectors[0], now), best)

        _each_vector(context, builder, signature.args, arguments, visit, lowest)
        reduce = declare(builder, f"llvm.vector.reduce.fmax.v{LANES}f32", F32, [VECTOR])
        return builder.call(reduce, [builder.load(best)])

    return types.float32(x), codegen


# -- sums ----------------------------------------------------------------------------------------
# The compiler may not reorder additions (see `jit.py`), so sums that are to be vectors say so: LANES partial sums,
# which are then added up from the first to the last.


def _each_vector(context, builder, kinds, arrays, visit, filling=None):
    """Call `visit(vectors)` in a loop over equally long contiguous arrays; lanes past the end are `filling`, or zero.

    Arrays of uint16 hold bfloat16; the vectors are float32 in any case.
    """

    def read(kind, at, mask=None):
        vector = ir.VectorType(element_type(kind)[0], LANES)
        value = load(builder, at, vector) if mask is None else masked_load(builder, at, mask, filling, vector)
        return widen(builder, value) if vector.element == I16 else value

    size = builder.extract_value(context.make_array(kinds[0])(context, builder, arrays[0]).shape, 0)
    starts = [pointer(context, builder, kind, array, constant(0)) for kind, array in zip(kinds, arrays, strict=True)]
    left = builder.srem(size, constant(LANES))
    whole = builder.sub(size, left)
    with cgutils.for_range_slice(builder, constant(0), whole, constant(LANES), I64) as (at, _):
        visit([read(kind, builder.gep(start, [at])) for kind, start in zip(kinds, starts, strict=True)])
    with builder.if_then(builder.icmp_signed(">", left, constant(0))):
        mask = first_lanes(builder, left)
        visit([read(kind, builder.gep(start, [whole]), mask) for kind, start in zip(kinds, starts, strict=True)])


def _sum_of_products(count):
    """Return an intrinsic that sums the products of `count` vectors in float32."""

    def codegen(context, builder, signature, arguments):
        sums = cgutils.alloca_once_value(builder, ZERO)

        def visit(factors):
            product = factors[0]
            for factor in factors[1:]:
                product = builder.fmul(product, factor)
            builder.store(builder.fadd(builder.load(sums), product), sums)

        _each_vector(context, builder, signature.args, arguments, visit)
        add_up = declare(builder, f"llvm.vector.reduce.fadd.v{LANES}f32", F32, [F32, VECTOR])
        return builder.call(add_up, [ir.Constant(F32, -0.0), builder.load(sums)])

    def total(typing, x):
        return types.float32(x), codegen

    def dot(typing, x, y):
        return types.float32(x, y), codegen

    def dot3(typing, x, y, z):
        return types.float32(x, y, z), codegen

    return with_twin(_total_twin)((total, dot, dot3)[count - 1])


# Of contiguous vectors of one length, float32 or bfloat16 (as uint16): sum x_i, sum x_i y_i, sum x_i y_i z_i.
total, dot, dot3 = (_sum_of_products(count) for count in (1, 2, 3))


@with_twin(_sum_of_squares_twin)
def sum_of_squares(typing, x):
    """Return the sum of x_i^2 of a contiguous float32 vector, squared and summed in float64."""

    def codegen(context, builder, signature, arguments):
        wide = ir.VectorType(ir.DoubleType(), LANES)
        sums = cgutils.alloca_once_value(builder, ir.Constant(wide, [0.0] * LANES))

        def visit(vectors):
            value = builder.fpext(vectors[0], wide)
            builder.store(builder.fadd(builder.load(sums), builder.fmul(value, value)), sums)

        _each_vector(context, builder, signature.args, arguments, visit)
        add_up = declare(builder, f"llvm.vector.reduce.fadd.v{LANES}f64", ir.DoubleType(), [ir.DoubleType(), wide])
        return builder.call(add_up, [ir.Constant(ir.DoubleType(), -0.0), builder.load(sums)])

    return types.float64(x), codegen


def describe() -> dict[str, Any]:
    """Say which vectors and which tile the kernels use on this machine."""
    return {"simd": ISA.name, "lanes": LANES, "tile": f"{ISA.tile_rows} x {ISA.tile_columns}", "host": host_isa()}
