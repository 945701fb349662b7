"""Text as token ids without a tokenizer: one id a byte.

    id 0 .. 255   this byte of the UTF-8 text
    id 256        end of a document; it follows every document, the last one too

So a model needs vocab_size 257 (BYTE_VOCAB_SIZE) or more, every text can be encoded, and decoding gives it back.  What
is a document, and what is not text, says documents.py.
"""

import contextlib
import importlib
import os
import sysconfig
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt

from ..errors import DataError
from .batch import TokenArray, as_tokens, check_integer
from .documents import Documents
from .sources import is_token_file
from .tokens import TokenizedDataset

END_OF_DOCUMENT = 256
BYTE_VOCAB_SIZE = 257
MOST_TEXT = 1 << 30  # bytes of text whose ids are kept in memory

# Folders of the standard library that are not for reading: tests, programs with their own window, tables of characters,
# and what is not part of it.  pydoc_data is read as text, not as source.
_SKIPPED_FOLDERS = {"test", "tests", "idle_test", "idlelib", "turtledemo", "lib2to3", "encodings", "ensurepip"}
_SKIPPED_FOLDERS |= {"lib-dynload", "pydoc_data", "site-packages", "dist-packages", "__pycache__"}


def byte_tokens(text: bytes | str) -> TokenArray:
    """Return one id (0 .. 255) a byte as uint32; a str is encoded as UTF-8.  No END_OF_DOCUMENT is added."""
    if isinstance(text, str):
        text = text.encode("utf-8")
    return np.frombuffer(text, np.uint8).astype(np.uint32)


def decode_bytes(ids: npt.ArrayLike) -> str:
    """Return the text of byte-level ids (N,): the inverse of `byte_tokens`.

    END_OF_DOCUMENT gives nothing; bytes that are not UTF-8, and ids above 256, give U+FFFD, the replacement character.
    """
    tokens = as_tokens(ids, "ids")
    tokens = tokens[tokens != END_OF_DOCUMENT]
    # Byte 255 occurs nowhere in UTF-8, so an id that is no byte becomes one replacement character.
    return np.minimum(tokens, 255).astype(np.uint8).tobytes().decode("utf-8", errors="replace")


def load_text_corpus(path: str | os.PathLike[str], *, skip_bad_rows: bool = False) -> TokenizedDataset:
    """Return a file of text or rows, or all of them under a directory (sorted by path), as byte-level tokens in memory.

    Takes 4 bytes of memory for each byte of text, of which there may be MOST_TEXT; for more, use `tokenize_to_file`,
    then TokenizedDataset.load.  Files of a directory that are not text, empty or unreadable are left out and listed in
    `skipped`; `notes` says that, and what rows were left out.  DataError if nothing is left, if `path` is one file and
    not text, or for a bad row unless they are skipped; OSError passes through.
    """
    documents = Documents([path], skip_bad_rows=skip_bad_rows, limit=MOST_TEXT)
    texts = [b"".join(document.blocks) for document in documents]
    if not texts:
        raise documents.nothing_left()
    dataset = _from_documents(texts, str(path), documents.skipped)
    dataset.notes = tuple(documents.notes())
    return dataset


def _from_documents(documents: list[bytes], name: str, skipped: Iterable[str] = ()) -> TokenizedDataset:
    tokens = np.empty(sum(map(len, documents)) + len(documents), np.uint32)
    at = 0
    for document in documents:
        tokens[at : at + len(document)] = np.frombuffer(document, np.uint8)
        at += len(document)
        tokens[at] = END_OF_DOCUMENT
        at += 1
    return TokenizedDataset(tokens, BYTE_VOCAB_SIZE, name, tuple(skipped))


def standard_library_corpus(limit_bytes: int = 4 << 20) -> TokenizedDataset:
    """Return text that is on every machine: the help topics of pydoc and the sources of the Python standard library.

    Topics come first (prose about Python), then public modules, then the others, each sorted by name, until
    `limit_bytes` of text are reached; the document at the limit is cut there.  What was chosen is then put in the order
    of the CRC-32 of the names: a fixed mixture, so that any piece of it, such as a validation split, has prose and
    code.  Same tokens for the same Python version.  DataError if there are no sources (a standard library in a zip
    file, and no topics).
    """
    left = check_integer("limit_bytes", limit_bytes, 1)
    chosen: list[tuple[int, str, bytes]] = []
    for name, text in _library_documents():
        if len(text) > left:
            text = text[:left].decode("utf-8", errors="ignore").encode("utf-8")  # do not cut through a character
            left = 0
        if text:
            chosen.append((zlib.crc32(name.encode()), name, text))
            left -= min(left, len(text))
        if not left:
            break
    if not chosen:
        raise DataError(
            f"no sources of the standard library found in {_library_folder()}; give a text of your own: "
            f"a text file, a directory, or a .bin file of u32 token ids"
        )
    return _from_documents([document for _, _, document in sorted(chosen)], "the Python standard library")


def _library_folder() -> Path:
    return Path(sysconfig.get_paths()["stdlib"])


def _library_documents() -> Iterator[tuple[str, bytes]]:
    """Yield (name, text) of the documents, those best to read first."""
    topics: dict[str, str] = {}
    with contextlib.suppress(ImportError):  # some systems ship Python without its documentation
        topics = importlib.import_module("pydoc_data.topics").topics
    for name in sorted(topics):
        yield f"topic {name}", topics[name].encode("utf-8")
    root = _library_folder()
    files = []
    for folder, folders, names in os.walk(root):
        folders[:] = [name for name in folders if name not in _SKIPPED_FOLDERS and not name.startswith("config-")]
        files += [Path(folder, name).relative_to(root).as_posix() for name in names if name.endswith(".py")]
    # Names with a leading underscore are for the library itself, and some are generated.
    for name in sorted(files, key=lambda name: (any(part.startswith("_") for part in name.split("/")), name)):
        try:
            text = (root / name).read_bytes()
        except OSError:
            continue  # the library may hold links to what is not installed; what is there is enough
        if b"\0" not in text:
            yield name, text


def open_corpus(
    path: str | os.PathLike[str], vocab_size: int | None = None, *, skip_bad_rows: bool = False
) -> TokenizedDataset:
    """Open what `path` is: NAME.bin as u32 token ids (mapped, not read), another file or a directory as byte-level
    text.

    `vocab_size` is for the check of a .bin file; text has BYTE_VOCAB_SIZE.  FileNotFoundError and other OSError pass
    through; DataError if it is neither tokens nor text.
    """
    if is_token_file(path):
        return TokenizedDataset.load(path, vocab_size)
    return load_text_corpus(path, skip_bad_rows=skip_bad_rows)
