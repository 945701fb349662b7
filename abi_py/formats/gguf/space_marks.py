r"""How SentencePiece's tokenizers mark spaces: the steps of a tokenizer.json from what a GGUF file says, and back.

    llama    each space becomes a mark, and a text begins with one more (add_space_prefix)
    t5       a table rewrites characters (precompiled_charsmap); with remove_extra_whitespaces spaces at the ends go,
             several become one, and a text begins with a mark; otherwise as llama, but a text of spaces alone begins
             with none

llama.cpp takes what follows a special token for the beginning of a text; of the steps of a tokenizer.json Prepend does
so, Metaspace only with the scheme "always", and it leaves out the mark where a text begins with a space.
"""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

from ...errors import DataError, shown

__all__ = ["FOLDER", "SPACE", "TRAINED", "Marks", "bpe_marks", "bpe_steps", "unigram_marks", "unigram_steps", "walk"]

SPACE = "\u2581"  # how SentencePiece writes a space
FOLDER = "keep the model as a folder"
TRAINED = f"{FOLDER}, or train it with a tokenizer of `abi-train tokenizer train`"
# What t5's normalizer replaces: spaces at the beginning, at the end, several; the place before a text with others.
LEADING, TRAILING, SEVERAL, BEGINNING = ({"Regex": regex} for regex in (r"\A +", r" +\z", " {2,}", r"\A(?= *[^ ])"))
ONE_MARK = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
ONE_SPACE = {"type": "Replace", "pattern": {"String": SPACE}, "content": " "}
PREPEND = {"type": "Prepend", "prepend": SPACE}
NO_SECOND = "a text that begins with a space gets no mark for another one; in llama.cpp it does"
NO_OTHER = "what follows a special token gets no mark for a space; in llama.cpp it does"
OTHER_WHITE = "white space of any kind at the end of a text is taken away; llama.cpp takes spaces"


class Marks(NamedTuple):
    """What a tokenizer.json does with spaces.

    prefix    a text begins with a mark for a space
    merged    several spaces are one, and those at the ends of a text none
    charsmap  the table that rewrites characters, in base64
    rest      the other steps of the normalizer
    losses    what llama.cpp does differently, in sentences
    """

    prefix: bool
    merged: bool = False
    charsmap: Any = None
    rest: tuple[Mapping[str, Any], ...] = ()
    losses: tuple[str, ...] = ()


def walk(step: Any, inner: str) -> Iterator[Mapping[str, Any]]:
    """Yield the steps of a normalizer, pre-tokenizer or post-processor in their order, those of a Sequence one by one.

    inner is the key under which such a Sequence has its steps.
    """
    if isinstance(step, Mapping):
        if step.get("type") == "Sequence":
            for each in step.get(inner) or ():
                yield from walk(each, inner)
        else:
            yield step


# -- llama ---------------------------------------------------------------------------------------


def bpe_steps(prefix: bool) -> dict[str, Any]:
    """Return normalizer, pre_tokenizer and decoder of a tokenizer.json."""
    strip = [{"type": "Strip", "content": " ", "start": 1, "stop": 0}] if prefix else []
    return {
        "normalizer": {"type": "Sequence", "normalizers": [PREPEND, ONE_MARK] if prefix else [ONE_MARK]},
        "pre_tokenizer": None,
        "decoder": {"type": "Sequence", "decoders": [ONE_SPACE, {"type": "ByteFallback"}, {"type": "Fuse"}, *strip]},
    }


def bpe_marks(described: Mapping[str, Any], tokens: Iterable[str], place: str) -> Marks:
    """Return what a tokenizer.json does; DataError if it is not what llama.cpp does with some tokenizer."""
    steps = list(walk(described.get("normalizer"), "normalizers"))
    words = list(walk(described.get("pre_tokenizer"), "pretokenizers"))
    rest = tuple(step for step in steps if step not in (PREPEND, ONE_MARK))
    if ONE_MARK in steps and all(step.get("pattern") == {"String": " "} for step in words):
        return Marks(PREPEND in steps, rest=rest)  # there is no space left at which words could be divided
    if ONE_MARK not in steps and PREPEND not in steps and _is_metaspace(words):
        _refuse_inner_marks(words[0], tokens, place)
        scheme = words[0].get("prepend_scheme", "always")
        return Marks(scheme != "never", rest=rest, losses=_first_mark(scheme))
    ways = "by Prepend and Replace, or by Metaspace alone"
    raise DataError(
        f"{place}: it makes no bytes (ByteLevel), and marks spaces in no way that llama.cpp knows: {ways}; {TRAINED}"
    )


# -- t5 ------------------------------------------------------------------------------------------


def unigram_steps(prefix: bool, merged: bool, charsmap: str | None) -> dict[str, Any]:
    """Return normalizer, pre_tokenizer and decoder of a tokenizer.json."""
    steps: list[dict[str, Any]] = []
    if charsmap is not None:
        steps.append({"type": "Precompiled", "precompiled_charsmap": charsmap})
    if merged:
        steps += [{"type": "Replace", "pattern": pattern, "content": ""} for pattern in (LEADING, TRAILING)]
        steps.append({"type": "Replace", "pattern": SEVERAL, "content": " "})
    prefix = prefix or merged  # where llama.cpp merges spaces, it begins a text with one
    if prefix:
        steps.append({"type": "Replace", "pattern": BEGINNING, "content": SPACE})
    marks = {"type": "Metaspace", "replacement": SPACE, "split": False}
    return {
        "normalizer": {"type": "Sequence", "normalizers": steps} if steps else None,
        "pre_tokenizer": {**marks, "prepend_scheme": "never"},
        "decoder": {**marks, "prepend_scheme": "always" if prefix else "never"},
    }


def unigram_marks(described: Mapping[str, Any], tokens: Iterable[str], place: str) -> Marks:
    """Return what a tokenizer.json does; DataError if it is not what llama.cpp does with some tokenizer."""
    steps = list(walk(described.get("normalizer"), "normalizers"))
    words = list(walk(described.get("pre_tokenizer"), "pretokenizers"))
    if not _is_metaspace(words):
        raise DataError(f"{place}: its words are divided by something else than Metaspace alone; {FOLDER}")
    _refuse_inner_marks(words[0], tokens, place)
    scheme = words[0].get("prepend_scheme", "always")

    def replacing(pattern: dict[str, str], *contents: str) -> list[Mapping[str, Any]]:
        return [step for step in steps if step.get("pattern") == pattern and step.get("content") in contents]

    charsmaps = [step for step in steps if step.get("type") == "Precompiled"]
    strips = [step for step in steps if step.get("type") == "Strip" and step.get("strip_right")]
    merges, ends = replacing(SEVERAL, " ", SPACE), [*strips, *replacing(TRAILING, "")]
    begins = replacing(BEGINNING, SPACE)
    known = [*charsmaps, *merges, *ends, *begins, *replacing(LEADING, "")]
    other = next((step for step in steps if step not in known), None) or (charsmaps[1] if charsmaps[1:] else None)
    if other is not None:
        raise DataError(f"{place}: its normalizer has the step {shown(dict(other))}, which llama.cpp has not; {FOLDER}")
    prefix = bool(begins) or scheme != "never"
    if bool(merges) != bool(ends) or (merges and not prefix):
        does = "llama.cpp does both, and begins a text with a space"
        raise DataError(f"{place}: its normalizer merges spaces or strips a text, and {does}; {FOLDER}")
    if begins and scheme != "never":
        raise DataError(f"{place}: a text begins with two marks for a space, one by Metaspace; {FOLDER}")
    losses = tuple(loss for loss in _first_mark(scheme) if not (merges and loss == NO_SECOND))
    charsmap = charsmaps[0].get("precompiled_charsmap") if charsmaps else None
    return Marks(prefix, bool(merges), charsmap, losses=(*losses, *((OTHER_WHITE,) if strips else ())))


def _is_metaspace(words: list[Mapping[str, Any]]) -> bool:
    return len(words) == 1 and words[0].get("type") == "Metaspace" and words[0].get("replacement") == SPACE


def _first_mark(scheme: str) -> tuple[str, ...]:
    return {"never": (), "first": (NO_SECOND, NO_OTHER)}.get(scheme, (NO_SECOND,))


def _refuse_inner_marks(metaspace: Mapping[str, Any], tokens: Iterable[str], place: str) -> None:
    """Raise DataError if words are divided at spaces and a token goes across one: llama.cpp divides nowhere."""
    across = next((token for token in tokens if SPACE in token[1:]), None) if metaspace.get("split", True) else None
    if across is not None:
        raise DataError(
            f"{place}: the token {shown(across)} goes across a space, at which Metaspace divides and llama.cpp does "
            f"not; {FOLDER}"
        )
