"""A run with all that it needs: settings, data, directory."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ..config import EarlyStoppingConfig, LlmTrainingConfig
from ..files import atomic_text
from ..training.events import RunLabel
from .base import Base
from .directory import CONFIG
from .models import codec_of_run
from .opening import RunData, find_tokenizer
from .settings import RUN_SECTIONS, DataConfig, RunConfig

if TYPE_CHECKING:
    from ..data.tokenizer import Tokenizer
    from ..model import LoraModel, TrainableModel
    from ..training.trainer import LlamaTrainer

__all__ = ["Run", "count_steps"]


def count_steps(config: LlmTrainingConfig, data: RunData) -> tuple[int, int]:
    """Return the optimizer steps of an epoch, and of the whole run."""
    batches = max(1, data.num_batches(config.batch_size, config.max_seq_len, drop_last=False))
    epoch = -(-batches // config.grad_accum_steps)
    total = epoch * config.epochs
    return epoch, min(total, config.max_steps) if config.max_steps else total


@dataclass(frozen=True)
class Run:
    """Settings of which none is left open, data for training and validation, and the directory of it all.

    opened  how the data were opened: as the settings say, with the tokenizer of the base where they name none
    base    the model to start from, where the run begins with one; with LoRA that under the adapters, at any time
    """

    config: RunConfig
    train: RunData
    valid: RunData | None
    directory: Path
    opened: DataConfig
    base: Base | None = None

    @property
    def steps(self) -> tuple[int, int]:
        """The optimizer steps of an epoch, and of the whole run."""
        return count_steps(self.config.training, self.train)

    @property
    def early_stopping(self) -> EarlyStoppingConfig | None:
        """When to stop early; None: never."""
        early = self.config.early_stopping
        return early if early.enabled and self.valid is not None else None

    @property
    def evaluates(self) -> bool:
        """Whether there are evaluations while it trains."""
        return self.valid is not None and self.config.training.eval_interval > 0

    @property
    def label(self) -> RunLabel:
        """What loggers are told of it."""
        sections = {name: getattr(self.config, name) for name in RUN_SECTIONS}
        settings = {name: section.to_dict() for name, section in sections.items() if section is not None}
        return RunLabel(name=self.directory.absolute().name, settings=settings, directory=self.directory)

    def find_tokenizer(self) -> tuple["Tokenizer | None", str]:
        """Return the tokenizer of the data, or None, and what is to be said about it."""
        return find_tokenizer(self.opened, self.config.chat, self.train)

    def write_config(self) -> None:
        """Write the run's config.yaml: from here on it can be begun again, or gone on with."""
        atomic_text(self.directory / CONFIG, self.config.to_yaml(self.directory))

    def make_model(self) -> "TrainableModel | LoraModel":
        """Return the model that is trained: fresh weights or those of the base; with LoRA, adapters on them."""
        from ..model import LoraModel, TrainableModel

        shape, lora, base = self.config.model, self.config.lora, self.base
        if lora is None:
            return TrainableModel(shape) if base is None else base.make_model(shape)
        frozen = TrainableModel(shape) if base is None else base.make_frozen(shape)
        return LoraModel(frozen, lora.adapters(), base_model=None if base is None else base.folder.absolute())

    def make_trainer(self, checkpoint: Path | None = None) -> "LlamaTrainer":
        """Return the trainer, with fresh weights, those of the base, or the state of a checkpoint, which must be of
        these data.

        A run with a base begins with an evaluation: what the weights could do before.
        """
        from ..training.trainer import LlamaTrainer
        from .companions import companions_of_run
        from .model_card import model_card

        model = self.make_model()
        trainer = LlamaTrainer(model, self.config.training)
        trainer.label = self.label
        if self.base is not None:
            model.companions = self.base.companions(self.directory, self.train.conversations)
            trainer.state.evaluation_due = self.evaluates
        if checkpoint is not None:
            trainer.load_checkpoint(checkpoint)
            trainer.check_data(self.train)
        companions = companions_of_run(model.companions, self.config, self.directory, self.train.info)
        model.companions = companions.with_card(model_card(self, companions))
        codec = codec_of_run(self.directory, self.config.model.vocab_size)
        trainer.count_bytes = None if codec is None else codec.count_bytes
        return trainer
