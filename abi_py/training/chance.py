"""Says when a training has learned nothing: the loss is above chance, for long.

    chance    ln V: what it costs to predict one of V ids without knowing anything
    limit     min(chance + MARGIN, first + max(RISE, first / 2))      first: the loss of the first step
    warned    once, if the means of the last SPAN steps and of the SPAN before are above the limit, unless the loss
              falls and is no more than RISE above the first: it began high, and is on its way
    at_end    told, warned or not, if the run ends above the limit

A fresh model begins near chance, so it must have fallen below, or risen; a trained one begins far below, and is far
above where it began only if it was spoiled.  A text that is harder than the one before raises the loss for a while,
but not by half.  Steps of the warm-up do not count.  With label smoothing, chance is the same; the z-loss is apart.
"""

import math

from .session import Session

__all__ = ["ChanceWatch"]

SPAN = 25  # steps
MARGIN = 0.1  # nats; fresh weights are not quite without an opinion
RISE = 1.0  # nats
FALLING = 0.02  # nats from one span to the next: it learns yet
FEW = 10  # steps: of a shorter run nothing is said


class ChanceWatch:
    """Looks at the losses of a session."""

    def __init__(self, session: Session) -> None:
        """Begin without a warning."""
        self.session = session
        self.warned = False

    def after_step(self) -> None:
        """Warn, once, if the loss has been above chance for long, or most updates were skipped."""
        if self.warned:
            return
        state, losses = self.session.state, self.session.loss_history
        skipped, steps = state.bad_steps, state.global_step
        if skipped >= SPAN and skipped > steps:
            self._warn(f"{skipped} of {skipped + steps} updates were skipped, because they were not finite")
        if len(losses) < max(1, self.session.config.warmup_steps) + 2 * SPAN:
            return
        recent, before = _mean(losses[-SPAN:]), _mean(losses[-2 * SPAN : -SPAN])
        on_its_way = recent < before - FALLING and recent <= losses[0] + RISE
        if not min(recent, before) <= self._limit() and not on_its_way:
            self._warn(f"for {2 * SPAN} steps the loss has been {self._compared(recent)}")

    def at_end(self) -> None:
        """Warn if a run ends above chance."""
        losses = self.session.loss_history
        last = _mean(losses[-min(SPAN, len(losses) // 2) :]) if len(losses) >= FEW else 0.0
        if not last <= self._limit():
            trained = losses[0] < self._chance() - RISE  # before
            what = "the model has lost what it knew" if trained else "the model has learned nothing"
            self._warn(f"{what}: its loss is {self._compared(last)}")

    def _limit(self) -> float:
        losses = self.session.loss_history
        first = losses[0] if losses else math.inf
        return min(self._chance() + MARGIN, first + max(RISE, first / 2))

    def _chance(self) -> float:
        return math.log(self.session.model.config.vocab_size)

    def _compared(self, loss: float) -> str:
        chance, first = self._chance(), self.session.loss_history[0]
        if loss > chance:
            return f"{loss:.1f}, above chance, {chance:.1f} (the logarithm of the vocabulary)"
        return f"{loss:.1f}, far above its first value, {first:.1f}"

    def _warn(self, message: str) -> None:
        self.warned = True
        session, rate = self.session, self.session.config.learning_rate
        remedy = f"begin again with a lower learning rate, {rate / 10:g} instead of {rate:g}"
        if session.schedule is not None or session.state.rate_set is not None:
            remedy = f"begin again with lower learning rates than {session.state.learning_rate:g} was, the last one"
        session.warn(f"{message}; {remedy} (abi-train run --find-lr looks for one)")


def _mean(values: list[float]) -> float:
    return math.fsum(values) / len(values)
