"""Bytes as the files of a tokenizer: the ids of `byte_tokens`, and back."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from abi_py.data.byte_tokenizer import END_NAME, byte_tokenizer_files, is_byte_tokenizer
from abi_py.data.corpus import BYTE_VOCAB_SIZE, END_OF_DOCUMENT, byte_tokens, decode_bytes
from abi_py.data.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Return a folder with the files."""
    made = tmp_path_factory.mktemp("bytes")
    for name, content in byte_tokenizer_files().items():
        (made / name).write_bytes(content)
    return made


@pytest.fixture(scope="module")
def tokenizer(folder):
    """Return it as any other tokenizer is read."""
    return Tokenizer.load(folder)


@given(text=st.text(st.characters(exclude_categories=["Cs"])))
def test_ids_are_bytes_and_back(tokenizer, text):
    if END_NAME in text:
        return
    ids = byte_tokens(text).tolist()
    assert tokenizer.encode(text) == tokenizer.encode_prompt(text) == ids
    assert tokenizer.decode(ids) == text


def test_the_vocabulary_is_that_of_byte_level_models(tokenizer):
    assert tokenizer.vocab_size == BYTE_VOCAB_SIZE
    assert tokenizer.eos_id == tokenizer.pad_id == END_OF_DOCUMENT
    assert tokenizer.decode(range(256)) == decode_bytes(range(256))
    assert tokenizer.decode([104, 256, 105], skip_special_tokens=True) == "hi"


def test_it_is_known_again(folder, tokenizer, tmp_path):
    assert is_byte_tokenizer(folder)
    assert not is_byte_tokenizer(tmp_path)
    tokenizer.save(tmp_path)  # by the library, in other words: a tokenizer like any other
    assert not is_byte_tokenizer(tmp_path)
