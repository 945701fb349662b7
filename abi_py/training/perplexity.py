"""Perplexity of a model on a text that is longer than its context: which windows it sees, which tokens count.

    llama.cpp's rule     disjoint windows of `context` tokens; of each, the second half counts, so that a token has at
    (stride None)        least context / 2 - 1 before it.  What does not fill a window is left out.
                         context = c, window at s:   targets s + c/2 + 1 ... s + c - 1
    stride S             windows begin at 0, S, 2S ...; of each, the tokens count that none before it has counted: every
                         token but the first counts once, with at least context - S before it once the text is so long

    loss = sum of -log p(token) / tokens      perplexity = exp(loss)      its error: perplexity x standard error of loss
    bits per byte = sum of -log2 p / bytes of the tokens that count

Of conversations, each row is a window by itself, and its trained tokens count: training's validation loss.

Bytes are those of the text (`TextCodec.count_bytes`): special tokens are predicted, and cost bits, but are no bytes.

Figures of two models with different tokenizers can be compared in bits per byte only.  Source of the first rule: the
program `llama-perplexity` of llama.cpp, which also puts the tokenizer's BOS, if it adds one, in each window's first
place; the second is the one of Hugging Face's documentation on perplexity.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from ..config import IGNORE_INDEX
from ..data.batch import IGNORE_LABEL
from ..data.chat_dataset import ChatDataset
from ..errors import ConfigError, DataError, counted
from ..model.transformer import LossOutput, Transformer
from .evaluation import CountBytes, bits_per_byte, counted_bytes
from .report import perplexity

__all__ = ["PerplexityResult", "Window", "check_windows", "evaluate_conversations", "evaluate_tokens", "windows"]

ROWS = 2048  # tokens that go through the model at once, if the context is no longer


class Window(NamedTuple):
    """ids[start : end] are seen; targets ids[first : end] count, first > start."""

    start: int
    end: int
    first: int


def check_windows(context: int, stride: int | None, longest: int | None = None) -> None:
    """Raise ConfigError for a context below 4 or above `longest`, or a stride outside 1 ... context - 1."""
    if context < 4:
        raise ConfigError(f"max_seq_len ({context}) must be at least 4; half of a window's tokens count")
    if longest is not None and context > longest:
        raise ConfigError(f"max_seq_len ({context}) must be at most the model's ({longest}); lower it")
    if stride is not None and not 1 <= stride < context:
        raise ConfigError(f"stride ({stride}) must be at least 1 and below max_seq_len ({context}); try {context // 2}")


def windows(tokens: int, context: int, stride: int | None = None) -> Iterator[Window]:
    """Yield the windows of a text of so many tokens.

    ConfigError as `check_windows` says; DataError for too short a text.
    """
    check_windows(context, stride)
    if stride is None and tokens < context:
        raise DataError(
            f"the text has {counted(tokens, 'token')}, fewer than one window of {context}; lower the context, or give "
            "a stride, with which every token counts"
        )
    if tokens < 2:
        raise DataError(
            f"the text has {counted(tokens, 'token')}; each is predicted from those before it: give at least two"
        )
    if stride is None:
        yield from (Window(s, s + context, s + context // 2 + 1) for s in range(0, tokens - context + 1, context))
        return
    start, done = 0, 1
    while done < tokens:
        end = min(start + context, tokens)
        yield Window(start, end, done)
        start, done = start + stride, end


@dataclass(frozen=True, kw_only=True)
class PerplexityResult:
    """What an evaluation found; `bits_per_byte` is None where the bytes of tokens are not known."""

    loss: float
    loss_error: float  # standard error of the mean
    perplexity: float
    accuracy: float
    bits_per_byte: float | None
    tokens: int  # that count
    bytes: int | None  # of those tokens
    windows: int


class _Sums:
    """Running sums over the tokens that count."""

    def __init__(self) -> None:
        self.loss = self.squares = 0.0
        self.tokens = self.correct = self.bytes = self.windows = 0

    def add(self, out: LossOutput, chosen: np.ndarray) -> None:
        """Add a pass over some windows, of whose labels (B, T) the `chosen` count."""
        losses = out.token_losses[chosen].astype(np.float64)
        self.loss += float(losses.sum())
        self.squares += float(np.square(losses).sum())
        self.tokens += out.num_tokens
        self.correct += out.num_correct
        self.windows += len(chosen)

    def result(self, bytes_known: bool) -> PerplexityResult:
        mean = self.loss / self.tokens
        variance = max(self.squares / self.tokens - mean * mean, 0.0)
        return PerplexityResult(
            loss=mean,
            loss_error=math.sqrt(variance / max(self.tokens - 1, 1)),
            perplexity=perplexity(mean),
            accuracy=self.correct / self.tokens,
            bits_per_byte=bits_per_byte(self.loss, self.bytes) if bytes_known else None,
            tokens=self.tokens,
            bytes=self.bytes if bytes_known else None,
            windows=self.windows,
        )


def evaluate_tokens(
    model: Transformer,
    ids: np.ndarray,
    *,
    max_seq_len: int,
    stride: int | None = None,
    bos_id: int | None = None,
    byte_counts: np.ndarray | None = None,
    progress: Callable[[int, int, PerplexityResult], object] = lambda done, total, result: None,
) -> PerplexityResult:
    """Return loss, perplexity, accuracy and bits per byte of the text ids (N,).

    bos_id       put in the first place of every window (llama.cpp's rule only)
    byte_counts  (N,) bytes of each token, for bits per byte
    progress     called with windows done, windows in all, and the result so far; KeyboardInterrupt passes through

    Weights and gradients stay as they are.  ConfigError and DataError as `windows` says, and for a max_seq_len above
    the model's; DataError for ids outside the vocabulary.
    """
    check_windows(max_seq_len, stride, model.config.max_seq_len)
    every = list(windows(len(ids), max_seq_len, stride))
    together, sums, at = max(1, ROWS // max_seq_len), _Sums(), 0
    while at < len(every):
        some = every[at : at + together]
        while some[-1].end - some[-1].start != some[0].end - some[0].start:
            some.pop()  # the last windows of a stride are shorter
        _add(sums, model, np.asarray(ids), some, bos_id if stride is None else None)
        if byte_counts is not None:
            sums.bytes += sum(int(byte_counts[window.first : window.end].sum()) for window in some)
        at += len(some)
        progress(at, len(every), sums.result(byte_counts is not None))
    return sums.result(byte_counts is not None)


def _add(sums: _Sums, model: Transformer, ids: np.ndarray, some: list[Window], bos_id: int | None) -> None:
    """Add the tokens of equally long windows to the sums."""
    inputs = np.stack([ids[window.start : window.end - 1] for window in some]).astype(np.int64)
    labels = np.full(inputs.shape, IGNORE_INDEX, np.int64)
    for row, window in zip(labels, some):
        skipped = window.first - window.start - 1
        row[skipped:] = ids[window.first : window.end]
    if bos_id is not None:
        inputs[:, 0] = bos_id
    sums.add(model.compute_loss(inputs, labels, reduction="sum"), labels != IGNORE_INDEX)


def evaluate_conversations(
    model: Transformer,
    data: ChatDataset,
    *,
    count_bytes: CountBytes | None = None,
    progress: Callable[[int, int, PerplexityResult], object] = lambda done, total, result: None,
) -> PerplexityResult:
    """Return loss, perplexity, accuracy and bits per byte of the trained tokens of conversations.

    `windows` are rows; `count_bytes` is that of the tokenizer, for bits per byte; `progress` as in `evaluate_tokens`.
    DataError for ids outside the vocabulary.
    """
    sums = _Sums()
    for rows in data.plan(max(1, ROWS // data.max_seq_len), False, 0, 0):
        batch = data.padded(rows)
        mask = batch.attention_mask
        out = model.compute_loss(batch.input_ids, batch.labels, attention_mask=mask, reduction="sum")
        sums.add(out, batch.labels != IGNORE_LABEL)
        sums.bytes += counted_bytes(batch, count_bytes) if count_bytes is not None else 0
        progress(sums.windows, len(data), sums.result(count_bytes is not None))
    return sums.result(count_bytes is not None)
