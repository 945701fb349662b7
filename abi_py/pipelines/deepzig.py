"""A DeepZig run: conversations in, a finished model folder out.

    conversations   read, mixed and cut by seed; a part is kept for evaluation
    tokenizer       byte-level BPE of the training part, or that of the model to go on from
    training        loss on the answers, evaluation every N steps and at the end, the best weights taken at the end
    folder          `formats/deepzig.py`; with LoRA the adapters too, and the weights with the adapters merged

Of the package's own data those rows are kept for evaluation first that ask again, in other words, what another row
answers (category "again").  So the loss tells whether the model knows the answer, not whether it guesses one that it
was never told.
"""

import dataclasses
import itertools
import math
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..config import CheckpointingStrategy, LlmTrainingConfig, LoraConfig, TrainableModelConfig
from ..data.chat import ChatTemplate, load_template, template_for
from ..data.chat_dataset import ChatDataset
from ..data.conversation import Conversation
from ..data.selection import Selection, select_conversations
from ..data.tokenizer import TOKENIZER_FILE, Tokenizer
from ..data.tokenizer_training import train_tokenizer
from ..errors import ConfigError, DataError
from ..formats.deepzig import TRAINING_ARGS, generation_config, json_text, write_json, write_model
from ..formats.huggingface import CONFIG, read_config, read_weights
from ..generation.settings import CONFIG_FILE as GENERATION_FILE
from ..locks import DirectoryLock
from ..model import LoraModel, TrainableModel
from ..model.presets import preset
from ..training.events import Sink
from ..training.report import TrainingReport
from ..training.resume import restore_best
from ..training.stop import GracefulStop
from ..training.trainer import LlamaTrainer
from ..training.trainer_state import TRAINER_STATE, TrainerStateSink
from ..untrusted import read_json
from .deepzig_card import model_card
from .deepzig_config import LORA_ALPHA, LORA_DROPOUT, SHIPPED, DeepZigConfig
from .training_args import training_args

__all__ = ["DeepZigRun", "load_run_config", "train_deepzig"]

ADAPTER, CARD, CHECKPOINTS = "adapter", "README.md", "checkpoints"  # inside the output folder
AGAIN = "again"
CALM_BELOW = 2_000_000  # weights; a smaller model's generation_config.json draws close to the likeliest token


@dataclass
class DeepZigRun:
    """Everything that a run is made of, ready to be trained."""

    config: DeepZigConfig  # resolved
    directory: Path
    selection: Selection
    train: ChatDataset
    valid: ChatDataset | None
    held_out: list[Conversation]
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
        train, held_out = _split(selection.conversations, config)
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
            tokenizer, template = _new_tokenizer(train, preset(size).vocab_size)
            shape = preset(size, vocab_size=tokenizer.vocab_size, seed=config.seed)
            tokenizer.config["model_max_length"] = shape.max_seq_len
        shape = _for_training(shape, config)
        encoded = [
            ChatDataset.encode(
                part,
                template,
                tokenizer,
                max_seq_len=config.max_seq_len,
                loss_on=config.loss_on,
                skip_bad_rows=config.skip_bad_rows,
                name=name,
            )
            for part, name in ((train, _names(config)), (held_out, "the evaluation part"))
            if part
        ]
        data, valid = encoded[0], encoded[1] if held_out else None
        batches = data.num_batches(config.batch_size or 1)
        steps = -(-batches // (config.grad_accum_steps or 1))
        directory = Path(config.output_dir or "")
        training = config.training(steps * (config.epochs or 1), directory, valid is not None)
        return cls(config, directory, selection, data, valid, held_out, tokenizer, template, shape, training, steps)

    # -- the model -------------------------------------------------------------------------------

    def make_model(self) -> TrainableModel | LoraModel:
        """Return the model to train: fresh weights or those of `base`; with LoRA, adapters on it."""
        config, model = self.config, TrainableModel(self.shape)
        if config.base is not None:
            read_weights(Path(config.base), model)
        if not config.use_lora:
            return model
        lora = LoraConfig(rank=config.lora_rank, alpha=LORA_ALPHA, dropout=LORA_DROPOUT, seed=config.seed)
        return LoraModel(model, lora, base_model=config.base)

    def make_trainer(self, sinks: Sequence[Sink] = ()) -> LlamaTrainer:
        """Write what a resumed run needs (settings, tokenizer) and return the trainer."""
        self.directory.mkdir(parents=True, exist_ok=True)
        self.tokenizer.save(self.directory)
        write_json(self.directory / TRAINING_ARGS, training_args(self.config, self.training))
        trainer = LlamaTrainer(self.make_model(), self.training, [self.state_sink(), *sinks])
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

    # -- the end ---------------------------------------------------------------------------------

    def finish(self, trainer: LlamaTrainer, report: TrainingReport) -> TrainableModel:
        """Put the best weights back, write the folder, and return the model in it (adapters merged).

        OSError if something cannot be written; the checkpoints are there all the same.
        """
        if report.best_checkpoint is not None and trainer.state.best_step != trainer.state.global_step:
            restore_best(trainer.model, trainer.optimizer, Path(report.best_checkpoint))
        model = trainer.model
        if isinstance(model, LoraModel):
            model.save(self.directory / ADAPTER)
            model = model.merged()
        special = {role: getattr(self.tokenizer, f"{role}_id") for role in ("bos", "eos", "pad")}
        asked = next(filter(None, map(_asked, self.selection.conversations)), [])
        stop_ids = self.template.encoder(self.tokenizer).stop_ids(asked)
        calm = model.num_params() < CALM_BELOW
        settings = generation_config(self.shape.max_seq_len, special, stop_ids, calm)
        texts = {GENERATION_FILE: json_text(settings), CARD: model_card(self, model.num_params(), report)}
        write_model(self.directory, model, special, texts)
        return model


def _asked(conversation: Conversation) -> list[dict[str, Any]]:
    """Return the turns before the first answer."""
    return list(itertools.takewhile(lambda turn: turn["role"] != "assistant", conversation.to_dicts()))


def train_deepzig(
    config: DeepZigConfig | None = None, sinks: Sequence[Sink] = (), stop: GracefulStop | None = None
) -> tuple[TrainingReport, Path]:
    """Train as `config` says (default: the test preset on the shipped data); return the report and the folder.

    Stopped by `stop`, the folder holds checkpoints and no model yet.
    """
    run = DeepZigRun.prepare(config or DeepZigConfig())
    with DirectoryLock(run.directory, "output_dir"):
        check_free(run.directory)
        trainer = run.make_trainer(sinks)
        report = trainer.fit(run.train, run.valid, None, stop)
        if not report.interrupted:
            run.finish(trainer, report)
    return report, run.directory


def check_free(directory: Path, resume: bool = False) -> None:
    """Raise ConfigError if a folder holds a model, or a run that is not to be resumed."""
    if (directory / CONFIG).exists():
        raise ConfigError(
            f"output_dir ({directory}) must not hold a model or a run yet, and it holds a finished run; choose "
            f"another, and go on from this one with --base {directory}"
        )
    there = [name for name in (TRAINING_ARGS, CHECKPOINTS) if (directory / name).exists()]
    if there and not resume:
        raise ConfigError(
            f"output_dir ({directory}) must not hold a model or a run yet, and there is {there[0]}; choose another, or "
            f"go on with the interrupted run by abi-train deepzig --resume --output-dir {shlex.quote(str(directory))}"
        )


def load_run_config(directory: Path) -> DeepZigConfig:
    """Return the settings with which a run was begun in `directory`; ConfigError if there is none."""
    file = directory / TRAINING_ARGS
    remedy = "it is damaged; begin a new run with another --output-dir"
    try:
        values = read_json(file, {"abi_py": dict[str, Any]}, error=ConfigError, remedy=remedy)["abi_py"]
    except FileNotFoundError:
        raise ConfigError(f"output_dir ({directory}) has no {TRAINING_ARGS}, so no run to go on with") from None
    return DeepZigConfig.from_dict({**values, "output_dir": str(directory)})


# -- data and tokenizer ------------------------------------------------------------------------


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


def _split(rows: list[Conversation], config: DeepZigConfig) -> tuple[list[Conversation], list[Conversation]]:
    """Return the conversations to train on and those kept for evaluation: the last ones, which are as mixed as all."""
    if config.eval_split == 0:
        return rows, []
    if len(rows) < 2:
        raise DataError(f"{_names(config)}: one conversation cannot be split; give more, or --eval-split 0")
    count = min(len(rows) - 1, math.ceil(round(config.eval_split * len(rows), 9)))
    if config.on_shipped_data:
        rows = sorted(rows, key=lambda row: row.category == AGAIN)  # stable: the others keep their order
    return rows[:-count], rows[-count:]


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
