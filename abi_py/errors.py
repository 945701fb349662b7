"""The few kinds of error a user meets.

Each message says what is wrong, what was found, the rule, and the remedy, on one line.  The command line prints that
line and nothing else.  A wrong dtype or layout is a plain `TypeError`; file errors of the system pass through as
`OSError`.
"""

import errno
import reprlib
from collections.abc import Sequence
from typing import Any

DISK_FULL = (errno.ENOSPC, errno.EDQUOT)  # errors of a write, which says no file name
_FORBIDDEN = "give another path, or change the permissions"
# What helps against an error of the system, by its number.
REMEDIES = {
    **dict.fromkeys(DISK_FULL, "free some space, or write somewhere else"),
    errno.EROFS: "nothing can be written there; give another path",
    errno.EACCES: _FORBIDDEN,
    errno.EPERM: _FORBIDDEN,
    errno.ENOTDIR: "a part of this path is a file and no directory; give another path",
    errno.EEXIST: "something else is there; give another path",
    errno.EISDIR: "give the path of a file",
    errno.ENAMETOOLONG: "give a shorter path",
    errno.ENOENT: "give a path that is there",
}

_short = reprlib.Repr()
_short.maxlevel, _short.maxdict, _short.maxlist, _short.maxtuple = 2, 4, 4, 4
_short.maxstring = _short.maxother = _short.maxlong = 80


def shown(value: Any) -> str:
    """Return `repr(value)`, cut where it is long: a message is one line, whatever a file or a call put into it."""
    return _short.repr(value)


def brief(value: Any) -> str:
    """Return the value as text without quotes, cut as `shown` cuts where it is longer than two lines of a terminal."""
    text = str(value)
    return text if len(text) <= 200 else shown(text)


def listed(names: Sequence[str], most: int) -> str:
    """Return 'a, b, c and 4 more', of which at most so many are named."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def counted(number: int, noun: str) -> str:
    """Return '1 step', '2,000 steps'."""
    return f"{number:,} {noun}" + ("" if number == 1 else "s")


def on_one_line(text: str, longest: int = 300) -> str:
    """Return a text that is not ours (a template's complaint, a question) without line ends, cut where it is long."""
    text = " ".join(text.split())
    return text if len(text) <= longest else text[: longest - 3] + "..."


def of_the_system(error: OSError) -> str:
    """Return what an error of the system says, in our form: where, what, and what helps."""
    where = error.filename or "writing failed"  # the standard output: a file's error has its name (files.py)
    remedy = REMEDIES.get(error.errno or 0)
    return f"{where}: {error.strerror or error}" + (f"; {remedy}" if remedy else "")


def told(error: Exception) -> str:
    """Return what an error says within a sentence: one of the system in our form, any other as it is."""
    return of_the_system(error) if isinstance(error, OSError) else str(error)


class AbiError(Exception):
    """The root of every error that `abi_py` raises on purpose."""


class ConfigError(AbiError, ValueError):
    """A field of a configuration has a value that it must not have, or an unknown name."""


class DataError(AbiError, ValueError):
    """A data set, a batch or a row of a file breaks a rule; the message names the file and the place in it."""


class CheckpointError(AbiError, ValueError):
    """A checkpoint is damaged, incomplete, or belongs to another model."""


class NonFiniteError(AbiError, ArithmeticError):
    """Training met NaN or infinity too many times in a row and stopped; the last good checkpoint is untouched."""
