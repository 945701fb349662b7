"""What all benchmarks share: the header, the check, the timing, the table and the JSON line.

    bench = Bench("rms_norm", "RMSNorm of 2048 rows, width 512")
    bench.check("forward", y, y_ref, 1e-5)
    bench.time("forward", lambda: forward(y, r, x, w), bytes_moved=8 * N * C, numpy=lambda: forward_ref(x, w))
    bench.finish()

Every script checks first and times then.  A time is the median of at least 20 runs after a warm-up; a run repeats the
call until it takes 0.2 ms.  `bytes_moved` counts what the operation must read and write, each array once; `factor` is
NumPy's time over ours.  The last line on stdout is JSON.  `--save` adds the rows to bench/results/<machine>.csv.
"""

import argparse
import contextlib
import csv
import json
import os
import platform
import re
import subprocess
import sys
import time
from datetime import datetime, timezone
from pathlib import Path

import llvmlite.binding as llvm
import numba
import numpy as np

from abi_py.kernels.engine.simd import host_isa

RESULTS = Path(__file__).resolve().parent / "results"
CODE = (":(top)", ":(top,exclude)bench/results")  # what `git status` is asked about
MINIMUM_RUNS = 20
SHORTEST_RUN = 2e-4  # seconds: far above the resolution of the clock


def cpu_name():
    """Return the processor's own name for itself."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
        return re.search(r"model name\s*:\s*(.+)", text)[1].strip()
    except (OSError, TypeError):
        return platform.processor() or platform.machine()


def has_amx():
    """Say whether the processor has matrix units for bfloat16 (Intel's AMX); a system may still not permit them."""
    return bool(llvm.get_host_cpu_features().get("amx-bf16"))


def last_level_cache():
    """Return the bytes of the largest cache that the system reports; None if it reports none."""
    factors = {"K": 2**10, "M": 2**20}
    sizes = [path.read_text().strip() for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")]
    return max((int(size[:-1]) * factors[size[-1]] for size in sizes if size[-1:] in factors), default=None)


def commit():
    """Return the short name of the commit; "unknown" outside a clone.

    A plus sign follows where tracked files have changes, other than the results that a benchmark itself has written.
    """
    folder = Path(__file__).resolve().parent

    def git(*words):
        return subprocess.run(("git", *words), cwd=folder, capture_output=True, text=True, check=True).stdout.strip()

    try:
        return git("rev-parse", "--short", "HEAD") + ("+" if git("status", "--porcelain", "-uno", "--", *CODE) else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def seconds_per_call(function, runs=MINIMUM_RUNS):
    """Return p20, median and p80 of the seconds that one call of `function` takes; the first calls are not counted."""
    function()
    start = time.perf_counter()
    function()
    repeats = max(1, int(SHORTEST_RUN / max(time.perf_counter() - start, 1e-9)))
    samples = []
    for _ in range(runs):
        start = time.perf_counter()
        for _ in range(repeats):
            function()
        samples.append((time.perf_counter() - start) / repeats)
    return np.percentile(samples, (20, 50, 80))


def header(operation, threads):
    """Return what a figure depends on: machine, threads, versions, commit."""
    return {
        "operation": operation,
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "instruction_set": host_isa(),
        "amx": "yes" if has_amx() else "no",
        "threads": threads,
        "python": platform.python_version(),
        "numpy": np.__version__,
        "numba": numba.__version__,
        "commit": commit(),
    }


def machine_name():
    """Return the name of this machine's results files: processor, cores, and what virtual machines hide in its name."""
    units = host_isa() + (" amx" if has_amx() else "")
    return re.sub(r"[^a-z0-9]+", "-", f"{cpu_name()} {units} {os.cpu_count()} cores".lower()).strip("-")


def save_rows(rows, kind=""):
    """Add rows, dicts with the same keys, to the results file of this machine: bench/results/<machine><kind>.csv.

    A file of an earlier date may lack columns, or have others: it then gets the columns of both, empty where unknown.
    """
    date = datetime.now(timezone.utc).strftime("%Y-%m-%d")
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{machine_name()}{kind}.csv"
    columns, before = [], []
    if path.exists():
        with path.open(newline="", encoding="utf-8") as file:
            reader = csv.DictReader(file)
            columns, before = list(reader.fieldnames or []), list(reader)
    wanted = ["date", *rows[0]]
    columns += [name for name in wanted if name not in columns]
    whole = path.with_suffix(".new")  # what was measured before must not be lost if this is stopped
    with whole.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns, restval="", lineterminator="\n")
        writer.writeheader()
        writer.writerows(before)
        writer.writerows({"date": date} | row for row in rows)
    whole.replace(path)


def run_script(main):
    """Run `main` and end with what it returns; with one line, and no traceback, if it is stopped or nobody reads on."""
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:  # `| head`: what Python would still flush has no reader
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)


class Bench:
    """One benchmark: prints its header when made, a row for each `time`, and the JSON line at `finish`."""

    def __init__(self, operation, title):
        parser = argparse.ArgumentParser(description=f"Check, then time: {title}.")
        parser.add_argument("--runs", type=int, default=MINIMUM_RUNS, help=f"runs per time, at least {MINIMUM_RUNS}")
        parser.add_argument("--threads", type=int, default=numba.get_num_threads(), help="threads of the kernels")
        parser.add_argument("--save", action="store_true", help="add the rows to bench/results/<machine>.csv")
        options = parser.parse_args()
        if options.runs < MINIMUM_RUNS:
            parser.error(f"--runs ({options.runs}) must be at least {MINIMUM_RUNS}")
        if not 1 <= options.threads <= numba.config.NUMBA_NUM_THREADS:
            parser.error(f"--threads ({options.threads}) must be between 1 and {numba.config.NUMBA_NUM_THREADS}")
        numba.set_num_threads(options.threads)
        self.runs, self.save = options.runs, options.save
        self.header = header(operation, options.threads)
        self.rows, self.table_begun = [], False
        print(title)
        print(", ".join(f"{key} {value}" for key, value in self.header.items() if key != "operation"))

    def check(self, name, actual, expected, tolerance):
        """Stop with exit code 1 unless `actual` is `expected` within `tolerance`, relative to its largest element."""
        expected = np.asarray(expected, np.float64)
        error = np.abs(np.asarray(actual, np.float64) - expected).max() / np.abs(expected).max()
        if not error <= tolerance:
            sys.exit(f"{name}: wrong by {error:.1e}, allowed {tolerance:.0e}; nothing was timed")
        print(f"checked {name}: off by {error:.1e}, allowed {tolerance:.0e}")

    def time(self, name, function, *, bytes_moved=0, flops=0, numpy=None):
        """Time `function`, and `numpy` beside it; print a row and return it."""
        if not self.table_begun:
            print(f"{'':24}{'median':>12}{'p20':>12}{'p80':>12}{'GB/s':>8}{'GFLOP/s':>9}{'NumPy':>12}{'factor':>8}")
            self.table_begun = True
        p20, median, p80 = seconds_per_call(function, self.runs)
        row = {"name": name, "median_us": median * 1e6, "p20_us": p20 * 1e6, "p80_us": p80 * 1e6}
        row["gb_per_s"] = bytes_moved / median / 1e9 if bytes_moved else None
        row["gflop_per_s"] = flops / median / 1e9 if flops else None
        row["numpy_us"] = seconds_per_call(numpy, self.runs)[1] * 1e6 if numpy else None
        row["factor"] = row["numpy_us"] / row["median_us"] if numpy else None
        row = {key: round(value, 3) if isinstance(value, float) else value for key, value in row.items()}
        self.rows.append(row)

        def cell(value, width, digits, unit=""):
            return f"{'' if value is None else f'{value:.{digits}f}{unit}':>{width}}"

        cells = [cell(row[key], 12, 1, " us") for key in ("median_us", "p20_us", "p80_us")]
        cells += [cell(row["gb_per_s"], 8, 1), cell(row["gflop_per_s"], 9, 1)]
        cells += [cell(row["numpy_us"], 12, 1, " us"), cell(row["factor"], 8, 1)]
        print(f"{name:24}" + "".join(cells), flush=True)
        return row

    @contextlib.contextmanager
    def beside(self, numpy_seconds):
        """Compare with NumPy in processes of its own, before and after: for libraries that share no process well.

        Yields a list for rows; `numpy_seconds(threads)` returns the seconds for each of them.
        """
        compared, before = [], numpy_seconds(self.header["threads"])
        yield compared
        after = numpy_seconds(self.header["threads"])
        print("beside NumPy, which ran in processes of its own:")
        for row, early, late in zip(compared, before, after, strict=True):
            row["numpy_us"] = round((early + late) / 2 * 1e6, 3)
            row["factor"] = round(row["numpy_us"] / row["median_us"], 3)
            ours, both = f"{row['median_us']:10.1f} us", f"{early * 1e6:.1f} and {late * 1e6:.1f} us"
            print(f"{row['name']:24}ours {ours}   NumPy {both:>27}   factor {row['factor']:.2f}")

    def finish(self):
        """Write the rows to the machine's file if asked to, and print the JSON line."""
        if self.save:
            save_rows([self.header | row for row in self.rows])
        print(json.dumps(self.header | {"rows": self.rows}))
