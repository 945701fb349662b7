"""`abi-train llm`: a model in a GGUF file or a folder is trained further, in the words of the ABI's own verb."""

from collections.abc import Mapping
from typing import Any

import click

from ..data.sources import Kind, kind_of
from ..errors import ConfigError
from ..runs.defaults import SHOWN, preset_of_run
from ..runs.settings import RUN_SECTIONS
from .beginning import begin, beginning_options
from .options import Verb, config_options, data_argument, field_argument, given_values

# Its other spellings of flags of `run`.
ORIGINAL = {("data", "path"): "--dataset-path", ("training", "grad_accum_steps"): "--gradient-accumulation"}
BYTES = "how much is read follows from the data; give less of them, or --max-steps"
# Flags that it has and this verb has not, with the reason; those of the second table take no value.
NO_DATABASE = "there is no WDBX database here; write its texts into a file, and give --data"
REFUSED = {
    "--dataset-url": "nothing is downloaded here; fetch the file, and give --data",
    "--dataset-cache": "nothing is downloaded here; fetch the file, and give --data",
    "--dataset-wdbx": NO_DATABASE,
    "--dataset-block-tokens": NO_DATABASE,
    "--dataset-max-tokens": BYTES,
    "--dataset-max-bytes": BYTES,
}
REFUSED_SWITCHES = {
    "--cpu-only": "training runs on the CPU anyway; leave it out",
    "--no-gpu": "training runs on the CPU anyway; leave it out",
    "--external-quantize": "the file is quantised here; give --quantize, as in --quantize Q4_K_M",
}
FORMATS = ("tokenbin", "text", "jsonl")
NAMES = {Kind.TOKENS: "tokenbin", Kind.LINES: "jsonl", Kind.JSON: "jsonl"}  # of what a file holds, by its name


def _refuse(ctx: click.Context, param: click.Parameter, value: Any) -> None:
    if value:
        flag = param.opts[0]
        raise ConfigError(f"{flag} is not taken: {(REFUSED | REFUSED_SWITCHES)[flag]}")


def _refused(command: click.Command) -> None:
    """Let a verb answer to the flags that it refuses; no help lists them."""
    for table, is_flag in ((REFUSED, False), (REFUSED_SWITCHES, True)):
        for flag in table:
            option = click.Option(
                [flag], is_flag=is_flag, hidden=True, expose_value=False, is_eager=True, callback=_refuse
            )
            command.params.append(option)


@click.command(
    cls=Verb,
    example="abi-train llm model-Q4_K_M.gguf --data talks.jsonl --epochs 1 --export-gguf out.gguf --quantize Q4_K_M",
    short_help="Train a GGUF file or a folder further, and write GGUF again.",
)
@beginning_options("runs/DATE-TIME", "that of MODEL", rare=True)
@click.option(
    "--dataset-format",
    type=click.Choice(FORMATS),
    help="what the data must be; what they are follows from their names  [any]",
)
@click.pass_context
def command(ctx: click.Context, model_size: str | None, dataset_format: str | None, **flags: Any) -> None:
    """Train all weights of MODEL, a GGUF file, a folder of Hugging Face's kind, a run or a checkpoint, on DATA.

    It is abi-train run --base MODEL in the words of the ABI's verb; quantised weights are decoded to float32 first, and
    --lora trains adapters on them as they are. --export-gguf writes the result for llama.cpp.
    """
    if dataset_format is not None:
        _check_format(given_values(ctx).get("data", {}), dataset_format)
    ctx.exit(begin(ctx, preset_of_run(model_size), flags))


def _check_format(data: Mapping[str, Any], wanted: str) -> None:
    for path in data.get("path") or ():
        kind = NAMES.get(kind_of(path), "text")
        if kind != wanted:
            raise ConfigError(f"dataset_format ({wanted}) is not that of {path}, which is read as {kind}; leave it out")


config_options(RUN_SECTIONS, SHOWN, rare=("model",), aliases=ORIGINAL, arguments={("base", "path"): "MODEL"})(command)
_refused(command)
data_argument("data", "path")(command)
field_argument("base", "path", "MODEL")(command)
