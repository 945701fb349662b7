"""training_args.json: the settings of a run in the names of transformers' TrainingArguments, and in ours."""

from typing import Any

from ..config import LlmTrainingConfig, Precision
from .deepzig_config import LORA_ALPHA, LORA_DROPOUT, DeepZigConfig

__all__ = ["training_args"]


def training_args(config: DeepZigConfig, training: LlmTrainingConfig) -> dict[str, Any]:
    """Return the content of the file; under "abi_py" is the whole DeepZigConfig, from which a run can be resumed."""
    evaluates = training.eval_interval > 0
    return {
        "output_dir": config.output_dir,
        "num_train_epochs": training.epochs,
        "per_device_train_batch_size": training.batch_size,
        "per_device_eval_batch_size": training.batch_size,
        "gradient_accumulation_steps": training.grad_accum_steps,
        "gradient_checkpointing": config.gradient_checkpointing,
        "learning_rate": training.learning_rate,
        "lr_scheduler_type": "cosine",
        "warmup_ratio": config.warmup_ratio,
        "warmup_steps": training.warmup_steps,
        "optim": "adamw_torch",
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
        "save_total_limit": training.max_checkpoints,
        "eval_strategy": "steps" if evaluates else "no",
        "eval_steps": training.eval_interval or None,
        "load_best_model_at_end": evaluates,
        "metric_for_best_model": "eval_loss" if evaluates else None,
        "greater_is_better": False if evaluates else None,
        "label_smoothing_factor": training.label_smoothing,
        "seed": training.seed,
        "report_to": [],
        "lora": {"r": config.lora_rank, "lora_alpha": LORA_ALPHA, "lora_dropout": LORA_DROPOUT}
        if config.use_lora
        else None,
        "abi_py": config.to_dict(),
    }
