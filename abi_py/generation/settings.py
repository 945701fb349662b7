
"""How text is generated: one class for the API, the command line and `generation_config.json`.

In the file, names and meanings are Hugging Face's; there `do_sample: false` is what temperature 0 is here, and what a
file leaves out has the value that `transformers` gives it (temperature 1, top_k 50, no sampling), not ours.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar

from ..config import OFF, ON, Config, fields_of, opt
from ..errors import ConfigError, DataError
from ..files import atomic_text
from .sampler import sampling_rules

__all__ = ["CONFIG_FILE", "GenerationConfig"]

CONFIG_FILE = "generation_config.json"
_DRAWS = {"temperature": ON}


@dataclass(frozen=True, kw_only=True)
class GenerationConfig(Config):
    """Settings of generation; the defaults are the ABI's."""

    max_new_tokens: int | None = opt(256, "longest continuation (none: up to max_length, or to the end of the context)")
    max_length: int | None = opt(None, "longest prompt and continuation together", acts={"max_new_tokens": OFF})
    temperature: float = opt(0.7, "sharpness of the draw: below 1 prefers likely tokens, 0 always takes the likeliest")
    top_k: int = opt(40, "draw among the k likeliest tokens (0 = all)", acts=_DRAWS)
    top_p: float = opt(0.9, "draw among the likeliest that together have this probability (1 = all)", acts=_DRAWS)
    min_p: float = opt(
        0.0, "draw among tokens at least this many times as likely as the likeliest (0 = all)", acts=_DRAWS
    )
    repetition_penalty: float = opt(1.0, "divide positive logits of earlier tokens by it (1 = off)")
    no_repeat_ngram_size: int = opt(0, "never repeat so many tokens in a row (0 = off)")
    seed: int = opt(0, "seed of the draws, for every prompt of a batch anew", acts=_DRAWS)
    stop_ids: tuple[int, ...] | None = opt(None, "ids that end the text  [the tokenizer's end token]")
    stop_strings: tuple[str, ...] = opt((), "strings that end the text")
    logprobs: int | None = opt(None, "tell log-probabilities: of each token, and of so many likeliest")

    # A file of Hugging Face's states values that do not act, and a seed beside temperature 0 does no harm.
    idle_is_error: ClassVar[bool] = False
    other: ClassVar[Mapping[str, Any]] = MappingProxyType({})  # a file's keys that are not settings: kept for `save`

    def validate(self) -> None:
        """Raise `ConfigError` naming field, value, rule and remedy."""
        for name, _, holds, rule in sampling_rules(self.temperature, self.top_k, self.top_p, self.min_p):
            self._require(name, holds, *rule.split("; "))
        self._require_at_least(0, "no_repeat_ngram_size", "seed")
        for name in ("max_new_tokens", "logprobs"):
            if getattr(self, name) is not None:
                self._require_at_least(0, name)
        if self.max_length is not None:
            self._require_at_least(1, "max_length")
        good = math.isfinite(self.repetition_penalty) and self.repetition_penalty > 0
        self._require("repetition_penalty", good, "be above 0", "the usual values lie between 1 (off) and 1.3")
        self._require("stop_ids", min(self.stop_ids or (), default=0) >= 0, "hold ids", "ids are zero or more")
        self._require("stop_strings", "" not in self.stop_strings, "hold no empty text", "leave it out")

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
        """Read a generation_config.json, or the one in a directory; keys that are no settings are kept in `other`.

        DataError if it is no JSON object, ConfigError for a value out of range; both name the file.
        """
        path = Path(path)
        file = path / CONFIG_FILE if path.is_dir() else path
        try:
            content = json.loads(file.read_text(encoding="utf-8"))
        except ValueError as error:
            raise DataError(f"{file} is not JSON ({error}); correct or remove it") from None
        if not isinstance(content, dict):
            kind = type(content).__name__
            raise DataError(f"{file} holds a JSON {kind}, but must hold an object; correct or remove it")
        given = {key: value for key, value in content.items() if value is not None}
        values: dict[str, Any] = {"temperature": 1.0, "top_k": 50, "top_p": 1.0}  # the defaults of transformers
        values |= {name: given.pop(name) for name in _SAME if name in given}
        if not given.pop("do_sample", False):
            values["temperature"] = 0.0
        if "max_length" in values and "max_new_tokens" not in values:
            values["max_new_tokens"] = None
        if "eos_token_id" in given:
            values["stop_ids"] = given.pop("eos_token_id")
        given |= {key: None for key, value in content.items() if value is None and key not in _OURS}
        try:
            return cls.from_dict(values)._with_other(given)
        except ConfigError as error:
            raise ConfigError(f"{file}: {error}") from None

    def to_json(self) -> dict[str, Any]:
        """Return the content of a generation_config.json; what only matters for drawing is left out of a greedy one."""
        content: dict[str, Any] = {"do_sample": not self.greedy}
        drawing = ("temperature", "top_k", "top_p", "min_p")
        for option in fields_of(type(self)):
            value = getattr(self, option.name)
            if option.name == "stop_ids" or (self.greedy and option.name in drawing):
                continue
            if value != option.default or option.name in _ALWAYS:
                content[option.name] = list(value) if isinstance(value, tuple) else value
        if self.stop_ids is not None:
            content["eos_token_id"] = self.stop_ids[0] if len(self.stop_ids) == 1 else list(self.stop_ids)
        content = {key: value for key, value in content.items() if value is not None}
        return {**self.other, **content}

    def save(self, path: str | Path) -> None:
        """Write generation_config.json, to a file of another name, or into a directory."""
        path = Path(path)
        atomic_text(path / CONFIG_FILE if path.is_dir() else path, json.dumps(self.to_json(), indent=2) + "\n")


_OURS = {option.name for option in fields_of(GenerationConfig)} | {"do_sample", "eos_token_id"}
_SAME = _OURS - {"stop_ids", "do_sample", "eos_token_id"}
_ALWAYS = ("temperature", "top_k", "top_p", "repetition_penalty", "max_new_tokens")
