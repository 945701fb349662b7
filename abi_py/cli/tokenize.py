"""`abi-train tokenize`: text to a file of u32 token ids."""

import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..data.documents import list_inputs
from ..data.sources import is_token_file
from ..data.tokenizing import TokenizeConfig, tokenize_if_needed, tokenize_to_file, valid_path
from ..errors import ConfigError, counted
from .console import make_console
from .options import DataPath, OutputPath, Verb, config_options, from_flags
from .progress import bytes_progress
from .stopping import stopping_cleanly

if TYPE_CHECKING:
    from ..data.tokenizing import TokenizeReport


@click.command(
    cls=Verb, example="abi-train tokenize texts/ -o train.bin", short_help="Turn text into a file of token ids."
)
@click.argument("inputs", nargs=-1, required=True, metavar="DATA...", type=DataPath(exists=True, allow_dash=True))
@click.option(
    "-o",
    "--out",
    "output",
    required=True,
    type=OutputPath(path_type=Path, dir_okay=False),
    help="where to write; a .bin file",
)
@click.option("--force", is_flag=True, help="replace what is there")
@click.pass_context
def command(ctx: click.Context, inputs: tuple[str, ...], output: Path, force: bool, **_: Any) -> None:
    """Write text files, files of rows (.jsonl, .json, .parquet), or all of them under directories as u32 token ids.

    .gz is unpacked on the way. The text of a row is its key --field; of a conversation, what is said in it.

    With --tokenizer, the ids are those of a tokenizer.json; without, an id is a byte, and 256 follows each document.
    DATA - is standard input. OUT.json tells abi-train run what OUT is; if it says that OUT was made from the
    same data in the same way, nothing is done.
    """

    config = from_flags(ctx, "tokenize", TokenizeConfig)
    if not is_token_file(output):
        raise ConfigError(f"out ({output}) must be named .bin, by which token ids are known; give {output.name}.bin")
    listing = list_inputs(inputs)
    console = make_console()
    make = tokenize_to_file if force else tokenize_if_needed
    bar = bytes_progress(console, "reading", listing.bytes if listing else None)
    with stopping_cleanly(), bar as show:
        report = make(
            inputs,
            output,
            config,
            stdin=sys.stdin.buffer,
            progress=lambda done, tokens: show(done, counted(tokens, "token")),
        )
    for line in summary(report):
        click.echo(line)
    click.echo(f"next: {next_command(output, config, report)}")


config_options({"tokenize": TokenizeConfig}, {})(command)


def summary(report: "TokenizeReport") -> list[str]:
    """Return what to say about the files, and about what was left out."""
    lines = []
    for path, info in report.files.items():
        text = f"{path}: {counted(info.tokens, 'token')} from {counted(info.documents, 'document')}"
        text += f" of {counted(info.bytes, 'byte')}"
        if info.tokenizer is not None:
            text += f" ({info.bytes / max(info.tokens, 1):.2f} bytes a token)"
        lines.append(text + (", there already" if report.reused else ""))
    lines += report.notes
    if report.forced_cuts:
        lines.append(
            f"note: {counted(report.forced_cuts, 'cut')} inside of very long texts that this tokenizer wants whole: at "
            "each, a few ids may be others than those of the whole text"
        )
    return lines


def next_command(output: Path, config: TokenizeConfig, report: "TokenizeReport") -> str:
    """Return the command that trains on the files."""
    words = ["abi-train", "run", "--data", str(output)]
    if config.valid_fraction:
        words += ["--valid-data", str(valid_path(output))]
    return shlex.join(words)
