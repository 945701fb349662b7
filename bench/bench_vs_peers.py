"""Time our training step and PyTorch's alternately, in one run, and print the ratios.

    python bench/bench_vs_peers.py --shape tiny --rounds 3
    python bench/bench_vs_peers.py --shape deepzig --torch-python ~/torch/bin/python --save

Each measurement is a process of its own (ours: step_worker.py, theirs: peers/torch_llama.py), because thread pools
disturb each other inside one.  In every round each contender runs once, in an order that turns from round to round; a
contender's figure is the median over rounds.  Only ratios within one run mean anything: machines differ, and one
machine differs from hour to hour.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

from _bench import header, save_rows
from shapes import SHAPES

HERE = Path(__file__).resolve().parent
PEERS = {  # name of a peer: further options of torch_llama.py
    "torch": [],
    "torch-compile": ["--compile"],
    "torch-bf16": ["--precision", "bf16"],
    "torch-bf16-compile": ["--precision", "bf16", "--compile"],
}


def run(command, threads):
    """Run one measurement; return the dict of its JSON line, or exit with what it said."""
    environment = dict(os.environ)
    paths = [str(HERE.parent), environment.get("PYTHONPATH", "")]
    environment["PYTHONPATH"] = os.pathsep.join(path for path in paths if path)
    for name in ("OMP", "MKL", "OPENBLAS", "NUMBA"):
        environment[f"{name}_NUM_THREADS"] = str(threads)
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{' '.join(map(str, command))} failed:\n{done.stdout}{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def main():
    """Read the options, run the rounds, print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=SHAPES, default="tiny", help="model and batch, see shapes.py")
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="fp32", help="ours; a peer has its own")
    parser.add_argument("--peer", choices=PEERS, action="append", help="repeatable (default: torch, or torch-bf16)")
    parser.add_argument("--rounds", type=int, default=3, help="times that each contender runs")
    parser.add_argument("--steps", type=int, default=6, help="steps that count in each run")
    parser.add_argument("--warmup", type=int, default=2, help="steps before them")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="threads of each contender")
    parser.add_argument("--torch-python", default=sys.executable, metavar="PATH", help="interpreter that has torch")
    parser.add_argument("--save", action="store_true", help="add the rows to bench/results/<machine>-peers.csv")
    options = parser.parse_args()
    if min(options.rounds, options.steps, options.threads) < 1 or options.warmup < 0:
        parser.error("--rounds, --steps and --threads must be at least 1, --warmup at least 0")

    common = ["--shape", options.shape, "--steps", str(options.steps), "--warmup", str(options.warmup)]
    common += ["--threads", str(options.threads)]
    own_options = ["--precision", options.precision]
    contenders = {"abi_py": [sys.executable, HERE / "step_worker.py", *common, *own_options]}
    for peer in options.peer or ["torch" if options.precision == "fp32" else "torch-bf16"]:
        contenders[peer] = [options.torch_python, HERE / "peers/torch_llama.py", *common, *PEERS[peer]]
    about = header(f"step {options.shape} {options.precision}", options.threads)
    print(f"Training step {options.shape}, {SHAPES[options.shape]}")
    print(", ".join(f"{key} {value}" for key, value in about.items()))

    # One step of ours first: compiling belongs to no round.
    run([sys.executable, HERE / "step_worker.py", *common[:2], "--steps", "1", "--warmup", "0"], options.threads)
    lines = {name: [] for name in contenders}
    for number in range(options.rounds):
        names = list(contenders)
        for name in names[number % len(names) :] + names[: number % len(names)]:
            lines[name].append(run(contenders[name], options.threads))
            line = lines[name][-1]
            print(f"round {number + 1}  {name:20}{line['step_s']:9.4f} s a step {line['peak_rss_mb']:7} MB", flush=True)

    parameters = {name: found[0]["parameters"] for name, found in lines.items()}
    if len(set(parameters.values())) > 1:
        sys.exit(f"the contenders do not train the same model: {parameters} parameters")
    rows = []
    own = statistics.median(line["step_s"] for line in lines["abi_py"])
    own_memory = max(line["peak_rss_mb"] for line in lines["abi_py"])
    columns = f"{'median':>10}{'lowest':>10}{'highest':>10}{'tokens/s':>10}{'peak MB':>9}{'speed':>8}{'memory':>8}"
    print(f"\n{'':20}{columns}")
    for name, found in lines.items():
        seconds = sorted(line["step_s"] for line in found)
        median, memory = statistics.median(seconds), max(line["peak_rss_mb"] for line in found)
        row = {
            "name": name,
            "version": found[0]["version"],
            "rounds": options.rounds,
            "step_s": round(median, 5),
            "lowest_s": seconds[0],
            "highest_s": seconds[-1],
            "tokens_per_s": round(SHAPES[options.shape].tokens / median, 1),
            "peak_rss_mb": memory,
            "speed_ratio": round(median / own, 3),  # how many times as fast we are
            "memory_ratio": round(own_memory / memory, 3),  # our memory as a share of theirs
        }
        rows.append(row)
        cells = "".join(f"{row[key]:>8.4f} s" for key in ("step_s", "lowest_s", "highest_s"))
        cells += f"{row['tokens_per_s']:>10.0f}{memory:>9}{row['speed_ratio']:>8.2f}{row['memory_ratio']:>8.2f}"
        print(f"{name:20}{cells}")
    print("speed: their time over ours.  memory: our peak over theirs.")
    if options.save:
        save_rows([about | row for row in rows], "-peers")
    print(json.dumps(about | {"rows": rows}))


if __name__ == "__main__":
    main()
