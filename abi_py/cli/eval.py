"""`abi-train eval`: how well a trained model foretells a text."""

import dataclasses
import json
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..errors import ConfigError
from .generate import INTERRUPTED, TOKENIZER_HELP
from .models import load_tokenizer, note, open_model, set_threads_option
from .options import Verb

if TYPE_CHECKING:
    import numpy as np

    from ..training.perplexity import PerplexityResult

CONTEXT = 512  # llama.cpp's


@click.command(
    cls=Verb,
    example="abi-train eval runs/20260122-101500 texts/valid.txt",
    short_help="Measure perplexity and bits per byte on a text.",
)
@click.argument("model", type=click.Path(path_type=Path, exists=True))
@click.argument("data", type=click.Path(path_type=Path, exists=True))
@click.option("--context", type=int, help=f"tokens of a window  [{CONTEXT}, or the model's max_seq_len]")
@click.option("--stride", type=int, help="count every token once, windows so far apart  [second halves of windows]")
@click.option("--tokenizer", type=click.Path(path_type=Path, exists=True), help=TOKENIZER_HELP)
@click.option("--json", "as_json", is_flag=True, help="machine-readable")
@click.option("--threads", type=int, help="threads to use  [all]")
@click.pass_context
def command(
    ctx: click.Context,
    model: Path,
    data: Path,
    context: int | None,
    stride: int | None,
    tokenizer: Path | None,
    as_json: bool,
    threads: int | None,
) -> None:
    """Measure how well MODEL foretells DATA: a text file, a directory of texts, or a .bin file of u32 token ids.

    By llama.cpp's rule: windows side by side, of which the second half counts, so that the figures of the two programs
    can be compared. Ctrl-C shows the result so far.
    """
    from ..training.perplexity import count_bytes, evaluate_tokens

    set_threads_option(threads)
    loaded = open_model(model)
    config = loaded.model.config
    codec = load_tokenizer(loaded, tokenizer)
    ids, codec = read_ids(data, codec, config.vocab_size)
    size = context if context is not None else min(CONTEXT, config.max_seq_len)
    shown = Progress()
    interrupted = False
    try:
        evaluate_tokens(
            loaded.model,
            ids,
            context=size,
            stride=stride,
            bos_id=added_bos(codec),
            byte_counts=None if codec is None else count_bytes(ids, codec),
            progress=shown,
        )
    except KeyboardInterrupt:
        interrupted = True
    shown.end()
    if shown.result is not None:
        show(shown, {"data": str(data), "context": size, "stride": stride}, as_json)
    if interrupted:
        note(f"stopped by Ctrl-C after {shown.done} of {shown.total} windows")
        ctx.exit(INTERRUPTED)


def read_ids(data: Path, codec: Any, vocab_size: int) -> "tuple[np.ndarray, Any]":
    """Return the ids of a text, or of a .bin file, and what turns them into text, if anything does.

    Documents of a directory are put one behind the other, with the end token between them, if there is one.
    """
    import numpy as np

    from ..data.corpus import END_OF_DOCUMENT, open_corpus
    from ..data.tokens import TokenizedDataset
    from ..generation.text import ByteText, text_codec

    codec = text_codec(codec, vocab_size)
    if data.suffix == ".bin" and data.is_file():
        dataset = TokenizedDataset.load(data, vocab_size)
        dataset.check_vocab()
        if dataset.info is not None:
            if codec is None:
                codec = text_codec(dataset.info.load_tokenizer(data), vocab_size)
            elif not isinstance(codec, ByteText):
                dataset.info.check_tokenizer(codec, data, "tokenize again with the model's own tokenizer")
        return np.asarray(dataset.tokens), codec
    if codec is None:
        raise ConfigError(
            f"data ({data}) must be a .bin file of token ids, or come with --tokenizer: this model does not read bytes"
        )
    bytes_and_ends = np.asarray(open_corpus(data).tokens)
    ends = np.flatnonzero(bytes_and_ends == END_OF_DOCUMENT)
    parts = np.split(bytes_and_ends, ends + 1)
    documents = [part[part != END_OF_DOCUMENT].astype(np.uint8).tobytes() for part in parts]
    between = [] if codec.eos_id is None else [codec.eos_id]
    encode = getattr(codec, "encode_plain", codec.encode)
    ids: list[int] = [] if added_bos(codec) is None else [added_bos(codec)]  # type: ignore[list-item]
    for number, document in enumerate(filter(None, documents)):
        ids += (between if number else []) + encode(document.decode("utf-8", "replace"))
    return np.array(ids, np.int64), codec


def added_bos(codec: Any) -> int | None:
    """Return the BOS that a tokenizer puts before every text; None if it puts none there."""
    bos = getattr(codec, "bos_id", None)
    if bos is None:
        return None
    text = codec.encode("a", add_special_tokens=True)
    return bos if text[:1] == [bos] and codec.encode("a")[:1] != [bos] else None


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
    error = result.perplexity * result.loss_error
    apart = f"{facts['stride']} apart, every token counts once"
    rule = "second half of each counts" if facts["stride"] is None else apart
    click.echo(f"perplexity     {result.perplexity:.4f} +/- {error:.4f}")
    click.echo(f"loss           {result.loss:.4f} nats a token")
    if result.bits_per_byte is None:
        click.echo("bits per byte  unknown: these ids have no text; give --tokenizer")
    else:
        click.echo(f"bits per byte  {result.bits_per_byte:.4f}")
    click.echo(f"accuracy       {100 * result.accuracy:.2f}%")
    size = "" if result.bytes is None else f" ({result.bytes:,} bytes)"
    click.echo(f"tokens         {result.tokens:,} counted{size}")
    click.echo(f"windows        {result.windows:,} of {facts['context']} tokens, {rule}")
    click.echo(f"time           {shown.seconds:.1f} s")
