# ruff: noqa: RUF009 (a call of `opt` declares a field, it is not a shared default)
"""How text is generated: one class for the API, the command line and `generation_config.json`.

In the file, names and meanings are Hugging Face's; there `do_sample: false` is what temperature 0 is here, and what a
file leaves out has the value that `transformers` gives it (temperature 1, top_k 50, no sampling), not ours.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar

from ..config import OFF, ON, Config, fields_of, opt
from ..errors import ConfigError, DataError, shown
from ..fields import Accepts, closest
from ..files import atomic_json
from ..formats.special_tokens import token_ids
from ..untrusted import read_json
from .sampler import sampling_rules

__all__ = ["CONFIG_FILE", "GenerationConfig"]

CONFIG_FILE = "generation_config.json"
_DRAWS = {"temperature": ON}
_DRAWING = ("temperature", "top_k", "top_p", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff")
_IDS = ("suppress_tokens", "begin_suppress_tokens", "forced_eos_token_id")
# What transformers 5.24 computes and this package does not, and the values with which it does nothing.
_REFUSED: dict[str, tuple[Any, ...]] = {
    **dict.fromkeys(("num_beams", "num_return_sequences", "guidance_scale", "encoder_repetition_penalty"), (1,)),
    **dict.fromkeys(("encoder_no_repeat_ngram_size", "penalty_alpha"), (0,)),
    **dict.fromkeys(("remove_invalid_values", "token_healing"), (False,)),
    **dict.fromkeys(("forced_bos_token_id", "sequence_bias", "exponential_decay_length_penalty", "top_h"), ()),
    **dict.fromkeys(("max_time", "watermarking_config", "dola_layers", "constraints", "force_words_ids"), ()),
}
# What changes no text here: of beams, encoders and assistants, of speed and of what `generate` returns besides.
_WITHOUT_EFFECT = {
    *("early_stopping", "length_penalty", "num_beam_groups", "diversity_penalty", "renormalize_logits"),
    *("decoder_start_token_id", "pad_token_id", "bos_token_id", "is_assistant", "num_assistant_tokens"),
    *("num_assistant_tokens_schedule", "assistant_confidence_threshold", "prompt_lookup_num_tokens"),
    *("max_matching_ngram_size", "assistant_early_exit", "assistant_lookbehind", "target_lookbehind"),
    *("assistant_ensemble_weight", "speculation_type", "use_mtp", "use_cache", "cache_implementation", "cache_config"),
    *("max_cache_len", "prefill_chunk_size", "low_memory", "compile_config", "disable_compile"),
    *("continuous_batching_config", "return_dict_in_generate", "return_legacy_cache", "output_attentions"),
    *("output_hidden_states", "output_scores", "output_logits"),
    *("transformers_version", "_from_model_config", "_commit_hash"),
}


def _as_text(words: Any) -> Any:
    """Return lists of ids as the command line gives them."""
    if not isinstance(words, list | tuple):
        return words
    return tuple(" ".join(map(str, word)) if isinstance(word, list | tuple) else word for word in words)


@dataclass(frozen=True, kw_only=True)
class GenerationConfig(Config):
    """Settings of generation; the defaults are the ABI's."""

    max_new_tokens: int | None = opt(
        256, "longest continuation (none: up to max_length, or to the end of the context)", common=True
    )
    max_length: int | None = opt(None, "longest prompt and continuation together", acts={"max_new_tokens": OFF})
    temperature: float = opt(
        0.7, "sharpness of the draw; below 1 prefers likely tokens, 0 always takes the likeliest", common=True
    )
    top_k: int = opt(40, "draw among the k likeliest tokens (0 = all)", acts=_DRAWS, common=True)
    top_p: float = opt(
        0.9, "draw among the likeliest that together have this probability (1 = all)", acts=_DRAWS, common=True
    )
    min_p: float = opt(
        0.0, "draw among tokens at least this many times as likely as the likeliest (0 = all)", acts=_DRAWS
    )
    typical_p: float = opt(1.0, "draw among the most typical with this probability together (1 = all)", acts=_DRAWS)
    epsilon_cutoff: float = opt(0.0, "draw among tokens at least so likely (0 = all)", acts=_DRAWS)
    eta_cutoff: float = opt(0.0, "the same, but less where all are unlikely (0 = all)", acts=_DRAWS)
    repetition_penalty: float = opt(1.0, "divide positive logits of earlier tokens by it (1 = off)", common=True)
    no_repeat_ngram_size: int = opt(0, "never repeat so many tokens in a row (0 = off)")
    bad_words_ids: Accepts[tuple[str, ...], Sequence[str | Sequence[int]]] = opt(
        (), 'ids that never follow each other, as in "5 17 3"', read=_as_text
    )
    suppress_tokens: Accepts[tuple[int, ...], Sequence[int]] = opt((), "ids that never come")
    begin_suppress_tokens: Accepts[tuple[int, ...], Sequence[int]] = opt((), "ids that never come first")
    min_new_tokens: int | None = opt(None, "no stop id before so many tokens")
    min_length: int = opt(0, "no stop id before prompt and continuation have so many", acts={"min_new_tokens": OFF})
    forced_eos_token_id: Accepts[tuple[int, ...], Sequence[int] | int] = opt(
        (), "ids of which the last token before a limit is one"
    )
    seed: int = opt(0, "seed of the draws; for every prompt of a batch anew", acts=_DRAWS, common=True)
    stop_ids: Accepts[tuple[int, ...] | None, Sequence[int] | int] = opt(
        None, "ids that end the text  [the tokenizer's end token]"
    )
    stop_strings: Accepts[tuple[str, ...], Sequence[str]] = opt((), "strings that end the text", common=True)
    integer_products: bool = opt(
        True,
        "multiply quantised weights as whole numbers, with activations rounded to bytes, as llama.cpp does; off, these "
        "are not rounded, and it is slower",
    )
    logprobs: int | None = opt(None, "tell log-probabilities: of each token, and of so many likeliest")

    # A file of Hugging Face's states values that do not act, and a seed beside temperature 0 does no harm.
    idle_is_error: ClassVar[bool] = False
    other: ClassVar[Mapping[str, Any]] = MappingProxyType({})  # a file's keys that are not settings: kept for `save`

    def validate(self) -> None:
        """Raise `ConfigError` naming field, value, rule and remedy."""
        for name, _, holds, rule in sampling_rules(**self.filters()):
            self._require(name, holds, *rule.split("; "))
        self._require_at_least(0, "no_repeat_ngram_size", "seed", "min_length")
        for name in ("max_new_tokens", "logprobs", "min_new_tokens"):
            if getattr(self, name) is not None:
                self._require_at_least(0, name)
        if self.max_length is not None:
            self._require_at_least(1, "max_length")
        good = math.isfinite(self.repetition_penalty) and self.repetition_penalty > 0
        self._require("repetition_penalty", good, "be above 0", "the usual values are between 1 (off) and 1.3")
        for name in ("stop_ids", *_IDS):
            ids = getattr(self, name) or ()
            self._require(name, min(ids, default=0) >= 0, "hold ids", "ids are zero or more")
        for word in self.bad_words_ids:
            good = bool(word.split()) and all(part.isdecimal() and len(part) < 11 for part in word.split())
            self._require("bad_words_ids", good, "hold sequences of ids", 'write one as in "5 17 3" or [5, 17, 3]')
        self._require("stop_strings", "" not in self.stop_strings, "hold no empty text", "leave it out")

    @property
    def bad_words(self) -> tuple[tuple[int, ...], ...]:
        """`bad_words_ids` as numbers."""
        return tuple(tuple(map(int, word.split())) for word in self.bad_words_ids)

    def filters(self) -> dict[str, Any]:
        """Return the settings of a draw: keywords of `sampler.candidates`."""
        return {name: getattr(self, name) for name in _DRAWING}

    def check_vocabulary(self, size: int, *others: str) -> None:
        """Raise ConfigError for an id to ban or to force, or of other settings, that a vocabulary of `size` lacks.

        `stop_ids` is not among them by itself: the files of a model may name end tokens that it cannot write.
        """
        named = {name: getattr(self, name) or () for name in (*_IDS, *others)}
        for name, ids in (*named.items(), ("bad_words_ids", sum(self.bad_words, ()))):
            if max(ids, default=0) >= size:
                raise ConfigError(f"{name} holds {max(ids)}, but the model's ids are 0 ... {size - 1}; correct it")

    @property
    def greedy(self) -> bool:
        """Whether the likeliest token is always taken."""
        return self.temperature == 0

    def limit(self, prompt: int, context: int) -> int:
        """Return the most tokens that may follow a prompt of so many, in a context of max_seq_len."""
        if self.max_new_tokens is not None:
            return self.max_new_tokens
        return max((self.max_length if self.max_length is not None else context) - prompt, 0)

    def replace(self, **changes: Any) -> "GenerationConfig":
        """Return a copy with some fields changed; the copy is checked anew and keeps a file's other keys."""
        return super().replace(**changes)._with_other(self.other)

    def _with_other(self, other: Mapping[str, Any]) -> "GenerationConfig":
        object.__setattr__(self, "other", MappingProxyType(dict(other)))
        return self

    # -- generation_config.json ------------------------------------------------------------------

    @classmethod
    def load(cls, path: str | Path) -> "GenerationConfig":
        """Read a generation_config.json, or the one in a directory; keys without effect here are kept in `other`.

        DataError if it is no JSON object, ConfigError for a value out of range, a setting that is not computed here, or
        an unknown one; all name the file.
        """
        path = Path(path)
        file = path / CONFIG_FILE if path.is_dir() else path
        content = read_json(file, error=DataError, remedy="correct or remove it")
        given = {key: value for key, value in content.items() if value is not None}
        values: dict[str, Any] = {"temperature": 1.0, "top_k": 50, "top_p": 1.0}  # the defaults of transformers
        values |= {name: given.pop(name) for name in _SAME if name in given}
        if not given.pop("do_sample", False):
            values["temperature"] = 0.0
        if "max_length" in values and "max_new_tokens" not in values:
            values["max_new_tokens"] = None
        if "eos_token_id" in given:
            values["stop_ids"] = token_ids(given.pop("eos_token_id"), "eos_token_id", file)
        _refuse_others(given, file)
        given |= {key: None for key, value in content.items() if value is None and key not in _OURS}
        try:
            return cls.from_dict(values)._with_other(given)
        except ConfigError as error:
            raise ConfigError(f"{file}: {error}") from None

    def to_json(self) -> dict[str, Any]:
        """Return the content of a generation_config.json; what only matters for drawing is left out of a greedy one."""
        content: dict[str, Any] = {"do_sample": not self.greedy}
        for option in fields_of(type(self)):
            value = getattr(self, option.name)
            if option.name == "stop_ids" or (self.greedy and option.name in _DRAWING):
                continue
            if value != option.default or option.name in _ALWAYS:
                content[option.name] = list(value) if isinstance(value, tuple) else value
        if self.stop_ids is not None:
            content["eos_token_id"] = self.stop_ids[0] if len(self.stop_ids) == 1 else list(self.stop_ids)
        if self.bad_words_ids:
            content["bad_words_ids"] = [list(word) for word in self.bad_words]
        content = {key: value for key, value in content.items() if value is not None}
        return {**self.other, **content}

    def save(self, path: str | Path) -> None:
        """Write generation_config.json, to a file of another name, or into a directory."""
        path = Path(path)
        atomic_json(path / CONFIG_FILE if path.is_dir() else path, self.to_json())


_OURS = {option.name for option in fields_of(GenerationConfig)} | {"do_sample", "eos_token_id"}
_SAME = _OURS - {"stop_ids", "do_sample", "eos_token_id"}
_ALWAYS = ("temperature", "top_k", "top_p", "repetition_penalty", "max_new_tokens")


def _refuse_others(given: Mapping[str, Any], file: Path) -> None:
    """Raise ConfigError for a setting of a file that is not computed here, or is unknown."""
    rest = "remove it, or give another file with --config"
    for name, value in given.items():
        if name in _REFUSED and value not in (*_REFUSED[name], [], {}):
            raise ConfigError(f"{file}: {name} is {shown(value)}, which this version does not compute; {rest}")
        if name not in _REFUSED and name not in _WITHOUT_EFFECT:
            hint = closest(name, sorted(_OURS | set(_REFUSED)))
            asked = f"{hint} Otherwise " if hint.startswith("did") else ""
            raise ConfigError(f"{file}: {shown(name)} is not a setting of generation; {asked}{rest}")
