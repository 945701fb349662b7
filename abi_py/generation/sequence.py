"""One sequence while it grows: its ids, its generator of random numbers, its text, and why it ends."""

from dataclasses import dataclass, field

import numpy as np

from ..reprs import Shown
from .sampler import (
    ban_repeated_ngrams,
    ban_words,
    candidates,
    check_finite,
    draw,
    log_probabilities,
    penalise_repetition,
)
from .settings import GenerationConfig
from .text import StopText, TextCodec

__all__ = ["Generation", "Sequence", "Token"]


@dataclass(frozen=True, kw_only=True)
class Token(Shown):
    """One event of a stream: a new token, or the end of a sequence.

    `text` is what became certain with it: perhaps nothing, perhaps more than the token's own.  The last event of a
    sequence has `finish_reason`, and no id where a stop id or a limit of zero ended it.
    """

    prompt: int  # which of the prompts
    id: int | None
    text: str = ""
    logprob: float | None = None
    top_logprobs: tuple[tuple[int, float], ...] = ()  # (id, log-probability) of the likeliest, if asked for
    finish_reason: str | None = None  # "stop": a stop id or stop string; "length": a limit


@dataclass(kw_only=True)
class Generation(Shown):
    """What came of one prompt.

    `ids` ends before a stop id; with a stop string it ends with the token that completed it, and `text` before it.
    """

    prompt_ids: np.ndarray  # int32
    ids: np.ndarray  # (n,) int32
    text: str | None  # None without a tokenizer
    finish_reason: str  # "stop", "length", or "interrupted" where nobody asked for the rest of a stream
    stop: int | str | None  # the id or string that ended it
    logprobs: np.ndarray | None  # (n,) float64, of the model itself: before temperature and filters
    top_logprobs: list[tuple[tuple[int, float], ...]]
    dropped: int  # ids at the beginning of prompt and text that the context had no room for at the end


@dataclass
class Sequence:
    """The state of one prompt's continuation; `take` turns logits into the next token."""

    index: int
    prompt: np.ndarray  # (T,) int32
    config: GenerationConfig
    limit: int
    stop_ids: frozenset[int]
    codec: TextCodec | None
    slot: int = -1
    dropped: int = 0
    finish_reason: str | None = None
    stop: int | str | None = None
    made: int = 0
    pieces: list[str] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    top_logprobs: list[tuple[tuple[int, float], ...]] = field(default_factory=list)

    def __post_init__(self) -> None:
        """Make the buffer of ids and the generator."""
        self._ids = np.empty(len(self.prompt) + min(self.limit, 1024), np.int32)
        self._ids[: len(self.prompt)] = self.prompt
        self._rng = np.random.default_rng(self.config.seed)
        self._text = None
        if self.codec is not None:
            self._text = StopText(self.codec, self.config.stop_strings, self.prompt.tolist())

    @property
    def ids(self) -> np.ndarray:
        """Prompt and continuation, int32: a view."""
        return self._ids[: len(self.prompt) + self.made]

    @property
    def last(self) -> int:
        """The newest id."""
        return int(self.ids[-1])

    def take(self, logits: np.ndarray) -> Token:
        """Choose the next token by logits (V,), which stay as they are; NonFiniteError if they are not finite."""
        check_finite(logits)
        chosen = self._choose(logits)
        if chosen in self.stop_ids:
            return self._end("stop", chosen)
        logprob, top = self._log_probabilities(logits, chosen)
        self._append(chosen)
        text = ""
        if self._text is not None:
            text, self.stop = self._text.add(chosen)
        if self.stop is not None:
            self.finish_reason = "stop"
        elif self.made >= self.limit:
            return self._end("length", None, chosen, text, logprob, top)
        self.pieces.append(text)
        return Token(
            prompt=self.index,
            id=chosen,
            text=text,
            logprob=logprob,
            top_logprobs=top,
            finish_reason=self.finish_reason,
        )

    def end_at_once(self) -> Token:
        """End without a token: nothing was asked for."""
        return self._end("length", None)

    def _choose(self, logits: np.ndarray) -> int:
        z = self.processed(logits)
        if self.config.greedy and (z is logits or z.max() > -np.inf):
            return int(z.argmax())
        return draw(*candidates(z, **self.config.filters()), self._rng)

    def processed(self, logits: np.ndarray) -> np.ndarray:
        """Return the logits (V,) as the settings change them before the choice: themselves, or a copy.

        The order is that of `GenerationMixin._get_logits_processor` in transformers.
        """
        c = self.config
        least = c.min_new_tokens if c.min_new_tokens is not None else c.min_length - len(self.prompt)
        endless = self.made < least and bool(self.stop_ids)
        last = self.made == self.limit - 1 and bool(c.forced_eos_token_id)
        begin = self.made == 0 and bool(c.begin_suppress_tokens)
        words = c.bad_words
        changes = (c.repetition_penalty != 1, c.no_repeat_ngram_size, words, endless, last, c.suppress_tokens, begin)
        if not any(changes):
            return logits
        z = logits.copy()
        if c.repetition_penalty != 1:
            penalise_repetition(z, self.ids, c.repetition_penalty)
        if c.no_repeat_ngram_size:
            ban_repeated_ngrams(z, self.ids, c.no_repeat_ngram_size)
        if words:
            # What ends the text is not banned as a word: its end would only come later.
            ban_words(z, self.ids, [word for word in words if len(word) > 1 or word[0] not in self.stop_ids])
        if endless:
            z[[i for i in self.stop_ids if i < z.size]] = -np.inf
        if last:
            z.fill(-np.inf)
            z[list(c.forced_eos_token_id)] = 0
        z[list(c.suppress_tokens)] = -np.inf
        if begin:
            z[list(c.begin_suppress_tokens)] = -np.inf
        return z

    def _log_probabilities(self, logits: np.ndarray, chosen: int) -> tuple[float | None, tuple[tuple[int, float], ...]]:
        count = self.config.logprobs
        if count is None:
            return None, ()
        likeliest = np.argsort(-logits, kind="stable")[:count] if count else np.empty(0, np.int64)
        values = log_probabilities(logits, np.append(likeliest, chosen))
        top = tuple((int(i), float(value)) for i, value in zip(likeliest, values))
        self.logprobs.append(float(values[-1]))
        self.top_logprobs.append(top)
        return float(values[-1]), top

    def _append(self, token: int) -> None:
        length = len(self.prompt) + self.made
        if length == len(self._ids):
            self._ids = np.concatenate((self._ids, np.empty(length, np.int32)))
        self._ids[length] = token
        self.made += 1

    def _end(
        self,
        reason: str,
        stop: int | None,
        token: int | None = None,
        text: str = "",
        logprob: float | None = None,
        top: tuple[tuple[int, float], ...] = (),
    ) -> Token:
        self.finish_reason, self.stop = reason, stop
        if self._text is not None:
            rest, met = self._text.finish()
            text += rest
            if met is not None:
                self.finish_reason, self.stop = "stop", met
        self.pieces.append(text)
        return Token(
            prompt=self.index,
            id=token,
            text=text,
            logprob=logprob,
            top_logprobs=top,
            finish_reason=self.finish_reason,
        )

    def result(self) -> Generation:
        """Return what has come of it so far."""
        return Generation(
            prompt_ids=self.prompt,
            ids=self.ids[len(self.prompt) :].copy(),
            text=None if self.codec is None else "".join(self.pieces),
            finish_reason=self.finish_reason or "interrupted",
            stop=self.stop,
            logprobs=None if self.config.logprobs is None else np.array(self.logprobs),
            top_logprobs=self.top_logprobs,
            dropped=self.dropped,
        )
