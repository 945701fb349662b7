"""The trainer under the ABI's names: what there is to call, over the parts that do it.

    step.py      the accumulation window, up to the changed weights: read this first
    loop.py      epochs, and what is due between two batches: evaluation, saving, stopping
    saving.py    checkpoints while training        best.py    the state that early stopping puts back
    session.py   what all parts share              state.py   what of it a checkpoint keeps; clock.py its time
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from ..config import EarlyStoppingConfig, LlmTrainingConfig
from ..errors import AbiError
from ..files import check_place
from ..formats.zig import save_ablc
from ..model.gguf_writing import plan_gguf
from .evaluation import evaluate_batches
from .events import Sink
from .feed import Data, describe, open_feed
from .guard import Guard
from .loop import Loop
from .progress import showing
from .report import EvalResult, StepMetrics, TrainingReport, TrainingStats, perplexity
from .saving import Saver
from .session import Model, Session
from .step import Step
from .stop import GracefulStop

__all__ = ["EpochResult", "LlamaTrainer", "train_llm", "train_llm_with_validation"]


@dataclass(frozen=True, kw_only=True)
class EpochResult:
    """Result of one epoch with validation: mean loss over trained tokens, and whether training was stopped early."""

    loss: float
    early_stopped: bool


class LlamaTrainer(Session):
    """Trains `model` in place as `config` says.

    `state` is everything besides weights, gradients and moments that decides the next step; `loss_history` has one
    entry for each optimizer step.  Events go to the sinks that `log_dir` and the `enable_` fields ask for, and to those
    given here or with `add_sink`.  `count_bytes` may be set to that of the tokenizer: evaluations then have bits per
    byte.
    """

    def __init__(
        self,
        model: Model,
        config: LlmTrainingConfig,
        sinks: Sequence[Sink] = (),
        schedule: Callable[[int], float] | None = None,
    ) -> None:
        """Prepare to train a model.

        schedule  the learning rate of the update after so many, instead of the configuration's schedule; no file can
                  keep it, so a run that is resumed must be given it again

        ConfigError if a sink's package or so many threads are missing, or for a setting of the configuration's schedule
        beside one of your own.
        """
        super().__init__(model, config, sinks, schedule)
        self._saver = Saver(self)
        self._step = Step(self, Guard(self, lambda: self._saver.last))
        self._loop = Loop(self, self._step, self._saver)
        self.exports = True  # whether `fit` ends with the GGUF file that the configuration names

    # -- one step --------------------------------------------------------------------------------

    def train_step(
        self,
        input_ids: npt.ArrayLike,
        labels: npt.ArrayLike,
        attention_mask: npt.NDArray[np.uint8] | None = None,
        segment_ids: npt.NDArray[np.int32] | None = None,
    ) -> float:
        """Train on one micro-batch and return its loss; see `train_step_with_metrics`."""
        return self.train_step_with_metrics(input_ids, labels, attention_mask, segment_ids).loss

    def train_step_with_metrics(
        self,
        input_ids: npt.ArrayLike,
        labels: npt.ArrayLike,
        attention_mask: npt.NDArray[np.uint8] | None = None,
        segment_ids: npt.NDArray[np.int32] | None = None,
    ) -> StepMetrics:
        """Train on one micro-batch; every `grad_accum_steps`-th call updates the weights.

        A checkpoint is saved when `checkpoint_interval` says so: a loop of your own has no other place for it.

        input_ids and labels (B, T), any integer dtype; attention_mask (B, T) uint8; segment_ids (B, T) int32.  Flat ids
        are rows of the configuration's max_seq_len.  DataError for ids, labels or shapes that do not fit.
        NonFiniteError after `max_bad_steps` skipped updates in a row.
        """
        metrics = self._step.train(input_ids, labels, attention_mask, segment_ids)
        if metrics.updated:
            self._saver.save_on_time()
        return metrics

    # -- the loop --------------------------------------------------------------------------------

    def fit(
        self,
        data: Data,
        validation: Data | None = None,
        early_stopping: EarlyStoppingConfig | None = None,
        stop: GracefulStop | None = None,
        callbacks: Sequence[object] = (),
        progress: bool = False,
    ) -> TrainingReport:
        """Train to the end of the last epoch (or max_steps, or early stopping) from wherever the state is.

        `callbacks` are added as by `add_callback`, and stay; one that is there already is not added again.  With
        `checkpoint_path`, checkpoints are saved at intervals, at each better evaluation, at the end, and when `stop`
        was requested; then the report says interrupted.  `progress` shows a line on a terminal, one that is replaced
        in a notebook, and lines in a pipe.
        With `export_gguf_path`, the model is written there at the end, unless it was stopped before.
        ConfigError if `checkpoint_path` holds checkpoints of another run, or, with process and host, if another
        trainer is writing there, and for a model that no GGUF file can hold, or a place where none can be made.
        """
        config, writes = self.config, self.exports and self.config.export_gguf_path is not None
        if writes and config.export_gguf_path is not None:
            plan_gguf(self.model.config, config.export_quantize)  # raises now, and not after training
            check_place("export_gguf_path", config.export_gguf_path)
        for callback in callbacks:
            self.add_callback(callback)
        if validation is not None:
            self.set_validation_data(validation)
        with showing(self.events, progress):
            report = self._loop.fit(data, early_stopping, stop)
        if writes and config.export_gguf_path is not None and not report.interrupted:
            self.model.export_to_gguf(config.export_gguf_path, config.export_quantize, name=config.export_name)
        return report

    def train_epoch(self, data: Data, progress: bool = False) -> float:
        """Train for one epoch (the rest of it, after a resume) and return the mean loss over its trained tokens."""
        with showing(self.events, progress):
            return self._loop.fit_epoch(data, None)

    def train_epoch_with_validation(
        self, data: Data, early_stopping: EarlyStoppingConfig | None = None, progress: bool = False
    ) -> EpochResult:
        """Train for one epoch, evaluating the data of `set_validation_data` every eval_interval optimizer steps.

        An epoch in which no step was a multiple of eval_interval is evaluated at its end.
        """
        with showing(self.events, progress):
            loss = self._loop.fit_epoch(data, early_stopping or EarlyStoppingConfig())
        return EpochResult(loss=loss, early_stopped=self.state.early_stopped)

    def check_data(self, data: Data) -> None:
        """Raise what `fit` would raise at once (DataError, ConfigError) if a resumed run cannot go on with `data`."""
        self._loop.check_facts(describe(open_feed(data, self.config, self.model.config, training=True)))

    # -- evaluation ------------------------------------------------------------------------------

    def set_validation_data(self, data: Data) -> None:
        """Choose the data for evaluations during training."""
        self._loop.validation = data

    def evaluate(self, data: Data) -> EvalResult:
        """Return loss, perplexity and accuracy over all tokens of `data`, tail included, without label smoothing."""
        feed = open_feed(data, self.config, self.model.config, training=False)
        result = evaluate_batches(
            self.model, feed, precision=self.config.mixed_precision, count_bytes=self.count_bytes
        )
        if result is None:
            raise AbiError("the evaluation was stopped")
        return result

    # -- checkpoints -----------------------------------------------------------------------------

    def save_checkpoint(self) -> Path:
        """Save everything under `checkpoint_path` and return the checkpoint's directory.

        ConfigError without checkpoint_path, or if it holds checkpoints of another run; CheckpointError, OSError or
        NonFiniteError if it cannot be saved, in which case the earlier checkpoints are untouched.
        """
        return self._saver.save()

    def load_checkpoint(self, path: str | Path, *, new_data: bool = False) -> Path:
        """Restore weights, moments and state; return the checkpoint used.

        `path` is a checkpoint, a directory of checkpoints or a run directory (the newest whole checkpoint is taken,
        damaged ones are reported), or an ABIC/ABLC file of the Zig trainer.  The next `fit` or `train_epoch` continues
        the run as if it had never stopped; its data must be the same, unless `new_data` asks to begin at their first
        batch.
        CheckpointError if the files are damaged or belong to another model.
        """
        found = self._saver.load(path, new_data=new_data)
        self._loop.resume()
        return found

    def save_zig_checkpoint(self, path: str | Path) -> None:
        """Write weights and moments as an ABLC file of the Zig trainer; moments that the optimizer lacks are zeros."""
        weights = self.model.parameters.weights_flat
        moments = [self.optimizer.flat(name) for name in ("m", "v")]
        state = self.state
        save_ablc(
            path, weights, *moments, step=state.global_step, epoch=state.epoch, tokens_processed=state.tokens_processed
        )

    # -- what it tells ---------------------------------------------------------------------------

    def add_callback(self, callback: object) -> None:
        """Let an object with hooks (`on_step`, `on_evaluation` ...), or a function after each step, act on training.

        What a hook may do, `Control` says; when it is called, the table in `training/callbacks.py`.  An exception of a
        callback ends `fit`.
        """
        self._loop.callbacks.add(callback)

    def add_sink(self, sink: Sink) -> None:
        """Send events to one more sink."""
        self.events.add(sink)

    def finalize_logging(self) -> None:
        """Close all sinks; `fit` does this itself."""
        self.events.close()

    def was_early_stopped(self) -> bool:
        """Return whether early stopping ended the training."""
        return self.state.early_stopped

    def get_stats(self) -> TrainingStats:
        """Return the figures of the most recent optimizer step and the counters."""
        state = self.state
        return TrainingStats(
            epoch=state.epoch,
            global_step=state.global_step,
            micro_step=state.micro_step,
            tokens_processed=state.tokens_processed,
            loss=state.loss,
            accuracy=state.accuracy,
            learning_rate=state.learning_rate,
            grad_norm=state.grad_norm,
            perplexity=perplexity(state.loss) if state.global_step else 0.0,
            throughput=self.clock.throughput,
            time_ns=self.clock.elapsed(),
        )

    def get_report(self) -> TrainingReport:
        """Return the report of the run up to now."""
        return self._loop.report()


def train_llm(model: Model, config: LlmTrainingConfig, data: Data) -> TrainingReport:
    """Train `model` on `data` as `config` says and return the report."""
    return LlamaTrainer(model, config).fit(data)


def train_llm_with_validation(
    model: Model,
    config: LlmTrainingConfig,
    data: Data,
    validation: Data | None,
    early_stopping: EarlyStoppingConfig | None = None,
) -> TrainingReport:
    """Train with evaluations on `validation` every eval_interval steps, and early stopping unless it is disabled."""
    return LlamaTrainer(model, config).fit(data, validation, early_stopping or EarlyStoppingConfig())
