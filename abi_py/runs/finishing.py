"""What a run leaves at its end: RUN/model, a whole model that others open; of adapters RUN/adapter too, for PEFT.
A phase of several names other places (`Run.leaves`).

The weights are those of the best checkpoint where there were evaluations, else of the last (`export.which` says
otherwise).  They are read from the checkpoint, so what is written is what a resumed run would have, and a run that was
killed before this writes the same later.
"""

import dataclasses
import os
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ..choices import Which
from ..config import LlmTrainingConfig, TrainableModelConfig
from ..errors import AbiError, CheckpointError, ConfigError, told
from ..files import check_place
from ..formats.checkpoint_names import CARD, ORIGIN
from ..training.finding import BEST, LAST, Origin, find_place, list_checkpoints, root_of_checkpoints
from .directory import MODEL
from .findings import Findings
from .settings import ExportConfig

if TYPE_CHECKING:
    from ..training.report import TrainingReport
    from ..training.trainer import LlamaTrainer
    from .export_source import Source
    from .exporting import Exported
    from .run import Run

__all__ = ["Left", "check_export", "check_new_file", "has_left_model", "leave_model"]

UNNAMED = LlmTrainingConfig().export_name


@dataclass(frozen=True)
class Left:
    """The folder that a run left, which step made its weights, and whether it has a tokenizer."""

    folder: Path
    kind: str  # "model", or "adapter" where nothing else is left
    said: str  # the step, and why that one
    has_tokenizer: bool
    note: str = ""  # what its adapters were merged into, where they were trained on other weights
    gguf: "Exported | None" = None  # what was written to the training's `export_gguf_path`


def check_export(
    export: ExportConfig, training: LlmTrainingConfig, shape: TrainableModelConfig, evaluates: bool
) -> None:
    """Raise ConfigError, before training, for a form that cannot hold the model, weights that there will not be, or a
    place where no file can be made.

    The GGUF file of the training counts; that it is not there yet is for a new run (`check_new_file`).
    """
    from .exporting import check_format

    check_format(export.format.value, shape, None, None)
    for name in ("checkpoint_path", "log_dir"):
        if (path := getattr(training, name)) is not None and not os.path.isdir(path):
            check_place(name, path)
    if training.export_gguf_path is not None:
        check_format("gguf", shape, None, None, training.export_quantize)
        check_place("export_gguf_path", training.export_gguf_path)
    if export.which is Which.BEST and not evaluates:
        raise ConfigError(
            "which (best) must come with evaluations; set valid_fraction and eval_interval above 0, or take --which "
            "last"
        )


def check_new_file(training: LlmTrainingConfig) -> None:
    """Raise ConfigError if the GGUF file of a new run is there, or its name is no file's: hours later it is too late.
    """
    path = training.export_gguf_path
    if path is not None and os.path.lexists(path):
        raise ConfigError(f"export_gguf_path ({path}) is there already; remove it, or choose another")


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
    found: Findings | None = None,
) -> Left:
    """Write what a run leaves at its end, in place of what an earlier end left there, and say what it is;
    `found` is what `evaluate_kept` has found.

    CheckpointError, with the remedy, if it cannot be written: the checkpoints are whole all the same.
    """
    from .export_source import Source
    from .exporting import write
    from .merging import merged_into
    from .model_card import model_card
    from .trainer_files import training_args_files

    export, directory, leaves = run.config.export, run.directory, run.leaves
    output = leaves.model or leaves.adapter or directory / MODEL
    which = BEST if _is_best_left(run, trainer) else LAST
    try:
        source = Source.open(directory, which, merge_base=export.merge_base)
        known = source.loaded.origin or Origin(step=trainer.state.global_step, steps=None, is_best=False)
        newest = max(order for order, _ in list_checkpoints(root_of_checkpoints(directory)))
        origin = dataclasses.replace(known, order=newest)
        card = model_card(run, source.companions, export.format, report, origin, found)
        texts = {CARD: card, ORIGIN: origin.to_json(), **training_args_files(run)}
        if leaves.adapter is not None:
            write(source, leaves.adapter, "peft", "float32", files=texts)
        if leaves.model is not None:
            write(source, leaves.model, export.format.value, export.dtype.value, files=texts)
    except (OSError, CheckpointError, ConfigError) as error:
        name = shlex.quote(str(directory))
        raise CheckpointError(
            f"{output} was not written: {told(error)}; the checkpoints are safe: once that is mended, abi-train resume "
            f"{name} writes it, or abi-train export {name} --{which} -o FOLDER another one"
        ) from None
    merged = merged_into(source.loaded) if leaves.model is not None else ""
    note = f"adapters are merged into the weights: {merged}" if merged else ""
    kind = "adapter" if leaves.model is None else "model"
    return Left(output, kind, origin.said, source.has_tokenizer, note, _leave_gguf(run, source))


def _leave_gguf(run: "Run", source: "Source") -> "Exported | None":
    """Write the GGUF file that the training asks for, of the weights of RUN/model; an earlier end's is replaced."""
    from .export_source import name_of
    from .exporting import export

    training, base = run.config.training, run.config.base
    if training.export_gguf_path is None:
        return None
    name, quantize = training.export_name, training.export_quantize
    if name == UNNAMED and base is not None and base.path is not None:
        name = name_of(Path(base.path))
    path = Path(training.export_gguf_path)
    try:
        return export(source, path, "gguf", quantize=quantize, name=name, force=True)
    except (OSError, AbiError) as error:
        again = f"abi-train export {shlex.quote(str(run.directory))} --format gguf --quantize {quantize} -o FILE"
        what = f"{path} was not written" if isinstance(error, OSError) else f"{path} is not what it should be"
        raise CheckpointError(f"{what}: {told(error)}; the run is whole, and {again} writes the file") from None

