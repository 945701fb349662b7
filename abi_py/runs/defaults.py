"""What a new run takes for settings that are not given: numbers for a small model, and what follows from the rest."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..config import WITH_WARMUP, LlmTrainingConfig, TrainableModelConfig
from ..errors import ConfigError
from ..untrusted import MAX_INT
from .derived import Derived, rules

__all__ = [
    "ADAPTERS",
    "DEFAULTS",
    "DERIVED",
    "FINE_TUNING",
    "RUN",
    "SHOWN",
    "Facts",
    "Preset",
    "check_size",
    "preset_of_run",
    "shape_of",
    "training_defaults",
]

# What is not here has the default of its config class.
DEFAULTS: dict[str, dict[str, Any]] = {
    "model": {"hidden_dim": 96, "num_layers": 4, "num_heads": 4, "num_kv_heads": 2, "intermediate_dim": 256},
    "training": {
        "batch_size": 8,
        "max_seq_len": 128,
        "grad_accum_steps": 1,
        "learning_rate": 3e-3,
        "weight_decay": 0.1,
    },
    "early_stopping": {"enabled": False},
}
# Of a run that starts from a trained model.  Rate and epochs are those of TRL's SFTConfig; a rate of pre-training would
# wash out in a few steps what the weights know.
FINE_TUNING: dict[str, Any] = {"learning_rate": 2e-5, "epochs": 3, "weight_decay": 0.01, "max_seq_len": 512}
# Of a run that trains adapters alone.  The rate is that of LoRA in TRL's script sft.py, ten times that of all weights,
# and of QLoRA (Dettmers et al. 2023) up to 13 billion weights; TRL and transformers decay no weights by default.
ADAPTERS: dict[str, Any] = {"learning_rate": 2e-4, "weight_decay": 0.0}


def training_defaults(context: int | None, adapters: bool) -> dict[str, Any]:
    """Return how a run is trained that is told nothing.

    context   the most tokens that the model of its base reads; None: it begins with fresh weights
    adapters  whether these are trained alone
    """
    values = dict(DEFAULTS["training"])
    if context is not None:
        values |= {**FINE_TUNING, "max_seq_len": min(FINE_TUNING["max_seq_len"], context)}
    return values | (ADAPTERS if adapters else {})


Sections = dict[str, dict[str, Any]]  # section -> field -> plain value


@dataclass(frozen=True)
class Preset:
    """What settings are taken that are not given.

    defaults  from what was given and the shape of the base, if there is one, to values by section; ConfigError for
              what does not go together
    derived   the rules of what follows from the settings, the data, the directory of the run
    """

    defaults: Callable[[Mapping[str, Mapping[str, Any]], TrainableModelConfig | None], Sections]
    derived: "Mapping[str, tuple[Derived[Facts], ...]]"


@dataclass(frozen=True)
class Facts:
    """What derived settings follow from: the settings that were given, the data, the directory of the run."""

    given: LlmTrainingConfig  # with each derived setting's `meanwhile` where it was not given
    vocab_size: int  # of the data
    validates: bool  # there are data for validation
    epoch: int  # optimizer steps
    steps: int  # of the whole run
    directory: Path


def _warmup(facts: Facts) -> int:
    if facts.given.lr_schedule not in WITH_WARMUP:
        return 0
    return min(100, facts.steps // 20, facts.given.decay_steps)


DERIVED: dict[str, tuple[Derived[Facts], ...]] = {
    "model": (
        Derived(
            "vocab_size",
            "that of the tokenizer; 257 for text as bytes; else largest id + 1",
            lambda facts: facts.vocab_size,
            meanwhile=257,
        ),
        Derived("max_seq_len", "that of the training", lambda facts: facts.given.max_seq_len),
    ),
    "training": (
        Derived("decay_steps", "steps of the whole run", lambda facts: facts.steps, meanwhile=MAX_INT - 1),
        Derived("warmup_steps", "warmup_cosine and wsd: 5% of them, at most 100; else 0", _warmup, meanwhile=0),
        Derived(
            "min_learning_rate",
            "learning_rate / 10",
            lambda facts: facts.given.learning_rate / 10,
            meanwhile=0.0,
        ),
        Derived("checkpoint_interval", "an epoch, at most 1000", lambda facts: min(facts.epoch, 1000)),
        Derived(
            "eval_interval",
            "an epoch, at most 500",
            lambda facts: min(facts.epoch, 500) if facts.validates else 0,
        ),
        Derived(
            "checkpoint_path",
            "OUT/checkpoints",
            lambda facts: str(facts.directory / "checkpoints"),
            meanwhile="OUT/checkpoints",
        ),
    ),
}


def shape_of(size: str) -> dict[str, Any]:
    """Return the values of section model of a size of the DeepZig family; the vocabulary is that of the data."""
    from ..model.presets import PRESET_FIELDS, preset

    shape = preset(size).to_dict()
    return {name: shape[name] for name in PRESET_FIELDS}


def preset_of_run(size: str | None = None) -> Preset:
    """Return what `abi-train run` takes, with the shape of a size if it is given."""

    def defaults(given: Mapping[str, Mapping[str, Any]], base: TrainableModelConfig | None) -> Sections:
        check_size(size, base)
        values = {section: dict(fields) for section, fields in DEFAULTS.items()}
        if size is not None:
            values["model"] = shape_of(size)
        adapters = bool(given.get("lora", {}).get("enabled"))
        values["training"] = training_defaults(None if base is None else base.max_seq_len, adapters)
        return values

    return Preset(defaults, DERIVED)


def check_size(size: str | None, base: TrainableModelConfig | None) -> None:
    """Raise ConfigError for a size beside a base."""
    if size is not None and base is not None:
        raise ConfigError(f"model_size ({size}) must be left out with base, whose config.json says the shape")


RUN = preset_of_run()
# What the help of `run` shows instead of the classes' defaults.
SHOWN: dict[str, dict[str, Any]] = {
    section: {**DEFAULTS.get(section, {}), **rules(DERIVED.get(section, ()))} for section in {**DEFAULTS, **DERIVED}
}
for _name, _value in FINE_TUNING.items():
    _usual = DEFAULTS["training"].get(_name, getattr(LlmTrainingConfig(), _name))
    _most = "at most " if _name == "max_seq_len" else ""  # the base's context may be shorter
    _with_lora = f"; with --lora {ADAPTERS[_name]:g}" if _name in ADAPTERS else ""
    SHOWN["training"][_name] = f"{_usual:g}; with --base {_most}{_value:g}{_with_lora}"
