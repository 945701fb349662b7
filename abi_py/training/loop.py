"""The loop: epochs of steps over the batches of a data set, and what is due between two of them.

    fit        epochs until the last one, max_steps, early stopping, or a request to stop
      begin        the data opened and held against those of the checkpoint, checkpoint_path held, StartEvent
      run_epoch    from the state's position to the end of the epoch
        between_batches    after a micro-batch: evaluate and save if it is time, note a request to stop
      wind_up      what is left to save and to evaluate
      end          checkpoint_path given back
"""

import math
from typing import Any

from ..config import EarlyStoppingConfig
from ..data.feed import Feed
from ..errors import ConfigError, counted
from .best import BestState
from .callbacks import Callbacks
from .evaluation import evaluate_batches, judge
from .events import EndEvent, EpochEvent, EvaluationEvent, Sink, StartEvent, StopEvent
from .feed import Data, check_same_data, describe, open_feed
from .report import TrainingReport, perplexity
from .saving import Saver
from .session import Session, set_threads
from .step import Step
from .stop import GracefulStop, Stopped

__all__ = ["Loop"]


class Loop:
    """Trains a session on data, from wherever its state is."""

    def __init__(self, session: Session, step: Step, saver: Saver) -> None:
        """Prepare for the first epoch."""
        self.session, self.step, self.saver = session, step, saver
        self.best = BestState(session, saver)
        self.callbacks = Callbacks(session)
        self.validation: Data | None = None
        self.stop: GracefulStop | None = None
        self.interrupted = False
        self.announced: list[Sink] = []  # those whom a StartEvent has told of this run
        self.check_data = False  # whether the data must be those of the checkpoint that was loaded

    # -- the whole run ---------------------------------------------------------------------------

    def fit(
        self, data: Data, early_stopping: EarlyStoppingConfig | None, stop: GracefulStop | None
    ) -> TrainingReport:
        """Train to the end; see `LlamaTrainer.fit`."""
        session, self.stop = self.session, stop
        try:
            feed = self.begin(data, early_stopping, session.config.epochs)
            while session.state.epoch < session.config.epochs and not self._is_over():
                self.run_epoch(feed)
            self.wind_up()
            if not self.interrupted:
                self.step.chance.at_end()
            report = self.report()
            session.events.emit(EndEvent(**session.now(), report=report))
            self.callbacks.act()
        finally:
            self.end()
            self.stop, self.announced = None, []
            session.events.close()
        return report

    def fit_epoch(self, data: Data, early_stopping: EarlyStoppingConfig | None) -> float:
        """Train for one epoch and return its mean loss; with early stopping, evaluate it at least once."""
        state, before = self.session.state, self.session.state.global_step
        try:
            epochs = max(self.session.config.epochs, state.epoch + 1)
            loss = self.run_epoch(self.begin(data, early_stopping, epochs))
            unseen = state.evaluated_step <= before < state.global_step
            if early_stopping is not None and self.session.config.eval_interval and unseen and not self.interrupted:
                self._evaluate()
        finally:
            self.end()
        return loss

    def begin(self, data: Data, early_stopping: EarlyStoppingConfig | None, epochs: int) -> Feed:
        """Check everything that can be wrong with data and settings, and start the clock of a run of these epochs."""
        session, state, config = self.session, self.session.state, self.session.config
        self.interrupted = False
        session.early_stopping = early = early_stopping if early_stopping and early_stopping.enabled else None
        if early is not None and (self.validation is None or config.eval_interval == 0):
            lack = "validation data; call set_validation_data" if self.validation is None else "eval_interval above 0"
            raise ConfigError(f"early stopping needs {lack}, or enabled=False in EarlyStoppingConfig")
        if state.early_stopped and (early is None or state.patience_counter < early.patience):
            state.early_stopped = False  # asked to go on: without early stopping, or with more patience
        set_threads(config.num_threads)
        feed = open_feed(data, config, session.model.config, training=True)
        facts = describe(feed)
        self.check_facts(facts)
        self._check_schedule()
        self.callbacks.begin(resumed=self.check_data)
        self.saver.hold()
        state.data, self.check_data = facts, False
        self._announce(feed, epochs)
        self.callbacks.act()
        session.clock.start()
        return feed

    def check_facts(self, facts: dict[str, Any]) -> None:
        """Raise DataError or ConfigError if a resumed run cannot go on with the data that `describe` describes."""
        state = self.session.state
        if self.check_data and state.data:
            check_same_data(state.data, facts, inside_epoch=bool(state.batch_position or state.micro_step))

    def _check_schedule(self) -> None:
        """Raise ConfigError if a resumed run had a schedule of the user's own, and has none now."""
        state, schedule = self.session.state, self.session.schedule
        if self.check_data and state.own_schedule and schedule is None:
            raise ConfigError(
                f"the checkpoint was trained with a schedule of its own ({state.own_schedule}), that no file can keep; "
                "go on in Python with LlamaTrainer(model, config, schedule=...); that of the configuration is "
                "schedule=lambda step: abi_py.calculate_learning_rate(config, step)"
            )
        name = getattr(schedule, "__qualname__", type(schedule).__name__)
        state.own_schedule = name if schedule is not None else ""

    def resume(self) -> None:
        """A checkpoint was loaded: the data must be its own, and what was remembered of another run is forgotten."""
        self.best.forget()
        self.check_data, self.announced = True, []

    def end(self) -> None:
        """Stop the clock and give checkpoint_path back."""
        self.session.clock.stop()
        self.step.feed = self.step.stop = None
        self.callbacks.end()
        self.saver.release()

    def wind_up(self) -> None:
        """The end of `fit`: save what was interrupted, or evaluate once more and save the final checkpoint."""
        session, state, has_path = self.session, self.session.state, bool(self.session.config.checkpoint_path)
        if self.interrupted:
            if has_path and not self.saver.is_current:
                self.saver.save()
            saved = f"saved {self.saver.last}" if has_path else "nothing saved: no checkpoint_path"
            message = f"stopped at step {state.global_step} by request; {saved}"
            session.events.emit(StopEvent(**session.now(), message=message))
            return
        if not state.early_stopped and state.evaluated_step != state.global_step:
            self._evaluate(final=True)
        self.saver.save_final()
        if self.callbacks.control.stop_reason is not None:
            message = f"stopped at step {state.global_step} by a callback: {self.callbacks.control.stop_reason}"
            session.events.emit(StopEvent(**session.now(), message=message))

    # -- one epoch -------------------------------------------------------------------------------

    def run_epoch(self, feed: Feed) -> float:
        """Train from the state's position to the end of the epoch, if nothing ends it before; return its mean loss."""
        session, state = self.session, self.session.state
        feed.set_epoch(state.epoch)
        feed.seek(min(state.batch_position, feed.num_batches))
        self.between_batches(updated=False)  # an evaluation that was interrupted is still due
        if self._is_over():
            return state.mean_epoch_loss
        self.step.feed, self.step.stop = feed, self.stop
        for batch in feed:
            try:
                with self.step.interrupts.held():  # what was trained on is not trained on again
                    metrics = self.step.train(batch.input_ids, batch.labels, batch.attention_mask, batch.segment_ids)
                    state.batch_position = feed.position
            except Stopped:  # the batch was given up: it is the first after a resume
                self.interrupted = True
                return state.mean_epoch_loss
            self.between_batches(metrics.updated)
            if self._is_over():
                return state.mean_epoch_loss
        if state.micro_step:  # the last, partial window
            self.between_batches(self.step.finish_window())
            if self._is_over():
                return state.mean_epoch_loss
        loss, tokens = state.mean_epoch_loss, state.epoch_tokens
        state.open_epoch(state.epoch + 1)
        figures = {"train_loss": loss, "train_perplexity": perplexity(loss)}
        session.events.emit(EpochEvent(**session.now(), epoch=state.epoch, **figures, train_tokens=tokens))
        self.do_what_is_due(updated=False)
        return loss

    def between_batches(self, updated: bool) -> None:
        """After a micro-batch: evaluate and save if it is time, and note a request to stop."""
        state, interval = self.session.state, self.session.config.eval_interval
        if updated and interval and state.global_step % interval == 0:
            state.evaluation_due = self.validation is not None
        self.do_what_is_due(updated)
        if self.stop is not None and self.stop.requested:
            self.interrupted = True

    def do_what_is_due(self, updated: bool) -> None:
        """Let the callbacks act, then evaluate and save if it is time or one of them has asked for it."""
        state = self.session.state
        self.callbacks.act()
        if self.callbacks.take("evaluation"):
            if self.validation is None:
                raise ConfigError("a callback asked for an evaluation, but there is no validation data; give it to fit")
            state.evaluation_due = True
        if state.evaluation_due:
            self._evaluate()
        if updated and not state.early_stopped:
            self.saver.save_on_time()
        if self.callbacks.take("save"):
            self.saver.try_to_save()
        self.callbacks.act()

    def _is_over(self) -> bool:
        """Return whether training ends here, whatever batches and epochs remain."""
        state, most = self.session.state, self.session.config.max_steps or math.inf
        stopped = self.interrupted or state.early_stopped or self.callbacks.control.stop_reason is not None
        return stopped or state.global_step >= most

    # -- evaluation ------------------------------------------------------------------------------

    def _evaluate(self, final: bool = False) -> None:
        """Evaluate, keep the best, and stop early when the patience is used up; a requested stop puts it off."""
        session, state, early, stop = self.session, self.session.state, self.session.early_stopping, self.stop
        if self.validation is None:
            return
        result = evaluate_batches(
            session.model,
            open_feed(self.validation, session.config, session.model.config, training=False),
            stop,
            session.config.mixed_precision,
            session.count_bytes,
        )
        if result is None:
            return
        state.evaluation_due, state.evaluated_step = False, state.global_step
        improved = judge(state, result, early, count=not final)
        event = EvaluationEvent(
            **session.now(),
            epoch=state.epoch + 1,
            val_loss=result.loss,
            val_perplexity=result.perplexity,
            val_accuracy=result.accuracy,
            val_tokens=result.total_tokens,
            improved=improved,
            val_bits_per_byte=result.bits_per_byte,
            patience_left=max(0, early.patience - state.patience_counter) if early is not None else None,
        )
        session.events.emit(event)
        self.callbacks.act()  # before the best is saved: what they change belongs to it
        if improved:
            self.best.keep()
        elif early is not None and not final and state.patience_counter >= early.patience:
            state.early_stopped = True
            message = f"{counted(state.patience_counter, 'evaluation')} without improvement; {self.best.restore()}"
            message = f"stopped early at step {state.global_step}: {message}"
            session.events.emit(StopEvent(**session.now(), message=message))

    # -- what it tells ---------------------------------------------------------------------------

    def _announce(self, feed: Feed, epochs: int) -> None:
        """Tell that training begins or goes on; not once more in the next epoch, but for sinks that are new in it."""
        session, state, config = self.session, self.session.state, self.session.config
        told, self.announced, resumed_from = self.announced, list(session.events.sinks), self.saver.resumed_from
        event = StartEvent(
            **session.now(),
            epoch=state.epoch + 1,
            epochs=epochs,
            total_steps=self._total_steps(feed, epochs),
            num_params=session.model.num_params(),
            tokens_per_step=config.batch_size * feed.seq_len * config.grad_accum_steps,
            flops_per_token=float(session.model.flops_per_token(feed.seq_len)),
            resumed_from=str(resumed_from) if resumed_from else None,
            checkpoint=self.saver.resumed_event(),
            losses=tuple(session.loss_history),
            total_params=session.model.config.num_params(),
            label=session.label,
        )
        session.events.emit(event, but=told)

    def report(self) -> TrainingReport:
        """Return the report of the run up to now."""
        session, state = self.session, self.session.state
        elapsed, last, best = session.clock.elapsed(), self.saver.last, self.saver.best
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
            interrupted=self.interrupted,
            stop_reason=self.callbacks.control.stop_reason,
            checkpoint=str(last) if last else None,
            best_checkpoint=str(best) if best else None,
            initial_val_loss=state.initial_val_loss,
            warnings=tuple(session.events.warnings),
        )

    def _total_steps(self, feed: Feed, epochs: int) -> int:
        """Return how many optimizer steps the whole run has."""
        state, config = self.session.state, self.session.config
        accumulate, epochs = config.grad_accum_steps, epochs - state.epoch
        here = math.ceil((feed.num_batches - state.batch_position + state.micro_step) / accumulate)
        total = state.global_step
        total += max(0, here + (epochs - 1) * math.ceil(feed.num_batches / accumulate)) if epochs > 0 else 0
        return min(total, config.max_steps) if config.max_steps else total
