"""The learning-rate range test: one short training in which the rate grows from far too small to far too large.

    rate_k    = smallest (largest / smallest)^(k / (steps - 1))              k = 0 ... steps - 1
    smooth_k  = sum_j 0.9^(k-j) loss_j / sum_j 0.9^(k-j)                      j = 0 ... k

It ends after `steps` updates, where the loss or its gradient is not finite, or where smooth_k is twice its lowest value
so far or above the first by a fifth: the training has diverged, and what comes then says nothing.

The suggestion is fastai's `steep` rule: the rate at which the smoothed loss falls fastest as the logarithm of the rate
grows, here over the SPAN steps around it, and before the smoothed loss is lowest.  Smith takes the largest rate before
the loss turns, for a schedule that only passes it; as the peak of a whole training with AdamW that is too large
(docs/6-training.md has the measurement).

Sources: Smith 2015, "Cyclical Learning Rates for Training Neural Networks" (arXiv:1506.01186), section 3.3; Smith 2018,
"A disciplined approach to neural network hyper-parameters" (arXiv:1803.09820); fastai's `Learner.lr_find`.
"""

import math
import time
from dataclasses import dataclass

import numba

from ..config import LlmTrainingConfig
from ..errors import ConfigError, DataError, NonFiniteError, counted
from ..reprs import Shown
from .feed import Data, open_feed
from .session import Model
from .trainer import LlamaTrainer

__all__ = ["RangeTest", "find_learning_rate", "steepest"]

SMOOTHING = 0.9
LOWEST_TIMES, FIRST_TIMES = 2.0, 1.2  # how far the smoothed loss may rise
SPAN = 10  # updates, over which a fall is measured
LEAST = 2 * SPAN  # updates, of which a suggestion can be made


@dataclass(frozen=True, kw_only=True)
class RangeTest(Shown):
    """Result of a range test: of each update its rate, its loss, and the smoothed loss."""

    rates: tuple[float, ...]
    losses: tuple[float, ...]
    smoothed: tuple[float, ...]
    suggestion: float | None  # None: the loss did not fall
    diverged: bool  # before the largest rate
    seconds: float

    def _says(self) -> str:
        found = "no suggestion" if self.suggestion is None else f"suggestion {self.suggestion:.3g}"
        span = f"{self.rates[0]:.3g} to {self.rates[-1]:.3g}" if self.rates else "no rate"
        return f"{found}; {counted(len(self.rates), 'update')}, {span}{', then it diverged' if self.diverged else ''}"


def find_learning_rate(
    model: Model,
    config: LlmTrainingConfig,
    data: Data,
    *,
    steps: int = 100,
    smallest: float = 1e-6,
    largest: float = 1.0,
) -> RangeTest:
    """Train `model` for at most `steps` updates as `config` says, but with growing rates, and suggest a rate.

    Costs that many steps, and memory for the optimizer and a copy of the trained weights.  Nothing is written; weights
    and random draws of the model and the number of threads are put back, gradients are zero.  ConfigError for numbers
    that do not fit, DataError if a pass over the data trains no token.
    """
    if not (0 < smallest < largest and math.isfinite(largest)):
        raise ConfigError(f"smallest ({smallest}) must be above 0 and below largest ({largest}); try 1e-6 and 1")
    if steps < LEAST:
        raise ConfigError(f"steps ({steps}) must be at least {LEAST}; 100 is usual")
    weights, draws, began = model.collect_weights(), model.draws, time.perf_counter()
    threads = numba.get_num_threads()
    rates = [smallest * (largest / smallest) ** (k / (steps - 1)) for k in range(steps)]
    try:
        losses, diverged = _sweep(LlamaTrainer(model, config.quiet().replace(nan_guard=True)), data, rates)
    finally:
        model.distribute_weights(weights)
        model.draws = draws
        model.zero_gradients()
        numba.set_num_threads(threads)
    smoothed, rates = _smooth(losses), rates[: len(losses)]
    return RangeTest(
        rates=tuple(rates),
        losses=tuple(losses),
        smoothed=tuple(smoothed),
        suggestion=steepest(rates, smoothed),
        diverged=diverged,
        seconds=time.perf_counter() - began,
    )


def _sweep(trainer: LlamaTrainer, data: Data, rates: list[float]) -> tuple[list[float], bool]:
    """Return the loss of each update, and whether training diverged before the last rate."""
    feed, losses = open_feed(data, trainer.config, trainer.model.config, training=True), trainer.loss_history
    trainer.state.rate_set, trained = rates[0], 0  # tokens, at the end of the pass before
    while len(losses) < len(rates):
        batch = feed.next()
        if batch is None:
            if trainer.state.tokens_processed == trained:
                raise DataError("a pass over the data trained no token: all labels are ignored; correct the masks")
            trained = trainer.state.tokens_processed
            feed.reset()
            continue
        dropped = trainer.state.bad_steps
        try:
            metrics = trainer.train_step_with_metrics(
                batch.input_ids, batch.labels, batch.attention_mask, batch.segment_ids
            )
        except NonFiniteError:
            return losses, True
        if trainer.state.bad_steps > dropped:  # an overflow of fp16 is none: its scale falls, and the step is repeated
            return losses, True
        if metrics.updated:
            smoothed = _smooth(losses)
            if smoothed[-1] > min(LOWEST_TIMES * min(smoothed), FIRST_TIMES * smoothed[0]):
                return losses, len(losses) < len(rates)
            trainer.state.rate_set = rates[min(len(losses), len(rates) - 1)]
    return losses, False


def _smooth(losses: list[float]) -> list[float]:
    """Return the mean of the losses up to each, of which older ones count less."""
    made, total, weight = [], 0.0, 0.0
    for loss in losses:
        total, weight = SMOOTHING * total + loss, SMOOTHING * weight + 1
        made.append(total / weight)
    return made


def steepest(rates: list[float], losses: list[float]) -> float | None:
    """Return the rate around which the losses, of rates in equal ratios, fall fastest; None if they do not fall."""
    half, lowest = SPAN // 2, losses.index(min(losses)) if losses else 0
    places = range(half, min(lowest, len(losses) - half - 1) + 1)
    falls = [losses[k - half] - losses[k + half] for k in places]
    if len(losses) < LEAST or not falls or max(falls) <= 0:
        return None
    return rates[places[falls.index(max(falls))]]
