"""Shares: how kernels are cut, and that Numba deals out turns as it is assumed to."""

import ctypes
import itertools

import numpy as np
import pytest

from abi_py.kernels.engine.shares import add_partial_sums, elements_each, partial_sums, share_of, turns_of_threads


@pytest.mark.parametrize(
    ("rows", "wanted"), [(0, 1), (1, 1), (3, 1), (4, 2), (64, 8), (1023, 16), (1024, 32), (4096, 64), (10**6, 128)]
)
def test_partial_sums_follow_from_the_rows(rows, wanted):
    assert partial_sums(rows) == wanted
    assert rows == 0 or rows // wanted >= 1  # no part is empty


def test_partial_sums_are_added_one_after_the_other(rng):
    total, partial = rng.standard_normal(37).astype(np.float32), rng.standard_normal((5, 37)).astype(np.float32)
    wanted = partial[0].copy()
    for p in range(1, 5):
        wanted += partial[p]
    wanted += total
    add_partial_sums(total, partial)
    assert total.tobytes() == wanted.tobytes()


@pytest.mark.parametrize("size", [0, 1, 4096, 10**6, 10**7, 10**9])
def test_a_flat_array_becomes_about_a_thousand_tasks(size):
    each = elements_each(size)
    assert 4096 <= each <= 65536
    tasks = -(-size // each)
    assert tasks <= 1025 or each == 65536
    assert tasks >= 128 or each == 4096


def test_shares_of_a_row_meet(rng):
    for size, step, parts in ((512, 32, 4), (293, 32, 7), (1, 16, 3), (48, 16, 128)):
        edges = [share_of(size, step, part, parts) for part in range(parts + 1)]
        assert edges[0] == 0
        assert edges[-1] == size
        assert all(a <= b and (a % step == 0 or a == size) for a, b in itertools.pairwise(edges))


@pytest.mark.parametrize("threads", [1, 2, 7, 8, 32, 128])
@pytest.mark.parametrize("count", [1, 2, 5, 20, 64, 100, 128, 384, 1000])
def test_numba_deals_out_turns_so(count, threads):
    """`turns_of_threads` against the scheduler that runs: neighbours, numbers that differ by one at most."""
    omppool = pytest.importorskip("numba.np.ufunc.omppool")
    word, words = ctypes.c_size_t, ctypes.POINTER(ctypes.c_size_t)
    kind = ctypes.CFUNCTYPE(None, word, words, words, word, words, ctypes.c_ssize_t)
    dealt = (word * (2 * threads))()
    kind(omppool.do_scheduling_unsigned)(1, (word * 1)(0), (word * 1)(count - 1), threads, dealt, 0)
    found = [(dealt[2 * i], dealt[2 * i + 1] + 1) for i in range(threads)]
    wanted = turns_of_threads(count, threads)
    assert [pair for pair in found if pair[0] < pair[1]] == [pair for pair in wanted if pair[0] < pair[1]]
