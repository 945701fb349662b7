"""From what was given for a run to its settings: flags beat file beats defaults, and what is derived follows."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from ..config import Config, EarlyStoppingConfig, LlmTrainingConfig, OptimizerType, TrainableModelConfig, joined
from ..errors import ConfigError
from .base import Base, with_tokenizer
from .conversations import no_conversations
from .defaults import DEFAULTS, RUN, Facts, Preset
from .derived import derive
from .finishing import check_export, check_new_file
from .json_answers import check_askable
from .opening import OpenData, Progress, open_data, unseen
from .run import Run, count_steps
from .settings import (
    RUN_SECTIONS,
    BaseConfig,
    ChatConfig,
    DataConfig,
    ExportConfig,
    RunConfig,
    RunLoraConfig,
    Values,
    absolute,
)

__all__ = ["Given", "check_early_stopping", "check_samples", "check_use", "merged", "prepare", "switched_on"]

Section = TypeVar("Section", bound=Config)


def merged(flags: Values, file: Values, defaults: Values | None = None) -> dict[str, dict[str, Any]]:
    """Return the values by section: flag beats file beats default.

    Early stopping is off, and so are adapters; who sets the patience of the one, say, or the rank of the others, wants
    them used, unless they are also switched off.
    """
    under = defaults or {"early_stopping": DEFAULTS["early_stopping"]}
    return {
        name: joined(
            cls,
            joined(cls, under.get(name, {}), switched_on(cls, file.get(name, {}))),
            switched_on(cls, flags.get(name, {})),
        )
        for name, cls in RUN_SECTIONS.items()
    }


def switched_on(cls: type[Config], values: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the values of a section, switched on where there are any and they do not say otherwise."""
    return {cls.switch: True, **values} if cls.switch is not None and values else values


class Given:
    """What a new run was given, and the defaults of the rest: right, as far as that can be told without the data.

    `training`, `data` and `chat` are as the run will have them, but for what is derived; `lora` is what it trains on
    frozen weights, and `base` the model that it starts from, or None.
    """

    def __init__(self, flags: Values, file: Values, preset: Preset = RUN, base: Base | None = None) -> None:
        """Merge and check; ConfigError for what is wrong, or a flag without effect, whatever the data.

        `base` is taken where it was opened already, or is still to come.
        """
        if "path" in flags.get("base", {}):
            file = {**file, "base": {}}  # the digest of a file is that of its own base
        given = merged(flags, file)
        asked = BaseConfig.from_dict(given["base"], flags.get("base", ()))
        self.base = base if base is not None or asked.path is None else Base.open(asked)
        self._flags, self._preset = flags, preset
        self._values = merged(flags, file, preset.defaults(given, self.base_shape))
        if self.base is not None:
            self._values["model"] = self.base.model_values(given["model"], flags.get("model", ()))
        self.training = self._section("training", LlmTrainingConfig)
        model = self._section("model", TrainableModelConfig)
        if "max_seq_len" in self._values["model"] and self.training.max_seq_len > model.max_seq_len:
            remedy = "leave --model-max-seq-len out" if self.base is None else "that is the context of base: lower it"
            raise ConfigError(
                f"max_seq_len ({self.training.max_seq_len}) of the training must not exceed the model's "
                f"({model.max_seq_len}); {remedy}"
            )
        self._early_stopping = self._section("early_stopping", EarlyStoppingConfig)
        self.data = self._section("data", DataConfig)
        self.chat = self._section("chat", ChatConfig)
        check_early_stopping(self._early_stopping, self.data, self.training)
        self.lora = self._adapters(model)
        if self.base is not None:
            self.base.check_data(self.data, self.chat)

    @property
    def base_shape(self) -> TrainableModelConfig | None:
        """The shape of the base, or None."""
        return None if self.base is None else self.base.shape

    def _adapters(self, model: TrainableModelConfig) -> RunLoraConfig | None:
        """Return the adapters with the targets of such a model by name, or None; ConfigError for what it has not."""
        lora = self._section("lora", RunLoraConfig)
        if not lora.enabled:
            return None
        from ..model.lora_targets import named

        check_adapters(self.training)
        if lora.kept_in is not None:
            if self.base is None:
                raise ConfigError(
                    f"base_storage ({lora.kept_in}) encodes the weights of a base, and none is given; give --base, or "
                    "leave it out"
                )
            self.base.frozen_bytes(model, lora.kept_in)  # what does not fit is told before anything is written
        return named(model, lora)

    @property
    def opened(self) -> DataConfig:
        """The data, with the tokenizer that the base brings."""
        return with_tokenizer(self.data, self.base.tokenizer if self.base is not None else None)

    def _section(self, name: str, cls: type[Section], facts: Facts | None = None) -> Section:
        values = derive(cls, self._preset.derived.get(name, ()), absolute(self._values[name]), facts)
        return cls.from_dict(values, self._flags.get(name, ()))

    @property
    def checkpoint_path(self) -> str | None:
        """The directory that was given for checkpoints; None: that of the run."""
        return self._values["training"].get("checkpoint_path")

    def open_data(self, progress: Progress = unseen) -> OpenData:
        """Return training data, validation data, and the vocabulary's size."""
        vocab_size = self._values["model"].get("vocab_size")
        sizes = {"max_seq_len": self.training.max_seq_len, "seed": self.training.seed}
        return open_data(self.opened, self.chat, vocab_size, **sizes, progress=progress)

    def resolve(self, data: OpenData, directory: Path) -> Run:
        """Return the run, in whose settings nothing is left open; ConfigError for what does not go with the data."""
        train, valid = data.train, data.valid
        epoch, steps = count_steps(self.training, train)
        facts = Facts(self.training, data.vocab_size, valid is not None, epoch, steps, directory)
        has_rows = self.chat.skip_bad_rows or train.conversations  # rows of texts may be bad as well
        training = self._section("training", LlmTrainingConfig, facts)
        training = training.replace(warmup_ratio=0.0, warmup_steps=training.warmup_steps)  # of a run they are steps
        config = RunConfig(
            model=self._section("model", TrainableModelConfig, facts),
            training=training,
            early_stopping=self._early_stopping,
            data=self.data,
            chat=self.chat if has_rows else None,
            base=self.base.given if self.base is not None else None,
            lora=self.lora,
            export=self._section("export", ExportConfig),
        )
        run = Run(config, train, valid, directory, data.opened, self.base, data.parts)
        check_use(run, self._flags)
        check_samples(run)
        check_export(config.export, training, config.model, run.evaluates)
        check_new_file(training)
        return run


def check_early_stopping(early: EarlyStoppingConfig, data: DataConfig, training: LlmTrainingConfig) -> None:
    """Raise ConfigError if early stopping is on and nothing would ever be evaluated."""
    if early.enabled and data.valid_fraction == 0 and not data.valid_path:
        raise ConfigError("valid_fraction (0) must be above 0 for early stopping; try 0.05, or --no-early-stopping")
    if early.enabled and training.eval_interval == 0:
        raise ConfigError("eval_interval (0) must be above 0 for early stopping; try 100, or --no-early-stopping")


def check_adapters(training: LlmTrainingConfig) -> None:
    """Raise ConfigError for what adapters cannot be trained with."""
    if training.optimizer is OptimizerType.MUON:
        raise ConfigError(
            "optimizer (muon) is for hidden matrices, and an adapter is half of one; take adamw, or leave --lora out"
        )


def check_use(run: Run, flags: Values) -> None:
    """Raise ConfigError for a flag that has no effect on this run: of conversations, or of evaluations."""
    lora, merge_base = run.config.lora, run.config.export.merge_base
    if "merge_base" in flags.get("export", {}) and (lora is None or lora.kept_in is None):
        raise ConfigError(
            f"merge_base ({merge_base.value}) has no effect: no base was encoded for this run; leave it out, or give "
            "--base-storage"
        )
    for section, given in flags.items():
        config = getattr(run.config, section)
        if config is not None:
            config.require_acting(given)
        elif given and section == "chat":
            raise no_conversations(next(iter(given)), run.config.data.path)
    if run.valid is not None:
        return
    interval = run.config.training.eval_interval
    if interval and "eval_interval" in flags.get("training", {}):
        raise ConfigError(
            f"eval_interval ({interval}) has no effect without data for validation; set valid_fraction above 0, or "
            "leave it out"
        )
    if run.config.early_stopping.enabled:
        raise ConfigError(
            "enabled (True) of early stopping has no effect: too few data to keep any for validation; give more data, "
            "or --no-early-stopping"
        )


def check_samples(run: Run) -> None:
    """Raise ConfigError if samples are asked for and there would be none."""
    if run.config.data.check_json and (run.valid is None or not run.train.conversations):
        raise ConfigError(
            f"check_json ({run.config.data.check_json}) has no effect without conversations that are kept; leave it "
            "out, or give conversations, and valid_fraction above 0 or valid_path"
        )
    check_askable(run)
    if not run.config.data.sample_prompts:
        return
    if run.valid is None or run.config.training.eval_interval == 0:
        raise ConfigError("sample_prompts must come with evaluations; set valid_fraction and eval_interval above 0")
    if not run.config.is_byte_level and run.find_tokenizer()[0] is None:
        raise ConfigError(
            f"sample_prompts must be left out: {', '.join(run.config.data.path)} has ids without a text of their own; "
            "give --tokenizer"
        )


def prepare(config: LlmTrainingConfig) -> None:
    """Set the number of threads; ConfigError for what this machine lacks, threads or packages, before a run begins."""
    from ..training.loggers import configured_sinks
    from ..training.session import set_threads

    set_threads(config.num_threads)
    configured_sinks(config)
