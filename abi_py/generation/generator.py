"""Generation: read the prompts, then one token for each sequence in turn, until each has met its end.

    generate(model, prompts, config)           ids for ids, text for text
    generate_stream(model, prompts, config)    the same, token by token
    Generator(model, tokenizer)                the same with everything that is known of each continuation

Up to FEW sequences go through a step together; where one ends, the next prompt takes its place.  A sequence that fills
the context loses the older half of it and goes on: the rest is read again.
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
from .decoder import FEW, Decoder
from .sequence import Generation, Sequence, Token
from .settings import GenerationConfig
from .text import TextCodec, text_codec

__all__ = ["Generator", "generate", "generate_stream"]

Prompt = str | npt.ArrayLike


class Generator(Shown):
    """A model, its tokenizer, and a cache that lives as long as this object.

    With `reuse`, a prompt that begins with what the cache holds is only read from there on: for a conversation that
    grows.  The model must not be trained in between, and the rounding of a few bits depends on what was kept.
    """

    def __init__(self, model: Transformer, tokenizer: Any = None, *, reuse: bool = False) -> None:
        """Take any model of `abi_py`; DataError if the tokenizer has more ids than the model."""
        self.model, self.reuse, self._given = model, reuse, tokenizer is not None
        self.codec: TextCodec | None = text_codec(tokenizer, model.config.vocab_size)
        self.prefill_tokens = self.decode_tokens = 0  # of the last call, and the seconds that they took
        self.prefill_seconds = self.decode_seconds = 0.0
        self._decoder: Decoder | None = None
        self._held = np.empty(0, np.int32)  # what slot 0 has read, if `reuse`
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
        return self._tokens()

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

    def _decoder_for(self, count: int) -> Decoder:
        slots = max(1, min(count, FEW))
        if self._decoder is None or self._decoder.cache.slots < slots or not self.reuse:
            self._decoder, self._held = Decoder(self.model, slots), np.empty(0, np.int32)
        return self._decoder

    def _tokens(self) -> Iterator[Token]:
        decoder = self._decoder_for(len(self._sequences))
        self.prefill_tokens = self.decode_tokens = 0
        self.prefill_seconds = self.decode_seconds = 0.0
        waiting, active = deque(self._sequences), list[Sequence]()
        free = list(range(decoder.cache.slots))[::-1]
        while waiting or active:
            while waiting and free:
                sequence = waiting.popleft()
                if sequence.limit == 0:
                    yield sequence.end_at_once()
                    continue
                sequence.slot = free.pop()
                yield sequence.take(self._read(decoder, sequence))
                active.append(sequence)
            for sequence in [each for each in active if each.finish_reason]:
                active.remove(sequence)
                free.append(sequence.slot)
            if active:
                yield from self._step(decoder, active)

    def _read(self, decoder: Decoder, sequence: Sequence) -> np.ndarray:
        """Read a prompt, of one longer than the context its end, and return the logits after it."""
        longest = self.model.config.max_seq_len
        sequence.dropped = max(len(sequence.prompt) - longest, 0)
        kept = sequence.prompt[sequence.dropped :]
        common = self._common(kept) if self.reuse and sequence.slot == 0 else 0
        decoder.clear(sequence.slot, common)
        decoder.cache.reserve(min(len(kept) + sequence.limit, longest, 4 * (len(kept) + FIRST_ROOM)))
        if sequence.slot == 0:
            self._held = kept[:common]  # true, too, if Ctrl-C comes in the middle of reading
        began = time.perf_counter()
        logits = decoder.prefill(sequence.slot, kept[common:])
        self.prefill_seconds += time.perf_counter() - began
        self.prefill_tokens += len(kept) - common
        if sequence.slot == 0:
            self._held = kept
        return logits

    def _common(self, ids: np.ndarray) -> int:
        """Return how many ids at the beginning are in slot 0 already; at least one is left to read."""
        length = min(len(ids) - 1, len(self._held))
        differ = np.flatnonzero(ids[:length] != self._held[:length])
        return int(differ[0]) if differ.size else length

    def _step(self, decoder: Decoder, active: list[Sequence]) -> Iterator[Token]:
        longest = self.model.config.max_seq_len
        for sequence in [each for each in active if decoder.lengths[each.slot] >= longest]:
            # No room: keep the newer half, which the sequence then has read as if it were all.
            kept = sequence.ids[-max(longest // 2, 1) :]
            sequence.dropped = len(sequence.ids) - len(kept)
            decoder.clear(sequence.slot)
            if len(kept) > 1:
                decoder.prefill(sequence.slot, kept[:-1])
        slots = np.array([sequence.slot for sequence in active], np.int32)
        ids = np.array([sequence.last for sequence in active], np.int32)
        began = time.perf_counter()
        logits = decoder.step(slots, ids)
        self.decode_seconds += time.perf_counter() - began
        self.decode_tokens += len(active)
        for sequence, z in zip(list(active), logits):
            yield sequence.take(z)
            if sequence.slot == 0:
                self._held = sequence.ids[sequence.dropped :][: decoder.lengths[0]]


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
