"""`abi-train preview`: conversations as a model sees them, which tokens are trained, and what is lost on the way."""

import itertools
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import numpy as np

from ..config import LlmTrainingConfig
from ..errors import counted
from ..runs.conversations import OpenChat, find_files, open_chat
from ..runs.settings import ChatConfig
from .console import make_console, note, printable, show_table, utf8_output
from .options import DataPath, PathType, Verb, config_options, from_flags

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text

    from ..data.chat_dataset import ChatDataset
    from ..data.tokenizer import Tokenizer

BEGINS, ENDS = "\N{MATHEMATICAL LEFT WHITE SQUARE BRACKET}", "\N{MATHEMATICAL RIGHT WHITE SQUARE BRACKET}"
BINS = 10  # of the histogram
BAR = 32  # characters of its longest bar: with names and counts, no more than 80


@click.command(
    cls=Verb,
    example="abi-train preview talks.jsonl --tokenizer tokenizer/ --template deepzig -n 3",
    short_help="Show conversations as they are trained on.",
)
@click.argument("data", nargs=-1, required=True, metavar="DATA...", type=DataPath(path_type=Path, exists=True))
@click.option(
    *("--tokenizer", "tokenizer"), required=True, type=PathType(exists=True),
    help="tokenizer.json, a directory with one, or a GGUF file",
)  # fmt: skip
@click.option("-n", "--count", default=3, type=click.IntRange(min=0), help="conversations to show  [3]")
@click.option("--max-seq-len", default=128, type=click.IntRange(min=2), help="tokens in a sequence  [128]")
@click.option(
    "-b", "--batch-size", default=8, type=click.IntRange(min=1), help="sequences in a micro-batch; for the padding  [8]"
)
@click.option("--seed", type=click.IntRange(min=0), help=f"seed of the data order  [{LlmTrainingConfig().seed}]")
@click.pass_context
def command(
    ctx: click.Context,
    data: tuple[Path, ...],
    tokenizer: str,
    count: int,
    max_seq_len: int,
    batch_size: int,
    seed: int | None,
    **_: Any,
) -> None:
    """Show conversations of DATA (.jsonl, .json, .parquet) as the model reads them, and count what is lost.

    What is trained is in colour on a terminal, and in double brackets elsewhere. Special tokens that the template wrote
    are shown by name. The flags are those of abi-train run, and so are the rows.
    """
    chat = from_flags(ctx, "chat", ChatConfig)
    seed = LlmTrainingConfig().seed if seed is None else seed
    opened = open_chat(data, tokenizer, chat, max_seq_len=max_seq_len, seed=seed)
    utf8_output()
    if not find_files([str(path) for path in data], chat):
        note(
            f"{data[0]} holds texts: abi-train run trains on them as they are, one after the other, and as on these "
            "rows only if it is given a flag of conversations, such as --template"
        )
    console = make_console()
    for index in range(min(count, len(opened.dataset))):
        show_row(console, opened, index)
    for title, rows in tables(opened, batch_size):
        show_table(console, title, rows)
    for message in opened.dataset.stats.bad[:1]:
        console.print(f"the first bad row: {message}", soft_wrap=True)
    console.print(f"template {opened.template.name}, trained: {chat.loss_on.value}")


config_options({"chat": ChatConfig}, {})(command)


# -- rows --------------------------------------------------------------------------------------


def show_row(console: "Console", opened: OpenChat, index: int) -> None:
    """Print one row, with what is trained marked."""
    dataset = opened.dataset
    ids, trained = dataset.row(index)
    head = f"{dataset.places[index]}: {counted(len(ids), 'token')}, {int(trained.sum())} trained"
    console.print(head, style="bold", soft_wrap=True)
    console.print(marked_text(dataset, opened.tokenizer, index, console.is_terminal), soft_wrap=True)
    console.print()


def marked_text(dataset: "ChatDataset", tokenizer: "Tokenizer", index: int, colour: bool) -> "Text":
    """Return the text of a row: what is trained in colour, or in double brackets."""
    from rich.text import Text

    ids, trained = dataset.row(index)
    borders = [0, *(np.flatnonzero(np.diff(trained)) + 1).tolist(), len(ids)]
    text = Text()
    for start, stop in itertools.pairwise(borders):
        part = printable(tokenizer.decode(ids[start:stop]))
        if colour:
            text.append(part, "bold green" if trained[start] else "dim")
        else:
            text.append(f"{BEGINS}{part}{ENDS}" if trained[start] else part)
    return text


# -- counts ------------------------------------------------------------------------------------


def tables(opened: OpenChat, batch_size: int) -> Iterable[tuple[str, list[tuple[str, str]]]]:
    """Yield the tables: title, rows of name and value."""
    from ..data.selection import percentages

    selection, dataset = opened.selection, opened.dataset
    yield "Rows", counts(opened)
    for title, parts in (("Sources", selection.sources), ("Categories", selection.categories())):
        if len(parts) > 1:
            shares = percentages(list(parts.values()))
            values = [f"{n:,}  {share:.1f}%" for n, share in zip(parts.values(), shares, strict=True)]
            yield title, list(zip(parts, values, strict=True))
    yield "Lengths in tokens, before the cut", histogram(np.array(dataset.stats.lengths), dataset.max_seq_len)
    waste = dataset.padding(batch_size)
    yield (
        "Padding",
        [
            (f"every row {dataset.max_seq_len} wide", f"{100 * waste['full']:.1f}%"),
            (f"as wide as the longest of {batch_size} (without --packing)", f"{100 * waste['padded']:.1f}%"),
            ("packed (--packing)", f"{100 * waste['packed']:.1f}%"),
        ],
    )


def counts(opened: OpenChat) -> list[tuple[str, str]]:
    """Return how many rows were read, left out, cut, kept."""
    selection, dataset = opened.selection, opened.dataset
    stats = dataset.stats
    share = 100 * dataset.num_targets / dataset.num_tokens
    rows = [
        ("read", f"{selection.read:,}"),
        ("bad, left out", f"{len(stats.bad):,}"),
        ("left out by --category and --match", f"{selection.filtered:,}"),
        ("beyond --max-samples", f"{selection.cut:,}"),
        ("empty: no answer in them", f"{stats.empty:,}"),
        ("dropped: answers after --max-seq-len", f"{stats.dropped:,}"),
        ("truncated to --max-seq-len", f"{stats.truncated:,} ({counted(stats.cut, 'token')})"),
        ("trained on", f"{len(dataset):,}"),
        ("tokens", f"{dataset.num_tokens:,}"),
        ("trained", f"{dataset.num_targets:,} ({share:.1f}%)"),
    ]
    return rows


def histogram(lengths: "np.ndarray", limit: int) -> list[tuple[str, str]]:
    """Return rows of a histogram, then quantiles."""
    longest = int(lengths.max())
    step = max(1, -(-longest // BINS))
    step = -(-step // 10) * 10 if step > 10 else step
    number = np.bincount((lengths - 1) // step)
    rows = []
    for i, count in enumerate(number.tolist()):
        bar = "#" * -(-BAR * count // int(number.max()))
        rows.append((f"{i * step + 1} .. {(i + 1) * step}", f"{bar} {count:,}".strip()))
    middle, high, highest = np.percentile(lengths, [50, 90, 99]).tolist()
    rows.append(("half, 90%, 99%, all are at most", f"{middle:.0f}, {high:.0f}, {highest:.0f}, {longest}"))
    rows.append((f"longer than {limit}", f"{int((lengths > limit).sum()):,}"))
    return rows
