"""The disk cache of compiled code: what is read back is what was written, or it is compiled again.

    a file       SHA-256 of its name and of the rest, 32 bytes    then the rest: machine code and what describes it
    directory    of the user alone; its name changes with whatever the code depends on

Numba hashes only the file in which a function is.  A kernel that calls a helper of another file would keep the old
helper after an edit, so everything that compiled code depends on goes into the *name* of the directory: the text of all
of `kernels/`, the versions of Python, Numba, llvmlite and NumPy, the processor and its features, the SIMD override, and
those settings of Numba that change the code it makes.  Only `kernels/__init__.py` is left out: it is a table of names,
and a test of the tree holds that no file of `kernels/` reads it.

Numba's own cache reads its files unchecked, and they are pickles: a flipped bit ends the process, or changes results.
So Numba is given a cache of ours.  Damage is found by the checksum, before anything is unpickled or loaded; malice it
cannot find, for who may write the file may write the checksum too.  Against that there is the directory: nothing is
read from one that belongs to somebody else or that others may write.
"""

import contextlib
import errno
import functools
import hashlib
import inspect
import os
import pickle
import platform
import stat
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import llvmlite
import llvmlite.binding as llvm
import numba
import numpy as np
from numba import config
from numba.core.caching import _Cache
from numba.core.compiler import CompileResult
from numba.core.runtime import rtsys
from numba.core.serialize import dumps

__all__ = ["STORE", "CacheWarning", "KernelCache", "Store", "cache_directory", "make_private", "numba_config"]

numba_config: Any = config  # its fields are made at run time: type checkers know none of them

# What Numba's environment variables (NUMBA_OPT ...) set.
NUMBA_SETTINGS = (
    *("OPT", "LOOP_VECTORIZE", "SLP_VECTORIZE", "ENABLE_AVX", "USING_SVML", "BOUNDSCHECK", "DEBUGINFO_DEFAULT"),
    *("CPU_NAME", "CPU_FEATURES"),
)

KERNEL = ".kernel"  # ends the names of compiled kernels
PART = ".part-"  # begins those of files that are being written
PART_SECONDS = 3600  # one that is older was left by a process that was killed
DIGEST = 32  # bytes of a SHA-256
ROOM = 1 << 18  # bytes; the largest kernel takes half of it
OTHERS_WRITE = stat.S_IWGRP | stat.S_IWOTH


class CacheWarning(RuntimeWarning):
    """Something is wrong with the cache of compiled code; results are right all the same, only later."""


def cache_directory() -> Path:
    """Return the directory of compiled kernels; its name changes whenever anything that they depend on does.

    `ABI_CACHE_DIR` chooses the parent directory (default: `$XDG_CACHE_HOME/abi_py`, or `~/.cache/abi_py`).
    """
    digest = hashlib.sha256()
    kernels = Path(__file__).resolve().parents[1]
    for path in sorted(set(kernels.rglob("*.py")) - {kernels / "__init__.py"}):
        digest.update(path.relative_to(kernels).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    features = llvm.get_host_cpu_features().flatten()
    host = platform.machine(), llvm.get_host_cpu_name(), features
    versions = (sys.version, numba.__version__, llvmlite.__version__, np.__version__, *host)
    settings = (os.environ.get("ABI_SIMD", ""), *(getattr(numba_config, name, None) for name in NUMBA_SETTINGS))
    digest.update(repr(versions + settings).encode())
    parent = os.environ.get("ABI_CACHE_DIR") or Path(os.environ.get("XDG_CACHE_HOME") or _home(), "abi_py")
    return Path(parent).absolute() / digest.hexdigest()[:16]


def _home() -> Path:
    """Return the user's own directory of caches; one without a home has none, and is told so at the first use."""
    try:
        return Path.home() / ".cache"
    except RuntimeError:
        return Path("/nonexistent")  # of Debian's policy, 9.2.3: the home of who has none


def make_private(directory: Path) -> None:
    """Make a directory that only its owner may look into, unless it is there; those above as usual."""
    directory.parent.mkdir(parents=True, exist_ok=True)
    directory.mkdir(mode=0o700, exist_ok=True)


def _linked(part: str, path: Path) -> bool:
    """Give a file its name if no file has it; say whether there is one now: not where links are unknown."""
    try:
        os.link(part, path)
    except FileExistsError:
        pass
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise
        return path.exists()  # exFAT, some network drives: two processes at the same moment keep the later choice
    return True


class Store:
    """A directory of checksummed files.  No trouble with it is an error: `read` gives None, `write` does nothing.

    Each kind of trouble is told once, by a CacheWarning.
    """

    def __init__(self, directory: Path) -> None:
        """Look at nothing yet: what imports the kernels need not use them."""
        self.directory = directory
        self.problem: str | None = None  # why nothing is kept
        self._told: set[str] = set()

    @functools.cached_property
    def usable(self) -> bool:
        """Whether the directory is there, or could be made, and belongs to the user alone."""
        try:
            make_private(self.directory.parent)
            make_private(self.directory)
            reason = _not_safe(self.directory.parent, above=True) or _not_safe(self.directory)
        except OSError as error:
            reason = f"{error.filename}: {error.strerror}"
        if reason is not None:
            self.problem = (
                f"compiled kernels are neither read nor kept: {reason}; set ABI_CACHE_DIR to a directory of your own"
            )
        return reason is None

    def path(self, name: str) -> Path:
        """Return where a name is kept."""
        return self.directory / name

    def names(self, beginning: str) -> list[str]:
        """Return the names that are kept and begin so."""
        if not self.usable:
            return []
        return sorted(path.name for path in self.directory.glob(f"{beginning}*"))

    def read(self, name: str) -> memoryview | None:
        """Return what was written under a name; None if there is nothing, or not what was written."""
        if not self.usable:
            self._tell_problem()
            return None
        path = self.path(name)
        try:
            if not stat.S_ISREG(path.stat().st_mode):
                raise OSError("it is not a regular file")
            raw = memoryview(path.read_bytes())
            if _digest(name, raw[DIGEST:]) != raw[:DIGEST]:
                raise OSError("its checksum is wrong")
        except FileNotFoundError:
            return None
        except OSError as error:
            self._tell("damage", f"{path} is damaged ({error.strerror or error}); what is damaged is compiled again")
            return None
        return raw[DIGEST:]

    def write(self, name: str, content: bytes | memoryview, first: bool = False) -> None:
        """Keep `content`; other processes find all of it or nothing.  With `first`, what is there already stays."""
        if self.usable:
            self._try(name, content, first)
        self._tell_problem()

    def has_room(self) -> bool:
        """Say whether a kernel can be kept now; why not, a warning tells."""
        if self.usable:
            self._try("room", bytes(ROOM))
            with contextlib.suppress(OSError):
                self.path("room").unlink()
        self._tell_problem()
        return self.problem is None

    def _try(self, name: str, content: bytes | memoryview, first: bool = False) -> None:
        try:
            self._sweep()
            self._write(name, content, first)
            self.problem = None
        except OSError as error:
            remedy = "set ABI_CACHE_DIR to another place"
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                remedy = f"free some space, or {remedy}"
            where = error.filename2 or self.directory
            self.problem = f"compiled kernels are not kept: {where}: {error.strerror}; {remedy}"

    def _write(self, name: str, content: bytes | memoryview, first: bool) -> None:
        descriptor, part = tempfile.mkstemp(prefix=PART, dir=self.directory)
        try:
            with open(descriptor, "wb") as file:
                file.write(_digest(name, content))
                file.write(content)
            with contextlib.suppress(OSError):
                self.path(name).rmdir()  # an empty directory in its place; all else is replaced
            if not first or not _linked(part, self.path(name)):
                os.replace(part, self.path(name))
        finally:
            Path(part).unlink(missing_ok=True)

    def _sweep(self) -> None:
        """Remove what killed processes left half-written."""
        for part in self.directory.glob(f"{PART}*"):
            with contextlib.suppress(OSError):
                if time.time() - part.stat().st_mtime > PART_SECONDS:
                    part.unlink()

    def _tell_problem(self) -> None:
        if self.problem is not None:
            self._tell("problem", self.problem)

    def _tell(self, kind: str, text: str) -> None:
        if kind not in self._told:
            self._told.add(kind)
            warnings.warn(text, CacheWarning, stacklevel=4)


def _digest(name: str, content: bytes | memoryview) -> bytes:
    digest = hashlib.sha256(name.encode() + b"\0")
    digest.update(content)
    return digest.digest()


def _not_safe(directory: Path, above: bool = False) -> str | None:
    """Say why others may put files there; None if they may not.

    `above`: the directory above, in which only names matter; it may be the system's (/tmp), where nobody can rename
    what is another's.
    """
    if os.name != "posix":
        return None
    status = directory.stat()
    if not stat.S_ISDIR(status.st_mode):
        return f"{directory} is not a directory"
    if status.st_uid != os.geteuid() and not (above and status.st_uid == 0):
        return f"{directory} belongs to another user (id {status.st_uid})"
    if status.st_mode & OTHERS_WRITE and not (above and status.st_mode & stat.S_ISVTX):
        return f"{directory} may be written by others (chmod go-w closes it)"
    return None


STORE = Store(cache_directory())  # of this process


class KernelCache(_Cache):
    """What Numba asks for a kernel's compiled code, in place of its own cache."""

    def __init__(self, function: Callable[..., Any]) -> None:
        """Serve one function; nothing is read before it is called."""
        self.function = function

    @property
    def cache_path(self) -> str:
        """The directory."""
        return str(STORE.directory)

    @property
    def beginning(self) -> str:
        """What the names of the function's files begin with, one for each list of types of arguments."""
        return f"{self.function.__module__}.{self.function.__qualname__}-".replace("<locals>", "locals")

    def name(self, types: tuple[Any, ...]) -> str:
        """Return the name of the file for these types of arguments.

        The source counts too, since a benchmark's kernel is not in `kernels/`, and so do the functions that a kernel
        closes over: of those made by one function, they are the difference.
        """
        key = b"".join(map(_identity, (self.function, *_closed_over(self.function)))) + repr(types).encode()
        return f"{self.beginning}{hashlib.sha256(key).hexdigest()[:16]}{KERNEL}"

    def load_overload(self, sig: tuple[Any, ...], target_context: Any) -> Any:
        """Return the compiled function for these types of arguments, or None."""
        rtsys.initialize(target_context)  # what the code may refer to; what compiling needs is loaded by who compiles
        content = STORE.read(self.name(sig))
        return None if content is None else CompileResult._rebuild(target_context, *pickle.loads(content))

    def save_overload(self, sig: tuple[Any, ...], data: Any) -> None:
        """Keep a compiled function, unless it holds what no other process can use."""
        if data.lifted or data.library.has_dynamic_globals:
            warnings.warn(f"{self.function.__qualname__} can't be kept: it refers to an address", CacheWarning, 2)
        else:
            STORE.write(self.name(sig), dumps(data._reduce()))

    def enable(self) -> None:
        """Nothing: it is always on."""

    def disable(self) -> None:
        """Nothing: it is always on."""

    def flush(self) -> None:
        """Nothing: what is kept stays right, because its name says what it was made from."""


def _closed_over(function: Callable[..., Any]) -> list[Callable[..., Any]]:
    """Return the functions that a function closes over, and those that these do."""
    cells = (cell.cell_contents for cell in function.__closure__ or ())
    found = [content for content in cells if inspect.isfunction(content)]
    return [*found, *(further for each in found for further in _closed_over(each))]


def _identity(function: Callable[..., Any]) -> bytes:
    code = function.__code__
    name = f"{function.__module__}.{function.__qualname__}:{code.co_firstlineno}\0"
    return name.encode() + source_hash(code.co_filename)


@functools.cache
def source_hash(file: str) -> bytes:
    """Return the SHA-256 of a file's text."""
    return hashlib.sha256(Path(file).read_bytes()).digest()
