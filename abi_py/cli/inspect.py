"""`abi-train inspect`: what a file or a folder is, of ours or of others, and what it can be used for."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from .console import printable, utf8_output
from .models import ModelPath, find_folder, which_options
from .options import Verb

if TYPE_CHECKING:
    from ..runs.inspecting import Inspection

WIDTH = 26  # of the labels
FEW = 8  # tensors that are shown without --tensors: the first ones, and how many there are


@click.command(
    cls=Verb,
    example="abi-train inspect some-model/",
    short_help="Say what a file or folder is, and what can be done with it.",
)
@click.argument("path", type=ModelPath())
@which_options
@click.option("--tensors", is_flag=True, help="list all tensors: name, type, shape")
@click.option("--json", "as_json", is_flag=True, help="machine-readable")
@click.pass_context
def command(ctx: click.Context, path: Path, which: str | None, tensors: bool, as_json: bool) -> None:
    """Say what PATH is: a run, a checkpoint, a folder or file of a model, adapters, a tokenizer, data, settings.

    Family, shape, tensors, parameters, tokenizer, what is damaged or not computed here, and the calls that take it.
    Weights are not loaded. The exit code is 1 if there is a problem.
    """
    from ..runs.inspecting import inspect

    found = inspect(find_folder(path, which) if which else path)
    utf8_output()
    if as_json:
        click.echo(json.dumps(found.to_dict(tensors), indent=2, ensure_ascii=False, default=str))
    else:
        show(found, tensors)
    ctx.exit(1 if found.problems else 0)


def show(found: "Inspection", tensors: bool) -> None:
    """Print what was found, a fact a line."""
    _line("path", str(found.path))
    _line("kind", found.kind)
    _line("size", size_text(found.bytes))
    for label, value in found.facts.items():
        if label == "files":
            _several("files", [f"{name}  {size_text(size)}" for name, size in value.items()] if isinstance(value, dict)
                     else [f"{value:,}"])  # fmt: skip
        elif label in ("tokenizer", "started from", "metadata"):
            _several(label, [f"{name}: {_plain(each)}" for name, each in value.items()])
        else:
            _line(label, _plain(value))
    if found.tensors:
        types = [f"{name}: {row['tensors']:,} tensors, {row['elements']:,} elements, {size_text(row['bytes'])}"
                 for name, row in found.dtypes().items()]  # fmt: skip
        _several("tensors", [f"{len(found.tensors):,}", *types])
        shown = found.tensors if tensors else found.tensors[:FEW]
        longest = max(len(tensor.name) for tensor in shown)
        for tensor in shown:
            _line("", f"{tensor.name:<{longest}}  {tensor.dtype:<4}  {' x '.join(map(str, tensor.shape)) or 'scalar'}")
        if len(shown) < len(found.tensors):
            _line("", f"... and {len(found.tensors) - len(shown):,} more: --tensors lists them")
    for problem in found.problems:
        _line("problem", problem)
    _several("can be used by", found.uses)


def _plain(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {_plain(each)}" for name, each in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(map(_plain, value)) or "none"
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: "none"}[value]
    return f"{value:,}" if isinstance(value, int) else f"{value:.6g}" if isinstance(value, float) else str(value)


def _several(label: str, lines: list[str]) -> None:
    for number, line in enumerate(lines):
        _line("" if number else label, line)


def _line(label: str, text: str) -> None:
    click.echo(f"{label:<{WIDTH}}{printable(' '.join(text.split(chr(10))))}")


def size_text(size: float) -> str:
    """Return a number of bytes for people, in the largest unit of which there is one."""
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if size >= factor:
            return f"{size / factor:,.1f} {unit}"
    return f"{size:,.0f} bytes"
