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

__all__ = ["affine_fit_ref", "even_fit_ref"]

ZERO, ONE = np.float32(0), np.float32(1)


def _sum(terms):
    """Return the sums of columns, each from the first row to the last."""
    total = np.zeros(terms.shape[1:], np.float32)
    for row in terms:
        total += row
    return total


def _over(numerator, denominator):
    """Return the quotients, 0 where the denominator is not above 0."""
    fine = denominator > 0
    return np.where(fine, numerator / np.where(fine, denominator, ONE), ZERO)


def even_fit_ref(x, weight, top, steps, low=None):
    """Return scales (groups,) for x ~ scale q, low <= q <= top (low: -top - 1 if not given).

    x, weight (n, groups) float32; `steps` float32: what is tried for the number of steps on the side of the number
    that is largest in size, which becomes -steps.
    """
    low = -top - 1 if low is None else low
    largest = np.take_along_axis(x, np.abs(x).argmax(0)[None], 0)[0]
    scale, best = np.zeros_like(largest), np.zeros_like(largest)
    some = largest != 0
    for step in steps:
        inverse = np.where(some, -step / np.where(some, largest, ONE), ZERO)
        q = np.clip(np.rint(x * inverse), np.float32(low), np.float32(top))
        with_x, with_q = _sum(weight * x * q), _sum(weight * q * q)
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
    least, largest = np.minimum(x.min(0), ZERO), np.maximum(x.max(0), ZERO)
    width = largest - least
    some = width > 0
    total, total_x = _sum(weight), _sum(weight * x)
    scale, offset = _over(width, np.full_like(width, top)), -least
    best = np.full_like(width, np.inf)
    for step in steps:
        inverse = _over(np.full_like(width, step), largest + offset)
        q = np.clip(np.rint((x + offset) * inverse), ZERO, np.float32(top))
        with_one, with_q, with_x = _sum(weight * q), _sum(weight * q * q), _sum(weight * x * q)
        determinant = total * with_q - with_one * with_one
        trial = _over(total * with_x - total_x * with_one, determinant)
        below = _over(with_one * with_x - with_q * total_x, determinant)
        alone = ~((determinant > 0) & (below > 0))
        trial, below = np.where(alone, _over(with_x, with_q), trial), np.where(alone, ZERO, below)
        rest = trial * q - below - x
        error = _sum(weight * rest * rest)
        better = (error < best) & (trial > 0)
        scale, offset, best = (np.where(better, *pair) for pair in ((trial, scale), (below, offset), (error, best)))
    return np.where(some, scale, ZERO), np.where(some, offset, ZERO)
