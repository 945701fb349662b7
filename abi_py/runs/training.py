"""A run from its beginning, or from a checkpoint, to its end, without a terminal: what programs and pipelines do."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from .finishing import leave_model
from .parts import evaluate_kept, put_best_back
from .run import Run
from .trainer_files import trainer_sinks

if TYPE_CHECKING:
    from ..training.events import Sink
    from ..training.report import TrainingReport
    from ..training.stop import GracefulStop

__all__ = ["train_run"]


def train_run(
    run: Run, checkpoint: Path | None = None, sinks: "Sequence[Sink]" = (), stop: "GracefulStop | None" = None
) -> "TrainingReport":
    """Train, and leave what a run leaves; its directory must be held.

    sinks   listeners to the events of the training
    stop    ends it before; then nothing is left yet but checkpoints, and it can be gone on with
    """
    from ..training.metrics import METRICS, JsonlSink
    from ..training.report import REPORT, write_report

    if checkpoint is None:
        run.begin()
    else:
        run.write_config()
    trainer = run.make_trainer(checkpoint)
    own: list[Sink] = [*trainer_sinks(run), JsonlSink(run.directory / METRICS)]
    for sink in (*own, *sinks):
        trainer.add_sink(sink)
    report = trainer.fit(run.train, run.valid, run.early_stopping, stop)
    write_report(report, run.directory / REPORT)
    if not report.interrupted:
        step, report = put_best_back(run, trainer, report)
        leave_model(run, trainer, report, evaluate_kept(run, trainer, step))
    return report
