"""`pytest bench --benchmark-only`: the rows of the benchmarks of operations, timed by pytest-benchmark.

A script that makes a `Bench` is run once, when pytest collects it, and checks its kernel as always; what it would time
then becomes one benchmark for each row, with NumPy's beside it in one group.  pytest-benchmark keeps, compares and
plots what it measures: `--benchmark-autosave`, `--benchmark-compare`.  The other scripts compare processes (a step with
its peers, generation with its products), which pytest-benchmark can't time; nothing of them is collected.
"""

import contextlib
import runpy

import _bench
import numba
import pytest


class Rows(_bench.Bench):
    """A Bench that notes what it is to time, and on how many threads; there is no command line to read."""

    made = None  # the latest

    def __init__(self, operation, title):
        """Begin without rows."""
        self.operation, self.rows = operation, []
        self.header = {"threads": numba.get_num_threads()}
        Rows.made = self

    def time(self, name, function, *, bytes_moved=0, flops=0, numpy=None):
        """Note a row, and NumPy's."""
        facts = {"bytes_moved": bytes_moved, "flops": flops, "threads": numba.get_num_threads()}
        self.rows.append((name, f"{self.operation}: {name}", function, facts))
        if numpy:
            self.rows.append((f"{name}, NumPy", f"{self.operation}: {name}", numpy, facts))

    @contextlib.contextmanager
    def beside(self, numpy_seconds):
        """Leave out what NumPy does in a process of its own."""
        yield []

    def finish(self):
        """Write nothing: pytest-benchmark does."""


class Script(pytest.Module):
    """A script; its items are its rows."""

    def collect(self):
        """Run the script, which checks the kernel, and yield its rows."""
        if "import Bench" not in self.path.read_text(encoding="utf-8"):
            return
        threads, bench, _bench.Bench = numba.get_num_threads(), _bench.Bench, Rows
        try:
            runpy.run_path(str(self.path), run_name="__main__")
        except SystemExit as error:  # a check failed
            raise self.CollectError(str(error)) from None
        finally:
            _bench.Bench = bench
            numba.set_num_threads(threads)
        for row in Rows.made.rows:
            yield make_item(self, *row)


def make_item(script, name, group, function, facts):
    """Return a test that asks for pytest-benchmark's fixture and times a row."""

    def call(benchmark):
        benchmark.extra_info.update(facts)
        threads = numba.get_num_threads()
        numba.set_num_threads(facts["threads"])
        try:
            benchmark(function)
        finally:
            numba.set_num_threads(threads)

    item = pytest.Function.from_parent(script, name=name, callobj=call)
    item.add_marker(pytest.mark.benchmark(group=group))
    return item


def pytest_pycollect_makemodule(module_path, parent):
    """Take the scripts for what they are; setup.cfg lets pytest look at them."""
    return Script.from_parent(parent, path=module_path)
