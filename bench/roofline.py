"""Measure what the host can do, and the share of it that each stage of a training step reaches.

    python bench/roofline.py --shape deepzig
    python bench/roofline.py --shape deepzig --precision bf16 --save

The host: multiply-add peak in float32 and, by the method in use, in bfloat16; bandwidth of a read and of a copy of
arrays far beyond its caches.
The stages: each kernel by itself, on arrays as in the step, times its number of calls.  Operations and bytes follow
from the shape (arithmetic.py).  A stage is compared with the peak of the operands it multiplies, or, if it moves more
than it computes, with the faster of read and copy; above 100 % its data came from a cache.  `least` is what the stage
would take at 100 %.  The whole step is timed apart; the rest is what its stages do not account for: starting kernels,
Python, waiting for memory that other stages have evicted; or, if negative, what the step saves by joining stages.
"""

import argparse
import json
import statistics
import time

import numba
import numpy as np
from _bench import MINIMUM_RUNS, header, run_script, save_rows
from arithmetic import stages, step_flops
from shapes import SHAPES
from stages import measured_stages
from step_worker import Step

from abi_py.kernels.engine.jit import kernel, prange
from abi_py.kernels.engine.number_formats import BFLOAT16, PRECISIONS
from abi_py.kernels.engine.peak import measured_peak
from abi_py.kernels.engine.vectors import total

MEGABYTES = 256  # of one array: eight times the last-level cache of the host in docs/log.md
PIECE = 1 << 14  # floats: 64 KiB
UNSTEADY = 0.05  # a peak that moves by more during a run says that other programs had a share of it


@kernel
def read_all(sums, x):
    """Read x (pieces * PIECE,) once, on all threads; sums (pieces,) keeps the compiler from leaving it out."""
    for p in prange(sums.shape[0]):
        start = np.int64(p) * PIECE
        sums[p] = total(x[start : start + PIECE])


@kernel
def copy_all(y, x):
    """Copy x to y, both (pieces * PIECE,), on all threads."""
    for p in prange(x.shape[0] // PIECE):
        start = np.int64(p) * PIECE
        to, source = y[start : start + PIECE], x[start : start + PIECE]
        for i in range(PIECE):
            to[i] = source[i]


def fastest(function, runs):
    """Return the least seconds of a call: other programs only ever make it slower."""
    samples = []
    for _ in range(runs + 1):
        start = time.perf_counter()
        function()
        samples.append(time.perf_counter() - start)
    return min(samples[1:])


def bandwidth(megabytes=MEGABYTES, runs=MINIMUM_RUNS):
    """Return bytes per second of a read, and of a copy, which counts what it reads and what it writes."""
    size = megabytes * 2**20 // 4 // PIECE * PIECE
    x, y, sums = np.ones(size, np.float32), np.zeros(size, np.float32), np.empty(size // PIECE, np.float32)
    read = x.nbytes / fastest(lambda: read_all(sums, x), runs)
    copy = 2 * x.nbytes / fastest(lambda: copy_all(y, x), runs)
    if sums.sum() != size or not np.array_equal(x, y):
        raise RuntimeError("a bandwidth kernel did not do its work; its figure would be meaningless")
    return read, copy


def whole_step(shape, precision, count):
    """Return the median seconds of `count` whole steps, after two that do not count."""
    step, samples = Step(shape, precision), []
    for _ in range(count + 2):
        start = time.perf_counter()
        step()
        samples.append(time.perf_counter() - start)
    return statistics.median(samples[2:])


def stage_rows(found, seconds, whole, host, precision):
    """Return a row for each stage, the longest first, then their sum, the whole step, and the rest.

    found: the stages; seconds: {name: of one call}; whole: seconds of a step; host: peaks and bandwidths, see `main`.
    """
    rows, least = [], 0.0
    peak = host[f"{precision}_flop_per_s"]
    for stage in found:
        taken = seconds[stage.name] * stage.calls
        limit = host["bytes_per_s"] if stage.kind == "memory" else peak
        work = stage.bytes if stage.kind == "memory" else stage.flops
        rate = work / seconds[stage.name]
        rows.append(
            {
                "name": stage.name,
                "bound": "memory" if stage.kind == "memory" else "arithmetic",
                "calls": stage.calls,
                "ms": taken * 1e3,
                "share_of_step": taken / whole,
                "gflop_per_s": None if stage.kind == "memory" else rate / 1e9,
                "gb_per_s": rate / 1e9 if stage.kind == "memory" else None,
                "share_of_bound": rate / limit,
                "least_ms": stage.calls * work / limit * 1e3,
            }
        )
        least += rows[-1]["least_ms"]
    rows.sort(key=lambda row: -row["ms"])
    together = sum(row["ms"] for row in rows)

    def row(name, ms, **further):
        empty = dict.fromkeys(rows[0]) | {"name": name, "ms": ms, "share_of_step": ms / 1e3 / whole}
        return empty | further

    flops = host["step_flops"]
    rows += [
        row("all stages", together, share_of_bound=least / together, least_ms=least),
        row("rest of the step", whole * 1e3 - together),
        row(
            "whole step",
            whole * 1e3,
            gflop_per_s=flops / whole / 1e9,
            share_of_bound=flops / whole / peak,
            least_ms=flops / peak * 1e3,
        ),
    ]
    return [{key: round(x, 4) if isinstance(x, float) else x for key, x in entry.items()} for entry in rows]


def print_table(rows):
    """Print what `stage_rows` returned."""
    print(f"{'':22}{'calls':>6}{'in a step':>14}{'of step':>9}{'GFLOP/s':>9}{'GB/s':>8}{'of bound':>10}{'least':>14}")

    def cell(value, width, form, unit=""):
        return f"{'' if value is None else format(value, form) + unit:>{width}}"

    for row in rows:
        cells = cell(row["calls"], 6, "d") + cell(row["ms"], 14, ".3f", " ms") + cell(row["share_of_step"], 9, ".1%")
        cells += cell(row["gflop_per_s"], 9, ".1f") + cell(row["gb_per_s"], 8, ".1f")
        cells += cell(row["share_of_bound"], 10, ".1%") + cell(row["least_ms"], 14, ".3f", " ms")
        print(f"{row['name']:22}{cells}")


def main():
    """Read the options, measure, print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=SHAPES, default="deepzig", help="model and batch, see shapes.py")
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="fp32", help="of the products' operands")
    parser.add_argument("--runs", type=int, default=10, help="sweeps over all layers for each stage; whole steps")
    parser.add_argument("--threads", type=int, default=numba.get_num_threads(), help="threads of the kernels")
    parser.add_argument("--megabytes", type=int, default=MEGABYTES, help="of an array that the bandwidth is taken with")
    parser.add_argument("--quick", action="store_true", help="two runs, arrays of 64 MB: shows that it works")
    parser.add_argument("--save", action="store_true", help="add the rows to bench/results/<machine>-roofline.csv")
    options = parser.parse_args()
    if not 1 <= options.threads <= numba.config.NUMBA_NUM_THREADS:
        parser.error(f"--threads ({options.threads}) must be between 1 and {numba.config.NUMBA_NUM_THREADS}")
    if min(options.runs, options.megabytes) < 1:
        parser.error("--runs and --megabytes must be at least 1")
    runs, megabytes = (2, 64) if options.quick else (options.runs, options.megabytes)
    numba.set_num_threads(options.threads)
    shape = SHAPES[options.shape]
    about = header(f"roofline {options.shape} {options.precision}", options.threads)
    print(f"Stages of the training step {options.shape} {options.precision}, {shape}")
    print(", ".join(f"{key} {value}" for key, value in about.items()))

    read, copy = bandwidth(megabytes, max(runs, 3))
    peaks = {precision: measured_peak(0.5, PRECISIONS[precision]) for precision in ("fp32", "bf16")}
    host = {f"{name}_flop_per_s": peak for name, peak in peaks.items()}
    host |= {"bytes_per_s": max(read, copy), "step_flops": step_flops(shape)}
    gflops = ", ".join(f"{name} {peak / 1e9:.0f} GFLOP/s" for name, peak in peaks.items())
    speeds = f"read {read / 1e9:.1f} GB/s, copy {copy / 1e9:.1f} GB/s ({megabytes} MB)"
    print(f"host: {gflops} (by {BFLOAT16.method}); {speeds}")
    whole = whole_step(shape, options.precision, runs)
    found = stages(shape, options.precision == "bf16")
    seconds = measured_stages(shape, found, options.precision == "bf16", runs)
    rows = stage_rows(found, seconds, whole, host, options.precision)
    print_table(rows)
    again = measured_peak(0.5)
    if abs(again / peaks["fp32"] - 1) > UNSTEADY:
        print(
            f"not a quiet machine: its float32 peak was {peaks['fp32'] / 1e9:.0f} GFLOP/s at the beginning and "
            f"{again / 1e9:.0f} at the end; measure again when nothing else runs"
        )
    about["bf16_method"] = BFLOAT16.method
    about |= {f"peak_{name}_gflop_per_s": round(peak / 1e9, 1) for name, peak in peaks.items()}
    about |= {"read_gb_per_s": round(read / 1e9, 1), "copy_gb_per_s": round(copy / 1e9, 1)}
    if options.save:
        save_rows([about | row for row in rows], "-roofline")
    print(json.dumps(about | {"rows": rows}))


if __name__ == "__main__":
    run_script(main)
