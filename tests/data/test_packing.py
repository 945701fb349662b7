"""Packing: every token stands in one row, every label continues its own sequence, and rows are well filled."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from abi_py.data import IGNORE_LABEL, PackedBatches, SequencePacker
from abi_py.data.packing import best_fit_decreasing
from abi_py.errors import ConfigError, DataError

IGNORED = int(IGNORE_LABEL)


def segments(packed: PackedBatches) -> list[tuple[list[int], list[int]]]:
    """Return (tokens, labels) of every segment, and check what holds for every row."""
    found = []
    for i in range(packed.num_batches):
        batch = packed.get_batch(i)
        assert batch.attention_mask is not None
        assert batch.segment_ids is not None
        assert batch.seq_len == packed.seq_len
        for ids, labels, mask, segment in zip(
            batch.input_ids, batch.labels, batch.attention_mask, batch.segment_ids, strict=True
        ):
            used = int(mask.sum())
            assert mask.tolist() == [1] * used + [0] * (packed.seq_len - used)
            assert used > 0
            # Contiguous runs 0, 1, 2...; then padding, which has no label.
            assert (segment[used:] == -1).all()
            assert (ids[used:] == packed.pad_token_id).all()
            assert (labels[used:] == IGNORE_LABEL).all()
            assert segment[0] == 0
            assert np.isin(np.diff(segment[:used]), (0, 1)).all()
            for number in range(int(segment[:used].max()) + 1):
                at = segment == number
                found.append((ids[at].tolist(), labels[at].tolist()))
    return found


@settings(max_examples=80)
@given(st.lists(st.integers(1, 40), min_size=1, max_size=40), st.integers(2, 16), st.integers(1, 5))
def test_every_label_comes_once_and_stays_in_its_sequence(lengths: list[int], T: int, B: int) -> None:
    packer = SequencePacker(T, pad_token_id=7)
    for number, length in enumerate(lengths):
        packer.add_sequence(1000 * (number + 1) + np.arange(length))
    packed = packer.pack(B)
    seen_labels: list[int] = []
    seen_tokens: set[int] = set()
    for ids, labels in segments(packed):
        assert labels == [*ids[1:], IGNORED]
        assert {i // 1000 for i in ids} == {ids[0] // 1000}
        seen_labels += labels[:-1]
        seen_tokens.update(ids)
    every = {1000 * (n + 1) + i for n, length in enumerate(lengths) for i in range(length)}
    assert seen_tokens == every
    assert sorted(seen_labels) == sorted(token for token in every if token % 1000)
    stats = packed.stats
    assert stats.sequences == len(lengths)
    assert stats.labels == len(seen_labels)
    assert stats.tokens + stats.padding == stats.rows * T
    assert stats.cut == 0
    assert packed.num_batches == len(packed) == -(-stats.rows // B)
    assert [packed.get_batch(i).batch_size for i in range(packed.num_batches - 1)] == [B] * (packed.num_batches - 1)


@settings(max_examples=80)
@given(st.lists(st.integers(1, 30), max_size=60), st.integers(30, 40))
def test_rows_hold_no_more_than_they_can_and_are_few(sizes: list[int], capacity: int) -> None:
    rows = best_fit_decreasing(sizes, capacity)
    assert sorted(i for row in rows for i in row) == list(range(len(sizes)))
    assert all(sum(sizes[i] for i in row) <= capacity for row in rows)
    least = -(-sum(sizes) // capacity)
    assert len(rows) <= 11 / 9 * max(least, sum(size > capacity / 2 for size in sizes)) + 4


def test_best_fit_prefers_the_tightest_row() -> None:
    # Free space after 7 and 8: 3 and 2.  The 2 fills the row of the 8 exactly; first fit would put it beside the 7.
    assert best_fit_decreasing([7, 8, 2, 3], 10) == [[0, 3], [1, 2]]
    assert best_fit_decreasing([5, 5, 5, 5], 10) == [[0, 1], [2, 3]]
    assert best_fit_decreasing([], 10) == []


def test_short_sequences_are_really_packed() -> None:
    packer = SequencePacker(8)
    for tokens in ([1, 2, 3], [4, 5], [6, 7, 8, 9]):
        packer.add_sequence(tokens)
    packed = packer.pack(2)
    (batch,) = (packed.get_batch(i) for i in range(packed.num_batches))  # one row a sequence would need three
    assert batch.input_ids.tolist() == [[1, 2, 3, 6, 7, 8, 9, 0], [4, 5, 0, 0, 0, 0, 0, 0]]
    assert batch.labels[0].tolist() == [2, 3, IGNORED, 7, 8, 9, IGNORED, IGNORED]
    assert batch.segment_ids is not None
    assert batch.segment_ids.tolist() == [[0, 0, 0, 1, 1, 1, 1, -1], [0, 0] + 6 * [-1]]
    assert batch.segment_ids.dtype == np.int32
    assert batch.num_tokens == packed.stats.labels == 6
    assert packed.stats.padding_fraction == 7 / 16


def test_three_full_sequences_give_two_batches_of_two_rows() -> None:
    packer = SequencePacker(8)
    for start in (0, 10, 20):
        packer.add_sequence(range(start, start + 8))
    packed = packer.pack(2)
    assert packed.num_batches == 2
    assert [packed.get_batch(i).batch_size for i in (0, 1)] == [2, 1]
    for index in (-1, 2):
        with pytest.raises(IndexError, match=r"0 \.\. 1"):
            packed.get_batch(index)


def test_long_sequence_is_divided_and_no_label_is_lost() -> None:
    packer = SequencePacker(4)
    packer.add_sequence(range(10))
    found = segments(packer.pack(1))
    assert [ids for ids, _ in found] == [[0, 1, 2, 3], [3, 4, 5, 6], [6, 7, 8, 9]]
    assert sorted(x for _, labels in found for x in labels if x != IGNORED) == list(range(1, 10))


def test_long_sequence_is_cut_if_asked_and_counted() -> None:
    packer = SequencePacker(4, truncate=True)
    packer.add_sequence(range(10))
    packer.add_sequence(range(4))
    packed = packer.pack(2)
    assert [ids for ids, _ in segments(packed)] == [[0, 1, 2, 3], [0, 1, 2, 3]]
    assert packed.stats.cut == 6
    assert packed.stats.pieces == 2


def test_only_trained_tokens_are_labels() -> None:
    packer = SequencePacker(4)
    packer.add_sequence([1, 2, 3, 4, 5, 6], trained=[True, False, True, False, True, True])
    packed = packer.pack(1)
    assert segments(packed) == [([1, 2, 3, 4], [IGNORED, 3, IGNORED, IGNORED]), ([4, 5, 6], [5, 6, IGNORED])]
    assert packed.stats.labels == 3


def test_packing_is_deterministic_and_takes_a_copy() -> None:
    def packed() -> PackedBatches:
        rng = np.random.default_rng(4)
        packer = SequencePacker(64)
        for length in rng.integers(1, 100, 200):
            tokens = rng.integers(0, 257, length)
            packer.add_sequence(tokens)
            tokens[:] = 0
        result = packer.pack(4)
        packer.add_sequence([1, 2, 3])
        assert packer.pack(4).stats.sequences == result.stats.sequences + 1
        return result

    first, second = packed(), packed()
    assert first.stats == second.stats
    assert first.stats.padding_fraction < 0.02
    for i in range(first.num_batches):
        assert np.array_equal(first.get_batch(i).input_ids, second.get_batch(i).input_ids)
    assert first.get_batch(0).input_ids.any()


def test_wrong_arguments() -> None:
    packer = SequencePacker(8)
    with pytest.raises(ConfigError, match="nothing to pack"):
        packer.pack(1)
    with pytest.raises(DataError, match="sequence 0 is empty"):
        packer.add_sequence([])
    with pytest.raises(DataError, match="id -1 at offset 1"):
        packer.add_sequence([1, -1])
    with pytest.raises(TypeError, match="trained must be bool"):
        packer.add_sequence([1, 2], trained=[0, 1])
    with pytest.raises(DataError, match=r"trained has shape \(1,\)"):
        packer.add_sequence([1, 2], trained=[True])
    assert packer.num_sequences == 0
    with pytest.raises(ConfigError, match=r"max_seq_len \(1\) must be at least 2"):
        SequencePacker(1)
