"""What a file is, by its name and its first bytes, and its bytes: unpacked, without a byte order mark.

    X.jsonl, X.ndjson   rows of JSON, one a line          X.bin   token ids (tokens.py)
    X.json              rows in one JSON document         other   text
    X.parquet           rows of a table
    X.txt.gz, X.jsonl.gz, X.json.gz ...: unpacked on the way; recognised by the first bytes, whatever the name

Every reader of texts and rows opens its files here, so what looks like another kind of file (an archive, an array, a
pickle, UTF-16) is refused by name, wherever it is given.  A packed file is unpacked piece by piece: memory does not
grow with what it unpacks to.
"""

import codecs
import gzip
import io
import os
import re
import zlib
from collections.abc import Callable, Iterable, Iterator
from enum import Enum
from pathlib import Path
from typing import Any, BinaryIO

from ..errors import DataError

__all__ = [
    "PROBE",
    "READ_BLOCK",
    "ROWS",
    "Kind",
    "NotUtf8",
    "decoded",
    "is_token_file",
    "kind_of",
    "look_alike",
    "open_source",
    "utf_16",
]

READ_BLOCK = 1 << 20  # bytes read at once
PROBE = 1 << 16  # first bytes that are looked at


class Kind(Enum):
    """What a file holds, as its name says."""

    TEXT = "text"
    LINES = "rows, one a line"
    JSON = "rows in one document"
    PARQUET = "rows of a table"
    TOKENS = "token ids"


ROWS = frozenset({Kind.LINES, Kind.JSON, Kind.PARQUET})

_KINDS = {".jsonl": Kind.LINES, ".ndjson": Kind.LINES, ".json": Kind.JSON}


def kind_of(path: str | os.PathLike[str]) -> Kind:
    """Return what a file of this name holds; nothing is opened."""
    name = Path(path).name.lower()
    for suffix, kind in ((".bin", Kind.TOKENS), (".parquet", Kind.PARQUET)):
        if name.endswith(suffix):
            return kind
    return _KINDS.get(Path(name.removesuffix(".gz")).suffix, Kind.TEXT)


def is_token_file(path: str | os.PathLike[str]) -> bool:
    """Say whether `path` is read as token ids: called .bin, and no directory."""
    return kind_of(path) is Kind.TOKENS and not os.path.isdir(path)


# -- what it is not ----------------------------------------------------------------------------

GZIP = b"\x1f\x8b\x08"
_UNPACK = "unpack it, and give the files in it"

# First bytes that no text and no token id (below 2^19) begins with: what the file is, and what to do.
_MAGIC: tuple[tuple[bytes, str, str], ...] = (
    (rb"\x93NUMPY", "a NumPy array (.npy)", 'write its ids with numpy.load(NAME).astype("<u4").tofile("X.bin")'),
    (rb"PK(?:\x03\x04|\x05\x06)", "a zip archive (.zip, .npz, .docx, .pt, ...)", _UNPACK),
    (rb"%PDF-", "a PDF document", "write its text to a file first"),
    (rb"\x80[\x04\x05]\x95|\x80[\x02\x03][\x7d\x5d(c\x8a]", "a pickle, which is a program and never run here",
     "save its texts as .jsonl, its ids as uint32"),
    (rb"GGUF[\x01-\x0f]\0", "a model in GGUF", "give texts or token ids"),
    (rb"PAR1\x15", "a Parquet file", "give it as X.parquet, without --data-format text"),
    (rb"ARROW1\0\0|\xff{4}...\0\x10\0\0\0", "an Arrow table", "write it as .jsonl or .parquet"),
    (rb"SQLite format 3\0", "an SQLite database", "write its texts as .jsonl"),
    (rb"\x89HDF\r\n\x1a\n", "an HDF5 file", "write its texts as .jsonl, its ids as uint32"),
    (rb"\x1f\x8b\x08", "packed by gzip", "unpack it with gzip -d"),
    (rb"BZh[1-9]1AY&SY", "packed by bzip2", "unpack it with bzip2 -d"),
    (rb"\xfd7zXZ\0", "packed by xz", "unpack it with xz -d"),
    (rb"\x28\xb5\x2f\xfd", "packed by zstd", "unpack it with zstd -d"),
    (rb"7z\xbc\xaf\x27\x1c", "a 7z archive", _UNPACK),
    (rb"Rar!\x1a\x07", "a RAR archive", _UNPACK),
    (rb"\x89PNG\r\n\x1a\n|\xff\xd8\xff[\xc0-\xff]|GIF8[79]a", "a picture", "give texts or token ids"),
)  # fmt: skip
_MAGIC_PATTERNS = [(re.compile(pattern, re.DOTALL), what, remedy) for pattern, what, remedy in _MAGIC]


def look_alike(head: bytes) -> tuple[str, str] | None:
    """Return what a file that begins with `head` is, and the remedy, if it is neither text nor token ids."""
    for pattern, what, remedy in _MAGIC_PATTERNS:
        if pattern.match(head):
            return what, remedy
    if head[8:10] == b'{"' and int.from_bytes(head[:8], "little") < 100_000_000:  # the limit of the format itself
        return "a model in safetensors", "give texts or token ids"
    return None


def utf_16(head: bytes) -> str | None:
    """Return the name of the encoding if a text that begins with `head` is UTF-16 or UTF-32: by its mark, or by zeros
    at nearly every second place (0.9: a guess at an encoding must be surer than that a file is not text)."""
    for mark, name in (
        (codecs.BOM_UTF32_LE, "UTF-32"),
        (codecs.BOM_UTF32_BE, "UTF-32"),
        (codecs.BOM_UTF16_LE, "UTF-16"),
        (codecs.BOM_UTF16_BE, "UTF-16"),
    ):
        if head.startswith(mark):
            return name
    part = head[:1024]
    even, odd = part[::2].count(0), part[1::2].count(0)
    if max(even, odd) >= 2 and min(even, odd) == 0 and max(even, odd) >= 0.9 * (len(part) // 2):
        return "UTF-16LE" if odd else "UTF-16BE"
    return None


def _check_head(head: bytes, name: str) -> None:
    encoding = utf_16(head)
    if encoding is not None:
        raise DataError(f"{name} is {encoding}, not UTF-8; convert it with iconv -f {encoding} -t UTF-8 OLD > NEW")
    found = look_alike(head)
    if found is not None:
        raise DataError(f"{name} is {found[0]}, neither text nor rows; {found[1]}")


# -- its bytes ---------------------------------------------------------------------------------


class _Raw(io.RawIOBase):
    """A file of bytes over a function that returns the next ones, at most as many as it is asked for."""

    def __init__(self, read: Callable[[int], bytes]) -> None:
        super().__init__()
        self._read = read

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        block = self._read(len(buffer))
        buffer[: len(block)] = block
        return len(block)


def _buffered(read: Callable[[int], bytes]) -> io.BufferedReader:
    return io.BufferedReader(_Raw(read), READ_BLOCK)


def _with_head(head: bytes, file: BinaryIO) -> io.BufferedReader:
    """Return a file of `head` and then what `file` has left."""
    waiting = [head] if head else []

    def read(size: int) -> bytes:
        if not waiting:
            return file.read(size)
        block = waiting.pop()
        if len(block) > size:
            waiting.append(block[size:])
        return block[:size]

    return _buffered(read)


def _unpacked(packed: io.BufferedReader, name: str) -> io.BufferedReader:
    unpacker = gzip.GzipFile(fileobj=packed)
    done = 0

    def read(size: int) -> bytes:
        nonlocal done
        try:
            block = unpacker.read1(size)
        except (OSError, EOFError, zlib.error) as error:
            if isinstance(error, OSError) and not isinstance(error, gzip.BadGzipFile):
                raise
            raise DataError(
                f"{name}: its gzip data are damaged after byte {done} of what they unpack to ({error}); get it again"
            ) from None
        done += len(block)
        return block

    return _buffered(read)


def open_source(file: BinaryIO, name: str, passed: Callable[[bytes], None] | None = None) -> io.BufferedReader:
    """Return the bytes of an open file for reading: unpacked if they are gzip, without the mark of UTF-8.

    passed(block) is called with every block of the file itself, packed or not.  DataError naming `name` if the file is
    of another kind, is UTF-16 or UTF-32, or (when that place is read) its gzip data are damaged.
    """

    def tap(size: int) -> bytes:
        block = file.read(size)
        if passed is not None and block:
            passed(block)
        return block

    reader = _buffered(tap)
    head = reader.read(PROBE)
    if head.startswith(GZIP):
        reader = _unpacked(_with_head(head, reader), name)
        head = reader.read(PROBE)
    _check_head(head, name)
    return _with_head(head.removeprefix(codecs.BOM_UTF8), reader)


class NotUtf8(Exception):
    """A text is not UTF-8 from `byte` on; the caller says which."""

    def __init__(self, byte: int) -> None:
        super().__init__(byte)
        self.byte = byte


def decoded(blocks: Iterable[bytes]) -> Iterator[str]:
    """Yield a text that comes in blocks of bytes, in pieces that are not empty; NotUtf8 names the first bad byte."""
    decoder, read = codecs.getincrementaldecoder("utf-8")(), 0
    try:
        for block in blocks:
            text = decoder.decode(block)
            read += len(block)
            if text:
                yield text
        decoder.decode(b"", final=True)
    except UnicodeDecodeError as error:
        waiting = len(decoder.getstate()[0])  # the beginning of a character, from the block before
        raise NotUtf8(read - waiting + error.start) from None
