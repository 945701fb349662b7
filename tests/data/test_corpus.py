"""Byte-level text: encoding loses nothing, files are chosen as documented, and tokenizing is atomic and streams."""

import io
import os
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from abi_py.data import (
    BYTE_VOCAB_SIZE,
    END_OF_DOCUMENT,
    TokenizedDataset,
    byte_tokens,
    corpus,
    decode_bytes,
    documents,
    load_text_corpus,
    open_corpus,
    standard_library_corpus,
    tokenize_to_file,
)
from abi_py.errors import ConfigError, DataError

END = END_OF_DOCUMENT


@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_text_round_trip(text: str) -> None:
    ids = byte_tokens(text)
    assert ids.dtype == np.uint32
    assert ids.tolist() == list(text.encode())
    assert decode_bytes(ids) == text
    assert decode_bytes([*ids.tolist(), END]) == text


def test_what_is_no_text_decodes_to_replacement_characters() -> None:
    assert decode_bytes([104, 255, 105]) == "h\ufffdi"
    assert decode_bytes([104, 257, 105, 4_000_000_000]) == "h\ufffdi\ufffd"
    assert decode_bytes([104, END, 105]) == "hi"
    assert decode_bytes([]) == ""
    assert decode_bytes(np.array([0xC3], np.int64)) == "\ufffd"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    root = tmp_path / "text"
    (root / "sub").mkdir(parents=True)
    (root / ".git").mkdir()
    (root / "__pycache__").mkdir()
    (root / "b.txt").write_bytes(b"bb")
    (root / "a.md").write_bytes(b"a\xc3\xa9")
    (root / "sub" / "c").write_bytes(b"c")
    (root / ".git" / "config").write_bytes(b"hidden")
    (root / ".hidden").write_bytes(b"hidden")
    (root / "__pycache__" / "x.pyc").write_bytes(b"cache")
    (root / "picture.png").write_bytes(b"PNG\0\0")
    (root / "empty.txt").write_bytes(b"")
    os.mkfifo(root / "pipe")  # opening it would wait for ever
    return root


FOLDER_TOKENS = [97, 0xC3, 0xA9, END, 98, 98, END, 99, END]


def test_directory_is_read_in_order_and_what_is_left_out_is_named(folder: Path) -> None:
    dataset = load_text_corpus(folder)
    assert dataset.tokens.tolist() == FOLDER_TOKENS
    assert dataset.vocab_size == BYTE_VOCAB_SIZE == 257
    assert dataset.check_vocab() == END
    reasons = {Path(message.split(": ")[0].split(" is ")[0]).name: message for message in dataset.skipped}
    assert sorted(reasons) == ["empty.txt", "picture.png", "pipe"]
    assert "byte 3 is zero" in reasons["picture.png"]


def test_one_file_is_one_document(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(b"hello\n")
    assert load_text_corpus(path).tokens.tolist() == [*b"hello\n", END]


def test_open_corpus_chooses_by_what_is_there(folder: Path, tmp_path: Path) -> None:
    tokens = tmp_path / "train.bin"
    TokenizedDataset.from_slice([5, 300, 2]).save(tokens)
    assert open_corpus(tokens).tokens.tolist() == [5, 300, 2]
    assert open_corpus(str(tokens), vocab_size=9).vocab_size == 9
    assert open_corpus(folder).tokens.tolist() == FOLDER_TOKENS
    assert open_corpus(folder / "b.txt").tokens.tolist() == [98, 98, END]
    for name in ("absent.bin", "absent.txt"):
        with pytest.raises(FileNotFoundError):
            open_corpus(tmp_path / name)
    with pytest.raises(DataError, match=r"picture\.png is not text: byte 3 is zero; .*\.bin"):
        open_corpus(folder / "picture.png")
    with pytest.raises(DataError, match=r"empty\.txt is empty"):
        open_corpus(folder / "empty.txt")
    (folder.parent / "nothing").mkdir()
    with pytest.raises(DataError, match="holds no text: it has no files"):
        open_corpus(folder.parent / "nothing")
    for name in ("a.md", "b.txt", "sub/c"):
        (folder / name).unlink()
    with pytest.raises(DataError, match="left out: 3 files, the first: "):
        open_corpus(folder)


def test_unreadable_file_is_counted_in_a_directory_and_an_error_by_name(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(path: Path, mode: str) -> object:
        if Path(path).name == "b.txt":
            raise PermissionError(13, "Permission denied", str(path))
        return open(path, mode)

    monkeypatch.setattr(documents, "open", refuse, raising=False)
    assert any("b.txt: Permission denied" in message for message in load_text_corpus(folder).skipped)
    with pytest.raises(PermissionError):
        load_text_corpus(folder / "b.txt")


# -- tokenize ---------------------------------------------------------------------------------------


def test_tokenize_gives_what_load_text_corpus_gives(folder: Path, tmp_path: Path) -> None:
    output = tmp_path / "out.bin"
    report = tokenize_to_file([folder, folder / "b.txt", "-"], output, stdin=io.BytesIO(b"in"))
    assert TokenizedDataset.load(output).tokens.tolist() == [*FOLDER_TOKENS, 98, 98, END, *b"in", END]
    assert (report.documents, report.bytes, report.tokens, len(report.skipped)) == (5, 10, 15, 3)
    assert output.stat().st_size == 4 * report.tokens


def test_tokenize_output_inside_its_input(folder: Path) -> None:
    for _ in range(2):  # the second time the first result lies there, and is no text
        tokenize_to_file([folder], folder / "out.bin")
        assert TokenizedDataset.load(folder / "out.bin").tokens.tolist() == FOLDER_TOKENS


@pytest.mark.parametrize("bad", ["absent.txt", "picture.png"])
def test_tokenize_fails_whole(folder: Path, tmp_path: Path, bad: str) -> None:
    output = tmp_path / "out.bin"
    output.write_bytes(b"old!")
    with pytest.raises((DataError, FileNotFoundError)):
        tokenize_to_file([folder, folder / bad], output)
    assert output.read_bytes() == b"old!"
    assert sorted(os.listdir(tmp_path)) == ["out.bin", "text"]


def test_tokenize_nothing(tmp_path: Path) -> None:
    for inputs, message in (([], "the list of inputs holds no text"), (["-"], "standard input is empty")):
        with pytest.raises(DataError, match=message):
            tokenize_to_file(inputs, tmp_path / "out.bin", stdin=io.BytesIO(b""))
    assert os.listdir(tmp_path) == []
    (tmp_path / "a.txt").write_bytes(b"a")
    with pytest.raises(DataError, match="not a regular file"):
        tokenize_to_file([tmp_path / "a.txt"], os.devnull)


class EndlessText(io.RawIOBase):
    """64 MB that exist nowhere."""

    left = 64 << 20

    def read(self, size: int = -1) -> bytes:
        size = min(size, self.left)
        self.left -= size
        return b"x" * size


def test_tokenize_streams(tmp_path: Path) -> None:
    tracemalloc.start()
    try:
        report = tokenize_to_file(["-"], tmp_path / "out.bin", stdin=EndlessText())  # type: ignore[arg-type]
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert report.bytes == 64 << 20
    assert (tmp_path / "out.bin").stat().st_size == 4 * (report.bytes + 1)
    assert peak < 20 << 20


# -- the text that is on every machine --------------------------------------------------------------


def test_standard_library_is_the_same_each_time_and_of_the_wanted_size() -> None:
    first, again = standard_library_corpus(1 << 20), standard_library_corpus(1 << 20)
    assert np.array_equal(first.tokens, again.tokens)
    documents = int(np.count_nonzero(first.tokens == END))
    assert (1 << 20) - 4 <= len(first) - documents <= 1 << 20
    assert documents > 20
    assert first.vocab_size == BYTE_VOCAB_SIZE
    train, valid = first.split(0.9)
    for part in (train, valid):
        assert "self" in decode_bytes(part.tokens)  # both parts have code


def test_limit_does_not_cut_through_a_character(monkeypatch: pytest.MonkeyPatch) -> None:
    documents = [("a", b"ab"), ("b", "é".encode() * 5), ("c", b"c")]
    monkeypatch.setattr(corpus, "_library_documents", lambda: iter(documents))
    assert sorted(decode_bytes(standard_library_corpus(5).tokens)) == ["a", "b", "é"]
    assert len(standard_library_corpus(13)) == 16
    with pytest.raises(ConfigError, match="limit_bytes"):
        standard_library_corpus(0)


def test_without_documentation_and_without_sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> None:
        raise ImportError(name)

    monkeypatch.setattr(corpus.importlib, "import_module", absent)
    assert len(standard_library_corpus(100_000)) > 100_000
    monkeypatch.setattr(corpus, "_library_folder", lambda: tmp_path / "python311.zip")
    with pytest.raises(DataError, match=r"no sources of the standard library found in .*python311\.zip; give a text"):
        standard_library_corpus()


def test_tests_and_installed_packages_are_not_in_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("_b.py", "a.py", "z.py", "test/t.py", "idlelib/i.py", "site-packages/p.py", "json/j.py", "note.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(f"# {name}\n")
    (tmp_path / "broken.py").symlink_to(tmp_path / "absent.py")
    monkeypatch.setattr(corpus, "_library_folder", lambda: tmp_path)
    names = [name for name, _ in corpus._library_documents() if not name.startswith("topic")]
    assert names == ["a.py", "json/j.py", "z.py", "_b.py"]
