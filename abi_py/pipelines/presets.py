"""What a DeepZig run takes for settings that are not given: those of its size, with the original's numbers.

The numbers of the sizes (`SIZES`) are meant for tens of thousands of conversations.  The data set that ships with the
package has few, and a model that begins from nothing has to see them often: without data of your own, those of
`ON_SHIPPED_DATA` are taken instead.  Nothing else tells a DeepZig run from one of `abi-train run`.
"""

import math
from collections.abc import Iterable, Mapping
from enum import Enum
from typing import Any

from ..config import TrainableModelConfig
from ..fields import either
from ..model.presets import PRESETS
from ..runs.defaults import DERIVED, Preset, Sections, check_size, shape_of
from ..runs.shipped import SHIPPED

__all__ = ["QUESTIONS", "SHOWN", "SIZES", "ModelSize", "deepzig_preset", "directory_of", "size_of"]


class ModelSize(str, Enum):
    """The presets of `model/presets.py`."""

    TEST = "test"
    SMALL = "small"
    MEDIUM = "medium"
    LARGE = "large"
    SEED = "seed"


_NAMES = (
    *("training.learning_rate", "training.grad_accum_steps", "training.warmup_ratio", "training.weight_decay"),
    *("training.max_grad_norm", "training.beta2", "training.log_interval", "training.checkpoint_interval"),
    *("training.eval_interval", "training.max_checkpoints", "model.checkpointing"),
    *("chat.max_samples", "training.epochs", "training.batch_size"),
)
# The originals: "seed" is the script of the conversational model, the others its later version with sizes.
SIZES: dict[str, dict[str, Any]] = {
    size: dict(zip(_NAMES, values, strict=True))
    for size, values in {
        "test": (5e-4, 1, 0.0, 0.0, 0.5, 0.95, 5, 50, 25, 2, "none", 200, 3, 4),
        "small": (2e-4, 2, 0.03, 0.01, 1.0, 0.95, 10, 100, 50, 2, "none", 1_000, 3, 4),
        "medium": (1e-4, 4, 0.1, 0.01, 1.0, 0.95, 25, 250, 125, 2, "full", 10_000, 3, 2),
        "large": (5e-5, 8, 0.1, 0.01, 1.0, 0.95, 50, 500, 250, 2, "full", 10_000, 5, 1),
        "seed": (2e-4, 4, 0.03, 0.01, 1.0, 0.999, 25, 500, 500, 3, "full", 20_000, 3, 4),
    }.items()
}
# For the data that ship with the package: found by trials with width 128, where 30 passes learn them by heart.
ON_SHIPPED_DATA: dict[str, Any] = {
    "training.grad_accum_steps": 1,
    "training.warmup_ratio": 0.05,
    "training.weight_decay": 0.1,
    "training.max_grad_norm": 1.0,
    "training.log_interval": 10,
    "training.checkpoint_interval": 192,
    "training.eval_interval": 96,
    "chat.max_samples": 0,
    "training.epochs": 30,
    "training.batch_size": 8,
}
RATE, WIDTH = 2e-3, 128  # the learning rate falls with the width, as the best one does from model to larger model
QUESTIONS = ("What is Zig?", "What's the weather like in Tokyo?", "Write the Fibonacci sequence in Python.")
# Of every size.  The adapters are the original's: scaling 4, 2, 1 at rank 8, 16, 32.
ALWAYS: dict[str, Any] = {
    "data.path": (SHIPPED,),
    "data.valid_fraction": 0.1,
    "data.sample_answers": 3,
    "data.sample_tokens": 200,
    "training.max_seq_len": 512,
    "training.min_learning_rate": 0.0,
    "training.seed": 42,
    "chat.template": "deepzig",
    "early_stopping.enabled": False,
    "export.trainer_files": True,
}
ADAPTERS: dict[str, Any] = {"rank": 16, "alpha": 32.0, "dropout": 0.1}


def size_of(size: str | None, base: TrainableModelConfig | None) -> str:
    """Return the size whose settings are taken: the one that was given, that nearest to the base, or the smallest."""
    return size or ("test" if base is None else _nearest(base))


def directory_of(size: str) -> str:
    """Return the original's name for the directory of a run."""
    return f"deepzig-{'conversational' if size == 'seed' else size}-model"


def deepzig_preset(size: str | None = None) -> Preset:
    """Return what `abi-train deepzig` takes for a size, or for that of the base."""

    def defaults(given: Mapping[str, Mapping[str, Any]], base: TrainableModelConfig | None) -> Sections:
        check_size(size, base)
        return _defaults(size_of(size, base), given, base)

    return Preset(defaults, DERIVED)


def _defaults(size: str, given: Mapping[str, Mapping[str, Any]], base: TrainableModelConfig | None) -> Sections:
    data = given["data"]
    shipped = tuple(data.get("path") or ()) in ((), (SHIPPED,))
    values = _sections({**ALWAYS, **SIZES[size], **(ON_SHIPPED_DATA if shipped else {})})
    training, model = values["training"], values["model"]
    seed = given["training"].get("seed", training["seed"])
    values["lora"] = {**ADAPTERS, "seed": seed} if given.get("lora", {}).get("enabled") else {}
    if shipped:
        width = given["model"].get("hidden_dim", (base or PRESETS[size]).hidden_dim)
        training["learning_rate"] = RATE * WIDTH / width
        values["data"]["prompt"] = QUESTIONS
        values["chat"]["held_out"] = "again"
    if not training["warmup_ratio"] or "warmup_steps" in given["training"]:
        del training["warmup_ratio"]
        training["warmup_steps"] = 0
    if not data.get("valid_path") and data.get("valid_fraction") == 0:
        del training["eval_interval"]  # there is nothing to evaluate
    if base is not None:
        training["max_seq_len"] = min(training["max_seq_len"], base.max_seq_len)
    else:
        values["model"] = {**shape_of(size), "seed": seed, **model}
    if base is not None or data.get("tokenizer"):
        del values["chat"]["template"]  # that of the tokenizer
    else:
        values["data"]["train_tokenizer"] = PRESETS[size].vocab_size
    return values


def _sections(values: Mapping[str, Any]) -> Sections:
    """Return section -> field -> value from "section.field" -> value."""
    made: Sections = {}
    for name, value in values.items():
        section, field = name.split(".")
        made.setdefault(section, {})[field] = value
    return made


def _nearest(shape: TrainableModelConfig) -> str:
    """Return the preset whose number of weights outside of the embedding is nearest, as a factor."""

    def body(config: TrainableModelConfig) -> float:
        return math.log(max(1, config.num_params() - config.vocab_size * config.hidden_dim))

    return min(PRESETS, key=lambda name: abs(body(PRESETS[name]) - body(shape)))


# -- what the help shows -----------------------------------------------------------------------


def _by_size(values: Iterable[Any]) -> str:
    return "by size: " + either([f"{value:g}" if isinstance(value, float | int) else value for value in values])


def _rule(name: str) -> str:
    values = [settings[name] for settings in SIZES.values()]
    if name == "model.checkpointing":
        return "full for " + ", ".join(size for size, settings in SIZES.items() if settings[name] == "full")
    own = f"{ON_SHIPPED_DATA[name]:g}" if name in ON_SHIPPED_DATA else ""
    if name == "training.learning_rate":
        own = f"{RATE:g} * {WIDTH} / width"
    return _by_size(dict.fromkeys(values)) + (f"; {own} for the package's own data" if own else "")


def _shape_rules() -> dict[str, str]:
    shapes = [shape_of(size.value) for size in ModelSize]
    values = {name: [shape[name] for shape in shapes] for name in shapes[0]}
    return {f"model.{name}": each[0] if len({*each}) == 1 else _by_size(each) for name, each in values.items()}


def _shown() -> Sections:
    shown = {f"{section}.{each.name}": each.rule for section, table in DERIVED.items() for each in table}
    shown |= {**ALWAYS, **_shape_rules(), **{f"lora.{name}": value for name, value in ADAPTERS.items()}}
    shown |= {name: _rule(name) for name in _NAMES}
    tokenizer = _by_size([shape.vocab_size for shape in PRESETS.values()])
    shown |= {
        "model.seed": "that of the training",
        "data.train_tokenizer": f"{tokenizer}; 0 with base or tokenizer",
        "data.prompt": "three, for the package's own data",
        "chat.held_out": "last; again for the package's own data",
        "training.warmup_steps": "by warmup_ratio",
        "chat.template": "deepzig; with base or tokenizer, that of the tokenizer",
    }
    return _sections(shown)


SHOWN = _shown()
