# ruff: noqa: RUF009 (a call of `opt` declares a field, it is not a shared default)
"""How RoPE's frequencies are changed for rows longer than those of training; `kernels/rope.py` has the formulas."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any

from .errors import ConfigError, brief
from .fields import ON, REQUIRED, Accepts, Config, opt

__all__ = ["RopeScaling", "RopeType", "read_rope_scaling"]


class RopeType(str, Enum):
    """The scalings; names as in transformers."""

    LINEAR = "linear"
    DYNAMIC = "dynamic"
    YARN = "yarn"
    LLAMA3 = "llama3"


YARN = {"rope_type": RopeType.YARN}
LLAMA3 = {"rope_type": RopeType.LLAMA3}


@dataclass(frozen=True, kw_only=True)
class RopeScaling(Config):
    """A scaling; names, defaults and arithmetic are those of transformers."""

    rope_type: Accepts[RopeType, str] = opt(REQUIRED, "how the frequencies are changed", example="linear")
    factor: float = opt(REQUIRED, "how much longer rows are than those of training", example=2)
    original_max_position_embeddings: int | None = opt(
        None,
        "longest row of training; max_seq_len when not given",
        acts={"rope_type": (RopeType.YARN, RopeType.LLAMA3)},
    )
    attention_factor: float | None = opt(
        None, "factor of cosines and sines; follows from factor when not given", acts=YARN
    )
    beta_fast: float = opt(32.0, "pairs that turn so often in a row of training keep their frequency", acts=YARN)
    beta_slow: float = opt(1.0, "pairs that turn so seldom have it divided by factor", acts=YARN)
    mscale: float | None = opt(
        None, "weight of ln factor in attention_factor", acts={**YARN, "mscale_all_dim": ON, "attention_factor": None}
    )
    mscale_all_dim: float | None = opt(
        None, "the same in what it is divided by", acts={**YARN, "mscale": ON, "attention_factor": None}
    )
    truncate: bool = opt(True, "bring the range of pairs between the two betas to whole numbers", acts=YARN)
    low_freq_factor: float = opt(1.0, "pairs that turn so seldom have it divided by factor", acts=LLAMA3)
    high_freq_factor: float = opt(4.0, "pairs that turn so often keep their frequency", acts=LLAMA3)

    def validate(self) -> None:
        """Raise `ConfigError` naming field, value, rule and remedy."""
        self._require("factor", 1 <= self.factor < math.inf, "be a number from 1 on", "try 2")
        if self.original_max_position_embeddings is not None:
            self._require_at_least(1, "original_max_position_embeddings")
        names = ("attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim")
        for name in (*names, "low_freq_factor", "high_freq_factor"):
            value = getattr(self, name)
            self._require(name, value is None or 0 < value < math.inf, "be a positive number", "leave it out")
        for large, small in (("beta_fast", "beta_slow"), ("high_freq_factor", "low_freq_factor")):
            least = getattr(self, small)
            self._require(large, getattr(self, large) > least, f"be above {small} ({least})", "leave both out")
        if self.rope_type is not RopeType.YARN and not self.truncate:  # false is no mere "off" here
            raise ConfigError("truncate (False) acts only with rope_type yarn; change that, or leave truncate out")

    def resolved(self, longest: int) -> "RopeScaling":
        """Return the same with the longest row of training of a model of rows of `longest` tokens."""
        if self.original_max_position_embeddings is None and self.rope_type in (RopeType.YARN, RopeType.LLAMA3):
            return self.replace(original_max_position_embeddings=longest)
        return self

    def numbers(self, longest: int) -> dict[str, Any]:
        """Return what `rope_frequencies` takes, for a model of rows of `longest` tokens."""
        return {**self.to_dict(), "original": self.unscaled_length(longest)}

    def unscaled_length(self, longest: int) -> int:
        """Return the longest row of training of a model of rows of `longest` tokens."""
        if self.rope_type is RopeType.DYNAMIC:
            return round(longest / self.factor)
        return self.original_max_position_embeddings or longest

    def check(self, longest: int, head_dim: int, theta: float) -> None:
        """Raise `ConfigError` where it does not fit the rest of a model's shape."""
        if self.rope_type is RopeType.YARN and theta <= 1:
            raise ConfigError(f"rope_theta ({theta}) must be above 1 with rope_scaling yarn; the usual value is 10000")
        if self.rope_type is not RopeType.DYNAMIC:
            return
        if head_dim < 4:
            raise ConfigError(f"head_dim ({head_dim}) must be at least 4 with rope_scaling dynamic; use linear")
        if self.factor > longest:
            raise ConfigError(
                f"rope_scaling's factor ({self.factor:g}) must be at most max_seq_len ({longest}), which is factor "
                "times the longest row of training; lower it, or raise max_seq_len"
            )
        fits = int(self.unscaled_length(longest) * self.factor)
        if fits != longest:
            raise ConfigError(
                f"max_seq_len ({longest}) must be rope_scaling's factor ({self.factor:g}) times a whole number, the "
                f"longest row of training; try {fits}"
            )


def read_rope_scaling(value: Any) -> Any:
    """Return a scaling as names and values: `KIND:FACTOR[,NAME=VALUE...]`, or `type` in place of `rope_type`."""
    if isinstance(value, str) and value:
        kind, _, rest = value.partition(":")
        first, *others = rest.split(",")
        pairs = dict(other.partition("=")[::2] for other in others)
        if not first:
            raise ConfigError(f"rope_scaling ({brief(value)}) must be KIND:FACTOR[,NAME=VALUE...]; try {brief(kind)}:2")
        given: dict[str, Any] = {"rope_type": kind, "factor": first, **{k.strip(): v.strip() for k, v in pairs.items()}}
        if "truncate" in given:
            given["truncate"] = {"true": True, "false": False}.get(given["truncate"], given["truncate"])
        return given
    if isinstance(value, Mapping) and "type" in value:
        value = {"rope_type": value["type"], **value}
        return {name: each for name, each in value.items() if name != "type"}
    return value
