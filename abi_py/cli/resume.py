"""`abi-train resume`: go on with a run as if it had never stopped."""

import functools
import shlex
from pathlib import Path
from typing import Any

import click

from ..errors import ConfigError
from ..runs.directory import hold
from ..runs.resolve import prepare
from ..runs.resuming import Resumed, note_on_pruning
from ..runs.settings import RUN_SECTIONS
from .console import make_console, say
from .models import ModelPath
from .options import Verb, config_options, given_values
from .progress import bytes_progress
from .training import show_head, start, train

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
    help="what the learning rate does; continue: it goes on as it is; stretch: the same shape, to the run's new end; "
    "restart: a new warm-up and decay from here; the run remembers it  [continue]",
)
@click.pass_context
def command(ctx: click.Context, where: Path, schedule: str | None, **_: Any) -> None:
    """Go on with a run to its end, with the same data and settings; flags change settings.

    RUN is the directory of a run, its directory of checkpoints, or one checkpoint; of several, the newest whole one is
    taken; a run that ended before its first one begins again. A run whose schedule has ended goes on at its minimum
    rate, unless --schedule says otherwise.
    """
    if where.is_file():
        raise ConfigError(_about_file(where))
    flags, console = given_values(ctx), make_console()
    resumed = Resumed.find(where, flags, lambda text: say(console, "note", text))
    directory, training = resumed.directory, resumed.config.training
    if end := resumed.finished(schedule):
        again = f"abi-train resume {shlex.quote(str(where))} {end.flags}"
        say(console, "finished", f"{end.reason}; nothing is left to do; to go on {end.until}: {again}")
        return
    prepare(training)
    with hold(directory, training, "RUN"):
        if warning := note_on_pruning(training, directory):
            say(console, "warning", warning)
        reschedule = resumed.reschedule(schedule)
        run = resumed.open(reschedule, functools.partial(bytes_progress, console, "tokenize"))
        if resumed.checkpoint is None:
            say(console, "note", f"{directory} ended before its first checkpoint; it begins again")
            ctx.exit(start(run, console))
        show_head(run, console)
        trainer = run.make_trainer(resumed.checkpoint)
        for label, text in reschedule.describe(run.config.training, resumed.state.global_step, run.train):
            say(console, label, text)
        run.write_config()
        ctx.exit(train(trainer, run, console))


# What is not given stays as it was.  The weights are there, so they have a shape, and no base.
config_options(RUN_SECTIONS, rare=("model",), refused=("base",))(command)


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
