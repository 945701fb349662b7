"""Number formats: what products multiply, a class each, with everything that the house knows of it.

    FLOAT32     the numbers as they are
    BFLOAT16    rounded to bfloat16, in one of three ways, of which the fastest is taken: kept as float32, which every
                machine can multiply; or in pairs, elements p and p + 1 of the sum in the 32 bits of one place of a
                panel, the first in the lower half, of which the processor's dot product adds both products at once;
                or by its matrix registers (`amx.py`)
    FLOAT16     rounded to IEEE half precision (beyond 65504: infinity), kept as float32; so the machine needs no
                half-precision arithmetic
    BF16X3      float32 by the products of bfloat16 parts, three or six of them (`parts.py`), on matrix units, which
    BF16X6      multiply bfloat16 many times as fast as float32; elsewhere float32 arithmetic, which is exacter and as
                fast as any way of multiplying parts: of x1 + x2, or of the numbers as they are

Rounding is to nearest even, and happens while an operand is packed (`panels.py`).  Sums are float32 in any case.

What a format says of itself, and what follows from it, is in `number_format.py`.  Which way of multiplying bfloat16 is
the fastest differs between processors, so it is measured (`choice.py`).
"""

import functools

import llvmlite.binding as llvm
import llvmlite.ir as ir
import numpy as np

from . import amx
from .choice import Choice
from .halves import fp16_rounded, round_to_bf16_ref, round_to_fp16_ref, widen_bf16_ref
from .jit import JIT
from .number_format import TILES, NumberFormat, one_tile, time_tile
from .parts import bf16_parts, bf16_parts_ref, joined
from .scratch import aligned_empty
from .simd import F32, ISA, LANES, VECTOR, declare, each, of_shape

__all__ = [
    "BF16X3",
    "BF16X6",
    "BFLOAT16",
    "FLOAT16",
    "FLOAT32",
    "METHODS",
    "PRECISIONS",
    "TILES",
    "AnyFormat",
    "NumberFormat",
]


# -- bfloat16 ------------------------------------------------------------------------------------


class _BFloat16(NumberFormat):
    """Rounded to bfloat16, kept as float32."""

    name, stored = "bfloat16", 1

    def round_ref(self, x):
        return round_to_bf16_ref(x)

    def place(self, builder, elements, read):
        halves = elements.halves(builder, read[0])
        return builder.bitcast(builder.shl(halves, each(16, halves.type)), of_shape(halves.type, F32))


class _BFloat16Pairs(_BFloat16):
    """Rounded to bfloat16, two in a place, multiplied by `vdpbf16ps`."""

    name, fold, unit = "bfloat16-pairs", 2, 2
    slice_terms = 2 * NumberFormat.slice_terms  # the same bytes of panels

    def runs_here(self):
        return not JIT or (ISA.name == "avx512" and bool(llvm.get_host_cpu_features().get("avx512bf16")))

    def place_ref(self, block):
        halves = np.zeros((-(-block.shape[0] // 2) * 2, block.shape[1]), np.uint32)
        halves[: block.shape[0]] = self.round_ref(block).view(np.uint32) >> np.uint32(16)
        return (halves[::2] | halves[1::2] << np.uint32(16)).view(np.float32)

    def unpacked_ref(self, panel):
        bits = np.ascontiguousarray(panel).view(np.uint32)
        halves = np.empty((2 * bits.shape[0], bits.shape[1]), np.uint32)
        halves[::2], halves[1::2] = bits << np.uint32(16), bits & np.uint32(0xFFFF0000)
        return halves.view(np.float32)

    def place(self, builder, elements, read):
        lower, upper = (elements.halves(builder, x) for x in read)
        return builder.bitcast(builder.or_(lower, builder.shl(upper, each(16, upper.type))), of_shape(lower.type, F32))

    def multiply(self, builder, left, right, total):
        halves = ir.VectorType(_BFloat(), 2 * LANES)
        dot = declare(builder, f"llvm.x86.avx512bf16.dpbf16ps.{32 * LANES}", VECTOR, [VECTOR, halves, halves])
        return builder.call(dot, [total, builder.bitcast(left, halves), builder.bitcast(right, halves)])


class _BFloat(ir.Type):
    """LLVM's `bfloat`, which llvmlite does not have."""

    null = "0.0"
    intrinsic_name = "bf16"

    def __str__(self):
        return "bfloat"

    _to_string = __str__

    def __eq__(self, other):
        return isinstance(other, _BFloat)

    def __hash__(self):
        return hash(_BFloat)


class _BFloat16Amx(_BFloat16):
    """Rounded to bfloat16, multiplied by AMX (`amx.py`)."""

    name, fold, unit = "bfloat16-amx", 2, amx.UNIT_TERMS
    slice_terms = 2 * NumberFormat.slice_terms
    scheme = amx.PLAIN

    def __init__(self, slab_columns: int = 1024) -> None:
        super().__init__(amx.SIDE, amx.SIDE, slab_columns=slab_columns, block_rows=192)

    def runs_here(self):
        return not JIT or not amx.lacks()

    @functools.cached_property
    def missing(self):
        return "" if not JIT else self._unavailable or self._differs()

    @property
    def _unavailable(self):
        return amx.lacks() or amx.refused()

    def _differs(self):
        """Compute a few tiles, and say so if they are not what they are defined to be: then nobody may use them."""
        rng = np.random.default_rng(0)
        depth = 2 * self.unit
        for scale in (1, 2.0**-66):  # the second makes denormal products and sums
            x = [(scale * rng.standard_normal((depth, amx.SIDE))).astype(np.float32) for _ in range(2)]
            a, b = (aligned_empty((self.depth_of(depth) * amx.SIDE,)) for _ in range(2))
            a[:], b[:] = self.panels_ref(x[0], True), self.panels_ref(x[1], False)
            c = rng.standard_normal((amx.SIDE, amx.SIDE)).astype(np.float32)
            expected = self.tile_ref(a, b, c)
            one_tile(self, c, a, b, True)()
            if c.tobytes() != expected.tobytes():
                return "its tiles compute other bits here than they are defined to"
        return ""

    @property
    def routines(self):
        """As elsewhere; RuntimeError without permission, because a tile instruction would end the process."""
        if JIT and self._unavailable:
            raise RuntimeError(f"AMX can't be used: {self._unavailable}; take another method of BFLOAT16")
        return amx.tile_routines(self.scheme) | amx.packers(self.parts)

    def elements_ref(self, x):
        return amx.flushed(x) if x.dtype == np.float32 else widen_bf16_ref(x)  # only the conversion flushes

    def panels_ref(self, block, of_a):
        return amx.panels_ref(block, of_a, self.scheme)

    def tile_ref(self, a, b, base):
        whole = np.zeros((amx.SIDE, amx.SIDE), np.float32)
        m, n = base.shape
        whole[:m, :n] = base
        return amx.tile_ref(a, b, whole, self.scheme)[:m, :n]


# -- float16 -------------------------------------------------------------------------------------


class _Float16(NumberFormat):
    """Rounded to IEEE half precision, kept as float32."""

    name = "float16"

    def round_ref(self, x):
        return round_to_fp16_ref(x)

    def place(self, builder, elements, read):
        return fp16_rounded(builder, elements.widened(builder, read[0]))


# -- float32 by parts ----------------------------------------------------------------------------


class _TwoParts(NumberFormat):
    """What two bfloat16 parts hold of a float32, 16 bits and a sign between them, kept as float32."""

    name = "bf16x3"

    def round_ref(self, x):
        with np.errstate(over="ignore"):
            return sum(bf16_parts_ref(x, 2))

    def place(self, builder, elements, read):
        return joined(builder, bf16_parts(builder, elements.widened(builder, read[0]), 2))


class _PartsAmx(_BFloat16Amx):
    """float32 by the products of parts that a scheme pairs, on AMX."""

    stored, slice_terms = 0, NumberFormat.slice_terms

    def __init__(self, name: str, scheme: amx.Scheme, slab_columns: int) -> None:
        super().__init__(slab_columns)
        self.name, self.scheme, self.parts = name, scheme, scheme.parts

    def round_ref(self, x):
        with np.errstate(over="ignore"):
            return sum(bf16_parts_ref(x, self.parts))


# -- the formats, and which way of multiplying bfloat16 is the fastest ---------------------------

FLOAT32, FLOAT16 = NumberFormat(), _Float16()
_WAYS = {"fp32": _BFloat16(), "dot": _BFloat16Pairs(), "amx": _BFloat16Amx()}
METHODS = {name: one for name, one in _WAYS.items() if one.runs_here()}
BFLOAT16 = Choice("bfloat16", "ABI_BF16", METHODS, time_tile)
_PARTS_AMX = {
    "bf16x3": _PartsAmx("bf16x3-amx", amx.THREE, slab_columns=1024),
    "bf16x6": _PartsAmx("bf16x6-amx", amx.SIX, slab_columns=512),
}


# What is measured is the tile; a product also packs two or three parts of each element, and reads them from a cache.
# A tile 3.6 times as fast as float32's made products 1.1 to 2.4 times as fast, one 2.1 times as fast 0.7 to 1.8 times,
# so that six products were slower as often as not (docs/log.md).
PARTS_WORTH = 2.5


def _by_parts(name: str, elsewhere: NumberFormat) -> Choice:
    """Return the choice between matrix units and the number format that stands for the parts' products elsewhere."""
    ways = {"fp32": elsewhere, "amx": _PARTS_AMX[name]}
    return Choice(
        name, "ABI_BF16_PARTS", {way: one for way, one in ways.items() if one.runs_here()}, time_tile, PARTS_WORTH
    )


BF16X3, BF16X6 = _by_parts("bf16x3", _TwoParts()), _by_parts("bf16x6", FLOAT32)
AnyFormat = NumberFormat | Choice  # what an operation takes
PRECISIONS: dict[str, AnyFormat] = {  # by the names of the settings, `shape.Precision`
    "fp32": FLOAT32,
    "bf16": BFLOAT16,
    "fp16": FLOAT16,
    "bf16x3": BF16X3,
    "bf16x6": BF16X6,
}
