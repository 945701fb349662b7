"""trainer_state.json with the keys of transformers' Trainer, so that its tools and notebooks can plot our runs.

    log_history   {epoch, step, loss, grad_norm, learning_rate} for each logged step,
                  {epoch, step, eval_loss, eval_runtime, ...} for each evaluation,
                  {epoch, step, train_loss, train_runtime, ...} at the end

`epoch` is a fraction there: steps done / steps of an epoch.  The file is written at each checkpoint and at the end; a
resumed run reads it and drops what comes after its step.  What a killed one had not yet written there after its last
checkpoint is in the metrics.jsonl beside it.
"""

import contextlib
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..files import atomic_json
from ..untrusted import check, read_json
from .events import CheckpointEvent, EndEvent, EvaluationEvent, Event, StartEvent, StepEvent
from .metrics import METRICS, records_until
from .report import plain

__all__ = ["TRAINER_STATE", "TrainerStateSink"]

TRAINER_STATE = "trainer_state.json"
STORED = {  # what is read of it again
    "log_history": list[dict[str, Any]],
    "best_global_step": int | None,
    "best_model_checkpoint": str | None,
}


class TrainerStateSink:
    """Receives the events of a run and writes its trainer_state.json."""

    def __init__(
        self,
        path: str | Path,
        *,
        steps_per_epoch: int,
        rows: int,
        valid_rows: int,
        input_tokens: int,
        batch_size: int,
        logging_steps: int,
        eval_steps: int,
        save_steps: int,
    ) -> None:
        """Write to `path`; rows and input_tokens (without padding) are those of one epoch."""
        self.path = Path(path)
        self.steps_per_epoch, self.rows, self.valid_rows = steps_per_epoch, rows, valid_rows
        self.input_tokens, self.batch_size = input_tokens, batch_size
        self.intervals = {"logging_steps": logging_steps, "eval_steps": eval_steps, "save_steps": save_steps}
        self.log: list[dict[str, Any]] = []
        self.step = self.max_steps = self.epochs = 0
        self.best: tuple[float, int] | None = None  # evaluation loss and its step
        self.best_path: str | None = None
        self.flops_per_token = self._last_time = 0.0
        self._losses: list[float] = []
        self._ended = False

    def handle(self, event: Event) -> None:
        """Take in one event."""
        self.step = event.step
        if isinstance(event, StartEvent):
            self._start(event)
        elif isinstance(event, StepEvent):
            self._step(event)
        elif isinstance(event, EvaluationEvent):
            self._log_evaluation(event.record())
        elif isinstance(event, CheckpointEvent):
            if event.best:
                self.best_path = event.path
            self._write()
        elif isinstance(event, EndEvent):
            self._end(event)
        self._last_time = event.time

    def close(self) -> None:
        """Nothing stays open."""

    def _epoch(self, step: int) -> float:
        return round(step / self.steps_per_epoch, 4)

    def _start(self, event: StartEvent) -> None:
        self.max_steps, self.epochs = event.total_steps, event.epochs
        self.flops_per_token, self._ended, self._losses = event.flops_per_token, False, list(event.losses)
        if event.step == 0:
            return
        if self.path.is_file():
            stored = read_json(self.path, STORED, remedy="it is damaged; remove it, and its history begins anew")
            row_schema = {"step": int, "eval_loss": float | None}
            check(stored["log_history"], [row_schema], f"{self.path}: log_history")
            rows = [row for row in stored["log_history"] if row["step"] <= event.step and "train_runtime" not in row]
            self.log = rows
            for row in rows:
                if "eval_loss" in row:
                    self._remember_best(row["eval_loss"], row["step"])
            step = stored.get("best_global_step")
            if step is not None and step <= event.step:
                self.best_path = stored.get("best_model_checkpoint")
        self._catch_up(event)

    def _catch_up(self, event: StartEvent) -> None:
        """Add the rows that were not written yet, up to the checkpoint that was resumed from."""
        file, there = self.path.with_name(METRICS), {(row["step"], "loss" in row) for row in self.log}
        for _, record in records_until(file, event.step, event.time) if file.is_file() else ():
            with contextlib.suppress(ValueError, KeyError, TypeError):  # a record that is not of this version
                late = (record["step"], record["type"] == "step") not in there
                if late and record["type"] == "step":
                    self._log_step(record)
                elif late and record["type"] == "evaluation":
                    self._log_evaluation(record)
                self._last_time = record["time"]
        if event.checkpoint is not None and event.checkpoint.best:
            self.best_path = event.checkpoint.path

    def _step(self, event: StepEvent) -> None:
        self._losses.append(event.loss)
        if event.logged:
            self._log_step(event.record())

    def _log_step(self, record: Mapping[str, Any]) -> None:
        row = {name: record[name] for name in ("loss", "grad_norm", "learning_rate")}
        self.log.append({"epoch": self._epoch(record["step"]), **row, "step": record["step"]})

    def _log_evaluation(self, record: Mapping[str, Any]) -> None:
        # The event before it is the step or the end of the epoch that the evaluation follows at once.
        seconds = max(record["time"] - self._last_time, 1e-9)
        batches = math.ceil(self.valid_rows / self.batch_size)
        self.log.append(
            {
                "epoch": self._epoch(record["step"]),
                "eval_loss": record["val_loss"],
                "eval_accuracy": record["val_accuracy"],
                "eval_runtime": seconds,
                "eval_samples_per_second": self.valid_rows / seconds,
                "eval_steps_per_second": batches / seconds,
                "step": record["step"],
            }
        )
        self._remember_best(record["val_loss"], record["step"])

    def _remember_best(self, loss: float | None, step: int) -> None:
        loss = math.inf if loss is None else loss  # not finite: JSON has no word for it
        if self.best is None or loss < self.best[0]:
            self.best = loss, step

    def _end(self, event: EndEvent) -> None:
        if event.report.interrupted:
            self._write()
            return
        seconds, epochs = max(event.time, 1e-9), self._epoch(event.step)
        self.log.append(
            {
                "epoch": epochs,
                "train_loss": math.fsum(self._losses) / len(self._losses) if self._losses else None,
                "train_runtime": seconds,
                "train_samples_per_second": epochs * self.rows / seconds,
                "train_steps_per_second": event.step / seconds,
                "total_flos": self._flops(),
                "step": event.step,
            }
        )
        self._ended = True
        self._write()

    def _tokens(self) -> int:
        return round(self.step / self.steps_per_epoch * self.input_tokens)

    def _flops(self) -> float:
        return self.flops_per_token * self._tokens()

    def _write(self) -> None:
        control = {
            "should_epoch_stop": False,
            "should_evaluate": False,
            "should_log": False,
            "should_save": True,
            "should_training_stop": self._ended,
        }
        content = {
            "best_global_step": self.best[1] if self.best else None,
            "best_metric": self.best[0] if self.best else None,
            "best_model_checkpoint": self.best_path,
            "epoch": self._epoch(self.step),
            "eval_steps": self.intervals["eval_steps"],
            "global_step": self.step,
            "is_hyper_param_search": False,
            "is_local_process_zero": True,
            "is_world_process_zero": True,
            "log_history": self.log,
            "logging_steps": self.intervals["logging_steps"],
            "max_steps": self.max_steps,
            "num_input_tokens_seen": self._tokens(),
            "num_train_epochs": self.epochs,
            "save_steps": self.intervals["save_steps"],
            "stateful_callbacks": {"TrainerControl": {"args": control, "attributes": {}}},
            "total_flos": self._flops(),
            "train_batch_size": self.batch_size,
            "trial_name": None,
            "trial_params": None,
        }
        atomic_json(self.path, plain(content))
