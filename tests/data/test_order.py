"""The order of an epoch is a bijection, differs from epoch to epoch, and does not lean to any row."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from abi_py.data.order import _mix, permute


@pytest.mark.parametrize("size", [*range(1, 70), 127, 128, 129, 1000, 65535, 65536, 65537])
def test_every_row_comes_once(size: int) -> None:
    for epoch in range(2):
        assert np.array_equal(np.sort(permute(np.arange(size), size, 3, epoch)), np.arange(size))


@settings(max_examples=60)
@given(st.integers(1, 1 << 62), st.integers(0, (1 << 64) - 1), st.integers(0, 1 << 40), st.data())
def test_positions_may_be_asked_one_by_one(size: int, seed: int, epoch: int, data: st.DataObject) -> None:
    positions = data.draw(st.lists(st.integers(0, size - 1), min_size=1, max_size=20, unique=True))
    rows = permute(positions, size, seed, epoch)
    assert rows.dtype == np.int64
    assert rows.min() >= 0
    assert rows.max() < size
    assert len(set(rows.tolist())) == len(positions)
    assert [permute([p], size, seed, epoch)[0] for p in positions] == rows.tolist()


def test_seed_and_epoch_give_other_orders() -> None:
    keys = [(seed, epoch) for seed in (0, 1, 2, 1 << 63) for epoch in range(5)]
    orders = {tuple(permute(np.arange(50), 50, seed, epoch).tolist()) for seed, epoch in keys}
    assert len(orders) == len(keys)
    # Of two random orders of 10 000 rows about one row is in the same place.
    first, second = (permute(np.arange(10_000), 10_000, 0, epoch) for epoch in (0, 1))
    assert np.count_nonzero(first == second) < 10
    assert np.count_nonzero(np.diff(first) == 1) < 10


def test_every_row_is_equally_likely_at_every_position() -> None:
    """Chi-square over (position, row) of 4000 epochs of 12 rows: 121 degrees of freedom, so mean 121, sigma 15.6."""
    size, epochs = 12, 4000
    counts = np.zeros((size, size))
    for epoch in range(epochs):
        counts[np.arange(size), permute(np.arange(size), size, 7, epoch)] += 1
    expected = epochs / size
    chi_square = float(((counts - expected) ** 2 / expected).sum())
    assert 121 - 5 * 15.6 < chi_square < 121 + 5 * 15.6


def test_order_is_the_same_on_every_machine() -> None:
    words = np.array([0x9E3779B97F4A7C15], np.uint64)
    assert _mix(words).tolist() == [0xE220A8397B1DCDAF]  # first output of splitmix64 with seed 0
    assert permute(np.arange(10), 10, 0, 0).tolist() == GOLDEN_10
    assert permute([0, 1, 2], 10**12, 42, 3).tolist() == GOLDEN_BIG


def test_position_outside_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"position 5 must be below size \(5\)"):
        permute([5], 5, 0, 0)


# A change of these means that saved runs resume with other batches.
GOLDEN_10 = [5, 2, 8, 6, 0, 4, 9, 7, 1, 3]
GOLDEN_BIG = [703037074892, 737661694312, 519460055123]
