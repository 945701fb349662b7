"""Shares: into how many tasks a kernel is cut, and which thread does which of them.

    partial_sums     of a sum over rows; add_partial_sums: their sum
    elements_each    of a pass over a flat array
    share_of         where the parts of a row begin
    shared, least    tasks that cost different amounts, in shares that cost about the same
    filled           the matrices of one call, as compiled code takes them

Numba gives every thread as many turns of a `prange` as the others, whatever is in them, neighbours to one thread.
Where tasks differ (in causal attention the last queries see all keys and the first one none but itself) a kernel lets
its `prange` run over *shares*: lists of tasks whose costs are about equal.

How a sum is cut decides its bits, so that follows from the shape alone, never from the number of threads.
"""

import dataclasses
import itertools
from collections.abc import Iterable, Sequence
from typing import TypeVar

import numpy as np

from .jit import helper

__all__ = [
    "MATRICES",
    "Plan",
    "add_partial_sums",
    "elements_each",
    "filled",
    "least",
    "partial_sums",
    "round_up",
    "share_of",
    "shared",
    "turns_of_threads",
]

Part = TypeVar("Part")

MOST_PARTIAL_SUMS = 128
MOST_TASKS, FEWEST_ELEMENTS, MOST_ELEMENTS = 1024, 4096, 65536  # of a pass over a flat array
MATRICES = 3  # of one call of a product of generation: q, k and v
CLEARLY = 0.97  # of the slowest share so far: what that of a later plan, with more tasks, must come below


@helper
def partial_sums(rows):
    """Return in how many parts a sum over rows is made: a power of two near the square root of rows, at most 128.

    P parts take the time of rows / P rows if there are threads enough, and one thread then adds P sums, each about as
    long as a row: P = sqrt(rows) makes the least of both.
    """
    parts = 1
    while parts < MOST_PARTIAL_SUMS and 4 * parts * parts <= rows:
        parts *= 2
    return parts


@helper
def add_partial_sums(total, partial):
    """Add to total (C,) the rows of partial (P, C), one after the other; partial[0] becomes their sum."""
    whole = partial[0]
    for p in range(1, len(partial)):
        part = partial[p]
        for j in range(whole.size):
            whole[j] += part[j]
    for j in range(whole.size):
        total[j] += np.float32(whole[j])


@helper
def round_up(size, step):
    """Return the multiple of step that size needs."""
    return (size + step - 1) // step * step


@helper
def share_of(size, step, part, parts):
    """Return where the part of a size begins, at a multiple of step."""
    return min(size, (size + step - 1) // step * part // parts * step)


@helper
def elements_each(size):
    """Return how many elements of a flat array of `size` a task passes over: about 1024 tasks, of 4096 to 65536."""
    return min(max((size + MOST_TASKS - 1) // MOST_TASKS, FEWEST_ELEMENTS), MOST_ELEMENTS)


def filled(parts: Sequence[Part]) -> tuple[Part, ...]:
    """Return up to MATRICES parts, the last one repeated until there are so many: one type, so compiled once."""
    return (*parts, *[parts[-1]] * (MATRICES - len(parts)))


def turns_of_threads(count: int, threads: int) -> list[tuple[int, int]]:
    """Return the first and the end of each thread's turns of a `prange` over `count`, as Numba deals them out.

    Neighbours; their numbers differ by one at most, and the first threads have the larger ones.
    """
    edges = [0]
    for left in range(threads, 0, -1):
        edges.append(edges[-1] - (edges[-1] - count) // left)
    return list(itertools.pairwise(edges))


@dataclasses.dataclass(frozen=True, eq=False)
class Plan:
    """Tasks of a kernel, one a row, in shares: share i has those from ends[i] to ends[i + 1]."""

    tasks: np.ndarray  # (n, ...) int64
    costs: np.ndarray  # (n,)
    ends: np.ndarray  # (shares + 1,) int64, the first 0
    threads: int

    @property
    def slowest(self) -> float:
        """Cost of the largest share."""
        return float(np.add.reduceat(self.costs, self.ends[:-1]).max())

    @property
    def imbalance(self) -> float:
        """Cost of the largest share over the mean of all threads, idle ones included: 1 is perfect."""
        return self.slowest * self.threads / float(self.costs.sum())


def shared(tasks: np.ndarray, costs: np.ndarray, threads: int) -> Plan:
    """Return tasks in as many shares as there are threads, none of them empty.

    The largest task that is left goes to the share that has least so far: the largest share is at most a third above
    the least possible (Graham 1969, "Bounds on multiprocessing timing anomalies").
    """
    count = max(1, min(threads, len(costs)))
    sums = np.zeros(count)
    members: list[list[int]] = [[] for _ in range(count)]
    for task in np.argsort(-costs, kind="stable"):
        to = int(sums.argmin())
        sums[to] += costs[task]
        members[to].append(int(task))
    order = np.concatenate([np.sort(share) for share in members])
    ends = np.cumsum([0, *map(len, members)], dtype=np.int64)
    return Plan(np.ascontiguousarray(tasks[order]), costs[order], ends, threads)


def least(plans: Iterable[Plan]) -> Plan:
    """Return the plan whose slowest share costs least; of nearly equal ones the first."""
    first, *others = plans
    for plan in others:
        if plan.slowest < CLEARLY * first.slowest:
            first = plan
    return first
