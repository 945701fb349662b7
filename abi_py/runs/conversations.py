"""From files of conversations to rows that are trained on."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import ConfigError
from .settings import ChatConfig
from .shipped import name_of, place_of

if TYPE_CHECKING:
    from ..data.chat import ChatTemplate
    from ..data.chat_dataset import ChatDataset
    from ..data.chat_encoding import ChatEncoder
    from ..data.selection import Selection
    from ..data.tokenizer import Tokenizer

__all__ = [
    "OpenChat",
    "encode_chat",
    "encode_selection",
    "encoder_of_run",
    "ends_of_answers",
    "find_files",
    "load_tokenizer_for",
    "no_conversations",
    "no_tokenizer",
    "open_chat",
    "select_chat",
]


@dataclass(frozen=True)
class OpenChat:
    """Conversations that were read and encoded, and with what."""

    selection: "Selection"
    dataset: "ChatDataset"
    template: "ChatTemplate"
    tokenizer: "Tokenizer"


def find_files(paths: Sequence[str], chat: ChatConfig) -> list[Path]:
    """Return the files of conversations that --data means; none if it is text, token ids, or not given.

    ConfigError for settings of conversations where there are none (they would have no effect), and for both kinds.
    """
    from ..data.documents import expand
    from ..data.selection import conversation_files
    from ..data.sources import ROWS, kind_of

    paths = [place_of(path) for path in paths]
    asked = [name for name, value in chat.to_dict().items() if value != ChatConfig().to_dict()[name]]
    has_rows = any(kind_of(file.path) in ROWS for file in expand(paths))
    if has_rows and "skip_bad_rows" in asked:  # rows of texts may be bad as well
        asked.remove("skip_bad_rows")
    files: list[Path] = []
    others: list[str] = []
    for path in paths:
        found = conversation_files(path) if os.path.exists(path) else []
        if not found and asked and os.path.isfile(path) and kind_of(path) in ROWS:
            found = [Path(path)]  # what is wrong with its rows is said when they are read
        files += found
        others += [] if found else [path]
    if files and others:
        raise ConfigError(f"data ({others[0]}) must hold conversations as {files[0]} does; train on one kind at a time")
    if asked and not files:
        raise no_conversations(asked[0], paths)
    return files


def no_conversations(setting: str, paths: Sequence[str]) -> ConfigError:
    """Return the error for a setting of conversations beside data that are none."""
    what = f"data ({paths[0]})" if paths else "the standard library"
    return ConfigError(
        f"{setting} is for conversations, and {what} has none; leave it out, or give a .jsonl, .json or .parquet file "
        "of them"
    )


def no_tokenizer(what: str, vocab_size: int, remedy: str) -> ConfigError:
    """Return the error for conversations with a model that has no tokenizer, and so no template; `what` names it.

    One that reads bytes has no use for another tokenizer: for that is the `remedy`.
    """
    from ..data.corpus import BYTE_VOCAB_SIZE

    rule = "no chat template, without which there are no conversations"
    if vocab_size == BYTE_VOCAB_SIZE:
        return ConfigError(f"{what} reads text as bytes and has {rule}; {remedy}")
    return ConfigError(
        f"{what} has no tokenizer, and so {rule}; give --tokenizer, the one that it was trained with"
    )


def open_chat(
    files: Sequence[Path], tokenizer_path: str | None, chat: ChatConfig, *, max_seq_len: int, seed: int
) -> OpenChat:
    """Read, choose and encode the conversations of files; ConfigError, DataError or OSError for what is wrong."""
    tokenizer = load_tokenizer_for(files, tokenizer_path, chat)
    return encode_chat(files, tokenizer, chat, max_seq_len=max_seq_len, seed=seed)


def load_tokenizer_for(files: Sequence[Path], path: str | None, chat: ChatConfig) -> "Tokenizer":
    """Return the tokenizer of conversations; ConfigError if there is none, or it lacks a token of their template."""
    from ..data.chat import template_for
    from ..data.tokenizer import Tokenizer

    if path is None:
        raise ConfigError(
            f"tokenizer must be given for conversations ({files[0]}); make one with abi-train tokenizer train, with "
            "the special tokens of the template, or let the run train one: --train-tokenizer 4096"
        )
    tokenizer = Tokenizer.load(path)
    template_for(tokenizer, chat.template).encoder(tokenizer)
    return tokenizer


def encode_chat(
    files: Sequence[Path], tokenizer: "Tokenizer", chat: ChatConfig, *, max_seq_len: int, seed: int
) -> OpenChat:
    """Do what `open_chat` does, with a tokenizer that is loaded already."""
    from ..data.chat import template_for

    template_for(tokenizer, chat.template).encoder(tokenizer)  # a missing token is said before anything is read
    return encode_selection(select_chat(files, chat, seed), tokenizer, chat, max_seq_len)


def select_chat(files: Sequence[Path], chat: ChatConfig, seed: int, *, each_category: bool = True) -> "Selection":
    """Read and choose the conversations of files; ConfigError, DataError or OSError for what is wrong.

    each_category   whether each of the categories must be there, or at least one of them
    """
    from ..data.selection import select_conversations

    return select_conversations(
        [*files, *map(place_of, chat.mix)],
        skip_bad_rows=chat.skip_bad_rows,
        categories=chat.category,
        each_category=each_category,
        match=chat.match,
        max_samples=chat.max_samples,
        seed=seed,
    )


def encode_selection(
    selection: "Selection", tokenizer: "Tokenizer", chat: ChatConfig, max_seq_len: int
) -> OpenChat:
    """Encode conversations that were read; ConfigError or DataError for what is wrong."""
    from ..data.chat import template_for
    from ..data.chat_dataset import ChatDataset

    template = template_for(tokenizer, chat.template)
    dataset = ChatDataset.encode(
        selection.conversations,
        template,
        tokenizer,
        max_seq_len=max_seq_len,
        loss_on=chat.loss_on.value,
        packing=chat.packing,
        skip_bad_rows=chat.skip_bad_rows,
        name=", ".join(map(name_of, selection.sources)),
    )
    dataset.stats.bad[:0] = selection.skipped
    return OpenChat(selection, dataset, template, tokenizer)


def ends_of_answers(directory: Path) -> tuple[int, ...]:
    """Return the ids that end an answer: EOS, and what the chat template of the tokenizer in `directory` writes."""
    return encoder_of_run(directory).stop_ids([{"role": "user", "content": "a"}])


def encoder_of_run(directory: Path) -> "ChatEncoder":
    """Return the tokenizer that a run keeps in its directory, with the chat template it was trained with."""
    from ..data.chat import template_for
    from ..data.tokenizer import Tokenizer

    tokenizer = Tokenizer.load(directory)
    return template_for(tokenizer).encoder(tokenizer)
