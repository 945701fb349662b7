# ruff: noqa: RUF009 (a call of `opt` declares a field, it is not a shared default)
"""What `run`, `resume` and `preview` share: from files of conversations to rows that are trained on."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..config import Config, opt
from ..errors import ConfigError

if TYPE_CHECKING:
    from rich.console import Console

    from ..data.chat import ChatTemplate
    from ..data.chat_dataset import ChatDataset
    from ..data.chat_encoding import ChatEncoder
    from ..data.selection import Selection
    from ..data.tokenizer import Tokenizer
    from ..model.transformer import Transformer

__all__ = [
    "ChatConfig",
    "LossOn",
    "OpenChat",
    "absolute_chat",
    "describe_chat",
    "encode_chat",
    "encoder_of_run",
    "find_files",
    "no_conversations",
    "open_chat",
    "show_answer",
    "split_chat",
]


class LossOn(Enum):
    """Which tokens of a conversation are learned."""

    ASSISTANT = "assistant"
    ALL = "all"


@dataclass(frozen=True, kw_only=True)
class ChatConfig(Config):
    """How files of conversations become rows; of no effect on texts and token files, and refused there."""

    template: str | None = opt(
        None,
        "deepzig, chatml, qwen, alpaca, llama2, llama3, or a Jinja file; when not given, the tokenizer's own, or "
        "the one whose tokens it has",
    )
    loss_on: LossOn = opt(LossOn.ASSISTANT, "learn the answers, or all tokens")
    packing: bool = opt(False, "several conversations in a row, each by itself, instead of padding")
    skip_bad_rows: bool = opt(False, "leave out rows that cannot be read, and count them, instead of stopping")
    mix: tuple[str, ...] = opt((), "another file, or directory, of conversations to mix in; may be repeated")
    max_samples: int = opt(0, "at most so many conversations, of every file its share, tools always (0 = all)")
    category: tuple[str, ...] = opt((), "only rows whose category fits, as in 'memory_*'; may be repeated")
    match: str | None = opt(None, "only rows with a text in which this regular expression is found")

    def validate(self) -> None:
        """Raise `ConfigError` naming field, value, rule and remedy."""
        self._require_at_least(0, "max_samples")


@dataclass(frozen=True)
class OpenChat:
    """Conversations that were read and encoded, and with what."""

    selection: "Selection"
    dataset: "ChatDataset"
    template: "ChatTemplate"
    tokenizer: "Tokenizer"


def absolute_chat(chat: Mapping[str, Any]) -> dict[str, Any]:
    """Return the values of a chat section with absolute paths, so that a run can be resumed from any directory."""
    made = dict(chat)
    if made.get("mix"):
        made["mix"] = [os.path.abspath(path) for path in made["mix"]]
    if made.get("template") and os.path.exists(made["template"]):
        made["template"] = os.path.abspath(made["template"])
    return made


def find_files(paths: Sequence[str], chat: ChatConfig) -> list[Path]:
    """Return the files of conversations that --data means; none if it is text, token ids, or not given.

    ConfigError for settings of conversations where there are none (they would have no effect), and for both kinds.
    """
    from ..data.documents import expand
    from ..data.selection import conversation_files
    from ..data.sources import ROWS, kind_of

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


def open_chat(
    files: Sequence[Path], tokenizer_path: str | None, chat: ChatConfig, *, max_seq_len: int, seed: int
) -> OpenChat:
    """Read, choose and encode the conversations of files; ConfigError, DataError or OSError for what is wrong."""
    from ..data.tokenizer import Tokenizer

    if tokenizer_path is None:
        raise ConfigError(
            f"tokenizer must be given for conversations ({files[0]}); make one with abi-train tokenizer train, with "
            "the special tokens of the template"
        )
    return encode_chat(files, Tokenizer.load(tokenizer_path), chat, max_seq_len=max_seq_len, seed=seed)


def encode_chat(
    files: Sequence[Path], tokenizer: "Tokenizer", chat: ChatConfig, *, max_seq_len: int, seed: int
) -> OpenChat:
    """Do what `open_chat` does, with a tokenizer that is loaded already."""
    from ..data.chat import template_for
    from ..data.chat_dataset import ChatDataset
    from ..data.selection import select_conversations

    template = template_for(tokenizer, chat.template)
    template.encoder(tokenizer)  # a token that is missing is said before anything is read
    selection = select_conversations(
        [*files, *chat.mix],
        skip_bad_rows=chat.skip_bad_rows,
        categories=chat.category,
        match=chat.match,
        max_samples=chat.max_samples,
        seed=seed,
    )
    dataset = ChatDataset.encode(
        selection.conversations,
        template,
        tokenizer,
        max_seq_len=max_seq_len,
        loss_on=chat.loss_on.value,
        packing=chat.packing,
        skip_bad_rows=chat.skip_bad_rows,
        name=", ".join(selection.sources),
    )
    dataset.stats.bad[:0] = selection.skipped
    return OpenChat(selection, dataset, template, tokenizer)


def split_chat(
    dataset: "ChatDataset", valid_fraction: float
) -> tuple["ChatDataset", "ChatDataset | None"]:
    """Return rows for training, and for validation unless the fraction is 0."""
    if valid_fraction == 0:
        return dataset, None
    return dataset.split(valid_fraction)


def encoder_of_run(directory: Path) -> "ChatEncoder":
    """Return the tokenizer that a run keeps in its directory, with the chat template it was trained with."""
    from ..data.chat import template_for
    from ..data.tokenizer import Tokenizer

    tokenizer = Tokenizer.load(directory)
    return template_for(tokenizer).encoder(tokenizer)


def show_answer(
    model: "Transformer",
    data: "ChatDataset",
    directory: Path,
    question: str | None,
    console: "Console",
    *,
    tokens: int,
    seed: int,
) -> None:
    """Print what the model answers to a question; None: to the first one of `data`, beside what the data answer."""
    from ..generation import generate
    from .models import printable

    encoder = encoder_of_run(directory)
    tokenizer = encoder.tokenizer
    if question is None:
        ids, trained = data.row(0)
        begin = int(np.argmax(trained))
        asked, known = ids[:begin], {"data": ids[begin:]}
    else:
        asked, known = encoder.encode_prompt([{"role": "user", "content": question}]), {}
    stops = encoder.stop_ids([{"role": "user", "content": question or "?"}])  # those of every answer of the template
    room = model.config.max_seq_len - len(asked)
    if room < 1:
        console.print(f"{'sample':<9}none: the question fills the model's {model.config.max_seq_len} tokens")
        return
    made = generate(model, asked.tolist(), min(tokens, room), seed=seed, stop_ids=tuple(stops))
    shown = {"asked": asked, "answer": made, **known}
    for name, part in shown.items():
        text = printable(tokenizer.decode([int(i) for i in part])) or "(empty)"
        console.print(f"{name:<9}" + text.replace("\n", "\n" + " " * 9), soft_wrap=True)


def describe_chat(train: "ChatDataset", valid: Any = False) -> str:
    """Return one line about the rows; `valid` is False where validation is not spoken of."""
    parts = f"{train.name}: {len(train):,} conversations, {train.num_tokens:,} tokens, "
    parts += f"{100 * train.num_targets / train.num_tokens:.0f}% of them learned"
    if valid is not False:
        parts += f"; {len(valid):,} more for validation" if valid is not None else "; none for validation"
    return "; ".join([parts, *train.stats.notes()])
