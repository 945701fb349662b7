"""From what `--data`, `--valid-data` and `--tokenizer` name to token ids, or to conversations as rows of them."""

import contextlib
import dataclasses
import hashlib
import os
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias, Union

import numpy as np

from ..errors import ConfigError, DataError, counted
from .conversations import encode_selection, find_files, load_tokenizer_for, select_chat
from .new_tokenizer import keep_tokenizer, own_cache, texts_to_train_on, train_for
from .settings import ChatConfig, DataConfig, HeldOut
from .shipped import name_of

if TYPE_CHECKING:
    from ..data.chat_dataset import ChatDataset
    from ..data.tokenizer import Tokenizer
    from ..data.tokens import TokenizedDataset

__all__ = ["OpenData", "Progress", "RunData", "Show", "find_tokenizer", "open_data", "unseen"]

IN_MEMORY = 1 << 28  # bytes of texts whose ids are kept in memory, and not in a file

RunData: TypeAlias = Union["TokenizedDataset", "ChatDataset"]
Show: TypeAlias = Callable[[int, str], None]  # is told bytes done, and a word about it
Progress: TypeAlias = Callable[[int | None], AbstractContextManager[Show]]  # is told the bytes in all, if anybody knows


def unseen(total: int | None) -> AbstractContextManager[Show]:
    """Show no progress."""
    return contextlib.nullcontext(lambda done, word: None)


@dataclass(frozen=True)
class OpenData:
    """Data that were opened.

    vocab_size  number of ids of their tokenizer, or what was asked for
    opened      how: as the settings say, with the tokenizer that was trained on them where they ask for one
    parts       of what is kept of conversations, those that show different things: "told" and "new" (data/holdout.py)
    """

    train: RunData
    valid: RunData | None
    vocab_size: int
    opened: DataConfig
    parts: "Mapping[str, ChatDataset]" = field(default_factory=dict)


def open_data(
    data: DataConfig,
    chat: ChatConfig,
    vocab_size: int | None,
    *,
    max_seq_len: int,
    seed: int,
    progress: Progress = unseen,
) -> OpenData:
    """Return training data, validation data, and the vocabulary's size (found out if None).

    Files of conversations become rows of at most `max_seq_len` ids, chosen and ordered by `seed`.  All else is ids:

    Text has 257 ids, one for each byte and one for the end of a document, or those of the tokenizer.  The vocabulary of
    a .bin file is in its sidecar; without one, the file is read once for its largest id.
    """
    from ..data.corpus import BYTE_VOCAB_SIZE, standard_library_corpus
    from ..formats.special_tokens import MOST_IDS

    _check_fits(data, vocab_size)
    files = find_files(data.path, chat)
    if files:
        made = _conversations(files, data, chat, max_seq_len, seed)
        _check_fits(made.opened, vocab_size, data.train_tokenizer or None)
        return made if vocab_size is None else dataclasses.replace(made, vocab_size=vocab_size)
    if data.train_tokenizer:
        asked = data.train_tokenizer
        data = data.replace(tokenizer=str(_train_on_texts(data, chat, progress)))
        _check_fits(data, vocab_size, asked)
    texts = _Texts(data.tokenizer, chat.skip_bad_rows, progress)
    if not data.path:
        dataset = standard_library_corpus(data.corpus_bytes)
    else:
        dataset = texts.open("data", data.path, vocab_size)
    if dataset.vocab_size is None:
        size = dataset.check_vocab(MOST_IDS) + 1
    elif vocab_size is None:
        size = dataset.vocab_size
    else:
        size = vocab_size
        if size < dataset.vocab_size and dataset.vocab_size == BYTE_VOCAB_SIZE:
            raise ConfigError(f"vocab_size ({size}) must be at least {BYTE_VOCAB_SIZE} for text as bytes; leave it out")
        _check_ids(dataset, data.path, size)
    if data.valid_path:
        valid = texts.open("valid_path", data.valid_path, size)
        _check_same_kind("valid_path", [dataset, valid])
        _check_ids(valid, data.valid_path, size)
        return OpenData(dataset, valid, size, data)
    if data.valid_fraction == 0:
        return OpenData(dataset, None, size, data)
    first, last = dataset.split(1 - data.valid_fraction)
    return OpenData(first, last, size, data)


def _check_fits(data: DataConfig, vocab_size: int | None, asked: int | None = None) -> None:
    """Raise ConfigError for a tokenizer with more ids than the model, whose vocabulary is given.

    `asked` is the size that was asked for of one that the run has trained.
    """
    from ..data.sources import is_token_file
    from ..data.tokenizer import Tokenizer

    if vocab_size is None or data.tokenizer is None:
        return
    given = Tokenizer.load(data.tokenizer)
    if given.vocab_size > vocab_size and not all(map(is_token_file, data.path)):
        named = f"tokenizer ({data.tokenizer}) has" if asked is None else f"train_tokenizer ({asked}) came to"
        raise ConfigError(
            f"{named} {given.vocab_size:,} ids, and vocab_size ({vocab_size}) of the model must be at least that; "
            "leave vocab_size out, or take another tokenizer"
        )


def _check_ids(dataset: "TokenizedDataset", paths: tuple[str, ...], vocab_size: int) -> None:
    """Raise DataError for an id outside of the vocabulary, where no sidecar vouches for all ids, before training."""
    if dataset.info is None or len(paths) > 1:
        dataset.check_vocab(vocab_size)


def _conversations(
    files: list[Path], data: DataConfig, chat: ChatConfig, max_seq_len: int, seed: int
) -> OpenData:
    """Read, divide and encode conversations; a tokenizer that is trained on them sees the training part alone."""
    from ..data.holdout import hold_out, told_and_new

    tokenizer = None if data.train_tokenizer else load_tokenizer_for(files, data.tokenizer, chat)
    selection = select_chat(files, chat, seed)
    rows, name = selection.conversations, ", ".join(map(name_of, selection.sources))
    share, again = 0.0 if data.valid_path else data.valid_fraction, chat.held_out is HeldOut.AGAIN
    divided = hold_out(rows, share, again=again, name=name)
    if tokenizer is None:
        texts = (text for i in divided.train for text in rows[i].strings())
        place = keep_tokenizer(train_for(chat.template, texts, data.train_tokenizer))
        data = data.replace(tokenizer=str(place))
        tokenizer = load_tokenizer_for(files, data.tokenizer, chat)
    whole = encode_selection(selection, tokenizer, chat, max_seq_len).dataset
    kept: ChatDataset | None = None
    told, new = divided.told, divided.new
    if data.valid_path:
        others = find_files(data.valid_path, chat)
        if not others:
            raise ConfigError(f"valid_path ({data.valid_path[0]}) must be a file of conversations, as --data is")
        chosen = chat.replace(mix=(), max_samples=0)  # they choose what is trained on
        asked = select_chat(others, chosen, seed, each_category=False)  # it need not have all of them
        train, kept = whole, encode_selection(asked, tokenizer, chosen, max_seq_len).dataset
        told, new = told_and_new(rows, asked.conversations, kept.numbers)
    elif divided.kept:
        train, kept = whole.only(divided.train), whole.only(divided.kept)
    else:
        train = whole
    if kept is None:
        return OpenData(train, None, train.vocab_size, data)
    there = set(kept.numbers)
    named = {"told": there.intersection(told), "new": there.intersection(new)}
    parts = {part: kept.only(numbers) for part, numbers in named.items() if numbers}
    valid = parts["told"] if again and "told" in parts else kept
    return OpenData(train, valid, train.vocab_size, data, parts)


def _train_on_texts(data: DataConfig, chat: ChatConfig, progress: Progress) -> Path:
    """Train a tokenizer on what is trained on of texts, and return where it is."""
    from ..data.documents import list_inputs
    from ..data.sources import is_token_file

    tokens = next((path for path in (*data.path, *data.valid_path) if is_token_file(path)), None)
    if tokens is not None:
        raise ConfigError(
            f"train_tokenizer ({data.train_tokenizer}) cannot read {tokens}, which holds the ids of another tokenizer; "
            "leave it out, or give texts"
        )
    for path in data.path:
        if not os.path.exists(path):
            raise ConfigError(f"data ({path}) must be a file or a directory that exists; check the path")
    share = 1.0 if data.valid_path else 1 - data.valid_fraction
    listing = list_inputs(data.path)
    with progress(listing.bytes if listing else None) as show:
        texts = texts_to_train_on(data.path, share, chat.skip_bad_rows, lambda read: show(read, "tokenizer"))
        return keep_tokenizer(train_for(chat.template, texts, data.train_tokenizer))


@dataclass(frozen=True)
class _Texts:
    """How texts and token files are read."""

    tokenizer: str | None
    skip_bad_rows: bool
    progress: Progress

    def open(self, name: str, paths: tuple[str, ...], vocab_size: int | None) -> "TokenizedDataset":
        """Return the tokens of all paths, one after the other; of several, a copy in memory."""
        from ..data.tokens import TokenizedDataset

        parts = [self._open(name, path, vocab_size) for path in paths]
        if len(parts) == 1:
            return parts[0]
        _check_same_kind(name, parts)
        sizes = [part.vocab_size for part in parts]
        dataset = TokenizedDataset(
            np.concatenate([part.tokens for part in parts]),
            None if None in sizes else max(size for size in sizes if size is not None),
            ", ".join(part.name for part in parts),
            [reason for part in parts for reason in part.skipped],
        )
        dataset.info = next((part.info for part in parts if part.info is not None), None)
        dataset.notes = tuple(note for part in parts for note in part.notes)
        return dataset

    def _open(self, name: str, path: str, vocab_size: int | None) -> "TokenizedDataset":
        from ..data.corpus import open_corpus
        from ..data.sidecar import read_sidecar
        from ..data.sources import is_token_file
        from ..data.tokenizer import Tokenizer
        from ..data.tokens import TokenizedDataset

        if not os.path.exists(path):
            raise ConfigError(f"{name} ({path}) must be a file or a directory that exists; check the path")
        if not is_token_file(path) and (self.tokenizer is not None or not _fits_in_memory(path)):
            return self._tokenized(path, vocab_size)
        if self.tokenizer is None:
            return open_corpus(path, vocab_size, skip_bad_rows=self.skip_bad_rows)
        given = Tokenizer.load(self.tokenizer)
        info = read_sidecar(path)
        if info is not None:
            info.check_tokenizer(given, path, "leave --tokenizer out, or tokenize again with abi-train tokenize")
        if vocab_size is not None and vocab_size < given.vocab_size:
            raise ConfigError(
                f"vocab_size ({vocab_size}) must be at least {given.vocab_size}, the number of ids of {given.name}; "
                "leave it out"
            )
        return TokenizedDataset.load(path, given.vocab_size if vocab_size is None else vocab_size)

    def _tokenized(self, path: str, vocab_size: int | None) -> "TokenizedDataset":
        """Return the tokens of texts; they are kept in the cache directory, until texts or tokenizer change."""
        from ..data.documents import list_inputs
        from ..data.tokenizing import TokenizeConfig, tokenize_if_needed
        from ..data.tokens import TokenizedDataset

        made_of = repr((path, self.tokenizer and os.path.abspath(self.tokenizer)))
        key = hashlib.sha256(made_of.encode("utf-8", "surrogateescape")).hexdigest()[:24]
        output = own_cache("tokens") / f"{key}.bin"
        listing = list_inputs([path])
        with self.progress(listing.bytes if listing else None) as show:
            report = tokenize_if_needed(
                [path],
                output,
                TokenizeConfig(tokenizer=self.tokenizer, skip_bad_rows=self.skip_bad_rows),
                replace=True,
                progress=lambda done, tokens: show(done, counted(tokens, "token")),
            )
        dataset = TokenizedDataset.load(output, vocab_size)
        dataset.name, dataset.notes = path, report.notes
        return dataset


def _fits_in_memory(path: str) -> bool:
    """Say whether the ids of texts are kept in memory: not of many bytes, nor of who knows how many, packed."""
    from ..data.documents import expand

    files = [file.path for file in expand([path]) if not file.problem]
    packed = any(file.name.lower().endswith((".gz", ".parquet")) for file in files)
    return not packed and sum(file.stat().st_size for file in files) <= IN_MEMORY


def _check_same_kind(name: str, parts: "list[TokenizedDataset]") -> None:
    """Raise ConfigError for ids of two tokenizers; a .bin file without a sidecar may be anything."""
    from ..data.sources import is_token_file

    def kind(part: "TokenizedDataset") -> str | None:
        if part.info is None:
            return None if is_token_file(part.name) else "bytes"
        return part.info.tokenizer.sha256 if part.info.tokenizer else "bytes"

    around = {part.info.around: part.name for part in reversed(parts) if part.info is not None}
    if len(around) > 1:
        (first, first_name), (other_ids, other_name) = list(around.items())[-1], next(iter(around.items()))
        raise ConfigError(
            f"{name} ({other_name}) has ids {other_ids} around its documents, {first_name} has {first}; tokenize one "
            "of them again"
        )
    known = [part for part in parts if kind(part) is not None]
    other = next((part for part in known if kind(part) != kind(known[0])), None)
    if other is not None:
        raise ConfigError(
            f"{name} ({other.name}) must have the tokenizer of {known[0].name}; tokenize one of them again with it"
        )


def find_tokenizer(data: DataConfig, chat: ChatConfig | None, dataset: RunData) -> tuple["Tokenizer | None", str]:
    """Return the tokenizer of the data, or None, and what is to be said: why there is none though the ids came from
    one, or that it begins a text otherwise than the token file.

    That of conversations has the chat template they were trained with.
    """
    from ..data.chat import template_for
    from ..data.sources import is_token_file
    from ..data.tokenizer import Tokenizer

    tokenizer = None
    if data.tokenizer is not None:
        tokenizer = Tokenizer.load(data.tokenizer)
        if chat is not None and dataset.conversations:
            tokenizer.chat_template = template_for(tokenizer, chat.template).portable_source
    if dataset.info is None or not data.path:
        return tokenizer, ""
    described = next((path for path in data.path if is_token_file(path)), data.path[0])
    try:
        tokenizer = tokenizer or dataset.info.load_tokenizer(described)
    except DataError as error:
        return None, f"{error}; the run goes on without"
    return tokenizer, (tokenizer and dataset.info.other_convention(tokenizer, described)) or ""
