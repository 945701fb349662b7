"""Fits: the scale, and the least value, with which whole numbers stand for the numbers of a group.

    even_fit      x ~ scale q             -top - 1 <= q <= top        Q6_K, Q3_K; by importance Q4_0, Q5_0
    affine_fit    x ~ scale q - offset    0 <= q <= top, offset >= 0  Q4_K, Q5_K, Q2_K; by importance Q4_1, Q5_1

A group is rounded once for each of some step sizes near the one that just covers it.  For a rounding q the best scale
(and offset) is a weighted least-squares problem of one (two) unknowns with a closed solution; the step whose solution
leaves the least weighted error wins.  This is the search that GGUF's types were made with; only the values that it
finds matter to a reader of the file, so another writer may search otherwise.

    sums        Σw, Σwx, Σwq, Σwq², Σwxq, each from the first number of the group to the last
    even        scale = Σwxq / Σwq²                                   it explains (Σwxq)² / Σwq² of Σwx²
    affine      D = Σw Σwq² - (Σwq)²     scale = (Σw Σwxq - Σwx Σwq) / D      offset = (Σwq Σwxq - Σwq² Σwx) / D
                an offset below 0 cannot be kept: then it is 0, and the scale that of `even`

Groups are columns here: x (n, groups).  Sums of a group go down its column, so their bits do not depend on how many
groups are computed at once, and the reference has the bits of the kernel.
"""

import numpy as np
from numba import types
from numba.core import cgutils

from ..engine.jit import helper
from ..engine.simd import (
    LANES,
    VECTOR,
    ZERO,
    broadcast,
    constant,
    each,
    load,
    move,
    pointer,
    store,
    with_twin,
)

__all__ = ["affine_fit_ref", "affine_row", "columns_ref", "even_fit_ref", "even_row", "sum_ref", "weights_ref"]

NOTHING, ONE = np.float32(0), np.float32(1)
# Groups of nothing larger are zeros: no half keeps their scales, and steps over their width stay finite.
AS_ZERO = np.float32(1e-30)

# -- reference -----------------------------------------------------------------------------------


def sum_ref(terms):
    """Return the sums of columns, each from the first row to the last."""
    total = np.zeros(terms.shape[1:], np.float32)
    for row in terms:
        total += row
    return total


def weights_ref(x, importance, size, even):
    """Return the weights (size, groups) float32 of the groups of blocks x (n, block), in the order of `columns_ref`.

    Without importance x^2 for an even fit, and |x| plus the root mean square of the group for an affine one: what is
    large matters more.  With importance (n, block), that times the root of x^2 plus twice the mean square of the block.
    """
    columns = columns_ref(x, size)
    if importance is not None:
        spread = np.float32(2) * (sum_ref(x.T * x.T) / np.float32(x.shape[1]))
        return columns_ref(importance * np.sqrt(spread[:, None] + x * x), size)
    if even:
        return columns * columns
    return np.abs(columns) + np.sqrt(sum_ref(columns * columns) / np.float32(size))


def columns_ref(x, size):
    """Return the groups of `size` numbers of blocks x (n, block) as columns (size, groups)."""
    return np.ascontiguousarray(x.reshape(-1, size).T)


def _over(numerator, denominator):
    """Return the quotients, 0 where the denominator is not above 0."""
    fine = denominator > 0
    return np.where(fine, numerator / np.where(fine, denominator, ONE), NOTHING)


def even_fit_ref(x, weight, top, steps, low=None):
    """Return scales (groups,) for x ~ scale q, low <= q <= top (low: -top - 1 if not given).

    x, weight (n, groups) float32; `steps` float32: what is tried for the number of steps on the side of the number
    that is largest in size, which becomes -steps.
    """
    low = -top - 1 if low is None else low
    largest = np.take_along_axis(x, np.abs(x).argmax(0)[None], 0)[0]
    scale, best = np.zeros_like(largest), np.zeros_like(largest)
    some = np.abs(largest) > AS_ZERO
    for step in steps:
        inverse = np.where(some, -step / np.where(some, largest, ONE), NOTHING)
        q = np.clip(np.rint(x * inverse), np.float32(low), np.float32(top))
        with_x, with_q = sum_ref(weight * x * q), sum_ref(weight * q * q)
        trial = _over(with_x, with_q)
        explained = trial * with_x
        better = explained > best
        scale, best = np.where(better, trial, scale), np.where(better, explained, best)
    return scale


def affine_fit_ref(x, weight, top, steps):
    """Return scales and offsets (groups,), both at least 0, for x ~ scale q - offset, 0 <= q <= top.

    x, weight (n, groups) float32; `steps` float32: what is tried for the number of steps from the least number, or the
    best offset so far, to the largest; 0 counts as one of the group.
    """
    least, largest = np.minimum(x.min(0), NOTHING), np.maximum(x.max(0), NOTHING)
    width = largest - least
    some = width > AS_ZERO
    total, total_x = sum_ref(weight), sum_ref(weight * x)
    scale, offset = _over(width, np.full_like(width, top)), -least
    best = np.full_like(width, np.inf)
    for step in steps:
        inverse = _over(np.full_like(width, step), largest + offset)
        q = np.clip(np.rint((x + offset) * inverse), NOTHING, np.float32(top))
        with_one, with_q, with_x = sum_ref(weight * q), sum_ref(weight * q * q), sum_ref(weight * x * q)
        determinant = total * with_q - with_one * with_one
        trial = _over(total * with_x - total_x * with_one, determinant)
        below = _over(with_one * with_x - with_q * total_x, determinant)
        alone = ~((determinant > 0) & (below > 0))
        trial, below = np.where(alone, _over(with_x, with_q), trial), np.where(alone, NOTHING, below)
        rest = trial * q - below - x
        error = sum_ref(weight * rest * rest)
        better = (error < best) & (trial > 0)
        scale, offset, best = (np.where(better, *pair) for pair in ((trial, scale), (below, offset), (error, best)))
    return np.where(some, scale, NOTHING), np.where(some, offset, NOTHING)


# -- kernels: LANES groups at a time, in vectors -------------------------------------------------

ROUND = each(1.5 * 2.0**23, VECTOR)  # floats of this size are whole numbers, so adding it rounds to the nearest


def _rounded(builder, x, low, top):
    """Round to whole numbers, ties to even, and cut to low ... top."""
    x = builder.select(builder.fcmp_ordered("<", x, top), x, top)
    x = builder.select(builder.fcmp_ordered(">", x, low), x, low)
    return builder.fsub(builder.fadd(x, ROUND), ROUND)


def _quotient(builder, numerator, denominator):
    """Return the quotients, 0 where the denominator is not above 0."""
    fine = builder.fcmp_ordered(">", denominator, ZERO)
    whole = builder.fdiv(numerator, builder.select(fine, denominator, each(1.0, VECTOR)))
    return builder.select(fine, whole, ZERO)


class _Groups:
    """The numbers of LANES groups and what is summed over them, while IR is emitted."""

    def __init__(self, context, builder, signature, x, weight, rows):
        self.builder, self.rows = builder, rows
        self.x, self.weight = (
            pointer(context, builder, kind, array, constant(0), constant(0))
            for kind, array in ((signature.args[2], x), (signature.args[3], weight))
        )

    def sums(self, count, terms):
        """Return `count` sums over the numbers: terms(x, weight) returns what each adds."""
        builder = self.builder
        totals = [cgutils.alloca_once(builder, VECTOR) for _ in range(count)]
        for total in totals:
            builder.store(ZERO, total)
        with cgutils.for_range(builder, self.rows) as loop:
            at = builder.mul(loop.index, constant(LANES))
            x, weight = load(builder, move(builder, self.x, at)), load(builder, move(builder, self.weight, at))
            for total, term in zip(totals, terms(x, weight), strict=True):
                builder.store(builder.fadd(builder.load(total), term), total)
        return [builder.load(total) for total in totals]

    def extreme(self, better):
        """Return the number of each group, or 0, that is `better` than those before it."""
        builder = self.builder
        best = cgutils.alloca_once(builder, VECTOR)
        builder.store(ZERO, best)
        with cgutils.for_range(builder, self.rows) as loop:
            x = load(builder, move(builder, self.x, builder.mul(loop.index, constant(LANES))))
            before = builder.load(best)
            builder.store(builder.select(better(x, before), x, before), best)
        return builder.load(best)


def _size(builder, x):
    return builder.select(builder.fcmp_ordered("<", x, ZERO), builder.fneg(x), x)


def _each_step(context, builder, kind, steps):
    """Loop over the array `steps`: a vector of each."""
    first = pointer(context, builder, kind, steps, constant(0))
    count = builder.extract_value(context.make_array(kind)(context, builder, steps).shape, 0)
    return first, cgutils.for_range(builder, count)


def _even_twin(scale, at, x, weight, top, low, steps):
    scale[at : at + LANES] = even_fit_ref(x, weight, top, steps, low)


@with_twin(_even_twin)
def _even_fit(typing, scale, at, x, weight, top, low, steps):
    """scale[at : at + LANES] = even_fit_ref(x, weight, top, steps, low); x, weight (n, LANES)."""

    def codegen(context, builder, signature, arguments):
        scale, at, x, weight, top, low, steps = arguments
        rows = builder.extract_value(context.make_array(signature.args[2])(context, builder, x).shape, 0)
        groups = _Groups(context, builder, signature, x, weight, rows)
        out = pointer(context, builder, signature.args[0], scale, at)
        top, low = (broadcast(builder, number, VECTOR) for number in (top, low))
        largest = groups.extreme(lambda x, before: builder.fcmp_ordered(">", _size(builder, x), _size(builder, before)))
        some = builder.fcmp_ordered(">", _size(builder, largest), each(float(AS_ZERO), VECTOR))
        divisor = builder.select(some, largest, each(1.0, VECTOR))
        found, best = (cgutils.alloca_once(builder, VECTOR) for _ in range(2))
        builder.store(ZERO, found)
        builder.store(ZERO, best)
        first, each_step = _each_step(context, builder, signature.args[6], steps)
        with each_step as loop:
            step = broadcast(builder, builder.fneg(builder.load(move(builder, first, loop.index))), VECTOR)
            inverse = builder.select(some, builder.fdiv(step, divisor), ZERO)

            def terms(x, weight):
                q = _rounded(builder, builder.fmul(x, inverse), low, top)
                return builder.fmul(builder.fmul(weight, x), q), builder.fmul(builder.fmul(weight, q), q)

            with_x, with_q = groups.sums(2, terms)
            trial = _quotient(builder, with_x, with_q)
            explained = builder.fmul(trial, with_x)
            better = builder.fcmp_ordered(">", explained, builder.load(best))
            builder.store(builder.select(better, trial, builder.load(found)), found)
            builder.store(builder.select(better, explained, builder.load(best)), best)
        store(builder, builder.load(found), out)
        return context.get_dummy_value()

    return types.void(scale, types.intp, x, weight, types.float32, types.float32, steps), codegen


def _affine_twin(scale, offset, x, weight, at, top, steps):
    scale[at : at + LANES], offset[at : at + LANES] = affine_fit_ref(x, weight, top, steps)


@with_twin(_affine_twin)
def _affine_fit(typing, scale, offset, x, weight, at, top, steps):
    """scale, offset [at : at + LANES] = affine_fit_ref(x, weight, top, steps); x, weight (n, LANES)."""

    def codegen(context, builder, signature, arguments):
        scale, offset, x, weight, at, top, steps = arguments
        rows = builder.extract_value(context.make_array(signature.args[2])(context, builder, x).shape, 0)
        groups = _Groups(context, builder, signature, x, weight, rows)
        outs = [pointer(context, builder, signature.args[i], array, at) for i, array in enumerate((scale, offset))]
        top = broadcast(builder, top, VECTOR)
        fadd, fsub, fmul, select = builder.fadd, builder.fsub, builder.fmul, builder.select
        least = groups.extreme(lambda x, before: builder.fcmp_ordered("<", x, before))
        largest = groups.extreme(lambda x, before: builder.fcmp_ordered(">", x, before))
        width = fsub(largest, least)
        some = builder.fcmp_ordered(">", width, each(float(AS_ZERO), VECTOR))
        total, total_x = groups.sums(2, lambda x, weight: (weight, fmul(weight, x)))
        found, below, best = (cgutils.alloca_once(builder, VECTOR) for _ in range(3))
        builder.store(_quotient(builder, width, top), found)
        builder.store(fsub(ZERO, least), below)
        builder.store(each(float("inf"), VECTOR), best)
        first, each_step = _each_step(context, builder, signature.args[6], steps)
        with each_step as loop:
            step = broadcast(builder, builder.load(move(builder, first, loop.index)), VECTOR)
            so_far = builder.load(below)
            inverse = _quotient(builder, step, fadd(largest, so_far))

            def rounded(x):
                return _rounded(builder, fmul(fadd(x, so_far), inverse), ZERO, top)

            def terms(x, weight):
                q = rounded(x)
                with_weight = fmul(weight, q)
                return with_weight, fmul(with_weight, q), fmul(fmul(weight, x), q)

            with_one, with_q, with_x = groups.sums(3, terms)
            determinant = fsub(fmul(total, with_q), fmul(with_one, with_one))
            trial = _quotient(builder, fsub(fmul(total, with_x), fmul(total_x, with_one)), determinant)
            under = _quotient(builder, fsub(fmul(with_one, with_x), fmul(with_q, total_x)), determinant)
            both = builder.and_(builder.fcmp_ordered(">", determinant, ZERO), builder.fcmp_ordered(">", under, ZERO))
            trial = select(both, trial, _quotient(builder, with_x, with_q))
            under = select(both, under, ZERO)

            def errors(x, weight):
                rest = fsub(fsub(fmul(trial, rounded(x)), under), x)
                return (fmul(fmul(weight, rest), rest),)

            (error,) = groups.sums(1, errors)
            better = builder.fcmp_ordered("<", error, builder.load(best))
            better = builder.and_(better, builder.fcmp_ordered(">", trial, ZERO))
            for value, kept in ((trial, found), (under, below), (error, best)):
                builder.store(select(better, value, builder.load(kept)), kept)
        for kept, out in zip((found, below), outs, strict=True):
            store(builder, select(some, builder.load(kept), ZERO), out)
        return context.get_dummy_value()

    return types.void(scale, offset, x, weight, types.intp, types.float32, steps), codegen


@helper
def _gather(columns, weights, x, importance, first, size, block, even):
    """Write LANES groups of a row x, from `first` on, and their weights side by side; what does not exist is 0."""
    mean, summed = NOTHING, -1  # of which block or group, by its first number
    for lane in range(LANES):
        start = (first + lane) * size
        if start >= x.size:
            columns[:size, lane] = NOTHING
            weights[:size, lane] = NOTHING
            continue
        low, length = (start // block * block, block) if importance.size else (start, size)
        if low != summed:
            mean, summed = NOTHING, low
            for k in range(low, low + length):
                mean += x[k] * x[k]
            mean /= np.float32(length)
        for k in range(size):
            number = x[start + k]
            columns[k, lane] = number
            if importance.size:
                spread = np.float32(2) * mean + number * number
                weights[k, lane] = importance[start + k] * np.sqrt(spread)
            else:
                weights[k, lane] = number * number if even else abs(number) + np.sqrt(mean)


@helper
def even_row(scale, x, importance, size, block, top, low, steps):
    """Write the scales of the groups of `size` numbers of a row x; scale has room for whole vectors of them.

    importance is as long as x, or empty.
    """
    columns, weights = np.empty((size, LANES), np.float32), np.empty((size, LANES), np.float32)
    for first in range(0, x.size // size, LANES):
        _gather(columns, weights, x, importance, first, size, block, True)
        _even_fit(scale, first, columns, weights, np.float32(top), np.float32(low), steps)


@helper
def affine_row(scale, offset, x, importance, size, block, top, steps):
    """Write the scales and offsets of the groups of `size` numbers of a row x; both have room for whole vectors."""
    columns, weights = np.empty((size, LANES), np.float32), np.empty((size, LANES), np.float32)
    for first in range(0, x.size // size, LANES):
        _gather(columns, weights, x, importance, first, size, block, False)
        _affine_fit(scale, offset, columns, weights, first, np.float32(top), steps)
