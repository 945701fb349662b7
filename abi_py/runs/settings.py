# ruff: noqa: RUF009 (a call of `opt` declares a field, it is not a shared default)
"""The settings of a run, by section, and the file config.yaml that holds them."""

import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any, ClassVar

from ..choices import BaseStorage, ExportFormat, MergeBase, WeightType, Which
from ..config import (
    OFF,
    ON,
    Config,
    EarlyStoppingConfig,
    LlmTrainingConfig,
    LoraConfig,
    LossOn,
    TrainableModelConfig,
    fields_of,
    load_yaml,
    opt,
    to_yaml,
)
from .shipped import is_builtin

__all__ = [
    "RUN_SECTIONS",
    "BaseConfig",
    "ChatConfig",
    "DataConfig",
    "ExportConfig",
    "HeldOut",
    "RunConfig",
    "RunLoraConfig",
    "Values",
    "absolute",
    "read_run_config",
]

Values = Mapping[str, Mapping[str, Any]]  # section -> field -> plain value


@dataclass(frozen=True, kw_only=True)
class BaseConfig(Config):
    """What a run starts from, and that it was exactly that."""

    heading: ClassVar[str] = "Data"

    path: str | None = opt(
        None,
        "start from this model; a folder of Hugging Face's kind, a GGUF file, a run, a checkpoint; shape, tokenizer "
        "and chat template are its own",
        flag="base",
        common=True,
        path=True,
    )
    digest: str | None = opt(
        None,
        "SHA-256 of its config.json and weights, or of the GGUF file, or its beginning: another base is refused; a run "
        "records it",
        flag="base-digest",
        acts={"path": ON},
    )

    which: Which | None = opt(
        None,
        "of a run, start from its best checkpoint, or from its last  [its model/]",
        flag="base-which",
        acts={"path": ON},
    )

    def validate(self) -> None:
        """Raise `ConfigError` naming field, value, rule and remedy."""
        self._require("path", self.path != "", "not be empty", "give the folder of a model, or a GGUF file")
        good = self.digest is None or re.fullmatch(r"[0-9a-fA-F]{8,64}", self.digest) is not None
        self._require("digest", good, "be 8 to 64 hexadecimal digits", "config.yaml of a run with a base has them")


@dataclass(frozen=True, kw_only=True)
class DataConfig(Config):
    """Where a run's tokens come from, and what it shows at its end."""

    path: tuple[str, ...] = opt(
        (),
        "texts, token ids, conversations, or a directory; ids: a .bin file of u32; conversations: .jsonl, .json or "
        ".parquet, builtin:deepzig for the package's own; repeat for more; Python's standard library when not given",
        flag="data",
        common=True,
        path=True,
    )
    valid_path: tuple[str, ...] = opt(
        (),
        "data of the same kind for validation; --data is then used for training alone",
        flag="valid-data",
        common=True,
        path=True,
        acts={"path": ON},
    )
    valid_fraction: float = opt(
        0.05,
        "share kept for validation (0 = none); of tokens or conversations, those at the end",
        common=True,
        acts={"valid_path": OFF},
    )
    tokenizer: str | None = opt(
        None,
        "tokenizer.json, a directory with one, or a GGUF file; for texts and conversations; a .bin file's .json names "
        "it",
        common=True,
        path=True,
        acts={"path": ON},
    )
    train_tokenizer: int = opt(
        0,
        "train a tokenizer of at most so many tokens on what is trained on, with the special tokens of the template, "
        "and keep it in the run (0 = off)",
        acts={"path": ON, "tokenizer": OFF},
    )
    corpus_bytes: int = opt(300_000, "bytes of the standard library to train on", acts={"path": OFF})
    prompt: tuple[str, ...] = opt(
        ("The ",),
        "text to go on from; of the sample at the end of the run; after conversations, a question; may be repeated",
        acts={"sample_tokens": ON},
    )
    sample_tokens: int = opt(250, "length of that sample (0 = no sample)")
    sample_answers: int = opt(
        1,
        "after conversations without a prompt: questions of those kept back that are answered at the end (0 = none)",
        acts={"sample_tokens": ON},
    )
    sample_prompts: tuple[str, ...] = opt(
        (),
        "text that the model goes on from after each evaluation, of conversations a question; may be repeated",
        flag="sample-prompt",
    )
    check_json: int = opt(
        0,
        "check so many answers as JSON, that they parse and have the right keys; greedy ones at the end, to questions "
        "kept back (0 = none)",
    )
    sample_length: int = opt(40, "tokens of those samples", acts={"sample_prompts": ON})

    def validate(self) -> None:
        """Raise `ConfigError` naming field, value, rule and remedy."""
        good = math.isfinite(self.valid_fraction) and 0 <= self.valid_fraction < 1
        self._require("valid_fraction", good, "be at least 0 and below 1", "the usual value is 0.05")
        self._require_at_least(1, "corpus_bytes")
        self._require_at_least(0, "sample_tokens", "sample_answers", "train_tokenizer", "check_json")
        self._require_at_least(1, "sample_length")
        self._require("sample_prompts", "" not in self.sample_prompts, "hold no empty text", "give a character or more")
        good = bool(self.prompt) and "" not in self.prompt
        self._require("prompt", good, "not be empty", "give at least one character")


class HeldOut(str, Enum):
    """Which conversations are kept for validation."""

    LAST = "last"
    AGAIN = "again"


def _template_names() -> tuple[str, ...]:
    from ..data.chat_templates import BUILT_IN

    return tuple(BUILT_IN)


@dataclass(frozen=True, kw_only=True)
class ChatConfig(Config):
    """How files of conversations become rows; of no effect on texts and token files, and refused there."""

    heading: ClassVar[str] = "Conversations"

    template: str | None = opt(
        None,
        "name or Jinja file of the chat template; deepzig, chatml, qwen, alpaca, llama2 or llama3; when not given, the "
        "tokenizer's own, or the one whose tokens it has",
        common=True,
        names=_template_names,
    )
    loss_on: LossOn = opt(LossOn.ASSISTANT, "what is trained; the answers, or all tokens")
    packing: bool = opt(False, "several conversations in a row; each by itself, instead of padding")
    skip_bad_rows: bool = opt(False, "leave out rows that cannot be read; they are counted")
    mix: tuple[str, ...] = opt((), "another file, or directory, of conversations to mix in; may be repeated", path=True)
    max_samples: int = opt(0, "most conversations to take (0 = all); of every file its share, tools always")
    category: tuple[str, ...] = opt((), "only rows whose category fits, as in 'memory_*'; may be repeated")
    match: str | None = opt(None, "only rows with a text in which this regular expression is found")
    held_out: HeldOut = opt(
        HeldOut.LAST,
        "which conversations valid_fraction keeps: the last; or again: half of them of the category 'again', whose "
        "answers the others tell, and the best weights are those that know them",
    )

    def validate(self) -> None:
        """Raise `ConfigError` naming field, value, rule and remedy."""
        self._require_at_least(0, "max_samples")


@dataclass(frozen=True, kw_only=True)
class RunLoraConfig(LoraConfig):
    """Whether a run trains adapters on weights that stay as they are, and which."""

    heading: ClassVar[str] = "Training"
    switch: ClassVar[str] = "enabled"

    enabled: bool = opt(
        False, "train adapters on frozen weights; LoRA, on the weights of --base", flag="lora", common=True
    )
    base_storage: BaseStorage | None = opt(
        None,
        "keep the matrices of --base in fewer bits while adapters are trained on them; nf4-dq is QLoRA's, half a byte "
        "a weight; embedding, head and norms stay as they are  [as its files have them]",
        flag="base-storage",
    )

    @property
    def kept_in(self) -> str | None:
        """The name of the storage that the base is encoded in."""
        return None if self.base_storage is None else self.base_storage.value

    def adapters(self) -> LoraConfig:
        """Return what a `LoraModel` takes."""
        return LoraConfig(**{option.name: getattr(self, option.name) for option in fields_of(LoraConfig)})


@dataclass(frozen=True, kw_only=True)
class ExportConfig(Config):
    """The folder that a run leaves at its end: RUN/model."""

    format: ExportFormat = opt(
        ExportFormat.HF,
        "form of what is written; hf opens in transformers and here, zig in the Zig loader (a plain Llama alone)",
    )
    dtype: WeightType = opt(WeightType.FLOAT32, "type of the weights", acts={"format": ExportFormat.HF})
    which: Which | None = opt(None, "which weights it has  [the best if there were evaluations, else the last]")
    merge_base: MergeBase = opt(
        MergeBase.ORIGINAL,
        "of adapters trained with --base-storage: what they are merged into; the weights as the files of the base have "
        "them, or dequant, those that they were trained on",
    )
    trainer_files: bool = opt(
        False,
        "write training_args.json and trainer_state.json too, with the settings and the course of the run in the names "
        "of transformers' Trainer",
    )

    def validate(self) -> None:
        """Find nothing wrong: there is no value that types and `acts` do not check."""


RUN_SECTIONS: dict[str, type[Config]] = {
    "data": DataConfig,
    "base": BaseConfig,
    "training": LlmTrainingConfig,
    "model": TrainableModelConfig,
    "early_stopping": EarlyStoppingConfig,
    "chat": ChatConfig,
    "lora": RunLoraConfig,
    "export": ExportConfig,
}


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """The sections of a run's config.yaml."""

    model: TrainableModelConfig
    training: LlmTrainingConfig
    early_stopping: EarlyStoppingConfig
    data: DataConfig
    chat: ChatConfig | None  # None: the data are no conversations, and no bad row is left out
    base: BaseConfig | None = None  # None: fresh weights
    lora: RunLoraConfig | None = None  # None: all weights are trained
    export: ExportConfig = ExportConfig()

    @property
    def is_byte_level(self) -> bool:
        """Whether the model's ids can be shown as text without a tokenizer."""
        return self.model.vocab_size == 257

    def to_yaml(self, directory: Path) -> str:
        """Return the text of `directory`/config.yaml.

        The usual place of the checkpoints is left out: the run may be moved, and its file may begin another run.
        """
        training = self.training
        if training.checkpoint_path is not None:  # absolute, as the data are: the run is resumed from any directory
            training = training.replace(checkpoint_path=os.path.abspath(training.checkpoint_path))
        if training.export_gguf_path is not None:
            training = training.replace(export_gguf_path=os.path.abspath(training.export_gguf_path))
        usual = training.checkpoint_path == os.path.abspath(directory / "checkpoints")
        names = ("early_stopping", "data", "chat", "base", "lora", "export")
        rest: dict[str, Config | None] = {name: getattr(self, name) for name in names}
        return to_yaml(("checkpoint_path",) if usual else (), model=self.model, training=training, **rest)


def read_run_config(path: Path) -> dict[str, dict[str, Any]]:
    """Return the sections of a run's config.yaml, or of a file that the user wrote, as plain values."""
    return load_yaml(path, RUN_SECTIONS)


def absolute(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the values of section data or chat with absolute paths: a run can be resumed from any directory."""
    made = dict(values)
    for name in ("path", "valid_path", "mix"):
        given = made.get(name) or ()
        if given:
            paths = (given,) if isinstance(given, str) else given
            made[name] = tuple(path if is_builtin(path) else os.path.abspath(path) for path in paths)
    for name in ("tokenizer", "template"):  # a template may also be one that is built in
        if made.get(name) and (name == "tokenizer" or os.path.exists(made[name])):
            made[name] = os.path.abspath(made[name])
    return made
