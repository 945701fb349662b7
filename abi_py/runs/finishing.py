"""What a run leaves at its end: RUN/model, a whole model that others open; of adapters RUN/adapter too, for PEFT.

The weights are those of the best checkpoint where there were evaluations, else of the last (`export.which` says
otherwise).  They are read from the checkpoint, so what is written is what a resumed run would have, and a run that was
killed before this writes the same later.
"""

import dataclasses
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ..choices import Which
from ..config import TrainableModelConfig
from ..errors import CheckpointError, ConfigError
from ..formats.checkpoint_names import CARD, ORIGIN
from ..training.finding import BEST, LAST, Origin, find_place, list_checkpoints, root_of_checkpoints
from .directory import ADAPTER, MODEL
from .settings import ExportConfig

if TYPE_CHECKING:
    from ..training.report import EvalResult, TrainingReport
    from ..training.trainer import LlamaTrainer
    from .run import Run

__all__ = ["Left", "check_export", "has_left_model", "leave_model"]


@dataclass(frozen=True)
class Left:
    """The folder that a run left, which step made its weights, and whether it has a tokenizer."""

    folder: Path
    said: str  # the step, and why that one
    has_tokenizer: bool


def check_export(export: ExportConfig, shape: TrainableModelConfig, evaluates: bool) -> None:
    """Raise ConfigError, before training, for a form that cannot hold the model, or weights that there will not be."""
    from .exporting import check_format

    check_format(export.format.value, shape, None, None)
    if export.which is Which.BEST and not evaluates:
        raise ConfigError(
            "which (best) must come with evaluations; set valid_fraction and eval_interval above 0, or take --which "
            "last"
        )


def has_left_model(directory: Path) -> bool:
    """Say whether the model of a run is there, and none of its checkpoints is newer."""
    return find_place(directory).folder == directory / MODEL


def _is_best_left(run: "Run", trainer: "LlamaTrainer") -> bool:
    """Say whether the best weights are left: not where the last are asked for, or nobody has the best any more, of
    which resuming has warned.  CheckpointError if these are asked for and not there.
    """
    which = run.config.export.which
    if which is Which.LAST or trainer.state.best_step < 0:
        return False
    try:
        find_place(run.directory, BEST)
    except CheckpointError as error:
        if which is None:
            return False
        again = f"abi-train resume {shlex.quote(str(run.directory))} --which last"
        raise CheckpointError(f"{run.directory / MODEL} was not written: {error}, or {again}") from None
    return True


def leave_model(
    run: "Run",
    trainer: "LlamaTrainer",
    report: "TrainingReport",
    parts: "Mapping[str, EvalResult] | None" = None,
) -> Left:
    """Write RUN/model at the end of a run, in place of what an earlier end left there, and say what it is;
    `parts` is what `evaluate_parts` found.

    CheckpointError, with the remedy, if it cannot be written: the checkpoints are whole all the same.
    """
    from .exporting import Source, write
    from .model_card import model_card
    from .trainer_files import training_args_files

    export, directory, output = run.config.export, run.directory, run.directory / MODEL
    which = BEST if _is_best_left(run, trainer) else LAST
    try:
        source = Source.open(directory, which)
        known = source.loaded.origin or Origin(step=trainer.state.global_step, steps=None, is_best=False)
        newest = max(order for order, _ in list_checkpoints(root_of_checkpoints(directory)))
        origin = dataclasses.replace(known, order=newest)
        card = model_card(run, source.companions, export.format, report, origin, parts)
        texts = {CARD: card, ORIGIN: origin.to_json(), **training_args_files(run)}
        if run.config.lora is not None:
            write(source, directory / ADAPTER, "peft", "float32", files=texts)
        write(source, output, export.format.value, export.dtype.value, files=texts)
    except (OSError, CheckpointError, ConfigError) as error:
        name = shlex.quote(str(directory))
        raise CheckpointError(
            f"{output} was not written: {error}; the checkpoints are safe: once that is mended, abi-train resume "
            f"{name} writes it, or abi-train export {name} --{which} -o FOLDER another one"
        ) from None
    return Left(output, origin.said, source.has_tokenizer)
