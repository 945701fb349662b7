"""A token file of another type is refused by name, with the line that converts it; what is u32 is never refused."""

import io
import pickle
import zipfile
from pathlib import Path

import numpy as np
import pytest

from abi_py.data import TokenizedDataset
from abi_py.errors import DataError

IDS = np.random.default_rng(0).zipf(1.3, 3000).clip(max=50_256).astype("<u4")  # as ids are: mostly small


@pytest.mark.parametrize(
    ("dtype", "named"),
    [
        ("<i8", "every second id is 0; it is likely int64"),
        (">i8", "likely big-endian int64"),
        ("<u2", "likely uint16"),
        (">u2", "likely big-endian uint16"),
        (">u4", "likely big-endian u32"),
        ("<f4", "likely float32"),
    ],
)
@pytest.mark.parametrize("count", [3000, 100, 41])
def test_other_types_are_named_and_the_remedy_works(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: str, named: str, count: int
) -> None:
    monkeypatch.chdir(tmp_path)
    ids = IDS[:count]
    ids.astype(dtype).tofile("train.bin")
    with pytest.raises(DataError, match=named) as caught:
        TokenizedDataset.load("train.bin")
    exec("import numpy; " + str(caught.value).split("convert it with ")[1])
    assert TokenizedDataset.load("NEW.bin").tokens.tolist() == ids.tolist()


def test_labels_that_do_not_count_may_be_in_an_int64_file(tmp_path: Path) -> None:
    np.where(np.arange(100) % 3 == 0, -100, IDS[:100].astype("<i8")).tofile(tmp_path / "a.bin")
    with pytest.raises(DataError, match="likely int64"):
        TokenizedDataset.load(tmp_path / "a.bin")


@pytest.mark.parametrize("text", ["Once upon a time.\n" * 100, "Grüße, 世界!\n" * 50, "odd"])
def test_a_text_called_bin(tmp_path: Path, text: str) -> None:
    (tmp_path / "a.bin").write_text(text, encoding="utf-8")
    with pytest.raises(DataError, match=r"a\.bin is no file of u32 token ids: .*; it is text: give it another name"):
        TokenizedDataset.load(tmp_path / "a.bin", vocab_size=257)


@pytest.mark.parametrize(
    "ids",
    [IDS, IDS[:1], np.zeros(100, "<u4"), np.tile(IDS[:1], 64), np.arange(100), np.full(50, 262_143), [256, 0] * 20],
    ids=range(7),
)
def test_ids_are_never_taken_for_another_type(tmp_path: Path, ids: np.ndarray) -> None:
    np.asarray(ids, "<u4").tofile(tmp_path / "a.bin")
    assert TokenizedDataset.load(tmp_path / "a.bin").tokens.tolist() == list(ids)


def test_a_large_id_needs_a_vocabulary_that_has_it(tmp_path: Path) -> None:
    np.array([5, 600_000, 7], "<u4").tofile(tmp_path / "a.bin")
    with pytest.raises(DataError, match="ids as large as 600,000"):
        TokenizedDataset.load(tmp_path / "a.bin", vocab_size=1000)
    assert TokenizedDataset.load(tmp_path / "a.bin", vocab_size=600_001).tokens.tolist() == [5, 600_000, 7]


def archive() -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as packed:
        packed.writestr("a.txt", "text")
    return file.getvalue()


def npy() -> bytes:
    file = io.BytesIO()
    np.save(file, IDS)
    return file.getvalue()


# Every format as its own writer begins it.
LOOK_ALIKES = {
    "a NumPy array": npy(),
    "a zip archive": archive(),
    "a PDF document": b"%PDF-1.7\n%\xe2\xe3\xcf\xd3\n",
    "a pickle": pickle.dumps([1, 2, 3]),
    "a pickle, which": pickle.dumps({"ids": [1]}, protocol=2),
    "a model in safetensors": b"\x37" + bytes(7) + b'{"w":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}' + bytes(4),
    "a model in GGUF": b"GGUF\x03\0\0\0" + b"\0" * 16,
    "packed by xz": b"\xfd7zXZ\0\0\x04",
    "a picture": b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR",
}  # fmt: skip


@pytest.mark.parametrize("what", LOOK_ALIKES)
def test_other_kinds_of_files_are_refused_by_name(tmp_path: Path, what: str) -> None:
    from abi_py.data import load_text_corpus

    for name, found in (("a.bin", TokenizedDataset.load), ("a.txt", load_text_corpus), ("a.jsonl", load_text_corpus)):
        (tmp_path / name).write_bytes(LOOK_ALIKES[what])
        with pytest.raises(DataError, match=rf"{name} is {what}") as caught:
            found(tmp_path / name)
        assert "\n" not in str(caught.value)
