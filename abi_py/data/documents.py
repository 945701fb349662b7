"""Documents from text files, JSONL files, directories and standard input, as blocks of bytes: no file is held whole.

    text file          one document                                          named X.jsonl or X.ndjson: one for each row
    directory          its files, sorted by path; hidden ones, __pycache__, and token files with their X.bin.json not
    "-"                standard input, one document

A file with a zero byte in its first 64 KB is not text (UTF-16 counts as such).  A file given by name that is not text,
empty or unreadable is an error; one in a directory is left out and listed in `skipped`.  What was read is hashed as it
passes, so that later work on the same data can be recognised.
"""

import codecs
import hashlib
import json
import os
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from ..errors import DataError

__all__ = ["READ_BLOCK", "Document", "Documents", "Listing", "TextFormat", "list_inputs", "sidecar_path"]

READ_BLOCK = 1 << 20  # bytes read at once
TEXT_PROBE = 1 << 16  # bytes in which a zero byte is looked for
JSONL_SUFFIXES = (".jsonl", ".ndjson")

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
    """Return where the description of a token file lies: X.bin.json beside X.bin."""
    path = Path(path)
    return path.with_name(path.name + ".json")


# -- which files -------------------------------------------------------------------------------


@dataclass(frozen=True)
class _File:
    path: Path
    named: bool  # the user gave this very file, so that it is an error if it cannot be read


def _expand(inputs: Paths) -> Iterator[_File]:
    """Yield the files of `inputs` in order; of a directory sorted by path, without what is hidden or made from text."""
    for given in inputs:
        path = Path(given)
        if str(given) == "-" or not path.is_dir():
            yield _File(path, True)
            continue
        found = []
        for folder, folders, names in os.walk(path):
            folders[:] = [name for name in folders if not name.startswith(".") and name != "__pycache__"]
            made = {name for name in names if name.endswith(".bin") and f"{name}.json" in names}
            made |= {f"{name}.json" for name in made}
            found += [Path(folder, name) for name in names if not name.startswith(".") and name not in made]
        for file in sorted(found, key=lambda file: file.relative_to(path).as_posix()):
            yield _File(file, False)


@dataclass(frozen=True)
class Listing:
    """Number and size of the files of some inputs, and a SHA-256 of their paths, sizes and times of change."""

    files: int
    bytes: int
    digest: str


def list_inputs(inputs: Paths) -> Listing | None:
    """Look at the files without reading them; None if standard input is one of them."""
    digest, files, size = hashlib.sha256(), 0, 0
    for file in _expand(inputs):
        if str(file.path) == "-":
            return None
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

    skipped     files of directories that were left out, each with its reason
    bad_rows    rows of JSONL files that were left out, if that was asked for; `first_bad_row` says where and why
    empty_rows  rows whose text is empty: no document
    bytes_read  bytes of all files read so far
    """

    def __init__(
        self,
        inputs: Paths,
        *,
        format: TextFormat = TextFormat.AUTO,
        field: str = "text",
        skip_bad_rows: bool = False,
        utf8: bool = False,
        stdin: BinaryIO | None = None,
    ) -> None:
        """Open nothing yet.

        `field` is the key of the text in a JSONL row.  With `utf8`, a file of a directory that is not UTF-8 is left
        out (it is read twice); one that was given by name is for the consumer to refuse.
        """
        self.inputs = [str(given) for given in inputs]
        self.format, self.field, self.skip_bad_rows, self.utf8 = format, field, skip_bad_rows, utf8
        self.stdin = stdin
        self.skipped: list[str] = []
        self.bad_rows = self.empty_rows = self.bytes_read = 0
        self.first_bad_row = ""
        self._content = hashlib.sha256()

    @property
    def content(self) -> str:
        """SHA-256 of kind and content of all files that were used, in their order."""
        return self._content.hexdigest()

    def __iter__(self) -> Iterator[Document]:
        """Yield the documents; DataError names the file (and line) that breaks a rule, OSError passes through."""
        for file in _expand(self.inputs):
            if str(file.path) == "-":
                yield from self._documents(self.stdin or sys.stdin.buffer, "standard input")
                continue
            if not file.named and not file.path.is_file():  # a pipe or a broken link: opening it could wait for ever
                self.skipped.append(f"{file.path}: not a regular file")
                continue
            try:
                opened = open(file.path, "rb")  # noqa: SIM115 (closed below; the try is only about opening)
            except PermissionError as error:
                if file.named:
                    raise
                self.skipped.append(f"{file.path}: {error.strerror}")
                continue
            with opened:
                problem = None if file.named else self._problem(opened, str(file.path))
                if problem is not None:
                    self.skipped.append(problem)
                    continue
                yield from self._documents(opened, str(file.path))

    def nothing_left(self) -> DataError:
        """Return the error for inputs without any document."""
        name = ", ".join(self.inputs) or "the list of inputs"
        if self.skipped:
            why = f"{len(self.skipped)} files were left out, the first: {self.skipped[0]}"
        elif self.bad_rows or self.empty_rows:
            why = f"{self.empty_rows} rows are empty and {self.bad_rows} bad"
            why += f", the first bad one: {self.first_bad_row}" if self.bad_rows else ""
        else:
            why = "it has no files"
        return DataError(
            f"{name} holds no text: {why}; give a text file, a directory of them, or a .bin file of u32 token ids"
        )

    def _problem(self, file: BinaryIO, name: str) -> str | None:
        """Say why a file of a directory is left out, or return None and go back to its beginning."""
        block = file.read(READ_BLOCK)
        problem = _not_text(block, name)
        if problem is None and self.utf8:
            decoder, offset = codecs.getincrementaldecoder("utf-8")(), 0
            try:
                while block:
                    decoder.decode(block)
                    offset += len(block)
                    block = file.read(READ_BLOCK)
                decoder.decode(b"", final=True)
            except UnicodeDecodeError as error:
                problem = f"{name} is not UTF-8 near byte {offset + error.start}"
        file.seek(0)
        return problem

    def _documents(self, file: BinaryIO, name: str) -> Iterator[Document]:
        as_rows = self.format is TextFormat.JSONL
        if self.format is TextFormat.AUTO:
            as_rows = name.lower().endswith(JSONL_SUFFIXES)
        digest = hashlib.sha256(b"jsonl " if as_rows else b"text ")
        if as_rows:
            yield from self._rows(file, name, digest)
        else:
            blocks = self._blocks(file, name, digest)
            first = next(blocks)
            yield Document(name, _chain(first, blocks))
            for _ in blocks:  # what the consumer did not want belongs to the digest all the same
                pass
        self._content.update(digest.digest())

    def _blocks(self, file: BinaryIO, name: str, digest: Any) -> Iterator[bytes]:
        block = file.read(READ_BLOCK)
        problem = _not_text(block, name)
        if problem is not None:
            raise DataError(problem)
        while block:
            digest.update(block)
            self.bytes_read += len(block)
            yield block
            block = file.read(READ_BLOCK)

    def _rows(self, file: BinaryIO, name: str, digest: Any) -> Iterator[Document]:
        number = 0
        for number, line in enumerate(file, 1):
            digest.update(line)
            self.bytes_read += len(line)
            if not line.strip():
                continue
            place = f"{name}:{number}"
            try:
                text = self._text_of(line, place)
            except DataError as error:
                if not self.skip_bad_rows:
                    raise
                self.bad_rows += 1
                self.first_bad_row = self.first_bad_row or str(error)
                continue
            if text:
                yield Document(place, iter([text]))
            else:
                self.empty_rows += 1
        if number == 0:
            raise DataError(str(_not_text(b"", name)))

    def _text_of(self, line: bytes, place: str) -> bytes:
        """Return the text of a row as UTF-8."""
        remedy = "correct it, leave such rows out with --skip-bad-rows, or read the file as it is with --format text"
        try:
            row = json.loads(line.removeprefix(codecs.BOM_UTF8))
        except UnicodeDecodeError as error:
            raise DataError(f"{place}: byte {error.start} of the line is not UTF-8; {remedy}") from None
        except (json.JSONDecodeError, RecursionError) as error:
            raise DataError(f"{place}: a row must be a JSON object on one line, but {error}; {remedy}") from None
        if not isinstance(row, dict):
            raise DataError(f"{place}: a row must be a JSON object, not {type(row).__name__}; {remedy}")
        if self.field not in row:
            found = ", ".join(map(repr, list(row)[:8])) or "no keys"
            raise DataError(
                f"{place}: expected the key {self.field!r}, found {found}; name the key that holds the text "
                "(abi-train tokenize --field)"
            )
        text = row[self.field]
        if not isinstance(text, str):
            raise DataError(f"{place}: {self.field!r} must be text, not {type(text).__name__}; {remedy}")
        try:
            return text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise DataError(
                f"{place}: character {error.start} of {self.field!r} is half of a surrogate pair, which is no "
                f"character; {remedy}"
            ) from None


def _not_text(block: bytes, name: str) -> str | None:
    """Say why the first block of a file is not that of a text, or return None."""
    if not block:
        return f"{name} is empty; a document needs at least one byte"
    at = block.find(b"\0", 0, TEXT_PROBE)
    if at < 0:
        return None
    return f"{name} is not text: byte {at} is zero; convert it to UTF-8, or name it .bin if it holds u32 token ids"


def _chain(first: bytes, rest: Iterator[bytes]) -> Iterator[bytes]:
    yield first
    yield from rest
