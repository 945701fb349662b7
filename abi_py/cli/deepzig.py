"""`abi-train deepzig`: from conversations to a small conversational model, in one command."""

from pathlib import Path
from typing import Any

import click

from ..pipelines.presets import SHOWN, deepzig_preset, directory_of, size_of
from ..runs.resolve import Given
from ..runs.settings import RUN_SECTIONS
from .beginning import begin, beginning_options
from .options import Verb, config_options, data_argument

# The original script's names for flags of `run`, and --output-dir; its four others have the same names here.
ORIGINAL = {("data", "valid_fraction"): "--eval-split", ("lora", "enabled"): "--use-lora"}


@click.command(
    cls=Verb,
    example="abi-train deepzig",
    short_help="Train a small conversational model; needs no arguments.",
)
@beginning_options("deepzig-SIZE-model", "test, or what --base has", "--output-dir")
@click.pass_context
def command(ctx: click.Context, model_size: str | None, **flags: Any) -> None:
    """Train a conversational model on questions and answers: abi-train run, with other defaults.

    Without arguments: the test preset on the conversations that come with the package, a minute or two. Then:
    abi-train chat deepzig-test-model; abi-train resume goes on with a run that was stopped.
    """

    def usual(given: Given) -> Path:
        return Path(directory_of(size_of(model_size, given.base_shape)))

    ctx.exit(begin(ctx, deepzig_preset(model_size), flags, usual))


config_options(RUN_SECTIONS, SHOWN, rare=("model", "optimizer", "lr_schedule"), aliases=ORIGINAL)(command)
data_argument("data", "path")(command)
