"""The NaN guard: what becomes of a window that is not finite, and where in data and weights that began.

A micro-batch with a non-finite loss, or a window with a non-finite gradient norm, drops the window.  Weights, moments,
`global_step` and thus the schedule stay as they were; the next micro-batch opens a new window.  With fp16, a gradient
that is not finite means that its factor is too large: the window is dropped, the loss scale falls, and only at its
lower limit is that a bad step.

Where it began: which rows of the data, which tensors, and which row of a tensor.

A row of the embedding that is not finite makes the loss of each row NaN that reads its id; where the embedding is also
the head (tied), or where it is a row of the head, the logits and so the losses of all rows.  Then the rows of the batch
say nothing: the message names the row of the tensor, and the rows that read its id, if there are any.
"""

from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import numpy.typing as npt

from ..errors import NonFiniteError, counted, listed
from ..model.transformer import Transformer
from .events import BadStepEvent, LossScaleEvent
from .session import Session

__all__ = ["Guard", "Origin", "bad_rows", "bad_tensors"]

MAX_NAMED = 8  # rows or tensors named in one message

Origin = Callable[[int, int], str]  # (row of the batch, position in it) -> where in the data that is from


class Guard:
    """Drops windows of a session that are not finite, and gives up after too many in a row.

    `checkpoint()` is the newest one, for the message that says how to go on.
    """

    def __init__(self, session: Session, checkpoint: Callable[[], Path | None]) -> None:
        """Guard the session from now on."""
        self.session, self.checkpoint = session, checkpoint

    @property
    def dropped(self) -> int:
        """How many windows were dropped."""
        return self.session.state.bad_steps + self.session.state.overflow_count

    def drop(self, reason: str) -> None:
        """Drop a window whose gradient is not finite: with fp16 the loss scale falls, where it still can."""
        before = self.session.scaler.get_scale()
        self.follow(valid=False, reason=reason)
        if self.session.scaler.get_scale() < before:
            self.session.drop_window()
        else:
            self.skip(reason)

    def follow(self, *, valid: bool, reason: str = "") -> None:
        """Let the loss scale follow the gradients of a window, and say so when it changed."""
        session, state, scaler = self.session, self.session.state, self.session.scaler
        if not scaler.config.enabled:
            return
        before = scaler.get_scale()
        scaler.update(valid)
        stats = scaler.get_stats()
        state.loss_scale, state.overflow_count = stats.current_scale, stats.overflow_count
        state.steps_since_overflow = stats.steps_since_overflow
        if stats.current_scale == before:
            return
        grown = counted(session.config.loss_scale_growth_interval, "good update")
        why = self._with_position(reason) if reason else grown
        change = {"loss_scale": stats.current_scale, "previous": before}
        session.events.emit(LossScaleEvent(**session.now(), **change, overflow=not valid, message=why))

    def skip(self, reason: str) -> None:
        """Drop the window, say why, and give up after too many in a row."""
        session, state, limit = self.session, self.session.state, self.session.config.max_bad_steps
        session.drop_window()
        state.bad_steps += 1
        state.bad_steps_in_row += 1
        message = self._with_position(reason)
        session.events.emit(BadStepEvent(**session.now(), message=message, in_row=state.bad_steps_in_row))
        if state.bad_steps_in_row >= limit:
            last = self.checkpoint()
            remedy = f"the last good checkpoint is {last}; resume" if last else "no checkpoint was saved; begin again"
            other = ", or with mixed_precision bf16, which has more range" if session.scaler.config.enabled else ""
            raise NonFiniteError(
                f"skipped {counted(state.bad_steps_in_row, 'update')} in a row, the limit is max_bad_steps "
                f"({limit}); lastly, {message}; {remedy} with a lower learning_rate{other}"
            )

    def _with_position(self, reason: str) -> str:
        return f"{reason} (epoch {self.session.state.epoch + 1}, batch {self.session.state.batch_position})"


def bad_rows(
    token_losses: np.ndarray, input_ids: npt.ArrayLike, model: Transformer, origin: Origin | None = None
) -> str:
    """Name the rows of a batch whose losses (B, T) are not all finite, by `origin` in the data too.

    input_ids (B, T), or as many ids; if weights of `model` are not finite, they are named, and of the rows those that
    read them.
    """
    losses = np.asarray(token_losses)
    losses = losses.reshape(losses.shape[0], -1)
    bad = ~np.isfinite(losses)
    rows = np.flatnonzero(bad.any(axis=1))
    weights = _bad_weights(model)
    began = f"; weights are not finite: {_named(weights)}" if weights else ""
    if not rows.size:  # the losses are finite, their sum is not
        return f"the sum over the batch{began}"
    if "token_embedding" in weights:
        reading = np.isin(np.asarray(input_ids).reshape(losses.shape[0], -1), weights["token_embedding"])
        if reading[rows].any():
            rows, bad = rows[reading[rows].any(axis=1)], reading
    text = f"row{'s' if rows.size > 1 else ''} {listed(list(map(str, rows)), MAX_NAMED)} of the batch"
    if origin is not None:
        text += f" ({', '.join(origin(int(row), int(np.argmax(bad[row]))) for row in rows[:MAX_NAMED])})"
    return text + began


def bad_tensors(model: Transformer) -> str:
    """Name the tensors of a model whose gradients are not all finite, and their rows where that is not all of them."""
    text = _named(_not_finite(model.gradients))
    weights = _bad_weights(model)
    return text + (f"; weights are not finite: {_named(weights)}" if weights else "")


def _bad_weights(model: Transformer) -> dict[str, np.ndarray]:
    """Return tensor -> its rows with weights that are not finite, of adapters and of the model below them."""
    return {**_not_finite(model.base), **_not_finite(model.weights)}


def _not_finite(tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Return name -> the rows (first axis) that are not finite; all of them as an empty array."""
    found = {}
    for name, tensor in tensors.items():
        good = np.isfinite(tensor.reshape(tensor.shape[0], -1)).all(axis=1)
        if not good.all():
            found[name] = np.flatnonzero(~good) if good.any() else np.empty(0, np.int64)
    return found


def _named(tensors: dict[str, np.ndarray]) -> str:
    names = []
    for name, rows in tensors.items():
        what = "id" if name == "token_embedding" else "row"
        plural = "s" if rows.size > 1 else ""
        names.append(f"{name} ({what}{plural} {listed(list(map(str, rows)), MAX_NAMED)})" if rows.size else name)
    return listed(names, MAX_NAMED)
