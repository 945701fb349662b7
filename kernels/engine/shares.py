"""Shares: which thread does which tasks of a kernel, from what each task costs.

Numba gives every thread as many turns of a `prange` as the others, whatever is in them.  Where tasks differ (in causal
attention the last queries see all keys and the first one none but itself) a kernel lets its `prange` run over *shares*:
lists of tasks whose costs are about equal.
"""

import dataclasses
from collections.abc import Iterable

import numpy as np

__all__ = ["Plan", "least", "shared"]

CLEARLY = 0.97  # of the slowest share so far: what that of a later plan, with more tasks, must come below


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
