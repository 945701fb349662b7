"""Count the tasks of each kernel of a step, and how evenly 8, 32 and 128 threads share them; nothing is timed or run.

    python bench/tasks.py                    the tables of docs/5-many-cores.md
    python bench/tasks.py --shape long       each kernel of one shape
    python bench/tasks.py --write            put them there
    python bench/tasks.py --check            say whether the page has these tables; a test runs it

Who does what is asked of the kernels themselves: `Parts` of products, plans of attention, `grid`, `partial_sums`,
`parameter_chunks`.  Numba deals out turns as `turns_of_threads` says, which a test holds against its scheduler.
"""

import argparse
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
from arithmetic import head_dim, linear_layers
from shapes import SHAPES

from abi_py.kernels import attention, embedding, matmul
from abi_py.kernels.cross_entropy import chunk_rows
from abi_py.kernels.engine.number_formats import NumberFormat
from abi_py.kernels.engine.shares import elements_each, partial_sums, turns_of_threads
from abi_py.kernels.optimizers import parameter_chunks

THREADS = 8, 32, 128
FORMAT = NumberFormat(8, 48)  # float32 on AVX-512; other tiles give other parts, as many
PAGE = Path(__file__).resolve().parents[1] / "docs" / "5-many-cores.md"
BEGIN, END = "<!-- python bench/tasks.py -->\n", "<!-- end -->"


class Loop(NamedTuple):
    """A parallel loop: what its turns cost, and of how many tasks the turns consist."""

    costs: np.ndarray
    tasks: int = 0  # 0: a turn is one

    def count(self):
        """Return how many tasks there are."""
        return self.tasks or len(self.costs)

    def slowest(self, threads):
        """Return the cost of the thread that has most."""
        sums = np.concatenate([[0.0], np.cumsum(self.costs)])
        return max(sums[end] - sums[first] for first, end in turns_of_threads(len(self.costs), threads))


class Kernel(NamedTuple):
    """The loops of a kernel, one after the other, and how much they have to do: what must be done, without packing."""

    loops: tuple[Loop, ...]
    useful: float
    calls: int = 1

    def tasks(self):
        """Return the tasks of the loop that has fewest."""
        return min(loop.count() for loop in self.loops)

    def imbalance(self, threads):
        """Return the time over that of work which all threads share evenly: 1 is perfect."""
        whole = sum(loop.costs.sum() for loop in self.loops)
        return sum(loop.slowest(threads) for loop in self.loops) * threads / whole


def even(count, of=None):
    """Return a loop of equal turns, or of `of` things in `count` parts."""
    edges = np.arange(count + 1) if of is None else [of * part // count for part in range(count + 1)]
    return Loop(np.diff(edges).astype(float))


def product(rows, columns, depth, threads):
    """Return a product; its costs are multiply-adds, those that packing takes the time of included."""
    parts = matmul._parts(rows, columns, depth, FORMAT, threads)
    heights = np.diff([*range(0, rows, parts.rows), rows])
    widths = np.diff([*range(0, columns, parts.columns), columns])
    costs = []
    for height in heights:
        for width in widths:
            times = 1 if parts.a_stays else -(-width // parts.slab_columns)
            costs.append(height * width + matmul.PACKING_COST * (width + height * times))
    return Kernel((Loop(np.array(costs, float) * depth),), float(rows) * columns * depth)


def planned(plans, per_pair, useful):
    """Return a kernel that runs plans, whose costs are in pairs of a query and a key."""
    loops = []
    for plan in plans:
        shares = np.add.reduceat(plan.costs, plan.ends[:-1]) * per_pair
        loops.append(Loop(shares, tasks=len(plan.tasks)))
    return Kernel(tuple(loops), useful)


def kernels(shape, threads):
    """Return {name: Kernel} of a step of a shape."""
    rows, c, v, layers = shape.tokens, shape.hidden_dim, shape.vocab_size, shape.num_layers
    batch, length, heads, groups = shape.batch_size, shape.seq_len, shape.num_heads, shape.num_kv_heads
    width, columns = head_dim(shape), FORMAT.columns
    found = {"embedding y, norms y, RoPE, SwiGLU": Kernel((even(rows),), 0.0)}
    found["norms dx"] = Kernel((even(partial_sums(rows), rows),), 0.0)
    pairs = batch * heads * length * (length + 1) / 2 * width
    plan = attention.forward_plan(batch, length, heads, columns, threads)
    found["attention y"] = planned((plan,), width, 2 * pairs)._replace(calls=layers)
    plans = attention.backward_plan(batch, length, heads, groups, columns, threads)
    found["attention dx"] = planned(plans, width, 5 * pairs)._replace(calls=layers)
    for name, (out, inner) in linear_layers(shape).items():
        for kind, sizes in (("y", (rows, out, inner)), ("dx", (rows, inner, out)), ("dw", (out, inner, rows))):
            found[f"{name} {kind}"] = product(*sizes, threads)._replace(calls=layers)
    step = min(chunk_rows(v), rows)
    calls = -(-rows // step)
    found["head: logits"] = product(step, v, c, threads)._replace(calls=calls)
    found["head: cross-entropy"] = Kernel((even(step),), 0.0)
    found["head: dw"] = product(v, c, step, threads)._replace(calls=calls)
    found["head: dx"] = product(step, c, v, threads)._replace(calls=calls)
    found["embedding dx"] = Kernel((even(int(np.prod(embedding.grid(rows, c, threads)))),), 0.0)
    sizes = [v * c, *[out * inner for out, inner in linear_layers(shape).values()] * layers, *[c] * (2 * layers + 1)]
    whole = sum(sizes)
    found["global norm"] = Kernel((even(-(-whole // elements_each(whole))),), 0.0)
    chunks, _ = parameter_chunks(np.cumsum([0, *sizes[:-1]]).tolist(), sizes, [True] * len(sizes))
    found["AdamW"] = Kernel((Loop(np.diff(chunks)[:, 0].astype(float)),), 0.0)
    return found


def efficiency(shape, threads):
    """Return the share of all threads' time in products and attention that useful multiply-adds take."""
    chosen = [kernel for kernel in kernels(shape, threads).values() if kernel.useful]
    took = sum(kernel.calls * sum(loop.slowest(threads) for loop in kernel.loops) for kernel in chosen)
    return sum(kernel.calls * kernel.useful for kernel in chosen) / (took * threads)


def scratch_megabytes(width, threads):
    """Return what packed panels of products and of attention, and its scores, can take, in MB."""
    of_products = sum(FORMAT.panels)
    shapes = (attention._forward_shapes(width, FORMAT), attention._backward_shapes(width, FORMAT))
    of_attention = max(sum(int(np.prod(size[1:])) for size in each) for each in shapes)
    return 4 * threads * of_products / 1e6, 4 * threads * of_attention / 1e6


def table(shape):
    """Return the lines of a shape: tasks and imbalance of each kernel."""
    counted = {threads: kernels(shape, threads) for threads in THREADS}
    lines = ["| kernel | " + " | ".join(f"{threads} threads" for threads in THREADS) + " |", "|---" * 4 + "|"]
    for name in counted[THREADS[0]]:
        cells = (f"{counted[n][name].tasks():,} ({counted[n][name].imbalance(n):.2f})" for n in THREADS)
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return lines


def page():
    """Return the text between the marks of docs/5-many-cores.md."""
    lines = ["Shape `deepzig`: tasks, and in brackets the imbalance.", "", *table(SHAPES["deepzig"]), ""]
    lines += ["All shapes: useful multiply-adds of products and attention over what all threads could do.", ""]
    lines += ["| shape | " + " | ".join(f"{n} thread{'s' * (n > 1)}" for n in (1, *THREADS)) + " |", "|---" * 5 + "|"]
    for name, shape in SHAPES.items():
        lines.append(f"| {name} | {' | '.join(f'{efficiency(shape, n):.0%}' for n in (1, *THREADS))} |")
    lines += ["", "Scratch at most, MB, heads of 64; a page of it that no thread writes takes no memory.", ""]
    lines += ["| threads | products | attention |", "|---|---|---|"]
    lines += [f"| {n} | {' | '.join(f'{size:.0f}' for size in scratch_megabytes(64, n))} |" for n in (2, *THREADS)]
    return "\n".join(lines) + "\n"


def main():
    """Print the tables, or compare them with the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, help="each kernel of this shape")
    parser.add_argument("--check", action="store_true", help="fail unless the page has these tables")
    parser.add_argument("--write", action="store_true", help="put these tables into the page")
    options = parser.parse_args()
    if options.check or options.write:
        before, _, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
        found, _, after = rest.partition(END)
        if options.write:
            PAGE.write_text(before + BEGIN + page() + END + after, encoding="utf-8")
        elif found != page():
            sys.exit(f"{PAGE.name} has other tables; run `python bench/tasks.py --write`")
        return
    print("\n".join(table(SHAPES[options.shape])) if options.shape else page(), end="\n" if options.shape else "")


if __name__ == "__main__":
    main()
