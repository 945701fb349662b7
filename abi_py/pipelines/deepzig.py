"""A DeepZig run: conversations in, a finished model folder out.

    conversations   read, mixed and cut by seed; a part is kept for evaluation
    tokenizer       byte-level BPE of the training part, or that of the model to go on from
    training        loss on the answers, evaluation every N steps and at the end, the best weights taken at the end
    folder          `formats/deepzig.py`; with LoRA the adapters too, and the weights with the adapters merged

What is kept for evaluation has up to two parts (`holdout.py`): questions whose answers were told in training, and
conversations that are new.  Both are evaluated at the end, on the weights that are exported.  During training the loss
on all of them decides which weights are the best; of the package's own data, which a model learns by heart, the loss on
the first part alone.
"""

import dataclasses
import itertools
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
from ..data.tokenizer import FILES as TOKENIZER_FILES
from ..data.tokenizer import TOKENIZER_FILE, Tokenizer
from ..data.tokenizer_training import train_tokenizer
from ..errors import ConfigError, DataError
from ..files import atomic_json, json_text
from ..files import check_free as check_no_files
from ..formats.deepzig import TRAINING_ARGS, generation_config, write_model
from ..formats.huggingface import CONFIG, WEIGHTS, read_config, read_weights
from ..generation.settings import CONFIG_FILE as GENERATION_FILE
from ..locks import DirectoryLock
from ..model import LoraModel, TrainableModel
from ..model.presets import preset
from ..training.events import Sink
from ..training.metrics import METRICS
from ..training.report import REPORT, EvalResult, TrainingReport
from ..training.resume import restore_best
from ..training.stop import GracefulStop
from ..training.trainer import LlamaTrainer
from ..training.trainer_state import TRAINER_STATE, TrainerStateSink
from ..untrusted import read_json
from .deepzig_card import model_card
from .deepzig_config import LORA_ALPHA, LORA_DROPOUT, SHIPPED, DeepZigConfig
from .holdout import Holdout, hold_out
from .training_args import training_args

__all__ = ["DeepZigRun", "load_run_config", "train_deepzig"]

ADAPTER, CARD, EVALUATION = "adapter", "README.md", "evaluation.json"  # inside the output folder
CHECKPOINTS = "checkpoints"
# All that is written into the output folder, by the training and at its end; what shows a run best comes first.
WRITTEN = (
    *(CONFIG, WEIGHTS, TRAINING_ARGS, CHECKPOINTS, TRAINER_STATE, METRICS, REPORT, *TOKENIZER_FILES),
    *(GENERATION_FILE, EVALUATION, CARD, ADAPTER),
)
CALM_BELOW = 2_000_000  # weights; a smaller model's generation_config.json draws close to the likeliest token


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
                loss_on=config.loss_on,
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
        config, model = self.config, TrainableModel(self.shape)
        if config.base is not None:
            read_weights(Path(config.base), model)
        if not config.use_lora:
            return model
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

    # -- the end ---------------------------------------------------------------------------------

    def finish(self, trainer: LlamaTrainer, report: TrainingReport) -> tuple[TrainableModel, dict[str, EvalResult]]:
        """Put the best weights back, evaluate each part, write the folder; return its model (adapters merged), results.

        OSError if something cannot be written; the checkpoints are there all the same.
        """
        if report.best_checkpoint is not None and trainer.state.best_step != trainer.state.global_step:
            restore_best(trainer.model, trainer.optimizer, Path(report.best_checkpoint))
        model = trainer.model
        results = {name: trainer.evaluate(part) for name, part in self.parts.items()}
        if isinstance(model, LoraModel):
            model.save(self.directory / ADAPTER)
            model = model.merged()
        special = {role: getattr(self.tokenizer, f"{role}_id") for role in ("bos", "eos", "pad")}
        asked = next(filter(None, map(_asked, self.selection.conversations)), [])
        stop_ids = self.template.encoder(self.tokenizer).stop_ids(asked)
        calm = model.num_params() < CALM_BELOW
        settings = generation_config(self.shape.max_seq_len, special, stop_ids, calm)
        texts = {
            GENERATION_FILE: json_text(settings),
            EVALUATION: json_text({name: self.figures(name, result) for name, result in results.items()}),
            CARD: model_card(self, model.num_params(), report, results),
        }
        write_model(self.directory, model, special, texts)
        return model, results

    def figures(self, name: str, result: EvalResult) -> dict[str, Any]:
        """Return the result of an evaluation part as plain values."""
        return {
            "conversations": len(self.parts[name]),
            "loss": result.loss,
            "perplexity": result.perplexity,
            "accuracy": result.accuracy,
        }


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
    """Raise ConfigError if a folder holds a model, a run that is not to be resumed, or a file of a name we write."""
    folder, remedy = shlex.quote(str(directory)), "choose another"
    if is_finished(directory):
        remedy += f" (it holds a finished run: go on from it with --base {folder})"
    elif (directory / TRAINING_ARGS).exists():
        remedy += f", or go on with the interrupted run by abi-train deepzig --resume --output-dir {folder}"
    check_no_files(directory, (CONFIG,) if resume else WRITTEN, "output_dir", remedy)


def is_finished(directory: Path) -> bool:
    """Say whether a folder holds a model: the one that a run there was begun for."""
    return (directory / CONFIG).exists() and (directory / WEIGHTS).exists()


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
