"""A DeepZig run: conversations in, a finished model folder out.

    deepzig_run.py  what it is made of: data, tokenizer, model, settings
    training        loss on the answers, evaluation every N steps and at the end, the best weights taken at the end
    folder          `formats/deepzig.py`; with LoRA the adapters too, and the weights with the adapters merged

Both evaluation parts are evaluated at the end, on the weights that are exported.
"""

import itertools
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..data.conversation import Conversation
from ..data.tokenizer import FILES as TOKENIZER_FILES
from ..errors import ConfigError
from ..families import write_config
from ..files import check_free as check_no_files
from ..files import json_text
from ..formats.deepzig import TRAINING_ARGS, generation_config, write_model
from ..formats.forms import to_stored
from ..formats.huggingface import CONFIG, WEIGHTS
from ..formats.zig import misfit
from ..generation.settings import CONFIG_FILE as GENERATION_FILE
from ..locks import DirectoryLock
from ..model import LoraModel, TrainableModel
from ..training.events import Sink
from ..training.metrics import METRICS
from ..training.report import REPORT, EvalResult, TrainingReport
from ..training.resume import restore_best
from ..training.stop import GracefulStop
from ..training.trainer import LlamaTrainer
from ..training.trainer_state import TRAINER_STATE
from ..untrusted import read_json
from .deepzig_card import model_card
from .deepzig_config import DeepZigConfig
from .deepzig_run import DeepZigRun

__all__ = ["check_free", "finish", "is_finished", "load_run_config", "train_deepzig"]

ADAPTER, CARD, EVALUATION = "adapter", "README.md", "evaluation.json"  # inside the output folder
CHECKPOINTS = "checkpoints"
# All that is written into the output folder, by the training and at its end; what shows a run best comes first.
WRITTEN = (
    *(CONFIG, WEIGHTS, TRAINING_ARGS, CHECKPOINTS, TRAINER_STATE, METRICS, REPORT, *TOKENIZER_FILES),
    *(GENERATION_FILE, EVALUATION, CARD, ADAPTER),
)
CALM_BELOW = 2_000_000  # weights; a smaller model's generation_config.json draws close to the likeliest token


def finish(
    run: DeepZigRun, trainer: LlamaTrainer, report: TrainingReport
) -> tuple[TrainableModel, dict[str, EvalResult]]:
    """Put the best weights back, evaluate each part, write the folder; return its model (adapters merged), results.

    OSError if something cannot be written; the checkpoints are there all the same.
    """
    if report.best_checkpoint is not None and trainer.state.best_step != trainer.state.global_step:
        restore_best(trainer.model, trainer.optimizer, Path(report.best_checkpoint))
    model = trainer.model
    results = {name: trainer.evaluate(part) for name, part in run.parts.items()}
    if isinstance(model, LoraModel):
        model.save(run.directory / ADAPTER)
        model = model.merged()
    special = {role: getattr(run.tokenizer, f"{role}_id") for role in ("bos", "eos", "pad")}
    asked = next(filter(None, map(_asked, run.selection.conversations)), [])
    stop_ids = run.template.encoder(run.tokenizer).stop_ids(asked)
    calm = model.num_params() < CALM_BELOW
    settings = generation_config(run.shape.max_seq_len, special, stop_ids, calm)
    figures = {
        name: {
            "conversations": len(run.parts[name]),
            "loss": result.loss,
            "perplexity": result.perplexity,
            "accuracy": result.accuracy,
        }
        for name, result in results.items()
    }
    texts = {
        GENERATION_FILE: json_text(settings),
        EVALUATION: json_text(figures),
        CARD: model_card(run, model.num_params(), report, results),
    }
    weights = to_stored(model.parameters.table, model.weights)
    plain = misfit(model.config) is None
    write_model(run.directory, weights, write_config(model.config), special, texts, plain=plain)
    return model, results


def _asked(conversation: Conversation) -> list[dict[str, Any]]:
    """Return the turns before the first answer."""
    return list(itertools.takewhile(lambda turn: turn["role"] != "assistant", conversation.to_dicts()))


def train_deepzig(
    config: DeepZigConfig | None = None, sinks: Sequence[Sink] = (), stop: GracefulStop | None = None
) -> tuple[TrainingReport, Path]:
    """Train as `config` says (default: the test preset on the shipped data); return the report and the folder.

    Stopped by `stop`, the folder holds checkpoints and no model yet.
    """
    run = DeepZigRun.prepare(config or DeepZigConfig())
    with DirectoryLock(run.directory, "output_dir"):
        check_free(run.directory)
        trainer = run.make_trainer(sinks)
        report = trainer.fit(run.train, run.valid, None, stop)
        if not report.interrupted:
            finish(run, trainer, report)
    return report, run.directory


def check_free(directory: Path, resume: bool = False) -> None:
    """Raise ConfigError if a folder holds a model, a run that is not to be resumed, or a file of a name we write."""
    folder, remedy = shlex.quote(str(directory)), "choose another"
    if is_finished(directory):
        remedy += f" (it holds a finished run: go on from it with --base {folder})"
    elif (directory / TRAINING_ARGS).exists():
        remedy += f", or go on with the interrupted run by abi-train deepzig --resume --output-dir {folder}"
    check_no_files(directory, (CONFIG,) if resume else WRITTEN, "output_dir", remedy)


def is_finished(directory: Path) -> bool:
    """Say whether a folder holds a model: the one that a run there was begun for."""
    return (directory / CONFIG).exists() and (directory / WEIGHTS).exists()


def load_run_config(directory: Path) -> DeepZigConfig:
    """Return the settings with which a run was begun in `directory`; ConfigError if there is none."""
    file = directory / TRAINING_ARGS
    remedy = "it is damaged; begin a new run with another --output-dir"
    try:
        values = read_json(file, {"abi_py": dict[str, Any]}, error=ConfigError, remedy=remedy)["abi_py"]
    except FileNotFoundError:
        raise ConfigError(f"output_dir ({directory}) has no {TRAINING_ARGS}, so no run to go on with") from None
    return DeepZigConfig.from_dict({**values, "output_dir": str(directory)})
