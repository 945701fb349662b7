"""`abi-train export`: a trained model in the form that another program opens."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..errors import ConfigError, counted
from .compiling import compiling_told
from .console import make_console, note, say
from .models import ModelPath, which_options
from .options import SHORT, OutputPath, Verb

if TYPE_CHECKING:
    from collections.abc import Mapping

    from ..runs.agreement import Agreement
    from ..runs.export_source import Source

__all__ = ["DTYPES", "FORMATS", "command", "lost_text", "near_text", "show_export"]

FORMATS = ("hf", "zig", "abic", "gguf", "peft", "gguf-adapter", "mlx-lm")
ADAPTERS_ALONE, CHECKED = FORMATS[4:], ("gguf", "gguf-adapter")
DTYPES = ("float32", "bfloat16", "float16")
QUANTIZE = "type of a GGUF file, as in F16, Q8_0 or Q4_K_M"
EARLIER = {"deepzig": "zig"}  # names of earlier versions, which no help shows


class FormatType(click.Choice[str]):
    """The forms, also by the names of earlier versions."""

    def __init__(self, forms: tuple[str, ...] = FORMATS) -> None:
        """Take the names of now as choices."""
        super().__init__(forms)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """Return the name of now."""
        return super().convert(EARLIER.get(value, value), param, ctx)


@click.command(
    cls=Verb,
    example="abi-train export runs/20260122-101500 --format hf -o my-model --dtype bfloat16",
    short_help="Write a model in the form that another program opens.",
)
@click.argument("model", type=ModelPath())
@click.option(
    "-o",
    "--out",
    "output",
    required=True,
    type=OutputPath(path_type=Path),
    help="where to write; a folder, for abic, gguf and gguf-adapter a file",
)
@click.option(
    *SHORT["format"],
    "--format",
    "form",
    type=FormatType(),
    default="hf",
    help="form of what is written; hf opens in transformers and here, zig in the Zig loader, abic is the file of the "
    "Zig trainer, gguf that of llama.cpp; of adapters alone peft, gguf-adapter (llama.cpp --lora), mlx-lm  [hf]",
)
@click.option(
    "--dtype", type=click.Choice(DTYPES), help="type of the weights  [that of MODEL; of a run or adapters float32]"
)
@click.option("--max-shard-size", help="largest file of weights, as in 500MB; above it several and an index  [5GB]")
@click.option("--quantize", help=f"{QUANTIZE}  [F32]")
@click.option("--no-check", is_flag=True, help="do not read again what was written, nor compare logits (gguf forms)")
@click.option("--base", type=ModelPath(), help="start from this model; under the adapters  [the one that they name]")
@which_options
@click.option("--force", is_flag=True, help="replace what is there")
def command(
    model: Path,
    output: Path,
    form: str,
    dtype: str | None,
    max_shard_size: str | None,
    quantize: str | None,
    no_check: bool,
    base: Path | None,
    which: str | None,
    force: bool,
) -> None:
    """Write MODEL, a run, a checkpoint, adapters (merged), or a folder, in the form that another program opens.

    Tokenizer, chat template and settings of generation come along. What was written is read again and compared before
    this verb says that it is done.
    """
    from ..runs.export_source import Source
    from ..runs.exporting import check_request

    if no_check and form not in CHECKED:
        raise ConfigError("--no-check acts only with --format gguf and gguf-adapter; leave it out")
    settings: dict[str, Any] = {"dtype": dtype, "max_shard_size": max_shard_size, "quantize": quantize, "force": force}
    check_request(model, output, form, base=base, **settings)
    source = Source.open(model, which, base, adapters=form in ADAPTERS_ALONE)
    show_export(source, output, form, check=not no_check, **settings)


def show_export(source: "Source", output: Path, form: str = "hf", **settings: Any) -> None:
    """Export, as `runs.exporting.export` does with these settings, and print what was taken and what was written."""
    from ..model import LoraModel
    from ..runs.exporting import export
    from ..runs.merging import merged_into
    from .inspect import size_text

    console, shape = make_console(), source.shape
    for reason in source.loaded.skipped:
        say(console, "note", f"passed over: {reason}")
    say(console, "model", f"{source.loaded.directory}: {shape.family.value}, {shape.num_params():,} parameters")
    if source.said:
        say(console, "taken", source.said)
    for text in source.loaded.notes:
        note(f"note: {text}")
    if isinstance(source.loaded.model, LoraModel):
        lora = source.loaded.model
        say(console, "lora", f"{lora.report()}, on {source.loaded.base or 'random weights'}")
        if form not in ADAPTERS_ALONE:
            say(console, "note", "adapters are merged into the weights")
            if text := merged_into(source.loaded):
                say(console, "note", text)
    if not source.has_tokenizer and form not in ("abic", "gguf-adapter"):
        say(console, "note", "no tokenizer is there to come along")
    with compiling_told(note):
        done = export(source, output, form, **settings)
    say(console, "wrote", f"{output}: {', '.join(f'{name} {size_text(size)}' for name, size in done.files.items())}")
    if settings.get("check", True):
        near = f"; logits {near_text(done.agreement)}" if done.agreement is not None else ""
        how = f"they lost {lost_text(done.errors)}" if done.errors else "as they were written"
        say(console, "checked", f"{done.parameters:,} weights in {done.dtype}, read again: {how}{near}")
    say(console, "opens in", "; ".join(done.opens))


def lost_text(errors: "Mapping[str, float]") -> str:
    """Return what tensors of each type lost at most, for people."""
    return ", ".join(f"{kind} {100 * error:.2g}%" for kind, error in errors.items()) or "nothing"


def near_text(found: "Agreement") -> str:
    """Return how near logits are, for people."""
    off = f"{100 * found.off:.2g}% of their spread from the model's"
    return f"of {counted(found.tokens, 'token')} {off}, KL {found.kl:.2g}"
