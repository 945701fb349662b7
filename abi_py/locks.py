"""One writer to a directory: a lock that ends with its process, whatever ends it.

The lock is the kernel's (flock) on the file `.abi-lock`, in which the holder's process and host are for people to
read.  It ends with the holder, also after kill -9 or a power cut, and readers never ask for it.  The file is removed
when the lock is given back.  Where the file system has no locks, what the file says counts as long as that
process lives; of a process on another host this is assumed.
"""

import contextlib
import os
import platform
import re
import time
from pathlib import Path
from types import TracebackType

from .errors import ConfigError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

__all__ = ["LOCK", "DirectoryLock", "check_unlocked", "holder_of", "try_lock"]

LOCK = ".abi-lock"
HOLDER = re.compile(r"process (\d+) on (\S+)")
TRIES = 5  # it may be somebody who only looks (`holder_of`), or has not signed yet: that takes a moment
NO_LINK = getattr(os, "O_NOFOLLOW", 0)  # never write through a link that somebody has put there


def try_lock(descriptor: int) -> bool | None:
    """Lock an open file or directory until it is closed; False if it is locked elsewhere, None if that cannot be told.

    A lock belongs to the opening, not to the process: the same file opened twice in one process can be locked once.
    """
    if fcntl is None:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # this file system has no locks
        return None
    return True


class DirectoryLock:
    """Holds a directory for one writer from its making to `release` (or the end of a `with`, or of the process).

    `name` says which setting the directory is, for the ConfigError that names the holder if there is one already.
    """

    def __init__(self, directory: str | Path, name: str) -> None:
        """Make the directory if need be, and hold it."""
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        self._path, self._owner = directory / LOCK, os.getpid()
        left = TRIES
        while True:
            self._descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT | NO_LINK, 0o666)
            holder = _holder(self._descriptor)
            if holder is None and self._is_there():
                break
            os.close(self._descriptor)
            if holder is not None:
                left -= 1
                if left == 0:
                    raise ConfigError(_refusal(name, directory, holder))
                time.sleep(0.02)
        # A full disk takes the name of the holder away, not the lock.
        with contextlib.suppress(OSError):
            os.ftruncate(self._descriptor, 0)
            os.write(self._descriptor, f"process {self._owner} on {platform.node() or 'this host'}\n".encode())
        _held.add(self)

    def _is_there(self) -> bool:
        """Return whether the file that was locked still has its name: the holder before may just have removed it."""
        try:
            return os.path.samestat(os.fstat(self._descriptor), os.lstat(self._path))
        except FileNotFoundError:
            return False

    def release(self) -> None:
        """Give the directory back; a second call does nothing."""
        if self._owner != os.getpid() or self not in _held:
            return
        _held.discard(self)
        with contextlib.suppress(OSError):
            os.unlink(self._path)
        os.close(self._descriptor)

    def __enter__(self) -> "DirectoryLock":
        """Return the lock, held already."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Give the directory back."""
        self.release()

    def forget(self) -> None:
        """Leave the lock to the parent in a forked child, which would otherwise keep it beyond the parent's end."""
        os.close(self._descriptor)


_held: set[DirectoryLock] = set()


def _forget_all() -> None:
    for lock in _held:
        lock.forget()
    _held.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_all)


def holder_of(directory: str | Path) -> str | None:
    """Return who writes to a directory now ("process 4711 on HOST"), None if nobody does; nothing is changed."""
    try:
        descriptor = os.open(Path(directory) / LOCK, os.O_RDWR | NO_LINK)
    except OSError:
        return None
    try:
        return _holder(descriptor)
    finally:
        os.close(descriptor)


def check_unlocked(directory: str | Path, name: str) -> None:
    """Raise ConfigError if somebody writes to a directory now: for a check before anything is begun."""
    holder = holder_of(directory)
    if holder is not None:
        raise ConfigError(_refusal(name, Path(directory), holder))


def _refusal(name: str, directory: Path, holder: str) -> str:
    remedy = "wait for its end, stop it, or choose another directory"
    if fcntl is None:
        remedy += f"; if it has ended, delete {directory / LOCK}"
    return f"{name} ({directory}) must have one writer at a time, and {holder} is writing there; {remedy}"


def _holder(descriptor: int) -> str | None:
    """Return the holder of an open lock file; None if there is none, and then it is locked."""
    locked, text = try_lock(descriptor), os.read(descriptor, 1000).decode("utf-8", "replace").strip()
    os.lseek(descriptor, 0, os.SEEK_SET)
    known = HOLDER.fullmatch(text)
    if locked is False:
        return text if known else "another process"
    if locked is None and known is not None and _lives(int(known[1]), known[2]):
        return text
    return None


def _lives(process: int, host: str) -> bool:
    if host != platform.node() or os.name != "posix":
        return True
    try:
        os.kill(process, 0)  # signal 0 only asks whether the process exists
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        pass
    return True
