"""A step: the accumulation window, from the first micro-batch to the changed weights.

A window is `grad_accum_steps` micro-batches (fewer at an epoch's end) with n trained tokens together:

    loss     = (1 / n) sum over the window's trained tokens of their losses
    penalty  = (1 / n) sum over the window's micro-batches of (their trained tokens times the penalty)
    g        = (1 / n) sum over the window's micro-batches of the gradient of their summed loss and penalties
    g'       = g min(1, max_grad_norm / |g|)                            (0 = no clipping)
    update   = optimizer(g', the schedule's rate after the updates done before)

where penalties are what layers add to the loss (`LossOutput.penalties`), which itself stays the cross-entropy.
So every trained token weighs the same, however ragged the micro-batches; the factor 1/n and the clip factor reach the
gradient inside the optimizer's pass.

    train             one micro-batch; the last one of a window updates the weights
      _forward_backward   its losses; the gradients of their sum are added to the window's
      _add_to_window      counts
      finish_window       the update, and the event that tells of it
        _update             norm, clip factor, learning rate, optimizer; what gets no gradient (`reached.py`)

A micro-batch with a non-finite loss, or a window with a non-finite gradient norm, drops the window (`guard.py`).
With fp16 all gradients of a window carry a factor (`precision.py`), whose inverse joins the others in the optimizer's
pass.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import numpy as np
import numpy.typing as npt

from ..data.feed import Feed
from ..errors import DataError
from ..model import LossOutput
from .chance import ChanceWatch
from .events import StepEvent
from .guard import Guard, bad_rows, bad_tensors
from .interrupts import Interrupts
from .metrics import memory_in_use
from .precision import gradient_factor
from .reached import ReachWatch
from .report import StepMetrics, expert_figures, perplexity
from .session import Session
from .stop import GracefulStop

__all__ = ["Step"]


class Step:
    """Trains the model of a session on one micro-batch after the other.

    `feed` is where they come from, for messages, and `stop` what may give one up (by `Stopped`); both are None in a
    loop of the user's own.
    """

    def __init__(self, session: Session, guard: Guard) -> None:
        """Begin with an empty window."""
        self.session, self.guard = session, guard
        self.feed: Feed | None = None
        self.stop: GracefulStop | None = None
        self.chance, self.reach = ChanceWatch(session), ReachWatch(session)
        self.interrupts = Interrupts()
        self._seq_len = session.config.max_seq_len

    def train(
        self,
        input_ids: npt.ArrayLike,
        labels: npt.ArrayLike,
        attention_mask: npt.NDArray[np.uint8] | None = None,
        segment_ids: npt.NDArray[np.int32] | None = None,
    ) -> StepMetrics:
        """Train on a micro-batch; with the last one of the window, update the weights.

        KeyboardInterrupt may end the passes, which are undone then, and comes after all else.
        """
        state, dropped_before = self.session.state, self.guard.dropped
        with self.interrupts.held():
            with self.session.clock.training():
                out = self._forward_backward(input_ids, labels, attention_mask, segment_ids)
                good = self._add_to_window(out, input_ids)
            updated = good and state.micro_step >= self.session.config.grad_accum_steps and self.finish_window()
        tokens = int(out.num_tokens)
        return StepMetrics(
            loss=float(out.loss_sum) / tokens if tokens else 0.0,
            accuracy=int(out.num_correct) / tokens if tokens else 0.0,
            grad_norm=state.grad_norm,
            learning_rate=state.learning_rate,
            updated=updated,
            skipped=self.guard.dropped > dropped_before,
            loss_scale=self.session.scaler.get_scale(),
            penalties=out.penalties,
        )

    def _forward_backward(
        self,
        input_ids: npt.ArrayLike,
        labels: npt.ArrayLike,
        attention_mask: npt.NDArray[np.uint8] | None,
        segment_ids: npt.NDArray[np.int32] | None,
    ) -> LossOutput:
        """Return the losses of a micro-batch; the gradients of their sum are added to the window's."""
        session, state, config = self.session, self.session.state, self.session.config
        input_ids = _in_rows(input_ids, config.max_seq_len, "input_ids")
        labels = _in_rows(labels, config.max_seq_len, "labels")
        self._seq_len = input_ids.shape[-1]
        if state.micro_step == 0:  # an open window keeps its factor, also when it was resumed with another format
            state.window_scale = gradient_factor(session.scaler, config)
            state.window_opened_at = state.epoch_loss
        with self._whole_or_not_at_all(), self.interrupts.let_through():
            return session.model.compute_loss(
                input_ids,
                labels,
                attention_mask=attention_mask,
                segment_ids=segment_ids,
                label_smoothing=config.label_smoothing,
                z_loss=config.z_loss,
                backward=True,
                reduction="sum",
                precision=config.mixed_precision,
                loss_scale=state.window_scale,
                check=None if self.stop is None else self.stop.watch_pass(),
            )

    @contextmanager
    def _whole_or_not_at_all(self) -> Iterator[None]:
        """Undo a micro-batch that ends by an exception (a stop, Ctrl-C).

        If its backward pass had begun, the gradients are no longer those of the window's earlier micro-batches, so
        these are undone with it: the window is repeated.
        """
        session, model = self.session, self.session.model
        draws, passes = model.draws, model.parameters.passes
        try:
            yield
        except BaseException:
            drawn, model.draws = model.draws - draws, draws
            if model.parameters.passes != passes:
                model.draws -= drawn * session.state.micro_step
                session.state.repeat_window()
                model.zero_gradients()
            raise

    def _add_to_window(self, out: LossOutput, input_ids: npt.ArrayLike) -> bool:
        """Count a micro-batch; return False if its loss is not finite and the window was dropped."""
        session, state, loss = self.session, self.session.state, float(out.loss_sum)
        state.tokens_processed += int(out.num_tokens)
        if session.config.nan_guard and not math.isfinite(loss):
            origin = partial(self.feed.origin, state.batch_position) if self.feed is not None else None
            self.guard.skip(f"the loss is {loss} in {bad_rows(out.token_losses, input_ids, session.model, origin)}")
            return False
        state.micro_step += 1
        state.window_loss += loss
        state.window_correct += int(out.num_correct)
        state.window_tokens += int(out.num_tokens)
        for name, value in out.penalties.items():
            state.window_penalties[name] = state.window_penalties.get(name, 0.0) + int(out.num_tokens) * value
        if out.expert_loads is not None:
            state.window_loads = (out.expert_loads + (state.window_loads or 0)).tolist()
        state.epoch_loss += loss
        state.epoch_tokens += int(out.num_tokens)
        return True

    def finish_window(self) -> bool:
        """Update the weights and tell of it; return False if no token was trained or the window was dropped."""
        with self.interrupts.held():
            with self.session.clock.training():
                updated = self._update()
            if updated:
                self._tell()
                self.chance.after_step()
        return updated

    def _update(self) -> bool:
        session, state, config = self.session, self.session.state, self.session.config
        tokens = state.window_tokens
        if tokens == 0:  # no token was trained, so there is no gradient
            session.drop_window()
            return False
        divisor = tokens * state.window_scale
        norm = float(session.model.compute_gradient_norm()) / divisor
        if config.nan_guard and not math.isfinite(norm):
            self.guard.drop(f"the gradient is not finite in {bad_tensors(session.model)}")
            return False
        self.reach.before_update(norm, self._seq_len)
        clip = config.max_grad_norm / norm if 0 < config.max_grad_norm < norm else 1.0
        rate = session.next_rate()
        session.optimizer.update(clip / divisor, rate)
        self.reach.after_update(rate)
        state.global_step, state.optimizer_step = state.global_step + 1, session.optimizer.step
        state.loss, state.accuracy = state.window_loss / tokens, state.window_correct / tokens
        state.penalties = {name: value / tokens for name, value in state.window_penalties.items()}
        state.experts = expert_figures(state.window_loads)
        state.learning_rate, state.grad_norm = rate, norm
        state.bad_steps_in_row = 0
        session.loss_history.append(state.loss)
        session.drop_window()
        self.guard.follow(valid=True)
        return True

    def _tell(self) -> None:
        """Tell of an optimizer step."""
        session, state, interval = self.session, self.session.state, self.session.config.log_interval
        speed = session.clock.measure()
        logged = interval > 0 and (state.global_step % interval == 0 or state.global_step == 1)
        if logged:
            session.clock.mark()
        if not session.events.sinks:
            return
        event = StepEvent(
            **session.now(),
            epoch=state.epoch + 1,
            loss=state.loss,
            accuracy=state.accuracy,
            perplexity=perplexity(state.loss),
            learning_rate=state.learning_rate,
            grad_norm=state.grad_norm,
            tokens=state.tokens_processed,
            tokens_per_second=speed,
            gflops=speed * float(session.model.flops_per_token(self._seq_len)) / 1e9,
            memory=memory_in_use(),
            loss_scale=session.scaler.get_scale() if session.scaler.config.enabled else None,
            logged=logged,
            penalties=dict(state.penalties),
            experts=dict(state.experts),
        )
        session.events.emit(event)


def _in_rows(ids: npt.ArrayLike, length: int, name: str) -> np.ndarray:
    """Return ids in two dimensions: the model would take a flat batch of short rows for one long sequence."""
    array = np.asarray(ids)
    if array.ndim != 1 or array.size <= length:
        return np.atleast_2d(array)
    if array.size % length:
        raise DataError(
            f"{name} is flat with {array.size} ids, neither at most nor a multiple of max_seq_len ({length}) of "
            "the training; reshape it to (batch, time)"
        )
    return array.reshape(-1, length)
