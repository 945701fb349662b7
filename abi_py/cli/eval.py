"""`abi-train eval`: how well a trained model predicts a text, or the answers of conversations."""

import dataclasses
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..errors import ConfigError, DataError
from ..runs.conversations import encode_chat, find_files
from ..runs.models import load_tokenizer
from ..runs.settings import ChatConfig
from .console import note
from .models import INTERRUPTED, TOKENIZER_HELP, ModelPath, compile_for_decoding, open_model, set_threads_option
from .options import Verb

if TYPE_CHECKING:
    import numpy as np

    from ..training.loading import LoadedModel
    from ..training.perplexity import PerplexityResult

CONTEXT = 512  # llama.cpp's


@click.command(
    cls=Verb,
    example="abi-train eval runs/20260122-101500 texts/valid.txt",
    short_help="Measure perplexity and bits per byte on a text, or perplexity on conversations.",
)
@click.argument("model", type=ModelPath())
@click.argument("data", type=click.Path(path_type=Path, exists=True))
@click.option("--context", type=int, help=f"tokens of a window  [{CONTEXT}, or the model's max_seq_len]")
@click.option("--stride", type=int, help="count every token once, windows so far apart  [second halves of windows]")
@click.option("--tokenizer", type=click.Path(path_type=Path, exists=True), help=TOKENIZER_HELP)
@click.option("--template", help="name or Jinja file of the template of conversations  [the tokenizer's own]")
@click.option("--json", "as_json", is_flag=True, help="machine-readable")
@click.option("--threads", type=int, help="threads to use (0 = all)  [all]")
@click.pass_context
def command(
    ctx: click.Context,
    model: Path,
    data: Path,
    context: int | None,
    stride: int | None,
    tokenizer: Path | None,
    template: str | None,
    as_json: bool,
    threads: int | None,
) -> None:
    """Measure how well MODEL predicts DATA: a text file, a directory of texts, a .bin file of u32 token ids, or a
    file of conversations.

    By llama.cpp's rule: windows side by side, of which the second half counts, so that the figures of the two programs
    can be compared. Of conversations the answers count, as in training; a row is a window. Ctrl-C shows the result so
    far.
    """
    set_threads_option(threads)
    files = find_files([str(data)], ChatConfig(template=template))
    if files and stride is not None:
        raise ConfigError(f"stride ({stride}) must be left out: {data} holds conversations, of which a row is a window")
    loaded = open_model(model)
    codec = load_tokenizer(loaded, tokenizer)
    shown = Progress()
    if files:
        measure, facts = of_conversations(loaded, files, codec, template, context, shown)
    else:
        measure, facts = of_text(loaded, data, codec, context, stride, shown)
    compile_for_decoding(loaded.model)
    interrupted = False
    try:
        measure()
    except KeyboardInterrupt:
        interrupted = True
    shown.end()
    if shown.result is not None:
        show(shown, {"data": str(data), **facts}, as_json)
    if interrupted:
        note(f"stopped by Ctrl-C after {shown.done} of {shown.total} windows")
        ctx.exit(INTERRUPTED)


Measure = tuple[Callable[[], object], dict[str, Any]]  # what measures, and the facts that are shown with the result


def of_text(
    loaded: "LoadedModel", data: Path, codec: Any, context: int | None, stride: int | None, shown: "Progress"
) -> Measure:
    """Return the measurement of a text, or of token ids."""
    import numpy as np

    from ..training.perplexity import check_windows, evaluate_tokens, windows

    longest = loaded.model.config.max_seq_len
    size = context if context is not None else min(CONTEXT, longest)
    check_windows(size, stride, longest)
    ids, codec = read_ids(data, codec, loaded.model.config.vocab_size)
    next(windows(len(ids), size, stride))  # raises for too short a text
    bos_id = None if codec is None else next(iter(codec.around[0]), None)

    def measure() -> None:
        counts = None if codec is None else codec.count_bytes(ids, np.concatenate([[-1], ids[:-1]]))
        settings: dict[str, Any] = {"stride": stride, "bos_id": bos_id, "byte_counts": counts}
        evaluate_tokens(loaded.model, ids, context=size, progress=shown, **settings)

    return measure, {"context": size, "stride": stride}


def of_conversations(
    loaded: "LoadedModel", files: list[Path], codec: Any, template: str | None, context: int | None, shown: "Progress"
) -> Measure:
    """Return the measurement of the answers in files of conversations; what is cut or left out is told."""
    from ..generation.text import text_codec
    from ..training.perplexity import evaluate_conversations

    longest = loaded.model.config.max_seq_len
    size = longest if context is None else context
    if not 2 <= size <= longest:
        raise ConfigError(f"context ({context}) must be 2 ... {longest}, the model's max_seq_len; leave it out")
    if codec is None:
        raise ConfigError(
            f"tokenizer must be given for conversations ({files[0]}): {loaded.directory} has none; give --tokenizer, "
            "the one that the model was trained with"
        )
    text_codec(codec, loaded.model.config.vocab_size)  # raises for a tokenizer with more ids than the model
    opened = encode_chat(files, codec, ChatConfig(template=template), max_seq_len=size, seed=0)
    note("; ".join([opened.dataset.summary(), *opened.dataset.notes]))
    facts = {"context": size, "stride": None, "template": opened.template.name}
    settings: dict[str, Any] = {"count_bytes": codec.count_bytes, "progress": shown}
    return lambda: evaluate_conversations(loaded.model, opened.dataset, **settings), facts


def read_ids(data: Path, codec: Any, vocab_size: int) -> "tuple[np.ndarray, Any]":
    """Return the ids of a text, or of a .bin file, and what turns them into text, if anything does.

    Documents of a directory follow one another as in a token file.
    """
    import numpy as np

    from ..data.sidecar import read_sidecar
    from ..data.sources import is_token_file
    from ..data.tokenizer import Tokenizer
    from ..data.tokens import TokenizedDataset
    from ..generation.text import ByteText, text_codec

    codec = text_codec(codec, vocab_size)
    if is_token_file(data):
        info = read_sidecar(data)
        if info is not None and info.vocab_size > vocab_size:
            raise DataError(
                f"{data} was made with another tokenizer, of {info.vocab_size} ids, than the model's, of {vocab_size}; "
                "give the texts, or tokenize them again with the model's tokenizer"
            )
        dataset = TokenizedDataset.load(data, vocab_size)
        dataset.check_vocab()
        if dataset.info is not None:
            if codec is None:
                codec = text_codec(dataset.info.load_tokenizer(data), vocab_size)
            elif not isinstance(codec, ByteText):
                dataset.info.check_tokenizer(codec, data, "tokenize again with the model's own tokenizer")
            if isinstance(codec, Tokenizer) and (problem := dataset.info.other_convention(codec, data)):
                note(f"note: {problem}")
        return np.asarray(dataset.tokens), codec
    if codec is None:
        raise ConfigError(
            f"data ({data}) must be a .bin file of token ids, or come with --tokenizer: this model does not read bytes"
        )
    return text_ids(data, codec), codec


def text_ids(data: Path, codec: Any) -> "np.ndarray":
    """Return the ids of all documents, cut into pieces on the way: 4 bytes a token are what is in memory.

    They are those of a token file, but that the last document has no end-of-document token.
    """
    import numpy as np

    from ..data.corpus import MOST_TEXT
    from ..data.documents import Documents
    from ..data.encoders import ByteEncoder, Encoder, TextEncoder
    from ..data.pipeline import Divider, Tally, batches, encoded, pieces
    from ..generation.text import ByteText

    as_bytes = isinstance(codec, ByteText)
    encoder: Encoder = ByteEncoder() if as_bytes else TextEncoder(codec)
    documents = Documents([data], utf8=not as_bytes, limit=MOST_TEXT)
    stream = batches(pieces(documents, encoder, Divider(0.0, 0), [Tally()]))
    parts = [ids for _, ids in encoded(stream, encoder)]
    if not parts:
        raise documents.nothing_left()
    for line in documents.notes():
        note(line)
    ids = np.concatenate(parts)
    return ids[: len(ids) - (len(encoder.after) - len(codec.around[1]))]


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


def show(shown: Progress, facts: dict[str, Any], as_json: bool) -> None:
    """Print the result."""
    result = shown.result
    if result is None:
        return
    if as_json:
        click.echo(json.dumps({**facts, **dataclasses.asdict(result), "seconds": round(shown.seconds, 3)}))
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
    size = "" if result.bytes is None else f" ({result.bytes:,} bytes)"
    click.echo(f"tokens         {result.tokens:,} counted{size}")
    if answers:
        click.echo(f"rows           {result.windows:,} of at most {facts['context']} tokens, the answers count")
        click.echo(f"template       {facts['template']}")
    else:
        click.echo(f"windows        {result.windows:,} of {facts['context']} tokens, {rule}")
    click.echo(f"time           {shown.seconds:.1f} s")
