"""Cutting: the ids of the pieces are those of the whole text, for tokenizers of several kinds."""

import random

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Regex, decoders, models, pre_tokenizers, trainers

from abi_py.data import Tokenizer, pieces, train_tokenizer
from abi_py.data.documents import Document
from abi_py.data.pieces import TextCutter
from abi_py.errors import DataError

WORDS = [
    "the",
    "fox",
    "naïve",
    "世界",
    "x1",
    "def",
    "return",
    "\n",
    "\n\n",
    "\r\n",
    " ",
    "  ",
    "\t",
    "...",
    "</s>",
    "!",
    "🎉",
]
SAMPLE = "".join(random.Random(0).choices(WORDS, k=4000))


def gpt2() -> Tokenizer:
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400, show_progress=False, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    backend.train_from_iterator([SAMPLE], trainer)
    return Tokenizer(backend)


def whole_text() -> Tokenizer:
    """A tokenizer without words, which merges over spaces: most cuts would change ids."""
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always", split=False)
    backend.train_from_iterator([SAMPLE], trainers.BpeTrainer(vocab_size=300, show_progress=False))
    return Tokenizer(backend)


QWEN2, GPT2, WHOLE = train_tokenizer([SAMPLE], 400), gpt2(), whole_text()


def blocks(text: str, size: int) -> Document:
    data = text.encode()
    return Document("doc", iter([data[i : i + size] for i in range(0, len(data), size)]))


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pieces, "PIECE", 50)
    monkeypatch.setattr(pieces, "WINDOW", 12)


def ids_of_pieces(tokenizer: Tokenizer, text: str, size: int) -> tuple[list[int], list[str], int]:
    cutter = TextCutter(tokenizer.encode)
    parts = list(cutter.cut(blocks(text, size)))
    assert "".join(parts) == text
    assert all(parts)
    return [i for part in parts for i in tokenizer.encode(part)], parts, cutter.forced


@pytest.mark.parametrize("tokenizer", [QWEN2, GPT2, WHOLE], ids=["qwen2", "gpt2", "whole"])
@pytest.mark.parametrize("seed", range(8))
def test_ids_are_those_of_the_whole_text(tokenizer: Tokenizer, seed: int) -> None:
    words = random.Random(seed)
    text = "".join(words.choice(WORDS) for _ in range(600))
    ids, parts, forced = ids_of_pieces(tokenizer, text, words.choice([1, 7, 64, 1000]))
    assert ids == tokenizer.encode(text)
    assert forced == 0
    assert len(parts) > (2 if tokenizer is WHOLE else 10)


def test_without_a_check_a_cut_would_show() -> None:
    """The test above can fail: at these places the ids of GPT-2's rules depend on what comes next."""
    left, right = "a\n\n", "b"
    assert GPT2.encode(left) + GPT2.encode(right) != GPT2.encode(left + right)


def test_long_text_without_a_place_to_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pieces, "LONGEST", 400)
    _, parts, forced = ids_of_pieces(QWEN2, "x" * 3000, 100)
    assert forced == len(parts) - 1 > 3
    assert max(map(len, parts)) <= 400 * 2 + 12


def test_without_a_tokenizer_lines_are_kept_whole() -> None:
    text = "some words on a line\n" * 50
    parts = list(TextCutter().cut(blocks(text, 100)))
    assert "".join(parts) == text
    assert len(parts) > 10
    assert all(part.endswith("\n") for part in parts)


@given(st.text(st.characters(exclude_categories=["Cs"]), min_size=1), st.integers(1, 9))
def test_characters_are_never_cut(text: str, size: int) -> None:
    assert "".join(TextCutter().cut(blocks(text, size))) == text


@pytest.mark.parametrize(
    ("data", "place"), [(b"abc\xff", 3), (b"ab\xe2\x82", 2), (b"\xe2\x82\xac\xe2\x28", 3), (b"a" * 9 + b"\xc3a", 9)]
)
@pytest.mark.parametrize("size", [1, 2, 3, 100])
def test_what_is_not_utf8_is_named(data: bytes, place: int, size: int) -> None:
    document = Document("doc", iter([data[i : i + size] for i in range(0, len(data), size)]))
    with pytest.raises(DataError, match=rf"doc: byte {place} is not UTF-8"):
        list(TextCutter().cut(document))


def test_qwen2_words_are_those_of_its_tokenizer() -> None:
    words = pre_tokenizers.Split(Regex(r"\p{N}"), "isolated")
    assert words is not None
    shown = [QWEN2.backend.pre_tokenizer.pre_tokenize_str(text) for text in ("I'll go 123", "a\n\n  b", "x!!\n y")]
    assert [[word.replace("Ġ", " ").replace("Ċ", "\n") for word, _ in each] for each in shown] == [
        ["I", "'ll", " go", " ", "1", "2", "3"],
        ["a", "\n\n", " ", " b"],
        ["x", "!!\n", " y"],
    ]
