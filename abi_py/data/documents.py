"""Documents from text files, files of rows, directories and standard input, as blocks of bytes: no file is held whole.

    text file          one document               file of rows (sources.py)   one for each row: its text
    directory          its files, sorted by path; hidden ones, __pycache__, and token files with their X.bin.json not
    "-"                standard input, one document

The text of a row is that of its key `field`; of a row without it, that has the keys of a conversation, it is what is
said in it, a line for each turn, and the row is counted (`conversations`).

A file with a zero byte in its first 64 KB is not text.  A file given by name that is not text, empty or unreadable is
an error; one in a directory is left out and listed in `skipped`.  A directory that is a link is read where it leads,
once.  What was read is hashed as it passes, so that later work on the same data can be recognised.
"""

import hashlib
import itertools
import os
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from ..errors import DataError, counted
from .conversation_rows import has_turns, read_conversation
from .json_rows import BadRow, Row, stream_rows
from .parquet import parquet_rows
from .rows import LEAVE_OUT, first_row, kind, list_keys, text_value
from .sources import PROBE, READ_BLOCK, ROWS, Kind, NotUtf8, decoded, is_token_file, kind_of, open_source

__all__ = ["READ_BLOCK", "Document", "Documents", "Listing", "TextFormat", "expand", "list_inputs", "sidecar_path"]

Paths = Iterable[str | os.PathLike[str]]


class TextFormat(Enum):
    """How a file is read: one document, one for each row, or as its name says."""

    AUTO = "auto"
    TEXT = "text"
    JSONL = "jsonl"


class Document(NamedTuple):
    """Name (a file, or file:line of a row) and content, in blocks that are not empty; read it before the next one."""

    name: str
    blocks: Iterator[bytes]


def sidecar_path(path: str | os.PathLike[str]) -> Path:
    """Return where the description of a token file is: X.bin.json beside X.bin."""
    path = Path(path)
    return path.with_name(path.name + ".json")


# -- which files -------------------------------------------------------------------------------


@dataclass(frozen=True)
class File:
    """One file of the inputs: did the user give its very name, and what keeps it from being read ("" for nothing)."""

    path: Path
    named: bool
    problem: str = ""


def expand(inputs: Paths) -> Iterator[File]:
    """Yield the files of `inputs` in order; of a directory sorted by path, without what is hidden or made from text.

    A directory that is a link is read where it leads, unless that is or holds what is read already: then it is a file
    with a problem, and so is anything but a regular file.
    """
    for given in inputs:
        path = Path(given)
        if str(given) == "-" or not path.is_dir():
            yield File(path, True)
        else:
            yield from sorted(_files_under(path), key=lambda file: file.path.relative_to(path).as_posix())


def _files_under(root: Path) -> list[File]:
    found: list[File] = []
    seen: set[Path] = set()  # the real places of what was read
    waiting = [root]
    while waiting:
        top = waiting.pop(0)
        real = top.resolve()
        if any(real == other or real in other.parents or other in real.parents for other in seen):
            found.append(File(top, False, f"{top}: a link to {real}, which is or holds what is read already"))
            continue
        seen.add(real)
        links = []
        for folder, folders, names in os.walk(top):
            folders[:] = [name for name in folders if not name.startswith(".") and name != "__pycache__"]
            links += [Path(folder, name) for name in folders if os.path.islink(os.path.join(folder, name))]
            made = {name for name in names if name.endswith(".bin") and f"{name}.json" in names}
            made |= {f"{name}.json" for name in made}
            for name in names:
                file = Path(folder, name)
                if name.startswith(".") or name in made:
                    continue
                # A pipe or a broken link: opening it could wait for ever.
                found.append(File(file, False, "" if file.is_file() else f"{file}: not a regular file"))
        waiting += sorted(links)
    return found


@dataclass(frozen=True)
class Listing:
    """Number and size of the files of some inputs, and a SHA-256 of their paths, sizes and times of change."""

    files: int
    bytes: int
    digest: str


def list_inputs(inputs: Paths) -> Listing | None:
    """Look at the files without reading them; None if standard input is one of them."""
    digest, files, size = hashlib.sha256(), 0, 0
    for file in expand(inputs):
        if str(file.path) == "-":
            return None
        if file.problem:
            continue
        try:
            status = file.path.stat()
            facts = (os.path.abspath(file.path), status.st_size, status.st_mtime_ns)
        except OSError:  # a broken link
            facts = (os.path.abspath(file.path), 0, 0)
        digest.update(repr(facts).encode("utf-8", "surrogateescape"))
        files, size = files + 1, size + facts[1]
    return Listing(files, size, digest.hexdigest())


# -- what is in them ---------------------------------------------------------------------------


class Documents:
    """The documents of some inputs; iterate once.

    skipped        files of directories that were left out, each with its reason
    as_text        files of directories that are called .json and hold no rows: each is one document, as it is
    bad_rows       rows that were left out, if that was asked for; `first_bad_row` says where and why
    empty_rows     rows whose text is empty: no document
    conversations  rows that hold a conversation, of which what is said became the text; `first_conversation` is where
    bytes_read     bytes of all files read so far, as they are on the disk
    text_bytes     bytes of the documents so far
    """

    def __init__(
        self,
        inputs: Paths,
        *,
        format: TextFormat = TextFormat.AUTO,
        field: str = "text",
        skip_bad_rows: bool = False,
        utf8: bool = False,
        limit: int | None = None,
        stdin: BinaryIO | None = None,
    ) -> None:
        """Open nothing yet.

        `field` is the key of the text in a row.  With `utf8`, a text file of a directory that is not UTF-8 is left out
        (it is read twice); one that was given by name is for the consumer to refuse.  More than `limit` bytes of text
        together are a DataError: for consumers that keep all of it.
        """
        self.inputs = [str(given) for given in inputs]
        self.format, self.field, self.skip_bad_rows, self.utf8 = format, field, skip_bad_rows, utf8
        self.limit, self.stdin = limit, stdin
        self.skipped: list[str] = []
        self.as_text: list[str] = []
        self.bad_rows = self.empty_rows = self.conversations = self.bytes_read = self.text_bytes = 0
        self.first_bad_row = self.first_conversation = ""
        self._content = hashlib.sha256()

    @property
    def content(self) -> str:
        """SHA-256 of kind and content of all files that were used, in their order."""
        return self._content.hexdigest()

    def __iter__(self) -> Iterator[Document]:
        """Yield the documents; DataError names the file (and line) that breaks a rule, OSError passes through."""
        for file in expand(self.inputs):
            name = str(file.path)
            if name == "-":
                yield from self._documents(self.stdin or sys.stdin.buffer, "standard input", self._holds_rows(file))
                continue
            if file.problem:
                self.skipped.append(file.problem)
                continue
            try:
                opened = open(file.path, "rb")  # noqa: SIM115 (closed below; the try is only about opening)
            except PermissionError as error:
                if file.named:
                    raise
                self.skipped.append(f"{name}: {error.strerror}")
                continue
            with opened:
                as_rows = self._holds_rows(file)
                problem = "" if file.named else self._problem(opened, name, as_rows)
                if problem:
                    self.skipped.append(problem)
                    continue
                yield from self._documents(opened, name, as_rows)

    def notes(self) -> list[str]:
        """Return a line for each thing that was left out or read in another way than one might think."""
        found: tuple[tuple[int, str, list[str]], ...] = (
            (len(self.skipped), "left out: {}", ["file", *self.skipped[:1]]),
            (self.bad_rows, "left out: {}", ["bad row", self.first_bad_row]),
            (self.empty_rows, "left out, without text: {}", ["row"]),
            (len(self.as_text), "read as text, because without rows: {}", [".json file", *self.as_text[:1]]),
            (
                self.conversations,
                "read as plain text, without a template: {}",
                ["conversation", self.first_conversation],
            ),
        )
        return [
            ", the first: ".join([what.format(counted(count, noun)), *first])
            for count, what, (noun, *first) in found
            if count
        ]

    def nothing_left(self) -> DataError:
        """Return the error for inputs without any document."""
        name = ", ".join(self.inputs) or "the list of inputs"
        if self.skipped:
            why = f"left out: {counted(len(self.skipped), 'file')}, the first: {self.skipped[0]}"
        elif self.bad_rows or self.empty_rows:
            why = f"left out: {counted(self.empty_rows, 'empty row')} and {counted(self.bad_rows, 'bad one')}"
            why += f", the first bad one: {self.first_bad_row}" if self.bad_rows else ""
        else:
            why = "there is no row in it" if self.bytes_read else "it has no files"
        return DataError(
            f"{name} holds no text: {why}; give a text file, a directory of them, or a .bin file of u32 token ids"
        )

    def _holds_rows(self, file: File) -> bool:
        """Say whether a file is read as rows: as was asked for, or by its name."""
        by_name = kind_of(file.path)
        if self.format is not TextFormat.AUTO or str(file.path) == "-":
            return self.format is TextFormat.JSONL
        if by_name is not Kind.JSON or file.named:
            return by_name in ROWS
        try:  # Among the files of a directory, many a .json is not a data set but somebody's settings.
            row = first_row(file.path)
        except DataError:
            row = None
        if has_turns(row) or (isinstance(row, dict) and not {self.field, "text", "content"}.isdisjoint(row)):
            return True
        self.as_text.append(str(file.path))
        return False

    def _problem(self, file: BinaryIO, name: str, as_rows: bool) -> str:
        """Say why a file of a directory is left out, or return "" and go back to its beginning."""
        problem = ""
        try:
            if not as_rows:
                self._read_through(_text_blocks(open_source(file, name), name), name)
            elif kind_of(name) is not Kind.PARQUET and not open_source(file, name).read(1):
                problem = _empty(name)
        except DataError as error:
            problem = str(error)
        file.seek(0)
        return problem

    def _read_through(self, blocks: Iterator[bytes], name: str) -> None:
        """Raise DataError if blocks are not text; only the first is looked at unless UTF-8 was asked for."""
        try:
            for _ in decoded(blocks) if self.utf8 else itertools.islice(blocks, 1):
                pass
        except NotUtf8 as error:
            raise DataError(f"{name} is not UTF-8 at byte {error.byte}") from None

    def _documents(self, file: BinaryIO, name: str, as_rows: bool) -> Iterator[Document]:
        digest = hashlib.sha256(b"jsonl " if as_rows else b"text ")

        def passed(block: bytes) -> None:
            digest.update(block)
            self.bytes_read += len(block)

        if not as_rows:
            blocks = _text_blocks(open_source(file, name, passed), name)
            yield Document(name, self._measured(itertools.chain([next(blocks)], blocks)))
            for _ in blocks:  # the digest covers what the consumer did not want, too
                pass
        elif kind_of(name) is Kind.PARQUET:
            yield from self._rows(parquet_rows(Path(name)), name)
        else:
            reader = open_source(file, name, passed)
            if not reader.peek(1):
                raise DataError(_empty(name))
            yield from self._rows(stream_rows(reader, name), name)
        while block := file.read(READ_BLOCK):  # what comes after the rows, and the whole of a table
            passed(block)
        self._content.update(digest.digest())

    def _rows(self, rows: Iterator[Row], name: str) -> Iterator[Document]:
        for line, row in rows:
            place = f"{name}:{line}"
            try:
                text = self._text_of(row, place)
            except BadRow as bad:
                message = f"{place}: {bad}"
                if not self.skip_bad_rows:
                    raise DataError(
                        f"{message}; correct it, {LEAVE_OUT}, or read the file as it is "
                        "(abi-train tokenize --data-format text)"
                    ) from None
                self.bad_rows += 1
                self.first_bad_row = self.first_bad_row or message
                continue
            if text:
                yield Document(place, self._measured(iter([text.encode("utf-8")])))
            else:
                self.empty_rows += 1

    def _measured(self, blocks: Iterator[bytes]) -> Iterator[bytes]:
        for block in blocks:
            self.text_bytes += len(block)
            if self.limit is not None and self.text_bytes > self.limit:
                raise DataError(
                    f"{', '.join(self.inputs)}: more than {self.limit:,} bytes of text, too much to keep in memory; "
                    "write its ids to a file with abi-train tokenize, and give that"
                )
            yield block

    def _text_of(self, row: Any, place: str) -> str:
        """Return the text of a row; BadRow says what is wrong with it."""
        if isinstance(row, BadRow):
            raise row
        if isinstance(row, dict) and row.get(self.field) is not None:
            return text_value(row[self.field], self.field, may_be_empty=True)
        if self.field == "text" and has_turns(row):  # unless the user named another key
            text = "\n".join(read_conversation(row).strings())
            self.conversations += 1
            self.first_conversation = self.first_conversation or place
            return text
        if not isinstance(row, dict):
            raise BadRow(f"a row must be a JSON object, found {kind(row)}")
        if self.field in row:
            raise BadRow(f"{self.field!r} must be a string, found null")
        others = " or those of a conversation" if self.field == "text" else ""
        raise BadRow(
            f"found the keys {list_keys(row)}; expected {self.field!r}{others}; name the key that holds the text "
            "(abi-train tokenize --field)"
        )


def _empty(name: str) -> str:
    return f"{name} is empty; a document needs at least one byte"


def _text_blocks(file: BinaryIO, name: str) -> Iterator[bytes]:
    """Yield a text in blocks, at least one; DataError if it is empty or holds a zero byte where that is looked for."""
    block = file.read(READ_BLOCK)
    if not block:
        raise DataError(_empty(name))
    at = block.find(b"\0", 0, PROBE)
    if at >= 0:
        remedy = "convert it to UTF-8, or name it .bin if it holds u32 token ids"
        if is_token_file(name):
            remedy = "token ids need no tokenizing: give it to abi-train run --data"
        raise DataError(f"{name} is not text: byte {at} is zero; {remedy}")
    while block:
        yield block
        block = file.read(READ_BLOCK)
