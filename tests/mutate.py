"""Small wrong edits of the product, each of which a test must notice.

    python tests/mutate.py                 all of them; prints which tests killed which, and what survived
    python tests/mutate.py --only 7 --only 12

Each edit is made in a copy of the tree; the named tests are run there, and one must fail.  Not part of the usual tests,
which it would make an hour longer; `tests/test_mutate.py` checks that the edits still apply.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]


class Mutation(NamedTuple):
    """`old` in `file` becomes `new`; `tests` are what should notice."""

    file: str
    old: str
    new: str
    tests: str


MUTATIONS: tuple[Mutation, ...] = ()


def copy_tree(folder: Path) -> None:
    """Copy what git tracks, and files it does not ignore."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, check=True)
    for name in filter(None, listed.stdout.decode().split("\0")):
        source, target = ROOT / name, folder / name
        if source.exists() or source.is_symlink():
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(source, target, follow_symlinks=False)


def try_mutation(mutation: Mutation, folder: Path) -> tuple[bool, str]:
    """Return whether a test failed, and the first that did."""
    file = folder / mutation.file
    original = file.read_text(encoding="utf-8")
    if original.count(mutation.old) != 1:
        raise SystemExit(f"{mutation.file}: {mutation.old!r} is there {original.count(mutation.old)} times, not once")
    file.write_text(original.replace(mutation.old, mutation.new), encoding="utf-8")
    environment = {**os.environ, "PYTHONPATH": str(folder)}
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *mutation.tests.split()]
    try:
        done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=900)
    finally:
        file.write_text(original, encoding="utf-8")
    if done.returncode not in (0, 1):
        output = done.stdout[-2000:] + done.stderr[-500:]
        raise SystemExit(f"{mutation.file}: pytest ended with {done.returncode}\n{output}")
    failed = [line for line in done.stdout.splitlines() if line.startswith("FAILED")]
    return done.returncode == 1, failed[0].split(" - ")[0].removeprefix("FAILED ") if failed else ""


def main() -> None:
    """Try the mutations and print what became of each."""
    parser = argparse.ArgumentParser(description="make small wrong edits and see whether tests notice")
    parser.add_argument("--only", type=int, action="append", help="number of a mutation, from 1")
    numbers = parser.parse_args().only or range(1, len(MUTATIONS) + 1)
    killed = 0
    with tempfile.TemporaryDirectory() as folder:
        copy_tree(Path(folder))
        for number in numbers:
            mutation, began = MUTATIONS[number - 1], time.monotonic()
            noticed, test = try_mutation(mutation, Path(folder))
            killed += noticed
            verdict = f"killed by {test}" if noticed else "SURVIVED"
            change = f"{mutation.file}: {mutation.old.strip()!r} -> {mutation.new.strip()!r}"
            print(f"{number:3} {time.monotonic() - began:5.0f} s  {verdict}\n      {change}", flush=True)
    print(f"{killed} of {len(numbers)} killed")
    sys.exit(killed < len(numbers))


if __name__ == "__main__":
    main()
