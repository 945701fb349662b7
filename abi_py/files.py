"""Writing files so that a crash, a full disk or a power cut leaves the old file or the new one, never half of one.

    atomic_file         one file
    atomic_text, atomic_json
    atomic_files        files that belong together, which appear together
    atomic_directory    a directory
    check_free          refuses a directory that holds what is going to be written
    check_place         refuses a place where nothing can be made

All write under a temporary name in the target's own directory, `.abi-PID-RANDOM.tmp`: new, never a link that somebody
has put there, with the permissions that the umask leaves.  Everything is forced to the disk and then renamed.  While a
temporary file or directory is being written, its process holds a lock on it.  What carries such a name and is not
locked is the left-over of a killed process, and the next one that writes in that directory removes it.
"""

import contextlib
import errno
import filecmp
import hashlib
import json
import os
import re
import secrets
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from .errors import DISK_FULL, REMEDIES, ConfigError
from .locks import try_lock

__all__ = [
    "OLD",
    "HashingWriter",
    "atomic_directory",
    "atomic_file",
    "atomic_files",
    "atomic_json",
    "atomic_text",
    "check_free",
    "check_place",
    "finish_replacement",
    "fsync_directory",
    "json_text",
    "remove_directory",
    "remove_leftovers",
    "sha256_of",
    "write_inside",
    "write_pieces",
    "write_synced",
]

PIECE = 1 << 22  # bytes hashed and written at once
OLD = ".abi-old-"  # what `atomic_directory` replaces has its name with this before it, for a moment
TEMPORARY = re.compile(r"\.abi-\d+-[0-9a-f]{16}\.tmp")
NEW_FILE = os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_BINARY", 0)


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


def write_pieces(file: BinaryIO, pieces: Iterable[Any]) -> dict[str, Any]:
    """Write pieces (bytes or arrays) to an open file and return {"size": ..., "sha256": ...}."""
    writer = HashingWriter(file)
    for piece in pieces:
        writer.write(piece)
    return {"size": writer.size, "sha256": writer.sha256}


def write_synced(path: str | Path, pieces: Iterable[Any]) -> dict[str, Any]:
    """Do the same with a file that is made here, in a directory that nobody reads yet, and force it to the disk.

    FileExistsError if it is there.
    """
    with os.fdopen(os.open(path, NEW_FILE, 0o666), "wb") as file:
        facts = write_pieces(file, pieces)
        file.flush()
        os.fsync(file.fileno())
    return facts


def write_inside(directory: Path, name: str, pieces: Iterable[Any]) -> dict[str, Any]:
    """Do the same with a file of such a directory, which may be named as one in a directory inside it."""
    (directory / name).parent.mkdir(exist_ok=True)
    return write_synced(directory / name, pieces)


def fsync_directory(path: str | Path) -> None:
    """Force a directory's list of names to the disk (systems without that notion: nothing to do)."""
    if os.name != "posix":
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def check_place(name: str, path: str | Path) -> None:
    """Raise ConfigError if no file or directory can be made at `path`, the value of `name`; nothing is made.

    Of the directories above it those that are missing can be made: the nearest that is there is looked at.
    """
    above = next((each for each in Path(path).parents if os.path.lexists(each)), Path("."))
    if not above.is_dir():
        kind = "a file" if above.is_file() else "no directory"
        raise ConfigError(f"{name} ({path}) must be in a directory, and {above} is {kind}; give another path")
    if not os.access(above, os.W_OK | os.X_OK):
        raise ConfigError(
            f"{name} ({path}) must be in a directory where files can be made, and in {above} none can; "
            f"{REMEDIES[errno.EACCES]}"
        )


# -- files -------------------------------------------------------------------------------------


@contextlib.contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Let an error of the system name `path` where it names a temporary file, or nothing: a write on a full disk."""
    try:
        yield
    except OSError as error:
        name = error.filename
        if error.errno in DISK_FULL if name is None else any(map(TEMPORARY.fullmatch, Path(str(name)).parts)):
            error.filename = str(path)
            if error.filename2 is not None:
                del error.filename2  # set to None it would be printed
        raise


@contextlib.contextmanager
def atomic_files(last: str | Path) -> Iterator[Callable[[str | Path], BinaryIO]]:
    """Write files that belong together; yields a function that opens a new binary file for a path.

    When the block ends without an error, the files take their places, `last` after the others: it is the one without
    which a reader takes none of them.  If it was there, with other content, it is removed before the first is replaced:
    new files and old ones never count together.  After an error in the block everything is as it was.
    """
    last, opened = Path(last), dict[Path, tuple[Path, BinaryIO]]()

    def open_new(path: str | Path) -> BinaryIO:
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        with _naming(path):
            temporary, descriptor = _temporary_file(path.parent)
        opened[path] = temporary, os.fdopen(descriptor, "wb")
        return opened[path][1]

    try:
        with _naming(last):
            yield open_new
            for _, file in opened.values():
                file.flush()
                os.fsync(file.fileno())
                if os.name != "posix":
                    file.close()  # elsewhere, what is open cannot be renamed
            _put_files_in_place({path: temporary for path, (temporary, _) in opened.items()}, last)
    finally:
        for temporary, file in opened.values():
            with contextlib.suppress(OSError):  # the disk is full: said already
                file.close()
            temporary.unlink(missing_ok=True)


def _put_files_in_place(made: dict[Path, Path], last: Path) -> None:
    others = [path for path in made if path != last]
    if others and last.is_file() and not filecmp.cmp(last, made[last], shallow=False):
        last.unlink()
        fsync_directory(last.parent)
    for path in others:
        os.replace(made[path], path)
    for directory in {path.parent for path in others}:
        fsync_directory(directory)
    os.replace(made[last], last)
    fsync_directory(last.parent)


@contextlib.contextmanager
def atomic_file(path: str | Path) -> Iterator[BinaryIO]:
    """Open a new binary file that takes the place of `path` only when the block ends without an error."""
    with atomic_files(path) as open_new:
        yield open_new(path)


def atomic_text(path: str | Path, text: str) -> None:
    """Write a small UTF-8 text file in one indivisible step."""
    with atomic_file(path) as file:
        file.write(text.encode("utf-8"))


def json_text(content: Mapping[str, Any]) -> str:
    """Return a JSON object as text for people to read, in ASCII; ValueError for NaN and infinity, which JSON lacks."""
    return json.dumps(content, indent=2, allow_nan=False) + "\n"


def atomic_json(path: str | Path, content: Mapping[str, Any]) -> None:
    """Write a JSON object in one indivisible step; ValueError for NaN and infinity."""
    atomic_text(path, json_text(content))


# -- directories -------------------------------------------------------------------------------


@contextlib.contextmanager
def atomic_directory(final: str | Path) -> Iterator[Path]:
    """Yield a new directory, which takes the place of `final` only when the block ends without an error.

    The files in it are written with `write_synced`.  What was there before is renamed to OLD + its name while the
    new one takes its place, and then removed; of a link only the link, not what it points to.
    """
    final = Path(final)
    final.parent.mkdir(parents=True, exist_ok=True)
    with _naming(final):
        temporary, descriptor = _temporary_directory(final.parent)
    try:
        with _naming(final):
            yield temporary
            fsync_directory(temporary)
            _put_directory_in_place(temporary, final)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    finally:
        if descriptor is not None:
            os.close(descriptor)


def _put_directory_in_place(temporary: Path, final: Path) -> None:
    if not os.path.lexists(final):
        os.replace(temporary, final)
        fsync_directory(final.parent)
        return
    old = final.with_name(OLD + final.name)
    os.replace(final, old)
    try:
        os.replace(temporary, final)
        fsync_directory(final.parent)
    except BaseException:
        if not os.path.lexists(final):
            os.replace(old, final)
        raise
    remove_directory(old)


def finish_replacement(final: Path) -> None:
    """Clear up after a process that was killed while a directory took the place of another: finish it, or undo it."""
    old = final.with_name(OLD + final.name)
    if not os.path.lexists(old):
        return
    if os.path.lexists(final):
        remove_directory(old)
    else:
        os.replace(old, final)


def remove_directory(path: Path) -> None:
    """Remove a directory; of a link only the link.

    It is renamed first: an interrupted removal must not leave something that looks like the whole.
    """
    if path.is_symlink():
        path.unlink()
        return
    doomed = path.with_name(_name())
    os.replace(path, doomed)
    shutil.rmtree(doomed)


# -- temporary names ---------------------------------------------------------------------------


def _name() -> str:
    return f".abi-{os.getpid()}-{secrets.token_hex(8)}.tmp"


def _temporary_file(directory: Path) -> tuple[Path, int]:
    """Return a new file, and its descriptor, by which it is locked."""
    _sweep_once(directory)
    while True:
        path = directory / _name()
        descriptor = os.open(path, NEW_FILE, 0o666)
        if try_lock(descriptor) is not False and (os.name != "posix" or os.fstat(descriptor).st_nlink):
            return path, descriptor
        os.close(descriptor)  # another process takes it for a left-over: has removed it, or is about to


def _temporary_directory(directory: Path) -> tuple[Path, int | None]:
    """Return a new directory, and its descriptor, by which it is locked (None where directories cannot be opened)."""
    _sweep_once(directory)
    while True:
        path = directory / _name()
        path.mkdir()
        if os.name != "posix":
            return path, None
        with contextlib.suppress(FileNotFoundError):  # as above
            descriptor = os.open(path, os.O_RDONLY)
            if try_lock(descriptor) is not False and path.exists():
                return path, descriptor
            os.close(descriptor)


_swept: set[str] = set()


def _sweep_once(directory: Path) -> None:
    """Remove left-overs when this process writes to a directory for the first time."""
    place = os.path.realpath(directory)
    if place not in _swept:
        _swept.add(place)
        remove_leftovers(directory)


def remove_leftovers(directory: str | Path) -> None:
    """Remove what killed processes left half-written in a directory: names that we make, and nobody's lock on them."""
    with contextlib.suppress(OSError), os.scandir(directory) as entries:
        found = [entry for entry in entries if TEMPORARY.fullmatch(entry.name) and not entry.is_symlink()]
        for entry in found:
            with contextlib.suppress(OSError):  # somebody else's, or removed in this moment
                _remove_if_unlocked(Path(entry.path), entry.is_dir(follow_symlinks=False))


def _remove_if_unlocked(path: Path, is_directory: bool) -> None:
    descriptor = os.open(path, (os.O_RDONLY if is_directory else os.O_RDWR) | getattr(os, "O_NOFOLLOW", 0))
    try:
        if not try_lock(descriptor):
            return
        if is_directory:
            shutil.rmtree(path)
        else:
            path.unlink()
    finally:
        os.close(descriptor)


def check_free(directory: Path, names: Iterable[str], setting: str, remedy: str) -> None:
    """Raise ConfigError if a directory has one of the entries `names`, all that is going to be written there."""
    there = next((name for name in names if os.path.lexists(directory / name)), None)
    if there is not None:
        raise ConfigError(f"{setting} ({directory}) must not hold {there} yet, which would be overwritten; {remedy}")
