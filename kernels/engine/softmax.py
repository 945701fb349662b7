"""Softmax of attention on panels of scores, and what goes with it: passes over columns, in vectors spelled out.

    soften_columns      s[j, c] becomes exp(scale s[j, c] - m[c]), with the running maximum m and sum l of each column
    soften_back         scores s[r, j] become probabilities p, and dp becomes scale ds = scale p (dp - delta[r])
    scale_columns       x[r, c] *= factor[c]
    row_dots            out[r] = sum_c x[r, c] y[r, c]
    turn                out[i + c, j + r] = x[r, c]

A panel of scores has the keys of a block as rows and a register tile's columns of queries, so that the maximum and the
sum over keys are vertical: a vector holds one number of each of LANES queries, and no sum over lanes is left.  Left to
LLVM's loop vectoriser, these passes would be half as wide on processors for which it prefers vectors of 256 bits.
"""

import llvmlite.ir as ir
import numpy as np
from numba import types
from numba.core import cgutils

from .panels import transposed
from .simd import (
    I64,
    LANES,
    VECTOR,
    ZERO,
    broadcast,
    constant,
    first_lanes,
    load,
    masked_load,
    masked_store,
    pointer,
    row_length,
    store,
    sum_of_lanes,
    with_twin,
)
from .tiles import multiply_add
from .vectors import exp, exp_of

__all__ = ["row_dots", "scale_columns", "soften_back", "soften_columns", "turn"]

LOWEST = ir.Constant(VECTOR, [float("-inf")] * LANES)
CHAINS = 4  # maxima side by side, which hides the latency of comparing


# -- plain-Python twins --------------------------------------------------------------------------


def _exp_twin(x):
    return np.fromiter((exp(number) for number in x.ravel()), np.float32, x.size).reshape(x.shape)


def _soften_columns_twin(s, keys, columns, m, l, shrink, scale):
    s, m, l, shrink = s[:keys, :columns], m[:columns], l[:columns], shrink[:columns]
    top = np.fmax(np.fmax.reduce(s, axis=0, initial=np.float32(-np.inf)) * scale, m)
    base = np.where(top > -np.inf, top, np.float32(0))
    shrink[...] = _exp_twin(m - base)
    added = np.zeros_like(l)
    with np.errstate(invalid="ignore"):
        for line in s:
            line[...] = _exp_twin((line.astype(np.float64) * scale - base).astype(np.float32))
            added += line
        l[...] = l * shrink + added
    m[...] = top
    return bool((shrink != 1).any())


def _soften_back_twin(p, dp, first, rows, columns, scale, lse, delta):
    these = slice(first, rows)
    p, dp, lse, delta = p[these, :columns], dp[these, :columns], lse[these, None], delta[these, None]
    with np.errstate(invalid="ignore"):
        p[...] = _exp_twin((p.astype(np.float64) * scale - lse).astype(np.float32))
        dp[...] = p * (dp - delta) * scale


def _row_dots_twin(out, x, y, i, j, rows, columns):
    block = np.s_[i : i + rows, j : j + columns]
    out[:rows] = (x[block] * y[block]).sum(1)


def _scale_columns_twin(x, rows, columns, factor):
    x[:rows, :columns] *= factor[:columns]


def _turn_twin(out, i, j, x, rows, columns):
    out[i : i + columns, j : j + rows] = x[:rows, :columns].T


# -- forward -------------------------------------------------------------------------------------


def _each_vector(builder, columns):
    """Loop over the vectors that hold the first `columns` columns: the first column of each."""
    return cgutils.for_range_slice(builder, constant(0), columns, constant(LANES), I64)


def _larger(builder, x, best):
    """Return the larger of two vectors, `best` where x is NaN."""
    return builder.select(builder.fcmp_ordered(">", x, best), x, best)


@with_twin(_soften_columns_twin)
def soften_columns(typing, s, keys, columns, m, l, shrink, scale):
    """Turn scores s[:keys, :columns] into exp(scale s - m) in place, m[c] the larger of itself and their maximum.

    l[c] becomes l[c] shrink[c] + their sum, key after key, and shrink[c] is exp(old m - new m).  Columns are rounded up
    to whole vectors.  NaN does not count for the maximum; it does in the sum.  Return whether a shrink is not 1.
    """

    def codegen(context, builder, signature, arguments):
        s, keys, columns, m, l, shrink, scale = arguments
        kinds = signature.args
        top_left = pointer(context, builder, kinds[0], s, constant(0), constant(0))
        row = row_length(context, builder, kinds[0], s)
        m, l, shrink = (pointer(context, builder, kinds[at], x, constant(0)) for at, x in ((3, m), (4, l), (5, shrink)))
        scale = broadcast(builder, scale, VECTOR)
        one = ir.Constant(VECTOR, [1.0] * LANES)
        moved = cgutils.alloca_once_value(builder, ir.Constant(ir.IntType(1), 0))
        chains = [cgutils.alloca_once(builder, VECTOR) for _ in range(CHAINS)]
        added = cgutils.alloca_once(builder, VECTOR)
        whole = builder.sub(keys, builder.srem(keys, constant(CHAINS)))
        with _each_vector(builder, columns) as (first, _):
            column = builder.gep(top_left, [first])

            def at(key, column=column):
                return builder.gep(column, [builder.mul(key, row)])

            for chain in chains:
                builder.store(LOWEST, chain)
            with cgutils.for_range_slice(builder, constant(0), whole, constant(CHAINS), I64) as (key, _):
                for number, chain in enumerate(chains):
                    x = load(builder, at(builder.add(key, constant(number))))
                    builder.store(_larger(builder, x, builder.load(chain)), chain)
            with cgutils.for_range_slice(builder, whole, keys, constant(1), I64) as (key, _):
                builder.store(_larger(builder, load(builder, at(key)), builder.load(chains[0])), chains[0])
            best = LOWEST
            for chain in chains:
                best = _larger(builder, builder.load(chain), best)
            before = load(builder, builder.gep(m, [first]))
            top = _larger(builder, builder.fmul(best, scale), before)
            base = builder.select(builder.fcmp_ordered(">", top, LOWEST), top, ZERO)  # a query that sees no key yet
            factor = exp_of(builder, builder.fsub(before, base))
            minus = builder.fneg(base)
            builder.store(ZERO, added)
            with cgutils.for_range(builder, keys) as loop:
                place = at(loop.index)
                y = exp_of(builder, multiply_add(builder, load(builder, place), scale, minus))
                store(builder, y, place)
                builder.store(builder.fadd(builder.load(added), y), added)
            sums = builder.gep(l, [first])
            kept = builder.fmul(load(builder, sums), factor)
            store(builder, builder.fadd(kept, builder.load(added)), sums)
            store(builder, top, builder.gep(m, [first]))
            store(builder, factor, builder.gep(shrink, [first]))
            differs = builder.bitcast(builder.fcmp_unordered("!=", factor, one), ir.IntType(LANES))
            differs = builder.icmp_unsigned("!=", differs, ir.Constant(ir.IntType(LANES), 0))
            builder.store(builder.or_(builder.load(moved), differs), moved)
        return builder.load(moved)

    return types.boolean(s, types.intp, types.intp, m, l, shrink, types.float32), codegen


@with_twin(_scale_columns_twin)
def scale_columns(typing, x, rows, columns, factor):
    """x[r, c] *= factor[c] for r < rows and c < columns, rounded up to whole vectors."""

    def codegen(context, builder, signature, arguments):
        x, rows, columns, factor = arguments
        kinds = signature.args
        corner = pointer(context, builder, kinds[0], x, constant(0), constant(0))
        row = row_length(context, builder, kinds[0], x)
        factor = pointer(context, builder, kinds[3], factor, constant(0))
        with _each_vector(builder, columns) as (first, _):
            by = load(builder, builder.gep(factor, [first]))
            column = builder.gep(corner, [first])
            with cgutils.for_range(builder, rows) as loop:
                place = builder.gep(column, [builder.mul(loop.index, row)])
                store(builder, builder.fmul(load(builder, place), by), place)
        return context.get_dummy_value()

    return types.void(x, types.intp, types.intp, factor), codegen


@with_twin(_turn_twin)
def turn(typing, out, i, j, x, rows, columns):
    """out[i + c, j + r] = x[r, c] for r < rows, c < columns; rows of x hold whole vectors."""

    def codegen(context, builder, signature, arguments):
        out, i, j, x, rows, columns = arguments
        kinds = signature.args
        to = pointer(context, builder, kinds[0], out, i, j)
        to_row = row_length(context, builder, kinds[0], out)
        corner = pointer(context, builder, kinds[3], x, constant(0), constant(0))
        row = row_length(context, builder, kinds[3], x)

        def square(c, r, whole):
            """Turn LANES x LANES elements, all of which exist if `whole`."""
            place = builder.gep(corner, [builder.add(builder.mul(r, row), c)])
            lines = [load(builder, place)]
            for s in range(1, LANES):
                following = builder.gep(place, [row])
                if not whole:  # stay in a row that exists; what is read there is dropped
                    inside = builder.icmp_signed("<", builder.add(r, constant(s)), rows)
                    following = builder.select(inside, following, place)
                place = following
                lines.append(load(builder, place))
            mask = first_lanes(builder, builder.sub(rows, r))
            place = builder.gep(to, [builder.add(builder.mul(c, to_row), r)])
            for s, line in enumerate(transposed(builder, lines)):
                if whole:
                    store(builder, line, place)
                else:
                    with builder.if_then(builder.icmp_signed("<", builder.add(c, constant(s)), columns)):
                        masked_store(builder, line, place, mask)
                place = builder.gep(place, [to_row])

        with _each_vector(builder, columns) as (c, _), _each_vector(builder, rows) as (r, _):
            inside = [
                builder.icmp_signed("<=", builder.add(at, constant(LANES)), count)
                for at, count in ((c, columns), (r, rows))
            ]
            with builder.if_else(builder.and_(*inside)) as (whole, edge):
                with whole:
                    square(c, r, True)
                with edge:
                    square(c, r, False)
        return context.get_dummy_value()

    return types.void(out, types.intp, types.intp, x, types.intp, types.intp), codegen


# -- backward ------------------------------------------------------------------------------------


@with_twin(_row_dots_twin)
def row_dots(typing, out, x, y, i, j, rows, columns):
    """out[r] = sum over c < columns of x[i + r, j + c] y[i + r, j + c]: vectors, whose lanes are added by halves."""

    def codegen(context, builder, signature, arguments):
        out, x, y, i, j, rows, columns = arguments
        kinds = signature.args
        out = pointer(context, builder, kinds[0], out, constant(0))
        corners = [pointer(context, builder, kinds[at], z, i, j) for at, z in ((1, x), (2, y))]
        row_lengths = [row_length(context, builder, kinds[at], z) for at, z in ((1, x), (2, y))]
        sums = cgutils.alloca_once(builder, VECTOR)
        whole = builder.sub(columns, builder.srem(columns, constant(LANES)))
        mask = first_lanes(builder, builder.sub(columns, whole))
        with cgutils.for_range(builder, rows) as loop:
            r = loop.index
            lines = [builder.gep(z, [builder.mul(r, length)]) for z, length in zip(corners, row_lengths, strict=True)]
            left, right = (masked_load(builder, builder.gep(line, [whole]), mask) for line in lines)
            builder.store(builder.fmul(left, right), sums)
            with _each_vector(builder, whole) as (first, _):
                left, right = (load(builder, builder.gep(line, [first])) for line in lines)
                builder.store(multiply_add(builder, left, right, builder.load(sums)), sums)
            builder.store(sum_of_lanes(builder, builder.load(sums)), builder.gep(out, [r]))
        return context.get_dummy_value()

    return types.void(out, x, y, *[types.intp] * 4), codegen


@with_twin(_soften_back_twin)
def soften_back(typing, p, dp, first_row, rows, columns, scale, lse, delta):
    """Turn scores p[first_row:rows, :columns] into exp(scale p - lse[r]), dp into scale p (dp - delta[r]), in place.

    Columns are rounded up to whole vectors.
    """

    def codegen(context, builder, signature, arguments):
        p, dp, first_row, rows, columns, scale, lse, delta = arguments
        kinds = signature.args
        corners = [pointer(context, builder, kinds[at], x, constant(0), constant(0)) for at, x in ((0, p), (1, dp))]
        row_lengths = [row_length(context, builder, kinds[at], x) for at, x in ((0, p), (1, dp))]
        lse, delta = (pointer(context, builder, kinds[at], x, constant(0)) for at, x in ((6, lse), (7, delta)))
        scale = broadcast(builder, scale, VECTOR)
        with cgutils.for_range_slice(builder, first_row, rows, constant(1), I64) as (r, _):
            lines = [builder.gep(x, [builder.mul(r, length)]) for x, length in zip(corners, row_lengths, strict=True)]
            minus, away = (broadcast(builder, builder.load(builder.gep(x, [r])), VECTOR) for x in (lse, delta))
            minus = builder.fneg(minus)
            with _each_vector(builder, columns) as (first, _):
                at, d_at = (builder.gep(line, [first]) for line in lines)
                y = exp_of(builder, multiply_add(builder, load(builder, at), scale, minus))
                store(builder, y, at)
                d = builder.fsub(load(builder, d_at), away)
                store(builder, builder.fmul(builder.fmul(y, d), scale), d_at)
        return context.get_dummy_value()

    return types.void(p, dp, *[types.intp] * 3, types.float32, lse, delta), codegen
