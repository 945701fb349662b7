"""The directory of a run: what it holds, and who may write there.

RUN_DIR/config.yaml      the final configuration: model, training, early stopping, data
RUN_DIR/metrics.jsonl    one record for each logged step, evaluation, checkpoint
RUN_DIR/report.json      the report of the end
RUN_DIR/checkpoints/     llm_step_{n}/, and `latest`
RUN_DIR/model/           what the run leaves: a whole model, for others too (finishing.py)
RUN_DIR/adapter/         of a run of LoRA, its adapters
"""

import contextlib
import os
import shlex
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..config import LlmTrainingConfig
from ..errors import CheckpointError, ConfigError
from ..files import check_free as check_no_files
from ..formats.checkpoint_names import ADAPTER, MODEL, TRAINING_ARGS
from ..formats.checkpoint_names import SETTINGS as CONFIG
from ..locks import DirectoryLock, check_unlocked
from ..training.finding import has_checkpoint, is_run, place_of_checkpoints, root_of_checkpoints
from ..training.loggers import WANDB
from ..training.metrics import METRICS
from ..training.report import REPORT
from ..training.trainer_state import TRAINER_STATE
from ..untrusted import read_json

if TYPE_CHECKING:
    from ..training.state import TrainingState

__all__ = [
    "ADAPTER",
    "CONFIG",
    "EVALUATION",
    "MODEL",
    "Leaves",
    "check_free",
    "has_checkpoint",
    "has_report",
    "hold",
    "is_run",
    "new_directory",
    "place_of_checkpoints",
    "root_of_checkpoints",
]

EVALUATION = "evaluation.json"  # what the parts of conversations that were kept show


@dataclass(frozen=True)
class Leaves:
    """Where a run writes at its end the whole model, and the adapters alone; None: nowhere."""

    model: Path | None
    adapter: Path | None


def run_files() -> tuple[str, ...]:
    """Return the names of all that a run writes into its directory."""
    from ..data.tokenizer import FILES

    extra = (EVALUATION, TRAINING_ARGS, TRAINER_STATE)
    return (CONFIG, "checkpoints", METRICS, REPORT, WANDB, *FILES, MODEL, ADAPTER, *extra)


def has_report(directory: Path, state: "TrainingState") -> bool:
    """Say whether a run has come to write report.json after its last step; a kill, or a full disk, may prevent it."""
    try:
        report = read_json(directory / REPORT, {"total_steps": int, "interrupted": bool})
    except (OSError, CheckpointError):
        return False
    return bool(report["total_steps"] == state.global_step and not report["interrupted"])


def hold(directory: Path, training: LlmTrainingConfig, name: str) -> contextlib.AbstractContextManager[Any]:
    """Hold a run's directory for this process; ConfigError, with process and host, if another one writes there.

    Its checkpoint_path is held by the trainer; where that is the same directory, once is enough.
    """
    if os.path.realpath(directory) == os.path.realpath(training.checkpoint_path or ""):
        check_unlocked(directory, name)
        return contextlib.nullcontext()
    return DirectoryLock(directory, name)


def check_free(directory: Path) -> None:
    """Raise ConfigError if a directory holds a run already, a model, or another file of a name that a run writes."""
    from ..formats.huggingface import CONFIG as SHAPE
    from ..formats.huggingface import INDEX, WEIGHTS
    from ..formats.peft import ADAPTER_CONFIG

    remedy = "choose another"
    if is_run(directory) or has_checkpoint(directory):
        remedy += f", or go on with it by abi-train resume {shlex.quote(str(directory))}"
    check_no_files(directory, run_files(), "out", remedy)
    model = next((name for name in (SHAPE, WEIGHTS, INDEX, ADAPTER_CONFIG) if (directory / name).is_file()), None)
    if model is not None:
        raise ConfigError(
            f"out ({directory}) must not be the folder of a model: its {model} would hide what the run trains; choose "
            "another"
        )


@contextlib.contextmanager
def new_directory() -> Iterator[Path]:
    """Make and give the first free name of runs/DATE-TIME, runs/DATE-TIME-2 ...; what stays empty is removed again."""
    stem, parent = time.strftime("%Y%m%d-%H%M%S"), Path("runs")
    number, is_new = 1, not parent.exists()
    while True:
        directory = parent / (stem if number == 1 else f"{stem}-{number}")
        try:
            directory.mkdir(parents=True)
        except FileExistsError:
            number += 1
        else:
            break
    try:
        yield directory
    finally:
        with contextlib.suppress(OSError):  # not empty: a run was begun there
            directory.rmdir()
            if is_new:
                parent.rmdir()
