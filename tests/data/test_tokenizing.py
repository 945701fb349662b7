"""Token files by a tokenizer: right ids, whole or not at all, divided by document, described, and not made twice."""

import dataclasses
import io
import json
import os
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import test_places
from tokenizers import processors

from abi_py.data import (
    TokenizeConfig,
    TokenizedDataset,
    Tokenizer,
    read_sidecar,
    tokenize_if_needed,
    tokenize_to_file,
    train_tokenizer,
)
from abi_py.data import documents as documents_file
from abi_py.data import pieces as pieces_file
from abi_py.data import pipeline as pipeline_file
from abi_py.data import sources as sources_file
from abi_py.data.pipeline import Divider
from abi_py.data.tokenizing import valid_path
from abi_py.errors import ConfigError, DataError

LINES = [f"line {n} of the text, naïve and 世界 </s>\n" for n in range(300)]


@pytest.fixture
def tok(tmp_path: Path) -> Path:
    train_tokenizer(LINES, 400).save(tmp_path / "tok")
    return tmp_path / "tok"


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"text": line}) + "\n" for line in LINES))
    return path


def ids_in(path: Path) -> list[int]:
    return np.fromfile(path, "<u4").tolist()


def documents_in(path: Path, tokenizer: Tokenizer, end: int = 2) -> list[str]:
    ids = np.fromfile(path, "<u4")
    parts = np.split(ids, np.flatnonzero(ids == end) + 1)
    assert len(parts[-1]) == 0
    return [tokenizer.decode(part[:-1]) for part in parts[:-1]]


@pytest.mark.parametrize("plain", [False, True])
def test_ids_are_those_of_the_tokenizer(
    tok: Path, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, plain: bool
) -> None:
    monkeypatch.setattr(pipeline_file, "BATCH", 500)
    monkeypatch.setattr(pieces_file, "PIECE", 90)
    tokenizer = Tokenizer.load(tok)
    encode = tokenizer.encode_plain if plain else tokenizer.encode
    (tmp_path / "long.txt").write_text("".join(LINES))
    config = TokenizeConfig(tokenizer=str(tok), plain=plain, end_of_document="<pad>")
    calls: list[tuple[int, int]] = []
    report = tokenize_to_file(
        [rows, tmp_path / "long.txt"], tmp_path / "out.bin", config, progress=lambda *counts: calls.append(counts)
    )
    wanted = [i for line in LINES for i in (*encode(line), 3)] + encode("".join(LINES)) + [3]
    assert ids_in(tmp_path / "out.bin") == wanted
    text = sum(len(line.encode()) for line in LINES)
    assert (report.documents, report.bytes, report.tokens) == (301, 2 * text, len(wanted))
    assert report.forced_cuts == 0
    assert calls == sorted(calls)
    assert calls[-1] == (rows.stat().st_size + text, len(wanted))
    assert (2 in wanted) == (not plain)


def test_one_byte_at_a_time_from_a_pipe(tok: Path, tmp_path: Path) -> None:
    class Slow(io.BytesIO):
        def read(self, size: int | None = -1) -> bytes:
            return super().read(1)

    text = "h\u00e9 世界 fox"
    tokenize_to_file(["-"], tmp_path / "o.bin", TokenizeConfig(tokenizer=str(tok)), stdin=Slow(text.encode()))
    assert documents_in(tmp_path / "o.bin", Tokenizer.load(tok)) == [text]


class EndlessText(io.RawIOBase):
    """8 MB that exist nowhere."""

    left = 8 << 20

    def read(self, size: int = -1) -> bytes:
        size = min(size, self.left)
        self.left -= size
        return (b"some words of an endless line, again and again.\n" * (size // 48 + 1))[:size]


def test_memory_does_not_grow_with_the_text(tok: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (documents_file, sources_file):
        monkeypatch.setattr(module, "READ_BLOCK", 1 << 16)
    monkeypatch.setattr(pipeline_file, "BATCH", 1 << 16)
    config = TokenizeConfig(tokenizer=str(tok))
    tracemalloc.start()
    try:
        report = tokenize_to_file(["-"], tmp_path / "out.bin", config, stdin=EndlessText())  # type: ignore[arg-type]
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert report.bytes == 8 << 20
    assert peak < 4 << 20


# -- division --------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["bytes", "tokenizer"])
def test_documents_are_divided(tok: Path, rows: Path, tmp_path: Path, kind: str) -> None:
    config = TokenizeConfig(tokenizer=str(tok) if kind == "tokenizer" else None, valid_fraction=0.1, seed=3)
    train, valid = tmp_path / "train.bin", tmp_path / "valid.bin"
    report = tokenize_to_file([rows], train, config)
    infos = {path: read_sidecar(path) for path in (train, valid)}
    assert report.files == infos
    assert report.documents == 300
    counts = [info.documents for info in infos.values() if info is not None]
    assert counts == [270, 30]
    again = tokenize_to_file([rows], tmp_path / "b-train.bin", config)
    assert [info.tokens for info in again.files.values()] == [info.tokens for info in report.files.values()]
    assert ids_in(tmp_path / "b-valid.bin") == ids_in(valid)
    tokenize_to_file([rows], tmp_path / "c-train.bin", config.replace(seed=4))
    assert ids_in(tmp_path / "c-valid.bin") != ids_in(valid)
    if kind == "tokenizer":
        config = config.replace(plain=True)
        tokenize_to_file([rows], train, config)
        tokenizer = Tokenizer.load(tok)
        parts = documents_in(train, tokenizer), documents_in(valid, tokenizer)
        assert sorted(parts[0] + parts[1]) == sorted(LINES)
        assert parts[1] == sorted(parts[1], key=LINES.index)  # in their order


@pytest.mark.parametrize("fraction", [0.01, 0.1, 0.3, 0.5, 0.77, 0.99])
def test_the_share_is_right_to_one_document(fraction: float) -> None:
    for seed in range(20):
        divider = Divider(fraction, seed)
        parts = np.cumsum([divider.part() for _ in range(1000)])
        assert np.abs(parts - fraction * np.arange(1, 1001)).max() <= 2
    assert not any(Divider(0.0, 0).part() for _ in range(10))


def test_too_few_documents_to_divide(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one document")
    with pytest.raises(DataError, match=r"valid_fraction \(0.1\) of 1 document leaves none for validation"):
        tokenize_to_file([tmp_path / "a.txt"], tmp_path / "train.bin", TokenizeConfig(valid_fraction=0.1))
    assert sorted(os.listdir(tmp_path)) == ["a.txt"]


def test_names_of_the_validation_part() -> None:
    names = [valid_path(Path("d", name)).as_posix() for name in ("train.bin", "my-train.bin", "x.bin", "tokens")]
    assert names == ["d/valid.bin", "d/my-valid.bin", "d/x-valid.bin", "d/tokens-valid"]


# -- whole or not at all ---------------------------------------------------------------------------


def test_a_failure_leaves_what_was_there(tok: Path, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("good")
    (tmp_path / "b.txt").write_bytes(b"bad \xff")
    config = TokenizeConfig(tokenizer=str(tok), valid_fraction=0.5)
    output = tmp_path / "out" / "train.bin"
    tokenize_to_file([tmp_path / "a.txt"], output, config.replace(valid_fraction=0.0))
    before = {name: (output.parent / name).read_bytes() for name in os.listdir(output.parent)}
    with pytest.raises(DataError, match=r"b\.txt: byte 4 is not UTF-8"):
        tokenize_to_file([tmp_path / "a.txt", tmp_path / "b.txt"], output, config)
    assert {name: (output.parent / name).read_bytes() for name in os.listdir(output.parent)} == before


def test_an_error_of_the_thread_that_encodes_names_the_tokenizer(tok: Path, tmp_path: Path) -> None:
    content = json.loads((tok / "tokenizer.json").read_text())
    content["normalizer"] = {"type": "Replace", "pattern": {"Regex": "(a+)+$"}, "content": ""}
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    (tmp_path / "a.txt").write_text("a" * 40 + "b")
    with pytest.raises(DataError, match=r"tokenizer\.json: the `tokenizers` library fails on this text"):
        tokenize_to_file([tmp_path / "a.txt"], tmp_path / "o.bin", TokenizeConfig(tokenizer=str(tmp_path)))


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, MemoryError])
def test_interrupted(rows: Path, tmp_path: Path, error: type[BaseException]) -> None:
    def stop(done: int, tokens: int) -> None:
        raise error

    with pytest.raises(error):
        tokenize_to_file([rows], tmp_path / "out" / "o.bin", progress=stop)
    assert os.listdir(tmp_path / "out") == []


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"end_of_document": "<eot>"}, r"end_of_document \('<eot>'\) must be a token of .*<unk>, <s>"),
        ({"valid_fraction": 1.0}, "must be at least 0 and below 1"),
        ({"field": ""}, "not be empty"),
        ({"tokenizer": None, "plain": True}, r"plain \(True\) acts only with tokenizer"),
        ({"tokenizer": None, "end_of_document": "x"}, "end_of_document"),
    ],
)
def test_bad_settings(tok: Path, rows: Path, tmp_path: Path, settings: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        tokenize_to_file([rows], tmp_path / "o.bin", TokenizeConfig(**{"tokenizer": str(tok), **settings}))


def test_a_tokenizer_without_an_end_of_text(rows: Path, tmp_path: Path) -> None:
    train_tokenizer(LINES, 400, ["<x>"]).save(tmp_path / "odd")
    with pytest.raises(ConfigError, match=r"says nothing about an end-of-text token.*--end-of-document"):
        tokenize_to_file([rows], tmp_path / "o.bin", TokenizeConfig(tokenizer=str(tmp_path / "odd")))


# -- the sidecar -----------------------------------------------------------------------------------


def test_a_data_set_knows_its_tokenizer(tok: Path, rows: Path, tmp_path: Path) -> None:
    output = tmp_path / "deep" / "train.bin"
    tokenize_to_file([rows], output, TokenizeConfig(tokenizer=str(tok)))
    dataset = TokenizedDataset.load(output)
    tokenizer = Tokenizer.load(tok)
    assert dataset.vocab_size == tokenizer.vocab_size
    info = dataset.info
    assert info is not None
    assert info.tokenizer is not None
    assert (info.tokens, info.end_of_document, info.tokenizer.path) == (len(dataset), 2, "../tok/tokenizer.json")
    assert dataset.split(0.5)[1].info is info
    found = info.load_tokenizer(output)
    assert found is not None
    assert found.hash == tokenizer.hash
    assert TokenizedDataset.load(output, 1000).vocab_size == 1000  # a model may have more ids
    with pytest.raises(ConfigError, match=rf"vocab_size .* must be at least {tokenizer.vocab_size}"):
        TokenizedDataset.load(output, tokenizer.vocab_size - 1)
    train_tokenizer(LINES, 280).save(tok)
    with pytest.raises(DataError, match="made with another one"):
        info.load_tokenizer(output)
    (tok / "tokenizer.json").unlink()
    with pytest.raises(DataError, match="which is not there"):
        info.load_tokenizer(output)


def test_a_sidecar_of_bytes(rows: Path, tmp_path: Path) -> None:
    output = tmp_path / "o.bin"
    tokenize_to_file([rows], output)
    dataset = TokenizedDataset.load(output)
    assert dataset.vocab_size == 257
    assert dataset.info is not None
    assert dataset.info.load_tokenizer(output) is None
    with open(output, "ab") as file:
        file.write(bytes(4))
    with pytest.raises(DataError, match=r"o\.bin\.json beside it says"):
        TokenizedDataset.load(output)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"format": 1, "tokens": "x"}', '{"format": 99}'])
def test_a_damaged_sidecar(rows: Path, tmp_path: Path, text: str) -> None:
    tokenize_to_file([rows], tmp_path / "o.bin")
    (tmp_path / "o.bin.json").write_text(text)
    with pytest.raises(DataError, match=r"o\.bin\.json.*; delete it, or make both"):
        read_sidecar(tmp_path / "o.bin")
    assert read_sidecar(tmp_path / "absent.bin") is None


def with_post_processor(directory: Path, single: str) -> Tokenizer:
    """Give a tokenizer on the disk a post-processor."""
    backend = Tokenizer.load(directory).backend
    special = [("<s>", 1), ("</s>", 2), ("<pad>", 3)]
    backend.post_processor = processors.TemplateProcessing(single, special_tokens=special)
    backend.save(str(directory / "tokenizer.json"))
    return Tokenizer.load(directory)


@pytest.mark.parametrize(
    ("single", "before", "after"),
    [("$A", [], [2]), ("<s> $A", [1], [2]), ("<s> $A </s>", [1], [2]), ("<s> $A <pad>", [1], [3, 2])],
)
def test_documents_begin_and_end_as_the_post_processor_says(
    tok: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, single: str, before: list[int], after: list[int]
) -> None:
    monkeypatch.setattr(pieces_file, "PIECE", 90)
    tokenizer = with_post_processor(tok, single)
    texts = ["".join(LINES[:20]), "the fox"]
    for name, text in zip("ab", texts, strict=True):
        (tmp_path / f"{name}.txt").write_text(text)
    inputs = [tmp_path / "a.txt", tmp_path / "b.txt"]
    report = tokenize_to_file(inputs, tmp_path / "o.bin", TokenizeConfig(tokenizer=str(tok)))
    wanted = [i for text in texts for i in (*before, *tokenizer.encode(text), *after)]
    assert ids_in(tmp_path / "o.bin") == wanted
    library = tokenizer.backend.encode(texts[0]).ids  # with what the post-processor adds
    assert wanted[: len(library)] == library
    info = read_sidecar(tmp_path / "o.bin")
    assert info is not None
    assert (info.before_document, info.after_document) == (tuple(before), tuple(after))
    assert info.other_convention(tokenizer, "o.bin") is None
    assert report.tokens == info.tokens == len(wanted)


def test_a_sidecar_of_the_first_format_says_that_nothing_began_documents(
    tok: Path, rows: Path, tmp_path: Path
) -> None:
    tokenizer = with_post_processor(tok, "<s> $A")
    output, config = tmp_path / "o.bin", TokenizeConfig(tokenizer=str(tok))
    tokenize_to_file([rows], output, config)
    sidecar = tmp_path / "o.bin.json"
    values = json.loads(sidecar.read_text())
    assert values.pop("before_document") == [1]
    assert values.pop("after_document") == [2]
    sidecar.write_text(json.dumps({**values, "format": 1}))
    old = read_sidecar(output)
    assert old is not None
    assert (old.before_document, old.after_document) == ((), (2,))
    said = old.other_convention(tokenizer, "o.bin")
    assert said is not None
    assert said.startswith("o.bin has ids TEXT 2 around its documents, but generate and eval put 1 TEXT 2 around")
    with pytest.raises(ConfigError, match="ids around documents TEXT 2, now 1 TEXT 2"):
        tokenize_if_needed([rows], output, config)
    assert not tokenize_if_needed([rows], output, config, replace=True).reused
    assert tokenize_if_needed([rows], output, config).reused
    sidecar.write_text(json.dumps({**values, "format": 2, "before_document": ["x"], "after_document": [2]}))
    with pytest.raises(DataError, match=r"before_document\[0\] is 'x'"):
        read_sidecar(output)


@pytest.mark.parametrize("kind", ["llama2 legacy", "llama2", "t5"])
def test_a_long_document_of_a_tokenizer_with_space_marks(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A piece of a document that is cut for its length has no space mark of its own."""
    monkeypatch.setattr(pieces_file, "PIECE", 90)
    tokenizer = test_places.made(kind)
    tokenizer.save(tmp_path)
    text = "the quick brown fox jumps over</s> the lazy dog. " * 40
    (tmp_path / "a.txt").write_text(text)
    report = tokenize_to_file([tmp_path / "a.txt"], tmp_path / "o.bin", TokenizeConfig(tokenizer=str(tmp_path)))
    assert report.forced_cuts == 0
    assert ids_in(tmp_path / "o.bin")[:-1] == tokenizer.backend.encode(text, add_special_tokens=False).ids


# -- not made twice --------------------------------------------------------------------------------


@pytest.fixture
def made(tok: Path, rows: Path, tmp_path: Path):
    """Return a function that tokenizes again, and says what became of it: reused, or made again."""
    output, config = tmp_path / "train.bin", TokenizeConfig(tokenizer=str(tok), valid_fraction=0.1)
    tokenize_if_needed([rows], output, config)

    def again(inputs: tuple = (rows,), replace: bool = False, **changes: object) -> bool:
        return tokenize_if_needed(list(inputs), output, config.replace(**changes), replace=replace).reused

    return again


def test_the_same_is_not_made_twice(made, rows: Path, tmp_path: Path) -> None:
    output = tmp_path / "train.bin"
    before = output.stat()
    assert made()
    os.utime(rows, (1, 1))  # another time, the same content
    assert made()
    info = read_sidecar(output)
    assert info is not None
    assert made()
    assert output.stat() == before
    rows.write_text(rows.read_text().replace("line 7 ", "line 8 "))  # the same size
    assert not made()
    assert made()
    rows.write_text(rows.read_text() + '{"text": "more"}\n')
    assert not made()
    assert ids_in(output) != []
    assert made()


def test_what_is_not_whole_is_made_again(made, tmp_path: Path) -> None:
    for damage in (
        lambda: (tmp_path / "valid.bin").unlink(),
        lambda: (tmp_path / "valid.bin.json").unlink(),
        lambda: (tmp_path / "train.bin").write_bytes(b"1234"),
    ):
        damage()
        assert not made()
        assert made()


def test_what_was_made_in_another_way_is_not_replaced(made, tok: Path, rows: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.txt"
    other.write_text("x")
    for arguments, message in (
        ({"seed": 1}, "seed 0, now 1"),
        ({"plain": True}, "plain False, now True"),
        ({"tokenizer": None}, r"tokenizer \w{12}, now none \(bytes\)"),
        ({"inputs": (other,)}, "inputs .*rows.jsonl, now .*other.txt"),
        ({"inputs": ("-",)}, "inputs"),
    ):
        with pytest.raises(ConfigError, match=rf"was made in another way \({message}.*--force"):
            made(**arguments)
    assert not made(replace=True, seed=1)
    (tmp_path / "train.bin.json").unlink()
    with pytest.raises(ConfigError, match=r"is there, without train\.bin\.json"):
        made()
    assert not made(replace=True)
    train_tokenizer(LINES, 280).save(tok)
    with pytest.raises(ConfigError, match="another way"):
        made()


def test_standard_input_cannot_be_recognised(tmp_path: Path) -> None:
    output = tmp_path / "o.bin"
    tokenize_if_needed(["-"], output, stdin=io.BytesIO(b"x"))
    with pytest.raises(ConfigError, match="when standard input is read"):
        tokenize_if_needed(["-"], output, stdin=io.BytesIO(b"x"))
    info = read_sidecar(output)
    assert info is not None
    assert info.listing is None
    assert dataclasses.asdict(info)["given"] == ["-"]


@pytest.mark.parametrize("name", ["valid.bin", "train.bin.json", "valid.bin.json"])
def test_no_foreign_file_of_any_name_is_replaced(name: str, tmp_path: Path) -> None:
    texts = [tmp_path / f"{number}.txt" for number in range(10)]
    for text in texts:
        text.write_text("some text")
    (tmp_path / name).write_text("{}")
    config = TokenizeConfig(valid_fraction=0.3)
    with pytest.raises((ConfigError, DataError), match=rf"{name}.*--force"):
        tokenize_if_needed(texts, tmp_path / "train.bin", config)
    assert (tmp_path / name).read_text() == "{}"
    assert not (tmp_path / "train.bin").exists()
    assert not tokenize_if_needed(texts, tmp_path / "train.bin", config, replace=True).reused
    (tmp_path / "train.bin").unlink()  # the others are ours
    assert not tokenize_if_needed(texts, tmp_path / "train.bin", config).reused
