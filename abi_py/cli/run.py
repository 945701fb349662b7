"""`abi-train run`: train a model, from scratch or from a trained one, on your data or on Python's help pages."""

from typing import Any

import click

from ..runs.defaults import SHOWN, preset_of_run
from ..runs.settings import RUN_SECTIONS
from .beginning import begin, beginning_options
from .options import Verb, config_options, data_argument


@click.command(
    cls=Verb,
    example="abi-train run texts/ --epochs 3",
    short_help="Train a model; needs no arguments.",
)
@beginning_options("runs/DATE-TIME", "width 96, 4 layers", rare=True)
@click.pass_context
def command(ctx: click.Context, model_size: str | None, **flags: Any) -> None:
    """Train a model on DATA, from scratch or from --base. Without arguments: ten epochs of a small byte-level model on
    Python's help pages, about a minute. Text is bytes, or read with --tokenizer; of conversations answers train.
    """
    ctx.exit(begin(ctx, preset_of_run(model_size), flags))


config_options(RUN_SECTIONS, SHOWN)(command)
data_argument("data", "path")(command)
