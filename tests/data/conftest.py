"""A tokenizer for the tests of conversations: byte-level, with the special tokens of all built-in templates."""

import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from abi_py.data import Tokenizer

DEEPZIG = ["<unk>", "<s>", "</s>", "<pad>", "<user>", "</user>", "<assistant>", "</assistant>"]
DEEPZIG += ["<system>", "</system>", "<tool>", "</tool>"]
OTHERS = ["<|im_start|>", "<|im_end|>", "<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]


def _make_tokenizer(specials, **config):
    """Return a byte-level tokenizer with these special tokens first."""
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=256 + len(specials) + 20, special_tokens=specials, initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(["the quick brown fox jumps over the lazy dog"] * 5, trainer)
    return Tokenizer(backend, config)


@pytest.fixture(scope="session")
def make_tokenizer():
    """Return a function that makes a byte-level tokenizer of special tokens and settings."""
    return _make_tokenizer


@pytest.fixture(scope="session")
def tokenizer():
    """Return a tokenizer with the special tokens of every built-in template; EOS is </s>."""
    return _make_tokenizer(DEEPZIG + OTHERS, eos_token="</s>", pad_token="<pad>", bos_token="<s>")


@pytest.fixture(scope="session")
def bare_tokenizer():
    """Return a tokenizer whose only special token is <|endoftext|>."""
    return _make_tokenizer(["<|endoftext|>"], eos_token="<|endoftext|>")


@pytest.fixture(scope="session")
def show():
    """Return a function that writes ids as text: special tokens after @, what is trained in brackets."""

    def write(tokenizer, ids, labels):
        from abi_py.data.batch import trained_of

        parts, run, before = [], [], False
        for token_id, trained in zip(ids.tolist(), trained_of(labels), strict=True):
            special = token_id in tokenizer.special_ids
            if trained != before or special:
                parts.append(tokenizer.decode(run))
                run = []
            if trained != before:
                parts.append("[" if trained else "]")
                before = trained
            if special:
                parts.append("@" + tokenizer.token_of(token_id))
            else:
                run.append(token_id)
        return "".join([*parts, tokenizer.decode(run), "]" if before else ""])

    return write
