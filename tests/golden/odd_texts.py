"""A thousand odd texts on which tokenizers differ: white space, controls, digits, scripts, emoji, special tokens."""

import random
import unicodedata

__all__ = ["NAMES", "odd_texts"]

# Names of special tokens, of several families, whole and cut.
NAMES = (
    *("<s>", "</s>", "<unk>", "<pad>", "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|eot_id|>", "<tool_call>"),
    *("<|begin_of_text|>", "<user>", "</user>", "<0x0A>", "[PAD7]", "<|im_", "endoftext|>", "<s", "▁", "▁▁"),
)
_PIECES = (
    *("hello", "Hello", " world", "the", " The", "I'm", "we'LL", "DON'T", "'s", "'ſ", "it's", " don't've", "camelCase"),
    *(
        "HTTPServer",
        "ÉTÉété",
        "straße",
        "ǅungla",
        "naïve",
        "e\u0301",
        "नमस्ते",
        "สวัสดี",
        "привет",
        "Ελλάδα",
        "ａｂｃ",
        "ﬁ",
    ),
    *(
        "日本語",
        "你好，世界",
        "한국어",
        "ひらがな",
        "カタカナ",
        "العربية",
        "עברית",
        "👍🏽",
        "👨‍👩‍👧",
        "🇩🇪",
        "😀😀",
        "𝔘𝔫𝔦",
        "𐍈",
    ),
    *("1", "12", "123", "1234", "12345678", " 3.14", "1,000,000", "٣٤٥", "½", "Ⅻ", "²", "x²", "0x1F", "2026-11-29"),
    *(
        " ",
        "  ",
        "   ",
        "     ",
        "\t",
        "\t\t",
        "\n",
        "\n\n",
        "\r\n",
        "\r",
        " \n",
        "\n ",
        "\n\n\n   ",
        "\u00a0",
        "\u3000",
    ),
    *(
        "\u2028",
        "\u200b",
        "\u200d",
        "\ufeff",
        "\x00",
        "\x01",
        "\x1f",
        "\x7f",
        "\x85",
        "\u00ad",
        "\u1680",
        "\x0b",
        "\x0c",
    ),
    *("!", "?!", "...", "…", "—", "“quoted”", "(a)", "[b]", "{c}", "a_b", "a-b", "$5", "€", "+=", "==", "<>", "^`|~"),
    *("#include", "def f(x):", "    return x", "https://a.b/c?d=e&f", "user@host", "\\n", '"', "'", "''", "//", "/*"),
    *("\ufffd", "\U0001f9ff", "\U000e0041", "\u0378", "\U0010ffff", "\ue000", "aaaaaaaaaaaaaaaaaaaaaaaa", "=" * 33),
)


def odd_texts(count: int = 1000, seed: int = 15) -> list[str]:
    """Return so many texts, each once, the same for the same seed; none holds half of a surrogate pair."""
    rng = random.Random(seed)
    made = dict.fromkeys(["", *_PIECES, *NAMES])
    points = [i for i in range(0x30000) if unicodedata.category(chr(i)) not in ("Cs", "Cn")]
    while len(made) < count:
        kind = rng.random()
        if kind < 0.6:
            text = "".join(rng.choice(_PIECES) for _ in range(rng.randint(1, 9)))
        elif kind < 0.75:
            text = "".join(rng.choice((*_PIECES, *NAMES)) for _ in range(rng.randint(1, 9)))
        elif kind < 0.85:
            text = "".join(rng.choice(" \t\n\r\u00a0 a1.") for _ in range(rng.randint(1, 20)))
        elif kind < 0.95:
            text = "".join(chr(rng.randrange(128)) for _ in range(rng.randint(1, 24)))
        else:
            text = "".join(chr(rng.choice(points)) for _ in range(rng.randint(1, 12)))
        made[text] = None
    return list(made)
