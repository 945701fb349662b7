"""What a run writes for tools of transformers' Trainer, where it is asked to: its settings, the course of its losses.

    RUN/training_args.json    the settings in the names of TrainingArguments (in RUN/model too)
    RUN/trainer_state.json    the losses and evaluations, written at each checkpoint (training/trainer_state.py)

transformers keeps the first as training_args.bin, a pickle of PyTorch, which nobody should load from a stranger; ours
is JSON.
"""

from typing import Any

from ..choices import Which
from ..config import Precision
from ..files import atomic_text, json_text
from ..formats.checkpoint_names import TRAINING_ARGS
from ..training.trainer_state import TRAINER_STATE, TrainerStateSink
from .opening import RunData
from .run import Run
from .settings import RunConfig

__all__ = ["trainer_sinks", "training_args", "training_args_files"]


def training_args(config: RunConfig, directory: str) -> dict[str, Any]:
    """Return the settings of a run in the names of transformers' TrainingArguments."""
    training, lora = config.training, config.lora
    evaluates = training.eval_interval > 0
    adapters = None if lora is None else {"r": lora.rank, "lora_alpha": lora.alpha, "lora_dropout": lora.dropout}
    return {
        "output_dir": directory,
        "num_train_epochs": training.epochs,
        "max_steps": training.max_steps or -1,
        "per_device_train_batch_size": training.batch_size,
        "per_device_eval_batch_size": training.batch_size,
        "gradient_accumulation_steps": training.grad_accum_steps,
        "gradient_checkpointing": config.model.checkpointing.value != "none",
        "learning_rate": training.learning_rate,
        "lr_scheduler_type": SCHEDULES.get(training.lr_schedule.value, training.lr_schedule.value),
        "warmup_steps": training.warmup_steps,
        "optim": OPTIMIZERS.get(training.optimizer.value, training.optimizer.value),
        "weight_decay": training.weight_decay,
        "adam_beta1": training.beta1,
        "adam_beta2": training.beta2,
        "adam_epsilon": training.epsilon,
        "max_grad_norm": training.max_grad_norm,
        "fp16": training.mixed_precision is Precision.FP16,
        "bf16": training.mixed_precision is Precision.BF16,
        "logging_steps": training.log_interval,
        "logging_first_step": True,
        "save_strategy": "steps",
        "save_steps": training.checkpoint_interval,
        "save_total_limit": training.max_checkpoints or None,
        "eval_strategy": "steps" if evaluates else "no",
        "eval_steps": training.eval_interval or None,
        "load_best_model_at_end": evaluates and config.export.which is not Which.LAST,
        "metric_for_best_model": "eval_loss" if evaluates else None,
        "greater_is_better": False if evaluates else None,
        "label_smoothing_factor": training.label_smoothing,
        "seed": training.seed,
        "report_to": [],
        "lora": adapters,
    }


SCHEDULES = {"warmup_cosine": "cosine"}  # ours -> transformers', where they differ in name alone
OPTIMIZERS = {"adamw": "adamw_torch", "adamw_8bit": "adamw_bnb_8bit"}


def training_args_files(run: Run) -> dict[str, str]:
    """Return the texts by name of what says how it was trained; none where nobody asked for them."""
    if not run.config.export.trainer_files:
        return {}
    return {TRAINING_ARGS: json_text(training_args(run.config, run.directory.resolve().name))}


def trainer_sinks(run: Run) -> list[TrainerStateSink]:
    """Write training_args.json, and return the writer of trainer_state.json; nothing where nobody asked for them."""
    if not run.config.export.trainer_files:
        return []
    for name, text in training_args_files(run).items():
        atomic_text(run.directory / name, text)
    training, length = run.config.training, run.config.training.max_seq_len
    rows = _rows(run.train, length)
    valid_rows = 0 if run.valid is None else _rows(run.valid, length)
    sink = TrainerStateSink(
        run.directory / TRAINER_STATE,
        steps_per_epoch=run.steps[0],
        rows=rows,
        valid_rows=valid_rows,
        input_tokens=run.train.num_tokens - (len(run.train) if run.train.conversations else 0),
        batch_size=training.batch_size,
        logging_steps=training.log_interval,
        eval_steps=training.eval_interval,
        save_steps=training.checkpoint_interval,
    )
    return [sink]


def _rows(data: RunData, length: int) -> int:
    """Return the rows of an epoch."""
    return data.num_batches(1, length, drop_last=False)
