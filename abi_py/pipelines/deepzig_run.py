"""A DeepZig run, ready to be trained: conversations, tokenizer, template, model, settings.

    conversations   read, mixed and cut by seed; a part is kept for evaluation
    tokenizer       byte-level BPE of the training part, or that of the model to go on from

What is kept for evaluation has up to two parts (`holdout.py`): questions whose answers were told in training, and
conversations that are new.  During training the loss on all of them decides which weights are the best; of the
package's own data, which a model learns by heart, the loss on the first part alone.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ..config import CheckpointingStrategy, LlmTrainingConfig, LoraConfig, TrainableModelConfig
from ..data.chat import ChatTemplate, load_template, template_for
from ..data.chat_dataset import ChatDataset
from ..data.conversation import Conversation
from ..data.selection import Selection, select_conversations
from ..data.tokenizer import TOKENIZER_FILE, Tokenizer
from ..data.tokenizer_training import train_tokenizer
from ..errors import ConfigError, DataError
from ..files import atomic_json
from ..formats.deepzig import TRAINING_ARGS
from ..model import LoraModel, TrainableModel
from ..model.folder import read_config
from ..model.frozen import read_frozen
from ..model.presets import preset
from ..training.events import Sink
from ..training.trainer import LlamaTrainer
from ..training.trainer_state import TRAINER_STATE, TrainerStateSink
from .deepzig_config import LORA_ALPHA, LORA_DROPOUT, SHIPPED, DeepZigConfig
from .holdout import Holdout, hold_out
from .training_args import training_args

__all__ = ["DeepZigRun"]


@dataclass
class DeepZigRun:
    """Everything that a run is made of, ready to be trained."""

    config: DeepZigConfig  # resolved
    directory: Path
    selection: Selection
    train: ChatDataset
    valid: ChatDataset | None  # its loss decides which weights are the best
    held_out: Holdout
    parts: dict[str, ChatDataset]  # "told" and "new", if there are such rows: evaluated at the end
    tokenizer: Tokenizer
    template: ChatTemplate
    shape: TrainableModelConfig
    training: LlmTrainingConfig
    steps_per_epoch: int

    @classmethod
    def prepare(cls, config: DeepZigConfig) -> "DeepZigRun":
        """Read data and tokenizer and work out every setting; nothing is written and no model made.

        ConfigError, DataError, CheckpointError or OSError for what is wrong with settings, data, base.
        """
        shape = read_config(_base_folder(config.base)) if config.base else None
        config = config.resolved(shape)
        selection = select_conversations(
            [str(SHIPPED)] if config.on_shipped_data else list(config.data),
            skip_bad_rows=config.skip_bad_rows,
            max_samples=config.max_samples,
            seed=config.seed,
        )
        shipped = config.on_shipped_data
        held_out = hold_out(selection.conversations, config.eval_split, both=shipped, name=_names(config))
        if config.base is not None and shape is not None:
            tokenizer = Tokenizer.load(config.base)
            template = template_for(tokenizer)
            if tokenizer.vocab_size > shape.vocab_size:
                raise DataError(
                    f"{config.base}: its tokenizer has {tokenizer.vocab_size} ids, its model {shape.vocab_size}; the "
                    "two do not belong together"
                )
        else:
            size = config.model_size.value if config.model_size else "test"
            tokenizer, template = _new_tokenizer(held_out.train, preset(size).vocab_size)
            shape = preset(size, vocab_size=tokenizer.vocab_size, seed=config.seed)
            tokenizer.config["model_max_length"] = shape.max_seq_len
        shape = _for_training(shape, config)

        def encode(rows: list[Conversation], name: str) -> ChatDataset:
            return ChatDataset.encode(
                rows,
                template,
                tokenizer,
                max_seq_len=config.max_seq_len,
                loss_on=config.loss_on.value,
                skip_bad_rows=config.skip_bad_rows,
                name=name,
            )

        data = encode(held_out.train, _names(config))
        data.stats.bad[:0] = selection.skipped
        named = {"told": held_out.told, "new": held_out.new}
        parts = {name: encode(rows, f"the evaluation part ({name})") for name, rows in named.items() if rows}
        valid = None
        if parts:
            by_heart = shipped and "told" in parts
            valid = parts["told"] if by_heart else encode(held_out.kept, "the evaluation part")
        batches = data.num_batches(config.batch_size or 1)
        steps = -(-batches // (config.grad_accum_steps or 1))
        directory = Path(config.output_dir or "")
        training = config.training(steps * (config.epochs or 1), directory, valid is not None)
        given = config, directory, selection, data, valid, held_out, parts
        return cls(*given, tokenizer, template, shape, training, steps)

    # -- the model -------------------------------------------------------------------------------

    def make_model(self) -> TrainableModel | LoraModel:
        """Return the model to train: fresh weights or those of `base`; with LoRA, adapters on it."""
        config, base = self.config, Path(self.config.base) if self.config.base is not None else None
        if not config.use_lora:
            return TrainableModel(self.shape) if base is None else TrainableModel.from_pretrained(base, self.shape)
        model = TrainableModel(self.shape) if base is None else read_frozen(base, self.shape)
        lora = LoraConfig(rank=config.lora_rank, alpha=LORA_ALPHA, dropout=LORA_DROPOUT, seed=config.seed)
        return LoraModel(model, lora, base_model=config.base)

    def make_trainer(self, sinks: Sequence[Sink] = ()) -> LlamaTrainer:
        """Write what a resumed run needs (settings, tokenizer) and return the trainer."""
        trainer = LlamaTrainer(self.make_model(), self.training, [self.state_sink(), *sinks])
        self.directory.mkdir(parents=True, exist_ok=True)
        atomic_json(self.directory / TRAINING_ARGS, training_args(self.config, self.training))
        self.tokenizer.save(self.directory)
        trainer.count_bytes = self.tokenizer.count_bytes
        return trainer

    def state_sink(self) -> TrainerStateSink:
        """Return the writer of trainer_state.json."""
        training = self.training
        return TrainerStateSink(
            self.directory / TRAINER_STATE,
            steps_per_epoch=self.steps_per_epoch,
            rows=len(self.train),
            valid_rows=len(self.valid) if self.valid is not None else 0,
            input_tokens=self.train.num_tokens - len(self.train),
            batch_size=training.batch_size,
            logging_steps=training.log_interval,
            eval_steps=training.eval_interval,
            save_steps=training.checkpoint_interval,
        )


def _base_folder(base: str) -> Path:
    folder = Path(base)
    for name in ("config.json", TOKENIZER_FILE):
        if not (folder / name).is_file():
            raise ConfigError(
                f"base ({base}) must be the folder of a trained model, and there is no {name} in it; give the output "
                "folder of an earlier run"
            )
    return folder


def _names(config: DeepZigConfig) -> str:
    return "the shipped conversations" if config.on_shipped_data else ", ".join(config.data)


def _new_tokenizer(rows: list[Conversation], vocab_size: int) -> tuple[Tokenizer, ChatTemplate]:
    template = load_template("deepzig")
    tokenizer = train_tokenizer((text for row in rows for text in row.strings()), vocab_size)
    tokenizer.chat_template = template.portable_source
    return tokenizer, template


def _for_training(shape: TrainableModelConfig, config: DeepZigConfig) -> TrainableModelConfig:
    if config.max_seq_len > shape.max_seq_len:
        raise ConfigError(
            f"max_seq_len ({config.max_seq_len}) must not exceed the model's context ({shape.max_seq_len}); lower it"
        )
    strategy = CheckpointingStrategy.FULL if config.gradient_checkpointing else CheckpointingStrategy.NONE
    return dataclasses.replace(shape, checkpointing=strategy)
