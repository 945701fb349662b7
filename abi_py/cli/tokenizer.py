"""`abi-train tokenizer`: train a tokenizer on texts, or look at one."""

import shlex
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from ..data.tokenizer_training import TokenizerTrainingConfig
from ..errors import counted
from ..files import check_free
from ..runs.new_tokenizer import texts_of
from ..runs.shipped import name_of
from .console import make_console
from .options import DataPath, OutputPath, PathType, Verb, VerbGroup, config_options, from_flags
from .progress import bytes_progress

if TYPE_CHECKING:
    from ..data.tokenizer import Tokenizer

T = TypeVar("T")

# Letters with and without accents, other scripts, a sign of four bytes, numbers, and white space that counts.
SAMPLE = "The fox said: naïve façade, 12 345.6 €\n\tif x != 'λ':  return 世界 🦊  # end"


@click.group(
    cls=VerbGroup, example="abi-train tokenizer info tokenizer/", short_help="Train a tokenizer, or look at one."
)
def command() -> None:
    """Train a tokenizer on texts, or look at one."""


@command.command(
    cls=Verb,
    example="abi-train tokenizer train texts/ -o tokenizer/ --vocab-size 4096",
    short_help="Train a byte-level BPE tokenizer on texts.",
)
@click.argument("corpus", nargs=-1, required=True, metavar="DATA...", type=DataPath(exists=True, allow_dash=True))
@click.option(
    "-o",
    "--out",
    "output",
    required=True,
    type=OutputPath(path_type=Path, file_okay=False),
    help="where to write; a directory",
)
@click.option(
    "--data-format",
    "form",
    type=click.Choice(["auto", "text", "jsonl"]),
    default="auto",
    help="what files hold; jsonl: a document in each row; auto: by the file's name  [auto]",
)
@click.option("--field", default="text", help="key of the text in a row  [text]")
@click.option(
    "--skip-bad-rows",
    is_flag=True,
    help="leave out rows that cannot be read; damaged, or without the key; they are counted",
)
@click.option("--force", is_flag=True, help="replace what is there")
@click.pass_context
def train(
    ctx: click.Context,
    corpus: tuple[str, ...],
    output: Path,
    form: str,
    field: str,
    skip_bad_rows: bool,
    force: bool,
    **_: Any,
) -> None:
    """Train a tokenizer on text files, files of rows (.jsonl, .json, .parquet), or all of them under directories.

    - is standard input, .gz is unpacked on the way. Of a row its key --field is read; of a conversation, what is said
    in it. The same texts give the same tokenizer. OUT then holds tokenizer.json and tokenizer_config.json.
    """
    from ..data.documents import Documents, TextFormat, list_inputs
    from ..data.tokenizer import FILES
    from ..data.tokenizer_training import train_tokenizer

    config = from_flags(ctx, "tokenizer", TokenizerTrainingConfig)
    if not force:
        check_free(output, FILES, "out", "choose another name, or replace it with --force")
    listing = list_inputs(corpus)
    console = make_console()
    documents = Documents(
        corpus,
        format=TextFormat(form),
        field=field,
        skip_bad_rows=skip_bad_rows,
        utf8=True,
        stdin=sys.stdin.buffer,
    )
    with bytes_progress(console, "reading", listing.bytes if listing else None) as show:
        texts = texts_of(documents, lambda: show(documents.bytes_read, ""))
        tokenizer = interruptible(
            lambda: train_tokenizer(texts, config.vocab_size, config.special, config.style, config.min_frequency)
        )
    tokenizer.save(output)
    read = counted(documents.text_bytes, "byte")
    console.print(f"{output}: {counted(tokenizer.vocab_size, 'token')} from {read} of text", soft_wrap=True)
    if tokenizer.vocab_size < config.vocab_size:
        click.echo(
            f"fewer than the {config.vocab_size:,} asked for: no other pair occurs "
            f"{counted(config.least_count, 'time')}; more text, or a lower --min-frequency, gives more"
        )
    for note in documents.notes():
        click.echo(note)
    show_round_trip(tokenizer)
    named = [name_of(path) for path in corpus]
    words = ["abi-train", "tokenize", *named, "--tokenizer", str(output), "-o", "train.bin"]
    if documents.conversations:  # they are trained on as they are, through a template
        data = [word for name in named for word in ("--data", name)]
        words = ["abi-train", "run", *data, "--tokenizer", str(output)]
    click.echo(f"next: {shlex.join(words)}")


config_options({"tokenizer": TokenizerTrainingConfig}, {})(train)


@command.command(cls=Verb, example="abi-train tokenizer info tokenizer/", short_help="Show what a tokenizer is.")
@click.argument("path", metavar="PATH", type=PathType(path_type=Path))
@click.option("--text", default=SAMPLE, help="text to encode and decode")
def info(path: Path, text: str) -> None:
    """Show vocabulary, special tokens and chat template of a tokenizer.json, and what a sample text becomes."""
    from ..data.tokenizer import Tokenizer

    tokenizer = Tokenizer.load(path)
    click.echo(f"tokenizer  {tokenizer.name}")
    click.echo(f"vocabulary {counted(tokenizer.vocab_size, 'id')}")
    click.echo(f"hash       {tokenizer.hash}")
    for role in ("bos", "eos", "pad", "unk"):
        token_id = getattr(tokenizer, f"{role}_id")
        click.echo(f"{role:<11}{'none' if token_id is None else f'{token_id} {tokenizer.token_of(token_id)}'}")
    special = [f"{i} {tokenizer.token_of(i)}" for i in sorted(tokenizer.special_ids)]
    click.echo(f"special    {', '.join(special) or 'none'}")
    template = tokenizer.chat_template
    click.echo(f"template   {'none' if template is None else f'{len(template):,} characters of Jinja'}")
    show_round_trip(tokenizer, text)


def interruptible(work: Callable[[], T]) -> T:
    """Return what `work` returns; Ctrl-C ends the program even while the library counts pairs and looks at nothing."""
    results: list[T] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            results.append(work())
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run, daemon=True)  # a daemon does not keep the program from ending
    thread.start()
    while thread.is_alive():
        thread.join(0.2)
    if errors:
        raise errors[0]
    return results[0]


def show_round_trip(tokenizer: "Tokenizer", text: str = SAMPLE) -> None:
    """Print a text, its tokens, and whether decoding gives it back."""
    ids = tokenizer.encode(text)
    back = tokenizer.decode(ids)
    shown = f"{ids[:16]}{' ...' if ids[16:] else ''}"
    click.echo(f"sample     {counted(len(text.encode('utf-8')), 'byte')}, {counted(len(ids), 'token')}: {shown}")
    if back == text:
        click.echo("decoded    the same text")
    else:
        click.echo(f"decoded    another text: {back!r} for {text!r}")
