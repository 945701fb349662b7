"""How the step grows: tokens/s x 6 parameters for widths, depths and lengths, and whether time keeps to arithmetic.

    python bench/growth.py
    python bench/growth.py --axis length --save

    width     128 ... 1024 at 4 layers            8 x 256 tokens, vocabulary 4096, heads of 64, feed-forward 3 C
    depth     2 ... 16 layers at width 256        the same
    length    T = 128 ... 4096 at width 256, 4 layers, 4096 tokens in all

`6 P` counts six operations for each parameter and token; `GFLOP/s` counts what a step must compute, attention included
(arithmetic.py).  An axis passes if nothing grows faster than its arithmetic: the operations per second reached must
not fall, from any smaller size to a larger one, by more than --allowed (15 %).  Along `length` the share of attention
grows, and attention runs at a rate of its own, so there the rule holds for attention (its kernels by themselves) and
for the rest of the step, each by itself.  Exit code 1 if an axis fails.
"""

import argparse
import json
import statistics
import time

import numba
from _bench import header, run_script, save_rows
from arithmetic import attention_flops, parameters, step_flops
from shapes import Shape
from stages import attention_stages, seconds_per_call
from step_worker import Step

from abi_py.kernels.engine.number_formats import PRECISIONS
from abi_py.kernels.engine.peak import measured_peak

WIDTHS, DEPTHS, LENGTHS = (128, 256, 512, 1024), (2, 4, 8, 16), (128, 256, 512, 1024, 2048, 4096)
HEAD_DIM, VOCABULARY, TOKENS = 64, 4096, 4096
ALLOWED = 0.15


def shape_of(width=256, depth=4, length=256, tokens=2048):
    """Return the shape of a point."""
    heads = width // HEAD_DIM
    return Shape(VOCABULARY, width, depth, heads, heads, 3 * width, tokens // length, length)


AXES = {
    "width": {width: shape_of(width=width) for width in WIDTHS},
    "depth": {depth: shape_of(depth=depth) for depth in DEPTHS},
    "length": {length: shape_of(length=length, tokens=TOKENS) for length in LENGTHS},
}
JUDGED = {"width": ["gflop_per_s"], "depth": ["gflop_per_s"]}
JUDGED["length"] = ["attention_gflop_per_s", "rest_gflop_per_s"]


def step_seconds(shape, precision, steps):
    """Return the seconds of `steps` steps, after two that do not count."""
    step, samples = Step(shape, precision), []
    for _ in range(steps + 2):
        start = time.perf_counter()
        step()
        samples.append(time.perf_counter() - start)
    return samples[2:]


def attention_seconds(shape, precision, runs):
    """Return the seconds that a step's attention takes, its kernels by themselves, forward and backward."""
    functions = attention_stages(shape, precision == "bf16").values()
    return shape.num_layers * sum(seconds_per_call(function, shape.num_layers, runs) for function in functions)


def point(axis, size, shape, step, attention, peak):
    """Return the row of a point: `step` and `attention` are seconds in a step, peak is operations per second."""
    flops, share = step_flops(shape), attention_flops(shape)
    per_s = shape.tokens / step
    rest = max(step - attention, 1e-9)
    return {
        "name": f"{axis} {size}",
        "parameters": parameters(shape),
        "batch": f"{shape.batch_size}x{shape.seq_len}",
        "step_ms": round(step * 1e3, 3),
        "tokens_per_s": round(per_s, 1),
        "six_p_gflop_per_s": round(6 * parameters(shape) * per_s / 1e9, 2),
        "gflop_per_s": round(flops / step / 1e9, 2),
        "share_of_peak": round(flops / step / peak, 3),
        "attention_of_flops": round(share / flops, 3),
        "attention_of_time": round(attention / step, 3),
        "attention_gflop_per_s": round(share / attention / 1e9, 2),
        "rest_gflop_per_s": round((flops - share) / rest / 1e9, 2),
    }


def falls(values, allowed):
    """Return (index, fall) of the largest fall of a value below the best before it, or None if none is over allowed."""
    best, worst = values[0], (0, 0.0)
    for index, value in enumerate(values):
        best = max(best, value)
        worst = max(worst, (index, 1 - value / best), key=lambda found: found[1])
    return worst if worst[1] > allowed else None


def verdict(axis, rows, allowed):
    """Return whether an axis passes, and the line that says so."""
    said, passed = [], True
    for key in JUDGED[axis]:
        fall = falls([row[key] for row in rows], allowed)
        passed = passed and fall is None
        name = key.removesuffix("gflop_per_s").replace("_", " ").strip() or "the step"
        if fall:
            said.append(f"{name} falls by {fall[1]:.0%} at {rows[fall[0]]['name']}")
        else:
            said.append(f"{name} never falls by more than {allowed:.0%}")
    return passed, f"{axis}: {'PASS' if passed else 'FAIL'}; operations per second of {', of '.join(said)}"


def measure(axis, sizes, options, peak):
    """Return the rows of one axis; it is gone through `rounds` times, so that a slow minute does not hit one point."""
    steps, attention = ({size: [] for size in sizes} for _ in range(2))
    for _ in range(options.rounds):
        for size, shape in sizes.items():
            steps[size].append(statistics.median(step_seconds(shape, options.precision, options.steps)))
            attention[size].append(attention_seconds(shape, options.precision, options.steps))
    # The fastest round of each: other programs only ever make one slower.
    return [point(axis, size, shape, min(steps[size]), min(attention[size]), peak) for size, shape in sizes.items()]


def print_table(rows):
    """Print the rows of one axis."""
    heads = f"{'step':>13}{'tokens/s':>10}{'6 P':>8}{'GFLOP/s':>9}{'of peak':>9}"
    parts = f"{'attention: of flops':>21}{'of time':>9}{'GFLOP/s':>9}{'rest GFLOP/s':>14}"
    print(f"{'':14}{'parameters':>12}{'batch':>9}{heads}{parts}")
    for row in rows:
        cells = f"{row['parameters']:>12,}{row['batch']:>9}{row['step_ms']:>10.2f} ms{row['tokens_per_s']:>10.0f}"
        cells += f"{row['six_p_gflop_per_s']:>8.1f}{row['gflop_per_s']:>9.1f}{row['share_of_peak']:>9.1%}"
        cells += f"{row['attention_of_flops']:>21.1%}{row['attention_of_time']:>9.1%}"
        print(f"{row['name']:14}{cells}{row['attention_gflop_per_s']:>9.1f}{row['rest_gflop_per_s']:>14.1f}")


def main():
    """Read the options, measure each axis, print tables and verdicts; return 1 if an axis fails."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--axis", choices=AXES, action="append", help="repeatable (default: all)")
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="fp32", help="of the products' operands")
    parser.add_argument("--rounds", type=int, default=3, help="times that each axis is gone through")
    parser.add_argument("--steps", type=int, default=5, help="steps that count for a point, in each round")
    parser.add_argument("--allowed", type=float, default=ALLOWED, help="fall of operations per second that passes")
    parser.add_argument("--threads", type=int, default=numba.get_num_threads(), help="threads of the kernels")
    parser.add_argument("--quick", action="store_true", help="one round of one step, three smallest sizes of each axis")
    parser.add_argument("--save", action="store_true", help="add the rows to bench/results/<machine>-growth.csv")
    options = parser.parse_args()
    if min(options.rounds, options.steps) < 1 or not 0 < options.allowed < 1:
        parser.error("--rounds and --steps must be at least 1, --allowed above 0 and below 1")
    if not 1 <= options.threads <= numba.config.NUMBA_NUM_THREADS:
        parser.error(f"--threads ({options.threads}) must be between 1 and {numba.config.NUMBA_NUM_THREADS}")
    if options.quick:
        options.rounds = options.steps = 1
    numba.set_num_threads(options.threads)
    about = header(f"growth {options.precision}", options.threads)
    print("How the training step grows")
    print(", ".join(f"{key} {value}" for key, value in about.items()))
    peak = measured_peak(0.5, PRECISIONS[options.precision])
    rows, failed = [], False
    for axis in dict.fromkeys(options.axis or AXES):
        sizes = dict(list(AXES[axis].items())[: 3 if options.quick else None])
        found = measure(axis, sizes, options, peak)
        print_table(found)
        passed, line = verdict(axis, found, options.allowed)
        print(line + "\n", flush=True)
        failed = failed or not passed
        rows += [row | {"passed": passed} for row in found]
    print(f"peak {peak / 1e9:.0f} GFLOP/s with {options.threads} threads")
    if options.save:
        save_rows([about | row for row in rows], "-growth")
    print(json.dumps(about | {"peak_gflop_per_s": round(peak / 1e9, 1), "rows": rows}))
    return int(failed)


if __name__ == "__main__":
    run_script(main)
