"""A number format: the class, how fast its tile is, and which tile of vectors is the fastest here.

    NumberFormat    what kernels and packers ask a format, and the answers of float32; the others are in
                    `number_formats.py`
    TILES           the register tile of formats that multiply by vectors, measured at the first use on a machine
    one_tile        a call of a format's tile from Python;  time_tile: and what `choice.py` times

A format says how it rounds (`round_ref`, in NumPy), how elements of the sum become a place of a panel (`place_ref` in
NumPy, `place` in LLVM), how many share one (`fold`), what the register tile does with two places (`multiply`), how the
model stores such numbers between forward and backward (`stored`), and whether this machine has what it needs
(`runs_here`, `missing`).  Everything else follows: the four packers, the tile, and the *table* of their addresses,
which is what kernels take.  A format with another tile overrides `routines`.

An instance also has the shape of its tile, `rows` x `columns`, which is measured where it is not given (`TILES`), and
the sizes of what is packed at a time, `slab_columns` and `block_rows`; instances that differ in these alone compute the
same bits, because the order of a sum follows from the class (`unit`, `slice_terms`).
"""

import ctypes
import functools
import hashlib
import inspect
from collections.abc import Mapping
from typing import Any

import llvmlite.ir as ir
import numpy as np

from .cache import source_hash
from .choice import Measured
from .halves import widen_bf16_ref
from .panels import FORMATS, packers
from .routines import (
    BEGIN,
    BLOCK_ROWS,
    COLUMNS,
    END,
    FOLD,
    FORMAT,
    PARTS,
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
from .simd import ISA, LANES
from .tiles import multiply_add, tile_routines

__all__ = ["TILES", "NumberFormat", "one_tile", "time_tile"]


class NumberFormat:
    """A kind of numbers that products multiply: `FLOAT32`, and what overrides some of it."""

    name = "float32"
    fold = 1  # elements of the sum in a place of a panel; 1 or 2
    parts = 1  # numbers that stand for an element, each in a place of its own
    unit = 1  # elements of the sum to which a panel is filled up with zeros; a power of two, at least `fold`
    slice_terms = 512  # elements of the sum of a pass of the tile; a panel of A is at most 16 KB
    stored = 0  # which of panels.ELEMENTS the model keeps such numbers in between forward and backward

    def __init__(
        self,
        rows: int = 0,
        columns: int = 0,
        slab_columns: int = 576,  # of a packed slab of B: at most 1.2 MB (docs/log.md)
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

    def depth_of(self, terms: int) -> int:
        """Return how deep panels are for a sum over so many elements; `panels.panel_depth` is the same in kernels."""
        return -(-terms // self.unit) * self.unit // self.fold * self.parts

    @functools.cached_property
    def panels(self) -> tuple[int, int]:
        """Floats of a packed block of A, and of a packed slab of B."""
        depth = self.depth_of(self.slice_terms)
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
    def tile_table(self) -> np.ndarray:
        """A table with the tile alone: all that is timed, and a fraction of what there is to compile."""
        routines = self.routines
        tile = {slot: routines[slot] for slot in (TILE, BEGIN, END)}
        return routine_table(f"tile-{self._kept_as}", {ROWS: self.rows, COLUMNS: self.columns}, tile)

    @functools.cached_property
    def table(self) -> np.ndarray:
        """The argument of kernels; compiled, or read from the cache, when it is first asked for."""
        header = {FORMAT: self.index, FOLD: self.fold, STORED: self.stored, ROWS: self.rows, COLUMNS: self.columns}
        header |= {UNIT: self.unit, SLICE_TERMS: self.slice_terms, PARTS: self.parts}
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


# -- how fast a tile is, and which is the fastest ------------------------------------------------

TIMED_DEPTH = 2048  # of sums: panels of A and B of 64 and 384 KiB with AVX-512, a second-level cache


def one_tile(number_format, c, a, b, add):
    """Return a function that computes c = A B, or adds it: one whole tile of two panels."""
    rows, columns, depth = number_format.rows, number_format.columns, a.size // number_format.rows
    table = number_format.tile_table
    kind = ctypes.CFUNCTYPE(None, *[ctypes.c_void_p] * 4, *[ctypes.c_int64] * 5, ctypes.c_bool)
    frame = ctypes.CFUNCTYPE(None)
    begin, run, end = (of(int(table[at])) for of, at in ((frame, BEGIN), (kind, TILE), (frame, END)))
    arguments = *(x.ctypes.data for x in (c, c, a, b)), columns, columns, rows, columns, depth, add

    def once(keep=(c, a, b)):
        begin()
        run(*arguments)
        end()

    return once


def time_tile(number_format):
    """Return a function that computes one tile over TIMED_DEPTH, and how many operations that is."""
    rows, columns, depth = number_format.rows, number_format.columns, number_format.depth_of(TIMED_DEPTH)
    c, a, b = (aligned_empty(shape) for shape in ((rows, columns), (depth * rows,), (depth * columns,)))
    a[:], b[:] = 1, 1
    return one_tile(number_format, c, a, b, False), 2 * rows * columns * TIMED_DEPTH


def _time_shape(shape):
    """Return the same for float32 and a tile of rows x columns."""
    return time_tile(NumberFormat(*shape))


TILES = Measured(
    "tile", "ABI_TILE", {f"{m}x{v * LANES}": (m, v * LANES) for m, v in ISA.tiles}, _time_shape
)  # of formats that multiply by vectors; their bits do not depend on it
