"""Functions of vectors that LLVM does not find by itself: e^x, the largest element, sums.

    exp        e^x in float32 as a polynomial that the loop vectoriser can widen (LLVM has no vector exp of its own)
    largest    the maximum of a vector
    total      its sum;  dot, dot3: of the products of two or three;  wide_total, sum_of_squares: in float64
    soften     e^(x - m) in place, with both sums: the inside of a softmax

Vectors are contiguous float32; sums take bfloat16 (as uint16) as well.
"""

import math

import llvmlite.ir as ir
import numpy as np
from numba import types
from numba.core import cgutils

from .halves import widen, widen_bf16_ref
from .simd import (
    F32,
    I16,
    I32,
    I64,
    LANES,
    VECTOR,
    ZERO,
    broadcast,
    constant,
    declare,
    each,
    element_type,
    first_lanes,
    load,
    masked_load,
    masked_store,
    of_shape,
    pointer,
    store,
    with_twin,
)

__all__ = [
    "bits_of",
    "dot",
    "dot3",
    "exp",
    "exp_of",
    "float_from_bits",
    "fma",
    "largest",
    "soften",
    "sum_of_squares",
    "total",
    "wide_total",
]

# -- plain-Python twins: what each operation means -----------------------------------------------


def _fma_twin(a, b, c):
    return np.float32(np.float64(a) * np.float64(b) + np.float64(c))


def _float_from_bits_twin(bits):
    return np.int32(bits).view(np.float32)


def _bits_of_twin(x):
    return np.float32(x).view(np.int32)


def _largest_twin(x):
    return np.fmax.reduce(x, initial=np.float32(-np.inf))


def _total_twin(*factors):
    product, *others = (widen_bf16_ref(x) for x in factors)
    for factor in others:
        product = product * factor
    return product.sum(dtype=np.float32)


def _sum_of_squares_twin(x):
    return np.square(x, dtype=np.float64).sum()


def _wide_total_twin(x):
    return x.sum(dtype=np.float64)


def _soften_twin(x, m):
    before = _total_twin(x)
    with np.errstate(invalid="ignore"):
        x[...] = [_exp_twin(number) for number in x - m]
    return before, _total_twin(x)


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


@with_twin(_bits_of_twin)
def bits_of(typing, x):
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


@np.errstate(over="ignore", invalid="ignore")  # NumPy's scalars warn of overflows that are meant
def _exp_twin(x):
    shifted = _fma_twin(x, _LOG2_E, _TO_INTEGER)
    n = shifted - _TO_INTEGER
    r = _fma_twin(n, -_LN2_HIGH, x)
    r = _fma_twin(n, -_LN2_LOW, r)
    r2 = r * r
    p = _fma_twin(_fma_twin(_EXP_7, r, _EXP_6), r2, _fma_twin(_EXP_5, r, _EXP_4))
    p = _fma_twin(_fma_twin(p, r2, _fma_twin(_EXP_3, r, _HALF)), r2, r) + _ONE
    y = _float_from_bits_twin(p.view(np.int32) + (shifted.view(np.int32) << _SHIFT))
    y = _ZERO_F if x < _EXP_LOW else y
    return y if x <= _EXP_HIGH else x * _INFINITY


def exp_of(builder, x):
    """Emit e^x of a float32 or of a vector of them: `exp`."""

    def every(value):
        return each(float(value), x.type)

    def fma(a, b, c):
        a, b, c = (v if isinstance(v, ir.Value) else every(v) for v in (a, b, c))
        suffix = f"v{x.type.count}f32" if isinstance(x.type, ir.VectorType) else "f32"
        return builder.call(declare(builder, f"llvm.fmuladd.{suffix}", x.type, [x.type] * 3), [a, b, c])

    integers = of_shape(x.type, I32)
    shifted = fma(x, _LOG2_E, _TO_INTEGER)
    n = builder.fsub(shifted, every(_TO_INTEGER))
    r = fma(n, -_LN2_HIGH, x)
    r = fma(n, -_LN2_LOW, r)
    r2 = builder.fmul(r, r)
    p = fma(fma(_EXP_7, r, _EXP_6), r2, fma(_EXP_5, r, _EXP_4))
    p = builder.fadd(fma(fma(p, r2, fma(_EXP_3, r, _HALF)), r2, r), every(_ONE))
    # p's exponent field is raised by n as an integer: 2^n as a factor would overflow at n = 128, where e^x does not.
    # The last bits of `shifted` are n.
    raised = builder.shl(builder.bitcast(shifted, integers), each(int(_SHIFT), integers))
    y = builder.bitcast(builder.add(builder.bitcast(p, integers), raised), x.type)
    y = builder.select(builder.fcmp_ordered("<", x, every(_EXP_LOW)), every(0), y)
    return builder.select(builder.fcmp_ordered("<=", x, every(_EXP_HIGH)), y, builder.fmul(x, every(_INFINITY)))


@with_twin(_exp_twin)
def exp(typing, x):
    """Return e^x for a float32 x; relative error below 2e-7, 0 below -87.3, inf above 88.7, NaN for NaN.

    x = n ln 2 + r with |r| <= ln(2)/2; e^x = 2^n e^r.  e^r is summed in pairs (after Estrin 1960): five operations that
    wait for each other, where Horner's scheme has seven.  Branch-free, so that a loop over it becomes vector code.  NaN
    fails both comparisons and leaves as x times infinity.
    """

    def codegen(context, builder, signature, arguments):
        return exp_of(builder, arguments[0])

    return types.float32(types.float32), codegen


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


def _added_up(builder, sums):
    """Add partial sums, from the first to the last."""
    add_up = declare(builder, f"llvm.vector.reduce.fadd.v{LANES}f32", F32, [F32, VECTOR])
    return builder.call(add_up, [ir.Constant(F32, -0.0), sums])


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
        return _added_up(builder, builder.load(sums))

    def total(typing, x):
        return types.float32(x), codegen

    def dot(typing, x, y):
        return types.float32(x, y), codegen

    def dot3(typing, x, y, z):
        return types.float32(x, y, z), codegen

    return with_twin(_total_twin)((total, dot, dot3)[count - 1])


# Of contiguous vectors of one length, float32 or bfloat16 (as uint16): sum x_i, sum x_i y_i, sum x_i y_i z_i.
total, dot, dot3 = (_sum_of_products(count) for count in (1, 2, 3))


def _wide_sum(term):
    """Return the code of a sum in float64 over a contiguous float32 vector: of term(builder, x_i)."""

    def codegen(context, builder, signature, arguments):
        wide = ir.VectorType(ir.DoubleType(), LANES)
        sums = cgutils.alloca_once_value(builder, ir.Constant(wide, [0.0] * LANES))

        def visit(vectors):
            value = term(builder, builder.fpext(vectors[0], wide))
            builder.store(builder.fadd(builder.load(sums), value), sums)

        _each_vector(context, builder, signature.args, arguments, visit)
        add_up = declare(builder, f"llvm.vector.reduce.fadd.v{LANES}f64", ir.DoubleType(), [ir.DoubleType(), wide])
        return builder.call(add_up, [ir.Constant(ir.DoubleType(), -0.0), builder.load(sums)])

    return codegen


@with_twin(_sum_of_squares_twin)
def sum_of_squares(typing, x):
    """Return the sum of x_i^2 of a contiguous float32 vector, squared and summed in float64."""
    return types.float64(x), _wide_sum(lambda builder, x: builder.fmul(x, x))


@with_twin(_wide_total_twin)
def wide_total(typing, x):
    """Return the sum of a contiguous float32 vector in float64."""
    return types.float64(x), _wide_sum(lambda builder, x: x)


@with_twin(_soften_twin)
def soften(typing, x, m):
    """Turn a contiguous float32 vector x into e^(x - m) in place; return `total` of x before, and after.

    One pass, whose exponentials hide the waiting of both sums, and in whole vectors: left to LLVM, a loop over `exp`
    has half of one where it prefers vectors of 256 bits.
    """

    def codegen(context, builder, signature, arguments):
        x, m = arguments
        start = pointer(context, builder, signature.args[0], x, constant(0))
        size = builder.extract_value(context.make_array(signature.args[0])(context, builder, x).shape, 0)
        away = broadcast(builder, m, VECTOR)
        before, after = (cgutils.alloca_once_value(builder, ZERO) for _ in range(2))

        def visit(value, mask=None):
            y = exp_of(builder, builder.fsub(value, away))
            y = y if mask is None else builder.select(mask, y, ZERO)
            for sums, addend in ((before, value), (after, y)):
                builder.store(builder.fadd(builder.load(sums), addend), sums)
            return y

        left = builder.srem(size, constant(LANES))
        whole = builder.sub(size, left)
        with cgutils.for_range_slice(builder, constant(0), whole, constant(LANES), I64) as (first, _):
            at = builder.gep(start, [first])
            store(builder, visit(load(builder, at)), at)
        with builder.if_then(builder.icmp_signed(">", left, constant(0))):
            mask, at = first_lanes(builder, left), builder.gep(start, [whole])
            masked_store(builder, visit(masked_load(builder, at, mask), mask), at, mask)
        totals = [_added_up(builder, builder.load(sums)) for sums in (before, after)]
        return context.make_tuple(builder, signature.return_type, totals)

    return types.UniTuple(types.float32, 2)(x, types.float32), codegen
