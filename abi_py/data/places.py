"""A piece of text is encoded by its place: what begins a text is not encoded as what goes on from one.

    text                        <s>Hello</s>how are        (`</s>` is a special token)
    Prepend, Metaspace always   <s> _Hello </s> _how _are  a space mark at the beginning, and after each special token
    Metaspace first             <s> Hello </s> how _are    ... at the beginning of all only, which is `<s>` here
    neither                     <s> Hello </s> how _are    (GPT-2, Llama 3, Qwen)

The `tokenizers` library knows the place of a piece if it is given the whole text.  A text whose parts come one by one,
or in which some special tokens are to be ordinary characters, it cannot be given; so there is a copy of the tokenizer
for each place, which differs in nothing but these marks.  Without such marks, one
copy serves all three places.
"""

import json
import re
from collections.abc import Mapping, Sequence
from enum import Enum
from functools import cached_property
from typing import Any

import tokenizers

from ..formats.library import library_errors

__all__ = ["Place", "PlacedBackend", "without_strip"]


class Place(Enum):
    """What comes before a piece."""

    FIRST = "nothing"
    AFTER_SPECIAL = "a special token"
    AFTER_TEXT = "text of which it is the continuation"


def _walk(steps: Any) -> list[dict[str, Any]]:
    """Return the steps of a normalizer or pre-tokenizer in their order, those of a Sequence one by one."""
    if steps is None:
        return []
    inner = steps.get("normalizers") or steps.get("pretokenizers")
    return [steps] if inner is None else [step for each in inner for step in _walk(each)]


def _described_for(place: Place, described: dict[str, Any]) -> dict[str, Any]:
    """Return the JSON of the tokenizer that encodes every text as if it were there."""
    made: dict[str, Any] = json.loads(json.dumps({key: described[key] for key in ("normalizer", "pre_tokenizer")}))
    for step in (*_walk(made["normalizer"]), *_walk(made["pre_tokenizer"])):
        scheme = step.get("prepend_scheme")
        if place is Place.AFTER_TEXT:
            if step["type"] == "Prepend":
                step["prepend"] = ""
            elif step["type"] == "Metaspace":
                step["prepend_scheme"] = "never"
            elif "add_prefix_space" in step:  # ByteLevel
                step["add_prefix_space"] = False
            elif step["type"] == "Replace" and step["pattern"].get("Regex", "").startswith(r"\A"):
                step["pattern"] = {"Regex": "(?!)"}  # what is done where a text begins is not done here
            if step.get("strip_left"):
                step["strip_left"] = False
        elif place is Place.AFTER_SPECIAL and scheme == "first":
            step["prepend_scheme"] = "never"
    return {**described, **made}


class PlacedBackend:
    """A tokenizer of the library, and its copies for the other places; special tokens recognised, or with `plain` not.

    begins_with_space  a text gets a space mark at its beginning
    begins_after       added tokens after which the text begins anew, with a space mark (none: it goes on)
    """

    def __init__(self, backend: tokenizers.Tokenizer, described: dict[str, Any], plain: bool) -> None:
        self._given, self._described, self._plain = backend, described, plain
        self._added = frozenset(entry["id"] for entry in described["added_tokens"])
        changed = {place: _described_for(place, described) for place in Place}
        self._changed = {place: made for place, made in changed.items() if made != described}
        after_text = changed[Place.AFTER_TEXT]
        self.begins_with_space = changed[Place.FIRST] != after_text
        self.begins_after = self._added if changed[Place.AFTER_SPECIAL] != after_text else frozenset[int]()
        # A first step that removes the white space makes each word a beginning.
        steps = [step["type"] for step in _walk(described["pre_tokenizer"])]
        self._words_begin = "WhitespaceSplit" in steps[:-1]
        self._backends: dict[Place, tokenizers.Tokenizer] = {}

    def backend(self, place: Place) -> tokenizers.Tokenizer:
        """Return the tokenizer that takes a text to be there."""
        if place not in self._changed:
            return self._first
        if place not in self._backends:
            self._backends[place] = self._copy(json.dumps(self._changed[place], ensure_ascii=False))
        return self._backends[place]

    @cached_property
    def _first(self) -> tokenizers.Tokenizer:
        return self._copy(self._given.to_str()) if self._plain else self._given

    def _copy(self, text: str) -> tokenizers.Tokenizer:
        # It may not be able to read what it has written itself.
        with library_errors("the description of this tokenizer cannot be read again", "copy its file again"):
            made = tokenizers.Tokenizer.from_str(text)
        made.encode_special_tokens = self._plain  # the library's name for "encode them like any other text"
        return made

    def encode(self, text: str, place: Place = Place.FIRST, add_special_tokens: bool = False) -> list[int]:
        """Return the ids of a text that is there; with `add_special_tokens` the post-processor's around it."""
        if place is not Place.AFTER_TEXT or place not in self._changed:
            return self.backend(place).encode(text, add_special_tokens=add_special_tokens).ids
        end = next((found.start() for found in re.finditer(r"\s", text)), None) if self._words_begin else None
        head = self.backend(place).encode(text if end is None else text[:end], add_special_tokens=False)
        ids: list[int] = head.ids
        if (last := next((i for i, each in enumerate(ids) if each in self._added), None)) is not None:
            # Only what comes before the first added token continues anything.
            end, ids = head.offsets[last][1], ids[: last + 1]
        return ids if end is None else ids + self.encode(text[end:], Place.AFTER_SPECIAL)

    def encode_batch(
        self, texts: Sequence[str], places: Sequence[Place] | None = None, add_special_tokens: bool = False
    ) -> list[list[int]]:
        """Return the ids of each text at its place (None: all are first), as `encode` does, on all cores."""
        made: list[list[int]] = [[]] * len(texts)
        for place in Place:
            at = [i for i in range(len(texts)) if (Place.FIRST if places is None else places[i]) is place]
            # encode_batch_fast leaves out the positions in the text, which nothing here reads.
            encodings = self.backend(place).encode_batch_fast(
                [texts[i] for i in at], add_special_tokens=add_special_tokens
            )
            divided = place is Place.AFTER_TEXT and place in self._changed
            for i, encoding in zip(at, encodings, strict=True):
                whole = not divided or not (self._words_begin or self._added.intersection(encoding.ids))
                made[i] = encoding.ids if whole else self.encode(texts[i], place)
        return made


# What Rust's \s matches, which is what the library removes beside a token with lstrip or rstrip.
_WHITE = "\t\n\v\f\r \x85\xa0\u1680" + "".join(map(chr, range(0x2000, 0x200B))) + "\u2028\u2029\u202f\u205f\u3000"


def without_strip(pieces: Sequence[tuple[str, bool]], strips: Mapping[str, tuple[bool, bool]]) -> list[str]:
    """Return the texts of pieces (text, is it a special token) without the white space that special tokens take away.

    strips[token] says whether it takes white space before it (lstrip) and after it (rstrip).
    """
    texts = [text for text, _ in pieces]
    for step in (1, -1):
        stripping = False
        for i in range(len(pieces))[::step]:
            text, special = texts[i], pieces[i][1]
            if special:
                stripping = strips.get(text, (False, False))[step == 1]
            elif stripping:
                texts[i] = text.lstrip(_WHITE) if step == 1 else text.rstrip(_WHITE)
                stripping = not texts[i]
    return texts
