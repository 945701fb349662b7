"""How the verbs that begin a run do it: `run`, and `deepzig`, which has other defaults."""

import contextlib
import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import click

from ..errors import ConfigError
from ..locks import check_unlocked
from ..model.presets import PRESETS
from ..runs.defaults import Preset
from ..runs.directory import check_free, hold, new_directory
from ..runs.resolve import Given, prepare
from ..runs.settings import read_run_config
from .console import make_console, say
from .describe import describe_machine
from .find_lr import find_and_show
from .options import FieldOption, OutputPath, PathType, RareOption, given_values
from .plan import show_plan
from .progress import bytes_progress
from .training import start

__all__ = ["begin", "beginning_options"]


def beginning_options(
    usual: str, size: str, *out: str, rare: bool = False
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Return a decorator with the flags of these verbs beside the fields.

    `usual` and `size` are what the help shows as defaults, `out` other spellings of --out; with `rare`, the size is not
    on the first screen.
    """
    directory = OutputPath(path_type=Path, file_okay=False)
    file = PathType(path_type=Path, exists=True, dir_okay=False)
    flags = (
        click.option(
            "-o", "--out", *out, "out", type=directory, help=f"where to write; a directory, which is the run  [{usual}]"
        ),
        click.option("--config", type=file, help="file of settings; YAML; flags beat it"),
        click.option("--dry-run", is_flag=True, help=DRY_RUN),
        click.option("--find-lr", is_flag=True, help=FIND_LR),
        click.option("--json", "as_json", is_flag=True, help="machine-readable; with --find-lr"),
        click.option(
            "--model-size",
            cls=RareOption if rare else click.Option,
            type=click.Choice(tuple(PRESETS)),
            help=f"a shape of the DeepZig family  [{size}]",
        ),
    )

    def decorate(function: Callable[..., None]) -> Callable[..., None]:
        for flag in reversed(flags):
            function = flag(function)
        return function

    return decorate


FIND_LR = "try rates for 100 steps (or --max-steps), suggest one, and stop"
# Of the sections of a run: what a range test has no use for.  It sets the rate itself, repeats the data until it has
# made its steps, evaluates nothing and writes nothing.
NOT_IN_A_RANGE_TEST = {
    "training": {"learning_rate", "lr_schedule", "min_learning_rate", "warmup_steps", "warmup_ratio", "decay_steps",
                 "cooldown_share", "cooldown_steps", "cooldown_shape", "epochs", "eval_interval", "log_interval",
                 "checkpoint_path", "checkpoint_interval", "max_checkpoints", "log_dir", "enable_tensorboard",
                 "enable_wandb", "enable_metrics_stream", "wandb_project", "wandb_run_name", "wandb_entity",
                 "export_gguf_path", "export_quantize", "export_name"},
    "data": {"sample_prompts", "sample_tokens"},
}  # fmt: skip
DRY_RUN = "show the plan (memory, steps, time) and stop; nothing is written"


def begin(
    ctx: click.Context, preset: Preset, flags: Mapping[str, Any], usual: Callable[[Given], Path] | None = None
) -> int:
    """Begin a run from the flags of a verb; return the exit code.

    `usual` is the directory where none is given, in place of a new one in runs/.
    """
    from ..training.checkpoint import check_unused

    out, config, dry_run, find_lr = (flags[name] for name in ("out", "config", "dry_run", "find_lr"))
    if flags["as_json"] and not find_lr:
        raise ConfigError("json acts only with --find-lr; give it too, or leave --json out")
    if find_lr and dry_run:
        raise ConfigError("find_lr must not come with --dry-run, which trains nothing; leave one out")
    if find_lr:
        _check_range_test(ctx)
    writes = not dry_run and not find_lr
    file = read_run_config(config) if config else {}
    begun_anew = file.get("training", {}).pop("schedule_start", 0)  # at a step of the run whose file this is
    given = Given(given_values(ctx), file, preset)
    if out is None and usual is not None and writes:
        out = usual(given)
    if out is not None:
        check_unlocked(out, "out")
        check_free(out)
    if given.checkpoint_path:
        check_unused(given.checkpoint_path)
    console = make_console()
    if begun_anew:
        say(console, "note", f"schedule_start ({begun_anew}) of {config} is left out: a new run begins at step 0")
    data = given.open_data(functools.partial(bytes_progress, console, "tokenize"))
    named = contextlib.nullcontext(out or Path("OUT"))  # made when it is held
    with named if out or not writes else new_directory() as directory:
        run = given.resolve(data, directory)
        prepare(run.config.training)
        if dry_run:
            show_plan(run, console)
            return 0
        if find_lr:
            steps = given_values(ctx).get("training", {}).get("max_steps")
            find_and_show(run, console, flags["as_json"], **({"steps": steps} if steps else {}))
            return 0
        describe_machine()  # raises for a wrong environment, before anything is written
        with hold(directory, run.config.training, "out"):
            check_free(directory)  # once more: another run may have begun there since
            return start(run, console)


def _check_range_test(ctx: click.Context) -> None:
    """Raise ConfigError for a flag on the command line that a range test would not act on."""
    values = given_values(ctx)
    for param in ctx.command.params:
        if not isinstance(param, FieldOption) or param.field not in values.get(param.section, {}):
            continue
        if param.field in NOT_IN_A_RANGE_TEST.get(param.section, ()):
            flag = max(param.opts, key=len)
            raise ConfigError(f"{flag} has no effect with --find-lr, which only tries rates; leave one of them out")
