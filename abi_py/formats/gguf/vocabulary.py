"""The tokenizer in a GGUF file as the files of a folder: tokenizer.json and tokenizer_config.json.

    gpt2    BPE of bytes: words by the rule that `tokenizer.ggml.pre` names, merges as they are written
    llama   SentencePiece's BPE: no words, a space is a character, what no token has is written in bytes; the file has
            scores instead of merges, so the merges are made from them (merges.py)
    t5      SentencePiece's unigram model: the likeliest tokens by their scores

Tokens of the kinds control, unknown and user-defined become added tokens, the first two special ones: so they are
recognised in a text before it is divided, as in llama.cpp.  What fills up the vocabulary at its end ("[PAD7]" with the
id 7, unused) is left out, and `vocabulary_writing` writes it again.

The other way is in `vocabulary_writing.py`.  A file is checked here before anything is made of it: types, lengths, ids,
tokens that come twice, merges without tokens; each error names key and rule.
"""

import base64
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from ...errors import CheckpointError, counted, listed, on_one_line, shown
from ...files import json_text
from ..special_tokens import MOST_IDS
from .merges import merges_of_scores
from .pretokenizers import byte_level, pre_tokenizer_of, rule_called
from .space_marks import bpe_steps, unigram_steps
from .vocabulary_keys import DEFAULT_IDS, ENDS, GGML, ROLE_KEYS, TEMPLATE, TEMPLATES, Kind, byte_token, padding

__all__ = ["ReadTokenizer", "tokenizer_of"]

DAMAGED = "the file is damaged, or no tokenizer that llama.cpp reads: copy or convert it again"
BERT = ("bert", "wpm")  # WordPiece
MOST_CHARACTERS = 1 << 26  # of all tokens together; the largest vocabularies have 2 million
MOST_MERGES = 1 << 22
SPECIAL = (Kind.CONTROL, Kind.UNKNOWN)
ADDED = (*SPECIAL, Kind.USER_DEFINED)


@dataclass(frozen=True)
class ReadTokenizer:
    """What was read.

    tokenizer   the content of tokenizer.json
    settings    the content of tokenizer_config.json: roles, and the chat template, of several a list
    ends        the ids at which a text ends, for generation_config.json
    notes       sentences: what llama.cpp does with this file and the result does not, or the other way round
    """

    tokenizer: dict[str, Any]
    settings: dict[str, Any]
    ends: tuple[int, ...] = ()
    notes: tuple[str, ...] = ()

    def files(self) -> dict[str, bytes]:
        """Return tokenizer.json and tokenizer_config.json by name, for a folder."""
        return {
            "tokenizer.json": json_text(self.tokenizer).encode(),
            "tokenizer_config.json": json_text(self.settings).encode(),
        }


def tokenizer_of(metadata: Mapping[str, Any], place: str = "the GGUF file") -> ReadTokenizer:
    """Return the tokenizer that a GGUF file's metadata describes; `place` is what errors call the file.

    CheckpointError names key, value and rule: a model or a way of dividing words that is not known, a value of a wrong
    type, arrays of different lengths, an id that no token has, tokens that come twice, merges without tokens.
    """
    file = _File(metadata, place)
    model = file.require("model", str)
    if model not in _MODELS:
        wordpiece = "WordPiece, as BERT has it, which is no tokenizer of a model that writes text"
        rule = wordpiece if model in BERT else f"not one of those read here, which are {', '.join(_MODELS)}"
        file.fail("model", model, rule, "use the tokenizer.json of the model that the file was made of")
    vocabulary = _Vocabulary(file, model)
    made, notes = _MODELS[model](vocabulary)
    described = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": vocabulary.added,
        "normalizer": made["normalizer"],
        "pre_tokenizer": made["pre_tokenizer"],
        "post_processor": vocabulary.post_processor,
        "decoder": made["decoder"],
        "model": made["model"],
    }
    ends = [file.id(key, len(vocabulary.tokens)) for key in ENDS]
    return ReadTokenizer(
        described, vocabulary.settings, tuple(dict.fromkeys(i for i in ends if i is not None)), tuple(notes)
    )


class _File:
    """Typed access to the metadata, by the part of a key after "tokenizer.ggml."."""

    def __init__(self, metadata: Mapping[str, Any], place: str) -> None:
        self.metadata, self.place = metadata, place

    def fail(self, key: str, value: Any, rule: str, remedy: str = DAMAGED) -> Any:
        name = key if key.startswith("tokenizer.") else GGML + key
        raise CheckpointError(f"{self.place}: {name} is {on_one_line(shown(value))}, {rule}; {remedy}")

    def get(self, key: str, kind: type, default: Any = None) -> Any:
        name = key if key.startswith("tokenizer.") else GGML + key
        value = self.metadata.get(name)
        if value is None:
            return default
        if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
            names = {str: "text", bool: "true or false", int: "a whole number", list: "a list of texts"}
            self.fail(key, value, f"but must be {names[kind]}")
        return value

    def require(self, key: str, kind: type) -> Any:
        value = self.get(key, kind)
        if value is None:
            raise CheckpointError(f"{self.place} lacks {GGML}{key}, which a file with a tokenizer has; {DAMAGED}")
        return value

    def texts(self, key: str, most: int) -> list[str]:
        """Return an array of texts of at most `most`, and not too many characters."""
        found = self.get(key, list, [])
        if len(found) > most:
            raise CheckpointError(
                f"{self.place}: {GGML}{key} has {len(found):,} entries, and at most {most:,} are read; {DAMAGED}"
            )
        wrong = next((i for i, text in enumerate(found) if not isinstance(text, str)), None)
        if wrong is not None:
            self.fail(f"{key}[{wrong}]", found[wrong], "but must be text")
        characters = sum(map(len, found))
        if characters > MOST_CHARACTERS:
            rule = f"and at most {MOST_CHARACTERS:,} are read"
            raise CheckpointError(f"{self.place}: {GGML}{key} has {characters:,} characters, {rule}; {DAMAGED}")
        return found

    def numbers(self, key: str, kinds: str, count: int) -> npt.NDArray[Any] | None:
        """Return an array of numbers of a dtype whose kind is one of `kinds`, at least one for each token."""
        value = self.metadata.get(GGML + key)
        if value is None:
            return None
        found = value if isinstance(value, np.ndarray) else np.array(value if isinstance(value, list) else [None])
        if found.ndim != 1 or found.dtype.kind not in kinds:
            self.fail(key, value, f"but must be an array of {'numbers' if 'f' in kinds else 'whole numbers'}")
        if len(found) != count:
            raise CheckpointError(
                f"{self.place}: {GGML}{key} has {len(found):,} entries, but must have one for each of the {count:,} "
                f"entries of {GGML}tokens; {DAMAGED}"
            )
        return found

    def id(self, key: str, count: int) -> int | None:
        """Return the id under a key, which must be that of a token."""
        value = self.get(key, int)
        if value is not None and not 0 <= value < count:
            self.fail(key, value, f"but the file has {counted(count, 'token')}, whose ids are below that")
        return None if value is None else int(value)


class _Vocabulary:
    """Tokens, kinds, scores, roles and what is put around a text: what all models have."""

    def __init__(self, file: _File, model: str) -> None:
        self.file, self.model = file, model
        file.require("tokens", list)
        tokens = file.texts("tokens", MOST_IDS - 1)
        count = len(tokens)
        kinds = file.numbers("token_type", "iu", count)
        kinds = np.ones(count, np.int64) if kinds is None else kinds.astype(np.int64)
        if ((kinds < 0) | (kinds > max(Kind))).any():
            i = int(np.argmax((kinds < 0) | (kinds > max(Kind))))
            file.fail(f"token_type[{i}]", int(kinds[i]), f"but kinds of tokens are 0 to {int(max(Kind))}")
        ids = [file.id(key, count) for key in (*ROLE_KEYS.values(), *ENDS)]
        used = max((i + 1 for i in ids if i is not None), default=0)
        while count > used and kinds[count - 1] == Kind.UNUSED and tokens[count - 1] == padding(count - 1):
            count -= 1
        self.tokens, self.kinds = tokens[:count], kinds[:count]
        if not count:
            raise CheckpointError(f"{file.place}: {GGML}tokens holds no token; {DAMAGED}")
        self.vocab = {token: i for i, token in enumerate(self.tokens)}
        if len(self.vocab) < count:
            i = next(i for i, token in enumerate(self.tokens) if self.vocab[token] != i)
            both = f"the ids {i} and {self.vocab[self.tokens[i]]} have the same token {shown(self.tokens[i])}"
            raise CheckpointError(f"{file.place}: {GGML}tokens: {both}; {DAMAGED}")
        scores = file.numbers("scores", "iuf", len(tokens))
        if scores is not None and not np.isfinite(scores).all():
            i = int(np.argmin(np.isfinite(scores)))
            file.fail(f"scores[{i}]", float(scores[i]), "but must be a finite number")
        self.scores = None if scores is None else scores[:count].astype(np.float64)
        self.roles = self._roles()

    def _roles(self) -> dict[str, int | None]:
        found = {role: self.file.id(key, len(self.tokens)) for role, key in ROLE_KEYS.items()}
        for role, default in DEFAULT_IDS[self.model].items():
            if found[role] is None and default < len(self.tokens):
                found[role] = default
        return found

    def named(self, role: str) -> str | None:
        """Return the token of a role."""
        i = self.roles[role]
        return None if i is None else self.tokens[i]

    @property
    def added(self) -> list[dict[str, Any]]:
        """The added tokens of tokenizer.json, which are found in a text before it is divided."""
        made = []
        for i, kind in enumerate(self.kinds.tolist()):
            if kind in ADDED:
                if not self.tokens[i]:
                    self.file.fail(f"tokens[{i}]", "", "but a token that is found in texts must have characters")
                flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
                made.append({"id": i, "content": self.tokens[i], "special": kind in SPECIAL, **flags})
        return made

    def of_kind(self, *kinds: Kind) -> set[str]:
        """Return the tokens of some kinds."""
        return {self.tokens[i] for i in np.flatnonzero(np.isin(self.kinds, kinds))}

    @property
    def post_processor(self) -> dict[str, Any] | None:
        """What puts bos before a text and eos after it."""
        around = {}
        for role, default in (("bos", self._begins_with_bos), ("eos", self.model == "t5")):
            if not self.file.get(f"add_{role}_token", bool, default):
                continue
            name = around[role] = self.named(f"{role}_token")
            if name is None:
                rule = f"but {GGML}{role}_token_id does not say which token that is"
                self.file.fail(f"add_{role}_token", True, rule)
        if not around:
            return None
        special = {name: {"id": name, "ids": [self.vocab[name]], "tokens": [name]} for name in around.values() if name}

        def text(name: str, kind: int) -> list[dict[str, Any]]:
            token = {role: [{"SpecialToken": {"id": token, "type_id": kind}}] for role, token in around.items()}
            return [*token.get("bos", []), {"Sequence": {"id": name, "type_id": kind}}, *token.get("eos", [])]

        pair = text("A", 0) + text("B", 1)
        return {"type": "TemplateProcessing", "single": text("A", 0), "pair": pair, "special_tokens": special}

    @property
    def _begins_with_bos(self) -> bool:
        """What a file without add_bos_token means."""
        if self.model == "gpt2":
            return rule_called(self.file.get("pre", str, "default"), self.file.place).begins_with_bos
        return self.model == "llama"

    @property
    def settings(self) -> dict[str, Any]:
        """The content of tokenizer_config.json."""
        roles = {role: self.named(role) for role in ("bos_token", "eos_token", "pad_token", "unk_token")}
        more = {role: name for role in ROLE_KEYS if role not in roles and (name := self.named(role)) is not None}
        made = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "model_max_length": 1 << 30,
            "clean_up_tokenization_spaces": False,
            **roles,
            **more,
        }
        template = self._templates()
        return made if template is None else {**made, "chat_template": template}

    def _templates(self) -> str | list[dict[str, str]] | None:
        default = self.file.get(TEMPLATE, str)
        names = self.file.get(TEMPLATES, list, [])
        made = [] if default is None else [{"name": "default", "template": default}]
        for i, name in enumerate(names):
            template = self.file.get(f"{TEMPLATE}.{name}", str) if isinstance(name, str) else None
            if template is None:
                self.file.fail(f"{TEMPLATES}[{i}]", name, f"but there is no {TEMPLATE}.{name}")
            if name != "default":
                made.append({"name": name, "template": template})
        return default if not names else made


Made = tuple[dict[str, Any], list[str]]


def _bpe_of_bytes(vocabulary: _Vocabulary) -> Made:
    file = vocabulary.file
    rule = rule_called(file.get("pre", str, "default"), file.place)
    merges = _merges(vocabulary)
    model: dict[str, Any] = {"type": "BPE", "vocab": vocabulary.vocab, "merges": merges}
    if rule.whole_words:
        model["ignore_merges"] = True
    # Where nothing is merged, words make no difference: the byte tokenizer is written as it writes itself.
    words = pre_tokenizer_of(rule.steps) if merges or rule.whole_words else byte_level(use_regex=False)
    made = {"normalizer": None, "pre_tokenizer": words, "decoder": byte_level(use_regex=False), "model": model}
    notes = []
    if file.get("add_space_prefix", bool, False):
        notes.append(f"{GGML}add_space_prefix is true, which llama.cpp reads past for byte-level BPE, as is done here")
    return made, notes


def _merges(vocabulary: _Vocabulary) -> list[list[str]]:
    """Return the merges as pairs, each of two tokens that make a third."""
    file, vocab = vocabulary.file, vocabulary.vocab
    file.require("merges", list)
    made = []
    for i, text in enumerate(file.texts("merges", MOST_MERGES)):
        left, space, right = text.partition(" ")
        if not space or not left or not right or " " in right:
            file.fail(f"merges[{i}]", text, "but must be two tokens with a space between them")
        for token in (left, right, left + right):
            if token not in vocab:
                file.fail(f"merges[{i}]", text, f"but {shown(token)} is not one of {GGML}tokens")
        made.append([left, right])
    return made


def _bpe_of_sentencepiece(vocabulary: _Vocabulary) -> Made:
    file, scores = vocabulary.file, vocabulary.scores
    if scores is None:
        file.require("scores", list)
    bytes_of = {byte_token(byte) for byte in range(256)}
    has = bytes_of & vocabulary.vocab.keys()
    if has and len(has) < 256:
        missing = listed(sorted(bytes_of - has), 3)
        raise CheckpointError(
            f"{file.place}: {GGML}tokens has {len(has)} of the 256 byte tokens, and lacks {missing}; {DAMAGED}"
        )
    skipped = vocabulary.of_kind(Kind.CONTROL, Kind.UNKNOWN, Kind.BYTE, Kind.USER_DEFINED) | bytes_of
    merges, notes = merges_of_scores(vocabulary.vocab, scores, skipped, file.place)  # type: ignore[arg-type]
    model = {
        "type": "BPE",
        "unk_token": vocabulary.named("unk_token"),
        "fuse_unk": True,
        "byte_fallback": bool(has),
        "vocab": vocabulary.vocab,
        "merges": merges,
    }
    made = {**bpe_steps(file.get("add_space_prefix", bool, True)), "model": model}
    if file.get("remove_extra_whitespaces", bool, False):
        notes.append(f"{GGML}remove_extra_whitespaces is true, which llama.cpp reads past for llama, as is done here")
    return made, notes


def _unigram(vocabulary: _Vocabulary) -> Made:
    file, scores = vocabulary.file, vocabulary.scores
    if scores is None:
        file.require("scores", list)
    unknown = vocabulary.roles["unk_token"]
    if unknown is None:
        file.require("unknown_token_id", int)
    pairs = [[token, score] for token, score in zip(vocabulary.tokens, scores.tolist(), strict=True)]  # type: ignore[union-attr]
    charsmap = file.metadata.get(f"{GGML}precompiled_charsmap")
    steps = unigram_steps(
        file.get("add_space_prefix", bool, False),
        file.get("remove_extra_whitespaces", bool, False),
        None if charsmap is None else _charsmap(charsmap, file),
    )
    model = {"type": "Unigram", "unk_id": unknown, "vocab": pairs, "byte_fallback": False}
    return {**steps, "model": model}, []


def _charsmap(value: Any, file: _File) -> str:
    """Return the table of the normaliser in base64: its length in four bytes, a trie, and texts that end in zeros."""
    found = np.asarray(value)
    if found.ndim != 1 or found.dtype not in (np.dtype(np.int8), np.dtype(np.uint8)):
        file.fail("precompiled_charsmap", value, "but must be an array of bytes")
    raw = found.tobytes()
    trie = int.from_bytes(raw[:4], "little")
    if len(raw) < 8 or trie % 4 or not 4 <= trie < len(raw) - 4 or raw[-1]:
        rule = "but must be the length of a trie, the trie, and texts that end in zeros"
        file.fail("precompiled_charsmap", value, rule)
    return base64.b64encode(raw).decode()


_MODELS = {"gpt2": _bpe_of_bytes, "llama": _bpe_of_sentencepiece, "t5": _unigram}
