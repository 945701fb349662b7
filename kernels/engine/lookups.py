"""Numbers by half-bytes: sixteen values of a table, looked up a vector at a time.

    scaled_lookup(table)      makes an operation   lookup(out, packed, scale):   out_k = table[q_k] scale
                              byte k of packed has q_2k in its upper half and q_(2k+1) in its lower

The table is a constant of the code: with AVX-512 it is one register, and a vector of indices one instruction.
"""

import llvmlite.binding as llvm
import llvmlite.ir as ir
import numpy as np
from numba import types
from numba.core import cgutils

from .simd import F32, I8, I32, I64, LANES, VECTOR, broadcast, constant, declare, each, load, pointer, store, with_twin

__all__ = ["scaled_lookup"]


def scaled_lookup(table: np.ndarray):
    """Return an operation on contiguous out (n,) float32, packed (n / 2,) uint8, n even, and a float32 scale."""
    values = np.asarray(table, np.float32)

    def twin(out, packed, scale):
        halves = np.stack([packed >> 4, packed & 15], 1).reshape(-1)
        out[...] = values[halves] * scale

    @with_twin(twin)
    def lookup(typing, out, packed, scale):
        """Overwrite out."""
        return types.void(out, packed, types.float32), codegen

    def codegen(context, builder, signature, arguments):
        out, packed, scale = arguments
        size = builder.extract_value(context.make_array(signature.args[0])(context, builder, out).shape, 0)
        to = pointer(context, builder, signature.args[0], out, constant(0))
        start = pointer(context, builder, signature.args[1], packed, constant(0))
        left = builder.srem(size, constant(LANES))
        whole = builder.sub(size, left)
        factors = broadcast(builder, scale, VECTOR)
        with cgutils.for_range_slice(builder, constant(0), whole, constant(LANES), I64) as (at, _):
            bytes_ = load(builder, builder.gep(start, [builder.lshr(at, constant(1))]), ir.VectorType(I8, LANES // 2))
            numbers = builder.fmul(_of(builder, _halves(builder, bytes_), values), factors)
            store(builder, numbers, builder.gep(to, [at]))
        rest = cgutils.global_constant(builder.module, "table", ir.Constant(ir.ArrayType(F32, 16), values.tolist()))
        with cgutils.for_range_slice(builder, whole, size, constant(1), I64) as (at, _):
            byte = builder.load(builder.gep(start, [builder.lshr(at, constant(1))]))
            odd = builder.trunc(builder.and_(at, constant(1)), ir.IntType(1))
            half = builder.select(odd, builder.and_(byte, ir.Constant(I8, 15)), builder.lshr(byte, ir.Constant(I8, 4)))
            number = builder.load(builder.gep(rest, [constant(0), builder.zext(half, I64)]))
            builder.store(builder.fmul(number, scale), builder.gep(to, [at]))

    return lookup


def _halves(builder, bytes_):
    """Emit the half-bytes of LANES / 2 bytes, of each the upper one first, as int32."""
    wide = ir.VectorType(I64, LANES // 2)
    spread = builder.zext(bytes_, wide)
    lower = builder.shl(builder.and_(spread, each(15, wide)), each(32, wide))
    return builder.bitcast(builder.or_(builder.lshr(spread, each(4, wide)), lower), ir.VectorType(I32, LANES))


def _of(builder, indices, table):
    """Emit table[index] of a vector of indices below 16."""
    features, kind = llvm.get_host_cpu_features(), indices.type
    if LANES == 16 and features.get("avx512f"):
        look_up = declare(builder, "llvm.x86.avx512.permvar.sf.512", VECTOR, [VECTOR, kind])
        return builder.call(look_up, [ir.Constant(VECTOR, table.tolist()), indices])
    if LANES == 8 and features.get("avx2"):
        look_up = declare(builder, "llvm.x86.avx2.permps", VECTOR, [VECTOR, kind])
        low, high = (
            builder.call(look_up, [ir.Constant(VECTOR, half.tolist()), indices]) for half in (table[:8], table[8:])
        )
        return builder.select(builder.icmp_unsigned(">", indices, each(7, kind)), high, low)
    found = [each(float(number), VECTOR) for number in table]
    for bit in range(4):
        odd = builder.icmp_unsigned("!=", builder.and_(indices, each(1 << bit, kind)), each(0, kind))
        found = [builder.select(odd, *pair) for pair in zip(found[1::2], found[::2], strict=True)]
    return found[0]
