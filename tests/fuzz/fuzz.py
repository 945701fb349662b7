"""Damage the files of every reader, millions of times if asked, and say what each did.

    python -m tests.fuzz --inputs 1000000                  every reader in turn, as many processes as there are cores
    python -m tests.fuzz --reader gguf --minutes 60 --keep found     for an hour, and what did harm is kept
    python -m tests.fuzz --reader gguf --replay 4711       one input again, with its traceback and its files

An input is made from its number and the seed alone; the names of the readers are in `readers.py`.  What counts as a
defect is an exception that is not ours, a process that dies, a reader that takes more than ten seconds, or memory above
32 MB and twenty times the damaged file.  Ctrl-C ends a run as its last input does: with the counts and the defects.
"""

import argparse
import contextlib
import importlib
import json
import mmap
import os
import random
import resource
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

SECONDS = 10.0
PROGRESS = 60.0  # seconds from one line of progress to the next
MEMORY, TIMES = 32 << 20, 20  # bytes, and bytes for each byte of the damaged file
ADDRESS_SPACE = 6 << 30  # an absurd allocation is a MemoryError, not a full machine
PLACE = struct.Struct("<q")  # number of the input that is being read


# -- one process -----------------------------------------------------------------------------------


class Worker:
    """Reads inputs first, first + step, ... of the readers, each in a folder of its own."""

    def __init__(self, names, seed, folder):
        self.readers, self.seed, self.folder = schedule(names), seed, folder
        self.originals = {}
        for reader in dict.fromkeys(self.readers):
            made = folder / reader.name.replace(" ", "_")
            made.mkdir()
            reader.make(made)
            reader.read(made)  # the valid one is read, and what it loads is in memory
            self.originals[reader.name] = made, {name: (made / name).read_bytes() for name in reader.files}

    def reader_of(self, number):
        return self.readers[number % len(self.readers)]

    def damage(self, number):
        """Write input `number`; return its reader, its folder and the damaged file."""
        from mutations import mutate

        chance = random.Random(f"{self.seed} {number}")
        reader = self.reader_of(number)
        folder, contents = self.originals[reader.name]
        name = chance.choice(reader.files)
        file = folder / name
        file.write_bytes(mutate(contents[name], chance))
        reader.mend(folder)
        return reader, folder, file

    def repair(self, reader):
        folder, contents = self.originals[reader.name]
        for name, content in contents.items():
            file = folder / name
            if file.is_dir():
                shutil.rmtree(file)
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(content)

    def read(self, number):
        """Read one input; return what was wrong with that, or None."""
        from abi_py.errors import AbiError

        reader, folder, file = self.damage(number)
        size, memory = file.stat().st_size, Memory()
        try:
            reader.read(folder)
            kind = None
        except (AbiError, FileNotFoundError):
            kind = None
        except BaseException as error:  # a Rust panic is no Exception
            if isinstance(error, KeyboardInterrupt | SystemExit):
                raise
            place = traceback.extract_tb(error.__traceback__)
            ours = [frame for frame in place if "abi_py" in frame.filename] or place
            where = f"{Path(ours[-1].filename).name}:{ours[-1].lineno}"
            kind = f"{type(error).__name__} at {where}"
        grown = memory.grown()
        if kind is None and grown > MEMORY + TIMES * size:
            kind = f"{grown / 1e6:.0f} MB for a file of {size} bytes"
        self.repair(reader)
        return kind


class Memory:
    """The most memory that this process has had at once since then, beyond what it had then, in bytes.

    Linux forgets the peak of a process when asked to, so that an input is not hidden by a larger one before it.  Where
    it does not, only what goes beyond every peak before is seen.
    """

    def __init__(self):
        with contextlib.suppress(OSError), open("/proc/self/clear_refs", "wb", buffering=0) as file:
            file.write(b"5")  # proc(5): the peak is what there is now
        self.before = self._peak()

    def grown(self):
        return self._peak() - self.before

    def _peak(self):
        try:
            with open("/proc/self/status", "rb", buffering=0) as file:
                _, _, found = file.read(4096).partition(b"VmHWM:")
            return int(found.split(maxsplit=1)[0]) * 1024
        except OSError:
            return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def work(names, seed, first, stop, step, status, findings):
    """Read the inputs of a range; `status` always says which one, `findings` gets a line for each defect."""
    warnings.simplefilter("ignore")
    resource.setrlimit(resource.RLIMIT_AS, (ADDRESS_SPACE, ADDRESS_SPACE))
    with open(status, "r+b") as file, tempfile.TemporaryDirectory(dir=scratch()) as folder:
        place = mmap.mmap(file.fileno(), PLACE.size)
        worker = Worker(names, seed, Path(folder))
        os.chdir(folder)  # where a path in a damaged file leads
        with open(findings, "a", encoding="utf-8") as found:
            for number in range(first, stop, step):
                place[:] = PLACE.pack(number)
                kind = worker.read(number)
                if kind is not None:
                    print(json.dumps([worker.reader_of(number).name, number, kind]), file=found, flush=True)
        place[:] = PLACE.pack(stop)


def scratch():
    """Return a directory in memory, where there is one: a million small files are written."""
    return "/dev/shm" if os.access("/dev/shm", os.W_OK) else None


# -- many of them ----------------------------------------------------------------------------------


@dataclass
class Outcome:
    """How many inputs each reader was given, and the defects: (reader, kind) -> numbers of inputs."""

    counts: Counter = field(default_factory=Counter)  # of inputs, by reader
    defects: dict = field(default_factory=dict)

    @property
    def inputs(self):
        return self.counts.total()

    def add(self, reader, number, kind):
        self.defects.setdefault((reader, kind), []).append(number)


def campaign(names, seed, inputs, jobs, seconds=None):
    """Read `inputs` damaged inputs in `jobs` processes; a process that dies or hangs is replaced by another.

    Ctrl-C and `seconds` end it early.
    """
    outcome, readers = Outcome(), schedule(names)
    begun = told = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        findings = Path(folder) / "findings"
        findings.touch()
        processes = [_Process(names, seed, job, inputs, jobs, Path(folder), findings) for job in range(jobs)]
        running = list(processes)
        try:
            while running and (seconds is None or time.monotonic() - begun < seconds):
                time.sleep(0.05)
                for process in list(running):
                    problem = process.problem()
                    if process.done():
                        running.remove(process)
                    elif problem:
                        number = process.place()
                        outcome.add(readers[number % len(readers)].name, number, problem)
                        process.start(number + jobs)
                if time.monotonic() - told > PROGRESS:
                    told = time.monotonic()
                    read = sum(len(process.done_numbers()) for process in processes)
                    found = len(findings.read_text().splitlines()) + sum(map(len, outcome.defects.values()))
                    print(f"{read:,} inputs, {found:,} defects, {told - begun:.0f} s", file=sys.stderr, flush=True)
        except KeyboardInterrupt:
            print("stopped; what was read until now:", file=sys.stderr)
        for process in processes:
            process.stop()
            outcome.counts.update(readers[number % len(readers)].name for number in process.done_numbers())
        for line in findings.read_text().splitlines():
            outcome.add(*json.loads(line))
    return outcome


def schedule(names):
    """Return the readers in the order in which inputs go to them, each as often as its share says."""
    table = importlib.import_module(os.environ.get("ABI_FUZZ_READERS", "readers")).READERS
    chosen = [reader for reader in table if not names or reader.name in names]
    order = [reader for reader in chosen for _ in range(reader.share)]
    random.Random(0).shuffle(order)
    return order


class _Process:
    def __init__(self, names, seed, job, inputs, jobs, folder, findings):
        self.names, self.seed, self.job, self.inputs, self.jobs = names, seed, job, inputs, jobs
        self.status, self.findings, self.errors = folder / f"status{job}", findings, folder / f"errors{job}"
        self.start(job)

    def start(self, first):
        self.number, self.seconds, self.asked = -1, 0.0, 0.0
        self.status.write_bytes(PLACE.pack(-1))
        arguments = [*(f"--reader={name}" for name in self.names), f"--seed={self.seed}", f"--inputs={self.inputs}"]
        work = json.dumps([first, self.jobs, str(self.status), str(self.findings)])
        with open(self.errors, "wb") as errors:
            self.process = subprocess.Popen(
                [sys.executable, __file__, *arguments, "--work", work], stdout=errors, stderr=errors
            )

    def place(self):
        return PLACE.unpack(self.status.read_bytes())[0]

    def waited(self, number):
        """Return for how long an input has been read.

        Moments in which this process was stopped do not count, nor those in which the other one waited for a core.
        """
        now = time.monotonic() - self.queued()
        self.seconds = self.seconds + min(now - self.asked, 0.5) if number == self.number else 0.0
        self.number, self.asked = number, now
        return self.seconds

    def queued(self):
        """Return for how many seconds the process has waited for a core; 0 where the system does not tell."""
        try:
            with open(f"/proc/{self.process.pid}/schedstat", encoding="ascii") as file:
                return int(file.read().split()[1]) / 1e9
        except (OSError, IndexError):
            return 0.0

    def problem(self):
        number = self.place()
        waited = self.waited(number)
        code = self.process.poll()
        if code not in (None, 0):
            if number < 0:
                raise RuntimeError(f"the worker does not start:\n{self.errors.read_text()[-2000:]}")
            last = self.errors.read_text(errors="replace").strip().splitlines()[-1:]
            return f"died with {code}: {' '.join(last)[:100]}"
        if code is None and 0 <= number < self.inputs and waited > SECONDS:
            self.process.kill()
            self.process.wait()
            return f"took more than {SECONDS:g} s"
        return None

    def done(self):
        return self.process.poll() == 0

    def stop(self):
        self.process.kill()
        self.process.wait()

    def done_numbers(self):
        return range(self.job, min(max(self.place(), self.job), self.inputs), self.jobs)


def describe(outcome):
    """Return the outcome as lines."""
    counts = Counter({key: len(numbers) for key, numbers in outcome.defects.items()})
    lines = [f"{count:9,}  {reader}" for reader, count in sorted(outcome.counts.items())]
    lines.append(f"{outcome.inputs:9,}  inputs, {counts.total():,} defects of {len(counts)} kinds")
    for (reader, kind), count in counts.most_common():
        lines.append(f"{count:7,}  {reader}: {kind}   (e.g. input {outcome.defects[reader, kind][0]})")
    return lines


def keep(outcome, names, seed, folder):
    """Write the first inputs of each kind of defect to a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as place:
        worker = Worker(names, seed, Path(place))
        for (reader, _kind), numbers in outcome.defects.items():
            for number in numbers[:3]:
                damaged = worker.damage(number)[2]
                shutil.copy(damaged, folder / f"{reader.replace(' ', '_')}-{number}-{damaged.name}")
                worker.repair(worker.reader_of(number))


def replay(names, seed, number):
    """Read one input, with its traceback, and leave its files."""
    worker = Worker(names, seed, Path(tempfile.mkdtemp()))
    reader, place, file = worker.damage(number)
    print(f"{reader.name}: {file} ({file.stat().st_size} bytes)", flush=True)
    os.chdir(worker.folder)
    memory = Memory()
    try:
        reader.read(place)
    except BaseException:
        traceback.print_exc()
    print(f"memory grew by {memory.grown() / 1e6:.1f} MB")


def main():
    parser = argparse.ArgumentParser(description="damage the files of every reader and say what each did")
    parser.add_argument("--inputs", type=int, help="how many; 20,000, or with --minutes no end")
    parser.add_argument("--minutes", type=float, help="stop after so long")
    parser.add_argument("--reader", action="append", default=[], help="one of readers.py; all of them otherwise")
    parser.add_argument("--keep", type=Path, help="a folder for the inputs that did harm")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    parser.add_argument("--replay", type=int)
    parser.add_argument("--work", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if not schedule(given.reader):
        parser.error(f"no reader is called {' or '.join(given.reader)}; readers.py has their names")
    inputs = given.inputs or (2**62 if given.minutes else 20_000)
    os.environ.setdefault("NUMBA_NUM_THREADS", "1")
    os.environ["RUST_BACKTRACE"] = "0"  # of a panic in `tokenizers`: its symbols alone are 50 MB
    if given.work:
        first, step, status, findings = json.loads(given.work)
        work(given.reader, given.seed, first, inputs, step, status, findings)
    elif given.replay is not None:
        replay(given.reader, given.seed, given.replay)
    else:
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        outcome = campaign(given.reader, given.seed, inputs, given.jobs, given.minutes and 60 * given.minutes)
        print("\n".join(describe(outcome)))
        if given.keep and outcome.defects:
            keep(outcome, given.reader, given.seed, given.keep)
        sys.exit(bool(outcome.defects))


if __name__ == "__main__":
    main()
