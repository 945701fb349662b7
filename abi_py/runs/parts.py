"""What the conversations that are kept for validation show, on the weights that a run leaves.

    told    questions whose answers the training part tells      new    answers that it does not tell
    json    answers that were checked as JSON (json_answers.py), where a run asks for it

A figure of one says nothing about the others, so all are in evaluation.json, each by its name.
"""

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..choices import Which
from ..files import atomic_json
from .directory import EVALUATION
from .findings import Findings
from .json_answers import check_answers_of_run
from .run import Run

if TYPE_CHECKING:
    from ..training.report import TrainingReport
    from ..training.trainer import LlamaTrainer

__all__ = ["UNTRAINED", "evaluate_kept", "put_best_back"]


UNTRAINED = "no evaluation was better than before training: what is left is as it began"


def put_best_back(run: Run, trainer: "LlamaTrainer", report: "TrainingReport") -> tuple[int, "TrainingReport"]:
    """Bring the model to the weights that RUN/model has: the best, unless the last are asked for or nobody has the best
    any more.

    Returns the step of these weights, and the report: with a warning, in RUN/report.json too, where they are those of
    before training.
    """
    from ..training.report import REPORT, write_report
    from ..training.resume import restore_best

    state, best = trainer.state, report.best_checkpoint
    if run.config.export.which is Which.LAST or best is None or state.best_step == state.global_step:
        return state.global_step, report
    if not Path(best).is_dir():
        return state.global_step, report
    restore_best(trainer.model, trainer.optimizer, Path(best))
    if state.best_step == 0:
        report = dataclasses.replace(report, warnings=(*report.warnings, UNTRAINED))
        write_report(report, run.directory / REPORT)
    return state.best_step, report


def evaluate_kept(run: Run, trainer: "LlamaTrainer", step: int) -> Findings:
    """Return what is found with the weights of `step`, which the model has, and write it to RUN/evaluation.json; no
    file where there is nothing to find."""
    results = {name: trainer.evaluate(part) for name, part in run.parts.items()}
    figures: dict[str, Any] = {
        name: {
            "conversations": len(run.parts[name]),
            "loss": result.loss,
            "perplexity": result.perplexity,
            "accuracy": result.accuracy,
        }
        for name, result in results.items()
    }
    answers = check_answers_of_run(run, trainer, step)
    if answers is not None:
        figures["json"] = dataclasses.asdict(answers)
    if figures:
        atomic_json(run.directory / EVALUATION, figures)
    return Findings(results, answers)
