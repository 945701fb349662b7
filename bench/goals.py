"""Measure every figure that the project has set itself for speed, and print asked, measured and possible side by side.

    python bench/goals.py --peer-python ~/peers/bin/python --save        half an hour, on a quiet machine
    python bench/goals.py --peer-python ~/peers/bin/python --quick       shows that it works; its figures mean little
    python bench/goals.py --part products --part start                   without PyTorch only some rows are measured

`possible` is what no program could beat on this machine, from measurements of the same run: a ratio to a peer with our
step at the whole multiply-add peak; memory with nothing but what training must hold; start-up with nothing but what
must be loaded.  A row whose `asked` is beyond `possible` is bounded by the machine.  Each row names the command that
measures it alone.  With --save the rows go to bench/results/<machine>-goals.csv, and those of the comparisons to the
files of bench_vs_peers.py and products.py.  Exit code 1 if a row is missed or could not be measured.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from argparse import Namespace
from pathlib import Path
from typing import NamedTuple

import bench_vs_peers
import products
from _bench import header, run_script, save_rows
from arithmetic import step_flops
from bench_vs_peers import WorkerFailed, check_contest_options, contest_options, run
from shapes import SHAPES

ROOT = Path(__file__).resolve().parents[1]
PARTS = ("steps", "products", "start")
TORCH = ["torch", "torch-compile"]
VS, PRODUCTS = "python bench/bench_vs_peers.py", "python bench/products.py"
PLAN = (
    "import json, sys; from abi_py.config import TrainableModelConfig as C; from abi_py.model import TrainableModel; "
    "f, b, t = json.loads(sys.argv[1]); print(json.dumps(sum(TrainableModel(C(**f)).memory_plan(b, t).values())))"
)


DISTURBED = "better than possible: other programs ran while the peak was measured, so neither figure counts"


class Goal(NamedTuple):
    """What is asked for: at least, or at most, `limit`."""

    what: str
    limit: float
    unit: str  # "x" a ratio, "%" a share, "s" seconds
    at_least: bool
    command: str


def judged(goal, measured, possible=None, note=""):
    """Return the row of a goal; `measured` is None if there is no figure, and `note` then says why."""
    met = measured is not None and (measured >= goal.limit if goal.at_least else measured <= goal.limit)
    beyond = possible is not None and (possible < goal.limit if goal.at_least else possible > goal.limit)
    if None not in (measured, possible) and (measured > possible if goal.at_least else measured < possible):
        note, beyond = DISTURBED, False
    return {
        "what": goal.what,
        "asked": goal.limit,
        "rule": "at least" if goal.at_least else "at most",
        "unit": goal.unit,
        "measured": measured if measured is None else round(measured, 4),
        "met": "yes" if met else "not measured" if measured is None else "no",
        "possible": possible if possible is None else round(possible, 4),
        "bounded_by_machine": "yes" if beyond else "",
        "command": goal.command,
        "note": note,
    }


def figure(value, unit):
    """Return a figure with its unit; "-" if there is none."""
    if value is None:
        return "-"
    return f"{value:.0%}" if unit == "%" else f"{value:.2f} {unit}"


def verdict(row):
    """Say whether a row is met, missed, or not measured."""
    return {"yes": "met", "no": "missed"}.get(row["met"], row["met"])


def table(rows):
    """Return the rows as text."""
    lines = [f"{'what':46}{'asked':>16}{'measured':>10}{'':14}{'possible':>10}   command"]
    for row in rows:
        asked = f"{row['rule']} {figure(row['asked'], row['unit'])}"
        measured, possible = (figure(row[key], row["unit"]) for key in ("measured", "possible"))
        mark = " * " if row["bounded_by_machine"] else "   "
        figures = f"{asked:>16}{measured:>10}  {verdict(row):12}{possible:>10}"
        lines.append(f"{row['what']:46}{figures}{mark}{row['command']}")
        if row["note"]:
            lines.append(f"    {row['note'].splitlines()[0]}")
    if any(row["bounded_by_machine"] for row in rows):
        lines.append("* more is asked than this machine has: possible is what no program could beat on it")
    return "\n".join(lines)


# -- steps ---------------------------------------------------------------------------------------


def step_goals(name):
    """Return the goals of the fp32 step of a shape: [(goal, peers of which the better counts)]."""
    command = f"{VS} --shape {name} --peer torch --peer torch-compile"

    def ratio(against, limit):
        return Goal(f"step {name} fp32, vs {against}", limit, "x", True, command)

    if name == "deepzig":
        return [(ratio("PyTorch eager", 2.2), TORCH[:1]), (ratio("PyTorch compiled", 1.8), TORCH[1:])]
    limit = {"demo": 4.0, "tiny": 2.5}.get(name, 2.0)
    return [(ratio("the better PyTorch", limit), TORCH)]


BF16 = Goal(
    "step deepzig bf16, vs PyTorch bf16 compiled", 1.2, "x", True,
    f"{VS} --shape deepzig --precision bf16 --peer torch-bf16-compile",
)  # fmt: skip
SHARE = Goal("share of the fp32 peak, deepzig step", 0.65, "%", True, f"{VS} --shape deepzig")
MEMORY = Goal("peak memory, deepzig, of PyTorch eager's", 0.45, "%", False, f"{VS} --shape deepzig")


def ratio_rows(goals, rows, flops):
    """Return the rows of ratio goals, from the rows of a comparison; possible: our step at the whole peak."""
    by_name, found = {row["name"]: row for row in rows}, []
    ours = by_name["abi_py"]
    for goal, peers in goals:
        theirs = min(by_name[peer]["step_s"] for peer in peers)
        at_peak = flops / (ours["peak_gflop_per_s"] * 1e9)
        found.append(judged(goal, theirs / ours["step_s"], theirs / at_peak))
    return found


def memory_row(rows, needed):
    """Return the row of the memory goal; `needed` is the bytes of all arrays of a step."""
    ours, theirs = (next(row for row in rows if row["name"] == name)["peak_rss_mb"] for name in ("abi_py", "torch"))
    return judged(MEMORY, ours / theirs, needed / 2**20 / theirs)


def contest(name, precision, peers, options):
    """Compare one shape; return the rows, saved if asked."""
    print(f"\nstep {name} {precision}, {SHAPES[name]}", flush=True)
    rows = bench_vs_peers.compare(name, precision, peers, options)
    bench_vs_peers.print_table(rows)
    if options.save:
        about = header(f"step {name} {precision}", options.threads)
        save_rows([about | row for row in rows], "-peers")
    return rows


def measure_steps(options):
    """Yield the rows of all step goals."""
    for name in ("deepzig", "small", "medium", "long", "demo", "tiny"):
        shape, goals = SHAPES[name], step_goals(name)
        try:
            rows = contest(name, "fp32", TORCH, options)
        except WorkerFailed as error:
            missed = [goal for goal, _ in goals] + ([SHARE, MEMORY] if name == "deepzig" else [])
            yield from (judged(goal, None, note=str(error)) for goal in missed)
            continue
        yield from ratio_rows(goals, rows, step_flops(shape))
        if name == "deepzig":
            yield judged(SHARE, rows[0]["share_of_peak"], 1.0)
            asked = json.dumps([shape.model_fields(), shape.batch_size, shape.seq_len])
            yield memory_row(rows, run([sys.executable, "-c", PLAN, asked], options.threads))
    try:
        rows = contest("deepzig", "bf16", ["torch-bf16-compile"], options)
        yield from ratio_rows([(BF16, ["torch-bf16-compile"])], rows, step_flops(SHAPES["deepzig"]))
    except WorkerFailed as error:
        yield judged(BF16, None, note=str(error))


# -- products ------------------------------------------------------------------------------------

CONTESTS = [  # goal, library, precision, ABI_SIMD
    (Goal("matmul fp32, vs NumPy", 1.55, "x", True, PRODUCTS), "numpy", "fp32", None),
    (
        Goal("matmul bf16, vs PyTorch bf16", 0.9, "x", True, f"{PRODUCTS} --library torch --precision bf16"),
        "torch", "bf16", None,
    ),
    (Goal("AVX2 path (forced), vs NumPy", 0.9, "x", True, f"{PRODUCTS} --simd avx2"), "numpy", "fp32", "avx2"),
]  # fmt: skip


def measure_products(options):
    """Yield the rows of the products of the deepzig step; possible: ours at the whole peak."""
    found = products.products_of(SHAPES["deepzig"])
    for goal, library, precision, simd in CONTESTS:
        print(f"\n{goal.what}, products of the deepzig step", flush=True)
        further = {"precision": precision, "simd": simd, "runs": 2 if options.quick else 7}
        try:
            ours, theirs, peak = products.compare(found, library, Namespace(**vars(options) | further))
        except WorkerFailed as error:
            yield judged(goal, None, note=str(error))
            continue
        rows = products.table_rows(found, ours, theirs, peak, library)
        products.print_table(rows)
        if options.save:
            about = header(f"products deepzig {precision}", options.threads) | {"simd": simd or "widest"}
            save_rows([about | row for row in rows], "-products")
        yield judged(goal, rows[-1]["factor"], rows[-1]["possible"])


# -- start ---------------------------------------------------------------------------------------


def wall_seconds(words, runs, **variables):
    """Return the median wall-clock seconds of a Python process with these arguments; WorkerFailed if it fails."""
    samples = []
    for _ in range(runs):
        start = time.perf_counter()
        done = subprocess.run(
            [sys.executable, *words], cwd=ROOT, env=os.environ | variables, capture_output=True, text=True, check=False
        )
        samples.append(time.perf_counter() - start)
        if done.returncode:
            raise WorkerFailed(f"python {' '.join(words)} failed: {done.stderr.strip().splitlines()[-1:]}")
    return statistics.median(samples)


def measure_start(options):
    """Yield the rows of start-up; possible: an interpreter that loads only what must be loaded."""
    runs = 2 if options.quick else 7
    plain = wall_seconds(["-c", "pass"], runs)
    numba = wall_seconds(["-c", "import numba"], runs)
    cold = Goal("all kernels compiled cold", 30.0, "s", False, "ABI_CACHE_DIR=$(mktemp -d) abi-train warmup")
    try:
        with tempfile.TemporaryDirectory() as folder:
            taken = wall_seconds(["-m", "abi_py", "warmup"], 1, ABI_CACHE_DIR=folder)
        yield judged(cold, taken)
    except WorkerFailed as error:
        yield judged(cold, None, note=str(error))
    everything = "import abi_py; abi_py.LlamaTrainer"
    warm = [
        (Goal("import abi_py", 0.5, "s", False, "python -c 'import abi_py'"), ["-c", "import abi_py"], plain),
        (
            Goal("import abi_py, and all that training loads", 0.5, "s", False, f"python -c '{everything}'"),
            ["-c", everything], numba,
        ),
        (Goal("abi-train info", 1.0, "s", False, "abi-train info"), ["-m", "abi_py", "info"], numba),
    ]  # fmt: skip
    for goal, words, possible in warm:
        try:
            wall_seconds(words, 1)  # files come from the disk, and kernels are compiled, only once
            yield judged(goal, wall_seconds(words, runs), possible)
        except WorkerFailed as error:
            yield judged(goal, None, note=str(error))


def main():
    """Read the options, measure part by part, print the table; return 1 unless all goals are met."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--part", choices=PARTS, action="append", help="repeatable (default: all)")
    parser.add_argument("--quick", action="store_true", help="one round, one step of each: shows that it works")
    parser.add_argument("--save", action="store_true", help="add the rows to bench/results/<machine>-goals.csv")
    contest_options(parser)
    options = parser.parse_args()
    check_contest_options(parser, options)
    if options.quick:
        options.rounds, options.steps, options.warmup = 1, 1, 1
    about = header("goals", options.threads)
    print(", ".join(f"{key} {value}" for key, value in about.items()))
    measure = {"steps": measure_steps, "products": measure_products, "start": measure_start}
    rows = []
    stopped = False
    try:
        for part in dict.fromkeys(options.part or PARTS):
            for row in measure[part](options):
                rows.append(row)
                if options.save:  # row by row: what is measured is not lost if a later one is stopped
                    save_rows([about | row], "-goals")
    except KeyboardInterrupt:
        stopped = True
    print("\n" + table(rows))
    print(json.dumps(about | {"rows": rows}))
    if stopped:
        print("stopped; the table has what was measured before", file=sys.stderr)
        return 130
    return int(any(row["met"] != "yes" for row in rows))


if __name__ == "__main__":
    run_script(main)
