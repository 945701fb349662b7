"""What both ways of multiplying whole numbers share (`integers.py`, `few_rows.py`): definition, bytes, table."""

from typing import Any

import llvmlite.binding as llvm
import llvmlite.ir as ir
import numpy as np

from .routines import TILE
from .simd import I16, I32, ISA, declare

__all__ = [
    "BLOCK_BYTES",
    "BLOCK_SIZE",
    "GROUP",
    "IN_REGISTERS",
    "KNOWN",
    "MULTIPLY",
    "OFFSETS",
    "SCALED",
    "SPREAD",
    "TURN",
    "WHICH",
    "dot",
    "grouped_ref",
]

SCALED = 32  # numbers of x that share a scale
# Entries of the table: a number in KNOWN, and what that storage says; then routines, of the last two kinds one for each
# number of rows of x.
WHICH, GROUP, OFFSETS, BLOCK_SIZE, BLOCK_BYTES = range(5)
SPREAD, TURN, MULTIPLY, IN_REGISTERS = (
    TILE,
    TILE + 1,
    TILE + 2,
    TILE + 6,
)
KNOWN: list[Any] = []  # whose tables were asked for


def grouped_ref(y, x, d, sums, q, scale, offset, zero):
    """Return y (N, M) + the product of x (N, K) int8 times d (N, K / 32), and (q - zero) (M, K) times scale, - offset.

    scale, offset (M, K / group); offset may be None; sums (N, K / group) float32: d Σ x of each group.
    """
    group = q.shape[1] // scale.shape[1] if scale.shape[1] else 1
    for g in range(scale.shape[1]):
        columns = slice(g * group, (g + 1) * group)
        n = x[:, columns].astype(np.int32) @ (q[:, columns].astype(np.int32) - np.int32(zero)).T
        y = y + n.astype(np.float32) * (d[:, g * group // SCALED, None] * scale[:, g])
        if offset is not None:
            y = y - sums[:, g, None] * offset[:, g]
    return y


# -- LLVM: vectors of words, of which each is four bytes -----------------------------------------


def dot(builder, total, w, x):
    """Emit total + the four products of bytes of each lane: w is unsigned, x signed; 4, 8 or 16 lanes."""
    kind, lanes = total.type, total.type.count
    features = llvm.get_host_cpu_features()
    vnni = bool(features.get("avx512vnni"))
    if (ISA.name == "avx512" and vnni) or (ISA.name == "avx2" and (features.get("avxvnni") or vnni)):
        name = f"llvm.x86.avx512.vpdpbusd.{32 * lanes}"
        return builder.call(declare(builder, name, kind, [kind] * 3), [total, w, x])
    halves = ir.VectorType(I16, 2 * lanes)
    eight = ir.Constant(halves, [8] * 2 * lanes)
    even_w = builder.bitcast(builder.and_(w, ir.Constant(kind, [0xFF00FF] * lanes)), halves)
    odd_w = builder.lshr(builder.bitcast(w, halves), eight)
    odd_x = builder.bitcast(x, halves)
    even_x, odd_x = builder.ashr(builder.shl(odd_x, eight), eight), builder.ashr(odd_x, eight)
    for pair in ((even_w, even_x), (odd_w, odd_x)):
        total = builder.add(total, _sums_of_pairs(builder, kind, *pair))
    return total


def _sums_of_pairs(builder, kind, w, x):
    """Emit the sums of two products of 16-bit neighbours, in 32 bits."""
    lanes, features = kind.count, llvm.get_host_cpu_features()
    names = {16: ("avx512bw", "avx512.pmaddw.d.512"), 8: ("avx2", "avx2.pmadd.wd")}
    needed, name = names.get(lanes, ("", ""))
    if ISA.name in ("avx512", "avx2") and features.get(needed):
        return builder.call(declare(builder, f"llvm.x86.{name}", kind, [w.type] * 2), [w, x])
    wide = ir.VectorType(I32, 2 * lanes)
    products = builder.mul(builder.sext(w, wide), builder.sext(x, wide))
    picks = (ir.Constant(kind, [2 * lane + odd for lane in range(lanes)]) for odd in (0, 1))
    return builder.add(*(builder.shuffle_vector(products, products, pick) for pick in picks))
