"""The tokenizer of a folder as the metadata of a GGUF file: the way back of `vocabulary.py`.

    byte-level BPE                                   gpt2: its pre_tokenizer must be one that llama.cpp has a name for
    BPE of characters with bytes for the others      llama: its merges become scores (merges.py)
    Unigram                                          t5

What a GGUF file cannot say and what changes ids only for few texts is a *loss*: a sentence, for the caller to show.
What would change ids in ordinary texts is an error.
"""

import base64
import binascii
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import tokenizers

from ...errors import DataError, counted, listed, shown
from ..special_tokens import MOST_IDS, token_name
from .merges import scores_of_merges
from .pretokenizers import COARSER, rules_of, steps_of
from .space_marks import FOLDER, SPACE, TRAINED, bpe_marks, unigram_marks, walk
from .values import U32
from .vocabulary_keys import DEFAULT_IDS, ENDS, GGML, ROLE_KEYS, TEMPLATE, TEMPLATES, Kind, byte_token, padding

__all__ = ["WrittenTokenizer", "metadata_of"]

BYTE_TOKENS = {byte_token(byte) for byte in range(256)}
# Normalizers that leave most texts as they are: llama.cpp has none for BPE.
GENTLE = {"NFC": "Unicode's form NFC", "NFKC": "Unicode's form NFKC", "Precompiled": "the form of its normalizer"}
FLAGS = {"lstrip": "the white space before it", "rstrip": "the white space after it"}


@dataclass(frozen=True)
class WrittenTokenizer:
    """The metadata by key, its arrays of numbers NumPy's; and what it does not say, in sentences."""

    metadata: dict[str, Any]
    losses: tuple[str, ...] = ()


def metadata_of(
    tokenizer: Mapping[str, Any],
    settings: Mapping[str, Any],
    *,
    rows: int | None = None,
    ends: Iterable[int] = (),
    place: str = "tokenizer.json",
) -> WrittenTokenizer:
    """Return what a GGUF file says of a tokenizer.

    tokenizer   the content of tokenizer.json: one that the `tokenizers` library reads
    settings    that of tokenizer_config.json; the names of roles, and the chat template, of several a list
    rows        rows of the model's embedding: ids that no token has are filled up to them
    ends        ids at which a text ends, as generation_config.json says

    DataError for what llama.cpp cannot tokenize alike, with what can be done.
    """
    kind = (tokenizer.get("model") or {}).get("type")
    if kind not in ("BPE", "Unigram"):
        raise DataError(
            f"{place}: its model is {shown(kind)}, and a model that writes text has BPE or Unigram; {FOLDER}"
        )
    writer = _Writer(tokenizer, settings, rows, place)
    if kind == "Unigram":
        writer.unigram()
    else:
        steps = steps_of(tokenizer.get("pre_tokenizer"), place)
        if steps is None:
            writer.bpe_of_characters()
        else:
            writer.bpe_of_bytes(steps)
    writer.add_roles(tuple(ends))
    writer.add_templates()
    return WrittenTokenizer(writer.metadata, tuple(writer.losses))


class _Writer:
    """The metadata while it is made."""

    def __init__(self, tokenizer: Mapping[str, Any], settings: Mapping[str, Any], rows: int | None, place: str) -> None:
        self.described, self.settings, self.place = tokenizer, settings, place
        self.model: Mapping[str, Any] = tokenizer["model"]
        self.added: list[Mapping[str, Any]] = list(tokenizer.get("added_tokens") or [])
        self.metadata: dict[str, Any] = {}
        self.losses: list[str] = []
        self._fill(rows)
        self._refuse_unusual()

    def fail(self, what: str, remedy: str = TRAINED) -> Any:
        raise DataError(f"{self.place}: {what}; {remedy}")

    # -- tokens ------------------------------------------------------------------------------------

    def _fill(self, rows: int | None) -> None:
        """Make the lists of tokens and kinds, in the order of ids."""
        vocab = self.model.get("vocab") or {}
        own = dict(vocab) if isinstance(vocab, Mapping) else {entry[0]: i for i, entry in enumerate(vocab)}
        added = {token["content"]: token["id"] for token in self.added}
        ids = {**own, **added}
        used = max(ids.values(), default=-1) + 1
        if rows is not None and used > rows:
            self.fail(
                f"the largest id is {used - 1}, but the model has {counted(rows, 'row')}, one for each id",
                "give the tokenizer that the model was trained with",
            )
        count = used if rows is None else rows
        if count >= MOST_IDS:
            self.fail(f"it has {count:,} ids, and a vocabulary has fewer than {MOST_IDS:,}", FOLDER)
        names: list[str | None] = [None] * count
        for name, number in ids.items():
            if names[number] is not None:
                self.fail(f"{shown(names[number])} and {shown(name)} have the same id {number}", "give each its own")
            names[number] = name
        filled = [padding(i) if name is None else name for i, name in enumerate(names)]
        for i, name in enumerate(names):
            if name is None and padding(i) in ids:
                self.fail(f"{padding(i)} has another id than {i}, but that is what fills id {i}", "rename that token")
        self.ids, self.tokens = ids, filled
        self.kinds = np.full(count, Kind.NORMAL, np.int32)
        for i, name in enumerate(names):
            if name is None or name == padding(i):
                self.kinds[i] = Kind.UNUSED
        for token in self.added:
            self.kinds[token["id"]] = Kind.CONTROL if token.get("special") else Kind.USER_DEFINED
            self._note_flags(token)
        if zeros := sum("\0" in name for name in ids):
            self.losses.append(f"{counted(zeros, 'token')} with the character U+0000, where a token ends in llama.cpp")

    def _note_flags(self, token: Mapping[str, Any]) -> None:
        taken = [what for flag, what in FLAGS.items() if token.get(flag)]
        if taken:
            self.losses.append(
                f"{shown(token['content'])} takes away {' and '.join(taken)}, which llama.cpp leaves there"
            )
        if token.get("single_word"):
            self.losses.append(
                f"{shown(token['content'])} is a token only as a word of its own; llama.cpp finds it anywhere"
            )

    def _refuse_unusual(self) -> None:
        for key in ("continuing_subword_prefix", "end_of_word_suffix"):
            if self.model.get(key):
                self.fail(f"its model marks parts of words ({key} {shown(self.model[key])}), which GGUF has no key for")
        if self.model.get("dropout"):
            self.fail(f"its model drops merges by chance (dropout {self.model['dropout']})", "set dropout to null")

    def _add(self, model: str, pre: str) -> None:
        self.metadata |= {
            f"{GGML}model": model,
            f"{GGML}pre": pre,
            f"{GGML}tokens": self.tokens,
            f"{GGML}token_type": self.kinds,
        }

    def _note_normalizers(self, steps: Iterable[Mapping[str, Any]]) -> None:
        for step in steps:
            kind = str(step.get("type"))
            if kind not in GENTLE:
                self.fail(f"its normalizer has the step {shown(dict(step))}, and llama.cpp changes no text before BPE")
            self.losses.append(
                f"a text is brought into {GENTLE[kind]} before it is divided; llama.cpp takes it as it is written"
            )

    def _merges(self) -> list[tuple[str, str]]:
        """Return the merges as pairs; both ways of writing them are read."""
        pairs = (merge.split(" ", 1) if isinstance(merge, str) else merge for merge in self.model.get("merges") or ())
        return [(left, right) for left, right in pairs]

    # -- models ------------------------------------------------------------------------------------

    def bpe_of_bytes(self, steps: tuple[str, ...]) -> None:
        """Write gpt2."""
        self._note_normalizers(walk(self.described.get("normalizer"), "normalizers"))
        merges = self._merges()
        spaced = next((pair for pair in merges if " " in "".join(pair)), None)
        if spaced:
            self.fail(f"the merge {shown(spaced)} has a space in it, which no byte is written as")
        self._add("gpt2", self._name(steps, merges))
        self.metadata[f"{GGML}merges"] = [f"{left} {right}" for left, right in merges]

    def _name(self, steps: tuple[str, ...], merges: Sequence[tuple[str, str]]) -> str:
        """Return the name of the way in which words are divided."""
        whole = bool(self.model.get("ignore_merges"))
        if not merges and not whole:
            return "gpt-2"  # every byte is a token of its own, however words are divided
        if steps in COARSER:
            steps = COARSER[steps]
            if across := self._across_borders():
                inside = f"{counted(len(across), 'token')} ({listed([shown(each) for each in across], 3)})"
                self.losses.append(f"words are divided inside {inside}, but not by llama.cpp")
        rules = rules_of(steps)
        if not rules:
            by = listed([shown(step) for step in steps], 3) or "nothing"
            self.fail(
                f"words are divided by {by}, and no way that llama.cpp has a name for (tokenizer.ggml.pre) does so"
            )
        rule = next((rule for rule in rules if rule.whole_words == whole), None)
        if rule is None:
            rule = rules[0]
            unmade = self._without_merges(merges)
            if unmade:
                names = listed([shown(each) for each in unmade], 3)
                does = (
                    "which are taken for a word, and not by"
                    if whole
                    else "which are never made, but taken for a word by"
                )
                self.losses.append(f"no merges make {counted(len(unmade), 'token')} ({names}), {does} llama.cpp")
        return rule.names[0]

    def _across_borders(self) -> list[str]:
        """Return the texts of tokens, not added ones, that the pre-tokenizer divides."""
        words = tokenizers.Tokenizer.from_str(json.dumps(self.described)).pre_tokenizer
        added = {token["content"] for token in self.added}
        decode = tokenizers.decoders.ByteLevel().decode
        own = [decode([token]) for token in self.model["vocab"] if token not in added]
        return [text for text in own if "\ufffd" not in text and len(words.pre_tokenize_str(text)) > 1]

    def _without_merges(self, merges: Sequence[tuple[str, str]]) -> list[str]:
        """Return the tokens, not added ones, that are not what their own characters are merged into."""
        ranks = {pair: rank for rank, pair in enumerate(merges)}
        added = {token["content"] for token in self.added}
        return [token for token in self.model["vocab"] if token not in added and _merged(token, ranks) != [token]]

    def bpe_of_characters(self) -> None:
        """Write llama."""
        marks = bpe_marks(self.described, self.ids, self.place)
        self.losses += marks.losses
        self._note_normalizers(marks.rest)
        missing = sorted(BYTE_TOKENS - self.ids.keys())
        if not self.model.get("byte_fallback") or missing:
            lacks = f"byte tokens are missing, {listed(missing, 3)}" if missing else "byte_fallback is false"
            self.fail(f"characters that are no tokens are not written in bytes ({lacks}), which llama.cpp always does")
        if self.model.get("ignore_merges"):
            self.fail(
                "words that are tokens are taken whole (ignore_merges), which llama.cpp does for byte-level BPE alone"
            )
        added = {token["content"] for token in self.added}
        unused = {self.tokens[i] for i in np.flatnonzero(self.kinds == Kind.UNUSED)}
        vocab = {token: i for i, token in enumerate(self.tokens)}
        scores = scores_of_merges(self._merges(), vocab, added | unused | BYTE_TOKENS, self.place)
        for token in BYTE_TOKENS - added:
            self.kinds[vocab[token]] = Kind.BYTE
        self._mark_unknown(self.model.get("unk_token"))
        for entry in self.added:
            if not entry.get("special") and entry.get("normalized") and SPACE in entry["content"]:
                # It is found in a text whose spaces are marks already, and llama.cpp's has spaces.
                self.tokens[entry["id"]] = entry["content"].replace(SPACE, " ")
        self._add("llama", "default")
        self.metadata |= {f"{GGML}scores": scores, f"{GGML}add_space_prefix": marks.prefix}

    def unigram(self) -> None:
        """Write t5."""
        marks = unigram_marks(self.described, self.ids, self.place)
        self.losses += marks.losses
        if self.model.get("byte_fallback"):
            self.fail("characters that are no tokens are written in bytes, and llama.cpp has the unknown token there")
        unknown = self.model.get("unk_id")
        scores = np.zeros(len(self.tokens), np.float32)
        scores[: len(self.model["vocab"])] = [score for _, score in self.model["vocab"]]
        self._mark_unknown(self.tokens[unknown] if isinstance(unknown, int) else None)
        self._add("t5", "default")
        self.metadata |= {
            f"{GGML}scores": scores,
            f"{GGML}add_space_prefix": marks.prefix,
            f"{GGML}remove_extra_whitespaces": marks.merged,
        }
        if marks.charsmap is not None:
            self.metadata[f"{GGML}precompiled_charsmap"] = self._charsmap(marks.charsmap)

    def _charsmap(self, text: Any) -> Any:
        try:
            return np.frombuffer(base64.b64decode(text, validate=True), np.uint8)
        except (TypeError, ValueError, binascii.Error):
            return self.fail(f"its precompiled_charsmap is {shown(text)}, but must be base64", "copy the file again")

    def _mark_unknown(self, name: str | None) -> None:
        token_id = None if name is None else self.ids.get(name)
        if token_id is None:
            self.fail("it has no unknown token (unk_token), and llama.cpp needs one", FOLDER)
        else:
            self.kinds[token_id] = Kind.UNKNOWN
            self.metadata[f"{GGML}{ROLE_KEYS['unk_token']}"] = U32(token_id)

    # -- roles -------------------------------------------------------------------------------------

    def add_roles(self, ends: tuple[int, ...]) -> None:
        """Write the ids of roles, those that end a text, and what is put around one."""
        for role, key in ROLE_KEYS.items():
            name = token_name(self.settings.get(role))
            if name is not None and f"{GGML}{key}" not in self.metadata:
                if not isinstance(name, str) or name not in self.ids:
                    self.fail(
                        f"{role} is {shown(name)}, which is not in the vocabulary", f"correct {role}, or set it to null"
                    )
                self.metadata[f"{GGML}{key}"] = U32(self.ids[name])
        self._add_ends(ends)
        before, after = self._around()
        for role, ids in (("bos", before), ("eos", after)):
            key = f"{GGML}{role}_token_id"
            if len(ids) > 1 or (ids and self.metadata.setdefault(key, U32(ids[0])) != ids[0]):
                names = listed([shown(self.tokens[i]) for i in ids], 4)
                end = "before" if role == "bos" else "after"
                self.fail(
                    f"post_processor puts {names} {end} a text, and llama.cpp puts {role}_token there, or nothing",
                    f"make it the {role}_token, or {FOLDER}",
                )
            self.metadata[f"{GGML}add_{role}_token"] = bool(ids)

    def _add_ends(self, ends: tuple[int, ...]) -> None:
        wrong = next((i for i in ends if not 0 <= i < len(self.tokens)), None)
        if wrong is not None:
            self.fail(f"a text ends at the id {wrong}, which no token has", "correct eos_token_id of the model")
        eos = self.metadata.get(f"{GGML}eos_token_id")
        order = list(dict.fromkeys([*([] if eos is None else [eos]), *ends]))
        for key, token_id in zip(ENDS, order):
            self.metadata[f"{GGML}{key}"] = U32(token_id)
        if len(order) > len(ENDS):
            names = listed([shown(self.tokens[i]) for i in order[len(ENDS) :]], 4)
            self.losses.append(f"a text ends at {names} too; a GGUF file names {len(ENDS)} such tokens")
        model = self.metadata[f"{GGML}model"]
        default = {"gpt2": 11}.get(model, DEFAULT_IDS[model].get("eos_token", 0))
        if not order and default < len(self.tokens):
            taken = shown(self.tokens[default])
            self.losses.append(f"no token ends a text, and llama.cpp takes the one with the id {default} then, {taken}")

    def _around(self) -> tuple[list[int], list[int]]:
        """Return the ids that the post-processor puts before a text and after it."""
        before: list[int] = []
        after: list[int] = []
        for step in walk(self.described.get("post_processor"), "processors"):
            kind = step.get("type")
            if kind == "TemplateProcessing":
                side = before
                for part in step.get("single") or ():
                    if "Sequence" in part:
                        side = after
                    else:
                        name = part["SpecialToken"]["id"]
                        side += (step.get("special_tokens") or {}).get(name, {}).get("ids", [-1])
            elif kind in ("RobertaProcessing", "BertProcessing"):
                before.append(step["cls"][1])
                after.append(step["sep"][1])
            elif kind != "ByteLevel":  # which moves offsets alone
                self.fail(f"post_processor has the step {shown(kind)}, which is not known here", FOLDER)
        if not all(0 <= i < len(self.tokens) for i in (*before, *after)):
            self.fail(
                "post_processor puts a token around a text, and gives it no id of the vocabulary", "correct it there"
            )
        return before, after

    def add_templates(self) -> None:
        """Write the chat template; of several also the others, by name."""
        template = self.settings.get("chat_template")
        if template is None:
            return
        if isinstance(template, str):
            self.metadata[TEMPLATE] = template
            return
        others = []
        for entry in template:
            name, text = entry.get("name"), entry.get("template")
            if not isinstance(name, str) or not isinstance(text, str) or not re.fullmatch(r"[A-Za-z0-9_]+", name):
                rule = "but a name is of letters, digits and underscores"
                self.fail(f"chat_template has an entry called {shown(name)}, {rule}", "rename it")
            if name == "default":
                self.metadata[TEMPLATE] = text
            else:
                self.metadata[f"{TEMPLATE}.{name}"] = text
                others.append(name)
        if others:
            self.metadata[TEMPLATES] = others


def _merged(text: str, ranks: Mapping[tuple[str, str], int]) -> list[str]:
    """Return what BPE makes of a word."""
    parts = list(text)
    while len(parts) > 1:
        best = min(range(len(parts) - 1), key=lambda i: ranks.get((parts[i], parts[i + 1]), len(ranks)))
        if (parts[best], parts[best + 1]) not in ranks:
            break
        parts[best : best + 2] = [parts[best] + parts[best + 1]]
    return parts
