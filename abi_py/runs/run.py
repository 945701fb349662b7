"""A run with all that it needs: settings, data, directory."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from ..choices import ExportFormat
from ..config import EarlyStoppingConfig, LlmTrainingConfig
from ..files import atomic_text, json_text
from ..training.events import RunLabel
from .base import Base
from .conversations import encoder_of_run, ends_of_answers
from .directory import ADAPTER, CONFIG, MODEL, Leaves
from .models import codec_of_run
from .opening import RunData, find_tokenizer
from .settings import RUN_SECTIONS, DataConfig, RunConfig

if TYPE_CHECKING:
    from ..data.chat_dataset import ChatDataset
    from ..data.tokenizer import Tokenizer
    from ..formats.companions import Companions
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
    parts   of what is kept of conversations, those that show different things, evaluated at the end
    asked   where it is to leave what it has trained; None: in its directory
    """

    config: RunConfig
    train: RunData
    valid: RunData | None
    directory: Path
    opened: DataConfig
    base: Base | None = None
    parts: "Mapping[str, ChatDataset]" = field(default_factory=dict)
    asked: Leaves | None = None

    @property
    def leaves(self) -> Leaves:
        """Where it leaves what it has trained: RUN/model, and adapters in RUN/adapter, unless it was told otherwise."""
        if self.asked is not None:
            return self.asked
        return Leaves(self.directory / MODEL, None if self.config.lora is None else self.directory / ADAPTER)

    @property
    def steps(self) -> tuple[int, int]:
        """The optimizer steps of an epoch, and of the whole run."""
        return count_steps(self.config.training, self.train)

    @property
    def num_kept(self) -> int:
        """How many conversations or tokens are kept for validation, whatever they show."""
        kept = sum(map(len, self.parts.values()))
        return kept or (0 if self.valid is None else len(self.valid))

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

    def begin(self) -> tuple["Tokenizer | None", str]:
        """Write what a run needs to be begun again, config.yaml and the tokenizer; return that, and what is to be said
        about it.

        The settings come first: a run that is killed between the two is one already, and `resume` begins it again.
        """
        tokenizer, problem = self.find_tokenizer()
        self.write_config()
        if tokenizer is not None:
            if self.config.data.train_tokenizer:
                tokenizer.config["model_max_length"] = self.config.model.max_seq_len
            tokenizer.save(self.directory)
        return tokenizer, problem

    def manners(self) -> "Companions":
        """Return how a new model writes that has learned from conversations: generation_config.json."""
        from ..formats.companions import GENERATION, Companions
        from ..formats.deepzig import CALM_BELOW, generation_config

        encoder, shape = encoder_of_run(self.directory), self.config.model
        special = {role: getattr(encoder.tokenizer, f"{role}_id") for role in ("bos", "eos", "pad")}
        calm = shape.num_params() < CALM_BELOW
        ends = ends_of_answers(self.directory)
        content = generation_config(shape.max_seq_len, special, ends, calm)
        return Companions({GENERATION: json_text(content).encode()})

    def write_config(self) -> None:
        """Write the run's config.yaml: from here on it can be begun again, or gone on with."""
        atomic_text(self.directory / CONFIG, self.config.to_yaml(self.directory))

    def make_model(self) -> "TrainableModel | LoraModel":
        """Return the model that is trained: fresh weights or those of the base; with LoRA, adapters on them."""
        from ..model import LoraModel, TrainableModel

        shape, lora, base = self.config.model, self.config.lora, self.base
        if lora is None:
            return TrainableModel(shape) if base is None else base.make_model(shape)
        frozen = TrainableModel(shape) if base is None else base.make_frozen(shape, lora.kept_in)
        return LoraModel(frozen, lora.adapters(), base_model=None if base is None else base.place.absolute())

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
        trainer.exports = False  # the run does, of the weights that it leaves
        if self.base is not None:
            model.companions = self.base.companions(self.directory, self.train.conversations)
            trainer.state.evaluation_due = self.evaluates
        elif self.train.conversations:
            model.companions = self.manners()
        if checkpoint is not None:
            trainer.load_checkpoint(checkpoint)
            trainer.check_data(self.train)
        companions = companions_of_run(model.companions, self.config, self.directory, self.train.info)
        model.companions = companions.with_card(model_card(self, companions, ExportFormat.HF))
        codec = codec_of_run(self.directory, self.config.model.vocab_size)
        trainer.count_bytes = None if codec is None else codec.count_bytes
        return trainer
