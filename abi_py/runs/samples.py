"""Samples while a model is trained: what it makes of some prompts after each evaluation."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ..errors import ConfigError
from ..training.events import EvaluationEvent, Event, SampleEvent
from .conversations import encoder_of_run
from .models import codec_of_run
from .run import Run

if TYPE_CHECKING:
    from ..data.chat_encoding import ChatEncoder
    from ..generation.text import TextCodec
    from ..training.trainer import LlamaTrainer

__all__ = ["SampleSink", "sample_sinks"]


class SampleSink:
    """Answers every evaluation with a `SampleEvent` for each prompt; the training itself is not touched.

    The same seed every time, and draws of its own, so that two samples differ by the weights only.
    """

    def __init__(
        self,
        trainer: "LlamaTrainer",
        codec: "TextCodec",
        prompts: Sequence[str],
        length: int,
        seed: int,
        encoder: "ChatEncoder | None" = None,
    ) -> None:
        """Write `length` tokens for each prompt; with `encoder`, which is for conversations, a prompt is a question."""
        self.trainer, self.codec, self.prompts = trainer, codec, list(prompts)
        self.asked: list[Any] = self.prompts
        self.settings: dict[str, Any] = {"max_new_tokens": length, "seed": seed}
        if encoder is not None:
            talks = [[{"role": "user", "content": prompt}] for prompt in self.prompts]
            self.asked = [encoder.encode_prompt(talk) for talk in talks]
            self.settings["stop_ids"] = tuple({i for talk in talks for i in encoder.stop_ids(talk)})

    def handle(self, event: Event) -> None:
        """Look out for evaluations."""
        if not isinstance(event, EvaluationEvent):
            return
        from ..generation import Generator

        generator = Generator(self.trainer.model, self.codec)
        results = generator.run(self.asked, **self.settings)
        for prompt, result in zip(self.prompts, results):
            text = result.text or ""
            self.trainer.events.emit(SampleEvent(step=event.step, time=event.time, prompt=prompt, text=text))

    def close(self) -> None:
        """Nothing to close."""


def sample_sinks(trainer: "LlamaTrainer", run: Run) -> list[SampleSink]:
    """Return what lets the model write after each evaluation, if asked for; ConfigError if its tokenizer has gone."""
    data = run.config.data
    if not data.sample_prompts:
        return []
    codec = codec_of_run(run.directory, run.config.model.vocab_size)
    if codec is None:
        raise ConfigError(f"sample_prompts must have a tokenizer; put tokenizer.json back into {run.directory}")
    encoder = encoder_of_run(run.directory) if run.train.conversations else None
    return [SampleSink(trainer, codec, data.sample_prompts, data.sample_length, run.config.training.seed, encoder)]
