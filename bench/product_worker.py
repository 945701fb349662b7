"""Time matrix products with one library in a process of its own, and print a JSON list of seconds, one for each.

    python bench/product_worker.py --library numpy '[["y", 2048, 1536, 512], ["dw", 1536, 512, 2048]]'

Each product is [form, rows, columns, depth]: y = x Wᵀ, dx = dy W, dw = dyᵀ x; the operands are laid out as in training.
Ours takes float32 operands in every precision and rounds them while it packs; torch gets bfloat16 operands and writes
bfloat16, as its autocast does.  The seconds are the median of at least seven runs of 20 ms or more, taken after
one run that does not count.
"""

import argparse
import json
import os
import statistics
import time

import numpy as np

RUNS, SHORTEST_RUN = 7, 0.02
PRECISIONS = ("fp32", "bf16", "bf16x3", "bf16x6")  # of ours; only bf16 is another thing in the others as well


def operands(form, rows, columns, depth):
    """Return the two operands as they are in memory, float32."""
    rng = np.random.default_rng(0)
    sizes = {"y": ((rows, depth), (columns, depth)), "dx": ((rows, depth), (depth, columns))}
    sizes["dw"] = ((depth, rows), (depth, columns))
    return [rng.standard_normal(size, np.float32) for size in sizes[form]]


def transposed(form):
    """Say which of the two operands are to be transposed."""
    return {"transpose_a": form == "dw", "transpose_b": form == "y"}


def abi(form, rows, columns, depth, precision):
    """Return a function that does the product with our kernel."""
    from abi_py.kernels.engine import number_formats
    from abi_py.kernels.unchecked import product

    a, b = operands(form, rows, columns, depth)
    out, turned = np.empty((rows, columns), np.float32), transposed(form)
    return lambda: product(out, a, b, number_format=number_formats.PRECISIONS[precision], **turned)


def numpy(form, rows, columns, depth, precision):
    """Return a function that does the product with NumPy."""
    if precision == "bf16":
        raise SystemExit("NumPy has no bfloat16; use --precision fp32")
    a, b = operands(form, rows, columns, depth)
    out, turned = np.empty((rows, columns), np.float32), transposed(form)
    left, right = a.T if turned["transpose_a"] else a, b.T if turned["transpose_b"] else b
    return lambda: np.matmul(left, right, out=out)


def torch(form, rows, columns, depth, precision):
    """Return a function that does the product with PyTorch."""
    import torch as library

    kind = library.bfloat16 if precision == "bf16" else library.float32
    a, b = (library.from_numpy(x).to(kind) for x in operands(form, rows, columns, depth))
    out, turned = library.empty((rows, columns), dtype=kind), transposed(form)
    left, right = a.T if turned["transpose_a"] else a, b.T if turned["transpose_b"] else b
    return lambda: library.mm(left, right, out=out)


LIBRARIES = {"abi": abi, "numpy": numpy, "torch": torch}


def seconds_of(function, runs):
    """Return the median seconds of one call."""
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
    return statistics.median(samples)


def main():
    """Read the products, time them, print the list."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("products", type=json.loads, help="JSON: [[form, rows, columns, depth], ...]")
    parser.add_argument("--library", choices=LIBRARIES, required=True)
    parser.add_argument("--precision", choices=PRECISIONS, default="fp32", help="of the operands")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="threads of the library")
    parser.add_argument("--runs", type=int, default=RUNS, help="runs of each product")
    options = parser.parse_args()
    if options.library == "abi":  # the others read OMP_NUM_THREADS and its like when they are loaded
        import numba

        numba.set_num_threads(options.threads)
    elif options.library == "torch":
        import torch as library

        library.set_num_threads(options.threads)
    make = LIBRARIES[options.library]
    print(json.dumps([seconds_of(make(*product, options.precision), options.runs) for product in options.products]))


if __name__ == "__main__":
    main()
