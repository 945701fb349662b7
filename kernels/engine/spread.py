"""Blocks of bytes as vectors, in LLVM: what storages write their reading in (`storage/blocks.py`).

block.bytes(at, count)       `count` bytes from byte `at` on            .bits(at, count): 0 or 1 for each bit
block.half(at)               a number in half precision                 .power_of_two(at, bias): 2^(byte - bias)
& | ^ << >> + -              of bytes with bytes or a number, modulo 256
.unsigned(), .signed()       bytes as floats, which are multiplied by one number:  bytes.unsigned() * block.half(0)
.nibbles()                   the lower halves of bytes, then the upper
.looked_up(table)            table[byte], of bytes below 16
joined(x, y, ...)            bytes one after the other
"""

from collections.abc import Callable

import llvmlite.binding as llvm
import llvmlite.ir as ir
import numpy as np

from .halves import widened_half
from .simd import F32, I8, I16, I32, broadcast, declare, each, move

__all__ = ["Block", "Bytes", "Floats", "Half", "joined"]


class Floats:
    """A vector of float32, or one."""

    def __init__(self, builder: ir.IRBuilder, value: ir.Value) -> None:
        self.builder, self.value = builder, value

    def __mul__(self, one: "Floats") -> "Floats":
        return Floats(self.builder, self.builder.fmul(self.value, broadcast(self.builder, one.value, self.value.type)))

    def __neg__(self) -> "Floats":
        return Floats(self.builder, self.builder.fneg(self.value))


class Half(Floats):
    """A number in half precision: as float32 where that is asked for."""

    def __init__(self, builder: ir.IRBuilder, bits: ir.Value) -> None:
        self.builder, self.bits = builder, bits

    @property
    def value(self) -> ir.Value:  # type: ignore[override]
        return widened_half(self.builder, self.bits)

    def __neg__(self) -> "Half":
        return Half(self.builder, self.builder.xor(self.bits, ir.Constant(I16, 0x8000)))


class Bytes:
    """A vector of bytes."""

    def __init__(self, builder: ir.IRBuilder, value: ir.Value) -> None:
        self.builder, self.value = builder, value

    def _with(self, operation: Callable[..., ir.Value], other: "Bytes | int") -> "Bytes":
        right = other.value if isinstance(other, Bytes) else each(other, self.value.type)
        return Bytes(self.builder, operation(self.value, right))

    def __and__(self, other: "Bytes | int") -> "Bytes":
        return self._with(self.builder.and_, other)

    def __or__(self, other: "Bytes | int") -> "Bytes":
        return self._with(self.builder.or_, other)

    def __xor__(self, other: "Bytes | int") -> "Bytes":
        return self._with(self.builder.xor, other)

    def __sub__(self, other: "Bytes | int") -> "Bytes":
        return self._with(self.builder.sub, other)

    def __lshift__(self, bits: int) -> "Bytes":
        return self._with(self.builder.shl, bits)

    def __rshift__(self, bits: int) -> "Bytes":
        return self._with(self.builder.lshr, bits)

    def nibbles(self) -> "Bytes":
        """Return the lower halves of the bytes, then the upper ones."""
        builder, lanes = self.builder, self.value.type.count // 4
        twice = builder.bitcast(joined(self, self).value, ir.VectorType(I32, 2 * lanes))
        moved = builder.lshr(twice, ir.Constant(twice.type, [0] * lanes + [4] * lanes))
        return Bytes(builder, builder.bitcast(moved, ir.VectorType(I8, 8 * lanes))) & 15

    def unsigned(self) -> Floats:
        """Return the numbers 0 to 255 as float32."""
        return self._as_floats(self.builder.zext)

    def signed(self) -> Floats:
        """Return the numbers -128 to 127 as float32."""
        return self._as_floats(self.builder.sext)

    def _as_floats(self, widen: Callable[..., ir.Value]) -> Floats:
        count = self.value.type.count
        wide = widen(self.value, ir.VectorType(I32, count))
        return Floats(self.builder, self.builder.sitofp(wide, ir.VectorType(F32, count)))

    def looked_up(self, table: np.ndarray) -> "Bytes":
        """Return table[byte] of sixteen or 32 bytes below 16; table (16,) uint8."""
        builder, kind = self.builder, self.value.type
        needed, name = {16: ("ssse3", "ssse3.pshuf.b.128"), 32: ("avx2", "avx2.pshuf.b")}[kind.count]
        if llvm.get_host_cpu_features().get(needed):
            shuffle = declare(builder, f"llvm.x86.{name}", kind, [kind] * 2)
            tables = ir.Constant(kind, table.tolist() * (kind.count // 16))
            return Bytes(builder, builder.call(shuffle, [tables, self.value]))
        found = [each(int(number), kind) for number in table]
        for bit in range(4):
            odd = builder.icmp_unsigned("!=", builder.and_(self.value, each(1 << bit, kind)), each(0, kind))
            found = [builder.select(odd, *pair) for pair in zip(found[1::2], found[::2], strict=True)]
        return Bytes(builder, found[0])


class Block:
    """A block in memory."""

    def __init__(self, builder: ir.IRBuilder, address: ir.Value) -> None:
        self.builder, self.address = builder, address

    def _read(self, at: int, kind: ir.Type) -> ir.Value:
        place = self.builder.bitcast(move(self.builder, self.address, at), kind.as_pointer())
        value = self.builder.load(place)
        value.align = 1
        return value

    def bytes(self, at: int, count: int) -> Bytes:
        """Return `count` bytes from byte `at` on."""
        return Bytes(self.builder, self._read(at, ir.VectorType(I8, count)))

    def bits(self, at: int, count: int) -> Bytes:
        """Return `count` bits from byte `at` on, the lowest of a byte first, a byte for each: 0 or 1."""
        flags = self.builder.bitcast(self._read(at, ir.IntType(count)), ir.VectorType(ir.IntType(1), count))
        return Bytes(self.builder, self.builder.zext(flags, ir.VectorType(I8, count)))

    def half(self, at: int) -> Half:
        """Return the number in half precision, little-endian, at byte `at`."""
        return Half(self.builder, self._read(at, I16))

    def power_of_two(self, at: int, bias: int) -> Floats:
        """Return 2^(byte - bias), a subnormal number where it is one; 0 <= byte - bias + 149."""
        builder = self.builder
        e = builder.zext(self._read(at, I8), I32)
        raised = builder.add(e, ir.Constant(I32, 127 - bias))  # what a normal number keeps, if it is above 0
        normal = builder.shl(raised, ir.Constant(I32, 23))
        subnormal = builder.shl(ir.Constant(I32, 1), builder.add(raised, ir.Constant(I32, 22)))
        small = builder.icmp_signed("<", raised, ir.Constant(I32, 1))
        return Floats(builder, builder.bitcast(builder.select(small, subnormal, normal), F32))


def joined(*parts: Bytes) -> Bytes:
    """Return vectors of bytes, a power of two of them of one size, as one."""
    if len(parts) == 1:
        return parts[0]
    low, high = joined(*parts[: len(parts) // 2]), joined(*parts[len(parts) // 2 :])
    lanes = ir.Constant(ir.VectorType(I32, 2 * low.value.type.count), list(range(2 * low.value.type.count)))
    return Bytes(low.builder, low.builder.shuffle_vector(low.value, high.value, lanes))
