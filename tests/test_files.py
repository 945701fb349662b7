"""Files and directories are written whole or not at all, and a directory has one writer at a time."""

import errno
import os
import signal
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from waiting import PATIENCE

from abi_py import files, locks
from abi_py.errors import ConfigError
from abi_py.locks import DirectoryLock, check_unlocked, holder_of

ROOT = Path(__file__).resolve().parents[1]
LEFT = ".abi-99999-0123456789abcdef.tmp"
posix = pytest.mark.skipif(os.name != "posix", reason="flock, permissions, signals")


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    """Let every test be the first to write to a directory."""
    monkeypatch.setattr(files, "_swept", set())


def names(path):
    return sorted(entry.name for entry in path.iterdir())


def in_a_process(code, *arguments):
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, arguments)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )


# -- files -------------------------------------------------------------------------------------


def test_an_error_keeps_the_old_content(tmp_path):
    path = tmp_path / "a.txt"
    files.atomic_text(path, "old")
    with pytest.raises(RuntimeError), files.atomic_file(path) as file:  # noqa: PT012 (the error must come inside)
        file.write(b"half")
        raise RuntimeError
    assert path.read_text() == "old"
    assert names(tmp_path) == ["a.txt"]


def test_json_is_ascii_and_strict(tmp_path):
    """A path may hold bytes that are not UTF-8, and JSON has no NaN."""
    files.atomic_json(tmp_path / "a.json", {"path": os.fsdecode(b"\xff"), "name": "ä"})
    assert (tmp_path / "a.json").read_bytes() == b'{\n  "path": "\\udcff",\n  "name": "\\u00e4"\n}\n'
    with pytest.raises(ValueError, match="JSON compliant"):
        files.atomic_json(tmp_path / "a.json", {"loss": float("nan")})


@posix
def test_permissions_are_those_of_the_umask(tmp_path):
    before = os.umask(0o027)
    try:
        files.atomic_text(tmp_path / "a", "text")
        with files.atomic_directory(tmp_path / "d") as folder:
            files.write_synced(folder / "b", [b"text"])
    finally:
        os.umask(before)
    modes = [stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("a", "d", "d/b")]
    assert modes == [0o640, 0o750, 0o640]


def test_temporary_names_are_new_and_never_a_link(tmp_path, monkeypatch):
    """Whoever guesses the name and puts a link there gets an error, not our content."""
    victim = tmp_path / "victim"
    victim.write_text("mine")
    monkeypatch.setattr(files, "_name", lambda: LEFT)
    (tmp_path / LEFT).symlink_to(victim)
    for write in (lambda: files.atomic_text(tmp_path / "a", "x"), lambda: files.write_synced(tmp_path / LEFT, [b"x"])):
        with pytest.raises(OSError) as error:
            write()
        assert error.value.errno in (errno.EEXIST, errno.ELOOP)
    assert victim.read_text() == "mine"
    monkeypatch.undo()
    assert files._name() != files._name()


class Killed(BaseException):
    """Stands for the end of the process."""


@pytest.mark.parametrize("call", range(12))
def test_files_that_belong_together_are_new_or_old(tmp_path, monkeypatch, call):
    """Die at the n-th rename, fsync or removal: what has a last file has the other of the same writing."""
    first, last = tmp_path / "first", tmp_path / "last"

    def write(text):
        with files.atomic_files(last) as open_new:
            for path in (last, first):
                open_new(path).write(f"{text} {path.name}".encode())

    write("old")
    count = iter(range(10**6))

    def dying(original):
        def function(*args, **kwargs):
            if next(count) == call:
                raise Killed
            return original(*args, **kwargs)

        return function

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", dying(os.fsync))
        patch.setattr(os, "replace", dying(os.replace))
        try:
            write("new")
            ended = True
        except Killed:
            ended = False
    if last.exists():
        assert first.read_text().split()[0] == last.read_text().split()[0]
    if ended:
        assert last.read_text() == "new last"
    write("again")
    assert (first.read_text(), last.read_text(), names(tmp_path)) == ("again first", "again last", ["first", "last"])


def test_a_full_disk_changes_nothing(tmp_path, monkeypatch):
    for name in ("first", "last"):
        (tmp_path / name).write_text("old")

    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"), files.atomic_files(tmp_path / "last") as open_new:  # noqa: PT012
        for name in ("first", "last"):
            open_new(tmp_path / name).write(b"new")
    assert [(name, (tmp_path / name).read_text()) for name in names(tmp_path)] == [("first", "old"), ("last", "old")]


@pytest.mark.parametrize("write", [files.atomic_file, files.atomic_directory])
def test_an_error_of_the_system_names_the_file_and_not_its_temporary_name(tmp_path, monkeypatch, write):
    with pytest.raises(OSError, match="No space") as error, write(tmp_path / "a"):
        raise OSError(errno.ENOSPC, "No space left on device")
    assert error.value.filename == str(tmp_path / "a")

    def forbidden(path, *more):
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(os, "open", forbidden)
    with pytest.raises(PermissionError) as error, write(tmp_path / "a"):
        pass
    assert error.value.filename == str(tmp_path / "a")


@posix
def test_a_real_limit_on_size_changes_nothing(tmp_path):
    """RLIMIT_FSIZE stands for a full disk: the write itself fails, in the library of C as well."""
    code = """
import resource, signal, sys
from abi_py import files
files.atomic_text(sys.argv[1], "old")
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))
try:
    with files.atomic_file(sys.argv[1]) as file:
        for _ in range(100):
            file.write(bytes(1000))
except OSError as error:
    print(error.strerror)
"""
    child = in_a_process(code, tmp_path / "a")
    assert child.communicate(timeout=PATIENCE)[0] == "File too large\n"
    assert (tmp_path / "a").read_text() == "old"
    assert names(tmp_path) == ["a"]


# -- left-overs --------------------------------------------------------------------------------

WRITER = """
import sys, time
from abi_py import files
with files.atomic_file(sys.argv[1] + "/a") as file, files.atomic_directory(sys.argv[1] + "/d") as folder:
    file.write(bytes(100_000))
    files.write_synced(folder / "b", [b"half"])
    print("begun", flush=True)
    sys.stdin.read()
"""


@posix
def test_leftovers_of_the_dead_are_removed_those_of_the_living_stay(tmp_path):
    writer = in_a_process(WRITER, tmp_path)
    assert writer.stdout.readline() == "begun\n"
    left = names(tmp_path)
    assert len(left) == 2
    assert all(files.TEMPORARY.fullmatch(name) for name in left)
    others = [".tmp-a-4711", ".abi-x.tmp", f"{LEFT}x"]
    for name in others:
        (tmp_path / name).write_text("mine")
    files.atomic_text(tmp_path / "c", "text")
    assert names(tmp_path) == sorted([*left, *others, "c"])
    writer.send_signal(signal.SIGKILL)
    writer.communicate(timeout=PATIENCE)
    files.atomic_text(tmp_path / "c", "text")  # only a process's first writing looks for them
    assert set(left) < set(names(tmp_path))
    files._swept.clear()
    files.atomic_text(tmp_path / "c", "text")
    assert names(tmp_path) == sorted([*others, "c"])


def test_a_name_that_vanishes_before_it_is_locked_is_not_used(tmp_path, monkeypatch):
    """Another process may take a file for a left-over between its making and its locking."""
    removed = []

    def late(descriptor):
        if not removed:
            removed.append(next(path for path in tmp_path.iterdir() if files.TEMPORARY.fullmatch(path.name)))
            removed[0].rmdir() if removed[0].is_dir() else removed[0].unlink()
        return True

    for write in (lambda: files.atomic_text(tmp_path / "a", "text"), lambda: _make_directory(tmp_path / "d")):
        removed.clear()
        with monkeypatch.context() as patch:
            patch.setattr(files, "try_lock", late)
            write()
        assert removed
    assert names(tmp_path) == ["a", "d"]


@posix
def test_a_name_that_another_process_has_locked_is_not_used(tmp_path, monkeypatch):
    """It has found the name before its maker locked it, and is going to remove it."""
    doomed = []

    def contended(descriptor):
        if not doomed:
            doomed.append(next(path for path in tmp_path.iterdir() if files.TEMPORARY.fullmatch(path.name)))
            return False
        return locks.try_lock(descriptor)

    monkeypatch.setattr(files, "try_lock", contended)
    with files.atomic_file(tmp_path / "a") as file:
        doomed[0].unlink()
        file.write(b"text")
    assert (tmp_path / "a").read_text() == "text"
    doomed.clear()
    with files.atomic_directory(tmp_path / "d") as folder:
        doomed[0].rmdir()
        files.write_synced(folder / "b", [b"text"])
    assert (tmp_path / "d/b").read_text() == "text"
    assert names(tmp_path) == ["a", "d"]


def _make_directory(path):
    with files.atomic_directory(path):
        pass


# -- locks -------------------------------------------------------------------------------------

HOLDER = """
import sys
from abi_py.locks import DirectoryLock
lock = DirectoryLock(sys.argv[1], "out")
print("held", flush=True)
sys.stdin.read()
"""


@posix
def test_a_lock_names_its_holder_and_ends_with_it(tmp_path):
    holder = in_a_process(HOLDER, tmp_path)
    assert holder.stdout.readline() == "held\n"
    who = rf"process {holder.pid} on {os.uname().nodename}"
    for take in (DirectoryLock, check_unlocked):
        with pytest.raises(ConfigError, match=rf"out \({tmp_path}\) must have one writer at a time, and {who} is"):
            take(tmp_path, "out")
    assert holder_of(tmp_path) == who
    holder.send_signal(signal.SIGKILL)
    holder.communicate(timeout=PATIENCE)
    assert (tmp_path / locks.LOCK).exists()
    assert holder_of(tmp_path) is None
    check_unlocked(tmp_path, "out")
    with DirectoryLock(tmp_path, "out"):
        assert holder_of(tmp_path) == f"process {os.getpid()} on {os.uname().nodename}"
    assert names(tmp_path) == []


@posix
def test_two_threads_or_trainers_of_one_process_are_two_writers(tmp_path):
    with DirectoryLock(tmp_path / "new", "out"), pytest.raises(ConfigError, match=f"process {os.getpid()} on"):
        DirectoryLock(tmp_path / "new", "out")
    DirectoryLock(tmp_path / "new", "out").release()


@posix
def test_a_lock_file_removed_by_the_holder_before_is_not_taken(tmp_path, monkeypatch):
    """The holder removes the file between our opening and our locking it: its successor has another file."""
    first, original, calls = DirectoryLock(tmp_path, "out"), locks._holder, []

    def slow(descriptor):
        calls.append(descriptor)
        if len(calls) == 1:
            first.release()
        return original(descriptor)

    monkeypatch.setattr(locks, "_holder", slow)
    with DirectoryLock(tmp_path, "out"):
        assert len(calls) == 2
        assert names(tmp_path) == [locks.LOCK]


@posix
def test_a_forked_child_neither_keeps_nor_removes_the_lock(tmp_path):
    lock = DirectoryLock(tmp_path, "out")
    child = os.fork()
    if child == 0:
        lock.release()
        signal.pause()
    try:
        assert (tmp_path / locks.LOCK).exists()
        lock.release()
        DirectoryLock(tmp_path, "out").release()
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


@posix
def test_without_locks_of_the_kernel_the_note_in_the_file_counts(tmp_path, monkeypatch):
    monkeypatch.setattr(locks, "try_lock", lambda descriptor: None)
    here = os.uname().nodename
    for text, free in (
        (f"process {os.getppid()} on {here}\n", False),
        (f"process 1 on {here}\n", False),  # somebody else's, whom we may not signal
        ("process 4711 on elsewhere\n", False),
        (f"process 999999999 on {here}\n", True),
        ("", True),
    ):
        (tmp_path / locks.LOCK).write_text(text)
        assert (holder_of(tmp_path) is None) is free, text
    DirectoryLock(tmp_path, "out").release()
    assert names(tmp_path) == []


def test_a_place_where_nothing_can_be_made(tmp_path, monkeypatch):
    files.check_place("out", tmp_path / "new/newer/file")
    files.check_place("out", "file")
    assert [*tmp_path.iterdir()] == []
    (tmp_path / "a").write_text("")
    with pytest.raises(ConfigError, match=r"out \(.*b/c\) must be in a directory, and .*a is a file; give"):
        files.check_place("out", tmp_path / "a/b/c")
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(ConfigError, match=r"where files can be made, and in .* none can; give another path"):
        files.check_place("out", tmp_path / "new/file")
