"""Writing files so that a crash, a full disk or a power cut leaves the old file or the new one, never half of one."""

import contextlib
import hashlib
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

__all__ = ["HashingWriter", "atomic_file", "atomic_text", "fsync_directory", "sha256_of"]

PIECE = 1 << 22  # bytes hashed and written at once


class HashingWriter:
    """A binary file that counts and hashes what passes through it."""

    def __init__(self, file: BinaryIO) -> None:
        """Wrap an open binary file."""
        self.file, self.size, self._digest = file, 0, hashlib.sha256()

    def write(self, content: Any) -> None:
        """Write bytes, or any C-contiguous array, without making a copy of it."""
        view = memoryview(content).cast("B") if not isinstance(content, np.ndarray) else _bytes_of(content)
        for start in range(0, len(view), PIECE):
            piece = view[start : start + PIECE]
            self.file.write(piece)
            self._digest.update(piece)
        self.size += len(view)

    @property
    def sha256(self) -> str:
        """SHA-256 of everything written so far, in hexadecimal."""
        return self._digest.hexdigest()


def _bytes_of(array: np.ndarray) -> memoryview:
    if not array.flags.c_contiguous:
        raise TypeError("the array must be C-contiguous; pass np.ascontiguousarray(array)")
    return array.reshape(-1).view(np.uint8).data


def sha256_of(path: str | Path) -> tuple[int, str]:
    """Return size and SHA-256 of a file, read in pieces."""
    digest, size = hashlib.sha256(), 0
    with open(path, "rb") as file:
        while piece := file.read(PIECE):
            digest.update(piece)
            size += len(piece)
    return size, digest.hexdigest()


def write_synced(path: str | Path, pieces: Iterable[Any]) -> dict[str, Any]:
    """Write pieces (bytes or arrays) to a new file, force them to the disk, and return {"size": ..., "sha256": ...}."""
    with open(path, "wb") as file:
        writer = HashingWriter(file)
        for piece in pieces:
            writer.write(piece)
        file.flush()
        os.fsync(file.fileno())
    return {"size": writer.size, "sha256": writer.sha256}


def fsync_directory(path: str | Path) -> None:
    """Force a directory's list of names to the disk (systems without that notion: nothing to do)."""
    if os.name != "posix":
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def atomic_file(path: str | Path) -> Iterator[BinaryIO]:
    """Open a new binary file that takes the place of `path` only when the block ends without an error."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".tmp-{path.name}-{os.getpid()}")
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        fsync_directory(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def atomic_text(path: str | Path, text: str) -> None:
    """Write a small UTF-8 text file in one indivisible step."""
    with atomic_file(path) as file:
        file.write(text.encode("utf-8"))
