"""A tokenizer that a run trains on its own data: on the part that it trains its model on.

Of conversations that is exact.  A text is divided by tokens, of which there are none yet, so of texts it is the same
share of the characters: where a text changes its kind, the tokenizer may see some of what is kept for validation.

It is kept by its hash in the cache directory, so that texts can be encoded by it before the run has a directory of its
own, and from there the run takes it into that.
"""

import contextlib
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ..data.documents import Documents
    from ..data.tokenizer import Tokenizer

__all__ = ["keep_tokenizer", "own_cache", "special_tokens", "texts_of", "texts_to_train_on", "train_for"]


def special_tokens(template: str | None) -> tuple[str, ...]:
    """Return the special tokens of a tokenizer for a chat template, in the order of their ids.

    None, a template of one's own, and texts take those of DeepZig, with which a model that has learned from texts can
    go on to learn conversations.
    """
    from ..data.chat_templates import BUILT_IN
    from ..data.tokenizer_training import SPECIAL_TOKENS

    own = BUILT_IN[template].tokens if template in BUILT_IN else ()
    if not own or set(own) <= set(SPECIAL_TOKENS):
        return SPECIAL_TOKENS
    end = () if "<|im_end|>" in own else ("<|end_of_text|>",)
    return ("<unk>", "<pad>", *end, *own)


def train_for(template: str | None, texts: Iterable[str], size: int) -> "Tokenizer":
    """Train a tokenizer of at most `size` tokens on texts, for a chat template."""
    from ..data.tokenizer_training import train_tokenizer

    return train_tokenizer(texts, size, special_tokens(template))


def keep_tokenizer(tokenizer: "Tokenizer") -> Path:
    """Return a directory of the cache that holds the tokenizer."""
    directory = own_cache("tokenizers") / tokenizer.hash[:24]
    tokenizer.save(directory)
    return directory


def own_cache(name: str) -> Path:
    """Return the directory in which tokens of texts, or tokenizers, are kept: beside that of the compiled kernels."""
    from ..kernels.engine.cache import cache_directory, make_private

    directory = cache_directory().parent
    with contextlib.suppress(OSError):  # who writes there will say so
        make_private(directory)  # compiled kernels are not read from one that others may write
    return directory / name


def texts_to_train_on(
    paths: Sequence[str], share: float, skip_bad_rows: bool, passed: Callable[[int], None]
) -> Iterator[str]:
    """Yield the texts of files and directories up to a share of their characters; the rest is kept for validation.

    That is cut in tokens, and this, before there are any, in characters.  `passed` is told the bytes that were read.
    """
    from ..data.documents import Documents

    def documents() -> Documents:
        return Documents(paths, skip_bad_rows=skip_bad_rows, utf8=True)

    room = sys.maxsize
    if share < 1:
        room = int(share * sum(len(text) for text in texts_of(documents(), lambda: None)))
    read = documents()
    for text in texts_of(read, lambda: passed(read.bytes_read)):
        if room <= 0:
            break
        yield text[:room]
        room -= len(text)


def texts_of(documents: "Documents", passed: Callable[[], None]) -> Iterator[str]:
    """Yield the texts of documents in pieces, cut where a line ends; `passed` is called after each piece."""
    from ..data.pieces import TextCutter

    cutter = TextCutter()
    for document in documents:
        for text in cutter.cut(document):
            yield text
            passed()
