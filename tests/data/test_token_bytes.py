"""Bytes of tokens: together those of the text, whatever the tokenizer; special tokens are none, odd bytes are one."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_places import KINDS, SPECIALS, TOKENIZERS

from abi_py.data import Tokenizer
from abi_py.generation.text import ByteText

LOSSLESS = ["llama2 legacy", "llama2", "gemma", "gpt2", "gpt2 with prefix"]
WORDS = st.sampled_from(
    ["Hello", "fox", "I am", "\u4e16\u754c", "\U0001f98a", "a\u0308", "\ufffd", "<call>", "\n", "x  y"]
)


def counts(tokenizer: Tokenizer | ByteText, ids: list[int]) -> list[int]:
    return tokenizer.count_bytes(ids, [-1, *ids[:-1]]).tolist()


@pytest.mark.parametrize("kind", LOSSLESS)
@given(texts=st.lists(st.lists(WORDS, min_size=1, max_size=5).map(" ".join), min_size=1, max_size=3))
def test_together_they_are_the_bytes_of_the_texts(kind: str, texts: list[str]) -> None:
    tokenizer = TOKENIZERS[kind]
    if kind == "gpt2 with prefix":  # after <call> it has the same ids with a space and without one
        texts = [text.replace("<call>", "call") for text in texts]
    bos, eos = 1 if tokenizer.bos_id is None else tokenizer.bos_id, tokenizer.eos_id
    assert eos is not None
    for before in ([], [bos]):
        ids = [i for text in texts for i in (*before, *tokenizer.encode(text), eos)]
        assert sum(counts(tokenizer, ids)) == sum(len(text.encode()) for text in texts)


@pytest.mark.parametrize("kind", KINDS)
def test_words_and_their_spaces(kind: str) -> None:
    tokenizer = TOKENIZERS[kind]
    text = "hello fox , the dog" if kind == "wordpiece" else "the fox. the lazy dog"
    shown = tokenizer.decode(tokenizer.encode(text))
    assert sum(counts(tokenizer, tokenizer.encode(text))) == len(shown) - (kind == "gpt2 with prefix")


@pytest.mark.parametrize("kind", KINDS)
def test_special_tokens_are_no_text(kind: str) -> None:
    tokenizer = TOKENIZERS[kind]
    assert counts(tokenizer, [tokenizer.encode(name)[0] for name in SPECIALS]) == [0, 0, 0]
    call = tokenizer.id_of("<call>")
    assert tokenizer.count_bytes([call], tokenizer.encode_plain("fox")[-1:]).tolist() >= [len("<call>")]
    assert counts(tokenizer, [tokenizer.vocab_size + 3]) == [0]


@pytest.mark.parametrize("kind", ["llama2", "llama2 legacy", "mistral", "gpt2"])
def test_bytes_that_are_no_text_count_one_each(kind: str) -> None:
    tokenizer = TOKENIZERS[kind]
    ids = tokenizer.encode("fox \u4e16\u754c")
    assert counts(tokenizer, ids[-6:]) == [1] * 6
    assert counts(tokenizer, [ids[-1], ids[-6], ids[-6]]) == [1, 1, 1]  # in an order that is no UTF-8


def test_the_shape_is_that_of_the_ids() -> None:
    tokenizer = TOKENIZERS["gpt2"]
    ids = np.array([tokenizer.encode("ab"), tokenizer.encode("\u00e9")], np.uint32)
    assert tokenizer.count_bytes(ids, np.zeros_like(ids)).tolist() == [[1, 1], [1, 1]]
    assert counts(ByteText(), [*b"\xe2\x82\xacx\xff", 256]) == [1] * 6
