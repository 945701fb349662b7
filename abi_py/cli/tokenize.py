"""`abi-train tokenize`: text to a file of u32 token ids."""

import shlex
import sys
from pathlib import Path

import click

from ..errors import ConfigError
from .options import Verb


@click.command(
    cls=Verb, example="abi-train tokenize texts/ -o train.bin", short_help="Turn text into a file of token ids."
)
@click.argument("inputs", nargs=-1, required=True, metavar="INPUT...", type=click.Path(exists=True, allow_dash=True))
@click.option("-o", "--output", required=True, type=click.Path(path_type=Path, dir_okay=False), help="file to write")
@click.option("--force", is_flag=True, help="replace the file if it is there")
def command(inputs: tuple[str, ...], output: Path, force: bool) -> None:
    """Write text files, or all texts under directories, as u32 token ids: one id for a byte, 256 after each document.

    INPUT - is standard input.
    """
    from ..data.corpus import BYTE_VOCAB_SIZE, tokenize_to_file

    if output.is_file() and not force:
        raise ConfigError(f"output ({output}) must not be there yet; choose another name, or replace it with --force")
    report = tokenize_to_file(inputs, output, stdin=sys.stdin.buffer)
    click.echo(f"{output}: {report.tokens:,} tokens from {report.documents:,} documents of {report.bytes:,} bytes")
    if report.skipped:
        click.echo(f"left out: {len(report.skipped)} files, the first: {report.skipped[0]}")
    click.echo(f"next: abi-train run --data {shlex.quote(str(output))} --vocab-size {BYTE_VOCAB_SIZE}")
