"""Measure every figure that the project has set itself for speed, and print asked, measured and possible side by side.

    python bench/goals.py --peer-python ~/peers/bin/python --save        an hour, on a quiet machine
    python bench/goals.py --peer-python ~/peers/bin/python --quick       shows that it works; its figures mean little
    python bench/goals.py --part products --part start                   without PyTorch only some rows are measured
    python bench/goals.py --only "step small" --only decode              rows whose name holds one of these texts
    python bench/goals.py --list                                         what is asked on this machine

Steps are asked for as shares of what the machine can do, of the peak of the numbers that they multiply, and ahead of
their peers: by what was reached somewhere (RATIOS), else not behind.  `possible` is what no program could beat on this
machine, from measurements of the same run: a step at the whole multiply-add peak whose weights and moments, as far as
no cache holds them, pass the memory once; a ratio to a peer with that step; memory with nothing but what training must
hold; start-up with nothing but what must be loaded.
A row whose `asked` is beyond `possible` is bounded by the machine.  Each row names the command that measures it alone.
With --save the rows go to bench/results/<machine>-goals.csv, and those of the comparisons to the files of
bench_vs_peers.py and products.py.  Exit code 1 if a row is missed or could not be measured.
"""

import argparse
import functools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from argparse import Namespace
from pathlib import Path

import bench_vs_peers
import products
from _bench import has_amx, header, last_level_cache, run_script, save_rows
from arithmetic import parameters, step_flops
from bench_vs_peers import WorkerFailed, check_contest_options, contest_options, peak_of, run
from judging import Figure, Goal, Measurement, figure, judged, table
from shapes import SHAPES

ROOT = Path(__file__).resolve().parents[1]
VS, PRODUCTS = "python bench/bench_vs_peers.py", "python bench/products.py"
PLAN = (
    "import json, sys; from abi_py.config import TrainableModelConfig as C; from abi_py.model import TrainableModel; "
    "f, b, t = json.loads(sys.argv[1]); print(json.dumps(sum(TrainableModel(C(**f)).memory_plan(b, t).values())))"
)
BANDWIDTH = (  # arguments: this directory, and megabytes if not the usual ones
    "import json, sys; sys.path.insert(0, sys.argv[1]); from roofline import bandwidth; "
    "print(json.dumps(bandwidth(*map(int, sys.argv[2:]))))"
)


# -- steps ---------------------------------------------------------------------------------------

SHARES = {"deepzig": 0.85, "medium": 0.85, "long": 0.75, "small": 0.75}  # of the peak, in either precision
RATIOS = {  # peers' step over ours
    "fp32": {"deepzig": 1.2, "small": 1.2, "medium": 1.2, "long": 1.2, "demo": 4.0, "tiny": 1.5},
    "bf16": {"deepzig": 1.2 if has_amx() else 1.26, "small": 1.0, "medium": 1.0, "long": 1.0},
}
PEERS = {"fp32": ("torch", "torch-compile"), "bf16": ("torch-bf16", "torch-bf16-compile")}
MEMORY_OF = "deepzig", "fp32"  # the step whose memory is held against PyTorch's


def step_command(shape, precision, *peers):
    """Return the command of one comparison."""
    words = [VS, "--shape", shape, *(["--precision", precision] if precision != "fp32" else [])]
    return " ".join([*words, *(f"--peer {peer}" for peer in peers)])


def contest_goals(shape, precision):
    """Return the goals that one comparison of steps measures: the ratio first, then the share and the memory."""
    command = step_command(shape, precision, *PEERS[precision])
    ratio = Goal(f"step {shape} {precision}, vs the better PyTorch", RATIOS[precision][shape], "x", True, command)
    found = [ratio]
    if shape in SHARES:
        found.append(Goal(f"step {shape} {precision}, share of the peak", SHARES[shape], "%", True, command))
    if (shape, precision) == MEMORY_OF:
        found.append(Goal(f"peak memory, {shape}, of PyTorch eager's", 0.45, "%", False, command))
    return tuple(found)


def least_seconds(shape, peak, moved_per_s, cache):
    """Return the seconds that no step can beat: operations at the whole peak, then the update.

    The update begins when the norm of all gradients is known.  It reads and writes weights and both moments; at most
    `cache` bytes of them (None: all) can have stayed in a cache since the step before.
    """
    state = 12 * parameters(shape)
    moved = 0 if cache is None else 2 * max(state - cache, 0)
    return step_flops(shape) / peak + moved / moved_per_s


@functools.cache
def bandwidth(threads, *megabytes):
    """Return the bytes per second that this machine moves at most, read or copied, from a process of its own."""
    return max(run([sys.executable, "-c", BANDWIDTH, Path(__file__).parent, *megabytes], threads))


def ratio_figure(rows, peers, least):
    """Return the figure of a ratio, of the rows of a comparison; possible: ours in `least` seconds."""
    by_name = {row["name"]: row for row in rows}
    theirs = min(by_name[peer]["step_s"] for peer in peers)
    return Figure(theirs / by_name["abi_py"]["step_s"], theirs / least)


def share_figure(shape, rows, least):
    """Return the figure of a share of the peak, of the rows of a comparison; possible: the share in `least` seconds."""
    peak = rows[0]["peak_gflop_per_s"]
    return Figure(rows[0]["share_of_peak"], step_flops(shape) / least / (peak * 1e9), f"of {peak:,.0f} GFLOP/s")


def memory_figure(rows, needed):
    """Return the figure of the memory; `needed` is the bytes of all arrays of a step."""
    ours, theirs = (next(row for row in rows if row["name"] == name)["peak_rss_mb"] for name in ("abi_py", "torch"))
    return Figure(ours / theirs, needed / 2**20 / theirs)


def contest(name, precision, peers, options):
    """Compare one shape; return the rows, saved if asked, and the least seconds of a step."""
    print(f"\nstep {name} {precision}, {SHAPES[name]}", flush=True)
    rows = bench_vs_peers.compare(name, precision, peers, options)
    bench_vs_peers.print_table(rows)
    if options.save:
        about = header(f"step {name} {precision}", options.threads)
        save_rows([about | row for row in rows], "-peers")
    peak = rows[0]["peak_gflop_per_s"] * 1e9
    return rows, least_seconds(SHAPES[name], peak, bandwidth(options.threads), last_level_cache())


def measure_step(name, precision, options):
    """Return the figures of `contest_goals`."""
    rows, least = contest(name, precision, PEERS[precision], options)
    found = [ratio_figure(rows, PEERS[precision], least)]
    if name in SHARES:
        found.append(share_figure(SHAPES[name], rows, least))
    if (name, precision) == MEMORY_OF:
        asked = json.dumps([SHAPES[name].model_fields(), SHAPES[name].batch_size, SHAPES[name].seq_len])
        found.append(memory_figure(rows, run([sys.executable, "-c", PLAN, asked], options.threads)))
    return found


def measure_jax(options):
    """Return the figure of the step beside JAX, which has no fused attention: one shape says enough."""
    rows, least = contest("small", "fp32", ["jax"], options)
    return [ratio_figure(rows, ["jax"], least)]


def measure_plain_run(options):
    """Return the share of the peak that the run without arguments reaches after its first steps."""
    peak = peak_of("fp32", options.threads)
    with tempfile.TemporaryDirectory() as folder:
        steps = 60 if options.quick else 600
        words = ["-m", "abi_py", "run", "--out", f"{folder}/run", "--max-steps", str(steps), "--eval-interval", "0"]
        wall_seconds(words, 1, NUMBA_NUM_THREADS=str(options.threads))
        lines = Path(folder, "run", "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    rates = [r["gflops"] for r in map(json.loads, lines) if r["type"] == "step" and r["step"] > steps // 3]
    return [Figure(statistics.median(rates) * 1e9 / peak, 1.0, f"of {peak / 1e9:,.0f} GFLOP/s")]


def steps_part():
    """Return what is measured of steps."""
    pairs = [(shape, precision) for precision, asked in RATIOS.items() for shape in asked]
    found = [Measurement(contest_goals(*pair), functools.partial(measure_step, *pair)) for pair in pairs]
    jax = Goal("step small fp32, vs JAX", 1.0, "x", True, step_command("small", "fp32", "jax"))
    # 33 % of the peak before small steps were worked on (two cores with AMX): to be up by half
    plain = Goal("the run without arguments, share of the peak", 0.5, "%", True, "abi-train run")
    return [*found, Measurement((jax,), measure_jax), Measurement((plain,), measure_plain_run)]


# -- products ------------------------------------------------------------------------------------


def compare_products(names, library, options, precision="fp32", simd=None):
    """Return the rows of `products.table_rows` for the products of some shapes, saved if asked."""
    found = products.products_of(*names)
    what = " ".join(names)
    print(f"\nproducts of {what}, {precision}, beside {library}", flush=True)
    further = {"precision": precision, "simd": simd, "runs": 2 if options.quick else 7}
    measured = products.compare(found, library, Namespace(**vars(options) | further))
    rows = products.table_rows(found, *measured, library)
    products.print_table(rows)
    if options.save:
        about = header(f"products {what} {precision}", options.threads) | {"simd": simd or "widest"}
        save_rows([about | row for row in rows], "-products")
    return rows


def measure_each_product(options):
    """Return the least factor over NumPy of all products of all shapes, and their geometric mean."""
    names = ("demo", "tiny") if options.quick else tuple(SHAPES)
    rows = compare_products(names, "numpy", options)[:-1]
    worst = min(rows, key=lambda row: row["factor"])
    mean, at_peak = (statistics.geometric_mean(row[key] for row in rows) for key in ("factor", "possible"))
    return [Figure(worst["factor"], worst["possible"], worst["name"]), Figure(mean, at_peak)]


def measure_all_products(library, precision, simd, options):
    """Return the factor of all products of the deepzig step, each as often as the step does it."""
    total = compare_products(("deepzig",), library, options, precision, simd)[-1]
    return [Figure(total["factor"], total["possible"])]


def products_part():
    """Return what is measured of products; possible: ours at the whole peak."""
    everywhere = f"{PRODUCTS} --shape all"
    each = (
        Goal("product fp32, vs NumPy, the slowest of all shapes", 1.0, "x", True, everywhere),
        Goal("product fp32, vs NumPy, geometric mean", 1.05, "x", True, everywhere),
    )
    contests = [
        ("product fp32, vs PyTorch", "--library torch", ("torch", "fp32", None)),
        ("product bf16, vs PyTorch", "--library torch --precision bf16", ("torch", "bf16", None)),
        ("product fp32, AVX2 on both sides, vs NumPy", "--simd avx2", ("numpy", "fp32", "avx2")),
    ]
    return [
        Measurement(each, measure_each_product),
        *(
            Measurement(
                (Goal(what, 1.0, "x", True, f"{PRODUCTS} {flags}"),), functools.partial(measure_all_products, *how)
            )
            for what, flags, how in contests
        ),
    ]


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


def measure_cold(words, options):
    """Return the seconds of a command that finds no compiled kernels; its files go to a folder that is removed."""
    with tempfile.TemporaryDirectory() as folder:
        words = [word.replace("FOLDER", folder) for word in words]
        if options.quick and words[0] == "run":
            words += ["--max-steps", "20"]
        return [Figure(wall_seconds(["-m", "abi_py", *words], 1, ABI_CACHE_DIR=f"{folder}/cache"))]


def measure_warm(words, least, options):
    """Return the seconds of a process, possible: those of one with only the arguments `least`."""
    runs = 2 if options.quick else 7
    wall_seconds(words, 1)  # files come from the disk, and kernels are compiled, only once
    return [Figure(wall_seconds(words, runs), wall_seconds(least, runs))]


def start_part():
    """Return what is measured of start-up; possible: an interpreter that loads only what must be loaded."""
    everything, numba = "import abi_py; abi_py.LlamaTrainer", ["-c", "import numba"]
    empty = "ABI_CACHE_DIR=$(mktemp -d) abi-train"
    cold = [
        ("all kernels compiled cold", 30.0, f"{empty} warmup", ["warmup"]),
        ("the first run without arguments, nothing compiled", 90.0, f"{empty} run", ["run", "--out", "FOLDER/run"]),
    ]
    warm = [
        ("import abi_py", 0.5, "python -c 'import abi_py'", ["-c", "import abi_py"], ["-c", "pass"]),
        ("import abi_py, and all that training loads", 0.5, f"python -c '{everything}'", ["-c", everything], numba),
        ("abi-train info", 1.0, "abi-train info", ["-m", "abi_py", "info"], numba),
    ]
    return [
        Measurement((Goal(what, limit, "s", False, command),), functools.partial(how, *given))
        for how, rows in ((measure_cold, cold), (measure_warm, warm))
        for what, limit, command, *given in rows
    ]


# -- generation ----------------------------------------------------------------------------------

DECODE = 0.9  # of the bandwidth of a read
DECODED = ("deepzig", "medium")
GENERATE = "python bench/bench_generate.py"


def measure_decode(options):
    """Return the share of the read bandwidth that writing tokens reaches, drawing one from the logits included."""
    words = [sys.executable, ROOT / "bench/bench_generate.py", *(f"--shape={name}" for name in DECODED)]
    flags = [*(["--quick"] if options.quick else []), *(["--save"] if options.save else [])]
    rows = run([*words, *flags, f"--threads={options.threads}"], options.threads)["rows"]
    return [
        Figure(row["share"] / 100, 1.0, f"of {row['read_gb_per_s']:.1f} GB/s")
        for row in rows
        if row["name"] == "generate, greedy"
    ]


def generation_part():
    """Return what is measured of generation; possible: every weight read once at the speed of memory."""
    goals = [
        Goal(f"decode {name}, share of the read bandwidth", DECODE, "%", True, f"{GENERATE} --shape {name}")
        for name in DECODED
    ]
    return [Measurement(tuple(goals), measure_decode)]


# -- all of them ---------------------------------------------------------------------------------

PARTS = {"steps": steps_part, "products": products_part, "start": start_part, "generation": generation_part}


def chosen(parts, texts):
    """Return the measurements of some parts that have a goal whose name holds one of the texts; without texts, all."""
    found = [measurement for part in dict.fromkeys(parts) for measurement in PARTS[part]()]
    if not texts:
        return found
    return [one for one in found if any(text in goal.what for goal in one.goals for text in texts)]


def measured_rows(measurement, options):
    """Return the rows of a measurement; if its process fails, rows that say so."""
    try:
        figures = measurement.measure(options)
    except WorkerFailed as error:
        figures = [Figure(None, None, str(error))] * len(measurement.goals)
    return [judged(goal, *found) for goal, found in zip(measurement.goals, figures, strict=True)]


def main():
    """Read the options, measure one after the other, print the table; return 1 unless all goals are met."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--part", choices=PARTS, action="append", help="repeatable (default: all)")
    parser.add_argument("--only", metavar="TEXT", action="append", help="rows whose name holds TEXT; repeatable")
    parser.add_argument("--list", action="store_true", help="print what is asked; measure nothing")
    parser.add_argument("--quick", action="store_true", help="one round, one step of each: shows that it works")
    parser.add_argument("--save", action="store_true", help="add the rows to bench/results/<machine>-goals.csv")
    contest_options(parser)
    options = parser.parse_args()
    check_contest_options(parser, options)
    wanted = chosen(options.part or PARTS, options.only)
    if not wanted:
        parser.error(f"no goal of these parts has {' or '.join(options.only)} in its name; --list shows their names")
    if options.list:
        for goal in (goal for measurement in wanted for goal in measurement.goals):
            rule = "at least" if goal.at_least else "at most"
            print(f"{goal.what:50}{rule + ' ' + figure(goal.limit, goal.unit):>16}   {goal.command}")
        return 0
    if options.quick:
        options.rounds, options.steps, options.warmup = 1, 1, 1
    about = header("goals", options.threads)
    print(", ".join(f"{key} {value}" for key, value in about.items()))
    rows = []
    stopped = False
    try:
        for measurement in wanted:
            found = measured_rows(measurement, options)
            rows += found
            if options.save:  # one by one: what is measured is not lost if a later one is stopped
                save_rows([about | row for row in found], "-goals")
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
