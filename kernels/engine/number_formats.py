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

A format says how it rounds (`round_ref`, in NumPy), how elements of the sum become a place of a panel (`place_ref` in
NumPy, `place` in LLVM), how many share one (`fold`), what the register tile does with two places (`multiply`), how the
model stores such numbers between forward and backward (`stored`), and whether this machine has what it needs
(`runs_here`).  Everything else follows: the four packers, the tile, and the *table* of their addresses, which is what
kernels take.  A format with another tile overrides `routines`.

An instance also has the shape of its tile, `rows` x `columns`, which is measured where it is not given (`TILES`), and
the sizes of what is packed at a time, `slab_columns` and `block_rows`; instances that differ in these alone compute the
same bits, because the order of a sum follows from the class (`unit`, `slice_terms`).

The dot product of bfloat16 is twice as fast as float32 on some processors and slower than it on others, so it is
measured (`choice.py`).
"""

import ctypes
import functools
import hashlib
import inspect
from collections.abc import Mapping
from typing import Any

import llvmlite.binding as llvm
import llvmlite.ir as ir
import numpy as np

from . import amx
from .cache import source_hash
from .choice import Choice, Measured
from .halves import fp16_rounded, round_to_bf16_ref, round_to_fp16_ref, widen_bf16_ref
from .jit import JIT
from .panels import FORMATS, packers
from .parts import bf16_parts, bf16_parts_ref, joined
from .routines import (
    BEGIN,
    BLOCK_ROWS,
    COLUMNS,
    END,
    FOLD,
    FORMAT,
    ROWS,
    SLAB_COLUMNS,
    SLICE_TERMS,
    STORED,
    TILE,
    UNIT,
    Routine,
    routine_table,
    routines_file,
)
from .scratch import aligned_empty
from .simd import F32, ISA, LANES, VECTOR, declare, each, of_shape
from .tiles import multiply_add, tile_routines

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


class NumberFormat:
    """A kind of numbers that products multiply: `FLOAT32`, and what overrides some of it."""

    name = "float32"
    fold = 1  # elements of the sum in a place of a panel; 1 or 2
    unit = 1  # elements of the sum to which a panel is filled up with zeros; a power of two, at least `fold`
    slice_terms = 512  # elements of the sum of a pass of the tile; a panel of A is at most 16 KB
    stored = 0  # which of panels.ELEMENTS the model keeps such numbers in between forward and backward

    def __init__(
        self,
        rows: int = 0,
        columns: int = 0,
        slab_columns: int = 960,  # of a packed slab of B: at most 2 MB
        block_rows: int = 192,  # of a packed block of A: at most 384 KB
    ) -> None:
        """Take the next number in `FORMATS`; slab and block are cut to whole panels.

        Without rows and columns the tile is that of TILES.  Nothing is measured or compiled before it is needed.
        """
        self._tile, self._most = (rows, columns), (slab_columns, block_rows)
        self.index = len(FORMATS)
        FORMATS.append(self)

    @functools.cached_property
    def rows(self) -> int:
        """Rows of the register tile, and so of a panel of A."""
        return self._tile[0] or TILES.chosen[0]

    @functools.cached_property
    def columns(self) -> int:
        """Columns of the register tile, and so of a panel of B."""
        return self._tile[1] or TILES.chosen[1]

    @functools.cached_property
    def slab_columns(self) -> int:
        """Columns of B that are packed at a time, at most."""
        return self._most[0] // self.columns * self.columns

    @functools.cached_property
    def block_rows(self) -> int:
        """Rows of A that are packed at a time, at most."""
        return self._most[1] // self.rows * self.rows

    def __repr__(self) -> str:
        return self.name

    @property
    def chosen(self) -> "NumberFormat":
        """The format itself; `Choice.chosen` is one of several."""
        return self

    def runs_here(self) -> bool:
        """Say whether this machine has what the format needs; the plain-Python twins need nothing."""
        return True

    @property
    def missing(self) -> str:
        """Why the format can't be used here, found out when it is about to be; "" if it can."""
        return ""

    @functools.cached_property
    def panels(self) -> tuple[int, int]:
        """Floats of a packed block of A, and of a packed slab of B."""
        depth = self.slice_terms // self.fold
        return self.block_rows * depth, self.slab_columns * depth

    def round_ref(self, x: np.ndarray) -> np.ndarray:
        """Return float32 x rounded to the format, still float32."""
        return x

    def place_ref(self, block: np.ndarray) -> np.ndarray:
        """Return the places of a panel, ((k + fold - 1) // fold, n) float32, from elements (k, n) float32."""
        return self.round_ref(block)

    def elements_ref(self, x: np.ndarray) -> np.ndarray:
        """Return the numbers of x, float32 or bfloat16 (as uint16), as packers read them: float32."""
        return widen_bf16_ref(x)

    def panels_ref(self, block: np.ndarray, of_a: bool) -> np.ndarray:
        """Return panels of A or B, flat float32, from elements (k, n) float32."""
        width = self.rows if of_a else self.columns
        places = self.place_ref(np.ascontiguousarray(block))
        full = np.zeros((len(places), -(-block.shape[1] // width) * width), np.float32)
        full[:, : block.shape[1]] = places
        return full.reshape(len(places), -1, width).swapaxes(0, 1).ravel()

    def unpacked_ref(self, panel: np.ndarray) -> np.ndarray:
        """Return the elements of places (depth, width): (k, width) float32."""
        return panel

    def tile_ref(self, a: np.ndarray, b: np.ndarray, base: np.ndarray) -> np.ndarray:
        """Return base (m, n) + the product of a panel of A, flat, and one of B, cut to m rows and n columns."""
        left, right = a.reshape(-1, self.rows), b.reshape(-1, self.columns)
        m, n = base.shape
        return self.unpacked_ref(left[:, :m]).T @ self.unpacked_ref(right[:, :n]) + base

    def place(self, builder: ir.IRBuilder, elements: Any, read: list[Any]) -> ir.Value:
        """Emit a place, or a vector of them, from what was read: `fold` numbers, or vectors, of one of ELEMENTS."""
        return elements.widened(builder, read[0])

    def multiply(self, builder: ir.IRBuilder, left: ir.Value, right: ir.Value, total: ir.Value) -> ir.Value:
        """Emit the products of two vectors of places, added to a vector of sums."""
        return multiply_add(builder, left, right, total)

    @property
    def routines(self) -> Mapping[int, Routine]:
        """The tile, what frames it, and the packers: {slot of the table: routine}."""
        return tile_routines(self) | packers(self)

    @functools.cached_property
    def table(self) -> np.ndarray:
        """The argument of kernels; compiled, or read from the cache, when it is first asked for."""
        header = {FORMAT: self.index, FOLD: self.fold, STORED: self.stored, ROWS: self.rows, COLUMNS: self.columns}
        header |= {UNIT: self.unit, SLICE_TERMS: self.slice_terms}
        header |= {SLAB_COLUMNS: self.slab_columns, BLOCK_ROWS: self.block_rows}
        return routine_table(self._kept_as, header, self.routines)

    @property
    def file(self) -> str:
        """The name under which the cache keeps the machine code."""
        return routines_file(self._kept_as)

    @property
    def _kept_as(self) -> str:
        """The name, the tile, and the text of the class: one outside `kernels/` is not in the cache's directory."""
        sources = b"".join(source_hash(inspect.getfile(cls)) for cls in type(self).__mro__[:-1])
        return f"{self.name}-{self.rows}x{self.columns}-{hashlib.sha256(sources).hexdigest()[:8]}"


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

    def __init__(self) -> None:
        super().__init__(amx.SIDE, amx.SIDE, slab_columns=1024, block_rows=192)

    def runs_here(self):
        return not JIT or not amx.lacks()

    @functools.cached_property
    def missing(self):
        return "" if not JIT else self._unavailable or self._differs()

    @property
    def _unavailable(self):
        return amx.lacks() or amx.refused()

    @functools.cached_property
    def table(self):
        """As elsewhere; RuntimeError without permission, because a tile instruction would end the process."""
        if JIT and self._unavailable:
            raise RuntimeError(f"AMX can't be used: {self._unavailable}; take another method of BFLOAT16")
        return super().table

    def _differs(self):
        """Compute a few tiles, and say so if they are not what they are defined to be: then nobody may use them."""
        rng = np.random.default_rng(0)
        depth = 2 * self.unit
        for scale in (1, 2.0**-66):  # the second makes denormal products and sums
            x = [(scale * rng.standard_normal((depth, amx.SIDE))).astype(np.float32) for _ in range(2)]
            a, b = (aligned_empty((depth * amx.SIDE // 2,)) for _ in range(2))
            a[:], b[:] = self.panels_ref(x[0], True), self.panels_ref(x[1], False)
            c = rng.standard_normal((amx.SIDE, amx.SIDE)).astype(np.float32)
            expected = self.tile_ref(a, b, c)
            _one_tile(self, c, a, b, True)()
            if c.tobytes() != expected.tobytes():
                return "its tiles compute other bits here than they are defined to"
        return ""

    @property
    def routines(self):
        return amx.tile_routines() | amx.packers()

    def elements_ref(self, x):
        return amx.flushed(x) if x.dtype == np.float32 else widen_bf16_ref(x)  # only the conversion flushes

    def panels_ref(self, block, of_a):
        return amx.panels_ref(self.round_ref(block), of_a)

    def tile_ref(self, a, b, base):
        whole = np.zeros((amx.SIDE, amx.SIDE), np.float32)
        m, n = base.shape
        whole[:m, :n] = base
        return amx.tile_ref(a, b, whole)[:m, :n]


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


# -- the formats, which tile is the fastest, and which way of multiplying bfloat16 ----------------

TIMED_DEPTH = 2048  # of sums: panels of A and B of 64 and 384 KiB with AVX-512, a second-level cache


def _one_tile(number_format, c, a, b, add, table=None):
    """Return a function that computes c = A B, or adds it: one whole tile of two panels."""
    rows, columns, depth = number_format.rows, number_format.columns, a.size // number_format.rows
    table = number_format.table if table is None else table
    kind = ctypes.CFUNCTYPE(None, *[ctypes.c_void_p] * 4, *[ctypes.c_int64] * 5, ctypes.c_bool)
    frame = ctypes.CFUNCTYPE(None)
    begin, run, end = (of(int(table[at])) for of, at in ((frame, BEGIN), (kind, TILE), (frame, END)))
    arguments = *(x.ctypes.data for x in (c, c, a, b)), columns, columns, rows, columns, depth, add

    def once(keep=(c, a, b)):
        begin()
        run(*arguments)
        end()

    return once


def _time_tile(number_format, table=None):
    """Return a function that computes one tile over TIMED_DEPTH, and how many operations that is."""
    rows, columns, depth = number_format.rows, number_format.columns, TIMED_DEPTH // number_format.fold
    c, a, b = (aligned_empty(shape) for shape in ((rows, columns), (depth * rows,), (depth * columns,)))
    a[:], b[:] = 1, 1
    return _one_tile(number_format, c, a, b, False, table), 2 * rows * columns * TIMED_DEPTH


def _time_shape(shape):
    """Return the same for float32 and a tile of rows x columns; only the tile is compiled."""
    number_format = NumberFormat(*shape)
    table = routine_table(f"tile-{shape[0]}x{shape[1]}", {}, tile_routines(number_format))
    return _time_tile(number_format, table)


TILES = Measured(
    "tile", "ABI_TILE", {f"{m}x{v * LANES}": (m, v * LANES) for m, v in ISA.tiles}, _time_shape
)  # of formats that multiply by vectors; their bits do not depend on it
FLOAT32, FLOAT16 = NumberFormat(), _Float16()
_WAYS = {"fp32": _BFloat16(), "dot": _BFloat16Pairs(), "amx": _BFloat16Amx()}
METHODS = {name: one for name, one in _WAYS.items() if one.runs_here()}
BFLOAT16 = Choice("bfloat16", "ABI_BF16", METHODS, _time_tile)
BF16X3 = Choice("bf16x3", "ABI_BF16_PARTS", {"fp32": _TwoParts()}, _time_tile)
BF16X6 = Choice("bf16x6", "ABI_BF16_PARTS", {"fp32": FLOAT32}, _time_tile)
AnyFormat = NumberFormat | Choice  # what an operation takes
PRECISIONS: dict[str, AnyFormat] = {  # by the names of the settings, `shape.Precision`
    "fp32": FLOAT32,
    "bf16": BFLOAT16,
    "fp16": FLOAT16,
    "bf16x3": BF16X3,
    "bf16x6": BF16X6,
}
