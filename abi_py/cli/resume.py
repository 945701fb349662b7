"""`abi-train resume`: go on with a run as if it had never stopped."""

import dataclasses
import os
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..config import EarlyStoppingConfig, LlmTrainingConfig, TrainableModelConfig, joined
from ..errors import CheckpointError, ConfigError
from ..files import atomic_text
from ..formats.deepzig import TRAINING_ARGS
from ..training.schedule import ends, learning_rate, restarted, stretched
from .chat_data import ChatConfig, absolute_chat
from .models import ModelPath
from .opening import RunData, open_data
from .options import Verb, config_options, given_values
from .run import count_steps, start
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
    epochs_done,
    finished,
    has_checkpoint,
    has_report,
    hold,
    is_run,
    make_console,
    place_of_checkpoints,
    prepare,
    read_run_config,
    say,
    train,
)

if TYPE_CHECKING:
    from ..training.state import TrainingState

METRICS = "metrics.jsonl"
SCHEDULES = ("continue", "stretch", "restart")


@click.command(
    cls=Verb,
    example="abi-train resume runs/20260122-101500 --epochs 20",
    short_help="Go on with a run to its end.",
)
@click.argument("where", metavar="RUN|CHECKPOINT", type=ModelPath())
@click.option(
    "--schedule",
    type=click.Choice(SCHEDULES),
    help="what the learning rate does: continue (as it is), stretch (the same shape, to the run's new end) or restart "
    "(a new warm-up and decay from here); the run remembers it  [continue]",
)
@click.pass_context
def command(ctx: click.Context, where: Path, schedule: str | None, **_: Any) -> None:
    """Go on with a run to its end, with the same data and settings; flags change settings.

    RUN is the directory of a run, its directory of checkpoints, or one checkpoint; of several, the newest whole one is
    taken; a run that ended before its first one begins again. A run whose schedule has ended goes on at its minimum
    rate, unless --schedule says otherwise.
    """
    from ..training.checkpoint import list_checkpoints, locate, verify
    from ..training.state import TrainingState

    if where.is_file():
        raise ConfigError(_about_file(where))
    flags, console = given_values(ctx), make_console()
    given = flags.get("training", {})
    check_kind(where, flags)
    if is_run(where) and not has_checkpoint(where):
        check_never_saved(where)
        run, directory, before = changed(None, flags, where)
        prepare(run.training)
        with hold(directory, run.training, "RUN"):
            ctx.exit(begin_again(run, directory, console, Reschedule(schedule, before, given), flags))
    found = locate(place_of_checkpoints(where))
    there = list_checkpoints(found.path.parent)
    for problem in found.skipped:
        say(console, "note", f"passed over: {problem}")
    state = TrainingState.from_dict(verify(found.path)["state"])
    run, directory, before = changed(found.path, flags, where)
    check_targets(run.training, before, state)
    end = finished(state, run)
    if not has_report(directory, state) and is_run(directory):
        end = None  # the last evaluation, or the report, is still to come
    changes = [name for given in flags.values() for name in given] + (["schedule"] if schedule else [])
    if end is not None and changes:
        raise ConfigError(
            f"{', '.join(changes)}: without effect, because {end[0]}; add {end[1]} to go on, or leave out what changes "
            "nothing"
        )
    if end is not None:
        again = f"abi-train resume {shlex.quote(str(where))} {end[1]}"
        say(console, "finished", f"{end[0]}; nothing is left to do; to go on: {again}")
        return
    check_resumable(run, flags, state)
    prepare(run.training)
    reschedule = Reschedule(schedule, before, given)
    with hold(directory, run.training, "RUN"):
        if list_checkpoints(found.path.parent) != there:
            raise ConfigError(f"RUN ({where}) was written to while it was opened; try again")
        warn_of_pruning(run.training, directory, console)
        ctx.exit(go_on(run, directory, found.path, console, state.global_step, reschedule, flags))


config_options(RUN_SECTIONS, {name: {} for name in RUN_SECTIONS})(command)
for _param in command.params:  # here, what is not given stays as it was: the classes' defaults would be misleading
    if isinstance(_param, click.Option) and _param.help and "  [" in _param.help:
        _param.help = _param.help[: _param.help.rindex("  [")]


def _about_file(path: Path) -> str:
    with open(path, "rb") as file:
        magic = file.read(4)
    if magic not in (b"ABIC", b"ABLC"):
        return f"RUN ({path}) must be the directory of a run or of a checkpoint; this is a file of another kind"
    return (
        f"RUN ({path}) must be the directory of a run; this is a Zig {magic.decode()} file, which holds neither the "
        "model's shape nor its data: in Python, make the model with its configuration, then "
        f"LlamaTrainer(model, config).load_checkpoint({str(path)!r})"
    )


def check_kind(where: Path, flags: dict[str, dict[str, Any]]) -> None:
    """Raise ConfigError for a folder of `deepzig`, or a checkpoint in it: its settings are not those of a run."""
    here = where.absolute()
    folder = next((place for place in (here, *here.parents[:2]) if (place / TRAINING_ARGS).is_file()), None)
    if folder is not None and "data" not in flags and not is_run(where):
        raise ConfigError(
            f"RUN ({where}) must be a run of abi-train run, and this is one of deepzig; go on with it by abi-train "
            f"deepzig --resume --output-dir {shlex.quote(os.path.relpath(folder))}"
        )


def check_never_saved(directory: Path) -> None:
    """Raise CheckpointError if a run without checkpoints once had some: to begin again would replace its records."""
    metrics = directory / METRICS
    if metrics.is_file() and '"type": "checkpoint"' in metrics.read_text():
        raise CheckpointError(
            f"{place_of_checkpoints(directory)} holds no checkpoint, though the run in {directory} has saved some; put "
            f"them back, set checkpoint_path in {directory / 'config.yaml'} to where they are, or begin a new run"
        )


def changed(
    checkpoint: Path | None, flags: dict[str, dict[str, Any]], where: Path
) -> tuple[RunConfig, Path, LlmTrainingConfig]:
    """Return the run's configuration with the flags' changes, the run's directory, and its training without them.

    Without a checkpoint, `where` is the directory of a run.
    """
    directory, source = where, where
    if checkpoint is not None and not is_run(where):
        around = [place for place in (checkpoint.parent.parent, checkpoint.parent) if is_run(place)]
        around = [place for place in around if (place / METRICS).is_file()]  # else it is another config.yaml
        directory, source = (around[0], around[0]) if around else (checkpoint.parent, checkpoint)
    values = read_run_config(source / "config.yaml")
    if "data" not in values and "data" not in flags:
        raise _without_data(source)
    usual = values.setdefault("training", {}).get("checkpoint_path") or directory / "checkpoints"
    values["training"]["checkpoint_path"] = str(checkpoint.parent if checkpoint else usual)  # the run may have moved
    merged = {name: joined(cls, values.get(name, {}), flags.get(name, {})) for name, cls in RUN_SECTIONS.items()}
    asked = flags.get("early_stopping", {}), values.get("early_stopping", {})
    merged["early_stopping"] = early_stopping_values(*asked, {"enabled": False})
    run = RunConfig(
        model=TrainableModelConfig.from_dict(merged["model"]),
        training=LlmTrainingConfig.from_dict(merged["training"]),
        early_stopping=EarlyStoppingConfig.from_dict(merged["early_stopping"]),
        data=DataConfig.from_dict(absolute(merged["data"])),
        chat=ChatConfig.from_dict(absolute_chat(merged["chat"])) if values.get("chat") else None,
    )
    check_early_stopping(run.early_stopping, run.data.to_dict(), run.training.eval_interval)
    return run, directory, LlmTrainingConfig.from_dict(values["training"])


def _without_data(source: Path) -> CheckpointError:
    """Return the error for a run, or a checkpoint, whose config.yaml does not name the data."""
    run = next((place for place in (source.parent.parent, source.parent) if (place / METRICS).is_file()), None)
    if is_run(source):
        what, remedy = f"{source / 'config.yaml'} must name the data", "put its section data back"
    elif run is not None:
        what, remedy = f"{run / 'config.yaml'} is missing, which names the data", "put it back"
    else:
        what = f"{source} is outside of its run, whose config.yaml names the data"
        remedy = "put the checkpoint back into RUN/checkpoints"
    return CheckpointError(
        f"{what}; give --data (or --corpus-bytes for the standard library, and --valid-fraction), or {remedy}"
    )


def check_targets(config: LlmTrainingConfig, before: LlmTrainingConfig, state: "TrainingState") -> None:
    """Raise ConfigError for a new end of the run that is behind the checkpoint: it would become the run's record."""
    done, step = epochs_done(state), state.global_step
    if config.epochs != before.epochs and config.epochs <= done:
        raise ConfigError(
            f"epochs ({config.epochs}) must be above {done}, the epochs that are done (step {step}); give --epochs "
            f"{done + 1} or more"
        )
    if config.max_steps and config.max_steps != before.max_steps and config.max_steps <= step:
        raise ConfigError(
            f"max_steps ({config.max_steps}) must be above {step}, the steps done; give --max-steps {step + 1} "
            "or more, or 0 for no limit"
        )


def check_resumable(run: RunConfig, flags: dict[str, dict[str, Any]], state: "TrainingState") -> None:
    """Raise ConfigError for a flag that says again what the checkpoint has fixed: its value would have no effect."""
    if "seed" in flags.get("model", {}):
        raise ConfigError(
            f"seed ({run.model.seed}) of the model has no effect: the weights are the checkpoint's; leave it out"
        )
    if state.loss_scale and "initial_loss_scale" in flags.get("training", {}):
        raise ConfigError(
            f"initial_loss_scale ({run.training.initial_loss_scale:g}) has no effect: the checkpoint's loss "
            f"scale ({state.loss_scale:g}) goes on; leave it out"
        )


def warn_of_pruning(training: LlmTrainingConfig, directory: Path, console: Any) -> None:
    """Say so where saving would remove checkpoints outside of the run's directory, or somebody else's."""
    from ..training.checkpoint import removable

    root, keep = Path(training.checkpoint_path or directory), training.max_checkpoints
    inside = root.resolve().is_relative_to(directory.resolve())
    whose = "" if inside else f", outside of {directory}"
    if root.exists() and os.name == "posix" and root.stat().st_uid != os.getuid():
        whose += f", which is user {root.stat().st_uid}'s"
    doomed = len(removable(root, keep - 1)) if whose and keep else 0
    if doomed:
        say(
            console,
            "warning",
            f"checkpoints are saved in {root}{whose}, and only the {keep} newest and the best stay there: the next "
            f"save removes up to {doomed} of them; --checkpoint-path saves elsewhere, --max-checkpoints 0 keeps all",
        )


@dataclass(frozen=True)
class Reschedule:
    """What becomes of the learning-rate schedule: what was asked for, and what the run had before."""

    choice: str | None
    before: LlmTrainingConfig
    given: dict[str, Any]  # flags of the section

    def apply(self, config: LlmTrainingConfig, step: int, data: RunData) -> LlmTrainingConfig:
        """Return the training with the schedule that was chosen, at `step`; ConfigError if the choice has no effect."""
        total = count_steps(config, data)[1]
        if self.choice == "stretch":
            if "decay_steps" in self.given:
                raise ConfigError("schedule (stretch) works out decay_steps; leave one of the two flags out")
            return stretched(config, count_steps(self.before, data)[1], total)
        if self.choice == "restart":
            lengths = {"warmup": self.given.get("warmup_steps"), "decay": self.given.get("decay_steps")}
            return restarted(config, step, total, **lengths)
        if step < config.schedule_start:
            raise ConfigError(
                f"schedule must be given: the run began its schedule anew at step {config.schedule_start}, after this "
                f"checkpoint (step {step}); --schedule restart begins it here"
            )
        return config

    def describe(self, config: LlmTrainingConfig, step: int, data: RunData) -> list[tuple[str, str]]:
        """Return lines that tell the rate of the steps to come, and the other choices where it is the minimum."""
        total = count_steps(config, data)[1]
        peak = config.schedule_start + max(1, config.warmup_steps) - 1
        places = sorted({step, max(step, min(peak, total - 1)), max(step, total - 1)})
        lines = [("rate", ", ".join(f"{learning_rate(config, place):.3g} at step {place + 1}" for place in places))]
        end = config.schedule_start + config.decay_steps
        if not ends(config) or total <= end or self.choice == "continue":
            return lines
        higher = [f"stretch ({learning_rate(stretched(config, total, total), step):.3g} at step {step + 1})"]
        anew = restarted(config, step, total)
        higher.append(f"restart ({anew.learning_rate:.3g} at step {step + max(1, anew.warmup_steps)})")
        lines.append(
            (
                "note",
                f"the schedule ends at step {end} (decay_steps), the run at {total}: between them the rate is its "
                f"minimum, {config.min_learning_rate:.3g}; for more: --schedule {' or '.join(higher)}",
            )
        )
        return lines


def begin_again(
    run: RunConfig, directory: Path, console: Any, reschedule: Reschedule, flags: dict[str, dict[str, Any]]
) -> int:
    """Begin a run that ended before its first checkpoint, as it was meant to; return the exit code."""
    sizes = {"max_seq_len": run.training.max_seq_len, "seed": run.training.seed}
    train_data, valid, _ = open_data(run.data, run.chat or ChatConfig(), run.model.vocab_size, **sizes)
    check_use(run, flags, valid)
    run = dataclasses.replace(run, training=reschedule.apply(run.training, 0, train_data))
    say(console, "note", f"{directory} ended before its first checkpoint; it begins again")
    return start(run, directory, train_data, valid, console)


def go_on(
    run: RunConfig,
    directory: Path,
    checkpoint: Path,
    console: Any,
    step: int,
    reschedule: Reschedule,
    flags: dict[str, dict[str, Any]],
) -> int:
    """Load the checkpoint and train to the end; return the exit code."""
    from ..model import TrainableModel
    from ..training.trainer import LlamaTrainer

    sizes = {"max_seq_len": run.training.max_seq_len, "seed": run.training.seed}
    train_data, valid, _ = open_data(run.data, run.chat or ChatConfig(), run.model.vocab_size, **sizes)
    check_use(run, flags, valid)
    run = dataclasses.replace(run, training=reschedule.apply(run.training, step, train_data))
    say(console, "machine", describe_machine(run.training.mixed_precision))
    say(console, "model", describe_model(run.model))
    say(console, "data", describe_data(train_data, valid))
    trainer = LlamaTrainer(TrainableModel(run.model), run.training)
    trainer.load_checkpoint(checkpoint)
    trainer.check_data(train_data)  # before the run's config.yaml is replaced
    for label, text in reschedule.describe(run.training, step, train_data):
        say(console, label, text)
    atomic_text(directory / "config.yaml", run.to_yaml(directory))
    return train(trainer, run, directory, train_data, valid, console)
