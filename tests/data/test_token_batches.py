"""Batches of token ids: every label comes once, in an order that can be resumed at any batch."""

import io
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from abi_py.data import IGNORE_LABEL, Batch, BatchIterator, DataLoader, TokenizedDataset
from abi_py.errors import ConfigError, DataError


def numbered(n: int) -> TokenizedDataset:
    """Tokens 0, 1, 2...: each label says which token of the file it is."""
    return TokenizedDataset.from_slice(np.arange(n))


def labels_of(iterator: BatchIterator) -> list[int]:
    seen: list[int] = []
    for batch in iterator:
        counted = batch.labels != IGNORE_LABEL
        assert np.array_equal(batch.labels[counted], batch.input_ids[counted] + 1)
        assert batch.num_tokens == counted.sum()
        seen += batch.labels[counted].tolist()
    return seen


def same(a: Batch, b: Batch) -> bool:
    return np.array_equal(a.input_ids, b.input_ids) and np.array_equal(a.labels, b.labels)


@pytest.mark.parametrize(("n", "B", "S", "batches"), [(10, 2, 2, 2), (13, 2, 3, 2), (8, 4, 2, 0), (9, 4, 2, 1)])
def test_number_of_batches_as_in_abi(n: int, B: int, S: int, batches: int) -> None:
    dataset = numbered(n)
    assert dataset.num_batches(B, S, drop_last=True) == batches
    if batches:
        assert len(list(dataset.batches(B, S, drop_last=True))) == batches
    else:
        with pytest.raises(DataError, match=f"no batch of {B} rows of {S} comes of {n} tokens: it needs at least"):
            dataset.batches(B, S, drop_last=True)
    assert dataset.num_batches(B, S) == len(list(dataset.batches(B, S)))  # of all


def test_labels_are_the_window_shifted_by_one() -> None:
    batch = numbered(10).batches(2, 3, shuffle=False, drop_last=True).next()
    assert batch is not None
    assert batch.input_ids.tolist() == [[0, 1, 2], [3, 4, 5]]
    assert batch.labels.tolist() == [[1, 2, 3], [4, 5, 6]]
    assert batch.attention_mask is None
    assert batch.segment_ids is None
    assert (batch.batch_size, batch.seq_len, batch.num_tokens) == (2, 3, 6)
    for array in (batch.input_ids, batch.labels):
        assert array.dtype == np.dtype(np.uint32)
        assert array.dtype.isnative
        assert array.flags.c_contiguous
        assert array.flags.writeable


def test_short_row_is_padded_and_masked() -> None:
    (batch,) = numbered(6).batches(3, 4, shuffle=False, drop_last=False)
    pad = int(IGNORE_LABEL)
    assert batch.input_ids.tolist() == [[0, 1, 2, 3], [4, 0, 0, 0]]
    assert batch.labels.tolist() == [[1, 2, 3, 4], [5, pad, pad, pad]]
    assert batch.attention_mask is not None
    assert batch.attention_mask.tolist() == [[1, 1, 1, 1], [1, 0, 0, 0]]
    assert batch.num_tokens == 5


@settings(max_examples=80)
@given(st.integers(2, 200), st.integers(1, 6), st.integers(1, 17), st.booleans(), st.integers(0, 3))
def test_without_drop_last_every_label_comes_once(n: int, B: int, S: int, shuffle: bool, epoch: int) -> None:
    iterator = numbered(n).batches(B, S, shuffle=shuffle, seed=5, drop_last=False)
    iterator.set_epoch(epoch)
    seen = labels_of(iterator)
    assert sorted(seen) == list(range(1, n))
    assert iterator.dropped_tokens == 0


@settings(max_examples=80)
@given(st.integers(2, 200), st.integers(1, 6), st.integers(1, 17), st.booleans())
def test_with_drop_last_batches_are_full_and_the_rest_is_counted(n: int, B: int, S: int, shuffle: bool) -> None:
    dataset = numbered(n)
    if dataset.num_batches(B, S, drop_last=True) == 0:
        return
    iterator = dataset.batches(B, S, shuffle=shuffle, drop_last=True)
    seen = labels_of(iterator)
    assert len(seen) == len(set(seen)) == iterator.num_batches * B * S
    assert len(seen) + iterator.dropped_tokens == n - 1
    assert iterator.dropped_tokens < B * S


def test_what_is_dropped_changes_with_the_epoch() -> None:
    iterator = numbered(1 + 7 * 4).batches(2, 4, drop_last=True)  # 7 rows, batches of 2: one row is left out
    seen: set[int] = set()
    for _ in range(8):
        seen.update(labels_of(iterator))
        iterator.reset()
    assert seen == set(range(1, 29))


def test_rows_are_shuffled_not_only_batches() -> None:
    batches = list(numbered(1 + 64 * 4).batches(8, 4, seed=1))
    starts = np.stack([batch.input_ids[:, 0] // 4 for batch in batches]).astype(np.int64)  # (8 batches, 8 rows)
    assert sorted(starts.reshape(-1).tolist()) == list(range(64))
    neighbours = int(np.count_nonzero(np.diff(starts, axis=1) == 1))
    assert neighbours < 8


def test_epochs_and_seeds_give_other_orders_and_the_same_give_the_same() -> None:
    def order(seed: int, epoch: int) -> list[int]:
        iterator = numbered(1 + 30 * 2).batches(3, 2, seed=seed)
        iterator.set_epoch(epoch)
        return labels_of(iterator)

    orders = [order(seed, epoch) for seed in (0, 1) for epoch in (0, 1, 2)]
    assert len({tuple(o) for o in orders}) == 6
    assert order(1, 2) == orders[-1]


def test_without_a_seed_each_call_gives_the_next_epoch() -> None:
    def seeded(epoch: int) -> list[int]:
        iterator = numbered(61).batches(3, 2, seed=0)
        iterator.set_epoch(epoch)
        return labels_of(iterator)

    dataset, loader = numbered(61), DataLoader(numbered(61), batch_size=3, seq_len=2, drop_last=False)
    for epoch in range(3):
        assert labels_of(dataset.batches(3, 2)) == labels_of(loader.iterator()) == seeded(epoch)
    assert labels_of(dataset.batches(3, 2, shuffle=False)) == list(range(1, 61))


def test_reset_is_the_next_epoch() -> None:
    iterator = numbered(50).batches(2, 3)
    list(iterator)
    assert iterator.position == iterator.num_batches
    assert iterator.next() is None
    assert list(iterator) == []
    iterator.reset()
    assert (iterator.epoch, iterator.position) == (1, 0)
    other = numbered(50).batches(2, 3)
    other.set_epoch(1)
    assert all(same(a, b) for a, b in zip(iterator, other, strict=True))


@settings(max_examples=40)
@given(st.integers(20, 150), st.integers(1, 4), st.integers(1, 4), st.booleans(), st.booleans(), st.data())
def test_resume_at_any_batch(n: int, B: int, S: int, shuffle: bool, drop_last: bool, data: st.DataObject) -> None:
    def fresh() -> BatchIterator:
        return numbered(n).batches(B, S, shuffle=shuffle, seed=9, drop_last=drop_last)

    whole = fresh()
    whole.set_epoch(3)
    stop = data.draw(st.integers(0, whole.num_batches))
    for _ in range(stop):
        whole.next()
    state = whole.state_dict()
    resumed, sought = fresh(), fresh()
    resumed.load_state_dict(state)
    sought.set_epoch(3)
    sought.seek(stop)
    rest = list(whole)
    assert len(rest) == whole.num_batches - stop
    for other in (resumed, sought):
        batches = list(other)
        assert all(same(a, b) for a, b in zip(rest, batches, strict=True))


def test_order_blocks_do_not_show(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = [batch.input_ids for batch in numbered(400).batches(7, 3, seed=2, drop_last=False)]
    monkeypatch.setattr("abi_py.data.token_batches.ORDER_BLOCK", 5)
    small = [batch.input_ids for batch in numbered(400).batches(7, 3, seed=2, drop_last=False)]
    assert all(np.array_equal(a, b) for a, b in zip(whole, small, strict=True))


def test_batches_own_their_arrays() -> None:
    iterator = numbered(100).batches(2, 4, shuffle=False)
    first = iterator.next()
    assert first is not None
    copy = first.input_ids.copy()
    iterator.next()
    assert np.array_equal(first.input_ids, copy)
    first.input_ids[:] = 77
    iterator.seek(0)
    again = iterator.next()
    assert again is not None
    assert np.array_equal(again.input_ids, copy)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"batch_size": 3}, "batch_size is 2 here but 3"),
        ({"seed": 4}, "seed is 0 here but 4"),
        ({"num_tokens": 101}, "num_tokens is 100 here but 101"),
        ({"fingerprint": 1}, "fingerprint"),
        ({"position": 99}, "position"),
        ({"position": "x"}, "position"),
    ],
)
def test_state_of_another_run_is_refused(change: dict, message: str) -> None:
    iterator = numbered(100).batches(2, 5)
    iterator.seek(4)
    with pytest.raises((DataError, ConfigError, TypeError), match=message):
        iterator.load_state_dict({**iterator.state_dict(), **change})
    assert (iterator.epoch, iterator.position) == (0, 4)
    with pytest.raises(DataError, match="lacks fingerprint, seed"):
        iterator.load_state_dict({k: v for k, v in iterator.state_dict().items() if k not in ("seed", "fingerprint")})


def test_state_is_plain(tmp_path: Path) -> None:
    import json

    state = numbered(100).batches(np.int64(2), np.int32(5), seed=np.uint32(7)).state_dict()
    assert json.loads(json.dumps(state)) == state


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"batch_size": 0, "seq_len": 2}, ConfigError, r"batch_size \(0\) must be at least 1"),
        ({"batch_size": 2, "seq_len": -1}, ConfigError, r"seq_len \(-1\)"),
        ({"batch_size": 2, "seq_len": 2, "seed": -1}, ConfigError, r"seed \(-1\)"),
        ({"batch_size": 2.0, "seq_len": 2}, TypeError, "batch_size must be an integer"),
        ({"batch_size": True, "seq_len": 2}, TypeError, "batch_size must be an integer"),
        ({"batch_size": 2, "seq_len": 2, "vocab_size": 0}, ConfigError, r"vocab_size \(0\)"),
    ],
)
def test_wrong_arguments(arguments: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        numbered(100).batches(**arguments)


def test_seek_outside() -> None:
    iterator = numbered(11).batches(1, 5)
    iterator.seek(2)
    assert iterator.next() is None
    for position in (-1, 3):
        with pytest.raises(ConfigError, match="position"):
            iterator.seek(position)


def test_one_token_has_nothing_to_predict() -> None:
    with pytest.raises(DataError, match="use more text"):
        numbered(1).batches(1, 1, drop_last=False)


def test_batch_checks_its_arrays() -> None:
    ids = np.zeros((2, 3), np.uint32)
    with pytest.raises(TypeError, match="labels"):
        Batch(ids, ids[:, :2])
    with pytest.raises(TypeError, match="labels"):
        Batch(ids, ids.astype(np.int64))
    with pytest.raises(TypeError, match="segment_ids"):
        Batch(ids, ids, None, np.zeros((2, 3), np.int64))


def test_data_loader_has_the_defaults_of_abi() -> None:
    dataset = numbered(4 * 512 * 3 + 1)
    loader = DataLoader(dataset)
    assert (loader.batch_size, loader.seq_len, loader.shuffle, loader.drop_last) == (4, 512, True, True)
    assert (loader.num_batches(), loader.num_tokens()) == (3, 6145)
    first = list(loader.iterator())
    assert len(first) == 3
    assert all(same(a, b) for a, b in zip(first, dataset.batches(4, 512, seed=0, drop_last=True), strict=True))
    kept = DataLoader(numbered(30), batch_size=2, seq_len=4, drop_last=False, seed=3)
    assert len(list(kept.iterator())) == kept.num_batches() == 4


def test_messages_fit_on_one_line() -> None:
    stream = io.StringIO()
    few, nine = numbered(5), numbered(9)
    for call in (lambda: few.batches(4, 512, drop_last=True), numbered(3).split, lambda: nine.check_vocab(3)):
        with pytest.raises(ValueError) as error:
            call()
        print(error.value, file=stream)
    assert len(stream.getvalue().splitlines()) == 3
