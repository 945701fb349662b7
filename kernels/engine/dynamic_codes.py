"""Dynamic codes: numbers from -1 to 1, or from 0 to 1, as the bytes that mean them in the dynamic map, and back.

    decode_... encode_... blocks of numbers, in whole vectors, multiplied by a factor on the way

The map (`dynamic_map.py`) has, between 10^(i-7) and 10^(i-6), decade i = 0 ... 6, the middles of n_i equal parts of
that range: n_i = 2^i, and the same below zero, if `signed`, else 2^(i+1).  Besides there are 0 and 1.

Let k be the place of a code: signed, how far it is from zero's; unsigned, one more than it is.  Decade i begins at
k = n_i for both and ends where the next one begins, so the exponent of k as a float32 says which it is, and there

    number(k) = 10^(i-6) (0.9 (k + 1/2) / n_i - 0.8)                 k(x) = floor((10^(6-i) x + 0.8) n_i / 0.9)

The decade of x follows from its own exponent and one comparison: between two powers of two there is at most one
beginning of a decade.  The nearest code is asked for, so that is the middle between the last number of a decade and the
first one of the next, 10^(i-6) (0.1 + 0.18 / n_i), and k(x) is held below the beginning of the next decade.  Zero and 1
are decades with one number.  Slopes and heights of these lines are looked up, in registers: tables of 16 and 32.

Decoded numbers are those of the map up to 1e-6 of themselves.  x in the very middle of two numbers gets the larger
code; within 1e-4 of their distance from it, it may get either.

Two rules go beyond the nearest.  Signed: x < 0 is not coded as 0 but as the largest number below it, as bitsandbytes'
kernel does it.  Unsigned: x > 0 is not coded as 0 but as the smallest number: a mean of squares is what Adam divides
by, and there zero is no small error.

Source: Dettmers et al. 2022, "8-bit Optimizers via Block-wise Quantization", section 2; for the first rule the kernel
`kOptimizerStatic8bit2StateBlockwise` of bitsandbytes.
"""

from collections.abc import Callable
from typing import Any

import llvmlite.ir as ir
import numpy as np
from numba import types
from numba.core import cgutils

from .checks import Array
from .dynamic_map import dynamic_map
from .simd import (
    F32,
    I8,
    I32,
    I64,
    LANES,
    VECTOR,
    broadcast,
    constant,
    declare,
    each,
    host_isa,
    load,
    of_shape,
    pointer,
    store,
    with_twin,
)

__all__ = [
    "ZERO_CODE",
    "decode_ref",
    "decode_signed",
    "decode_unsigned",
    "encode_ref",
    "encode_signed",
    "encode_unsigned",
]

DECADES = range(7)
ZERO_CODE = 127  # of the signed map; of the other it is 0


def _parts(signed: bool) -> list[int]:
    """Return n_i, in how many parts each decade is cut."""
    return [2 ** (i if signed else i + 1) for i in DECADES]


# -- reference: plain NumPy, any float dtype ---------------------------------------------------


def decode_ref(codes: Array, signed: bool) -> Array:
    """Return the numbers of uint8 codes, float32, in their shape."""
    return dynamic_map(signed)[codes]


def encode_ref(x: Array, signed: bool) -> Array:
    """Return the codes of numbers in -1 ... 1, or 0 ... 1: uint8 in their shape."""
    numbers = dynamic_map(signed).astype(np.float64)
    codes = np.searchsorted((numbers[1:] + numbers[:-1]) / 2, x, side="right")
    if signed:
        codes = np.where((x < 0) & (codes == ZERO_CODE), ZERO_CODE - 1, codes)
    else:
        codes = np.where((x > 0) & (codes == 0), 1, codes)
    return codes.astype(np.uint8)


# -- tables: by decade, from that of zero (0) to that of one (8), and by exponent ----------------

LEAST_EXPONENT = -23  # exponent of the smallest x whose own one is asked for
BELOW = 0.01  # how far k(x) is held below the beginning of the next decade


def _decoding(signed: bool) -> tuple[list[float], list[float]]:
    """Return slope and height of number(k), by the lower four bits of the exponent of k."""
    slopes, heights = [0.0] * 16, [0.0] * 16
    for i, n in enumerate(_parts(signed)):
        at = (126 + n.bit_length()) % 16
        slopes[at], heights[at] = 10.0 ** (i - 6) * 0.9 / n, 10.0 ** (i - 6) * (0.45 / n - 0.8)
    heights[(at + 1) % 16] = 1.0
    return slopes, heights


def _encoding(signed: bool) -> tuple[list[float], list[float], list[float]]:
    """Return slope, height and upper limit of k(x) by decade."""
    parts = _parts(signed)
    first, end = parts[0], 2 * parts[-1]
    slopes = [0.0, *(10.0 ** (6 - i) * n / 0.9 for i, n in enumerate(parts)), 0.0]
    heights = [first - 0.5, *(n * 0.8 / 0.9 for n in parts), end + 0.5]
    # What is rounded up to the smallest number lies below its decade: a line that begins above n_0, and of two numbers
    # (unsigned) has their middle, 0.55, where k = 3.
    heights[1] = first + 0.25
    slopes[1] = 0.0 if signed else 1e6 * (1 - 0.25) / 0.55
    limits = [float(first), *(2 * n - BELOW for n in parts), end + 1.0]
    return _filled(slopes), _filled(heights), _filled(limits)


def _filled(table: list[float]) -> list[float]:
    return table + [0.0] * (16 - len(table))


def _beginnings(signed: bool) -> list[float]:
    """Return where decades 1 ... 8 begin; of the unsigned map, the first with any number above zero."""
    parts, numbers = _parts(signed), dynamic_map(signed).astype(np.float64)
    smallest = float(numbers[ZERO_CODE + 1] / 2) if signed else float(np.finfo(np.float32).smallest_subnormal)
    return [smallest, *(10.0 ** (i - 6) * (0.1 + 0.18 / parts[i]) for i in DECADES[1:]), float(numbers[-2:].mean())]


def _binades(signed: bool) -> tuple[list[float], list[int]]:
    """Return, by the lower five bits of the exponent of x, where the next decade begins and the decade before that."""
    beginnings, infinity = _beginnings(signed), float("inf")
    limits, decades = [infinity] * 32, [0] * 32
    for exponent in range(LEAST_EXPONENT, 1):
        low, high = 2.0**exponent if exponent > LEAST_EXPONENT else 0.0, 2.0 ** (exponent + 1)
        inside = [each for each in beginnings if low < each < high]
        limits[(127 + exponent) % 32] = inside[0] if inside else infinity
        decades[(127 + exponent) % 32] = sum(each <= low for each in beginnings)
    return limits, decades


# -- LLVM: a vector of numbers or codes ----------------------------------------------------------

INTEGERS, CODES = of_shape(VECTOR, I32), of_shape(VECTOR, I8)
WITHOUT_SIGN, SIGN_BIT, EXPONENT_BIT = (1 << 31) - 1, 31, 23  # of a float32: all but the sign


def _looked_up(builder: Any, table: list[Any], index: Any, kind: Any = F32) -> Any:
    """Return the entries of a table, of 16 or 32, at the lower bits of each index, a vector."""
    size, vector = len(table), ir.VectorType(kind, LANES)
    widths = {"avx512": (16, 8), "avx2": (8,)}.get(host_isa(), ())
    if LANES not in widths:  # one after the other
        whole, found = ir.Constant(ir.VectorType(kind, size), table), ir.Constant(vector, ir.Undefined)
        for lane in range(LANES):
            at = ir.Constant(I32, lane)
            place = builder.and_(builder.extract_element(index, at), ir.Constant(I32, size - 1))
            found = builder.insert_element(found, builder.extract_element(whole, place), at)
        return found
    parts = [builder.bitcast(ir.Constant(vector, table[at : at + LANES]), VECTOR) for at in range(0, size, LANES)]
    name = "llvm.x86.avx512.permvar.sf.512" if LANES == 16 else "llvm.x86.avx2.permps"
    permute = declare(builder, name, VECTOR, [VECTOR, INTEGERS])
    looked, bit = [builder.call(permute, [part, index]) for part in parts], LANES
    while len(looked) > 1:
        upper = builder.icmp_signed("!=", builder.and_(index, each(bit, INTEGERS)), each(0, INTEGERS))
        pairs = zip(looked[::2], looked[1::2], strict=True)
        looked, bit = [builder.select(upper, b, a) for a, b in pairs], 2 * bit
    return builder.bitcast(looked[0], vector)


def _multiply_add(builder: Any, a: Any, b: Any, c: Any) -> Any:
    return builder.call(declare(builder, f"llvm.fmuladd.v{LANES}f32", VECTOR, [VECTOR] * 3), [a, b, c])


def _exponent(builder: Any, x: Any) -> Any:
    """Return the biased exponent of a vector of numbers from 0 on."""
    return builder.lshr(builder.bitcast(x, INTEGERS), each(EXPONENT_BIT, INTEGERS))


def _with_sign(builder: Any, x: Any, signs: Any) -> Any:
    """Return x, from 0 on, with the signs of a vector of integers."""
    signs = builder.and_(signs, each(-WITHOUT_SIGN - 1, INTEGERS))
    return builder.bitcast(builder.or_(builder.bitcast(x, INTEGERS), signs), VECTOR)


def _lesser(builder: Any, a: Any, b: Any) -> Any:
    return builder.select(builder.fcmp_ordered("<", a, b), a, b)


def _larger(builder: Any, a: Any, b: Any) -> Any:
    return builder.select(builder.fcmp_ordered(">", a, b), a, b)


def _numbers(builder: Any, codes: Any, signed: bool) -> Any:
    """Return what a vector of codes means."""
    wide = builder.zext(codes, INTEGERS)
    offset = builder.sub(wide, each(ZERO_CODE if signed else -1, INTEGERS))
    k = builder.sitofp(offset, VECTOR)
    if signed:
        k = builder.bitcast(builder.and_(builder.bitcast(k, INTEGERS), each(WITHOUT_SIGN, INTEGERS)), VECTOR)
    exponent = _exponent(builder, k)
    slope, height = (_looked_up(builder, table, exponent) for table in _decoding(signed))
    x = _multiply_add(builder, k, slope, height)
    return _with_sign(builder, _larger(builder, x, each(0.0, VECTOR)), offset) if signed else x


def _codes(builder: Any, x: Any, signed: bool) -> Any:
    """Return the codes of a vector of numbers."""
    bits = builder.bitcast(x, INTEGERS)
    size = builder.bitcast(builder.and_(bits, each(WITHOUT_SIGN, INTEGERS)), VECTOR) if signed else x
    exponent = _exponent(builder, _larger(builder, size, each(2.0**LEAST_EXPONENT, VECTOR)))
    limits, decades = _binades(signed)
    further = builder.fcmp_ordered(">=", size, _looked_up(builder, limits, exponent))
    decade = builder.add(_looked_up(builder, decades, exponent, I32), builder.zext(further, INTEGERS))
    if signed:  # below zero, no zero
        negative = builder.lshr(bits, each(SIGN_BIT, INTEGERS))
        decade = builder.select(builder.icmp_signed(">", decade, negative), decade, negative)
    slope, height, limit = (_looked_up(builder, table, decade) for table in _encoding(signed))
    k = _lesser(builder, _multiply_add(builder, size, slope, height), limit)
    if signed:  # the code is 127 + floor(k) above zero, and 127 - floor(k) = floor(128 - k) below
        k = _with_sign(builder, builder.fsub(k, each(0.5, VECTOR)), bits)
    code = builder.fptosi(builder.fadd(k, each(ZERO_CODE + 0.5 if signed else -1.0, VECTOR)), INTEGERS)
    return builder.trunc(code, CODES)


def _each_vector(context: Any, builder: Any, kinds: Any, arrays: Any, visit: Callable[[Any, Any], None]) -> None:
    """Call visit(address in the first array, in the second) for each vector of two arrays of whole vectors."""
    starts = [pointer(context, builder, kind, array, constant(0)) for kind, array in zip(kinds, arrays, strict=True)]
    size = builder.extract_value(context.make_array(kinds[0])(context, builder, arrays[0]).shape, 0)
    with cgutils.for_range_slice(builder, constant(0), size, constant(LANES), I64) as (at, _):
        visit(*(builder.gep(start, [at]) for start in starts))


# -- blocks --------------------------------------------------------------------------------------


def _decoder(signed: bool) -> Any:
    def twin(out: Array, codes: Array, factor: float) -> None:
        out[:] = decode_ref(codes, signed) * factor

    def decode(typing: Any, out: Any, codes: Any, factor: Any) -> Any:
        """Write to out (n,) float32 the numbers of codes (n,) uint8 times a factor; n is a multiple of 16."""

        def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            factors = broadcast(builder, arguments[2], VECTOR)

            def visit(to: Any, at: Any) -> None:
                raw = builder.load(builder.bitcast(at, CODES.as_pointer()))
                raw.align = 1
                store(builder, builder.fmul(_numbers(builder, raw, signed), factors), to)

            _each_vector(context, builder, signature.args[:2], arguments[:2], visit)
            return context.get_dummy_value()

        return types.void(out, codes, types.float32), codegen

    return with_twin(twin)(decode)


def _encoder(signed: bool) -> Any:
    def twin(codes: Array, x: Array, factor: float) -> None:
        codes[:] = encode_ref(x * factor, signed)

    def encode(typing: Any, codes: Any, x: Any, factor: Any) -> Any:
        """Write to codes (n,) uint8 those of x (n,) float32 times a factor; n is a multiple of 16.

        The products must be numbers, within the map up to rounding.
        """

        def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            factors = broadcast(builder, arguments[2], VECTOR)

            def visit(to: Any, at: Any) -> None:
                found = _codes(builder, builder.fmul(load(builder, at), factors), signed)
                builder.store(found, builder.bitcast(to, CODES.as_pointer())).align = 1

            _each_vector(context, builder, signature.args[:2], arguments[:2], visit)
            return context.get_dummy_value()

        return types.void(codes, x, types.float32), codegen

    return with_twin(twin)(encode)


decode_signed, decode_unsigned = _decoder(True), _decoder(False)
encode_signed, encode_unsigned = _encoder(True), _encoder(False)
