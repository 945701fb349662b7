"""Time our training step and a peer's alternately, in one run, and print the ratios: PyTorch and JAX.

    python bench/bench_vs_peers.py --shape tiny --rounds 3
    python bench/bench_vs_peers.py --shape all --peer torch-compile --peer jax --peer-python ~/peers/bin/python

The peers need an environment of their own:

    python -m venv ~/peers && ~/peers/bin/pip install torch==2.13.0 jax==0.10.2 jaxlib==0.10.2 numpy

Each measurement is a process of its own (ours: step_worker.py, theirs: peers/), because thread pools disturb each
other inside one.  In every round each contender runs once, in an order that turns from round to round.  A contender's
figure is the median over all counted steps of all rounds; its spread is given by the quartiles.  The ratio is that of
the medians, and beside it are the lowest and the highest ratio of a single round.  All contenders begin with the
same weights and the same batch, and the run fails if their losses disagree: they must do the same work.  Only ratios
within one run mean anything: machines differ, and one machine differs from hour to hour.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

from _bench import header, run_script, save_rows
from arithmetic import step_flops
from shapes import SHAPES

HERE = Path(__file__).resolve().parent
PEERS = {  # name of a peer: its script and further options
    "torch": ["peers/torch_llama.py"],
    "torch-compile": ["peers/torch_llama.py", "--compile"],
    "torch-bf16": ["peers/torch_llama.py", "--precision", "bf16"],
    "torch-bf16-compile": ["peers/torch_llama.py", "--precision", "bf16", "--compile"],
    "jax": ["peers/jax_llama.py"],
    "jax-bf16": ["peers/jax_llama.py", "--precision", "bf16"],
}
USUAL_WORK = 1.2e12  # operations of the counted steps of a run, where --steps does not say how many
FEWEST, MOST = 6, 300
# Absolute; an untrained model's loss is log V, 5 to 11.
LOSS_TOLERANCE = {"fp32": 1e-3, "bf16x3": 1e-3, "bf16x6": 1e-3, "bf16": 2e-2}
PEAK = (
    "from abi_py.kernels.engine.peak import measured_peak as m; import json, numba, sys; "
    "from abi_py.kernels.engine.number_formats import PRECISIONS; "
    "numba.set_num_threads(int(sys.argv[1])); print(json.dumps(m(0.4, PRECISIONS[sys.argv[2]])))"
)


class WorkerFailed(RuntimeError):
    """A measurement's process did not end well; the text says what it wrote."""


def run(command, threads, **variables):
    """Run one measurement with further environment variables; return its last line, parsed, or raise WorkerFailed."""
    environment = os.environ | variables
    paths = [str(HERE.parent), environment.get("PYTHONPATH", "")]
    environment["PYTHONPATH"] = os.pathsep.join(path for path in paths if path)
    for name in ("OMP", "MKL", "OPENBLAS", "NUMBA"):
        environment[f"{name}_NUM_THREADS"] = str(threads)
    words = list(map(str, command))
    try:
        done = subprocess.run(words, env=environment, capture_output=True, text=True, check=False)
    except OSError as error:
        raise WorkerFailed(f"{words[0]}: {error.strerror}; give the interpreter that has the peers installed") from None
    if done.returncode:
        missing = "ModuleNotFoundError" in done.stderr
        said = done.stderr.splitlines()[-1] if missing else f"\n{done.stdout}{done.stderr}"
        remedy = "; name an interpreter that has it with --peer-python" if missing else ""
        raise WorkerFailed(f"{' '.join(words)} failed with exit code {done.returncode}: {said}{remedy}")
    return json.loads(done.stdout.splitlines()[-1])


def peak_of(precision, threads, **variables):
    """Return the machine's multiply-add peak at this moment, in operations per second, from a process of its own."""
    return run([sys.executable, "-c", PEAK, threads, precision], threads, **variables)


def usual_steps(shape):
    """Return how many steps a run counts unless told: many of a short step, few of a long one."""
    return min(max(round(USUAL_WORK / step_flops(shape)), FEWEST), MOST)


def check_same_work(lines, tolerance):
    """Raise WorkerFailed unless all contenders have the same weights and losses; `lines` is {name: [line, ...]}."""
    for key, allowed in (("parameters", 0), ("first_loss", tolerance), ("last_loss", tolerance)):
        values = [(name, line[key]) for name, found in lines.items() for line in found]
        if not all(abs(value - values[0][1]) <= allowed for _, value in values):  # NaN is never close
            said = ", ".join(f"{name} {value}" for name, value in values)
            raise WorkerFailed(f"the contenders do not train the same model: {key} {said}; {allowed} apart is allowed")


def summary(lines, flops, peak):
    """Return a row for each contender; `lines` is {name: [line of each round]}, ours first; peak in operations/s."""
    own, rows = lines["abi_py"], []
    own_median = statistics.median([value for line in own for value in line["steps_s"]])
    own_memory = max(line["peak_rss_mb"] for line in own)
    for name, found in lines.items():
        seconds = sorted(value for line in found for value in line["steps_s"])
        median, memory = statistics.median(seconds), max(line["peak_rss_mb"] for line in found)
        q1, _, q3 = statistics.quantiles(seconds, n=4, method="inclusive") if len(seconds) > 1 else seconds * 3
        ratios = [theirs["step_s"] / ours["step_s"] for theirs, ours in zip(found, own, strict=True)]
        rows.append(
            {
                "name": name,
                "version": found[0]["version"],
                "rounds": len(found),
                "step_s": round(median, 6),
                "lowest_s": seconds[0],
                "q1_s": round(q1, 6),
                "q3_s": round(q3, 6),
                "highest_s": seconds[-1],
                "tokens_per_s": round(SHAPES[found[0]["shape"]].tokens / median, 1),
                "peak_rss_mb": memory,
                "speed_ratio": round(median / own_median, 3),  # how many times as fast we are
                "lowest_ratio": round(min(ratios), 3),
                "highest_ratio": round(max(ratios), 3),
                "memory_ratio": round(own_memory / memory, 3),  # our memory as a share of theirs
                "peak_gflop_per_s": round(peak / 1e9, 1),
                "share_of_peak": round(flops / median / peak, 3),
            }
        )
    return rows


def compare(name, precision, peers, options):
    """Measure one shape: all rounds of all contenders; print as it goes, return the rows.  WorkerFailed if one fails.

    `options` has rounds, steps (None: as many as usual), warmup, threads and peer_python.
    """
    shape = SHAPES[name]
    steps = options.steps or usual_steps(shape)
    common = ["--shape", name, "--steps", steps, "--warmup", options.warmup, "--threads", options.threads]
    own = [sys.executable, HERE / "step_worker.py", *common, "--precision", precision]
    contenders = {"abi_py": own}
    for peer in peers:
        script, *further = PEERS[peer]
        contenders[peer] = [options.peer_python, HERE / script, *common, *further]
    # One step of ours first: compiling belongs to no round.
    run([*own, "--steps", 1, "--warmup", 0], options.threads)
    lines, peak = {contender: [] for contender in contenders}, 0.0
    for number in range(options.rounds):
        peak = max(peak, peak_of(precision, options.threads))
        names = list(contenders)
        turn = number % len(names)
        for contender in names[turn:] + names[:turn]:
            line = run(contenders[contender], options.threads)
            lines[contender].append(line)
            shown = f"{line['step_s'] * 1e3:10.2f} ms a step {line['peak_rss_mb']:7} MB"
            print(f"round {number + 1}  {contender:20}{shown}", flush=True)
        loosest = max(LOSS_TOLERANCE[found[0]["precision"]] for found in lines.values())
        check_same_work(lines, loosest)
    return summary(lines, step_flops(shape), peak)


def print_table(rows):
    """Print what `compare` returned."""
    cells = ("median", "lowest", "quartile", "quartile", "highest")
    ends = f"{'tokens/s':>10}{'peak MB':>9}{'of peak':>9}{'speed':>8}{'rounds':>13}{'memory':>8}"
    print(f"\n{'':20}" + "".join(f"{cell:>13}" for cell in cells) + ends)
    for row in rows:
        keys = ("step_s", "lowest_s", "q1_s", "q3_s", "highest_s")
        line = "".join(f"{row[key] * 1e3:>10.2f} ms" for key in keys)
        between = f"{row['lowest_ratio']:.2f}-{row['highest_ratio']:.2f}"
        line += f"{row['tokens_per_s']:>10.0f}{row['peak_rss_mb']:>9}{row['share_of_peak']:>9.1%}"
        line += f"{row['speed_ratio']:>8.2f}{between:>13}{row['memory_ratio']:>8.2f}"
        print(f"{row['name']:20}{line}")
    print("speed: their time over ours; rounds: the same in single rounds.  memory: our peak over theirs.")
    print(f"of peak: of the machine's multiply-add peak in this run, {rows[0]['peak_gflop_per_s']:.0f} GFLOP/s.\n")
    if max(row["share_of_peak"] for row in rows) > 1:
        print("more than the peak: other programs ran while it was measured, so these shares mean nothing\n")


def contest_options(parser):
    """Add the options that a comparison with peers has."""
    parser.add_argument("--rounds", type=int, default=3, help="times that each contender runs")
    parser.add_argument("--steps", type=int, help=f"steps that count in each run (default: {FEWEST} to {MOST})")
    parser.add_argument("--warmup", type=int, default=2, help="steps before them")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="threads of each contender")
    parser.add_argument("--peer-python", default=sys.executable, metavar="PATH", help="interpreter that has the peers")


def check_contest_options(parser, options):
    """End with a message if one of them makes no sense."""
    if options.rounds < 1 or options.warmup < 0 or (options.steps is not None and options.steps < 1):
        parser.error("--rounds and --steps must be at least 1, --warmup at least 0")
    if not 1 <= options.threads <= os.cpu_count():
        parser.error(f"--threads ({options.threads}) must be between 1 and {os.cpu_count()}")


def main():
    """Read the options, run the rounds, print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--shape", choices=[*SHAPES, "all"], action="append", help="see shapes.py; repeatable (default: tiny)"
    )
    parser.add_argument("--precision", choices=LOSS_TOLERANCE, default="fp32", help="ours; a peer has its own")
    parser.add_argument("--peer", choices=PEERS, action="append", help="repeatable (default: torch, or torch-bf16)")
    parser.add_argument("--save", action="store_true", help="add the rows to bench/results/<machine>-peers.csv")
    contest_options(parser)
    options = parser.parse_args()
    check_contest_options(parser, options)
    names = options.shape or ["tiny"]
    names = list(SHAPES) if "all" in names else list(dict.fromkeys(names))
    peers = list(dict.fromkeys(options.peer or ["torch-bf16" if options.precision == "bf16" else "torch"]))
    everything = []
    for name in names:
        about = header(f"step {name} {options.precision}", options.threads)
        print(f"Training step {name}, {SHAPES[name]}")
        print(", ".join(f"{key} {value}" for key, value in about.items()))
        try:
            rows = [about | row for row in compare(name, options.precision, peers, options)]
        except WorkerFailed as error:
            sys.exit(str(error))
        print_table(rows)
        if options.save:  # shape by shape: what is measured is not lost if a later one fails
            save_rows(rows, "-peers")
        everything += rows
    print(json.dumps({"rows": everything}))


if __name__ == "__main__":
    run_script(main)
