"""Token files and batches: what is in the file comes out, once each, in an order that can be resumed anywhere."""

import os
import struct
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from abi_py.data import IGNORE_INDEX, IGNORE_LABEL, TokenizedDataset
from abi_py.data.sources import look_alike
from abi_py.errors import ConfigError, DataError

U32 = st.integers(0, (1 << 32) - 1)


def numbered(n: int) -> TokenizedDataset:
    """Tokens 0, 1, 2...: each label says which token of the file it is."""
    return TokenizedDataset.from_slice(np.arange(n))


# -- the file ---------------------------------------------------------------------------------------


@settings(max_examples=40)
@given(st.lists(U32, min_size=1, max_size=200))
def test_file_is_raw_little_endian_u32(tmp_path_factory: pytest.TempPathFactory, tokens: list[int]) -> None:
    path = tmp_path_factory.mktemp("tokens") / "train.bin"
    TokenizedDataset.from_slice(tokens).save(path)
    assert path.read_bytes() == struct.pack(f"<{len(tokens)}I", *tokens)
    loaded = TokenizedDataset.load(path, vocab_size=1 << 32)
    assert loaded.tokens.tolist() == tokens
    assert len(loaded) == len(tokens)
    assert loaded.fingerprint() == TokenizedDataset.from_slice(tokens).fingerprint()


@settings(max_examples=40)
@example(b"%PDF-")
@given(st.binary(max_size=70))
def test_any_bytes_load_or_are_an_error_with_the_size(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    path = tmp_path_factory.mktemp("tokens") / "any.bin"
    path.write_bytes(content)
    if look_alike(content):
        with pytest.raises(DataError, match="not a file of u32 token ids"):
            TokenizedDataset.load(path, vocab_size=1 << 32)
        return
    if content and len(content) % 4 == 0:
        assert TokenizedDataset.load(path, vocab_size=1 << 32).tokens.astype("<u4").tobytes() == content
        return
    cut = rf"size is {len(content)} bytes?,|size is no multiple of 4; it is (text|likely)"
    with pytest.raises(DataError, match=cut if content else "is empty"):
        TokenizedDataset.load(path)


def test_load_maps_the_file_and_does_not_read_it(tmp_path: Path) -> None:
    path = tmp_path / "huge.bin"
    with open(path, "wb") as file:
        file.truncate(1 << 38)  # 256 GB of zeros, of which the disk stores nothing
    dataset = TokenizedDataset.load(path, vocab_size=5)
    assert len(dataset) == 1 << 36
    iterator = dataset.batches(2, 8)
    iterator.seek(iterator.num_batches - 1)
    assert iterator.next() is not None
    assert iterator.next() is None
    with pytest.raises(ValueError, match="read-only"):
        dataset.tokens[0] = 1


def test_missing_file_and_directory_pass_through(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        TokenizedDataset.load(tmp_path / "absent.bin")
    with pytest.raises(OSError):
        TokenizedDataset.load(tmp_path)


def test_failed_save_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "train.bin"
    numbered(10).save(path)
    before = path.read_bytes()

    def no_space(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", no_space)
    with pytest.raises(OSError, match="No space"):
        numbered(99).save(path)
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["train.bin"]


def test_saving_over_the_mapped_file_keeps_the_map(tmp_path: Path) -> None:
    path = tmp_path / "train.bin"
    numbered(100).save(path)
    train, _ = TokenizedDataset.load(path).split(0.5)
    train.save(path)
    assert TokenizedDataset.load(path).tokens.tolist() == list(range(50)) == train.tokens.tolist()


def test_save_does_not_replace_a_device() -> None:
    with pytest.raises(DataError, match="not a regular file"):
        numbered(4).save(os.devnull)


# -- ids --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tokens", "error", "message"),
    [
        ([1, 2, -100], DataError, "id -100 at offset 2"),
        ([1, 1 << 32], DataError, "id 4294967296 at offset 1"),
        ([1.5, 2.0], TypeError, "float64"),
        ([[1, 2], [3, 4]], TypeError, r"shape \(2, 2\)"),
        ([True, False], TypeError, "bool"),
        ([], DataError, "no tokens"),
    ],
)
def test_ids_that_are_none(tokens: list, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        TokenizedDataset.from_slice(tokens)


def test_uint32_is_not_copied_and_not_locked() -> None:
    tokens = np.arange(9, dtype=np.uint32)
    dataset = TokenizedDataset.from_slice(tokens)
    assert np.shares_memory(dataset.tokens, tokens)
    assert tokens.flags.writeable


def test_ignore_label_has_the_bits_of_minus_100() -> None:
    assert np.array([IGNORE_LABEL]).view(np.int32)[0] == IGNORE_INDEX == -100


@settings(max_examples=60)
@given(st.data())
def test_bad_id_is_found_when_its_row_comes(data: st.DataObject) -> None:
    n, B, S = data.draw(st.integers(2, 60)), data.draw(st.integers(1, 4)), data.draw(st.integers(1, 9))
    at = data.draw(st.integers(0, n - 1))
    tokens = np.ones(n, np.uint32)
    tokens[at] = 300
    dataset = TokenizedDataset.from_slice(tokens, vocab_size=257, name="train.bin")
    message = rf"train\.bin: token {at} \(byte {4 * at}\) is id 300, but ids must be below vocab_size \(257\); .*301"
    with pytest.raises(DataError, match=message):
        list(dataset.batches(B, S, drop_last=False))
    with pytest.raises(DataError, match=message):
        dataset.check_vocab()
    assert dataset.check_vocab(301) == 300
    assert len(list(dataset.batches(B, S, drop_last=False, vocab_size=301))) == dataset.num_batches(B, S, False)


def test_bad_id_in_a_part_has_its_offset_in_the_file() -> None:
    tokens = np.zeros(20, np.uint32)
    tokens[15] = 9
    train, valid = TokenizedDataset.from_slice(tokens, vocab_size=9).split(0.5)
    assert train.check_vocab() == 0
    with pytest.raises(DataError, match=r"token 15 \(byte 60\)"):
        valid.check_vocab()
    with pytest.raises(DataError, match=r"token 15 \(byte 60\)"):
        list(valid.batches(1, 3, drop_last=False))
    with pytest.raises(DataError, match=r"token 15 \(byte 60\)"):
        valid.split(0.5)[1].check_vocab()


# -- split ------------------------------------------------------------------------------------------


@given(st.integers(4, 500), st.floats(0.01, 0.99))
def test_split_shares_nothing_loses_nothing_copies_nothing(n: int, fraction: float) -> None:
    dataset = numbered(n)
    at = round(n * fraction)
    if not 2 <= at <= n - 2:
        with pytest.raises(DataError, match="at least 2"):
            dataset.split(fraction)
        return
    train, valid = dataset.split(fraction)
    assert len(train) == at
    assert [*train.tokens, *valid.tokens] == list(range(n))
    assert np.shares_memory(train.tokens, dataset.tokens)
    assert np.shares_memory(valid.tokens, dataset.tokens)


@pytest.mark.parametrize("fraction", [0.0, 1.0, -0.1, 1.5, float("nan")])
def test_split_outside_of_0_to_1(fraction: float) -> None:
    with pytest.raises(ConfigError, match="fraction"):
        numbered(100).split(fraction)


def test_what_a_data_set_of_tokens_says_of_itself():
    data = TokenizedDataset.from_slice([1, 2, 3], name="a.bin")
    assert (data.conversations, data.longest_row, data.num_tokens, data.example()) == (False, 3, 3, None)
    assert data.summary() == "a.bin: 3 tokens"
