"""Blocks of bytes as vectors, in LLVM: what storages write their reading in (`storage/blocks.py`).

block.bytes(at, count)       `count` bytes from byte `at` on            .bits(at, count): 0 or 1 for each bit
block.half(at)               a number in half precision                 .power_of_two(at, bias): 2^(byte - bias)
& | ^ << >> + -              of bytes with bytes or a number, modulo 256
.unsigned(), .signed()       bytes as floats, which are multiplied by one number:  bytes.unsigned() * block.half(0)
.nibbles()                   the lower halves of bytes, then the upper
.looked_up(table)            table[byte], of bytes below 16
joined(x, y, ...)            bytes one after the other

Two blocks may be read side by side, in vectors twice as long: all of the first block, then all of the second.
"""

from collections.abc import Callable

import llvmlite.binding as llvm
import llvmlite.ir as ir
import numpy as np

from .halves import widened_half
from .simd import F32, I8, I16, I32, broadcast, declare, each, move, of_shape

__all__ = ["Block", "Bytes", "Floats", "Half", "joined"]

SHUFFLES = {  # by the number of bytes: what a processor must have, and its instruction that looks up sixteen
    16: ("ssse3", "ssse3.pshuf.b.128"),
    32: ("avx2", "avx2.pshuf.b"),
    64: ("avx512bw", "avx512.pshuf.b.512"),
}


class Floats:
    """A vector of float32, or one."""

    def __init__(self, builder: ir.IRBuilder, value: ir.Value) -> None:
        self.builder, self.value = builder, value

    def __mul__(self, one: "Floats") -> "Floats":
        """Return the product with a number: of several blocks, each its own."""
        factors = spread_out(self.builder, one.value, self.value.type)
        return Floats(self.builder, self.builder.fmul(self.value, factors))

    def __neg__(self) -> "Floats":
        return Floats(self.builder, self.builder.fneg(self.value))


class Half(Floats):
    """A number in half precision, or one of each block: as float32 where that is asked for."""

    def __init__(self, builder: ir.IRBuilder, bits: ir.Value) -> None:
        self.builder, self.bits = builder, bits

    @property
    def value(self) -> ir.Value:  # type: ignore[override]
        return widened_half(self.builder, self.bits)

    def __neg__(self) -> "Half":
        return Half(self.builder, self.builder.xor(self.bits, each(0x8000, self.bits.type)))


class Bytes:
    """A vector of bytes: as many of each of `blocks` blocks, one block after the other."""

    def __init__(self, builder: ir.IRBuilder, value: ir.Value, blocks: int = 1) -> None:
        self.builder, self.value, self.blocks = builder, value, blocks

    def _with(self, operation: Callable[..., ir.Value], other: "Bytes | int") -> "Bytes":
        right = other.value if isinstance(other, Bytes) else each(other, self.value.type)
        return Bytes(self.builder, operation(self.value, right), self.blocks)

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
        builder, both = self.builder, joined(self, self)
        words = ir.VectorType(I32, both.value.type.count // 4)
        lanes = words.count // self.blocks // 2
        shifts = ir.Constant(words, ([0] * lanes + [4] * lanes) * self.blocks)
        moved = builder.lshr(builder.bitcast(both.value, words), shifts)
        return Bytes(builder, builder.bitcast(moved, both.value.type), self.blocks) & 15

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
        """Return table[byte] of sixteen, 32 or 64 bytes below 16; table (16,) uint8."""
        builder, kind = self.builder, self.value.type
        needed, name = SHUFFLES[kind.count]
        if llvm.get_host_cpu_features().get(needed):
            shuffle = declare(builder, f"llvm.x86.{name}", kind, [kind] * 2)
            tables = ir.Constant(kind, table.tolist() * (kind.count // 16))
            return Bytes(builder, builder.call(shuffle, [tables, self.value]), self.blocks)
        found = [each(int(number), kind) for number in table]
        for bit in range(4):
            odd = builder.icmp_unsigned("!=", builder.and_(self.value, each(1 << bit, kind)), each(0, kind))
            found = [builder.select(odd, *pair) for pair in zip(found[1::2], found[::2], strict=True)]
        return Bytes(builder, found[0], self.blocks)


class Block:
    """A block in memory, or two that are read side by side."""

    def __init__(self, builder: ir.IRBuilder, *addresses: ir.Value) -> None:
        self.builder, self.addresses = builder, addresses

    def _read(self, at: int, kind: ir.Type) -> ir.Value:
        """Return what is at byte `at`: of several blocks a vector, one block after the other."""
        values = []
        for address in self.addresses:
            place = self.builder.bitcast(move(self.builder, address, at), kind.as_pointer())
            values.append(self.builder.load(place))
            values[-1].align = 1
        if len(values) == 1:
            return values[0]
        if isinstance(kind, ir.VectorType):
            return end_to_end(self.builder, *values)
        both = ir.Constant(ir.VectorType(kind, 2), ir.Undefined)
        for i, value in enumerate(values):
            both = self.builder.insert_element(both, value, ir.Constant(I32, i))
        return both

    def bytes(self, at: int, count: int) -> Bytes:
        """Return `count` bytes from byte `at` on."""
        return Bytes(self.builder, self._read(at, ir.VectorType(I8, count)), len(self.addresses))

    def bits(self, at: int, count: int) -> Bytes:
        """Return `count` bits from byte `at` on, the lowest of a byte first, a byte for each: 0 or 1."""
        blocks = len(self.addresses)
        flags = self.builder.bitcast(self._read(at, ir.IntType(count)), ir.VectorType(ir.IntType(1), count * blocks))
        return Bytes(self.builder, self.builder.zext(flags, ir.VectorType(I8, count * blocks)), blocks)

    def half(self, at: int) -> Half:
        """Return the number in half precision, little-endian, at byte `at`."""
        return Half(self.builder, self._read(at, I16))

    def power_of_two(self, at: int, bias: int) -> Floats:
        """Return 2^(byte - bias), a subnormal number where it is one; 0 <= byte - bias + 149."""
        builder = self.builder
        read = self._read(at, I8)
        kind = of_shape(read.type, I32)
        raised = builder.add(builder.zext(read, kind), each(127 - bias, kind))  # what a normal number keeps, if above 0
        normal = builder.shl(raised, each(23, kind))
        subnormal = builder.shl(each(1, kind), builder.add(raised, each(22, kind)))
        small = builder.icmp_signed("<", raised, each(1, kind))
        return Floats(builder, builder.bitcast(builder.select(small, subnormal, normal), of_shape(kind, F32)))


def joined(*parts: Bytes) -> Bytes:
    """Return vectors of bytes, a power of two of them of one size, as one: all of a block, then of the next."""
    if len(parts) == 1:
        return parts[0]
    low, high = joined(*parts[: len(parts) // 2]), joined(*parts[len(parts) // 2 :])
    return Bytes(low.builder, end_to_end(low.builder, low.value, high.value, low.blocks), low.blocks)


def end_to_end(builder: ir.IRBuilder, low: ir.Value, high: ir.Value, blocks: int = 1) -> ir.Value:
    """Return two vectors as one: of each block what the first has of it, then the second."""
    count = low.type.count // blocks
    lanes = [
        half * low.type.count + block * count + i for block in range(blocks) for half in (0, 1) for i in range(count)
    ]
    return builder.shuffle_vector(low, high, ir.Constant(ir.VectorType(I32, len(lanes)), lanes))


def spread_out(builder: ir.IRBuilder, value: ir.Value, kind: ir.VectorType) -> ir.Value:
    """Return a number in all lanes of a vector, or the numbers of several blocks in as many lanes each."""
    if not isinstance(value.type, ir.VectorType):
        return broadcast(builder, value, kind)
    count = kind.count // value.type.count
    lanes = ir.Constant(ir.VectorType(I32, kind.count), [lane // count for lane in range(kind.count)])
    return builder.shuffle_vector(value, value, lanes)
