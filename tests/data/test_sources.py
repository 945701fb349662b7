"""What a file is: packed or not, with a mark or not, under whatever name; and the rows of every shape of JSON."""

import gzip
import json
import os
import tracemalloc
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from abi_py.data import RowReader, json_rows, load_text_corpus, read_conversation
from abi_py.data.documents import Documents
from abi_py.data.json_rows import BadRow
from abi_py.data.rows import open_rows
from abi_py.data.selection import conversation_files
from abi_py.errors import ConfigError, DataError

TURNS = [{"role": "user", "content": "A"}, {"role": "assistant", "content": "B"}]
SHAREGPT = [{"from": "human", "value": "A"}, {"from": "gpt", "value": "B"}]


def texts(*inputs: Path, **settings: object) -> list[str]:
    documents = Documents(inputs, **settings)  # type: ignore[arg-type]
    return [b"".join(document.blocks).decode() for document in documents]


def values(source: object) -> list[object]:
    return [value for _, value in open_rows(source)[1]]  # type: ignore[arg-type]


# -- packed, marked, linked ---------------------------------------------------------------------


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.json"])
@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
def test_gz_and_marks_change_nothing(tmp_path: Path, name: str, mark: bytes) -> None:
    row = b'{"text": "one\\ntwo"}'
    content = {"a.txt": b"one\ntwo", "a.jsonl": row + b"\n", "a.json": b"[\n" + row + b"]"}[name]
    (tmp_path / name).write_bytes(mark + content)
    (tmp_path / f"{name}.gz").write_bytes(gzip.compress(mark + content))
    assert texts(tmp_path / name) == texts(tmp_path / f"{name}.gz") == ["one\ntwo"]
    assert load_text_corpus(tmp_path).tokens.tolist() == 2 * [*b"one\ntwo", 256]


def test_a_damaged_gz_names_the_file_and_the_place(tmp_path: Path) -> None:
    packed = gzip.compress(os.urandom(300_000).hex().encode())
    for name, content in (("cut.txt.gz", packed[:-1000]), ("odd.txt.gz", packed[:-8] + b"\0" * 8)):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(DataError, match=rf"{name}: its gzip data are damaged after byte \d+ of what they unpack"):
            texts(tmp_path / name)


def test_a_bomb_does_not_fill_the_memory(tmp_path: Path) -> None:
    row = b'{"text": "%s"}\n' % (b"x" * (1 << 16))
    with gzip.open(tmp_path / "a.jsonl.gz", "wb", compresslevel=1) as file:
        for _ in range(1024):  # 64 MB, in a file of 0.3
            file.write(row)
    tracemalloc.start()
    try:
        count = sum(len(b"".join(document.blocks)) for document in Documents([tmp_path / "a.jsonl.gz"]))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert count == 1 << 26
    assert peak < 16 << 20
    with pytest.raises(DataError, match="more than 1,048,576 bytes of text, too much to keep in memory"):
        texts(tmp_path / "a.jsonl.gz", limit=1 << 20)


def test_a_line_without_an_end_is_a_bad_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json_rows, "MAX_ROW", 1000)
    monkeypatch.setattr(json_rows, "READ", 100)
    lines = ['{"text": "a"}', json.dumps({"text": "b" * 5000}), '{"text": "c"}']
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    assert texts(tmp_path / "a.jsonl", skip_bad_rows=True) == ["a", "c"]
    with pytest.raises(DataError, match=r"a\.jsonl:2: the line is longer than"):
        texts(tmp_path / "a.jsonl")


@pytest.mark.parametrize("encoding", ["UTF-16", "UTF-32", "UTF-16LE", "UTF-16BE"])
def test_utf16_is_named(tmp_path: Path, encoding: str) -> None:
    for name, text in (("a.txt", "Hello there"), ("a.json", '[{"text": "hello"}]'), ("a.jsonl", '{"text": "hello"}')):
        (tmp_path / name).write_bytes(text.encode(encoding))
        with pytest.raises(DataError, match=rf"{name} is {encoding}, not UTF-8; .* iconv -f {encoding} -t UTF-8"):
            texts(tmp_path / name)
    (tmp_path / "b.txt").write_text("good")
    documents = Documents([tmp_path])
    assert [b"".join(document.blocks) for document in documents] == [b"good"]
    assert [encoding in reason for reason in documents.skipped] == [True] * 3


def test_a_bad_row_among_others_in_its_line_is_named_by_its_number(tmp_path: Path) -> None:
    rows = [{"text": "a"}, {"text": "b"}, {"text": 3}]
    (tmp_path / "a.json").write_text(json.dumps(rows))
    with pytest.raises(DataError, match=r"a\.json:1, row 3: 'text' must be a string"):
        texts(tmp_path / "a.json")
    (tmp_path / "a.json").write_text(json.dumps(rows, indent=2))
    with pytest.raises(DataError, match=r"a\.json:8: 'text' must be a string"):
        texts(tmp_path / "a.json")


def test_zeros_alone_are_no_encoding(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"abc\0" * 500)  # zeros at odd places only, but not at all of them
    with pytest.raises(DataError, match=r"a\.txt is not text: byte 3 is zero"):
        texts(tmp_path / "a.txt")


def test_linked_directories_are_read_once(tmp_path: Path) -> None:
    (tmp_path / "data/sub").mkdir(parents=True)
    (tmp_path / "other").mkdir()
    (tmp_path / "data/b.txt").write_text("here")
    (tmp_path / "data/sub/c.txt").write_text("below")
    (tmp_path / "other/a.txt").write_text("there")
    (tmp_path / "data/again").symlink_to(tmp_path / "data/sub")
    (tmp_path / "data/more").symlink_to(tmp_path / "other")
    (tmp_path / "data/twice").symlink_to(tmp_path / "other")
    (tmp_path / "other/round").symlink_to(tmp_path / "data")
    documents = Documents([tmp_path / "data"])
    read = {Path(d.name).relative_to(tmp_path / "data").as_posix(): b"".join(d.blocks) for d in documents}
    assert list(read) == ["b.txt", "more/a.txt", "sub/c.txt"]
    left_out = [reason.split(":")[0].rsplit("data/")[-1] for reason in documents.skipped]
    assert left_out == ["again", "more/round", "twice"]
    assert "a link to" in documents.skipped[0]


# -- rows ---------------------------------------------------------------------------------------

ROW, OTHER = {"text": "a", "more": [1, {"x": "]"}]}, {"text": "b"}


@pytest.mark.parametrize("indent", [None, 1])
@pytest.mark.parametrize(
    ("document", "rows"),
    [
        ([ROW, OTHER], [ROW, OTHER]),
        ({"data": [ROW, OTHER]}, [ROW, OTHER]),
        ({"version": "1.0", "rows": [ROW], "info": {"data": [1]}}, [ROW]),
        ({"train": [ROW, OTHER], "test": [OTHER]}, [ROW, OTHER]),
        ({"examples": [ROW]}, [ROW]),
        ({"conversations": [{"messages": TURNS}]}, [{"messages": TURNS}]),
        ({"conversations": SHAREGPT}, [{"conversations": SHAREGPT}]),
        ({"conversations": [TURNS, SHAREGPT]}, [TURNS, SHAREGPT]),
        ({"data": TURNS}, [TURNS]),
        (ROW, [ROW]),
        (TURNS, [TURNS]),
        ([TURNS, TURNS], [TURNS, TURNS]),
        ({"data": []}, []),
        ([], []),
    ],
)
def test_every_shape_of_a_document(tmp_path: Path, document: object, rows: list, indent: int | None) -> None:
    path = tmp_path / "a.json"
    path.write_text(json.dumps(document, indent=indent) + "\n")
    assert values(path) == rows
    (tmp_path / "a.json.gz").write_bytes(gzip.compress(path.read_bytes()))
    assert values(tmp_path / "a.json.gz") == rows


@given(
    rows=st.lists(
        st.dictionaries(st.text(), st.recursive(st.none() | st.integers() | st.text(), st.lists), max_size=3)
        | st.just(TURNS),
        max_size=8,
    ),
    read=st.integers(1, 40),
    indent=st.sampled_from([None, 0, 2]),
)
def test_arrays_in_any_pieces(rows: list, read: int, indent: int | None) -> None:
    """Whatever the rows are and wherever a block of the file ends, they come back."""
    before, json_rows.READ = json_rows.READ, read
    try:
        assert values(json.dumps(rows, indent=indent).encode()) == rows
        assert values(b" \n" + json.dumps({"v": rows, "data": rows}, indent=indent).encode()) == rows
        if all(isinstance(row, dict) for row in rows):
            lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
            assert values(lines.encode("utf-8", "surrogatepass")) == rows or "data" in lines or "conversations" in lines
    finally:
        json_rows.READ = before


def test_lists_of_turns_one_a_line(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(f"{json.dumps(TURNS)}\n{json.dumps(SHAREGPT)}\n")
    assert [[m.content for m in c.messages] for c in RowReader(path)] == [["A", "B"], ["A", "B"]]
    assert conversation_files(path) == [path]


BAD = {
    "a number of 5 000 digits": '{"text": "x", "n": %s}' % ("9" * 5000),
    "nested too deeply": '{"text": "x", "n": %s}' % ("[" * 5000 + "]" * 5000),
    "a little too deeply": '{"text": "x", "n": %s}' % ("[" * 70 + "]" * 70),
    "half a character": '{"text": "x\\ud800"}',
    "NaN": '{"text": "x", "n": NaN}',
    "Infinity": '{"text": "x", "n": -Infinity}',
    "a key twice": '{"text": "x", "text": "y"}',
    "a wrong type": '{"text": ["x"]}',
    "null": "null",
    "a number": "17",
    "a zero byte": '{"text": "x\0"}',
    "not UTF-8": b'{"text": "\xff"}',
    "half of an object": '{"text": "x"',
    "a word": "{text}",
}


@pytest.mark.parametrize("kind", BAD)
def test_every_kind_of_bad_row_is_one_line_or_skipped(tmp_path: Path, kind: str) -> None:
    bad = BAD[kind] if isinstance(BAD[kind], bytes) else BAD[kind].encode()
    good = [b'{"text": "a"}', b'{"text": "b"}']
    files = {"a.jsonl": b"\n".join([good[0], bad, good[1]])}
    if kind != "half of an object":  # in an array the rest of it could not be found
        files["a.json"] = b"[" + b",\n".join([good[0], bad, good[1]]) + b"]"
    for name, content in files.items():
        path = tmp_path / name
        path.write_bytes(content)
        with pytest.raises(DataError, match=rf"{name}:2: ") as caught:
            texts(path)
        assert "\n" not in str(caught.value)
        assert len(str(caught.value)) < 600
        documents = Documents([path], skip_bad_rows=True)
        assert [b"".join(document.blocks) for document in documents] == [b"a", b"b"]
        assert documents.bad_rows == 1
        assert f"{name}:2: " in documents.first_bad_row
        reader = RowReader(path, skip_bad_rows=True)
        assert [row.text for row in reader] == ["a", "b"]
        assert len(reader.skipped) == 1
        with pytest.raises(DataError, match=rf"{name}:2: "):
            list(RowReader(path))


HALVES = st.characters()  # halves of surrogate pairs too
TURN_KEYS = "role from content value weight tool_calls function name arguments type text"
JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.floats() | st.integers() | st.text(HALVES) | st.sampled_from(["user"]),
    lambda inner: st.lists(inner, max_size=3)
    | st.dictionaries(st.sampled_from(TURN_KEYS.split()), inner),
    max_leaves=12,
)
ROW_KEYS = "instruction output response input system history tools messages conversations prompt completion text"


@given(st.dictionaries(st.sampled_from(ROW_KEYS.split()), JSON_VALUES) | JSON_VALUES)
def test_no_row_raises_anything_else(row: object) -> None:
    try:
        said = "".join(read_conversation(row).strings())
    except BadRow as bad:
        said = str(bad).replace("\n", "\ud800")  # which cannot be encoded: a message is one line
    said.encode()


# -- text of rows, directories ------------------------------------------------------------------


def test_the_text_of_a_conversation_is_what_is_said(tmp_path: Path) -> None:
    rows = [{"messages": TURNS}, {"text": "plain"}, {"instruction": "Q", "input": "I", "output": "O", "text": "whole"}]
    (tmp_path / "a.json").write_text(json.dumps({"data": rows}, indent=2))
    documents = Documents([tmp_path / "a.json"])
    assert [b"".join(document.blocks) for document in documents] == [b"A\nB", b"plain", b"whole"]
    assert documents.conversations == 1
    (note,) = documents.notes()
    assert "read as plain text, without a template: 1 conversation, the first: " in note
    with pytest.raises(DataError, match="found the keys 'messages'; expected 'content';"):
        texts(tmp_path / "a.json", field="content")


def test_json_without_rows_is_an_error_by_name_and_a_text_in_a_directory(tmp_path: Path) -> None:
    (tmp_path / "package.json").write_text('{\n "name": "x"\n}')
    (tmp_path / "rows.json").write_text('[{"text": "a"}]')
    with pytest.raises(DataError, match=r"package\.json:1: found the keys 'name'"):
        texts(tmp_path / "package.json")
    documents = Documents([tmp_path])
    assert [b"".join(document.blocks) for document in documents] == [b'{\n "name": "x"\n}', b"a"]
    said = f"read as text, because without rows: 1 .json file, the first: {tmp_path}/package.json"
    assert documents.notes() == [said]


# -- tables -------------------------------------------------------------------------------------


def test_parquet(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")

    def write(name: str, rows: list[dict]) -> Path:
        parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / name)
        return tmp_path / name

    path = write("text.parquet", [{"text": "one", "n": 1}, {"text": None, "n": 2}, {"text": "three", "n": 3}])
    assert texts(path, skip_bad_rows=True) == ["one", "three"]
    with pytest.raises(DataError, match=r"text\.parquet:2: 'text' must be a string, found null"):
        texts(path)
    for rows in (
        [{"messages": TURNS}],
        [{"conversations": SHAREGPT}],
        [{"prompt": TURNS[:1], "completion": TURNS[1:]}],
        [{"prompt": "A", "completion": "B"}],
        [{"instruction": "A", "input": None, "output": "B"}],
    ):
        path = write("chat.parquet", rows)
        assert conversation_files(path) == [path]
        assert [[m.content for m in c.messages] for c in RowReader(path)] == [["A", "B"]]
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(DataError, match=r"chat\.parquet is damaged after row 0"):
        texts(path)
    first, second = Documents([tmp_path / "text.parquet"]), Documents([tmp_path / "text.parquet"])
    assert [list(d.blocks) for d in Documents([write("a.parquet", [{"text": "x"}])])] == [[b"x"]]
    for documents in (first, second):
        documents.skip_bad_rows = True
        assert len(list(documents)) == 2
    assert first.content == second.content != Documents([]).content


def test_parquet_without_pyarrow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    (tmp_path / "a.parquet").write_bytes(b"PAR1\x15")
    with pytest.raises(ConfigError, match=r"a\.parquet needs pyarrow; run pip install 'abi_py\[parquet\]'"):
        texts(tmp_path / "a.parquet")
