"""`abi-train run`: train a model from scratch, on your data or on text that every machine has."""

import shlex
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..config import EarlyStoppingConfig, LearningRateSchedule, LlmTrainingConfig, TrainableModelConfig, joined
from ..errors import ConfigError, counted
from ..files import atomic_text
from ..files import check_free as check_no_files
from ..locks import check_unlocked
from ..training.schedule import ends, learning_rate
from .chat_data import ChatConfig, absolute_chat
from .opening import find_tokenizer, open_data
from .options import Verb, config_options, given_values
from .session import (
    RUN_SECTIONS,
    DataConfig,
    RunConfig,
    absolute,
    check_early_stopping,
    check_use,
    describe_data,
    describe_machine,
    describe_model,
    early_stopping_values,
    has_checkpoint,
    hold,
    is_byte_level,
    is_run,
    make_console,
    note_on_length,
    prepare,
    read_run_config,
    run_files,
    say,
    train,
)

if TYPE_CHECKING:
    from .opening import RunData

# What `run` does when it is told nothing; everything else has the default of its config class.
DEFAULTS: dict[str, dict[str, Any]] = {
    "model": {"hidden_dim": 96, "num_layers": 4, "num_heads": 4, "num_kv_heads": 2, "intermediate_dim": 256},
    "training": {
        "batch_size": 8,
        "max_seq_len": 128,
        "grad_accum_steps": 1,
        "learning_rate": 3e-3,
        "weight_decay": 0.1,
    },
    "early_stopping": {"enabled": False},
    "data": {},
    "chat": {},
}
# Worked out from the others when not given; the text is what the help shows.
DERIVED = {
    "model": {
        "vocab_size": "that of the tokenizer; 257 for text as bytes; else largest id + 1",
        "max_seq_len": "that of the training",
    },
    "training": {
        "decay_steps": "steps of the whole run",
        "warmup_steps": "warmup_cosine: 5% of them, at most 100; else 0",
        "min_learning_rate": "learning_rate / 10",
        "checkpoint_interval": "an epoch, at most 1000",
        "eval_interval": "an epoch, at most 500",
        "checkpoint_path": "OUT/checkpoints",
    },
}
SHOWN = {section: {**DEFAULTS[section], **DERIVED.get(section, {})} for section in DEFAULTS}


@click.command(
    cls=Verb,
    example="abi-train run --data texts/ --epochs 3",
    short_help="Train a model; needs no arguments.",
)
@click.option("--out", type=click.Path(path_type=Path, file_okay=False), help="directory of the run  [runs/DATE-TIME]")
@click.option("--config", type=click.Path(path_type=Path, exists=True, dir_okay=False), help="YAML file; flags beat it")
@click.option("--dry-run", is_flag=True, help="show the plan (memory, steps, time) and stop; nothing is written")
@click.pass_context
def command(ctx: click.Context, out: Path | None, config: Path | None, dry_run: bool, **_: Any) -> None:
    """Train a model from scratch and keep everything in one directory.

    Without arguments: ten epochs of a small byte-level model on the help pages of Python's standard library,
    about a minute. Text is read as bytes, or with --tokenizer; a .bin file holds u32 token ids (abi-train tokenize
    makes one); of a .jsonl, .json or .parquet file of conversations the answers are learned (abi-train preview shows
    which).
    """
    from ..training.checkpoint import check_unused

    flags = given_values(ctx)
    file = read_run_config(config) if config else {}
    begun_anew = file.get("training", {}).pop("schedule_start", 0)  # at a step of the run whose file this is
    values = merged(flags, file)
    check_early(values, flags)
    if out is not None:
        check_unlocked(out, "out")
        check_free(out)
    if values["training"].get("checkpoint_path"):
        check_unused(values["training"]["checkpoint_path"])
    console = make_console()
    if begun_anew:
        say(console, "note", f"schedule_start ({begun_anew}) of {config} is left out: a new run begins at step 0")
    data = DataConfig.from_dict(absolute(values["data"]), flags.get("data", ()))
    chat = ChatConfig.from_dict(absolute_chat(values["chat"]))
    training = early_training(values["training"])
    train_data, valid, vocab_size = open_data(
        data, chat, values["model"].get("vocab_size"), max_seq_len=training.max_seq_len, seed=training.seed
    )
    values["chat"] = chat.to_dict()
    values["model"]["vocab_size"] = vocab_size
    checked = complete(values, data, train_data, valid, Path("OUT"))  # raises every error that can be found
    check_use(checked, flags, valid)
    check_samples(checked, train_data, valid)
    prepare(checked.training)
    if dry_run:
        from .plan import show_plan

        show_plan(checked, train_data, valid, console)
        return
    describe_machine()  # before there is a directory
    directory = out if out is not None else new_directory()
    run = complete(values, data, train_data, valid, directory)
    with hold(directory, run.training, "out"):
        check_free(directory)  # once more: another run may have begun there since
        ctx.exit(start(run, directory, train_data, valid, console))


config_options(RUN_SECTIONS, SHOWN)(command)


def check_samples(run: RunConfig, train_data: "RunData", valid: "RunData | None") -> None:
    """Raise ConfigError if samples are asked for and there would be none."""
    if not run.data.sample_prompts:
        return
    if valid is None or run.training.eval_interval == 0:
        raise ConfigError("sample_prompts must come with evaluations; set valid_fraction and eval_interval above 0")
    if not is_byte_level(run.model) and find_tokenizer(run.data, run.chat, train_data)[0] is None:
        raise ConfigError(
            f"sample_prompts must be left out: {', '.join(run.data.path)} has ids without a text of their own; give "
            "--tokenizer"
        )


def merged(flags: dict[str, dict[str, Any]], file: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Return the values by section: flag beats file beats the defaults of this verb."""
    values = {
        name: joined(RUN_SECTIONS[name], {**DEFAULTS[name], **file.get(name, {})}, flags.get(name, {}))
        for name in DEFAULTS
    }
    asked = flags.get("early_stopping", {}), file.get("early_stopping", {})
    values["early_stopping"] = early_stopping_values(*asked, DEFAULTS["early_stopping"])
    return values


def check_early(values: dict[str, dict[str, Any]], flags: dict[str, dict[str, Any]]) -> None:
    """Raise ConfigError for what is wrong, or a flag without effect, whatever the data: before they are opened."""
    training = early_training(values["training"])
    training.require_acting(flags.get("training", ()))
    model = TrainableModelConfig.from_dict(
        {"vocab_size": 257, "max_seq_len": training.max_seq_len, **values["model"]}, flags.get("model", ())
    )
    if training.max_seq_len > model.max_seq_len:
        raise ConfigError(
            f"max_seq_len ({training.max_seq_len}) of the training must not exceed the model's ({model.max_seq_len}); "
            "leave --model-max-seq-len out"
        )
    early = EarlyStoppingConfig.from_dict(values["early_stopping"], flags.get("early_stopping", ()))
    check_early_stopping(early, values["data"], values["training"].get("eval_interval"))


def early_training(values: dict[str, Any]) -> LlmTrainingConfig:
    """Return the training with what `complete` works out later at values that break no rule together with the rest."""
    rate = values.get("learning_rate", 1e-5)
    derived: dict[str, Any] = {
        "decay_steps": max(10_000, int(values.get("warmup_steps", 0) or 0)),
        "warmup_steps": 0,
        "min_learning_rate": 0.0 if rate > 0 else rate,
        "checkpoint_path": "OUT/checkpoints",
    }
    given = {name: value for name, value in values.items() if value is not None}
    return LlmTrainingConfig.from_dict({**derived, **given})


def complete(
    values: dict[str, dict[str, Any]],
    data: DataConfig,
    train_data: "RunData",
    valid: "RunData | None",
    directory: Path,
) -> RunConfig:
    """Fill in what follows from the rest: intervals and schedule from the number of steps, paths from the directory."""
    from ..data.chat_dataset import ChatDataset

    training = values["training"]
    base = early_training(training)
    epoch, total = count_steps(base, train_data)
    decay = training.get("decay_steps", total)
    derived: dict[str, Any] = {
        "checkpoint_interval": min(epoch, 1000),
        "eval_interval": min(epoch, 500) if valid is not None else 0,
        "checkpoint_path": str(directory / "checkpoints"),
    }
    if base.lr_schedule is LearningRateSchedule.WARMUP_COSINE:
        derived["warmup_steps"] = min(100, total // 20, int(decay))
    if base.lr_schedule is not LearningRateSchedule.CONSTANT:
        derived |= {"decay_steps": decay, "min_learning_rate": base.learning_rate / 10}
    chat = ChatConfig.from_dict(values["chat"])  # of rows of texts, only what is bad is left out
    return RunConfig(
        model=TrainableModelConfig.from_dict({"max_seq_len": base.max_seq_len, **values["model"]}),
        training=LlmTrainingConfig.from_dict(
            {**derived, **{name: value for name, value in training.items() if value is not None}}
        ),
        early_stopping=EarlyStoppingConfig.from_dict(values["early_stopping"]),
        data=data,
        chat=chat if chat.skip_bad_rows or isinstance(train_data, ChatDataset) else None,
    )


def count_steps(config: LlmTrainingConfig, data: "RunData") -> tuple[int, int]:
    """Return the optimizer steps of an epoch, and of the whole run."""
    batches = max(1, data.num_batches(config.batch_size, config.max_seq_len, drop_last=False))
    epoch = -(-batches // config.grad_accum_steps)
    total = epoch * config.epochs
    return epoch, min(total, config.max_steps) if config.max_steps else total


def note_on_schedule(config: LlmTrainingConfig, total: int) -> str | None:
    """Return what to say where the decay, given by a flag or a file, and the run do not end together, else None."""
    end = config.schedule_start + config.decay_steps
    if not ends(config) or end == total:
        return None
    least, last = f"{config.min_learning_rate:.3g}", learning_rate(config, total - 1)
    what = f"between them the rate is its minimum, {least}"
    if end > total:
        what = f"the last rate is {last:.3g}, not {least}"
    return (
        f"the schedule ends at step {end} (decay_steps), the run at {total}: {what}; --decay-steps "
        f"{total - config.schedule_start} ends both together"
    )


def check_free(directory: Path) -> None:
    """Raise ConfigError if a directory holds a run already, or another file of a name that a run writes."""
    remedy = "choose another"
    if is_run(directory) or has_checkpoint(directory):
        remedy += f", or go on with it by abi-train resume {shlex.quote(str(directory))}"
    check_no_files(directory, run_files(), "out", remedy)


def new_directory() -> Path:
    """Return the first free name of runs/DATE-TIME, runs/DATE-TIME-2 ..."""
    stem = time.strftime("%Y%m%d-%H%M%S")
    number = 1
    while True:
        directory = Path("runs") / (stem if number == 1 else f"{stem}-{number}")
        try:
            directory.mkdir(parents=True)
        except FileExistsError:
            number += 1
        else:
            return directory


def start(
    run: RunConfig,
    directory: Path,
    train_data: "RunData",
    valid: "RunData | None",
    console: Any,
) -> int:
    """Make the model and train it, in a directory that is held; return the exit code."""
    from ..data.chat_dataset import ChatDataset
    from ..model import TrainableModel
    from ..training.trainer import LlamaTrainer

    epoch, total = count_steps(run.training, train_data)
    tokens = run.training.batch_size * run.training.max_seq_len * run.training.grad_accum_steps
    most = "at most " if isinstance(train_data, ChatDataset) else ""
    say(console, "machine", describe_machine(run.training.mixed_precision))
    say(console, "model", describe_model(run.model))
    say(console, "data", describe_data(train_data, valid))
    steps = f"{counted(total, 'step')} of {most}{tokens:,} tokens ({epoch:,} an epoch)"
    say(console, "plan", f"{counted(run.training.epochs, 'epoch')}, {steps}; run in {directory}")
    tokenizer, problem = find_tokenizer(run.data, run.chat, train_data)
    if tokenizer is not None:
        tokenizer.save(directory)
        say(console, "ids of", f"{tokenizer.name}, kept in {directory}")
    for text in (problem, note_on_length(train_data, run.training.max_seq_len), note_on_schedule(run.training, total)):
        if text:
            say(console, "note", text)
    atomic_text(directory / "config.yaml", run.to_yaml(directory))  # from here on `resume` can begin it again
    trainer = LlamaTrainer(TrainableModel(run.model), run.training)
    return train(trainer, run, directory, train_data, valid, console)
