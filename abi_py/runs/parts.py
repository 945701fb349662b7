"""What the parts of the conversations that are kept for validation show, on the weights that a run leaves.

    told    questions whose answers the training part tells      new    answers that it does not tell

A figure of one says nothing about the other, so both are in evaluation.json, each by its name.
"""

from pathlib import Path
from typing import TYPE_CHECKING

from ..choices import Which
from ..files import atomic_json
from .directory import EVALUATION
from .run import Run

if TYPE_CHECKING:
    from ..training.report import EvalResult, TrainingReport
    from ..training.trainer import LlamaTrainer

__all__ = ["evaluate_parts", "put_best_back"]


def put_best_back(run: Run, trainer: "LlamaTrainer", report: "TrainingReport") -> None:
    """Bring the model to the weights that RUN/model has: the best, unless the last are asked for or nobody has the best
    any more.
    """
    from ..training.resume import restore_best

    state = trainer.state
    if run.config.export.which is Which.LAST or report.best_checkpoint is None or state.best_step == state.global_step:
        return
    if Path(report.best_checkpoint).is_dir():
        restore_best(trainer.model, trainer.optimizer, Path(report.best_checkpoint))


def evaluate_parts(run: Run, trainer: "LlamaTrainer") -> "dict[str, EvalResult]":
    """Return the figures of each part, and write them to RUN/evaluation.json; nothing where there are no parts."""
    results = {name: trainer.evaluate(part) for name, part in run.parts.items()}
    figures = {
        name: {
            "conversations": len(run.parts[name]),
            "loss": result.loss,
            "perplexity": result.perplexity,
            "accuracy": result.accuracy,
        }
        for name, result in results.items()
    }
    if figures:
        atomic_json(run.directory / EVALUATION, figures)
    return results
