r"""How a text is divided into words before byte-level BPE: what each name in `tokenizer.ggml.pre` stands for.

A rule is a list of patterns.  Each divides what the ones before it left: a match is a piece of its own, and so is what
lies between two.  The names and which rule each stands for are llama.cpp's; the patterns are those of the
tokenizer.json that a name comes from.  llama.cpp's engine knows neither cases nor scripts outside ASCII, so for
`gpt-4o` and `tekken` it divides words of other alphabets at other places: see docs/7-gguf-tokenizers.md.

A tokenizer.json is recognised by its steps, written one way out of the several in which they are written in the wild,
never by what it makes of a sample text.
"""

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from ...errors import CheckpointError, DataError, shown

__all__ = [
    "COARSER",
    "QWEN2",
    "RULES",
    "Rule",
    "pre_tokenizer_of",
    "rule_called",
    "rules_of",
    "steps_of",
]


class Rule(NamedTuple):
    """What names of `tokenizer.ggml.pre` stand for.

    steps            the patterns in their order
    whole_words      a word that is a token is taken whole, whatever its merges make (ignore_merges)
    names            the usual one first
    begins_with_bos  bos is put before a text where a file does not say whether it is
    """

    steps: tuple[str, ...]
    whole_words: bool
    names: tuple[str, ...]
    begins_with_bos: bool = False


def _set(ranges: str) -> str:
    """Return the inside of a set of characters, of code points in hexadecimal."""
    return "".join("-".join(chr(int(end, 16)) for end in each.split("-")) for each in ranges.split())


BYTES = "bytes"  # the step after which a text is bytes; where no step is, they come last
PUNCTUATION = "punctuation"  # runs of what Unicode or ASCII calls so
DIGIT, DIGITS, THREE_DIGITS = r"\p{N}", r"\p{N}+", "[0-9][0-9][0-9]"
NUMBER = r"\p{N}{1,3}"
CONTRACTION = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
SIGN = r"[^\r\n\p{L}\p{N}]?"
SIGNS = r" ?[^\s\p{L}\p{N}]+"
LINES, LAST_SPACE, SPACES = r"\s*[\r\n]+", r"\s+(?!\S)", r"\s+"
UPPER, LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"


def _any(*alternatives: str) -> str:
    return "|".join(alternatives)


GPT2 = _any("'s|'t|'re|'ve|'m|'ll|'d", r" ?\p{L}+", r" ?\p{N}+", SIGNS, LAST_SPACE, SPACES)
LLAMA3 = _any(CONTRACTION, rf"{SIGN}\p{{L}}+", NUMBER, rf"{SIGNS}[\r\n]*", LINES, LAST_SPACE, SPACES)
QWEN2 = LLAMA3.replace(NUMBER, DIGIT)
QWEN35 = QWEN2.replace(r"\p{L}+", r"[\p{L}\p{M}]+").replace(r"[^\s\p{L}", r"[^\s\p{L}\p{M}")
TURKISH = QWEN2.removeprefix(f"{CONTRACTION}|")
SEED = QWEN2.replace(rf"{SIGNS}[\r\n]*", r" ?[^\s\p{L}\p{N}\r\n]+")
JAIS2 = LLAMA3.removesuffix(f"|{LAST_SPACE}|{SPACES}") + "".join(
    rf"|\s{{{count}}}(?!\S)" for count in (512, 256, 128, 64, 32, 16, 8, 4, "1,2")
)
JAIS2 += r"|\s{1}"
EXAONE = _any(
    *(CONTRACTION, rf"{SIGN}(?:\p{{L}}\p{{M}}*(?: \p{{L}}\p{{M}}*)*)+", DIGIT, rf"{SIGNS}[\r\n/]?"),
    *(LINES, LAST_SPACE, SPACES),
)
_ENDS = (rf"{SIGNS}[\r\n/]*", LINES, LAST_SPACE, SPACES)
TEKKEN = _any(f"{SIGN}{UPPER}*{LOWER}+", f"{SIGN}{UPPER}+{LOWER}*", DIGIT, *_ENDS)
_CASED = (f"{SIGN}{UPPER}*{LOWER}+{CONTRACTION}?", f"{SIGN}{UPPER}+{LOWER}*{CONTRACTION}?")
GPT4O = _any(*_CASED, NUMBER, *_ENDS)
BLOOM = rf" ?[^(\s|{_set('2E 2C 21 3F 2026 3002 FF0C 3001 964 6D4 60C')})]+"
CHINESE = f"[{_set('4E00-9FA5 3040-309F 30A0-30FF')}]+"
IDEOGRAPHS = f"[{_set('4E00-9FA5 800-4E00 AC00-D7FF')}]+"
_ASCII_WORD = r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"""
DEEPSEEK3 = _any(_ASCII_WORD, r" ?[\p{P}\p{S}]+[\r\n]*", LINES, LAST_SPACE, SPACES)
SPARK = _any(_ASCII_WORD, r" ?[\p{P}\p{S}]+", r"[\r\n]", LAST_SPACE, SPACES)
_NO_HAN = r"&&[^\p{Han}]]"
_KIMI = GPT4O.replace(UPPER, UPPER[:-1] + _NO_HAN).replace(LOWER, LOWER[:-1] + _NO_HAN)
KIMI = _any(r"\p{Han}+", _KIMI.replace(r"[\r\n/]*", r"[\r\n]*"))
FROM_THE_RIGHT = r"\p{N}{1,3}(?=(?:\p{N}{3})*(?!\p{N}))"  # digits by three, the first group shorter
_AFMOE = "4E00-9FFF 3400-4DBF 8C48-FAFF 3040-309F 30A0-30FF FF65-FF9F 2F00-2FDF E40-E7F E80-EFF 1780-17FF 1000-109F"
AFMOE_SCRIPTS = f"[{_set(f'{_AFMOE} AA60-AA7F A9E0-A9FF AC00-D7AF 1100-11FF')}]+"
YOUTU_SCRIPTS = _any(
    f"[{_set('AC00-D7A3 3131-318E')}]+",
    f"[{_set('FF01 2026 201C 201D 2018 2019 2014 FF1A FF1B FF0C 3001-303F FE30-FE4F')}]+",
    *(f"[{_set('3105-312F')}]+", CHINESE),
)
CHAMELEON = (
    *("<sentinel:[0-9]+>", "(IMGIMG)((A|B|C|D|E|F|G|H|I){1,4})Z", r"([\t\n]|    |  )", DIGIT),
    *(r"[\p{P}!-/:-@\[-`{-~]", GPT2),
)
# DeepSeek's letters are those that have a case.
CASED_LETTERS = _set(
    "41-5A 61-7A B5 C0-D6 D8-F6 F8-1BA 1BC-1BF 1C4-293 295-2AF 370-373 376 377 37B-37D 37F 386 388-38A 38C 38E-3A1 "
    "3A3-3F5 3F7-481 48A-52F 531-556 10A0-10C5 13A0-13F5 13F8-13FD 1C90-1CBA 1CBD-1CBF 1D00-1D2B 1D6B-1D77 1D79-1D9A "
    "1E00-1F15 1F18-1F1D 1F20-1F45 1F48-1F4D 1F50-1F57 1F59 1F5B 1F5D 1F5F-1F7D 1F80-1FB4 1FB6-1FBC 1FBE 1FC2-1FC4 "
    "1FC6-1FCC 1FD0-1FD3 1FD6-1FDB 1FE0-1FEC 1FF2-1FF4 1FF6-1FFC 2102 2107 210A-2113 2115 2119-211D 2124 2126 2128 "
    "212A-212D 212F-2134 2139 213C-213F 2145-2149 214E 2183 2184 2C00-2C7B 2C7E-2CE4 2CEB-2CEE 2CF2 2CF3 A640-A66D "
    "A680-A69B A722-A76F A771-A787 A78B-A78E AB70-ABBF FB00-FB06 FB13-FB17 FF21-FF3A FF41-FF5A 10400-1044F "
    "104B0-104D3 104D8-104FB 10C80-10CB2 10CC0-10CF2 118A0-118DF 1E900-1E943"
)
DEEPSEEK_SIGNS = rf"\s?[{_set('21-2F 3A-7E FF01-FF0F FF1A-FF5E 2018-201F 3000-3002')}]+"

RULES = (
    Rule(
        (GPT2,),
        False,
        ("gpt-2", "phi-2", "mpt", "olmo", "jais", "trillion", "granite-docling", "exaone4", "gigachat", "mellum")
        + ("a.x-4.0", "modern-bert", "jina-es", "jina-de", "jina-v2-es", "jina-v2-de", "jina-v2-code", "jina-v1-en")
        + ("roberta-bpe",),
    ),
    Rule(
        (DIGIT, GPT2),
        False,
        ("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b", "mellum2"),
    ),
    Rule(
        (LLAMA3,),
        True,
        ("llama-bpe", "llama3", "llama-v3", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2", "jina-v5-nano"),
        begins_with_bos=True,
    ),
    Rule((LLAMA3,), True, ("glm4", "glm5")),
    Rule((LLAMA3,), False, ("smaug-bpe", "dbrx", "chatglm-bpe")),
    Rule(
        (QWEN2,),
        False,
        ("qwen2", "stablelm2", "deepseek-r1-qwen", "kormo", "f2llmv2", "megrez", "hunyuan", "solar-open", "grok-2")
        + ("bailingmoe", "bailingmoe2", "llada-moe"),
    ),
    Rule((QWEN35,), False, ("qwen35",)),
    Rule((TEKKEN,), True, ("tekken",), begins_with_bos=True),
    Rule((GPT4O,), False, ("gpt-4o", "llama4", "kanana2", "talkie", "minimax-m2")),
    Rule((r"[\r\n]", rf"\s?[{CASED_LETTERS}]+", DEEPSEEK_SIGNS, r"\s+$", IDEOGRAPHS, DIGITS), False, ("deepseek-llm",)),
    Rule((r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", IDEOGRAPHS, DIGIT), False, ("deepseek-coder",)),
    Rule((NUMBER, CHINESE, DEEPSEEK3), False, ("deepseek-v3", "hunyuan-dense", "joyai-llm", "hy_v4")),
    Rule((NUMBER, CHINESE, SPARK, DIGIT), False, ("spark2_5",)),
    Rule((r"[\p{P}\$\+<=>\^~\|`]+", GPT2, THREE_DIGITS), False, ("falcon",)),
    Rule((r"[\p{P}\$\+<=>\^~\|]+", GPT2, DIGITS, THREE_DIGITS), False, ("default",)),
    Rule((BLOOM,), False, ("bloom", "gpt3-finnish", "poro-chat")),
    Rule((BLOOM, DIGIT), False, ("viking",)),
    Rule((SEED,), False, ("seed-coder",)),
    Rule((TURKISH,), False, ("ufakzeka",)),
    Rule((EXAONE,), False, ("exaone-moe",)),
    Rule((JAIS2,), False, ("jais-2",)),
    Rule((NUMBER, LLAMA3.replace(NUMBER, DIGITS)), True, ("minicpm5",)),
    Rule((r"\d{1,3}(?=(?:\d{3})*\b)", GPT4O), False, ("tiny_aya", "cohere2moe")),
    Rule((GPT4O,), True, ("granite-embed-multi-97m",)),
    Rule((KIMI,), False, ("kimi-k2",)),
    Rule((r"[^\n]+|[\n]+", QWEN2), False, ("laguna",)),
    Rule((YOUTU_SCRIPTS, GPT4O.replace(NUMBER, DIGIT)), True, ("youtu",)),
    Rule((FROM_THE_RIGHT, AFMOE_SCRIPTS, DEEPSEEK3), False, ("afmoe",)),
    Rule((DIGITS, r"(?=(\d{3})+(?!\d))"), False, ("superbpe",)),
    Rule(CHAMELEON, False, ("chameleon",), begins_with_bos=True),
)
BY_NAME = {name: rule for rule in RULES for name in rule.names}
# Names that llama.cpp knows and that are BPE of characters, whose words are lines or what is between white space.
OF_CHARACTERS = ("gemma4", "granite-embed-multi-311m", "sarvam-moe", "whitespace")
# Steps for which llama.cpp has coarser ones: the same ids where no token lies across a border of the finer ones.
COARSER = {
    (*BY_NAME["deepseek-llm"].steps[:-1], DIGIT): BY_NAME["deepseek-llm"].steps,
    (PUNCTUATION, GPT2, BYTES, DIGITS, THREE_DIGITS): BY_NAME["falcon"].steps,
}

# The same patterns as they are written elsewhere.  A possessive quantifier changes nothing where what follows it
# cannot begin with what it takes; `\s*[\r\n]` reaches the last line end of the white space, as `\s*[\r\n]+` does.
_SPELLINGS = (
    ("\r", r"\r"),
    ("\n", r"\n"),
    ("(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])", CONTRACTION),
    ("'(?i:[sdmt]|ll|ve|re)", CONTRACTION),
    (r"]?+\p{L}+", r"]?\p{L}+"),
    (r"\p{N}]++", r"\p{N}]+"),
    (r"\p{N}{1}", DIGIT),
    (r"[^(\s|[", r"[^(\s|"),
    (r"])]+", ")]+"),
    (r"|\s*[\r\n]|", rf"|{LINES}|"),
)


def rule_called(name: Any, place: str) -> Rule:
    """Return the rule of a name in `tokenizer.ggml.pre`; CheckpointError for one that is not known."""
    if isinstance(name, str) and name in BY_NAME:
        return BY_NAME[name]
    if name in OF_CHARACTERS:
        raise CheckpointError(
            f"{place}: tokenizer.ggml.pre is {name}, BPE of characters and not of bytes, which is not read from the "
            "keys of a file; use the tokenizer.json of the model that the file was made of"
        )
    known = ", ".join(sorted(BY_NAME))
    raise CheckpointError(
        f"{place}: tokenizer.ggml.pre is {shown(name)}, a way of dividing words that is not known here; known are "
        f"{known}: use the tokenizer.json of the model that the file was made of"
    )


def pre_tokenizer_of(steps: tuple[str, ...]) -> dict[str, Any]:
    """Return the `pre_tokenizer` of tokenizer.json that divides a text by these steps, and makes bytes of it."""
    made: list[dict[str, Any]] = []
    for i, step in enumerate(steps):
        if step == GPT2 and i + 1 == len(steps):
            made.append(byte_level(use_regex=True))
        elif step in (DIGIT, DIGITS):
            made.append({"type": "Digits", "individual_digits": step == DIGIT})
        else:
            made.append({"type": "Split", "pattern": {"Regex": step}, "behavior": "Isolated", "invert": False})
    if made[-1]["type"] != "ByteLevel":
        made.append(byte_level(use_regex=False))
    return made[0] if len(made) == 1 else {"type": "Sequence", "pretokenizers": made}


def byte_level(use_regex: bool) -> dict[str, Any]:
    """Return the step that makes bytes of words; with `use_regex` it divides by GPT-2's pattern before."""
    return {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": use_regex}


def steps_of(pre_tokenizer: Any, place: str) -> tuple[str, ...] | None:
    """Return the steps of the `pre_tokenizer` of a tokenizer.json, or None if it makes no bytes.

    DataError for a step that byte-level BPE of a GGUF file does not have.
    """
    steps = list(_walk(pre_tokenizer))
    if not any(step.get("type") == "ByteLevel" for step in steps):
        return None
    found = [pattern for step in steps for pattern in _patterns(step, place)]
    return tuple(found[:-1] if found[-1] == BYTES else found)


def rules_of(steps: tuple[str, ...]) -> list[Rule]:
    """Return the rules that divide words by these steps, the more usual ones first."""
    return [rule for rule in RULES if rule.steps == steps]


def _walk(step: Any) -> Iterator[Mapping[str, Any]]:
    if isinstance(step, Mapping):
        if step.get("type") == "Sequence":
            for inner in step.get("pretokenizers") or ():
                yield from _walk(inner)
        else:
            yield step


def _patterns(step: Mapping[str, Any], place: str) -> tuple[str, ...]:
    """Return what a step divides by, in the one way of writing it that is used here."""
    kind = step.get("type")
    if kind == "ByteLevel":
        if step.get("add_prefix_space"):
            raise DataError(
                f"{place}: pre_tokenizer puts a space before a text (add_prefix_space), which llama.cpp never does for "
                "byte-level BPE; set it to false if the model was trained without it, or keep the model as a folder"
            )
        return (GPT2, BYTES) if step.get("use_regex", True) else (BYTES,)
    if kind == "Digits":
        return (DIGIT if step.get("individual_digits") else DIGITS,)
    if kind == "Punctuation" and step.get("behavior") == "Contiguous":
        return (PUNCTUATION,)
    pattern = step.get("pattern")
    regex = pattern.get("Regex") if isinstance(pattern, Mapping) else None
    if kind == "Split" and isinstance(regex, str):
        for written, ours in _SPELLINGS:
            regex = regex.replace(written, ours)
        isolated = step.get("behavior") == "Isolated" and not step.get("invert")
        kept = step.get("behavior") == "Removed" and step.get("invert") and regex.endswith(rf"|{SPACES}")
        if isolated or kept:  # a pattern that matches everything leaves nothing between two matches
            return (regex,)
    raise DataError(
        f"{place}: pre_tokenizer has the step {shown(dict(step))}, and no way of dividing words that llama.cpp knows "
        "has it; keep the model as a folder, or train it with a tokenizer of `abi-train tokenizer train`"
    )
