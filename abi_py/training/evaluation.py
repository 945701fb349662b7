"""Evaluation: the mean loss over all tokens of a data set, and early stopping's judgement of it."""

import math
from collections.abc import Callable, Iterable
from typing import Any

from ..config import EarlyStoppingConfig, Precision
from ..data.tokens import Batch
from ..errors import DataError
from .checkpoint import TrainingState
from .report import EvalResult, perplexity

__all__ = ["evaluate_batches", "judge"]


def evaluate_batches(
    model: Any,
    batches: Iterable[Batch],
    should_stop: Callable[[], bool] = lambda: False,
    precision: Precision = Precision.FP32,
) -> EvalResult | None:
    """Return loss, perplexity and accuracy over every counted label of the batches; None if `should_stop` became true.

        loss = sum of all token losses / number of tokens         (not a mean of means, no label smoothing)

    Weights and gradients stay as they are.  DataError if no label counts.
    """
    loss, correct, tokens, count = 0.0, 0, 0, 0
    for batch in batches:
        if should_stop():
            return None
        out = model.compute_loss(
            batch.input_ids,
            batch.labels,
            attention_mask=batch.attention_mask,
            segment_ids=batch.segment_ids,
            reduction="sum",
            precision=precision,
        )
        loss += float(out.loss_sum)
        correct += int(out.num_correct)
        tokens += int(out.num_tokens)
        count += 1
    if tokens == 0:
        raise DataError("the validation data hold no label that counts; give at least two tokens, or trained answers")
    mean = loss / tokens
    return EvalResult(
        loss=mean, perplexity=perplexity(mean), accuracy=correct / tokens, num_batches=count, total_tokens=tokens
    )


def judge(state: TrainingState, result: EvalResult, early: EarlyStoppingConfig | None, count: bool = True) -> bool:
    """Enter an evaluation into the state's memory and return whether it is an improvement.

    An improvement is a metric below the best by more than min_delta (0 without early stopping); it resets the patience,
    anything else uses some of it up, if `count`.  NaN is never an improvement.
    """
    metric = result.loss if early is None or early.monitor_loss else result.perplexity
    least_fall = early.min_delta if early is not None else 0.0
    if result.loss < state.best_val_loss:
        state.best_val_loss, state.best_val_accuracy = result.loss, result.accuracy
    improved = metric < state.best_metric - least_fall if math.isfinite(state.best_metric) else math.isfinite(metric)
    if improved:
        state.best_metric, state.patience_counter = metric, 0
    elif count:
        state.patience_counter += 1
    return improved
