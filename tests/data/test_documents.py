"""Documents: JSONL rows, what is left out of directories, UTF-8, and the digests that recognise the same data."""

import io
import json
import os
from pathlib import Path

import pytest

from abi_py.data.documents import Documents, TextFormat, list_inputs
from abi_py.errors import DataError


def read(*inputs: object, **settings: object) -> list[tuple[str, bytes]]:
    documents = Documents([str(each) for each in inputs], **settings)  # type: ignore[arg-type]
    return [(Path(document.name).name, b"".join(document.blocks)) for document in documents]


def jsonl(path: Path, *rows: object) -> Path:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def test_rows_are_documents(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "a.jsonl", {"text": "one\ntwo"}, "", {"id": 3, "text": "h\u00e9"}, {"text": ""})
    documents = Documents([path])
    assert [(d.name, b"".join(d.blocks)) for d in documents] == [
        (f"{path}:1", b"one\ntwo"),
        (f"{path}:3", "h\u00e9".encode()),
    ]
    assert (documents.empty_rows, documents.bad_rows, documents.bytes_read) == (1, 0, path.stat().st_size)
    assert read(path, format=TextFormat.TEXT) == [("a.jsonl", path.read_bytes())]
    other = tmp_path / "a.txt"
    other.write_bytes(b"\xef\xbb\xbf" + b'{"content": "x"}')  # a byte order mark, no end of line
    assert read(other, format=TextFormat.JSONL, field="content") == [("a.txt:1", b"x")]
    assert [text for _, text in read("-", stdin=io.BytesIO(b"from a pipe"))] == [b"from a pipe"]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ('{"text": ', "not a JSON object: Expecting value at column 10"),
        ("[1]", "a row must be a JSON object, found a list"),
        ({"prompt": "x", "id": 1}, "found the keys 'prompt', 'id'; expected 'text' or .*--field"),
        ({}, "found the keys none"),
        ({"text": None}, "'text' must be a string, found null"),
        ('{"text": "a\\ud800"}', r"'text' holds \\ud800, half of a character, at character 1"),
    ],
)
def test_bad_rows(tmp_path: Path, row: object, message: str) -> None:
    path = jsonl(tmp_path / "a.jsonl", {"text": "good"}, row, {"text": "good too"})
    with pytest.raises(DataError, match=message) as caught:
        read(path)
    assert f"{path}:2" in str(caught.value)
    documents = Documents([path], skip_bad_rows=True)
    assert [b"".join(d.blocks) for d in documents] == [b"good", b"good too"]
    assert documents.bad_rows == 1
    assert f"{path}:2" in documents.first_bad_row


def test_a_row_that_is_not_utf8(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "\xff"}\n')
    with pytest.raises(DataError, match=r"a\.jsonl:1: not a JSON object: byte 10 is not UTF-8"):
        read(tmp_path / "a.jsonl")


def test_nothing_left_says_why(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "a.jsonl", "{", {"text": ""})
    documents = Documents([path], skip_bad_rows=True)
    assert list(documents) == []
    assert "left out: 1 empty row and 1 bad one, the first bad one" in str(documents.nothing_left())
    for name, text in (("array.json", "[]"), ("wrapper.json", '{"data": []}'), ("blank.jsonl", "\n\n")):
        (tmp_path / name).write_text(text)
        documents = Documents([tmp_path / name])
        assert list(documents) == []
        assert f"{name} holds no text: there is no row in it; " in str(documents.nothing_left())


def test_utf8_is_asked_for_in_directories_only(tmp_path: Path) -> None:
    (tmp_path / "good.txt").write_text("h\u00e9")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9 ol\xe9")
    (tmp_path / "cut.txt").write_bytes(b"h\xc3")
    documents = Documents([tmp_path], utf8=True)
    assert [Path(d.name).name for d in documents] == ["good.txt"]
    assert [os.path.basename(text) for text in documents.skipped] == [
        "cut.txt is not UTF-8 at byte 1",
        "latin.txt is not UTF-8 at byte 3",
    ]
    assert len(read(tmp_path)) == 3
    assert len(read(tmp_path / "latin.txt", utf8=True)) == 1  # who reads it says where it is wrong


def test_token_files_in_a_directory_are_no_documents(tmp_path: Path) -> None:
    for name in ("a.txt", "train.bin", "train.bin.json", "other.json", "odd.bin"):
        (tmp_path / name).write_text("text")
    assert [name for name, _ in read(tmp_path)] == ["a.txt", "odd.bin", "other.json"]


def test_content_is_what_was_read(tmp_path: Path) -> None:
    def content(*inputs: Path, **settings: object) -> str:
        documents = Documents(inputs, **settings)  # type: ignore[arg-type]
        for document in documents:
            next(document.blocks)
        return documents.content

    a, b = jsonl(tmp_path / "a.jsonl", {"text": "x"}), jsonl(tmp_path / "b.txt", {"text": "y"})
    same = content(a, b)
    os.utime(a, (1, 1))
    assert content(a, b) == same
    assert content(b, a) != same
    assert content(a, b, format=TextFormat.TEXT) != same
    jsonl(a, {"text": "z"})
    assert content(a, b) != same


def test_a_listing_sees_size_time_and_name(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("abc")
    os.utime(path, (1, 1))
    first = list_inputs([tmp_path])
    assert first is not None
    assert (first.files, first.bytes) == (1, 3)
    assert list_inputs([path]) == first
    os.utime(path, (1, 2))
    assert list_inputs([path]) != first
    os.utime(path, (1, 1))
    assert list_inputs([path]) == first
    path.rename(tmp_path / "b.txt")
    assert list_inputs([tmp_path]) != first
    assert list_inputs(["-"]) is None
