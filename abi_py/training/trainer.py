"""The trainer: from batches to weights, and everything around it that must survive a crash.

An accumulation window is `grad_accum_steps` micro-batches (fewer at an epoch's end) with n counted labels together:

    loss     = (1 / n) sum over the window's labels of their losses
    g        = (1 / n) sum over the window's micro-batches of the gradient of their summed loss
    g'       = g min(1, max_grad_norm / |g|)                            (0 = no clipping)
    update   = optimizer(g', learning_rate(updates done before))

so every label weighs the same, however ragged the micro-batches; the factor 1/n and the clip factor reach the gradient
inside the optimizer's pass.  `train_step_with_metrics` is the table of contents of a step; `fit` is the loop.

NaN guard: a micro-batch with a non-finite loss, or a window with a non-finite gradient norm, drops the window.
Weights, moments, `global_step` and thus the schedule stay as they were; the next micro-batch opens a new window.

With fp16 all gradients of a window carry a factor (`precision.py`), whose inverse joins the others in the optimizer's
pass.  A gradient that is not finite then means that the factor is too large: the window is dropped, the loss scale
falls, and only at its lower limit does that count as a bad step.
"""

import contextlib
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numba
import numpy as np
import numpy.typing as npt

from ..config import EarlyStoppingConfig, LlmTrainingConfig, Precision
from ..errors import AbiError, CheckpointError, ConfigError, DataError, NonFiniteError
from ..formats.zig import save_ablc
from ..kernels.engine.number_formats import BFLOAT16
from ..locks import DirectoryLock
from .checkpoint import TrainingState, check_unused, locate, prune, recover, save_checkpoint
from .evaluation import CountBytes, evaluate_batches, judge
from .events import (
    BadStepEvent,
    CheckpointEvent,
    EndEvent,
    EpochEvent,
    EvaluationEvent,
    EventHub,
    LossScaleEvent,
    Sink,
    StartEvent,
    StepEvent,
    StopEvent,
    WarningEvent,
)
from .feed import Data, Feed, check_same_data, describe, open_feed
from .guard import Origin, bad_rows, bad_tensors
from .metrics import configured_sinks, memory_in_use
from .optimizer import Optimizer
from .precision import LossScalerStats, gradient_factor, scaler_for
from .report import EvalResult, StepMetrics, TrainingReport, TrainingStats, perplexity
from .resume import restore, restore_best, restore_zig
from .schedule import learning_rate
from .stop import GracefulStop

__all__ = ["EpochResult", "LlamaTrainer", "set_threads", "train_llm", "train_llm_with_validation"]


@dataclass(frozen=True, kw_only=True)
class EpochResult:
    """Result of one epoch with validation: mean loss over its labels, and whether training was stopped early."""

    loss: float
    early_stopped: bool


class LlamaTrainer:
    """Trains `model` in place as `config` says.

    `state` is everything besides weights, gradients and moments that decides the next step; `loss_history` has one
    entry for each optimizer step.  Events go to the sinks that `log_dir` and the `enable_` fields ask for, and to those
    given here or with `add_sink`.  `count_bytes` may be set to that of the tokenizer: evaluations then have bits per
    byte.
    """

    def __init__(self, model: Any, config: LlmTrainingConfig, sinks: Sequence[Sink] = ()) -> None:
        """Prepare to train a TrainableModel; ConfigError if a sink's package or so many threads are missing."""
        self.model, self.config = model, config
        self.optimizer = Optimizer(model.parameters, config)
        self.state = TrainingState()
        self.scaler = scaler_for(config)
        self.loss_history: list[float] = []
        self.events = EventHub()
        for sink in (*configured_sinks(config), *sinks):
            self.events.add(sink)
        set_threads(config.num_threads)
        self.count_bytes: CountBytes | None = None
        self._validation: Data | None = None
        self._feed: Feed | None = None  # of the epoch that runs
        self._early: EarlyStoppingConfig | None = None
        self._stop: GracefulStop | None = None
        self._best: tuple[np.ndarray, dict[str, np.ndarray], int] | None = None  # weights, moments, optimizer step
        self._began: int | None = None  # clock at the last look, None outside of the loop
        self._speed_mark = (0, 0)  # tokens and train_ns at the last logged step
        self._throughput = 0.0
        self._seq_len = config.max_seq_len
        self._saved: tuple[int, ...] = ()  # place in the run of the last save
        self._save_failed = False  # the last one that was tried
        self._lock: DirectoryLock | None = None  # on checkpoint_path, while `fit` or `train_epoch` runs
        self._last_checkpoint: Path | None = None
        self._resumed_from: Path | None = None
        self._check_data = False
        self._interrupted = False
        self._announced = False
        model.zero_gradients()

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

        A checkpoint is saved when `checkpoint_interval` says so, also in a loop of your own.

        input_ids and labels (B, T), any integer dtype; attention_mask (B, T) uint8; segment_ids (B, T) int32.  Flat ids
        are rows of the configuration's max_seq_len.  DataError for ids, labels or shapes that do not fit.
        NonFiniteError after `max_bad_steps` skipped updates in a row.
        """
        began, dropped_before = time.perf_counter_ns(), self._dropped()
        out = self._forward_backward(input_ids, labels, attention_mask, segment_ids)
        good = self._add_to_window(out, input_ids)
        self.state.train_ns += time.perf_counter_ns() - began
        updated = good and self.state.micro_step >= self.config.grad_accum_steps and self._finish_window()
        if updated and self._began is None:  # in a loop of the caller's own; ours evaluates first
            self._save_on_time()
        return self._metrics(out, updated, skipped=self._dropped() > dropped_before)

    def _forward_backward(
        self, input_ids: Any, labels: Any, attention_mask: Any = None, segment_ids: Any = None
    ) -> Any:
        """Return the losses of a micro-batch; the gradients of their sum are added to the window's."""
        input_ids = self._in_rows(input_ids, "input_ids")
        labels = self._in_rows(labels, "labels")
        self._seq_len = input_ids.shape[-1]
        if self.state.micro_step == 0:  # an open window keeps its factor, also when it was resumed with another format
            self.state.window_scale = gradient_factor(self.scaler, self.config)
        return self.model.compute_loss(
            input_ids,
            labels,
            attention_mask=attention_mask,
            segment_ids=segment_ids,
            label_smoothing=self.config.label_smoothing,
            backward=True,
            reduction="sum",
            precision=self.config.mixed_precision,
            loss_scale=self.state.window_scale,
        )

    def _in_rows(self, ids: npt.ArrayLike, name: str) -> np.ndarray:
        """Return ids in two dimensions: the model would take a flat batch of short rows for one long sequence."""
        array, length = np.asarray(ids), self.config.max_seq_len
        if array.ndim != 1 or array.size <= length:
            return np.atleast_2d(array)
        if array.size % length:
            raise DataError(
                f"{name} is flat with {array.size} ids, neither at most nor a multiple of max_seq_len ({length}) of "
                "the training; reshape it to (batch, time)"
            )
        return array.reshape(-1, length)

    def _add_to_window(self, out: Any, input_ids: Any) -> bool:
        """Count a micro-batch; return False if its loss is not finite and the window was dropped."""
        state, loss = self.state, float(out.loss_sum)
        state.tokens_processed += int(out.num_tokens)
        if self.config.nan_guard and not math.isfinite(loss):
            self._skip(f"the loss is {loss} in {bad_rows(out.token_losses, input_ids, self.model, self._origin())}")
            return False
        state.micro_step += 1
        state.window_loss += loss
        state.window_correct += int(out.num_correct)
        state.window_tokens += int(out.num_tokens)
        state.epoch_loss += loss
        state.epoch_tokens += int(out.num_tokens)
        return True

    def _finish_window(self) -> bool:
        """Update the weights and log; return False if no label counted or the NaN guard dropped the window."""
        began = time.perf_counter_ns()
        updated = self._update()
        self.state.train_ns += time.perf_counter_ns() - began
        if updated:
            self._log()
        return updated

    def _update(self) -> bool:
        state, config, tokens = self.state, self.config, self.state.window_tokens
        if tokens == 0:  # no label counted, so there is no gradient
            self._clear_window()
            return False
        divisor = tokens * state.window_scale
        norm = float(self.model.compute_gradient_norm()) / divisor
        if config.nan_guard and not math.isfinite(norm):
            self._drop_overflow(f"the gradient is not finite in {bad_tensors(self.model)}")
            return False
        clip = config.max_grad_norm / norm if 0 < config.max_grad_norm < norm else 1.0
        rate = learning_rate(config, state.global_step)
        self.optimizer.update(clip / divisor, rate)
        state.global_step, state.optimizer_step = state.global_step + 1, self.optimizer.step
        state.loss, state.accuracy = state.window_loss / tokens, state.window_correct / tokens
        state.learning_rate, state.grad_norm = rate, norm
        state.bad_steps_in_row = 0
        self.loss_history.append(state.loss)
        self._clear_window()
        self._follow_gradients(valid=True)
        return True

    def _clear_window(self) -> None:
        self.model.zero_gradients()
        state = self.state
        state.micro_step, state.window_loss, state.window_correct, state.window_tokens = 0, 0.0, 0, 0

    def _drop_overflow(self, reason: str) -> None:
        """Drop a window whose gradient is not finite: with fp16 the loss scale falls, where it still can."""
        before = self.scaler.get_scale()
        self._follow_gradients(valid=False, reason=reason)
        if self.scaler.get_scale() < before:
            self._clear_window()
        else:
            self._skip(reason)

    def _follow_gradients(self, *, valid: bool, reason: str = "") -> None:
        """Let the loss scale follow the gradients of a window, and say so when it changed."""
        state, before = self.state, self.scaler.get_scale()
        if not self.scaler.config.enabled:
            return
        self.scaler.update(valid)
        stats = self.scaler.get_stats()
        state.loss_scale, state.overflow_count = stats.current_scale, stats.overflow_count
        state.steps_since_overflow = stats.steps_since_overflow
        if stats.current_scale == before:
            return
        self.events.emit(
            LossScaleEvent(
                step=state.global_step,
                time=self._time(),
                loss_scale=stats.current_scale,
                previous=before,
                overflow=not valid,
                message=self._placed(reason) if reason else f"{self.config.loss_scale_growth_interval} good updates",
            )
        )

    def _dropped(self) -> int:
        """Return how many windows were dropped."""
        return self.state.bad_steps + self.state.overflow_count

    def _origin(self) -> Origin | None:
        """Return what says where in the data a row of the micro-batch is from; None for a caller's own batches."""
        if self._feed is None:
            return None
        return partial(self._feed.origin, self.state.batch_position)

    def _placed(self, reason: str) -> str:
        return f"{reason} (epoch {self.state.epoch + 1}, batch {self.state.batch_position})"

    def _skip(self, reason: str) -> None:
        """Drop the window, say why, and give up after too many in a row."""
        state = self.state
        self._clear_window()
        state.bad_steps += 1
        state.bad_steps_in_row += 1
        message = self._placed(reason)
        row = state.bad_steps_in_row
        self.events.emit(BadStepEvent(step=state.global_step, time=self._time(), message=message, in_row=row))
        if state.bad_steps_in_row >= self.config.max_bad_steps:
            last = self._last_checkpoint or self._resumed_from
            remedy = f"the last good checkpoint is {last}; resume" if last else "no checkpoint was saved; begin again"
            other = ", or with mixed_precision bf16, which has more range" if self.scaler.config.enabled else ""
            raise NonFiniteError(
                f"{state.bad_steps_in_row} updates in a row were skipped, the limit is max_bad_steps "
                f"({self.config.max_bad_steps}); lastly, {message}; {remedy} with a lower learning_rate{other}"
            )

    def _metrics(self, out: Any, updated: bool, skipped: bool) -> StepMetrics:
        tokens = int(out.num_tokens)
        return StepMetrics(
            loss=float(out.loss_sum) / tokens if tokens else 0.0,
            accuracy=int(out.num_correct) / tokens if tokens else 0.0,
            grad_norm=self.state.grad_norm,
            learning_rate=self.state.learning_rate,
            updated=updated,
            skipped=skipped,
            loss_scale=self.scaler.get_scale(),
        )

    def _log(self) -> None:
        state, interval = self.state, self.config.log_interval
        tokens, nanoseconds = state.tokens_processed - self._speed_mark[0], state.train_ns - self._speed_mark[1]
        speed = 1e9 * tokens / nanoseconds if nanoseconds > 0 else 0.0
        logged = interval > 0 and (state.global_step % interval == 0 or state.global_step == 1)
        self._throughput = speed
        if logged:
            self._speed_mark = (state.tokens_processed, state.train_ns)
        if not self.events.sinks:
            return
        event = StepEvent(
            step=state.global_step,
            time=self._time(),
            epoch=state.epoch + 1,
            loss=state.loss,
            accuracy=state.accuracy,
            perplexity=perplexity(state.loss),
            learning_rate=state.learning_rate,
            grad_norm=state.grad_norm,
            tokens=state.tokens_processed,
            tokens_per_second=speed,
            gflops=speed * float(self.model.flops_per_token(self._seq_len)) / 1e9,
            memory=memory_in_use(),
            loss_scale=self.scaler.get_scale() if self.scaler.config.enabled else None,
            logged=logged,
        )
        self.events.emit(event)

    # -- the loop --------------------------------------------------------------------------------

    def fit(
        self,
        data: Data,
        validation: Data | None = None,
        early_stopping: EarlyStoppingConfig | None = None,
        stop: GracefulStop | None = None,
    ) -> TrainingReport:
        """Train to the end of the last epoch (or max_steps, or early stopping) from wherever the state is.

        With `checkpoint_path`, checkpoints are saved at intervals, at each better evaluation, at the end, and when
        `stop` was requested; then the report says interrupted.  ConfigError if `checkpoint_path` holds checkpoints of
        another run, or, with process and host, if another trainer is writing there.
        """
        if validation is not None:
            self.set_validation_data(validation)
        self._stop = stop
        try:
            feed = self._begin(data, early_stopping)
            while self.state.epoch < self.config.epochs and not self._finished() and not self._interrupted:
                self._run_epoch(feed)
            self._wind_up()
            report = self.get_report()
            self.events.emit(EndEvent(step=self.state.global_step, time=self._time(), report=report))
        finally:
            self._end()
            self._stop, self._announced = None, False
            self.events.close()
        return report

    def train_epoch(self, data: Data) -> float:
        """Train for one epoch (the rest of it, after a resume) and return the mean loss over its labels."""
        return self._one_epoch(data, None).loss

    def train_epoch_with_validation(
        self, data: Data, early_stopping: EarlyStoppingConfig | None = None
    ) -> EpochResult:
        """Train for one epoch, evaluating the data of `set_validation_data` every eval_interval optimizer steps.

        An epoch in which no step was a multiple of eval_interval is evaluated at its end.
        """
        return self._one_epoch(data, early_stopping or EarlyStoppingConfig())

    def _one_epoch(self, data: Data, early_stopping: EarlyStoppingConfig | None) -> EpochResult:
        before = self.state.global_step
        try:
            loss = self._run_epoch(self._begin(data, early_stopping))
            unseen = self.state.evaluated_step <= before < self.state.global_step
            if early_stopping is not None and self.config.eval_interval and unseen and not self._interrupted:
                self._evaluate_for_training()
        finally:
            self._end()
        return EpochResult(loss=loss, early_stopped=self.state.early_stopped)

    def _begin(self, data: Data, early_stopping: EarlyStoppingConfig | None) -> Feed:
        config, state, self._interrupted = self.config, self.state, False
        self._early = early_stopping if early_stopping is not None and early_stopping.enabled else None
        if self._early is not None and (self._validation is None or config.eval_interval == 0):
            lack = "validation data; call set_validation_data" if self._validation is None else "eval_interval above 0"
            raise ConfigError(f"early stopping needs {lack}, or enabled=False in EarlyStoppingConfig")
        if state.early_stopped and (self._early is None or state.patience_counter < self._early.patience):
            state.early_stopped = False  # asked to go on: without early stopping, or with more patience
        set_threads(config.num_threads)
        feed = open_feed(data, config, self.model.config, training=True)
        facts = describe(feed)
        self._check_facts(facts)
        if config.checkpoint_path is not None:
            self._lock = DirectoryLock(config.checkpoint_path, "checkpoint_path")
            recover(Path(config.checkpoint_path))
            self._check_own(config.checkpoint_path)
        state.data, self._check_data = facts, False
        self._began = time.perf_counter_ns()
        self._speed_mark = (state.tokens_processed, state.train_ns)
        if not self._announced:
            self._announce(feed)
        return feed

    def _end(self) -> None:
        """Stop the clock and give checkpoint_path back."""
        self._tick()
        self._feed = None
        self._began, lock, self._lock = None, self._lock, None
        if lock is not None:
            lock.release()

    def check_data(self, data: Data) -> None:
        """Raise what `fit` would raise at once (DataError, ConfigError) if a resumed run cannot go on with `data`."""
        self._check_facts(describe(open_feed(data, self.config, self.model.config, training=True)))

    def _check_facts(self, facts: dict[str, Any]) -> None:
        state = self.state
        if self._check_data and state.data:
            check_same_data(state.data, facts, inside_epoch=bool(state.batch_position or state.micro_step))

    def _announce(self, feed: Feed) -> None:
        config, state = self.config, self.state
        self._announced, checkpoint = True, self._resumed_checkpoint()  # before the clock goes on
        event = StartEvent(
            step=state.global_step,
            time=self._time(),
            epoch=state.epoch + 1,
            epochs=config.epochs,
            total_steps=self._total_steps(feed),
            num_params=self.model.num_params(),
            tokens_per_step=config.batch_size * feed.seq_len * config.grad_accum_steps,
            flops_per_token=float(self.model.flops_per_token(feed.seq_len)),
            resumed_from=str(self._resumed_from) if self._resumed_from else None,
            checkpoint=checkpoint,
            losses=tuple(self.loss_history),
        )
        self.events.emit(event)

    def _total_steps(self, feed: Feed) -> int:
        state, accumulate = self.state, self.config.grad_accum_steps
        epochs = self.config.epochs - state.epoch
        here = math.ceil((feed.num_batches - state.batch_position + state.micro_step) / accumulate)
        total = state.global_step
        total += max(0, here + (epochs - 1) * math.ceil(feed.num_batches / accumulate)) if epochs > 0 else 0
        return min(total, self.config.max_steps) if self.config.max_steps else total

    def _finished(self) -> bool:
        """Return whether training ends here, whatever epochs remain."""
        state, limit = self.state, self.config.max_steps
        return state.early_stopped or (bool(limit) and limit is not None and state.global_step >= limit)

    def _run_epoch(self, feed: Feed) -> float:
        """Train from the state's place to the end of the epoch, if nothing ends it before; return its mean loss."""
        state = self.state
        feed.set_epoch(state.epoch)
        feed.seek(min(state.batch_position, feed.num_batches))
        if self._must_stop(updated=False):  # an interrupted evaluation may have been the last
            return self._epoch_loss()
        self._feed = feed
        for batch in feed:
            metrics = self.train_step_with_metrics(
                batch.input_ids, batch.labels, batch.attention_mask, batch.segment_ids
            )
            state.batch_position = feed.position
            if self._must_stop(metrics.updated):
                return self._epoch_loss()
        if state.micro_step and self._must_stop(self._finish_window()):  # the last, partial window
            return self._epoch_loss()
        loss, tokens = self._epoch_loss(), state.epoch_tokens
        state.epoch, state.batch_position, state.epoch_loss, state.epoch_tokens = state.epoch + 1, 0, 0.0, 0
        self.events.emit(
            EpochEvent(
                step=state.global_step,
                time=self._time(),
                epoch=state.epoch,
                train_loss=loss,
                train_perplexity=perplexity(loss),
                train_tokens=tokens,
            )
        )
        return loss

    def _epoch_loss(self) -> float:
        return self.state.epoch_loss / self.state.epoch_tokens if self.state.epoch_tokens else math.nan

    def _must_stop(self, updated: bool) -> bool:
        """After a micro-batch: evaluate and save if it is time; return whether the epoch must be left."""
        config, state = self.config, self.state
        if updated and config.eval_interval and state.global_step % config.eval_interval == 0:
            state.evaluation_due = self._validation is not None
        if state.evaluation_due:
            self._evaluate_for_training()
        if updated and not state.early_stopped:
            self._save_on_time()
        if self._stop is not None and self._stop.requested:
            self._interrupted = True
        return self._interrupted or self._finished()

    def _wind_up(self) -> None:
        """The end of `fit`: save what was interrupted, or evaluate once more and save the final checkpoint."""
        config, state = self.config, self.state
        if self._interrupted:
            if config.checkpoint_path and self._saved != self._place():
                self._save()
            saved = f"saved {self._last_checkpoint}" if config.checkpoint_path else "nothing saved: no checkpoint_path"
            message = f"stopped at step {state.global_step} by request; {saved}"
            self.events.emit(StopEvent(step=state.global_step, time=self._time(), message=message))
            return
        fresh = state.evaluated_step == state.global_step
        if self._validation is not None and not state.early_stopped and not fresh:
            self._evaluate_for_training(final=True)
        unsaved = not self._saved or self._saved[0] != state.global_step or state.early_stopped or self._save_failed
        if config.checkpoint_path and unsaved:
            self._save()

    # -- evaluation ------------------------------------------------------------------------------

    def set_validation_data(self, data: Data) -> None:
        """Choose the data for evaluations during training."""
        self._validation = data

    def evaluate(self, data: Data) -> EvalResult:
        """Return loss, perplexity and accuracy over all tokens of `data`, tail included, without label smoothing."""
        feed = open_feed(data, self.config, self.model.config, training=False)
        result = evaluate_batches(
            self.model, feed, precision=self.config.mixed_precision, count_bytes=self.count_bytes
        )
        if result is None:
            raise AbiError("the evaluation was stopped")
        return result

    def _evaluate_for_training(self, final: bool = False) -> None:
        """Evaluate, keep the best, and stop early when the patience is used up; a requested stop puts it off."""
        state, early = self.state, self._early
        if self._validation is None:
            return
        feed = open_feed(self._validation, self.config, self.model.config, training=False)
        stop = self._stop
        result = evaluate_batches(
            self.model,
            feed,
            lambda: stop is not None and stop.requested,
            self.config.mixed_precision,
            self.count_bytes,
        )
        if result is None:
            return
        state.evaluation_due, state.evaluated_step = False, state.global_step
        improved = judge(state, result, early, count=not final)
        event = EvaluationEvent(
            step=state.global_step,
            time=self._time(),
            epoch=state.epoch + 1,
            val_loss=result.loss,
            val_perplexity=result.perplexity,
            val_accuracy=result.accuracy,
            val_tokens=result.total_tokens,
            improved=improved,
            val_bits_per_byte=result.bits_per_byte,
            patience_left=max(0, early.patience - state.patience_counter) if early is not None else None,
        )
        self.events.emit(event)
        if improved:
            self._keep_best()
        elif early is not None and not final and state.patience_counter >= early.patience:
            state.early_stopped = True
            message = f"{state.patience_counter} evaluations without improvement; {self._restore_best()}"
            message = f"stopped early at step {state.global_step}: {message}"
            self.events.emit(StopEvent(step=state.global_step, time=self._time(), message=message))

    def _keep_best(self) -> None:
        """Save the best state: as a checkpoint, or in memory when there is nowhere to save it."""
        state, before = self.state, self.state.best_step
        state.best_step = state.global_step
        if self.config.checkpoint_path and self._try_to_save():
            self._best = None
            return
        if self.config.checkpoint_path:
            state.best_step = before
        if self._early is not None:
            weights = self.model.parameters.weights_flat.copy()
            self._best = (weights, self.optimizer.copy_moments(), self.optimizer.step)

    def _restore_best(self) -> str:
        """Put weights and moments of the best evaluation back; return a sentence for the log."""
        state = self.state
        if self._best is not None:
            weights, moments, step = self._best
            self.model.parameters.weights_flat[:] = weights
            self.optimizer.load(moments, step)
        elif state.best_step >= 0 and self.config.checkpoint_path:
            path = Path(self.config.checkpoint_path) / f"llm_step_{state.best_step}"
            try:
                restore_best(self.model, self.optimizer, path)
            except (CheckpointError, OSError) as error:
                self._warn(f"the best checkpoint cannot be restored, the last weights stay: {error}")
                return "the last weights stay"
        else:
            return "no evaluation was finite, the last weights stay"
        state.optimizer_step = self.optimizer.step
        return f"weights and moments of step {state.best_step} are back"

    # -- checkpoints -----------------------------------------------------------------------------

    def save_checkpoint(self) -> Path:
        """Save everything under `checkpoint_path` and return the checkpoint's directory.

        ConfigError without checkpoint_path, or if it holds checkpoints of another run; CheckpointError, OSError or
        NonFiniteError if it cannot be saved, in which case the earlier checkpoints are untouched.
        """
        return self._save()

    def _save(self) -> Path:
        config, state = self.config, self.state
        if config.checkpoint_path is None:
            raise ConfigError("checkpoint_path (None) must be a directory for checkpoints to be saved; set it")
        self._tick()
        state.checkpoints_saved += 1
        state.draws, state.base_digest = self.model.draws, self.model.base_digest()
        state.bf16_method = BFLOAT16.method if config.mixed_precision is Precision.BF16 else ""
        arrays = dict(self.optimizer.moments)
        arrays["loss_history"] = np.array(self.loss_history, np.float64)
        if state.micro_step:
            arrays["gradients"] = self.model.parameters.gradients_flat
        moment, self._save_failed = self._time(), True
        held = self._lock is not None  # a loop of the user's own around train_step holds it for each save alone
        try:
            with contextlib.nullcontext() if held else DirectoryLock(config.checkpoint_path, "checkpoint_path"):
                if not held:
                    self._check_own(config.checkpoint_path)
                path = save_checkpoint(
                    config.checkpoint_path,
                    model=self.model,
                    state=state,
                    optimizer=arrays,
                    sections={**self.model.sections(), "training": config, "early_stopping": self._early},
                )
                self._prune(path)
        except BaseException:
            state.checkpoints_saved -= 1
            raise
        self._saved, self._last_checkpoint, self._save_failed = self._place(), path, False
        self.events.emit(self._checkpoint_event(path, moment))
        return path

    def _check_own(self, root: str) -> None:
        """Raise ConfigError if `root` holds checkpoints, and this run neither saved there nor was loaded from there."""
        own = self._last_checkpoint or self._resumed_from
        if own is None or own.parent.resolve() != Path(root).resolve():
            check_unused(root)

    def _prune(self, saved: Path) -> None:
        """Remove older checkpoints; that they cannot be removed does not make the new one worse."""
        try:
            prune(saved.parent, self.config.max_checkpoints, {saved.name, f"llm_step_{self.state.best_step}"})
        except OSError as error:
            self._warn(f"older checkpoints cannot be removed: {error}")

    def _checkpoint_event(self, path: Path, moment: float) -> CheckpointEvent:
        """Return the event of the checkpoint that holds the state, saved at `moment` of the run."""
        size = sum(file.stat().st_size for file in path.iterdir())
        step, best = self.state.global_step, self.state.best_step == self.state.global_step
        return CheckpointEvent(step=step, time=moment, path=str(path), size=size, best=best)

    def _resumed_checkpoint(self) -> CheckpointEvent | None:
        """Return the event of the checkpoint that was loaded, as long as the state is where it was; None without one.

        A killed run may not have come to tell about its last checkpoint.
        """
        path = self._resumed_from
        if path is None or not path.is_dir() or self._last_checkpoint is not None or self._saved != self._place():
            return None
        return self._checkpoint_event(path, self._elapsed() / 1e9)

    def _place(self) -> tuple[int, ...]:
        state = self.state
        place = (state.global_step, state.epoch, state.batch_position, state.micro_step)
        return (*place, int(state.evaluation_due), state.best_step)

    def _save_on_time(self) -> None:
        interval = self.config.checkpoint_interval
        if self.config.checkpoint_path and interval and self.state.global_step % interval == 0:
            self._try_to_save()

    def _try_to_save(self) -> bool:
        """Save during training, where a full disk must not end the run: warn, and try again at the next interval."""
        if self._saved == self._place():
            return True
        try:
            self._save()
        except (OSError, CheckpointError) as error:
            self._warn(f"no checkpoint at step {self.state.global_step}: {error}; training goes on")
            return False
        return True

    def load_checkpoint(self, path: str | Path, *, new_data: bool = False) -> Path:
        """Restore weights, moments and state; return the checkpoint used.

        `path` is a checkpoint, a directory of checkpoints or a run directory (the newest whole checkpoint is taken,
        damaged ones are reported), or an ABIC/ABLC file of the Zig trainer.  The next `fit` or `train_epoch` continues
        the run as if it had never stopped; its data must be the same, unless `new_data` asks to begin at their first
        batch.
        CheckpointError if the files are damaged or belong to another model.
        """
        found = locate(path)
        for problem in found.skipped:
            self._warn(f"passed over: {problem}")
        if found.path.is_file():
            self.state, self.loss_history = restore_zig(self.model, self.optimizer, found.path), []
        else:
            self.state, self.loss_history = restore(self.model, self.optimizer, found.path)
        self.model.draws = self.state.draws
        stored = self.state.bf16_method
        if stored and self.config.mixed_precision is Precision.BF16 and stored != BFLOAT16.method:
            self._warn(
                f"{found.path} multiplied bfloat16 by the method {stored}, here it is {BFLOAT16.method}: the last bits "
                f"will differ; ABI_BF16={stored} keeps them where the processor has it"
            )
        self.scaler = scaler_for(self.config)
        if self.state.loss_scale:  # 0 in the checkpoint of a run that never scaled
            self.scaler.load(
                LossScalerStats(
                    current_scale=self.state.loss_scale,
                    overflow_count=self.state.overflow_count,
                    steps_since_overflow=self.state.steps_since_overflow,
                )
            )
        if new_data:
            self._clear_window()
            self.state.epoch = self.state.batch_position = self.state.epoch_tokens = 0
            self.state.epoch_loss, self.state.data = 0.0, {}
        self._best, self._check_data, self._announced = None, True, False
        self._resumed_from, self._saved = found.path, self._place() if not found.path.is_file() else ()
        return found.path

    def save_zig_checkpoint(self, path: str | Path) -> None:
        """Write weights and moments as an ABLC file of the Zig trainer; moments that the optimizer lacks are zeros."""
        weights = self.model.parameters.weights_flat
        moments = [self.optimizer.moments.get(name, np.zeros(weights.size, np.float32)) for name in ("m", "v")]
        state = self.state
        save_ablc(
            path, weights, *moments, step=state.global_step, epoch=state.epoch, tokens_processed=state.tokens_processed
        )

    # -- what it tells ---------------------------------------------------------------------------

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
        self._tick()
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
            throughput=self._throughput,
            time_ns=self._elapsed(),
        )

    def get_report(self) -> TrainingReport:
        """Return the report of the run up to now."""
        self._tick()
        state, elapsed, root = self.state, self._elapsed(), self.config.checkpoint_path
        last = self._last_checkpoint or self._resumed_from
        best = str(Path(root) / f"llm_step_{state.best_step}") if root and state.best_step >= 0 else None
        return TrainingReport(
            final_loss=state.loss,
            final_accuracy=state.accuracy,
            best_val_loss=state.best_val_loss,
            best_val_accuracy=state.best_val_accuracy,
            best_val_bits_per_byte=state.best_val_bits_per_byte,
            final_perplexity=perplexity(state.loss) if state.global_step else 0.0,
            total_steps=state.global_step,
            total_tokens=state.tokens_processed,
            total_time_ns=elapsed,
            avg_throughput=1e9 * state.tokens_processed / elapsed if elapsed else 0.0,
            checkpoints_saved=state.checkpoints_saved,
            early_stopped=state.early_stopped,
            epochs=state.epoch,
            skipped_updates=state.bad_steps,
            overflows=state.overflow_count,
            interrupted=self._interrupted,
            checkpoint=str(last) if last else None,
            best_checkpoint=best,
            warnings=tuple(self.events.warnings),
        )

    def _warn(self, message: str) -> None:
        self.events.emit(WarningEvent(step=self.state.global_step, time=self._time(), message=message))

    def _tick(self) -> None:
        """Add the time since the last look to the run's; outside of the loop the clock does not run."""
        if self._began is not None:
            now = time.perf_counter_ns()
            self.state.elapsed_ns += now - self._began
            self._began = now

    def _elapsed(self) -> int:
        # A loop of the user's own around train_step never starts the clock: then the steps' own time counts.
        return max(self.state.elapsed_ns, self.state.train_ns)

    def _time(self) -> float:
        self._tick()
        return self._elapsed() / 1e9


def set_threads(count: int | None) -> None:
    """Use `count` threads, all for 0; None leaves the choice as it is: all, unless the caller has changed it.

    ConfigError if there are not so many.
    """
    if count is None:
        return
    available = numba.config.NUMBA_NUM_THREADS  # type: ignore[attr-defined]
    if count > available:
        raise ConfigError(f"num_threads ({count}) must be at most {available} here; lower it, or use 0 for all")
    numba.set_num_threads(count or available)


def train_llm(model: Any, config: LlmTrainingConfig, data: Data) -> TrainingReport:
    """Train `model` on `data` as `config` says and return the report."""
    return LlamaTrainer(model, config).fit(data)


def train_llm_with_validation(
    model: Any,
    config: LlmTrainingConfig,
    data: Data,
    validation: Data | None,
    early_stopping: EarlyStoppingConfig | None = None,
) -> TrainingReport:
    """Train with evaluations on `validation` every eval_interval steps, and early stopping unless it is disabled."""
    return LlamaTrainer(model, config).fit(data, validation, early_stopping or EarlyStoppingConfig())
