"""Time the matrix products of a training step, ours beside NumPy's or PyTorch's, in processes that take turns.

    python bench/products.py --shape deepzig                                              beside NumPy, float32
    python bench/products.py --shape deepzig --simd avx2                                  the same, AVX2 on both sides
    python bench/products.py --shape all                                                  of all shapes in shapes.py
    python bench/products.py --library torch --precision bf16 --peer-python ~/peers/bin/python

The figure of a product is the lowest of the medians of all rounds, for both sides alike: other programs only ever make
a round slower.  The last lines: the slowest product, the geometric mean of the factors, and all products, each weighed
by how often a step does it.  `possible` is the factor that a product at the machine's whole multiply-add peak would
reach.  Where an instruction set is forced on ours, NumPy's OpenBLAS is told to use the same, if it knows it.
"""

import argparse
import json
import os
import statistics
import sys
from pathlib import Path

from _bench import header, run_script, save_rows
from arithmetic import head_products, layer_products
from bench_vs_peers import WorkerFailed, peak_of, run
from product_worker import PRECISIONS
from shapes import SHAPES

HERE = Path(__file__).resolve().parent


CORES = {"avx2": "Haswell"}  # OpenBLAS's name for an instruction set, where it would take a wider one by itself


def products_of(*names):
    """Return the products of the steps of shapes, by name; the head's have the rows that ours has in memory at once.

    Of several shapes, each product has the name of the first that does it, and is one product with the calls of all.
    """
    from abi_py.kernels.cross_entropy import chunk_rows

    found = {}
    for name in names:
        shape = SHAPES[name]
        chunk = min(chunk_rows(shape.vocab_size), shape.tokens)
        for product in layer_products(shape) + head_products(shape, chunk):
            sizes = product.form, product.rows, product.columns, product.depth
            if sizes in found:
                found[sizes] = found[sizes]._replace(calls=found[sizes].calls + product.calls)
            else:
                weight = f"{name} {product.weight}" if len(names) > 1 else product.weight
                found[sizes] = product._replace(weight=weight)
    return list(found.values())


def compare(products, library, options):
    """Return the seconds of each product, ours and the library's, and the peak; WorkerFailed if a process fails.

    `options` has precision, rounds, runs, threads, peer_python and simd (an ABI_SIMD, or None).
    """
    sizes = json.dumps([(p.form, p.rows, p.columns, p.depth) for p in products])
    common = [sizes, "--precision", options.precision, "--threads", options.threads, "--runs", options.runs]
    variables = {"ABI_SIMD": options.simd} if options.simd else {}
    if options.simd in CORES:
        variables["OPENBLAS_CORETYPE"] = CORES[options.simd]
    theirs_python = options.peer_python if library == "torch" else sys.executable
    commands = {
        "abi": [sys.executable, HERE / "product_worker.py", "--library", "abi", *common],
        library: [theirs_python, HERE / "product_worker.py", "--library", library, *common],
    }
    found, peak = {name: [] for name in commands}, 0.0
    for number in range(options.rounds):
        peak = max(peak, peak_of(options.precision, options.threads, **variables))
        for name in sorted(commands, reverse=number % 2 == 1):
            found[name].append(run(commands[name], options.threads, **variables))
    ours, theirs = ([min(times) for times in zip(*found[name], strict=True)] for name in ("abi", library))
    return ours, theirs, peak


def table_rows(products, ours, theirs, peak, library):
    """Return a row for each product and one for all of them, each weighed by its calls."""
    rows = []

    def row(name, calls, flops, own, other):
        rows.append(
            {
                "name": name,
                "calls": calls,
                "ours_us": round(own * 1e6, 2),
                "library": library,
                "library_us": round(other * 1e6, 2),
                "factor": round(other / own, 3),
                "possible": round(other * peak / flops, 3),
                "gflop_per_s": round(flops / own / 1e9, 1),
                "library_gflop_per_s": round(flops / other / 1e9, 1),
                "share_of_peak": round(flops / own / peak, 3),
            }
        )

    for product, own, other in zip(products, ours, theirs, strict=True):
        row(product.name, product.calls, product.flops, own, other)
    calls = [product.calls for product in products]
    totals = [sum(n * t for n, t in zip(calls, times, strict=True)) for times in (ours, theirs)]
    row("all products of the step", sum(calls), sum(p.calls * p.flops for p in products), *totals)
    return rows


def print_table(rows):
    """Print what `table_rows` returned."""
    library = rows[0]["library"]
    rates = f"{'GFLOP/s':>9}{'of peak':>9}{'theirs':>9}"
    print(f"{'':36}{'calls':>6}{'ours':>14}{library:>14}{'factor':>8}{'possible':>10}{rates}")
    for row in rows:
        cells = f"{row['calls']:>6}{row['ours_us']:>11.1f} us{row['library_us']:>11.1f} us{row['factor']:>8.2f}"
        cells += f"{row['possible']:>10.2f}{row['gflop_per_s']:>9.1f}{row['share_of_peak']:>9.1%}"
        print(f"{row['name']:36}{cells}{row['library_gflop_per_s']:>9.1f}")
    factors = {row["name"]: row["factor"] for row in rows[:-1]}
    worst = min(factors, key=factors.get)
    print(f"slowest: {worst}, {factors[worst]:.2f}; geometric mean {statistics.geometric_mean(factors.values()):.2f}")


def main():
    """Read the options, measure, print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=[*SHAPES, "all"], default="deepzig", help="whose products, see shapes.py")
    parser.add_argument("--library", choices=["numpy", "torch"], default="numpy")
    parser.add_argument("--precision", choices=PRECISIONS, default="fp32", help="ours; bf16: with --library torch")
    parser.add_argument("--simd", metavar="NAME", help="force an instruction set for ours: avx512, avx2, neon, generic")
    parser.add_argument("--rounds", type=int, default=3, help="times that each side runs")
    parser.add_argument("--runs", type=int, default=7, help="runs of each product in a round")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="threads of each side")
    parser.add_argument("--peer-python", default=sys.executable, metavar="PATH", help="interpreter that has torch")
    parser.add_argument("--save", action="store_true", help="add the rows to bench/results/<machine>-products.csv")
    options = parser.parse_args()
    if min(options.rounds, options.runs) < 1 or not 1 <= options.threads <= os.cpu_count():
        parser.error(f"--rounds and --runs must be at least 1, --threads 1 to {os.cpu_count()}")
    if options.library == "numpy" and options.precision == "bf16":
        parser.error("NumPy has no bfloat16; use --library torch")
    about = header(f"products {options.shape} {options.precision}", options.threads)
    about["simd"] = options.simd or "widest"
    names = list(SHAPES) if options.shape == "all" else [options.shape]
    print(f"Products of the training step {options.shape}" + (f", {SHAPES[names[0]]}" if len(names) == 1 else ""))
    print(", ".join(f"{key} {value}" for key, value in about.items()))
    products = products_of(*names)
    try:
        ours, theirs, peak = compare(products, options.library, options)
    except WorkerFailed as error:
        sys.exit(str(error))
    rows = table_rows(products, ours, theirs, peak, options.library)
    print_table(rows)
    print(f"peak {peak / 1e9:.0f} GFLOP/s with {options.threads} threads")
    if options.precision in ("bf16x3", "bf16x6"):
        variables = {"ABI_SIMD": options.simd} if options.simd else {}
        both = (peak_of(name, options.threads, **variables) / 1e9 for name in ("fp32", "bf16"))
        print("a product of parts counts once there; float32's own peak {:.0f}, bfloat16's {:.0f}".format(*both))
    if options.save:
        save_rows([about | row for row in rows], "-products")
    print(json.dumps(about | {"rows": rows}))


if __name__ == "__main__":
    run_script(main)
