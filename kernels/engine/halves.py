"""bfloat16 and half precision: rounding to them and widening from them, in NumPy and in LLVM.

    bfloat16 is the upper half of a float32, 8 bits of significand, and kept as uint16.  Half precision (IEEE 754
    float16) has 11 bits and ends at 65504; here it is only rounded to, and kept as float32.

Rounding is to nearest even.  Kernels read and write elements that may be float32 or bfloat16 by `as_float` and
`as_element`.
"""

import llvmlite.binding as llvm
import numpy as np
from numba import types

from .simd import F32, FP16, I16, I32, each, of_shape, with_twin

__all__ = [
    "as_element",
    "as_float",
    "bf16_bits",
    "fp16_rounded",
    "round_to_bf16_ref",
    "round_to_fp16_ref",
    "widen",
    "widen_bf16_ref",
    "widened_half",
]

# -- reference -----------------------------------------------------------------------------------


def round_to_bf16_ref(x):
    """Return float32 x rounded to bfloat16 (8 bits of significand), to nearest even, still float32; NaN stays NaN."""
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
    rounded = bits + np.uint32(0x7FFF) + (bits >> np.uint32(16) & np.uint32(1))
    kept = np.where(np.isnan(x), bits | np.uint32(0x400000), rounded)
    return (kept & np.uint32(0xFFFF0000)).view(np.float32)


def widen_bf16_ref(x):
    """Return the float32 numbers of x, if it is stored as bfloat16 (uint16), else x itself."""
    return (x.astype(np.uint32) << np.uint32(16)).view(np.float32) if x.dtype == np.uint16 else x


def round_to_fp16_ref(x):
    """Return float32 x rounded to IEEE half precision, to nearest even, still float32."""
    with np.errstate(over="ignore"):
        return np.asarray(x, np.float32).astype(np.float16).astype(np.float32)


def _as_element_twin(array, x):
    if array.dtype != np.uint16:
        return np.float32(x)
    return np.uint16(round_to_bf16_ref(x).view(np.uint32)[0] >> np.uint32(16))


# -- LLVM: one number or a vector of them --------------------------------------------------------


def widen(builder, x):
    """Turn bfloat16, one or a vector, stored as 16-bit integers, into float32."""
    wide = of_shape(x.type, I32)
    return builder.bitcast(builder.shl(builder.zext(x, wide), each(16, wide)), of_shape(x.type, F32))


def widened_half(builder, bits):
    """Return half precision's bits, one or a vector, as float32: by the processor, or as storage/float16.py says it."""
    features, wide, number = llvm.get_host_cpu_features(), of_shape(bits.type, I32), of_shape(bits.type, F32)
    if features.get("f16c") or features.get("neon"):
        return builder.fpext(builder.bitcast(bits, of_shape(bits.type, FP16)), number)
    moved = builder.and_(builder.shl(builder.sext(bits, wide), each(13, wide)), each(0x8FFFE000, wide))
    scaled = builder.fmul(builder.bitcast(moved, number), each(2.0**112, number))
    special = builder.bitcast(builder.or_(moved, each(0x7F800000, wide)), number)
    exponent = builder.and_(bits, each(0x7C00, bits.type))
    return builder.select(builder.icmp_unsigned("==", exponent, each(0x7C00, bits.type)), special, scaled)


def bf16_bits(builder, x):
    """Round float32, one or a vector, to bfloat16 (nearest even), into the lower half of each int32; NaN stays NaN."""
    kind = of_shape(x.type, I32)
    bits = builder.bitcast(x, kind)
    upper = builder.lshr(bits, each(16, kind))
    up = builder.add(builder.and_(upper, each(1, kind)), each(0x7FFF, kind))
    rounded = builder.lshr(builder.add(bits, up), each(16, kind))
    return builder.select(builder.fcmp_unordered("uno", x, x), builder.or_(upper, each(0x40, kind)), rounded)


def fp16_rounded(builder, x):
    """Round float32, one or a vector, to half precision (nearest even), still float32; NaN stays NaN.

    In float32 and integer arithmetic, which every machine has.
    """
    integers = of_shape(x.type, I32)
    bits = builder.bitcast(x, integers)
    sign = builder.and_(bits, each(0x80000000, integers))
    size = builder.xor(bits, sign)
    odd = builder.and_(builder.lshr(size, each(13, integers)), each(1, integers))
    normal = builder.add(size, builder.add(odd, each(0xFFF, integers)))  # 13 of 23 bits go
    normal = builder.and_(normal, each(0xFFFFE000, integers))
    too_large = builder.icmp_unsigned(">", normal, each(0x477FE000, integers))  # 65504
    normal = builder.select(too_large, each(0x7F800000, integers), normal)
    # Below 2^-14 halves are multiples of 2^-24, and so are all float32 between 1/2 and 1.
    half = each(0.5, x.type)
    tiny = builder.fsub(builder.fadd(builder.bitcast(size, x.type), half), half)
    small = builder.icmp_unsigned("<", size, each(0x38800000, integers))
    rounded = builder.select(small, builder.bitcast(tiny, integers), normal)
    rounded = builder.bitcast(builder.or_(rounded, sign), x.type)
    return builder.select(builder.fcmp_unordered("uno", x, x), x, rounded)


# -- elements of arrays --------------------------------------------------------------------------


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
