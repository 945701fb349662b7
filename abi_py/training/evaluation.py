"""Evaluation: the mean loss over all tokens of a data set, and early stopping's judgement of it."""

import math
from collections.abc import Callable, Iterable

import numpy as np
import numpy.typing as npt

from ..config import EarlyStoppingConfig, Precision
from ..data.batch import IGNORE_LABEL, Batch
from ..errors import DataError
from ..model.transformer import Transformer
from .report import EvalResult, perplexity
from .state import TrainingState
from .stop import GracefulStop, Stopped

__all__ = ["CountBytes", "bits_per_byte", "counted_bytes", "evaluate_batches", "judge"]

# (ids, the ids before them) -> bytes of text of each: `count_bytes` of a tokenizer
CountBytes = Callable[[npt.ArrayLike, npt.ArrayLike], npt.NDArray[np.int64]]


def bits_per_byte(loss_sum: float, size: int) -> float | None:
    """Return the bits that the losses in nats sum up to, by byte of text; None where there is no text."""
    return loss_sum / math.log(2) / size if size else None


def counted_bytes(batch: Batch, count_bytes: CountBytes) -> int:
    """Return the bytes of text of the trained tokens of a batch."""
    trained = batch.labels != IGNORE_LABEL
    return int(count_bytes(batch.labels[trained], batch.input_ids[trained]).sum())


def evaluate_batches(
    model: Transformer,
    batches: Iterable[Batch],
    stop: GracefulStop | None = None,
    precision: Precision = Precision.FP32,
    count_bytes: CountBytes | None = None,
) -> EvalResult | None:
    """Return loss, perplexity and accuracy over every trained token of the batches, and with `count_bytes` bits per
    byte; None if `stop` was requested.

        loss = sum of all token losses / their number         (not a mean of means, no label smoothing)

    Weights and gradients stay as they are.  DataError if there is no trained token.
    """
    loss, correct, tokens, count, size = 0.0, 0, 0, 0, 0
    for batch in batches:
        if stop is not None and stop.requested:
            return None
        try:
            out = model.compute_loss(
                batch.input_ids,
                batch.labels,
                attention_mask=batch.attention_mask,
                segment_ids=batch.segment_ids,
                reduction="sum",
                precision=precision,
                check=None if stop is None else stop.watch_pass(),
            )
        except Stopped:
            return None
        loss += float(out.loss_sum)
        correct += int(out.num_correct)
        tokens += int(out.num_tokens)
        count += 1
        size += counted_bytes(batch, count_bytes) if count_bytes is not None else 0
    if tokens == 0:
        raise DataError("the validation data hold no trained token; give at least two tokens, or trained answers")
    mean = loss / tokens
    return EvalResult(
        loss=mean,
        perplexity=perplexity(mean),
        accuracy=correct / tokens,
        num_batches=count,
        total_tokens=tokens,
        bits_per_byte=bits_per_byte(loss, size) if count_bytes is not None else None,
    )


def judge(state: TrainingState, result: EvalResult, early: EarlyStoppingConfig | None, count: bool = True) -> bool:
    """Enter an evaluation into the state's memory and return whether it is an improvement.

    An improvement is a metric below the best by more than min_delta (0 without early stopping); it resets the patience,
    anything else uses some of it up, if `count`.  NaN is never an improvement.
    """
    if state.global_step == 0 and math.isfinite(result.loss):
        state.initial_val_loss = result.loss
    metric = result.loss if early is None or early.monitor_loss else result.perplexity
    least_fall = early.min_delta if early is not None else 0.0
    if result.loss < state.best_val_loss:
        state.best_val_loss, state.best_val_accuracy = result.loss, result.accuracy
        state.best_val_bits_per_byte = result.bits_per_byte
    improved = metric < state.best_metric - least_fall if math.isfinite(state.best_metric) else math.isfinite(metric)
    if improved:
        state.best_metric, state.patience_counter = metric, 0
    elif count:
        state.patience_counter += 1
    return improved
