"""Samples while a model is trained: what it makes of some prompts after each evaluation."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ..training.events import EvaluationEvent, Event, SampleEvent

if TYPE_CHECKING:
    from ..data.chat_encoding import ChatEncoder
    from ..generation.text import TextCodec
    from ..training.trainer import LlamaTrainer

__all__ = ["SampleSink"]


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
