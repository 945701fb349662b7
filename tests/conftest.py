"""What every test may use: a seeded generator, the golden files, and a run with one thread and with two."""

import os
import re
from pathlib import Path

# Numba fixes the largest number of threads when it is imported; two must be possible on a machine with one core, too.
os.environ.setdefault("NUMBA_NUM_THREADS", str(max(2, os.cpu_count() or 1)))
# As abi-train does (abi_py/cli): a thread that waits leaves its core soon, to the other worker of `pytest -n 2`.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")

import hypothesis
import numba
import numpy as np
import pytest

# What is tested is right or wrong, not quick: on a busy machine an example takes as long as it takes.
SLOW = hypothesis.HealthCheck.too_slow
hypothesis.settings.register_profile("unhurried", deadline=None, suppress_health_check=[SLOW])
hypothesis.settings.load_profile("unhurried")

GOLDEN = Path(__file__).resolve().parent / "golden"


@pytest.fixture
def rng():
    """Return a generator with a seed that is written down: 20240229."""
    return np.random.default_rng(20240229)


@pytest.fixture
def golden():
    """Return a function that reads tests/golden/<name>.npz as a dict of arrays."""

    def read(name):
        with np.load(GOLDEN / f"{name}.npz") as stored:
            return {key: stored[key] for key in stored.files}

    return read


@pytest.fixture
def replays(monkeypatch):
    """Return the recordings that were replayed so far, a list that grows."""
    from abi_py.kernels.engine.replay import Recording

    made, original = [], Recording.replay

    def counted(recording, *now):
        made.append(recording)
        original(recording, *now)

    monkeypatch.setattr(Recording, "replay", counted)
    return made


@pytest.fixture(scope="session")
def tiles():
    """Return float32 with every tile that may be chosen on a machine like this, and with small blocks."""
    from abi_py.kernels.engine.number_formats import TILES, NumberFormat

    formats = [NumberFormat(*shape) for shape in TILES.methods.values()]
    rows, columns = formats[-1].rows, formats[-1].columns
    return [*formats, NumberFormat(rows, columns, slab_columns=2 * columns, block_rows=2 * rows)]


@pytest.fixture(params=[1, 2], ids=["1 thread", "2 threads"])
def threads(request):
    """Run the test with one thread and with two; the value is their number."""
    before = numba.get_num_threads()
    numba.set_num_threads(request.param)
    yield request.param
    numba.set_num_threads(before)


@pytest.fixture
def same_bits():
    """Return a function that calls `make` with one thread and with two, and fails unless the bits are the same.

    `make` returns an array, a number, or a tuple of them, made afresh at each call.
    """

    def compare(make):
        before = numba.get_num_threads()
        results = []
        try:
            for count in (1, 2):
                numba.set_num_threads(count)
                made = make()
                results.append([np.array(part) for part in (made if isinstance(made, tuple) else (made,))])
        finally:
            numba.set_num_threads(before)
        for one, two in zip(*results, strict=True):
            assert one.dtype == two.dtype
            assert one.shape == two.shape
            assert one.tobytes() == two.tobytes(), "one thread and two threads give different bits"
    return compare


COMPILING = re.compile(r"compiling kernels for this processor, once; [^\n]*\n(\d+ kernels? compiled\n)?")


@pytest.fixture
def abi_train(tmp_path, monkeypatch, capsys):
    """Return a function that calls abi-train in an empty directory and gives exit code, stdout, stderr.

    Without the notice of compiling: what is compiled already is a matter of the tests before.
    """
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "100")

    from abi_py.cli import main

    def call(*arguments):
        with pytest.raises(SystemExit) as end:
            main([str(argument) for argument in arguments])
        out, err = capsys.readouterr()
        return end.value.code, out, COMPILING.sub("", err)

    return call
