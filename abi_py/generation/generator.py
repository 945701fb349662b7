"""Generation: read the prompts, then one token for each sequence in turn, until each has met its end.

    generate(model, prompts, config)           ids for ids, text for text
    generate_stream(model, prompts, config)    the same, token by token
    Generator(model, tokenizer)                the same with everything that is known of each continuation

Up to TOGETHER sequences go through a step together, which reads every weight once for all of them; where one ends, the
next prompt takes its place.  A prompt that begins like another text that is still there is only read from where it
differs (`prefixes.py`).  A sequence that fills the context loses the older half of it and goes on: the rest is read
again.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator
from collections.abc import Sequence as SequenceOf
from typing import Any, overload

import numpy as np
import numpy.typing as npt

from ..errors import ConfigError, DataError
from ..model.transformer import Transformer
from ..reprs import Shown
from .decoder import Decoder, weights_mark
from .prefixes import NOTHING, Prefixes
from .sequence import Generation, Sequence, Token
from .settings import GenerationConfig
from .text import TextCodec, text_codec

__all__ = ["Generator", "generate", "generate_stream"]

Prompt = str | npt.ArrayLike


class Generator(Shown):
    """A model, its tokenizer, and a cache that lives as long as this object.

    What the cache holds serves the next call: a conversation that grows, or another prompt with the same instructions,
    is only read from where it differs.  The tokens are the same, to the bit of their log-probabilities; where the
    model's weights have changed since, everything is read again.  Weights are compared when a stream begins and when it
    ends, not at each token, which would take as long as the token: what changes while a stream is suspended, and is
    changed back before it ends, is not noticed.
    """

    def __init__(self, model: Transformer, tokenizer: Any = None) -> None:
        """Take any model of `abi_py`; DataError if the tokenizer has more ids than the model."""
        self.model, self._given = model, tokenizer is not None
        self.codec: TextCodec | None = text_codec(tokenizer, model.config.vocab_size)
        self.prefill_tokens = self.decode_tokens = 0  # of the last call, and the seconds that they took
        self.prefill_seconds = self.decode_seconds = 0.0
        self._kept: tuple[Prefixes, bytes] | None = None  # of a stream that has ended, and the mark of its weights
        self._sequences: list[Sequence] = []

    def _says(self) -> str:
        return f"{self.model!r}, {self.codec!r}" if self.codec is not None else f"{self.model!r}, without a tokenizer"

    def run(
        self,
        prompts: SequenceOf[Prompt],
        config: GenerationConfig | None = None,
        *,
        callback: Callable[[Token], object] | None = None,
        **settings: Any,
    ) -> list[Generation]:
        """Return what comes of each prompt, in their order; `callback` is called with every token as it comes.

        Prompts are texts or arrays of ids (T,); `settings` are fields of GenerationConfig and beat `config`.
        ConfigError for settings out of range; DataError for an empty prompt, ids outside the vocabulary, or text
        without a tokenizer; NonFiniteError for a model that computes NaN.
        """
        for token in self.stream(prompts, config, **settings):
            if callback is not None:
                callback(token)
        return self.results()

    def stream(
        self, prompts: SequenceOf[Prompt], config: GenerationConfig | None = None, **settings: Any
    ) -> Iterator[Token]:
        """Yield the tokens of all prompts as they come; the same errors as `run`, at the call itself."""
        config = configured(config, settings)
        self._sequences = [self._sequence(i, prompt, config) for i, prompt in enumerate(prompts)]
        return self._tokens(self._sequences, config.integer_products)

    def results(self) -> list[Generation]:
        """Return what has come of each prompt of the last call so far."""
        return [sequence.result() for sequence in self._sequences]

    # -- prompts ---------------------------------------------------------------------------------

    def _sequence(self, index: int, prompt: Prompt, config: GenerationConfig) -> Sequence:
        ids = self._encode(index, prompt)
        stop_ids = config.stop_ids
        if stop_ids is None:
            # Bare ids are not taken for bytes because the vocabulary has a certain size: only text, or a tokenizer.
            codec = self.codec if self._given or isinstance(prompt, str) else None
            stop_ids = () if codec is None or codec.eos_id is None else (codec.eos_id,)
        if config.stop_strings and self.codec is None:
            raise DataError("stop_strings need a tokenizer to compare texts; pass tokenizer=, or use stop_ids")
        config.check_vocabulary(self.model.config.vocab_size)
        return Sequence(
            index=index,
            prompt=ids,
            config=config,
            limit=config.limit(len(ids), self.model.config.max_seq_len),
            stop_ids=frozenset(stop_ids),
            codec=self.codec,
        )

    def _encode(self, index: int, prompt: Prompt) -> np.ndarray:
        if isinstance(prompt, str):
            if self.codec is None:
                raise DataError(
                    f"prompt {index} is text, but there is no tokenizer; pass tokenizer=, or token ids instead of text"
                )
            prompt = self.codec.encode_prompt(prompt)
        array = np.asarray(prompt)
        if array.ndim != 1 or array.size == 0:
            raise DataError(
                f"prompt {index} has shape {array.shape}; generation continues at least one token, as text or as a "
                "flat array of ids"
            )
        if array.dtype.kind not in "iu":
            raise TypeError(f"prompt {index} has dtype {array.dtype}; token ids are integers")
        size = self.model.config.vocab_size
        if array.min() < 0 or array.max() >= size:
            at = int(np.flatnonzero((array < 0) | (array >= size))[0])
            raise DataError(
                f"prompt {index}: id {array[at]} at place {at} must be 0 ... {size - 1} (vocab_size - 1); tokenize "
                "with this model's vocabulary"
            )
        return array.astype(np.int32)

    # -- the loop --------------------------------------------------------------------------------

    def _prefixes(self, mark: bytes, integer: bool) -> Prefixes:
        """Return what an earlier stream left, or an empty cache: while another stream goes on, for new weights, or to
        multiply otherwise."""
        kept, self._kept = self._kept, None
        if kept is not None and kept[1] == mark and kept[0].decoder.integer == integer:
            return kept[0]
        return Prefixes(Decoder(self.model, integer=integer))

    def _make_room(self, prefixes: Prefixes, sequences: list[Sequence]) -> int:
        """Return how many of the sequences are to go on together, as far as their cache has room; make it."""
        longest = self.model.config.max_seq_len
        positions = max((min(len(each.prompt) + each.limit, longest) for each in sequences), default=1)
        most = BYTES_OF_CACHE // max(prefixes.decoder.cache.bytes_of_position, 1)
        together = max(1, min(len(sequences), TOGETHER, most // positions))
        prefixes.make_room([each.prompt[-longest:] for each in sequences], together, positions, most)
        return together

    def _tokens(self, sequences: list[Sequence], integer: bool) -> Iterator[Token]:
        mark = weights_mark(self.model)
        prefixes = self._prefixes(mark, integer)
        together = self._make_room(prefixes, sequences)
        self.prefill_tokens = self.decode_tokens = 0
        self.prefill_seconds = self.decode_seconds = 0.0
        try:
            yield from self._written(prefixes, deque(sequences), together)
        finally:
            if weights_mark(self.model) == mark:
                self._kept = prefixes, mark

    def _written(self, prefixes: Prefixes, waiting: deque[Sequence], together: int) -> Iterator[Token]:
        active, free = list[Sequence](), list(range(prefixes.decoder.cache.slots))
        while waiting or active:
            while waiting and len(active) < together:
                sequence = waiting.popleft()
                if sequence.limit == 0:
                    yield sequence.end_at_once()
                    continue
                logits = self._read(prefixes, sequence, free)
                yield sequence.take(logits)
                active.append(sequence)
            for sequence in [each for each in active if each.finish_reason]:
                active.remove(sequence)
                free.append(sequence.slot)
            if active:
                yield from self._step(prefixes, active)

    def _read(self, prefixes: Prefixes, sequence: Sequence, free: list[int]) -> np.ndarray:
        """Read a prompt into one of the free slots, of one longer than the context its end; return the logits after it.
        """
        longest, decoder = self.model.config.max_seq_len, prefixes.decoder
        sequence.dropped = max(len(sequence.prompt) - longest, 0)
        kept = sequence.prompt[sequence.dropped :]
        decoder.reserve(min(len(kept) + sequence.limit, longest, 4 * (len(kept) + FIRST_ROOM)))
        began = time.perf_counter()
        sequence.slot, common = prefixes.begin(kept, free)
        free.remove(sequence.slot)
        logits = decoder.prefill(sequence.slot, kept[common:])
        prefixes.hold(sequence.slot, kept)
        self.prefill_seconds += time.perf_counter() - began
        self.prefill_tokens += len(kept) - common
        return logits

    def _step(self, prefixes: Prefixes, active: list[Sequence]) -> Iterator[Token]:
        longest, decoder = self.model.config.max_seq_len, prefixes.decoder
        for sequence in [each for each in active if decoder.lengths[each.slot] >= longest]:
            # No room: keep the newer half, which the sequence then has read as if it were all.
            kept = sequence.ids[-max(longest // 2, 1) :]
            sequence.dropped = len(sequence.ids) - len(kept)
            prefixes.hold(sequence.slot, NOTHING)
            decoder.clear(sequence.slot)
            if len(kept) > 1:
                decoder.prefill(sequence.slot, kept[:-1])
        slots = np.array([sequence.slot for sequence in active], np.int32)
        ids = np.array([sequence.last for sequence in active], np.int32)
        began = time.perf_counter()
        logits = decoder.step(slots, ids)
        self.decode_seconds += time.perf_counter() - began
        self.decode_tokens += len(active)
        for sequence in active:
            prefixes.hold(sequence.slot, sequence.ids[sequence.dropped :])
        for sequence, z in zip(list(active), logits):
            yield sequence.take(z)


TOGETHER = 32  # sequences that share a step at most
BYTES_OF_CACHE = 1 << 30  # of keys and values: fewer sequences, where theirs would take more; one may
FIRST_ROOM = 256  # a new cache has room for four times the prompt and so many tokens, at most; it grows later


def configured(config: GenerationConfig | None, settings: dict[str, Any]) -> GenerationConfig:
    """Return the configuration with settings that beat it; `stop` is short for stop_ids, or for stop_strings."""
    if "stop" in settings:
        stop = settings.pop("stop")
        stops = () if stop is None else (stop,) if isinstance(stop, int | str | np.integer) else tuple(stop)
        texts = tuple(each for each in stops if isinstance(each, str))
        settings.setdefault("stop_strings", texts)
        if len(texts) < len(stops):
            settings.setdefault("stop_ids", tuple(int(each) for each in stops if not isinstance(each, str)))
    base = config if config is not None else GenerationConfig()
    return base.replace(**settings) if settings else base


def _split(prompt: Any) -> tuple[list[Any], bool]:
    """Return the prompts, and whether there was only one."""
    if isinstance(prompt, str) or (isinstance(prompt, np.ndarray) and prompt.ndim < 2):
        return [prompt], True
    prompts = list(prompt)
    if not prompts or isinstance(prompts[0], int | np.integer | float | np.floating):
        return [prompts], True
    return prompts, False


@overload
def generate(
    model: Transformer,
    prompt: str,
    config: GenerationConfig | int | None = None,
    *,
    tokenizer: Any = None,
    callback: Callable[[Token], object] | None = None,
    **settings: Any,
) -> str: ...
@overload
def generate(
    model: Transformer,
    prompt: list[str],
    config: GenerationConfig | int | None = None,
    *,
    tokenizer: Any = None,
    callback: Callable[[Token], object] | None = None,
    **settings: Any,
) -> list[str]: ...
@overload
def generate(
    model: Transformer,
    prompt: SequenceOf[int],
    config: GenerationConfig | int | None = None,
    *,
    tokenizer: Any = None,
    callback: Callable[[Token], object] | None = None,
    **settings: Any,
) -> npt.NDArray[np.int32]: ...
@overload
def generate(
    model: Transformer,
    prompt: SequenceOf[SequenceOf[int]],
    config: GenerationConfig | int | None = None,
    *,
    tokenizer: Any = None,
    callback: Callable[[Token], object] | None = None,
    **settings: Any,
) -> list[npt.NDArray[np.int32]]: ...
@overload
def generate(
    model: Transformer,
    prompt: Any,
    config: GenerationConfig | int | None = None,
    *,
    tokenizer: Any = None,
    callback: Callable[[Token], object] | None = None,
    **settings: Any,
) -> Any: ...
def generate(
    model: Transformer,
    prompt: Any,
    config: GenerationConfig | int | None = None,
    *,
    tokenizer: Any = None,
    callback: Callable[[Token], object] | None = None,
    **settings: Any,
) -> Any:
    """Return what follows a prompt: text (str) for text, ids (n,) int32 for ids; a list of them for several prompts.

    `config` may also be a number, the most tokens to make.  `settings` are fields of GenerationConfig, which names the
    defaults, and beat `config`; `stop` takes ids or texts.  Text needs `tokenizer`, unless the model is byte-level.
    `callback` is called with every `Token` as it comes.  The same prompt, settings and seed give the same tokens alone
    and in a batch.  Generation ends before a stop id or stop string; a context longer than the model's max_seq_len
    loses its beginning.

    ConfigError for settings out of range; DataError for an empty prompt, ids outside the vocabulary, or text without a
    tokenizer; NonFiniteError for a model that computes NaN.
    """
    prompts, single = _split(prompt)
    generator, config = Generator(model, tokenizer), _config_or_number(config)
    results = generator.run(prompts, config, callback=callback, **settings)
    made = [result.text if isinstance(given, str) else result.ids for given, result in zip(prompts, results)]
    return made[0] if single else made


def generate_stream(
    model: Transformer,
    prompt: Any,
    config: GenerationConfig | int | None = None,
    *,
    tokenizer: Any = None,
    **settings: Any,
) -> Iterator[Token]:
    """Yield what `generate` returns token by token, as `Token`s; with several prompts, their tokens in turn."""
    prompts, _ = _split(prompt)
    return Generator(model, tokenizer).stream(prompts, _config_or_number(config), **settings)


def _config_or_number(config: GenerationConfig | int | None) -> GenerationConfig | None:
    if config is None or isinstance(config, GenerationConfig):
        return config
    if isinstance(config, bool) or not isinstance(config, int | np.integer):
        raise ConfigError(f"config ({config!r}) must be a GenerationConfig, or the number of new tokens")
    return GenerationConfig(max_new_tokens=int(config))
