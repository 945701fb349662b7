"""Make gguf_tokenizers.npz: what llama.cpp and transformers make of a thousand odd texts.

    python tests/golden/make_gguf_tokenizers.py            make it, with the vocabularies that it holds
    python tests/golden/make_gguf_tokenizers.py --train    with new ones: a unigram model is another each time
    python tests/golden/make_gguf_tokenizers.py --check    make it in memory and compare; exit 1 if one differs

This script needs llama-cpp-python and transformers; the tests read only the .npz file.  There are small vocabularies of
each kind, `metadata_of` makes the metadata of a GGUF file of each, a file without tensors is written, and
llama.cpp opens it.  For each vocabulary NAME:

    NAME.files     JSON: [tokenizer.json, tokenizer_config.json, ids that end a text]
    NAME.metadata  JSON: the metadata; arrays as lists
    NAME.llama     ids of each text by llama.cpp, special tokens recognised; .lengths their number
    NAME.differ    JSON: {"llama_plain" | "hf" | "hf_plain": {number of a text: ids, where they differ from .llama}}
    NAME.around    JSON: the ids of "a" by llama.cpp, with what it puts around a text

`rules.NAME` has the ids of the first 300 texts where `tokenizer.ggml.pre` is NAME, with the vocabulary `rules`.
"""

import argparse
import ctypes
import itertools
import json
import pydoc_data.topics
import struct
import sys
import tempfile
from pathlib import Path

import llama_cpp
import numpy as np
import tokenizers
import transformers
from odd_texts import NAMES, odd_texts
from stored import HERE, differences, meta
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors, trainers

from abi_py.data.byte_tokenizer import byte_tokenizer_files
from abi_py.data.tokenizer_training import train_tokenizer
from abi_py.formats.gguf.pretokenizers import LLAMA3, QWEN2, RULES
from abi_py.formats.gguf.vocabulary_writing import metadata_of

QUIET = llama_cpp.llama_log_callback(lambda *_: None)
FEW = 300  # texts for each rule
SHIPPED = HERE.parents[1] / "abi_py/data/deepzig_conversations.jsonl"


def corpus():
    """Return texts to train on: help pages, and odd texts several times.

    They have no U+0000, at which llama.cpp cuts a token off.
    """
    pages = [page for _, page in sorted(pydoc_data.topics.topics.items())][:40]
    return [text.replace("\0", "") for text in (*pages, *odd_texts(400, seed=3) * 3)]


def trained(words, special, size=700, normalizer=None, ignore_merges=False):
    """Return a byte-level BPE tokenizer."""
    made = tokenizers.Tokenizer(models.BPE(ignore_merges=ignore_merges))
    made.normalizer, made.pre_tokenizer, made.decoder = normalizer, words, decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    made.train_from_iterator(
        corpus(), trainers.BpeTrainer(vocab_size=size, initial_alphabet=alphabet, show_progress=False)
    )
    made.add_special_tokens([AddedToken(name, normalized=False) for name in special])
    return made


def words_by(regex):
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(regex), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


def gpt2():
    made = trained(pre_tokenizers.ByteLevel(add_prefix_space=False), ["<|endoftext|>"])
    return made, {"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>"}, ()


def llama3():
    made = trained(words_by(LLAMA3), ["<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>"], ignore_merges=True)
    bos = ("<|begin_of_text|>", made.token_to_id("<|begin_of_text|>"))
    template = processors.TemplateProcessing(
        single=f"{bos[0]} $A", pair=f"{bos[0]} $A {bos[0]} $B", special_tokens=[bos]
    )
    made.post_processor = processors.Sequence([processors.ByteLevel(), template])
    settings = {"bos_token": bos[0], "eos_token": "<|eot_id|>", "chat_template": "{{ messages }}"}
    return made, settings, (made.token_to_id("<|end_of_text|>"),)


def qwen2():
    made = trained(words_by(QWEN2), ["<|endoftext|>", "<|im_start|>", "<|im_end|>"], normalizer=normalizers.NFC())
    made.add_tokens([AddedToken("<tool_call>", normalized=False)])
    return made, {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}, (made.token_to_id("<|endoftext|>"),)


def project(texts, size):
    made = train_tokenizer(texts, vocab_size=size)
    return made.backend, {f"{role}_token": name for role, name in zip(("bos", "eos", "pad", "unk"), NAMES) if name}, ()


def conversations():
    """Return the texts of the conversations that ship with the package."""
    rows = [json.loads(line) for line in SHIPPED.read_text(encoding="utf-8").splitlines()]
    return [json.dumps(row, ensure_ascii=False) for row in rows]


def own_bytes():
    described, settings = map(json.loads, byte_tokenizer_files().values())
    return tokenizers.Tokenizer.from_str(json.dumps(described)), settings, ()


def pieces(size):
    """Return SentencePiece-like pieces with scores: bytes, and what BPE finds in marked texts."""
    found = tokenizers.Tokenizer(models.BPE())
    found.normalizer = normalizers.Replace(" ", "▁")
    found.pre_tokenizer = pre_tokenizers.Split(Regex("▁*[^▁]*"), "isolated")
    found.train_from_iterator(corpus(), trainers.BpeTrainer(vocab_size=size, limit_alphabet=120, show_progress=False))
    names = sorted(found.get_vocab(), key=found.get_vocab().get)
    merged = [name for name in names if len(name) > 1]
    letters = [name for name in names if len(name) == 1]
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    vocab = {name: i for i, name in enumerate([*special, *merged, *letters])}
    return vocab, {name: -float(i) for i, name in enumerate([*merged, *letters])}


def sentencepiece(metaspace):
    """Return what transformers makes of such pieces, in its old form or its new one."""
    from transformers.tokenization_utils_base import generate_merges

    vocab, scores = pieces(500)
    merges = generate_merges(vocab, scores)
    made = tokenizers.Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    if metaspace:
        made.pre_tokenizer = pre_tokenizers.Metaspace("▁", prepend_scheme="first", split=False)
    else:
        made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    back = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    made.decoder = decoders.Sequence(back)
    made.add_special_tokens([AddedToken(name, normalized=False) for name in ("<unk>", "<s>", "</s>")])
    made.add_tokens([AddedToken("<tool_call>", normalized=False)])
    made.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 1)]
    )
    return made, {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}, ()


def unigram(merging):
    """Return a unigram model; with `merging` it takes several spaces for one, as T5's does."""
    made = tokenizers.Tokenizer(models.Unigram())
    if merging:
        one = normalizers.Replace(Regex(" {2,}"), "▁")
        made.normalizer = normalizers.Sequence([normalizers.Strip(left=False, right=True), one])
    made.pre_tokenizer = pre_tokenizers.Metaspace("▁", prepend_scheme="always", split=True)
    made.decoder = decoders.Metaspace("▁", prepend_scheme="always", split=True)
    special = ["<pad>", "</s>", "<unk>"]
    made.train_from_iterator(
        corpus(),
        trainers.UnigramTrainer(vocab_size=600, special_tokens=special, unk_token="<unk>", show_progress=False),
    )
    made.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return made, {"eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}, ()


VOCABULARIES = {
    "bytes": own_bytes,
    "trained": lambda: project(corpus(), 900),
    "deepzig": lambda: project(conversations(), 1200),
    "llama3": llama3,
    "qwen2": qwen2,
    "gpt2": gpt2,
    "sentencepiece": lambda: sentencepiece(metaspace=False),
    "metaspace": lambda: sentencepiece(metaspace=True),
    "unigram": lambda: unigram(merging=True),
    "unigram_spaces": lambda: unigram(merging=False),
}


class LlamaCpp:
    """The vocabulary of a GGUF file without tensors, in llama.cpp."""

    def __init__(self, metadata):
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "vocabulary.gguf"
            write(path, metadata)
            params = llama_cpp.llama_model_default_params()
            params.vocab_only = True
            self.model = llama_cpp.llama_model_load_from_file(str(path).encode(), params)
        if not self.model:
            raise SystemExit(f"llama.cpp does not open a file with {list(metadata)}")
        self.vocab = llama_cpp.llama_model_get_vocab(self.model)

    def encode(self, text, parse, around=False):
        raw = text.encode()
        ids = (llama_cpp.llama_token * (len(raw) + 8))()
        count = llama_cpp.llama_tokenize(self.vocab, raw, len(raw), ids, len(ids), around, parse)
        assert count >= 0
        return list(ids[:count])


def write(path, metadata):
    """Write a GGUF file without tensors; gguf's own writer refuses an array without entries."""

    def text(value):
        return struct.pack("<Q", len(value.encode())) + value.encode()

    def typed(value):
        if isinstance(value, bool):
            return struct.pack("<I?", 7, value)
        if isinstance(value, int):
            return struct.pack("<II", 4, value)
        if isinstance(value, str):
            return struct.pack("<I", 8) + text(value)
        if isinstance(value, list):
            return struct.pack("<IIQ", 9, 8, len(value)) + b"".join(map(text, value))
        return (
            struct.pack("<IIQ", 9, {"float32": 6, "int32": 5, "uint8": 0}[value.dtype.name], len(value))
            + value.tobytes()
        )

    metadata = {"general.architecture": "llama", **metadata}
    pairs = b"".join(text(key) + typed(value) for key, value in metadata.items())
    path.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 0, len(metadata)) + pairs + bytes(32))


def plain(value):
    return value.tolist() if isinstance(value, np.ndarray) else value


def joined(rows):
    return np.array(list(itertools.chain(*rows)), np.uint16), np.array([len(row) for row in rows], np.uint16)


def vocabulary(name, texts, stored):
    """Return the arrays of a vocabulary, the stored one or a new one."""
    if stored:
        described, settings, ends = json.loads(stored[f"{name}.files"].tobytes())
        backend = tokenizers.Tokenizer.from_str(json.dumps(described))
    else:
        backend, settings, ends = VOCABULARIES[name]()
        described = json.loads(backend.to_str())
    written = metadata_of(described, settings, ends=ends)
    llama = LlamaCpp(written.metadata)
    base = [llama.encode(text, True) for text in texts]
    hf = transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, **{key: value for key, value in settings.items() if key.endswith("_token")}
    )
    others = {
        "llama_plain": [llama.encode(text, False) for text in texts],
        "hf": [hf.encode(text, add_special_tokens=False) for text in texts],
        "hf_plain": [hf.encode(text, add_special_tokens=False, split_special_tokens=True) for text in texts],
    }
    differ = {
        key: {i: row for i, (row, known) in enumerate(zip(rows, base)) if row != known} for key, rows in others.items()
    }
    same = sum(a == b for a, b in zip(base, others["hf"]))
    same_plain = sum(a == b for a, b in zip(others["llama_plain"], others["hf_plain"]))
    print(f"{name}: llama.cpp and transformers agree on {same}, plain {same_plain} of {len(texts)}; {written.losses}")
    ids, lengths = joined(base)
    return {
        f"{name}.files": json.dumps([described, settings, list(ends)]),
        f"{name}.metadata": json.dumps({key: plain(value) for key, value in written.metadata.items()}),
        f"{name}.llama": ids,
        f"{name}.lengths": lengths,
        f"{name}.differ": json.dumps(differ),
        f"{name}.around": json.dumps(llama.encode("a", True, around=True)),
    }


def rules(texts, stored):
    """Return the ids of a vocabulary under each name, which are the same under all names of a rule."""
    if stored:
        described, settings = json.loads(stored["rules.files"].tobytes())
    else:
        no_words = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        described = json.loads(trained(no_words, ["<|endoftext|>"], size=2500).to_str())
        described["pre_tokenizer"]["use_regex"] = True
        settings = {"eos_token": "<|endoftext|>"}
    written = metadata_of(described, settings)
    made = {"rules.files": json.dumps([described, settings])}
    made["rules.metadata"] = json.dumps({key: plain(value) for key, value in written.metadata.items()})
    for rule in RULES:
        for name in rule.names:
            llama = LlamaCpp({**written.metadata, "tokenizer.ggml.pre": name})
            found = [llama.encode(text, False) for text in texts]
            if name == rule.names[0]:
                first = found
                made[f"rules.{name}"], made[f"rules.{name}.lengths"] = joined(found)
            elif found != first:
                raise SystemExit(f"llama.cpp divides words by {name} differently than by {rule.names[0]}")
    return made


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="compare with the stored file and write nothing")
    parser.add_argument("--train", action="store_true", help="train new vocabularies")
    options = parser.parse_args()
    path = HERE / "gguf_tokenizers.npz"
    stored = {}
    if path.exists() and not options.train:
        with np.load(path) as file:
            stored = {key: file[key] for key in file.files}
    llama_cpp.llama_log_set(QUIET, ctypes.c_void_p())
    texts = json.loads(stored["texts"].tobytes()) if stored else odd_texts()
    made = {"texts": json.dumps(texts), **rules(texts[:FEW], stored)}
    for name in VOCABULARIES:
        made |= vocabulary(name, texts, stored)
    made |= meta(15, "make_gguf_tokenizers.py", tokenizers, transformers, llama_cpp)
    arrays = {
        key: np.frombuffer(v.encode(), np.uint8) if isinstance(v, str) else np.asarray(v) for key, v in made.items()
    }
    if options.check:
        lines = differences("gguf_tokenizers", arrays, lambda *_: (0, 0))
        print("\n".join(lines) or "same")
        sys.exit(bool(lines))
    np.savez_compressed(path, **arrays)
    print(f"{path.name}: {path.stat().st_size / 1000:.0f} KB")


if __name__ == "__main__":
    main()
