"""Split one training step by stage: milliseconds, share of the step, GFLOP/s, and share of the machine's measured peak.

    python bench/bench_step.py --shape tiny

The kernels that the layers import are on a clock while forward and backward run.  A stage's figure
is the median over steps of the sum of its calls; the whole step is timed without the clocks as well.
"""

import argparse
import json
import time
from collections import defaultdict

import numba
import numpy as np
from _bench import MINIMUM_RUNS, header, save_rows
from shapes import SHAPES
from step_worker import STRATEGIES, Step

from abi_py.cli.trace import replaced
from abi_py.kernels.engine.peak import measured_peak
from abi_py.kernels.engine.replay import python_alone


class Clocks:
    """Sums of seconds and operations by stage, for the step that runs now."""

    def __init__(self, model):
        self.names = self.weight_names(model)
        self.reset()

    def reset(self):
        """Begin a new step."""
        self.seconds, self.flops, self.calls = defaultdict(float), defaultdict(float), defaultdict(int)

    @staticmethod
    def weight_names(model):
        """Return {address: name} of the matrices and norms, weights and gradients, so that a call tells whose it is."""
        names = {}
        parameters = model.parameters
        for views in (parameters.weights, parameters.gradients):
            for name, view in views.items():
                short = name.rsplit(".", 1)[-1]
                names[view.ctypes.data] = {"w_q": "w_q w_k w_v", "w_gate": "w_gate w_up"}.get(short, short)
        return names

    def measure(self, stage, flops, function, arguments):
        """Call the function on the clock."""
        start = time.perf_counter()
        result = function(*arguments)
        self.seconds[stage] += time.perf_counter() - start
        self.flops[stage] += flops
        self.calls[stage] += 1
        return result

    def running(self):
        """Return a context in which every kernel that the model calls is on the clock."""
        return replaced(self.timed)

    def timed(self, function, name, _):
        """Return the kernel with the clock."""
        describe = getattr(self, name, self.named(name))

        def call(*arguments, **options):
            stage, flops = describe(*arguments, **options)
            return self.measure(stage, flops, lambda *given: function(*given, **options), arguments)

        return call

    # What tells a kernel's stage and operations from its arguments; one that has none is bound by memory.

    def product(self, out, a, b, transpose_a=False, transpose_b=False, **others):
        """Describe a matrix product: whose, and which of its three."""
        weight = self.names.get(b.ctypes.data) or self.names.get(out.ctypes.data) or "other"
        kind = "y" if transpose_b else "dw" if transpose_a else "dx"
        return f"{weight}  {kind}", 2.0 * out.size * (a.shape[0] if transpose_a else a.shape[1])

    @staticmethod
    def attention_forward(o, lse, q, k, v, starts, batch, heads, *others):
        """Describe attention: two products for each visible pair."""
        return "attention  y", 4.0 * (q.shape[1] // heads) * visible_pairs(lse, starts, batch)

    @staticmethod
    def attention_backward(dq, dk, dv, do, q, k, v, o, lse, starts, batch, heads, *others):
        """Describe its backward: five products, since the scores are computed again."""
        return "attention  dx", 10.0 * (q.shape[1] // heads) * visible_pairs(lse, starts, batch)

    @staticmethod
    def head_loss_backward(losses, hits, dx, dw, x, w, labels, *others):
        """Describe the head: three products for each row that is trained."""
        return "head and loss  y dx dw", 6.0 * np.count_nonzero(labels >= 0) * w.size

    @staticmethod
    def named(name):
        """Describe a row-wise operation: no operations are counted."""
        operation, _, rest = name.partition("_backward" if "_backward" in name else "_forward")
        stage = f"{operation}{rest}  {'dx' if '_backward' in name else 'y'}"
        return lambda *arguments, **options: (stage, 0.0)


def visible_pairs(lse, starts, batch):
    """Return how many pairs of a query and a key that it sees there are, in all heads."""
    time_steps = lse.shape[1] // batch
    return lse.shape[0] * float((np.tile(np.arange(time_steps), batch) - starts + 1).sum())


def measured_steps(step, count):
    """Return the seconds of whole steps without clocks, the seconds of each stage in each step, and the clocks."""
    step()
    whole = []
    for _ in range(count):
        start = time.perf_counter()
        step()
        whole.append(time.perf_counter() - start)
    clocks = Clocks(step.model)
    seconds = defaultdict(list)
    for _ in range(count):
        clocks.reset()
        with python_alone(), clocks.running():
            start = time.perf_counter()
            step.gradients()
            passes = time.perf_counter() - start
        clocks.seconds["between kernels"] = passes - sum(clocks.seconds.values())
        norm = clocks.measure("gradient norm", 0.0, step.norm, ())
        clocks.measure("clip and AdamW", 0.0, step.update, (norm,))
        for stage, value in clocks.seconds.items():
            seconds[stage].append(value)
    return whole, seconds, clocks


def main():
    """Read the options, measure, print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=SHAPES, default="tiny", help="model and batch, see shapes.py")
    parser.add_argument("--steps", type=int, default=MINIMUM_RUNS, help="steps with clocks, and as many without")
    parser.add_argument("--threads", type=int, default=numba.get_num_threads(), help="threads of the kernels")
    parser.add_argument("--checkpointing", choices=STRATEGIES, default="none", help="gradient checkpointing strategy")
    parser.add_argument("--save", action="store_true", help="add the rows to bench/results/<machine>.csv")
    options = parser.parse_args()
    if not 1 <= options.threads <= numba.config.NUMBA_NUM_THREADS:
        parser.error(f"--threads ({options.threads}) must be between 1 and {numba.config.NUMBA_NUM_THREADS}")
    if options.steps < 1:
        parser.error(f"--steps ({options.steps}) must be at least 1")
    numba.set_num_threads(options.threads)
    shape = SHAPES[options.shape]
    about = header(f"step {options.shape}", options.threads)
    print(f"Training step {options.shape}, {shape}, checkpointing {options.checkpointing}")
    print(", ".join(f"{key} {value}" for key, value in about.items()))
    peak = measured_peak()
    step = Step(shape, checkpointing=options.checkpointing)
    whole, seconds, clocks = measured_steps(step, options.steps)

    rows = []
    columns = f"{'median':>12}{'p20':>12}{'p80':>12}{'of step':>9}{'GFLOP/s':>9}{'of peak':>9}"
    print(f"{'':26}{'calls':>6}{columns}")

    def row(name, samples, flops, calls, total):
        p20, median, p80 = np.percentile(samples, (20, 50, 80))
        rate = flops / median if flops else None
        times = {"median_us": median * 1e6, "p20_us": p20 * 1e6, "p80_us": p80 * 1e6}
        entry = {"name": name} | {key: round(value, 3) for key, value in times.items()}
        entry |= {"gb_per_s": None, "gflop_per_s": rate and round(rate / 1e9, 3), "numpy_us": None, "factor": None}
        rows.append(entry)
        cells = "".join(f"{value / 1e3:>9.3f} ms" for value in times.values()) + f"{median / total:>8.1%} "
        cells += f"{rate / 1e9:>9.1f}{rate / peak:>8.1%}" if flops else ""
        print(f"{name:26}{calls or '':>6}{cells}")

    total = float(np.median([sum(parts) for parts in zip(*seconds.values(), strict=True)]))
    for stage, samples in sorted(seconds.items(), key=lambda item: -np.median(item[1])):
        row(stage, samples, clocks.flops[stage], clocks.calls[stage], total)
    flops = step.model.flops_per_token(shape.seq_len) * shape.tokens
    row("whole step, no clocks", whole, flops, None, total)
    speed = shape.tokens / np.median(whole)
    print(f"peak {peak / 1e9:.0f} GFLOP/s with {options.threads} threads; {speed:.0f} tokens/s")
    if options.save:
        save_rows([about | entry for entry in rows])
    print(json.dumps(about | {"peak_gflop_per_s": round(peak / 1e9, 1), "rows": rows}))


if __name__ == "__main__":
    main()
