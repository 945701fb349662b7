"""Any tokenizer.json: text to ids and back, special tokens only where they are meant, text id by id, errors."""

import json
from pathlib import Path

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

from abi_py.data import Tokenizer
from abi_py.data.encoders import TextEncoder
from abi_py.errors import DataError

SPECIALS = ["<unk>", "<s>", "</s>", "<pad>", "<user>", "</user>"]
TEXTS = ["the quick brown fox jumps over the lazy dog", "naïve 世界 🎉 text"] * 5
ANY_TEXT = st.text(st.characters(exclude_categories=["Cs"]))


def byte_level() -> tokenizers.Tokenizer:
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=320, special_tokens=SPECIALS, initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(TEXTS, trainer)
    return backend


def byte_fallback() -> tokenizers.Tokenizer:
    """Like Llama 2's: a space mark, unknown characters as <0xNN>, a decoder that drops the first space."""
    vocabulary = {"<unk>": 0, "<s>": 1, "</s>": 2, **{f"<0x{byte:02X}>": byte + 3 for byte in range(256)}}
    for token in ("\u2581", "h", "i", "e", "hi", "\u2581hi"):
        vocabulary[token] = len(vocabulary)
    backend = tokenizers.Tokenizer(
        models.BPE(vocabulary, [("h", "i"), ("\u2581", "hi")], unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    )
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    backend.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    backend.add_special_tokens(["<s>", "</s>"])
    return backend


BYTES = Tokenizer(byte_level())
FALLBACK = Tokenizer(byte_fallback())


# -- ids and text ----------------------------------------------------------------------------------


@given(ANY_TEXT)
def test_round_trip(text: str) -> None:
    assert BYTES.decode(BYTES.encode(text)) == text
    assert BYTES.decode(BYTES.encode_plain(text)) == text
    assert BYTES.encode_batch([text, "x", text]) == [BYTES.encode(text), BYTES.encode("x"), BYTES.encode(text)]


def test_special_tokens_in_the_text() -> None:
    text = "<s><user>the fox</user></s>"
    ids = BYTES.encode(text)
    assert [ids[0], ids[1], *ids[-2:]] == [1, 4, 5, 2]
    assert BYTES.decode(ids) == text
    assert BYTES.decode(ids, skip_special_tokens=True) == "the fox"


@given(st.lists(st.sampled_from([*SPECIALS, "the", " ", "<", "/s>"]), max_size=8).map("".join))
def test_plain_text_gives_no_special_id(text: str) -> None:
    ids = BYTES.encode_plain(text)
    assert BYTES.special_ids.isdisjoint(ids)
    assert BYTES.decode(ids) == text


def test_plain_text_of_a_model_that_knows_the_names_of_special_tokens() -> None:
    pieces = [("<unk>", 0.0), ("</s>", 0.0), *((character, -5.0) for character in "</s>ab")]
    backend = tokenizers.Tokenizer(models.Unigram(pieces, unk_id=0))
    backend.decoder = decoders.Fuse()
    backend.add_special_tokens(["<unk>", "</s>"])
    tokenizer = Tokenizer(backend)
    assert backend.encode("a</s>b").ids == [tokenizer.id_of("a"), 1, tokenizer.id_of("b")]
    plain = tokenizer.encode_plain("a</s>b</s>")
    assert 1 not in plain
    assert tokenizer.decode(plain) == "a</s>b</s>"


def test_the_post_processor_works_only_when_asked() -> None:
    backend = byte_level()
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    tokenizer = Tokenizer(backend)
    ids = tokenizer.encode("fox")
    assert tokenizer.encode("fox", add_special_tokens=True) == [1, *ids, 2]
    assert tokenizer.encode_batch(["fox"], add_special_tokens=True) == [[1, *ids, 2]]
    assert 1 not in ids
    assert tokenizer.encode_plain("fox") == ids


def test_truncation_and_padding_of_the_file_do_nothing() -> None:
    backend = byte_level()
    backend.enable_truncation(2)
    backend.enable_padding(length=9)
    tokenizer = Tokenizer(backend)
    assert tokenizer.encode("lazy dog fox") == BYTES.encode("lazy dog fox")
    assert tokenizer.hash == BYTES.hash


def test_ids_without_a_token_and_bytes_that_are_no_text() -> None:
    assert BYTES.decode([-1, BYTES.vocab_size]) == "\ufffd\ufffd"
    letter = BYTES.encode("\u00e9")
    assert len(letter) == 2  # not in TEXTS, so two bytes
    assert BYTES.decode([letter[0], *BYTES.encode("x")]) == "\ufffdx"
    assert BYTES.decode([]) == ""


def test_half_a_surrogate_pair_is_an_error() -> None:
    for encode in (BYTES.encode, BYTES.encode_plain, lambda text: BYTES.encode_batch(["fine", text])):
        with pytest.raises(DataError, match=r"character 2 is U\+D83D"):
            encode("ab\ud83d")
        with pytest.raises(TypeError):
            encode(7)  # type: ignore[arg-type]


# -- id by id --------------------------------------------------------------------------------------


@given(ids=st.lists(st.integers(-1, 330), max_size=20), skip=st.booleans())
def test_stream_gives_what_decode_gives(ids: list[int], skip: bool) -> None:
    stream = BYTES.stream(skip_special_tokens=skip)
    parts = [stream.add(i) for i in ids]
    assert "".join(parts) + stream.finish() == BYTES.decode(ids, skip_special_tokens=skip)
    assert stream.finish() == ""


@pytest.mark.parametrize("tokenizer", [BYTES, FALLBACK], ids=["byte level", "byte fallback"])
@given(text=ANY_TEXT)
def test_stream_never_gives_half_a_character(tokenizer: Tokenizer, text: str) -> None:
    text = text.replace("\ufffd", "")
    stream = tokenizer.stream()
    shown = ""
    for i in tokenizer.encode(text):
        shown += stream.add(i)
        assert tokenizer.decode(tokenizer.encode(text)).startswith(shown)
    assert stream.finish() == ""
    assert shown == tokenizer.decode(tokenizer.encode(text))


def test_stream_of_a_cut_character() -> None:
    for tokenizer in (BYTES, FALLBACK):
        ids = tokenizer.encode("\u20ac")
        stream = tokenizer.stream()
        assert [stream.add(i) for i in ids[:-1]] == [""] * (len(ids) - 1)
        assert set(stream.finish()) == {"\ufffd"}
        assert stream.add(tokenizer.vocab_size) == "\ufffd"
        assert "".join(map(stream.add, tokenizer.encode("hi"))) == "hi"


# -- vocabulary and roles --------------------------------------------------------------------------


def test_vocabulary() -> None:
    assert BYTES.special_ids == {0, 1, 2, 3, 4, 5}
    assert [BYTES.token_of(i) for i in range(6)] == SPECIALS
    assert [BYTES.id_of(token) for token in SPECIALS] == list(range(6))
    assert BYTES.id_of("no such token") is None
    assert BYTES.token_of(-1) is BYTES.token_of(BYTES.vocab_size) is None
    assert (BYTES.unk_id, BYTES.bos_id, BYTES.eos_id, BYTES.pad_id) == (0, 1, 2, 3)
    assert (FALLBACK.unk_id, FALLBACK.bos_id, FALLBACK.eos_id, FALLBACK.pad_id) == (0, 1, 2, None)


def test_vocab_size_counts_gaps() -> None:
    tokenizer = Tokenizer(tokenizers.Tokenizer(models.WordLevel({"a": 0, "b": 7}, unk_token="a")))
    assert tokenizer.vocab_size == 8
    assert tokenizer.token_of(3) is None
    assert tokenizer.decode([0, 3, 7]) == "a\ufffdb"


def test_hash_sees_the_vocabulary_and_not_the_spelling(tmp_path: Path) -> None:
    backend = byte_level()
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(json.loads(backend.to_str()), indent=7))
    assert Tokenizer.load(path).hash == BYTES.hash
    backend.add_tokens(["more"])
    assert Tokenizer(backend).hash != BYTES.hash


# -- errors ----------------------------------------------------------------------------------------


SLOW = {"pattern": {"Regex": "(x+x+)+y"}}  # takes more steps than the library allows itself


@pytest.mark.parametrize(
    "rule",
    [
        {"pre_tokenizer": {"type": "Split", **SLOW, "behavior": "Isolated", "invert": False}},
        {"normalizer": {"type": "Replace", **SLOW, "content": ""}},
        {"decoder": {"type": "Replace", **SLOW, "content": ""}},
    ],
)
def test_a_rule_that_the_library_cannot_follow(tmp_path: Path, rule: dict) -> None:
    tokenizer_with(tmp_path, rule)
    tokenizer, text = Tokenizer.load(tmp_path), "x" * 40
    calls = [
        lambda: tokenizer.encode(text),
        lambda: tokenizer.encode_plain(text),
        lambda: tokenizer.encode_batch(["a", text]),
        lambda: tokenizer.encode_plain_batch(["a", text]),
        lambda: TextEncoder(tokenizer).encode([text], [True]),
    ]
    if "decoder" in rule:  # one token of many x: the rule sees it in one piece
        calls = [lambda: tokenizer.decode([0]), lambda: tokenizer.stream().add(0), lambda: tokenizer.count_bytes(0, -1)]
    for call in calls:
        with pytest.raises(DataError, match=r"tokenizer\.json: the `tokenizers` library fails on .*retry-limit"):
            call()


def tokenizer_with(directory: Path, rule: dict) -> None:
    backend = tokenizers.Tokenizer(models.WordLevel({"x" * 40: 0, "a": 1}, unk_token="a"))
    content = {**json.loads(backend.to_str()), **rule}
    (directory / "tokenizer.json").write_text(json.dumps(content))
