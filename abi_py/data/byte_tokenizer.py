"""The byte-level ids of `corpus.py` as the files of a tokenizer, so that other programs read them too.

Byte b is the token that byte-level BPE writes for it, with id b; nothing is merged, so each byte of a text is an id of
its own, and ids decode to the text they came from.  256, the end of a document, is a special token.  A text in which
its name is written is the one case in which other programs make other ids of it than we do.
"""

from pathlib import Path

from ..files import json_text
from ..formats.gguf.companion_files import companions_of
from ..formats.gguf.container import is_gguf, open_gguf
from .corpus import BYTE_VOCAB_SIZE, END_OF_DOCUMENT
from .token_stream import BYTE_OF
from .tokenizer_files import CONFIG_FILE, TOKENIZER_FILE

__all__ = ["END_NAME", "byte_tokenizer_files", "is_byte_tokenizer"]

END_NAME = "<|endoftext|>"


def byte_tokenizer_files() -> dict[str, bytes]:
    """Return tokenizer.json and tokenizer_config.json by name."""
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    vocab = dict(sorted(BYTE_OF.items(), key=lambda item: item[1]))
    end = {"id": END_OF_DOCUMENT, "content": END_NAME, "special": True}
    plain = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    described = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{**end, **plain}],
        "normalizer": None,
        "pre_tokenizer": level,
        "post_processor": None,
        "decoder": level,
        "model": {"type": "BPE", "vocab": {**vocab, END_NAME: END_OF_DOCUMENT}, "merges": []},
    }
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": 1 << 30,
        "clean_up_tokenization_spaces": False,
        "bos_token": None,
        "eos_token": END_NAME,
        "pad_token": END_NAME,
        "unk_token": None,
    }
    return {TOKENIZER_FILE: json_text(described).encode(), CONFIG_FILE: json_text(settings).encode()}


def is_byte_tokenizer(place: Path) -> bool:
    """Say whether the tokenizer in a folder or a GGUF file is the one above: its ids are bytes, and read as such here.
    """
    ours = byte_tokenizer_files()[TOKENIZER_FILE]
    if is_gguf(place):
        file = open_gguf(place)
        tokens = file.entries.get("tokenizer.ggml.tokens")  # counted first: a vocabulary takes long to be read
        few = tokens is not None and tokens.length < 2 * BYTE_VOCAB_SIZE
        return few and companions_of(file.metadata, str(place))[0].files.get(TOKENIZER_FILE) == ours
    path = place / TOKENIZER_FILE
    return path.is_file() and path.stat().st_size == len(ours) and path.read_bytes() == ours
