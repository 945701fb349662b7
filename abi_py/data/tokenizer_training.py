# ruff: noqa: RUF009 (a call of `opt` declares a field, it is not a shared default)
"""Training of a byte-level BPE tokenizer, and the two recipes of the DeepZig model for comparison.

    qwen2        words by Qwen2's rules, then bytes; all 256 bytes are tokens, so every text comes back as it was
    deepzig      DeepZig's first recipe: "##" before a continued word, "</w>" after a word, <s> ... </s> around a text
    deepzig-ws   its later one: words between white space and punctuation

The last two are not reversible: white space and characters that training has not seen are lost.  They are here for
comparison with the original.  With `deepzig`, the library numbers the tokens in an order that changes from call to
call; the other two give the same tokenizer for the same texts.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from enum import Enum

from tokenizers import Regex, decoders, models, pre_tokenizers, processors, trainers
from tokenizers import Tokenizer as Backend

from ..config import Config, opt
from ..errors import ConfigError, DataError, counted
from ..formats.special_tokens import MOST_IDS
from .tokenizer import Tokenizer

__all__ = ["SPECIAL_TOKENS", "TokenizerStyle", "TokenizerTrainingConfig", "train_tokenizer"]

# DeepZig's, with ids 0 ... 11 in this order.
SPECIAL_TOKENS = (
    *("<unk>", "<s>", "</s>", "<pad>", "<user>", "</user>", "<assistant>", "</assistant>"),
    *("<system>", "</system>", "<tool>", "</tool>"),
)

# How Qwen2 divides a text into words (its tokenizer.json): contractions; letters with one sign before them; single
# digits; signs with the line ends after them; line ends; other white space, of which the last goes to the next word.
QWEN2_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


# Longer words (bytes, or characters with deepzig-ws) are cut for training alone: the library's time grows with the
# square of a word's length, and a text without spaces (DNA, base64, JSON on one line) is a single word.
LONGEST_WORD = 1024


class TokenizerStyle(Enum):
    """The recipes."""

    QWEN2 = "qwen2"
    DEEPZIG = "deepzig"
    DEEPZIG_WS = "deepzig-ws"


MIN_FREQUENCY = {TokenizerStyle.QWEN2: 2, TokenizerStyle.DEEPZIG: 2, TokenizerStyle.DEEPZIG_WS: 3}


@dataclass(frozen=True, kw_only=True)
class TokenizerTrainingConfig(Config):
    """The settings of a tokenizer's training."""

    vocab_size: int = opt(32_000, "number of token ids; at most, special ones and bytes among them", common=True)
    min_frequency: int | None = opt(
        None,
        "least number of times a pair must occur to become a token; 2, or 3 for deepzig-ws, when not given",
        common=True,
    )
    special: tuple[str, ...] = opt(
        SPECIAL_TOKENS, "special token; repeat for more: their ids are 0, 1, ... in this order", common=True
    )
    style: TokenizerStyle = opt(
        TokenizerStyle.QWEN2, "recipe; the deepzig ones lose white space: for comparison only", common=True
    )

    def validate(self) -> None:
        """Raise `ConfigError` naming field, value, rule and remedy."""
        self._require_at_least(1, "vocab_size")
        # The library sets aside memory for all of them before it reads a text, and aborts if there is not so much.
        remedy = "the usual size is 32000, and the largest vocabularies have 262144"
        self._require("vocab_size", self.vocab_size <= MOST_IDS, f"be at most {MOST_IDS}", remedy)
        if self.min_frequency is not None:
            self._require_at_least(0, "min_frequency")
        for token in self.special:
            if len(token) < 2 or token != token.strip():
                rule = "have two characters or more and no white space at its ends; write it like <s>"
                raise ConfigError(f"special ({token!r}) must {rule}")
            if self.special.count(token) > 1:
                raise ConfigError(f"special ({token!r}) must not be given twice; leave one out")

    @property
    def least_count(self) -> int:
        """`min_frequency`, or that of the recipe."""
        return MIN_FREQUENCY[self.style] if self.min_frequency is None else self.min_frequency


def train_tokenizer(
    texts: Iterable[str],
    vocab_size: int = 32_000,
    special_tokens: Sequence[str] = SPECIAL_TOKENS,
    style: TokenizerStyle | str = TokenizerStyle.QWEN2,
    min_frequency: int | None = None,
) -> Tokenizer:
    """Train on texts that come one by one; return the tokenizer, special tokens with ids 0, 1, ... in their order.

    Same texts in the same order, same tokenizer (but for style deepzig, see above).  A token is no longer than
    LONGEST_WORD, into which longer words are cut before pairs are counted.  The tokenizer has fewer than `vocab_size`
    tokens if the texts have too few pairs that occur `min_frequency` times (None: the recipe's).  ConfigError for bad
    special tokens, or a vocabulary too small for them and the 256 bytes; DataError if there is no text.
    """
    config = TokenizerTrainingConfig.from_dict(
        {"vocab_size": vocab_size, "min_frequency": min_frequency, "special": tuple(special_tokens), "style": style}
    )
    special = list(config.special)
    backend, settings = _RECIPES[config.style](special)
    least = len(special) + len(settings.get("initial_alphabet", ()))
    if config.vocab_size < least:
        raise ConfigError(
            f"vocab_size ({config.vocab_size}) must be at least {least}: {counted(len(special), 'special token')} and "
            f"{counted(least - len(special), 'byte')}; the usual size is 32000, and 4096 for a few megabytes of text"
        )
    trainer = trainers.BpeTrainer(
        vocab_size=config.vocab_size,
        min_frequency=config.least_count,
        special_tokens=special,
        show_progress=False,
        **settings,
    )
    characters = 0

    def passing() -> Iterator[str]:
        nonlocal characters
        for text in texts:
            characters += len(text)
            yield text

    words = backend.pre_tokenizer
    cut = pre_tokenizers.Split(Regex(rf"[\s\S]{{1,{LONGEST_WORD}}}"), behavior="isolated")
    backend.pre_tokenizer = pre_tokenizers.Sequence([words, cut])
    backend.train_from_iterator(passing(), trainer)
    backend.pre_tokenizer = words
    if characters == 0:
        raise DataError("texts: there is no text to train a tokenizer on; give at least one that is not empty")
    return Tokenizer(backend)


# -- recipes: the tokenizer before training, and what its trainer is told --------------------------

Recipe = tuple[Backend, dict]


def _qwen2(special: list[str]) -> Recipe:
    # Qwen2's own tokenizer also normalises to NFC, which changes a text for good; here nothing is changed.
    backend = Backend(models.BPE())
    words = pre_tokenizers.Split(Regex(QWEN2_WORDS), behavior="isolated")
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([words, to_bytes])
    backend.decoder = decoders.ByteLevel()
    return backend, {"initial_alphabet": sorted(pre_tokenizers.ByteLevel.alphabet())}


def _deepzig(special: list[str]) -> Recipe:
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.ByteLevel(add_prefix_space=False),
            pre_tokenizers.Punctuation(),
            pre_tokenizers.WhitespaceSplit(),
        ]
    )
    missing = {"<s>", "</s>"} - set(special)
    if missing:
        raise ConfigError(f"style deepzig needs the special token {min(missing)}, which it puts around texts; add it")
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>",
        pair="<s> $A </s> $B </s>",
        special_tokens=[(token, special.index(token)) for token in ("<s>", "</s>")],
    )
    return backend, {"continuing_subword_prefix": "##", "end_of_word_suffix": "</w>"}


def _deepzig_ws(special: list[str]) -> Recipe:
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Punctuation()])
    return backend, {}


_RECIPES: dict[TokenizerStyle, Callable[[list[str]], Recipe]] = {
    TokenizerStyle.QWEN2: _qwen2,
    TokenizerStyle.DEEPZIG: _deepzig,
    TokenizerStyle.DEEPZIG_WS: _deepzig_ws,
}
