"""The arithmetic, the judging and the bookkeeping of bench/; that a benchmark measures well can't be tested here."""

import csv
import importlib
import itertools
import json
import os
import runpy
import subprocess
import sys
import types
from pathlib import Path

import numba
import numpy as np
import pytest

from abi_py.kernels.engine.jit import JIT

ROOT = Path(__file__).resolve().parents[1]
NAMES = ("arithmetic", "shapes", "worker", "_bench", "bench_vs_peers", "products", "speed_tables", "stages",
         "roofline", "growth", "judging", "goals", "step_worker", "product_worker", "bench_step")  # fmt: skip


@pytest.fixture(scope="module")
def bench():
    """The scripts of bench/ as modules; their names are forgotten afterwards, since some are common words."""
    folder = str(ROOT / "bench")
    sys.path.insert(0, folder)
    try:
        yield type("bench", (), {name: importlib.import_module(name) for name in NAMES})
    finally:
        sys.path.remove(folder)
        for name in NAMES:
            sys.modules.pop(name, None)


def model_config(shape):
    from abi_py.config import TrainableModelConfig

    return TrainableModelConfig(**shape.model_fields())


# -- operations and bytes --------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["demo", "tiny", "deepzig-gqa", "long"])
def test_weights_and_operations_are_the_models_own(bench, name):
    from abi_py.families import layers, tensor_table
    from abi_py.model.stack import flops_per_token

    shape = bench.shapes.SHAPES[name]
    config = model_config(shape)
    assert bench.arithmetic.parameters(shape) == sum(tensor.size for tensor in tensor_table(config))

    per_token = flops_per_token(layers(config), shape.seq_len)  # of a description: no weights are made
    assert bench.arithmetic.step_flops(shape) == pytest.approx(per_token * shape.tokens, rel=1e-12)


def test_products_are_those_of_a_step_counted_by_hand(bench):
    shape = bench.shapes.Shape(100, 8, 3, 4, 2, 16, 2, 5)  # heads of 2: keys 4 wide; 10 rows
    found = {p.name: p for p in bench.arithmetic.layer_products(shape)}
    assert len(found) == 12
    assert found["w_q w_k w_v y"][2:] == (10, 16, 8, 3)
    assert found["w_q w_k w_v dx"][2:] == (10, 8, 16, 3)
    assert found["w_down dw"][2:] == (8, 16, 10, 3)
    assert found["w_gate w_up y"].flops == 2 * 10 * 32 * 8


def test_figures_of_the_page(bench):
    deepzig = bench.shapes.SHAPES["deepzig"]
    flops = bench.arithmetic.step_flops(deepzig)
    share = bench.arithmetic.attention_flops(deepzig) / flops
    page = " ".join((ROOT / "docs/5-speed.md").read_text(encoding="utf-8").split())
    assert f"has {flops / 1e9:.0f} GFLOP to do, {100 * share:.1f} % of them in attention" in page


@pytest.mark.parametrize("chunk", [1, 3, 5, 10])
def test_products_and_attention_are_all_operations(bench, chunk):
    shape = bench.shapes.Shape(100, 8, 3, 4, 2, 16, 2, 5)
    products = bench.arithmetic.layer_products(shape) + bench.arithmetic.head_products(shape, chunk)
    total = sum(p.calls * p.flops for p in products) + bench.arithmetic.attention_flops(shape)
    assert total == bench.arithmetic.step_flops(shape)
    assert bench.arithmetic.attention_flops(shape) == 12 * 3 * 8 * 2 * (1 + 2 + 3 + 4 + 5)


def test_stages_move_what_their_arrays_hold(bench):
    shape = bench.shapes.Shape(100, 8, 3, 4, 2, 16, 2, 5)
    found = {stage.name: stage for stage in bench.arithmetic.stages(shape)}
    assert len(found) == len(bench.arithmetic.stages(shape))
    x, f, norms = 10 * 8 * 4, 10 * 16 * 4, 10 * 4
    assert found["rms_norm y"].bytes == 2 * x + norms + 8 * 4
    assert found["rms_norm dx"].bytes == 4 * x + norms + 2 * 8 * 4
    assert found["final rms_norm dx"].bytes == 3 * x + norms + 2 * 8 * 4
    assert found["swiglu y"].bytes == 3 * f
    assert found["swiglu dx"].bytes == 6 * f  # dh, gate and up in; dgate, dup and h out
    narrow = {stage.name: stage for stage in bench.arithmetic.stages(shape, True)}
    assert (narrow["swiglu y"].bytes, narrow["swiglu dx"].bytes) == (4 * f, 5 * f)
    assert found["rope y"].bytes == 2 * 10 * (8 + 4) * 4 + 10 * 4 + 2 * 5 * 1 * 4
    assert found["clip and AdamW"].bytes == 7 * 4 * bench.arithmetic.parameters(shape)
    needed = sum(s.calls * s.flops for s in found.values()) - 2 * 3 * 8 * 30  # backward has the scores again
    assert needed == bench.arithmetic.step_flops(shape)


@pytest.mark.parametrize("bf16", [False, True])
def test_every_stage_can_be_run(bench, bf16):
    shape = bench.shapes.Shape(40, 8, 2, 4, 2, 16, 2, 5)
    seconds = bench.stages.measured_stages(shape, bench.arithmetic.stages(shape, bf16), bf16, 1)
    assert seconds.keys() == {stage.name for stage in bench.arithmetic.stages(shape, bf16)}
    assert min(seconds.values()) > 0


def test_a_stage_without_a_function_is_an_error(bench):
    shape = bench.shapes.Shape(40, 8, 1, 4, 2, 16, 1, 5)
    unknown = bench.arithmetic.Stage("sorting", "memory", 1, 1, 0, 4)
    with pytest.raises(KeyError, match="sorting"):
        bench.stages.measured_stages(shape, [unknown], False, 1)


# -- workers ---------------------------------------------------------------------------------------


def test_every_worker_begins_with_the_weights_of_the_model(bench):
    from abi_py.families import tensor_table

    shape = bench.shapes.SHAPES["demo"]
    first = dict(bench.worker.first_weights(shape))
    assert {name: w.shape for name, w in first.items()} == {t.name: t.shape for t in tensor_table(model_config(shape))}
    again = dict(bench.worker.first_weights(shape))
    assert all(np.array_equal(first[name], again[name]) and w.dtype == np.float32 for name, w in first.items())
    assert first["layers.0.w_q"].std() == pytest.approx(0.02, rel=0.05)
    ids, labels = bench.worker.batch(shape)
    assert ids.shape == labels.shape == (shape.batch_size, shape.seq_len)
    assert not np.array_equal(ids, labels)


def test_a_step_of_the_worker_learns_its_batch(bench):
    step = bench.step_worker.Step(bench.shapes.Shape(40, 8, 1, 2, 1, 16, 2, 8))
    losses = [step() for _ in range(5)]
    assert losses[0] == pytest.approx(np.log(40), abs=0.05)
    assert all(later < sooner for sooner, later in itertools.pairwise(losses))


def test_a_step_is_split_into_all_its_stages(bench):
    from abi_py.model.layers import attention, linear

    before = linear.product, attention.attention_forward
    shape = bench.shapes.Shape(40, 8, 2, 4, 2, 16, 2, 5)
    whole, seconds, clocks = bench.bench_step.measured_steps(bench.step_worker.Step(shape), 2)
    assert (linear.product, attention.attention_forward) == before
    assert len(whole) == len(seconds["between kernels"]) == 2
    for weight in ("w_q w_k w_v", "w_o", "w_gate w_up", "w_down"):
        for kind in ("y", "dx", "dw"):
            assert clocks.calls[f"{weight}  {kind}"] == shape.num_layers
    for operation in ("rope", "swiglu", "attention"):
        assert clocks.calls[f"{operation}  y"] == clocks.calls[f"{operation}  dx"] == shape.num_layers
    assert "other" not in {stage.split()[0] for stage in seconds}
    assert sum(clocks.flops.values()) >= bench.arithmetic.step_flops(shape)  # attention computes its scores again


LIGHT = (
    *("bias", "dropout", "embedding", "gelu", "global_norm", "layer_norm", "panels", "peak", "rms_norm", "rope"),
    *("simd", "stored_matmul", "streamed_matmul", "swiglu", "tiles"),
)


@pytest.mark.skipif(not JIT, reason="slow without compiling")
@pytest.mark.parametrize("operation", LIGHT)
def test_benchmarks_of_operations_run(bench, operation, monkeypatch, capsys):
    """Each checks its kernel before it times it; here it calls it once."""
    calls = []

    def once(function, runs):
        function()
        calls.append(function)
        return np.ones(3)

    monkeypatch.setattr(bench._bench, "seconds_per_call", once)
    monkeypatch.setattr(sys, "argv", ["bench"])
    before = numba.get_num_threads()
    try:
        runpy.run_path(str(ROOT / f"bench/bench_{operation}.py"), run_name="__main__")
    finally:
        numba.set_num_threads(before)
    rows = json.loads(capsys.readouterr().out.splitlines()[-1])["rows"]
    assert 0 < len(rows) <= len(calls)


def test_pytest_benchmark_times_the_rows_of_a_script(tmp_path):
    """As `pytest bench --benchmark-only` does with all; NumPy's time lies beside ours, in a group."""
    words = ["--benchmark-only", "--benchmark-min-rounds=1", "--benchmark-max-time=0", "--benchmark-json=found.json"]
    words = [*words, "-p", "no:cacheprovider", f"--rootdir={ROOT}", f"-c{ROOT / 'setup.cfg'}"]
    scripts = [ROOT / f"bench/bench_{name}.py" for name in ("simd", "step")]
    # Not a worker of this session, where pytest-benchmark would time nothing.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_XDIST")}
    command = [sys.executable, "-m", "pytest", *words, *scripts]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = json.loads((tmp_path / "found.json").read_text())["benchmarks"]
    assert [(row["group"], row["name"]) for row in rows] == [
        ("simd: exp", "exp"),
        ("simd: exp", "exp, NumPy"),
        ("simd: largest", "largest"),
        ("simd: largest", "largest, NumPy"),
    ]
    assert all(row["stats"]["min"] > 0 and row["extra_info"]["bytes_moved"] for row in rows)


@pytest.mark.parametrize("form", ["y", "dx", "dw"])
def test_libraries_do_the_same_product(bench, form):
    rows, columns, depth = 5, 7, 3
    a, b = bench.product_worker.operands(form, rows, columns, depth)
    turned = bench.product_worker.transposed(form)
    y = (a.T if turned["transpose_a"] else a) @ (b.T if turned["transpose_b"] else b)
    assert y.shape == (rows, columns)
    for make in (bench.product_worker.abi, bench.product_worker.numpy):
        call = make(form, rows, columns, depth, "fp32")
        call()
        outs = [cell.cell_contents for cell in call.__closure__]
        assert any(isinstance(x, np.ndarray) and x.shape == y.shape and np.allclose(x, y, atol=1e-5) for x in outs)


# -- comparisons -----------------------------------------------------------------------------------


def line(name="abi_py", seconds=(1.0, 2.0, 3.0), memory=100, loss=5.0, parameters=10):
    return {
        "peer": name, "shape": "tiny", "precision": "fp32", "parameters": parameters, "first_loss": loss,
        "last_loss": loss - 1, "step_s": float(np.median(seconds)), "steps_s": list(seconds), "peak_rss_mb": memory,
        "version": "x 1",
    }  # fmt: skip


def test_summary_of_rounds(bench):
    lines = {
        "abi_py": [line(seconds=(1.0, 2.0)), line(seconds=(2.0, 3.0), memory=120)],
        "torch": [line("torch", (4.0, 4.0), 300), line("torch", (5.0, 5.0), 200)],
    }
    ours, torch = bench.bench_vs_peers.summary(lines, flops=4e9, peak=4e9)
    assert (ours["step_s"], ours["lowest_s"], ours["highest_s"]) == (2.0, 1.0, 3.0)
    assert (ours["speed_ratio"], ours["memory_ratio"], ours["share_of_peak"]) == (1.0, 1.0, 0.5)
    assert torch["step_s"] == 4.5
    assert torch["speed_ratio"] == 2.25
    assert (torch["lowest_ratio"], torch["highest_ratio"]) == (2.0, 2.667)  # 5 / 2.5 and 4 / 1.5
    assert torch["memory_ratio"] == 0.4
    assert torch["q1_s"] == 4.0
    assert torch["q3_s"] == 5.0


def test_one_counted_step_has_a_summary(bench):
    (row,) = bench.bench_vs_peers.summary({"abi_py": [line(seconds=(2.0,))]}, 1e9, 1e9)
    assert row["q1_s"] == row["step_s"] == row["q3_s"] == 2.0


@pytest.mark.parametrize("changed", [{"loss": 5.01}, {"parameters": 11}, {"loss": float("nan")}])
def test_contenders_that_do_other_work_are_refused(bench, changed):
    same = {"abi_py": [line()], "torch": [line("torch", loss=5.0005)]}
    bench.bench_vs_peers.check_same_work(same, 1e-3)
    with pytest.raises(bench.bench_vs_peers.WorkerFailed, match="the same model"):
        bench.bench_vs_peers.check_same_work({"abi_py": [line()], "torch": [line("torch", **changed)]}, 1e-3)


def test_a_worker_that_fails_is_reported(bench):
    failed = bench.bench_vs_peers.WorkerFailed
    with pytest.raises(failed, match="exit code 3"):
        bench.bench_vs_peers.run([sys.executable, "-c", "raise SystemExit(3)"], 1)
    with pytest.raises(failed, match=r"no_such_module.*--peer-python"):
        bench.bench_vs_peers.run([sys.executable, "-c", "import no_such_module"], 1)
    with pytest.raises(failed, match="interpreter"):
        bench.bench_vs_peers.run([ROOT / "no-such-python"], 1)
    code = "import json, os; print('noise'); print(json.dumps([os.environ['OMP_NUM_THREADS'], os.environ['WORD']]))"
    assert bench.bench_vs_peers.run([sys.executable, "-c", code], 2, WORD="x") == ["2", "x"]


def test_usual_steps(bench):
    steps = {name: bench.bench_vs_peers.usual_steps(shape) for name, shape in bench.shapes.SHAPES.items()}
    assert steps["demo"] == 300
    assert steps["deepzig"] == 6
    assert 6 < steps["small"] < steps["tiny"] <= 300


def test_table_of_products_weighs_calls(bench):
    products = [bench.arithmetic.Product("a", "y", 10, 10, 5, 3), bench.arithmetic.Product("b", "y", 10, 10, 10, 1)]
    rows = bench.products.table_rows(products, [1.0, 2.0], [2.0, 5.0], 4000.0, "numpy")
    assert [row["factor"] for row in rows] == [2.0, 2.5, 2.2]  # (3 2 + 5) / (3 1 + 2)
    assert rows[-1]["calls"] == 4
    assert rows[-1]["possible"] == pytest.approx(11.0 * 4000 / (3 * 1000 + 2000))
    assert rows[0]["share_of_peak"] == 0.25


# -- roofline and growth ---------------------------------------------------------------------------


def test_roofline_rows(bench):
    stage = bench.arithmetic.Stage
    found = [stage("norm", "memory", 2, 1, 0, 100), stage("product", "product", 4, 1, 1000, 0)]
    found.append(stage("attention", "attention", 1, 1, 500, 0))
    host = {"fp32_flop_per_s": 1000.0, "bf16_flop_per_s": 2000.0, "bytes_per_s": 50.0, "step_flops": 4000}
    seconds = {"norm": 4.0, "product": 1.0, "attention": 1.0}
    rows = {row["name"]: row for row in bench.roofline.stage_rows(found, seconds, 16.0, host, "bf16")}
    assert list(rows) == ["norm", "product", "attention", "all stages", "rest of the step", "whole step"]
    assert rows["norm"]["share_of_bound"] == 0.5
    assert rows["norm"]["share_of_step"] == 0.5
    assert rows["product"]["share_of_bound"] == 0.5  # of the bfloat16 peak
    assert rows["attention"]["share_of_bound"] == 0.25
    assert rows["all stages"]["ms"] == 13000
    assert rows["all stages"]["least_ms"] == 4000 + 2000 + 250
    assert rows["rest of the step"]["ms"] == 3000
    assert rows["whole step"]["share_of_bound"] == 4000 / 16 / 2000


def test_bandwidth_does_its_work(bench):
    read, copy = bench.roofline.bandwidth(megabytes=1, runs=1)
    assert read > 0
    assert copy > 0


def test_growth_has_the_sizes_that_were_asked_for(bench):
    axes = bench.growth.AXES
    assert [s.hidden_dim for s in axes["width"].values()] == [128, 256, 512, 1024]
    assert len({s.num_layers for s in axes["width"].values()}) == 1
    assert [s.num_layers for s in axes["depth"].values()] == [2, 4, 8, 16]
    assert len({s.hidden_dim for s in axes["depth"].values()}) == 1
    assert [s.seq_len for s in axes["length"].values()] == [128, 256, 512, 1024, 2048, 4096]
    assert {s.tokens for s in axes["length"].values()} == {4096}


def test_a_fall_is_seen_even_in_small_steps(bench):
    assert bench.growth.falls([1, 2, 3], 0.1) is None
    assert bench.growth.falls([10, 9.5, 9.1], 0.1) is None
    assert bench.growth.falls([10, 9.5, 8.9], 0.1) == (2, pytest.approx(0.11))
    assert bench.growth.falls([1, 10, 20, 12, 20], 0.1) == (3, pytest.approx(0.4))


def test_verdict_of_growth(bench):
    shape = bench.growth.AXES["length"][4096]
    flops, share = bench.arithmetic.step_flops(shape), bench.arithmetic.attention_flops(shape)
    row = bench.growth.point("length", 4096, shape, step=2.0, attention=0.5, peak=flops)
    assert row["share_of_peak"] == 0.5
    assert row["attention_of_time"] == 0.25
    assert row["attention_of_flops"] == pytest.approx(share / flops, abs=1e-3)
    assert row["rest_gflop_per_s"] == pytest.approx((flops - share) / 1.5e9, rel=1e-3)
    slower = row | {"name": "length 8192", "attention_gflop_per_s": row["attention_gflop_per_s"] / 2}
    assert bench.growth.verdict("length", [row, row], 0.15)[0]
    passed, said = bench.growth.verdict("length", [row, slower], 0.15)
    assert not passed
    assert "attention falls by 50% at length 8192" in said
    assert bench.growth.verdict("width", [row, slower], 0.15)[0]  # there the whole step is judged


# -- goals -----------------------------------------------------------------------------------------


def test_judging(bench):
    judged, goal = bench.judging.judged, bench.judging.Goal
    least = goal("speed", 2.0, "x", True, "cmd")
    most = goal("memory", 0.45, "%", False, "cmd")
    assert judged(least, 2.0, 2.5)["met"] == "yes"
    missed = judged(least, 1.9, 1.95)
    assert (missed["met"], missed["bounded_by_machine"]) == ("no", "yes")
    assert judged(most, 0.4, 0.3)["met"] == "yes"
    assert judged(most, 0.5, 0.46)["bounded_by_machine"] == "yes"
    assert judged(most, 0.5, 0.3)["bounded_by_machine"] == ""
    disturbed = judged(least, 1.9, 1.8)
    assert disturbed["bounded_by_machine"] == ""
    assert "neither figure counts" in disturbed["note"]
    absent = judged(least, None, note="no torch\nTraceback")
    assert absent["met"] == "not measured"
    text = bench.judging.table([missed, absent, judged(most, 0.4)])
    assert "1.90 x" in text
    assert "at most 45%" in text
    assert "no torch" in text
    assert "Traceback" not in text
    assert "* more is asked" in text


PEERS_ROWS = [
    {"name": "abi_py", "step_s": 2.0, "peak_gflop_per_s": 4.0, "share_of_peak": 0.5, "peak_rss_mb": 50},
    {"name": "torch", "step_s": 6.0, "peak_rss_mb": 200},
    {"name": "torch-compile", "step_s": 5.0, "peak_rss_mb": 100},
]


def test_least_seconds_of_a_step(bench):
    shape = bench.shapes.SHAPES["deepzig"]
    flops, state = bench.arithmetic.step_flops(shape), 12 * bench.arithmetic.parameters(shape)
    least = bench.goals.least_seconds
    assert least(shape, flops / 2, 1.0, None) == pytest.approx(2.0)  # nobody knows of the caches: all may stay there
    assert least(shape, flops / 2, 1.0, state + 1) == pytest.approx(2.0)
    assert least(shape, flops / 2, state, 0) == pytest.approx(4.0)  # read once, written once
    assert least(shape, flops / 2, state / 4, state / 2) == pytest.approx(6.0)


def test_ratios_take_the_better_peer_and_state_what_is_possible(bench):
    goals = bench.goals
    ratio = goals.ratio_figure(PEERS_ROWS, ("torch", "torch-compile"), least=1.25)
    assert (ratio.measured, ratio.possible) == (2.5, 4.0)
    shape = bench.shapes.SHAPES["small"]
    share = goals.share_figure(shape, PEERS_ROWS, least=bench.arithmetic.step_flops(shape) / 3.2e9)
    assert share.measured == 0.5
    assert share.possible == pytest.approx(0.8)
    assert share.note == "of 4 GFLOP/s"
    memory = goals.memory_figure(PEERS_ROWS, 20 * 2**20)
    assert (memory.measured, memory.possible) == (0.25, 0.1)


def test_what_is_asked(bench):
    """Every row has a name of its own and a command that measures it alone; steps are asked for as shares."""
    asked = [goal for one in bench.goals.chosen(bench.goals.PARTS, None) for goal in one.goals]
    by_name = {goal.what: goal for goal in asked}
    assert len(by_name) == len(asked)
    for precision in ("fp32", "bf16"):
        shares = [by_name[f"step {shape} {precision}, share of the peak"].limit
                  for shape in ("deepzig", "medium", "long", "small")]  # fmt: skip
        assert shares == [0.85, 0.85, 0.75, 0.75]
    for goal in asked:
        assert goal.limit >= 1.0 or "vs" not in goal.what, f"{goal.what}: a peer may be ahead"
        script = goal.command.split()[1] if goal.command.startswith("python bench/") else None
        assert script is None or (ROOT / script).exists(), goal.command
    for shape in ("deepzig", "small", "medium", "long"):
        assert by_name[f"step {shape} fp32, vs the better PyTorch"].limit == 1.2


def test_rows_are_chosen_by_their_names(bench):
    chosen = bench.goals.chosen
    names = [goal.what for one in chosen(["steps", "products"], ["demo", "AVX2"]) for goal in one.goals]
    assert names == ["step demo fp32, vs the better PyTorch", "product fp32, AVX2 on both sides, vs NumPy"]
    assert chosen(["start"], ["no such row"]) == []


def test_a_measurement_that_fails_leaves_rows_that_say_so(bench):
    goal = bench.judging.Goal("speed", 2.0, "x", True, "cmd")

    def fails(options):
        raise bench.goals.WorkerFailed("no torch")

    one = bench.judging.Measurement((goal, goal._replace(what="memory")), fails)
    rows = bench.goals.measured_rows(one, None)
    assert [(row["what"], row["met"], row["note"]) for row in rows] == [
        ("speed", "not measured", "no torch"),
        ("memory", "not measured", "no torch"),
    ]


@pytest.mark.skipif(not JIT, reason="times compiled loops")
def test_bandwidth_is_measured_in_a_process_of_its_own(bench):
    assert bench.goals.bandwidth(1, 4) > 1e8  # bytes per second


@pytest.mark.parametrize("name", ["deepzig", "small"])
def test_every_goal_of_a_step_gets_its_figure(bench, monkeypatch, name):
    goals = bench.goals
    monkeypatch.setattr(goals, "contest", lambda *_: (PEERS_ROWS, 1.0))
    monkeypatch.setattr(goals, "run", lambda *_: 20 * 2**20)
    asked = goals.contest_goals(name, "fp32")
    found = goals.measure_step(name, "fp32", types.SimpleNamespace(threads=1))
    assert len(found) == len(asked) == (3 if name == "deepzig" else 2)


def test_each_product_beside_numpy(bench, monkeypatch):
    rows = [{"name": name, "factor": factor, "possible": 4 * factor} for name, factor in (("a", 2.0), ("b", 0.5))]
    rows.append({"name": "all", "factor": 9.0, "possible": 9.0})
    monkeypatch.setattr(bench.goals, "compare_products", lambda *_: rows)
    worst, mean = bench.goals.measure_each_product(types.SimpleNamespace(quick=False))
    assert worst == (0.5, 2.0, "b")
    assert (mean.measured, mean.possible) == (pytest.approx(1.0), pytest.approx(4.0))


def test_products_of_several_shapes_are_each_there_once(bench):
    one, other = (bench.products.products_of(name) for name in ("deepzig", "deepzig-gqa"))
    both = bench.products.products_of("deepzig", "deepzig-gqa")
    sizes = [product[1:5] for product in both]
    assert len(sizes) == len(set(sizes)) < len(one) + len(other)
    assert sum(p.calls * p.flops for p in both) == sum(p.calls * p.flops for p in one + other)
    assert both[0].name == "deepzig w_q w_k w_v y"
    assert one[0].name == "w_q w_k w_v y"


# -- results ---------------------------------------------------------------------------------------


def test_results_files_say_what_kind_of_processor_it_was(bench, monkeypatch):
    monkeypatch.setattr(bench._bench, "cpu_name", lambda: "Intel(R) Xeon(R) Processor")
    monkeypatch.setattr(bench._bench, "host_isa", lambda: "avx512")
    monkeypatch.setattr(bench._bench.os, "cpu_count", lambda: 2)
    for amx, units in ((True, "avx512-amx"), (False, "avx512")):
        monkeypatch.setattr(bench._bench, "has_amx", lambda amx=amx: amx)
        assert bench._bench.machine_name() == f"intel-r-xeon-r-processor-{units}-2-cores"
        about = bench._bench.header("x", 1)
        assert (about["instruction_set"], about["amx"]) == ("avx512", "yes" if amx else "no")


def test_results_of_an_older_form_get_the_new_columns(bench, tmp_path, monkeypatch):
    monkeypatch.setattr(bench._bench, "RESULTS", tmp_path / "results")
    bench._bench.save_rows([{"name": "a", "old": 1}])
    bench._bench.save_rows([{"name": "b", "new": None}, {"name": "c", "new": 2}])
    (path,) = (tmp_path / "results").iterdir()
    rows = list(csv.DictReader(path.read_text(encoding="utf-8").splitlines()))
    assert [(row["name"], row["old"], row["new"]) for row in rows] == [("a", "1", ""), ("b", "", ""), ("c", "", "2")]
    assert all(row["date"] for row in rows)


def test_table_of_the_peers_has_the_newest_run_of_each(bench, tmp_path, monkeypatch):
    monkeypatch.setattr(bench.speed_tables, "ROOT", tmp_path)
    columns = "date,operation,cpu,threads,commit,name,version,rounds,step_s,peak_rss_mb,speed_ratio"
    path = tmp_path / "x-peers.csv"
    path.write_text(
        f"{columns},share_of_peak,lowest_ratio,highest_ratio\n"
        "2026-01-01,step tiny fp32,C,2,aaa,abi_py,n 1,3,0.5,10,1,,,\n"
        "2026-01-01,step tiny fp32,C,2,aaa,torch,torch 2,3,1.0,20,2.0,,,\n"
        "2026-01-01,step tiny fp32,C,2,aaa,jax,jax 3,3,2.0,20,4.0,,,\n"
        "2026-01-02,step demo fp32,C,2,bbb,abi_py,n 1,3,0.1,10,1,0.5,1,1\n"
        "2026-01-02,step demo fp32,C,2,bbb,torch,torch 2,3,0.3,40,3.0,0.2,2.9,3.1\n"
        "2026-01-02,step tiny fp32,C,2,bbb,abi_py,n 1,3,0.4,10,1,0.7,1,1\n"
        "2026-01-02,step tiny fp32,C,2,bbb,torch,torch 2,3,1.0,20,2.5,0.3,2.4,2.6\n",
        encoding="utf-8",
    )
    *_, demo, torch, jax = bench.speed_tables.table(path).splitlines()
    assert demo == "| demo fp32 | 100.0 ms | 50% | torch 2 | 300.0 ms | 3.00 (2.90 to 3.10) | 25% |"
    assert torch == "| tiny fp32 | 400.0 ms | 70% | torch 2 | 1,000.0 ms | 2.50 (2.40 to 2.60) | 50% |"
    assert jax == "| tiny fp32 | 500.0 ms |  | jax 3 | 2,000.0 ms | 4.00 | 50% |"


def test_table_of_quantised_models_has_the_newest_measurement_of_each(bench, tmp_path, monkeypatch):
    monkeypatch.setattr(bench.speed_tables, "ROOT", tmp_path)
    path = tmp_path / "x-avx2-2-cores-llama-cpp.csv"
    path.write_text(
        "date,cpu,threads,name,cold_s,prefill_tokens_per_s,decode_tokens_per_s,gb_per_s,peak_rss_mb,file_mb\n"
        "2026-01-01,C,2,0.3B F16 abi_py,1.0,100.0,10.0,5.0,300,200\n"
        "2026-01-01,C,2,0.3B F16 llama.cpp,0.5,200.0,20.0,10.0,200,200\n"
        "2026-01-02,C,2,0.3B F16 abi_py,0.6,1300.0,30.0,15.0,250,200\n",
        encoding="utf-8",
    )
    title, *_, line = bench.speed_tables.quantised_table(path).splitlines()
    assert title.startswith("C with avx2, 2 threads")
    assert "2026-01-01 and 2026-01-02" in title
    assert line == "| 0.3B F16 | 200 | 1,300; 200 (6.50) | 30; 20 (1.50) | 15; 10 | 250; 200 (1.25) | 0.6; 0.5 (1.20) |"


def test_table_of_adapters_has_the_newest_measurement_of_each_kind(bench, tmp_path, monkeypatch):
    monkeypatch.setattr(bench.speed_tables, "ROOT", tmp_path)
    path = tmp_path / "x-avx2-2-cores-lora.csv"
    path.write_text(
        "date,cpu,threads,shape,rank,full_ms,share_of_operations,of,step_ms,of_lora,version,matrices_mb\n"
        "2026-01-01,C,2,tiny,16,4000,0.5,,,,,\n"
        "2026-01-01,C,2,tiny,16,4000,0.5,lora,2000,1.0,,10\n"
        "2026-01-02,C,2,tiny,16,2000,0.5,lora,1100,1.0,,11\n"
        '2026-01-02,C,2,tiny,16,2000,0.5,peft,2200,2.0,"peft 1, torch 2",\n',
        encoding="utf-8",
    )
    title, *_, ours, theirs = bench.speed_tables.adapters_table(path).splitlines()
    assert title.startswith("C with avx2, 2 threads")
    assert ours == "| tiny, 16 | LoRA | 1,100 ms | 0.550 | 0.500 | 1.000 | 11.0 |"
    assert theirs == "| tiny, 16 | peft 1 | 2,200 ms | 1.100 |  | 2.000 |  |"


def test_ratios_in_the_readme_are_those_of_the_stored_results(bench):
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    lines = text.partition("## Speed")[2].partition("## The map")[0].splitlines()
    peers = {
        ("fp32", "avx512"): ("torch", "torch-compile", "jax"),
        ("fp32", "avx2"): ("torch", "torch-compile"),
        ("bf16", "avx512"): ("torch-bf16", "torch-bf16-compile"),
    }
    claims = [line for line in lines if line.startswith("- ")]
    for claim, ((precision, machine), names) in zip(claims, peers.items(), strict=True):
        pairs = bench.speed_tables.latest_runs(ROOT / f"bench/results/amd-epyc-{machine}-2-cores-peers.csv")
        for name in names:
            rows = [peer for _, peer in pairs if peer["name"] == name and peer["operation"].endswith(precision)]
            ratios = [float(row["speed_ratio"]) for row in rows if " demo " not in row["operation"]]
            ends = dict.fromkeys(f"{ratio:.2f}" for ratio in (min(ratios), max(ratios)))
            assert f"{' to '.join(ends)} times as fast as" in claim, (name, claim)


def test_table_of_the_goals_has_the_newest_measurement_of_each(bench, tmp_path, monkeypatch):
    monkeypatch.setattr(bench.speed_tables, "ROOT", tmp_path)
    path = tmp_path / "x-avx2-2-cores-goals.csv"
    path.write_text(
        "date,cpu,threads,what,asked,rule,unit,measured,met,possible,bounded_by_machine\n"
        "2026-01-01,C,2,cold,30.0,at most,s,40.0,no,,\n"
        "2026-01-01,C,2,share,0.65,at least,%,0.84,yes,1.0,\n"
        "2026-01-01,C,2,ratio,2.0,at least,x,1.2,no,1.5,yes\n"
        "2026-01-02,C,2,cold,30.0,at most,s,31.0,no,,\n"
        "2026-01-02,C,2,peer,2.0,at least,x,,not measured,,\n",
        encoding="utf-8",
    )
    title, _, _, _, *rows = bench.speed_tables.goals_table(path).splitlines()
    amx = path.rename(tmp_path / "x-avx512-amx-2-cores-goals.csv")
    assert bench.speed_tables.goals_table(amx).startswith("C with avx512 and AMX, 2 threads (`x-avx512-amx-2-cores")
    assert title == "C with avx2, 2 threads (`x-avx2-2-cores-goals.csv`, 2026-01-01 and 2026-01-02):"
    assert rows == [
        "| cold | at most 30.00 s | 31.00 s |  | missed |",
        "| share | at least 65% | 84% | 100% | met |",
        "| ratio | at least 2.00 x | 1.20 x | 1.50 x | out of reach here |",
        "| peer | at least 2.00 x |  |  | not measured |",
    ]


def test_stored_results_can_be_read():
    for path in sorted((ROOT / "bench/results").glob("*.csv")):
        with path.open(newline="", encoding="utf-8") as file:
            for row in csv.DictReader(file):
                assert None not in row, path  # a row longer than its header
                assert None not in row.values(), path  # or shorter
                assert row["date"], path
                assert row["commit"], path


def test_the_peers_train_our_model():
    """The peers' scripts say so with their losses; here only that they take all that they share from one place."""
    for path in (ROOT / "bench/peers").glob("*_llama.py"):
        text = path.read_text(encoding="utf-8")
        for name in ("first_weights", "batch", "LEARNING_RATE", "WEIGHT_DECAY", "MAX_NORM", "EPS", "THETA"):
            assert f"    {name}," in text, f"{path.name} has a {name} of its own"


def test_product_worker_prints_one_figure_for_each_product(bench):
    asked = json.dumps([["y", 4, 5, 6], ["dw", 5, 6, 4]])
    words = [sys.executable, ROOT / "bench/product_worker.py", asked, "--library", "numpy", "--runs", "1"]
    found = bench.bench_vs_peers.run(words, 1)
    assert len(found) == 2
    assert min(found) > 0
