"""`abi-train run`: train a model, from scratch or from a trained one, on your data or on Python's help pages."""

import contextlib
import functools
from pathlib import Path
from typing import Any

import click

from ..errors import ConfigError
from ..locks import check_unlocked
from ..runs.defaults import SHOWN
from ..runs.directory import check_free, hold, new_directory
from ..runs.resolve import Given, prepare
from ..runs.settings import RUN_SECTIONS, read_run_config
from .console import make_console, say
from .describe import describe_machine
from .find_lr import find_and_show
from .options import Verb, config_options, data_argument, given_values
from .plan import show_plan
from .progress import bytes_progress
from .training import start


@click.command(
    cls=Verb,
    example="abi-train run texts/ --epochs 3",
    short_help="Train a model; needs no arguments.",
)
@click.option(
    "-o",
    "--out",
    type=click.Path(path_type=Path, file_okay=False),
    help="where to write; a directory, which is the run  [runs/DATE-TIME]",
)
@click.option(
    "--config",
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    help="file of settings; YAML; flags beat it",
)
@click.option("--dry-run", is_flag=True, help="show the plan (memory, steps, time) and stop; nothing is written")
@click.option("--find-lr", is_flag=True, help="try rates for 100 steps, suggest one, and stop")
@click.option("--json", "as_json", is_flag=True, help="machine-readable; with --find-lr")
@click.pass_context
def command(
    ctx: click.Context, out: Path | None, config: Path | None, dry_run: bool, find_lr: bool, as_json: bool, **_: Any
) -> None:
    """Train a model on DATA, from scratch or from --base. Without arguments: ten epochs of a small byte-level model on
    Python's help pages, about a minute. Text is read as bytes, or with --tokenizer; of conversations the answers are
    trained.
    """
    from ..training.checkpoint import check_unused

    if as_json and not find_lr:
        raise ConfigError("json acts only with --find-lr; give it too, or leave --json out")
    if find_lr and dry_run:
        raise ConfigError("find_lr must not come with --dry-run, which trains nothing; leave one out")
    file = read_run_config(config) if config else {}
    begun_anew = file.get("training", {}).pop("schedule_start", 0)  # at a step of the run whose file this is
    given = Given(given_values(ctx), file)
    if out is not None:
        check_unlocked(out, "out")
        check_free(out)
    if given.checkpoint_path:
        check_unused(given.checkpoint_path)
    console = make_console()
    if begun_anew:
        say(console, "note", f"schedule_start ({begun_anew}) of {config} is left out: a new run begins at step 0")
    train, valid, vocab_size = given.open_data(functools.partial(bytes_progress, console, "tokenize"))
    named = contextlib.nullcontext(out or Path("OUT"))  # made when it is held
    with named if out or dry_run or find_lr else new_directory() as directory:
        run = given.resolve(train, valid, vocab_size, directory)
        prepare(run.config.training)
        if dry_run:
            show_plan(run, console)
            return
        if find_lr:
            find_and_show(run, console, as_json)
            return
        describe_machine()  # raises for a wrong environment, before anything is written
        with hold(directory, run.config.training, "out"):
            check_free(directory)  # once more: another run may have begun there since
            ctx.exit(start(run, console))


config_options(RUN_SECTIONS, SHOWN)(command)
data_argument("data", "path")(command)
