"""Samples while a model is trained: what it makes of some prompts after each evaluation."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from ..training.events import EvaluationEvent, Event, SampleEvent

if TYPE_CHECKING:
    from ..generation.text import TextCodec
    from ..training.trainer import LlamaTrainer

__all__ = ["SampleSink"]


class SampleSink:
    """Answers every evaluation with a `SampleEvent` for each prompt; the training itself is not touched.

    The same seed every time, and draws of its own, so that two samples differ by the weights only.
    """

    def __init__(
        self, trainer: "LlamaTrainer", codec: "TextCodec", prompts: Sequence[str], length: int, seed: int
    ) -> None:
        """Write `length` tokens for each prompt."""
        self.trainer, self.codec, self.prompts = trainer, codec, list(prompts)
        self.length, self.seed = length, seed

    def handle(self, event: Event) -> None:
        """Look out for evaluations."""
        if not isinstance(event, EvaluationEvent):
            return
        from ..generation import Generator

        generator = Generator(self.trainer.model, self.codec)
        results = generator.run(self.prompts, max_new_tokens=self.length, seed=self.seed)
        for prompt, result in zip(self.prompts, results):
            text = result.text or ""
            self.trainer.events.emit(SampleEvent(step=event.step, time=event.time, prompt=prompt, text=text))

    def close(self) -> None:
        """Nothing to close."""
