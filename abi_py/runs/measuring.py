"""How well a trained model predicts a text, token ids, or the answers of conversations, ready to be measured."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import ConfigError, DataError, counted
from .conversations import encode_chat, no_tokenizer
from .findings import JsonAnswers
from .json_answers import check_answers, check_any
from .settings import ChatConfig

if TYPE_CHECKING:
    import numpy as np

    from ..data.tokenizer import Tokenizer
    from ..generation.text import TextCodec
    from ..training.loading import LoadedModel
    from ..training.perplexity import PerplexityResult

__all__ = ["CONTEXT", "Measurement", "of_conversations", "of_text", "read_ids", "text_ids"]

CONTEXT = 512  # llama.cpp's
Progress = Callable[[int, int, "PerplexityResult"], None]  # is told windows done, in all, and the result so far


@dataclass
class Measurement:
    """What measures, the facts that belong to the result, and what is to be said about the data."""

    run: Callable[[Progress], object]
    facts: dict[str, Any]
    notes: list[str] = field(default_factory=list)
    check_json: Callable[[int], JsonAnswers] | None = None  # of conversations: is told how many answers to check


def of_text(
    loaded: "LoadedModel", data: Path, tokenizer: "Tokenizer | None", context: int | None, stride: int | None
) -> Measurement:
    """Return the measurement of a text, or of token ids."""
    import numpy as np

    from ..training.perplexity import check_windows, evaluate_tokens, windows

    longest = loaded.model.config.max_seq_len
    size = context if context is not None else min(CONTEXT, longest)
    check_windows(size, stride, longest)
    notes: list[str] = []
    ids, codec = read_ids(data, tokenizer, loaded.model.config.vocab_size, notes)
    next(windows(len(ids), size, stride))  # raises for too short a text
    bos_id = None if codec is None else next(iter(codec.around[0]), None)

    def measure(progress: Progress) -> None:
        counts = None if codec is None else codec.count_bytes(ids, np.concatenate([[-1], ids[:-1]]))
        settings: dict[str, Any] = {"stride": stride, "bos_id": bos_id, "byte_counts": counts}
        evaluate_tokens(loaded.model, ids, max_seq_len=size, progress=progress, **settings)

    return Measurement(measure, {"context": size, "stride": stride}, notes)


def of_conversations(
    loaded: "LoadedModel",
    files: list[Path],
    codec: "Tokenizer | None",
    template: str | None,
    context: int | None,
    check_json: int | None = None,
) -> Measurement:
    """Return the measurement of the answers in files of conversations; what is cut or left out is told.

    With `check_json` so many answers are to be checked afterwards: ConfigError if none of the data's own is JSON.
    """
    from ..generation.text import text_codec
    from ..training.perplexity import evaluate_conversations

    longest = loaded.model.config.max_seq_len
    size = longest if context is None else context
    if not 2 <= size <= longest:
        raise ConfigError(f"max_seq_len ({context}) must be 2 ... {longest}, the model's; leave it out")
    if codec is None:
        raise no_tokenizer(str(loaded.directory), loaded.model.config.vocab_size, f"give texts instead of {files[0]}")
    text_codec(codec, loaded.model.config.vocab_size)  # raises for a tokenizer with more ids than the model
    opened = encode_chat(files, codec, ChatConfig(template=template), max_seq_len=size, seed=0)

    if check_json:
        check_any(opened.dataset, codec, longest, check_json, f"of {', '.join(map(str, files))}")

    def measure(progress: Progress) -> None:
        evaluate_conversations(loaded.model, opened.dataset, count_bytes=codec.count_bytes, progress=progress)

    def check(most: int) -> JsonAnswers:
        ends = opened.template.encoder(codec).stop_ids([{"role": "user", "content": "a"}])
        return check_answers(loaded.model, codec, ends, opened.dataset, most)

    facts = {"context": size, "stride": None, "template": opened.template.name}
    return Measurement(measure, facts, ["; ".join([opened.dataset.summary(), *opened.dataset.notes])], check)


def read_ids(
    data: Path, tokenizer: "Tokenizer | None", vocab_size: int, notes: list[str]
) -> "tuple[np.ndarray, TextCodec | None]":
    """Return the ids of a text, or of a .bin file, and what turns them into text, if anything does.

    Documents of a directory follow one another as in a token file.
    """
    import numpy as np

    from ..data.sidecar import read_sidecar
    from ..data.sources import is_token_file
    from ..data.tokenizer import Tokenizer
    from ..data.tokens import TokenizedDataset
    from ..generation.text import text_codec

    codec = text_codec(tokenizer, vocab_size)
    if is_token_file(data):
        info = read_sidecar(data)
        if info is not None and info.vocab_size > vocab_size:
            raise DataError(
                f"{data} was made with another tokenizer, of {counted(info.vocab_size, 'id')}, than the model's, of "
                f"{vocab_size}; give the texts, or tokenize them again with the model's tokenizer"
            )
        dataset = TokenizedDataset.load(data, vocab_size)
        dataset.check_vocab()
        if dataset.info is not None:
            if codec is None:
                codec = text_codec(dataset.info.load_tokenizer(data), vocab_size)
            elif tokenizer is not None:
                dataset.info.check_tokenizer(tokenizer, data, "tokenize again with the model's own tokenizer")
            if isinstance(codec, Tokenizer) and (problem := dataset.info.other_convention(codec, data)):
                notes.append(f"note: {problem}")
        return np.asarray(dataset.tokens), codec
    if codec is None:
        raise ConfigError(
            f"data ({data}) must be a .bin file of token ids, or come with --tokenizer: this model does not read bytes"
        )
    return text_ids(data, codec, notes), codec


def text_ids(data: Path, codec: "TextCodec", notes: list[str]) -> "np.ndarray":
    """Return the ids of all documents, cut into pieces on the way: 4 bytes a token are what is in memory.

    They are those of a token file, but that the last document has no end-of-document token.
    """
    import numpy as np

    from ..data.corpus import MOST_TEXT
    from ..data.documents import Documents
    from ..data.encoders import ByteEncoder, Encoder, TextEncoder
    from ..data.pipeline import Divider, Tally, batches, encoded, pieces
    from ..data.tokenizer import Tokenizer

    encoder: Encoder = TextEncoder(codec) if isinstance(codec, Tokenizer) else ByteEncoder()
    documents = Documents([data], utf8=isinstance(codec, Tokenizer), limit=MOST_TEXT)
    stream = batches(pieces(documents, encoder, Divider(0.0, 0), [Tally()]))
    parts = [ids for _, ids in encoded(stream, encoder)]
    if not parts:
        raise documents.nothing_left()
    notes += documents.notes()
    ids = np.concatenate(parts)
    return ids[: len(ids) - (len(encoder.after) - len(codec.around[1]))]
