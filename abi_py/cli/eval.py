"""`abi-train eval`: how well a trained model predicts a text, or the answers of conversations."""

import dataclasses
import json
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..errors import ConfigError, counted
from ..runs.conversations import find_files
from ..runs.findings import JsonAnswers
from ..runs.measuring import CONTEXT, of_conversations, of_text
from ..runs.models import load_tokenizer
from ..runs.settings import ChatConfig, DataConfig
from ..runs.shipped import name_of
from .console import note
from .models import (
    INTERRUPTED,
    TOKENIZER_HELP,
    ModelPath,
    adapter_option,
    compile_for_decoding,
    described,
    named_models,
    open_model,
    set_threads,
    threads_option,
    which_options,
)
from .options import DataPath, PathType, Verb, type_of

if TYPE_CHECKING:
    from ..runs.measuring import Measurement
    from ..training.loading import LoadedModel
    from ..training.perplexity import PerplexityResult

CHECK_JSON = "check so many answers as JSON, that they parse and have the right keys; greedy ones  [none]"


@click.command(
    cls=Verb,
    example="abi-train eval runs/20260122-101500 texts/valid.txt",
    short_help="Measure perplexity and bits per byte on a text, or perplexity on conversations.",
)
@click.argument("model", type=ModelPath())
@adapter_option
@which_options
@click.argument("data", type=DataPath(path_type=Path, exists=True))
@click.option(
    "--max-seq-len", "context", type=int, help=f"tokens in a sequence; a window of text  [{CONTEXT}, or the model's]"
)
@click.option("--stride", type=int, help="count every token once, windows so far apart  [second halves of windows]")
@click.option("--tokenizer", type=PathType(path_type=Path, exists=True), help=TOKENIZER_HELP)
@click.option(
    "--template",
    type=type_of(ChatConfig, "template"),
    help="name or Jinja file of the chat template; of conversations  [the tokenizer's own]",
)
@click.option("--check-json", type=type_of(DataConfig, "check_json"), help=CHECK_JSON)
@click.option("--json", "as_json", is_flag=True, help="machine-readable")
@threads_option
@click.pass_context
def command(
    ctx: click.Context,
    model: Path,
    adapters: tuple[tuple[str | None, Path], ...],
    which: str | None,
    data: Path,
    context: int | None,
    stride: int | None,
    tokenizer: Path | None,
    template: str | None,
    check_json: int | None,
    as_json: bool,
    threads: int | None,
) -> None:
    """Measure how well MODEL predicts DATA: a text file, a directory of texts, a .bin file of u32 token ids, or a
    file of conversations.

    By llama.cpp's rule: windows side by side, of which the second half counts, so that the figures of the two programs
    can be compared. Of conversations the answers count, as in training; a row is a window. With --check-json the model
    answers them too. With several adapters each is measured in turn, under its name. Ctrl-C shows the result so far.
    """
    set_threads(threads)
    files = find_files([str(data)], ChatConfig(template=template))
    if files and stride is not None:
        raise ConfigError(f"stride ({stride}) must be left out: {data} holds conversations, of which a row is a window")
    if not files and check_json:
        raise ConfigError(f"check_json ({check_json}) is for conversations, and {data} has none; leave it out")
    loaded = open_model(model, which)
    codec = load_tokenizer(loaded, tokenizer)
    models = named_models(loaded, adapters)
    for name, each in models:
        facts = {**described(loaded, name), "data": name_of(str(data))}
        if name is not None and not as_json:
            click.echo(f"adapter        {name}")
        if files:
            measurement = of_conversations(each, files, codec, template, context, check_json)
        else:
            measurement = of_text(each, data, codec, context, stride)
        if _measure(measurement, each, facts, as_json, check_json):
            ctx.exit(INTERRUPTED)


def _measure(
    measurement: "Measurement", loaded: "LoadedModel", facts: dict[str, Any], as_json: bool, check_json: int | None
) -> bool:
    """Measure, showing how far it is, and print the result; return whether Ctrl-C ended it."""
    for line in measurement.notes:
        note(line)
    compile_for_decoding(loaded.model, "cross_entropy")  # else the clock would count its compiling
    shown, interrupted = Progress(), False
    try:
        measurement.run(shown)
    except KeyboardInterrupt:
        interrupted = True
    shown.end()
    answers = None
    if check_json and not interrupted and measurement.check_json is not None:
        answers = measurement.check_json(check_json)
    if shown.result is not None:
        show(shown, {**facts, **measurement.facts}, as_json, answers)
    if interrupted:
        note(f"stopped by Ctrl-C after {shown.done} of {counted(shown.total, 'window')}")
    return interrupted


class Progress:
    """The result so far, as a line on a terminal."""

    def __init__(self) -> None:
        """Nothing is known yet."""
        self.result: PerplexityResult | None = None
        self.done = self.total = 0
        self.began = time.perf_counter()
        self.seconds = 0.0

    def __call__(self, done: int, total: int, result: "PerplexityResult") -> None:
        """Take in a result; show it on a terminal."""
        self.done, self.total, self.result = done, total, result
        self.seconds = time.perf_counter() - self.began
        if sys.stderr.isatty():
            left = self.seconds / done * (total - done)
            line = f"\rwindow {done:,}/{total:,}  perplexity {result.perplexity:.4f}  {left:.0f} s left  "
            click.echo(line, err=True, nl=False)

    def end(self) -> None:
        """Clear the line."""
        if sys.stderr.isatty():
            click.echo("\r\x1b[K", err=True, nl=False)


def show(shown: Progress, facts: dict[str, Any], as_json: bool, checked: JsonAnswers | None) -> None:
    """Print the result, and what was found of answers that were checked."""
    result = shown.result
    if result is None:
        return
    if as_json:
        more = {} if checked is None else {"json": dataclasses.asdict(checked)}
        click.echo(json.dumps({**facts, **dataclasses.asdict(result), "seconds": round(shown.seconds, 3), **more}))
        return
    answers = "template" in facts
    error = result.perplexity * result.loss_error
    apart = f"{facts['stride']} apart, every token counts once"
    rule = "second half of each counts" if facts["stride"] is None else apart
    click.echo(f"perplexity     {result.perplexity:.4f} +/- {error:.4f}")
    click.echo(f"loss           {result.loss:.4f} nats a token")
    if result.bits_per_byte is not None:
        click.echo(f"bits per byte  {result.bits_per_byte:.4f}")
    else:
        click.echo("bits per byte  unknown: these ids have no text; give --tokenizer")
    click.echo(f"accuracy       {100 * result.accuracy:.2f}%")
    size = "" if result.bytes is None else f" ({counted(result.bytes, 'byte')})"
    click.echo(f"tokens         {result.tokens:,} counted{size}")
    if answers:
        click.echo(f"rows           {result.windows:,} of at most {facts['context']} tokens, the answers count")
        click.echo(f"template       {facts['template']}")
    else:
        click.echo(f"windows        {result.windows:,} of {facts['context']} tokens, {rule}")
    for name, value in () if checked is None else checked.rows():
        click.echo(f"{name}  {value}")
    click.echo(f"time           {shown.seconds:.1f} s")
