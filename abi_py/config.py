# ruff: noqa: RUF009 (a call of `opt` declares a field, it is not a shared default)
"""The configuration dataclasses: the one source of API, command-line flags, YAML keys, defaults and help texts.

`fields.py` says what a config class is.  `load_yaml` and `to_yaml` (`settings_file.py`) read and write a run's
`config.yaml`, whose sections are `SECTIONS`.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from .choices import CooldownShape, LearningRateSchedule, LossOn, MuonScale, OptimizerType
from .errors import ConfigError
from .fields import (
    OFF,
    ON,
    Accepts,
    Config,
    Option,
    Other,
    convert,
    fields_of,
    joined,
    opt,
    without_fields,
)
from .lora_config import LoraConfig
from .settings_file import read_sections, to_yaml
from .shape import IGNORE_INDEX, CheckpointingStrategy, ModelShape, Precision
from .untrusted import read_yaml

__all__ = [
    "IGNORE_INDEX",
    "OFF",
    "ON",
    "SECTIONS",
    "CheckpointingStrategy",
    "Config",
    "CooldownShape",
    "EarlyStoppingConfig",
    "LearningRateSchedule",
    "LlmTrainingConfig",
    "LoraConfig",
    "LossOn",
    "MuonScale",
    "OptimizerType",
    "Option",
    "Precision",
    "TrainableModelConfig",
    "check_loss_scaling",
    "convert",
    "fields_of",
    "joined",
    "load_yaml",
    "opt",
    "to_yaml",
]


# -- the model ----------------------------------------------------------------------------------


@without_fields
class TrainableModelConfig(ModelShape):
    """Shape of a model; names and defaults are the ABI's."""

    def num_params(self) -> int:
        """Number of trained weights, counted from the list of layers of its family."""
        from .families import tensor_table  # the kernels come along, which a help text does not need

        return sum(tensor.size for tensor in tensor_table(self))

    def num_active_params(self) -> int:
        """Number of weights that a token is computed with: all but those of the experts that are not chosen for it."""
        from .families import layers

        return self.num_params() - sum(layer.idle() for layer in layers(self))


# -- training -----------------------------------------------------------------------------------


def check_loss_scaling(
    config: Config, initial: str, least: str, most: str, growth: str, backoff: str, interval: str
) -> None:
    """Check the fields of loss scaling, given their names in `config`; `training/precision.py` has the rule they feed.

    The scales reach from the smallest half, 2^-24, to the ABI's limit, 2^31.  ConfigError for what does not fit.
    """
    for name in (initial, least, most, growth, backoff):
        value = getattr(config, name)
        good = math.isfinite(value) and math.frexp(value)[0] == 0.5 and 2.0**-24 <= value <= 2.0**31
        rule = "be a power of two from 2^-24 to 2^31, which scales without rounding"
        config._require(name, good, rule, "try 0.5" if name == backoff else "try 2" if name == growth else "try 1024")
    config._require(growth, getattr(config, growth) > 1, "be above 1", "try 2")
    config._require(backoff, getattr(config, backoff) < 1, "be below 1", "try 0.5")
    config._require_at_least(1, interval)
    limits = f"{least} ({getattr(config, least):.10g}) and {most} ({getattr(config, most):.10g})"
    between = getattr(config, least) <= getattr(config, initial) <= getattr(config, most)
    config._require(initial, between, f"be between {limits}", "change one of the three")


WITH_WARMUP = (LearningRateSchedule.WARMUP_COSINE, LearningRateSchedule.WSD)  # by their names


def _usual_warmup(config: "LlmTrainingConfig") -> int:
    """Return the warm-up of a schedule that is given none: a share of its steps, rounded up as transformers does, or
    the ABI's 100 steps for those that are named after it."""
    if 0 < config.warmup_ratio < 1:
        return math.ceil(round(config.warmup_ratio * config.decay_steps, 9))
    return 100 if config.lr_schedule in WITH_WARMUP else 0


_DECAYS = {"lr_schedule": Other(LearningRateSchedule.CONSTANT)}
_WSD = {"lr_schedule": LearningRateSchedule.WSD}
_ADAM = {"optimizer": (OptimizerType.ADAM, OptimizerType.ADAMW, OptimizerType.ADAMW_8BIT, OptimizerType.MUON)}
_MUON = {"optimizer": OptimizerType.MUON}
_GGUF = {"export_gguf_path": ON}
_SAVES = {"checkpoint_path": ON}
_LOGGERS = ("enable_tensorboard", "enable_wandb", "enable_metrics_stream")
_SCALES = {"mixed_precision": Precision.FP16}
_PRECISION_ALIASES = {False: "fp32", True: "bf16"}  # in the ABI the field is a bool
_GPU_REMEDY = "this trainer runs on the CPU, so leave it at its default"


@dataclass(frozen=True, kw_only=True)
class LlmTrainingConfig(Config):
    """How a model is trained; names and defaults are the ABI's, the last group is ours."""

    epochs: int = opt(10, "passes over the data", common=True)
    batch_size: int = opt(4, "sequences in a micro-batch", common=True)
    max_seq_len: int = opt(512, "tokens in a sequence", common=True)
    learning_rate: float = opt(1e-5, "peak learning rate", common=True)
    lr_schedule: Accepts[LearningRateSchedule, str] = opt(
        LearningRateSchedule.WARMUP_COSINE, "how the rate goes", common=True
    )
    decay_steps: int = opt(
        10000, "optimizer step at which the schedule ends (period of step and restarts)", acts=_DECAYS
    )
    warmup_ratio: float = opt(
        0.0, "warm-up as a share of decay_steps, rounded up (0 = by warmup_steps)", acts={"lr_schedule": WITH_WARMUP}
    )
    warmup_steps: Accepts[int, None] = opt(
        None,
        "steps of linear warm-up; 100 for warmup_cosine and wsd when not given, else 0",
        derive=_usual_warmup,
        acts={"warmup_ratio": OFF},
    )
    min_learning_rate: float = opt(1e-7, "learning rate at which the schedules end", acts=_DECAYS)
    grad_accum_steps: int = opt(8, "micro-batches in an optimizer step", common=True)
    max_grad_norm: float = opt(1.0, "clip the gradient to this global norm (0 = off)")
    weight_decay: float = opt(0.01, "weight decay: decoupled, or for sgd and adam added to the gradient")
    optimizer: Accepts[OptimizerType, str] = opt(
        OptimizerType.ADAMW, "rule; adamw_8bit: moments in bytes; muon: hidden matrices, else adamw", common=True
    )
    label_smoothing: float = opt(0.0, "share of the target spread evenly over the vocabulary")
    checkpoint_interval: int = opt(1000, "steps between checkpoints (0 = off)", acts=_SAVES)
    checkpoint_path: Accepts[str | None, Path] = opt(
        None, "directory of the checkpoints; nothing is saved without it", path=True
    )
    max_checkpoints: int = opt(3, "newest checkpoints to keep; the best is kept too (0 = keep all)", acts=_SAVES)
    log_interval: int = opt(10, "optimizer steps between log records (0 = off)")
    eval_interval: int = opt(500, "steps between evaluations (0 = off); on the validation data", common=True)
    mixed_precision: Accepts[Precision, str | bool] = opt(
        Precision.FP32,
        "what products multiply; bf16 and fp16 round, bf16x3 and bf16x6 are float32 by bfloat16 parts",
        aliases=_PRECISION_ALIASES,
        common=True,
    )
    log_dir: Accepts[str | None, Path] = opt(
        None,
        "directory of the TensorBoard, W&B and metrics-stream files",
        acts=tuple({name: ON} for name in _LOGGERS),
        path=True,
    )
    enable_tensorboard: bool = opt(False, "write TensorBoard event files (needs log_dir)")
    enable_wandb: bool = opt(False, "log to Weights & Biases (needs log_dir)")
    enable_metrics_stream: bool = opt(False, "write the ABI's metrics.jsonl stream (needs log_dir)")
    wandb_project: str | None = opt(None, "W&B project ('abi' when not given)", acts={"enable_wandb": ON})
    wandb_run_name: str | None = opt(None, "W&B run name (that of the run when not given)", acts={"enable_wandb": ON})
    wandb_entity: str | None = opt(None, "W&B entity (the account's default when not given)", acts={"enable_wandb": ON})
    export_gguf_path: str | None = opt(None, "GGUF file to write after training", flag="export-gguf", path=True)
    export_quantize: str = opt("F32", "type of a GGUF file, as in F16, Q8_0 or Q4_K_M", flag="quantize", acts=_GGUF)
    export_name: str = opt("abi-llama", "model name inside it; unless changed, a base's own", acts=_GGUF)
    use_gpu: bool = opt(False, "ABI field; must stay false, the trainer runs on the CPU", refused=True)
    gpu_backend: str | None = opt(None, "ABI field; must stay unset, the trainer runs on the CPU", refused=True)
    gpu_batch_threshold: int = opt(8, "ABI field; must stay 8, the trainer runs on the CPU", refused=True)
    gpu_device_buffer_mb: int = opt(256, "ABI field; must stay 256, the trainer runs on the CPU", refused=True)
    schedule_start: int = opt(
        0,
        "optimizer step at which the schedule begins, above 0 where it was begun anew",
        acts=(_DECAYS, {"warmup_steps": ON}),
    )
    z_loss: float = opt(
        0.0, "coefficient of the mean squared log-sum-exp of the logits, added in training (1e-4 in PaLM; 0 = off)"
    )
    cooldown_share: float = opt(
        0.1, "share of the steps after the warm-up in which wsd decays", acts={**_WSD, "cooldown_steps": OFF}
    )
    cooldown_steps: int | None = opt(None, "steps in which wsd decays, instead of a share (0 = the share)", acts=_WSD)
    cooldown_shape: Accepts[CooldownShape, str] = opt(
        CooldownShape.ONE_MINUS_SQRT, "how the rate of wsd decays", acts=_WSD
    )
    seed: int = opt(0, "seed of the data order", common=True)
    shuffle: bool = opt(True, "shuffle the rows of the data anew in each epoch")
    beta1: float = opt(0.9, "decay of Adam's mean of gradients", acts=_ADAM)
    beta2: float = opt(0.999, "decay of Adam's mean of squared gradients", acts=_ADAM)
    epsilon: float = opt(1e-8, "Adam's epsilon", acts=_ADAM)
    momentum: float = opt(0.9, "momentum (0 = off)", acts={"optimizer": OptimizerType.SGD})
    nesterov: bool = opt(
        False, "Nesterov's form of the momentum", acts={"optimizer": OptimizerType.SGD, "momentum": ON}
    )
    muon_momentum: float = opt(0.95, "momentum of muon", acts=_MUON)
    muon_nesterov: bool = opt(True, "Nesterov's form of muon's momentum", acts=_MUON)
    muon_steps: int = opt(5, "Newton-Schulz iterations of muon", acts=_MUON)
    muon_scale: Accepts[MuonScale, str] = opt(
        MuonScale.MATCH_RMS_ADAMW,
        "how muon's rate follows the shape: to match adamw's update, or as first published",
        acts=_MUON,
    )
    muon_rate: float = opt(1.0, "learning rate of muon's matrices, as a multiple of learning_rate", acts=_MUON)
    decay_norms_and_biases: bool = opt(False, "let weight decay reach norms and biases too", acts={"weight_decay": ON})
    nan_guard: bool = opt(True, "skip updates whose loss or gradient is not finite")
    max_bad_steps: int = opt(5, "skipped updates in a row after which the run stops", acts={"nan_guard": ON})
    max_steps: int | None = opt(None, "stop after so many optimizer steps (0 = no limit)", common=True)
    num_threads: int | None = opt(None, "threads of the kernels (0 = all)")
    initial_loss_scale: float = opt(65536.0, "factor of the loss at the beginning", acts=_SCALES)
    loss_scale_growth_factor: float = opt(
        2.0, "factor of the loss scale after loss_scale_growth_interval", acts=_SCALES
    )
    loss_scale_backoff_factor: float = opt(0.5, "factor of the loss scale after an overflow", acts=_SCALES)
    loss_scale_growth_interval: int = opt(2000, "updates without an overflow before the loss scale grows", acts=_SCALES)
    min_loss_scale: float = opt(1.0, "smallest loss scale; an overflow there counts as a skipped update", acts=_SCALES)
    max_loss_scale: float = opt(2147483648.0, "largest loss scale", acts=_SCALES)

    def validate(self) -> None:
        """Raise `ConfigError` naming field, value, rule and remedy."""
        self._require_at_least(1, "epochs", "batch_size", "max_seq_len", "grad_accum_steps", "max_bad_steps")
        self._require_at_least(0, "warmup_steps", "checkpoint_interval", "max_checkpoints", "log_interval")
        self._require_at_least(0, "eval_interval", "seed", "schedule_start")
        for name in ("max_steps", "num_threads", "cooldown_steps"):
            if getattr(self, name) is not None:
                self._require_at_least(0, name)
        self._check_optimizer()
        self._check_schedule()
        self._check_logging()
        self._check_precision()
        self._check_not_here_yet()

    def quiet(self) -> "LlmTrainingConfig":
        """Return the same training, of which nothing is saved or logged: for a trial."""
        return self.replace(checkpoint_path=None, log_dir=None, **dict.fromkeys(_LOGGERS, False))

    def _check_optimizer(self) -> None:
        for name in ("weight_decay", "max_grad_norm", "z_loss"):
            value = getattr(self, name)
            self._require(name, math.isfinite(value) and value >= 0, "be zero or more", "use 0 to switch it off")
        for name, default in (("beta1", 0.9), ("beta2", 0.999), ("momentum", 0.9), ("label_smoothing", 0.0)):
            self._require(name, 0 <= getattr(self, name) < 1, "be at least 0 and below 1", f"try {default}")
        self._require("muon_momentum", 0 <= self.muon_momentum < 1, "be at least 0 and below 1", "try 0.95")
        self._require_at_least(1, "muon_steps")
        rate = self.muon_rate
        self._require("muon_rate", math.isfinite(rate) and rate > 0, "be positive", "1 is the learning rate as it is")
        self._require("epsilon", math.isfinite(self.epsilon) and self.epsilon > 0, "be positive", "try 1e-8")

    def _check_schedule(self) -> None:
        schedule = self.lr_schedule
        rate = self.learning_rate
        self._require("learning_rate", math.isfinite(rate) and rate > 0, "be a positive number", "try 0.001")
        least = self.min_learning_rate
        self._require("min_learning_rate", math.isfinite(least) and least >= 0, "be zero or more", "use 0 for no limit")
        good = math.isfinite(self.warmup_ratio) and 0 <= self.warmup_ratio < 1
        self._require("warmup_ratio", good, "be at least 0 and below 1", "the usual value is 0.03")
        if schedule is LearningRateSchedule.CONSTANT:
            return
        self._require_at_least(1, "decay_steps")
        if least > rate:
            raise ConfigError(
                f"min_learning_rate ({least}) must not exceed learning_rate ({rate}); lower it, e.g. to {rate / 10:g}"
            )
        periodic = schedule in (LearningRateSchedule.STEP, LearningRateSchedule.COSINE_WARM_RESTARTS)
        if self.warmup_steps > self.decay_steps and not periodic:
            raise ConfigError(
                f"warmup_steps ({self.warmup_steps}) must not exceed decay_steps ({self.decay_steps}), where the "
                "schedule ends; lower warmup_steps or raise decay_steps"
            )
        if schedule is LearningRateSchedule.WSD:
            share, steps, room = self.cooldown_share, self.cooldown_steps or 0, self.decay_steps - self.warmup_steps
            self._require("cooldown_share", 0 < share <= 1, "be above 0 and at most 1", "try 0.1")
            what = f"be at most {room}, the steps between warmup_steps and decay_steps"
            self._require("cooldown_steps", steps <= room, what, "lower it, or warmup_steps, or raise decay_steps")

    def _check_logging(self) -> None:
        for name in _LOGGERS:
            if getattr(self, name) and self.log_dir is None:
                raise ConfigError(f"{name} (True) must come with log_dir; set log_dir to a directory for its files")

    def _check_precision(self) -> None:
        scales = ("initial_loss_scale", "min_loss_scale", "max_loss_scale")
        rules = ("loss_scale_growth_factor", "loss_scale_backoff_factor", "loss_scale_growth_interval")
        if self.mixed_precision is Precision.FP16:
            check_loss_scaling(self, *scales, *rules)
            remedy = "loss scaling finds its scale by skipping updates that overflow"
            self._require("nan_guard", self.nan_guard, "be true for fp16", remedy)

    def _check_not_here_yet(self) -> None:
        self._require("use_gpu", not self.use_gpu, "be false", _GPU_REMEDY)
        self._require("gpu_backend", self.gpu_backend is None, "be unset", _GPU_REMEDY)
        self._require("gpu_batch_threshold", self.gpu_batch_threshold == 8, "be 8", _GPU_REMEDY)
        self._require("gpu_device_buffer_mb", self.gpu_device_buffer_mb == 256, "be 256", _GPU_REMEDY)
        self._require("export_gguf_path", self.export_gguf_path != "", "not be empty", "give the name of a file")


@dataclass(frozen=True, kw_only=True)
class EarlyStoppingConfig(Config):
    """When to stop because the validation metric no longer falls."""

    heading: ClassVar[str] = "Training"
    switch: ClassVar[str] = "enabled"

    patience: int = opt(3, "evaluations without improvement after which training stops")
    min_delta: float = opt(0.001, "smallest fall of the metric that counts as an improvement")
    monitor_loss: bool = opt(True, "watch the validation loss; false watches its perplexity")
    enabled: bool = opt(True, "stop when validation no longer improves", flag="early-stopping", common=True)

    def validate(self) -> None:
        """Raise `ConfigError` naming field, value, rule and remedy."""
        self._require_at_least(1, "patience")
        good = math.isfinite(self.min_delta) and self.min_delta >= 0
        self._require("min_delta", good, "be zero or more", "the ABI's default is 0.001")


# -- the file of a run --------------------------------------------------------------------------

SECTIONS: dict[str, type[Config]] = {
    "model": TrainableModelConfig,
    "training": LlmTrainingConfig,
    "early_stopping": EarlyStoppingConfig,
    "lora": LoraConfig,
}


def load_yaml(path: str | Path, sections: Mapping[str, type[Config]] = SECTIONS) -> dict[str, dict[str, Any]]:
    """Read a run's config file; return its sections as plain dictionaries, as `read_sections` says."""
    return read_sections(path, read_yaml(path), sections)
