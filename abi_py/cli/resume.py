"""`abi-train resume`: go on with a run as if it had never stopped."""

import dataclasses
import functools
import os
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..errors import ConfigError
from ..formats.deepzig import TRAINING_ARGS
from ..runs.directory import has_checkpoint, has_report, hold, is_run, place_of_checkpoints
from ..runs.opening import open_data
from ..runs.resolve import check_use, prepare
from ..runs.resuming import changed, check_never_saved, check_resumable, check_targets, finished, note_on_pruning
from ..runs.run import Run
from ..runs.schedule import Reschedule
from ..runs.settings import RUN_SECTIONS, ChatConfig, RunConfig, Values
from .console import make_console, say
from .models import ModelPath
from .options import Verb, config_options, given_values
from .progress import bytes_progress
from .training import show_head, start, train

if TYPE_CHECKING:
    from rich.console import Console

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
            ctx.exit(go_on(run, directory, None, 0, Reschedule(schedule, before, given), flags, console))
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
        if warning := note_on_pruning(run.training, directory):
            say(console, "warning", warning)
        ctx.exit(go_on(run, directory, found.path, state.global_step, reschedule, flags, console))


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


def check_kind(where: Path, flags: Values) -> None:
    """Raise ConfigError for a folder of `deepzig`, or a checkpoint in it: its settings are not those of a run."""
    here = where.absolute()
    folder = next((place for place in (here, *here.parents[:2]) if (place / TRAINING_ARGS).is_file()), None)
    if folder is not None and "data" not in flags and not is_run(where):
        raise ConfigError(
            f"RUN ({where}) must be a run of abi-train run, and this is one of deepzig; go on with it by abi-train "
            f"deepzig --resume --output-dir {shlex.quote(os.path.relpath(folder))}"
        )


def go_on(
    config: RunConfig,
    directory: Path,
    checkpoint: Path | None,
    step: int,
    reschedule: Reschedule,
    flags: Values,
    console: "Console",
) -> int:
    """Train to the end from a checkpoint, or from the beginning where there is none; return the exit code."""
    train_data, valid, _ = open_data(
        config.data,
        config.chat or ChatConfig(),
        config.model.vocab_size,
        max_seq_len=config.training.max_seq_len,
        seed=config.training.seed,
        progress=functools.partial(bytes_progress, console, "tokenize"),
    )
    run = Run(config, train_data, valid, directory)
    check_use(run, flags)
    training = reschedule.apply(config.training, step, train_data)
    run = dataclasses.replace(run, config=dataclasses.replace(config, training=training))
    if checkpoint is None:
        say(console, "note", f"{directory} ended before its first checkpoint; it begins again")
        return start(run, console)
    show_head(run, console)
    trainer = run.make_trainer(checkpoint)
    for label, text in reschedule.describe(training, step, train_data):
        say(console, label, text)
    run.write_config()
    return train(trainer, run, console)
