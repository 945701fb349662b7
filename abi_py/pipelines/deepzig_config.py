# ruff: noqa: RUF009 (a call of `opt` declares a field, it is not a shared default)
"""The settings of a DeepZig run.

What is not given comes from the size, with the numbers of the original training script (`SIZES`).  They are meant for
tens of thousands of conversations.  The data set that ships with the package has few, and a model that begins from
nothing has to see them often: without data of your own, `ON_SHIPPED_DATA` is taken instead.
"""

import math
import os
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any

from ..config import ON, Config, LlmTrainingConfig, LossOn, Precision, TrainableModelConfig, opt
from ..errors import ConfigError
from ..fields import either
from ..model.presets import PRESETS
from ..runs.derived import Derived, derive, rules

__all__ = ["DERIVED", "SHOWN", "SIZES", "DeepZigConfig", "ModelSize"]

SHIPPED = Path(__file__).resolve().parents[1] / "data" / "deepzig_conversations.jsonl"
LORA_ALPHA, LORA_DROPOUT = 32.0, 0.1  # fixed in the original: scaling 4, 2, 1 at rank 8, 16, 32


class ModelSize(str, Enum):
    """The presets of `model/presets.py`."""

    TEST = "test"
    SMALL = "small"
    MEDIUM = "medium"
    LARGE = "large"
    SEED = "seed"


_NAMES = (
    *("learning_rate", "grad_accum_steps", "warmup_ratio", "weight_decay", "max_grad_norm", "beta2"),
    *("logging_steps", "save_steps", "eval_steps", "save_total_limit"),
    *("gradient_checkpointing", "max_samples", "epochs", "batch_size"),
)
# The originals: "seed" is the script of the conversational model, the others its later version with sizes.
SIZES: dict[str, dict[str, Any]] = {
    size: dict(zip(_NAMES, values, strict=True))
    for size, values in {
        "test": (5e-4, 1, 0.0, 0.0, 0.5, 0.95, 5, 50, 25, 2, False, 200, 3, 4),
        "small": (2e-4, 2, 0.03, 0.01, 1.0, 0.95, 10, 100, 50, 2, False, 1_000, 3, 4),
        "medium": (1e-4, 4, 0.1, 0.01, 1.0, 0.95, 25, 250, 125, 2, True, 10_000, 3, 2),
        "large": (5e-5, 8, 0.1, 0.01, 1.0, 0.95, 50, 500, 250, 2, True, 10_000, 5, 1),
        "seed": (2e-4, 4, 0.03, 0.01, 1.0, 0.999, 25, 500, 500, 3, True, 20_000, 3, 4),
    }.items()
}


# For the data that ship with the package: found by trials with width 128, where 30 passes learn them by heart.
ON_SHIPPED_DATA: dict[str, Any] = {
    "grad_accum_steps": 1,
    "warmup_ratio": 0.05,
    "weight_decay": 0.1,
    "max_grad_norm": 1.0,
    "logging_steps": 10,
    "save_steps": 192,
    "eval_steps": 96,
    "max_samples": 0,
    "epochs": 30,
    "batch_size": 8,
}
RATE, WIDTH = 2e-3, 128  # the learning rate falls with the width, as the best one does from model to larger model


@dataclass(frozen=True)
class Facts:
    """What the settings that are not given follow from."""

    size: str
    width: int
    has_base: bool
    on_shipped_data: bool


def _by_size(name: str) -> Derived[Facts]:
    """Return the rule for a setting that the size decides, or the shipped data."""
    values = {size: settings[name] for size, settings in SIZES.items()}
    if name == "gradient_checkpointing":
        text = "on for " + ", ".join(size for size, value in values.items() if value)
    else:
        text = either([f"{value:g}" for value in dict.fromkeys(values.values())])
    own = f"{ON_SHIPPED_DATA[name]:g}" if name in ON_SHIPPED_DATA else ""
    if name == "learning_rate":
        own = f"{RATE:g} * {WIDTH} / width"

    def value(facts: Facts) -> Any:
        if facts.on_shipped_data and name == "learning_rate":
            return RATE * WIDTH / facts.width
        return ON_SHIPPED_DATA.get(name, values[facts.size]) if facts.on_shipped_data else values[facts.size]

    return Derived(name, f"by size: {text}" + (f"; {own} for the package's own data" if own else ""), value)


DERIVED: tuple[Derived[Facts], ...] = (
    Derived("model_size", "test, or what --base has", lambda facts: None if facts.has_base else facts.size),
    Derived(
        "output_dir",  # the original's names
        "deepzig-SIZE-model",
        lambda facts: f"deepzig-{'conversational' if facts.size == 'seed' else facts.size}-model",
    ),
    *map(_by_size, _NAMES),
)
SHOWN = {"data": "the package's own conversations", **rules(DERIVED)}  # what the help shows


@dataclass(frozen=True, kw_only=True)
class DeepZigConfig(Config):
    """Settings of a DeepZig run; None is what the size, or the shipped data, take."""

    use_lora: bool = opt(False, "train adapters of low rank beside frozen weights")
    lora_rank: int = opt(
        16, "rank of the adapters (alpha 32, dropout 0.1, all seven projections)", acts={"use_lora": ON}
    )
    max_samples: int | None = opt(None, "most conversations to use, chosen after mixing (0 = all)")
    eval_split: float = opt(0.1, "share of the conversations kept for evaluation (0 = none)")
    epochs: int | None = opt(None, "passes over the data", common=True)
    batch_size: int | None = opt(None, "conversations in one micro-batch", common=True)
    output_dir: str | None = opt(None, "folder of the finished model", common=True, path=True)
    model_size: ModelSize | None = opt(None, "shape of the model")
    data: tuple[str, ...] = opt((), "conversations (.jsonl, .json, .parquet), or a directory of them; repeat for more")
    base: str | None = opt(None, "folder of a trained model to go on from, with its tokenizer", path=True)
    learning_rate: float | None = opt(None, "peak learning rate; falls to 0 along a cosine")
    grad_accum_steps: int | None = opt(None, "micro-batches in one optimizer step")
    warmup_ratio: float | None = opt(None, "share of the steps that warm up")
    weight_decay: float | None = opt(None, "decoupled weight decay")
    max_grad_norm: float | None = opt(None, "clip the gradient to this global norm (0 = off)")
    beta2: float | None = opt(None, "decay of Adam's mean of squared gradients")
    logging_steps: int | None = opt(None, "optimizer steps between log records")
    save_steps: int | None = opt(None, "optimizer steps between checkpoints (0 = off)")
    eval_steps: int | None = opt(None, "optimizer steps between evaluations (0 = off)", acts={"eval_split": ON})
    save_total_limit: int | None = opt(None, "newest checkpoints to keep; the best is kept too (0 = keep all)")
    gradient_checkpointing: bool | None = opt(None, "compute activations again instead of keeping them")
    max_seq_len: int = opt(512, "longest conversation in tokens; longer ones are cut before their end token")
    loss_on: LossOn = opt(LossOn.ASSISTANT, "train on the answers, or on all tokens")
    skip_bad_rows: bool = opt(False, "leave out rows that cannot be read, and count them")
    precision: Precision = opt(Precision.FP32, "number format that products round their operands to")
    seed: int = opt(42, "seed of weights, selection and order")
    num_threads: int | None = opt(None, "threads of the kernels (0 = all)")

    def validate(self) -> None:
        """Raise `ConfigError` naming field, value, rule and remedy."""
        self._require_at_least(1, "lora_rank")
        self._require_at_least(2, "max_seq_len")
        self._require_at_least(0, "seed")
        for name in ("epochs", "batch_size", "grad_accum_steps"):
            if getattr(self, name) is not None:
                self._require_at_least(1, name)
        for name in ("max_samples", "logging_steps", "save_steps", "eval_steps", "save_total_limit", "num_threads"):
            if getattr(self, name) is not None:
                self._require_at_least(0, name)
        good = math.isfinite(self.eval_split) and 0 <= self.eval_split < 1
        self._require("eval_split", good, "be at least 0 and below 1", "the usual value is 0.1")
        if self.warmup_ratio is not None:
            good = math.isfinite(self.warmup_ratio) and 0 <= self.warmup_ratio < 1
            self._require("warmup_ratio", good, "be at least 0 and below 1", "the usual value is 0.03")
        if self.base is not None and self.model_size is not None:
            raise ConfigError(
                f"model_size ({self.model_size.value}) must be left out with --base, whose config.json says the shape"
            )

    @property
    def on_shipped_data(self) -> bool:
        """Whether there is no data but the package's own."""
        return not self.data

    def resolved(self, base: TrainableModelConfig | None = None) -> "DeepZigConfig":
        """Return a copy with nothing left open: given values beat those for the shipped data, they those of the size.

        base  the shape of the model in `base`; its size is then that of the preset nearest in weights
        """
        size = self.model_size.value if self.model_size else _nearest(base) if base else "test"
        facts = Facts(size, (base or PRESETS[size]).hidden_dim, base is not None, self.on_shipped_data)
        values = derive(DeepZigConfig, DERIVED, self.to_dict(), facts)
        values["data"] = tuple(map(os.path.abspath, self.data))  # absolute: a run can be resumed from any directory
        if self.base is not None:
            values["base"] = os.path.abspath(self.base)
        return DeepZigConfig.from_dict(values)

    def training(self, steps: int, directory: Path, validation: bool) -> LlmTrainingConfig:
        """Return the trainer's settings for so many optimizer steps; only of a resolved configuration."""
        values = {theirs: getattr(self, ours) for ours, theirs in _SAME_IN_TRAINING.items()}
        warmup = math.ceil(round((self.warmup_ratio or 0.0) * steps, 9))  # rounded up, as in transformers
        values |= {"warmup_steps": warmup, "decay_steps": steps, "min_learning_rate": 0.0}
        values["checkpoint_path"] = str(directory / "checkpoints")
        values["eval_interval"] = self.eval_steps or 0 if validation else 0
        return LlmTrainingConfig.from_dict(values)


_SAME_IN_TRAINING = {
    **{name: name for name in ("epochs", "batch_size", "max_seq_len", "learning_rate", "grad_accum_steps")},
    **{name: name for name in ("max_grad_norm", "weight_decay", "beta2", "seed", "num_threads")},
    "logging_steps": "log_interval",
    "save_steps": "checkpoint_interval",
    "save_total_limit": "max_checkpoints",
    "precision": "mixed_precision",
}


def _nearest(shape: TrainableModelConfig) -> str:
    """Return the preset whose number of weights outside of the embedding is nearest, as a factor."""

    def body(config: TrainableModelConfig) -> float:
        return math.log(max(1, config.num_params() - config.vocab_size * config.hidden_dim))

    return min(PRESETS, key=lambda name: abs(body(PRESETS[name]) - body(shape)))
