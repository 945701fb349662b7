"""What a run's directory says: state, figures, curve, also of a run that is trained, was killed, or is damaged."""

import json
import os

import pytest
from recorded_events import a_step, an_evaluation, begin

from abi_py.errors import ConfigError
from abi_py.locks import DirectoryLock
from abi_py.runs import recorded
from abi_py.runs.recorded import find_runs, read_run, size_on_disk
from abi_py.training.events import EndEvent
from abi_py.training.metrics import JsonlSink
from abi_py.training.report import TrainingReport

REPORT = {
    "final_loss": 1.5, "final_accuracy": 0.5, "best_val_loss": 1.25, "best_val_accuracy": 0.5, "final_perplexity": 4.5,
    "total_steps": 20, "total_tokens": 2000, "total_time_ns": 4_000_000_000, "avg_throughput": 500.0,
    "checkpoints_saved": 1, "early_stopped": False, "epochs": 2, "skipped_updates": 0, "interrupted": False,
    "checkpoint": None, "best_checkpoint": None,
}  # fmt: skip


@pytest.fixture
def write(tmp_path):
    """Return a function that sends events to the metrics.jsonl of a run, and gives its directory."""

    def make(*events, name="a"):
        sink = JsonlSink(tmp_path / name / "metrics.jsonl")
        for event in events:
            sink.handle(event)
        sink.close()
        return tmp_path / name

    return make


def end(**changes):
    return EndEvent(step=20, time=4.0, report=TrainingReport(**{**REPORT, **changes}))


WHOLE = [begin(), *map(a_step, range(1, 21)), an_evaluation(10, 1.25, 1.8), an_evaluation(20, 1.5, 2.1)]


@pytest.mark.parametrize("brief", [False, True])
def test_a_finished_run(write, brief):
    run = read_run(write(*WHOLE, end()), brief)
    assert (run.state, run.step, run.tokens, run.seconds, run.num_params) == ("finished", 20, 2000, 4.0, 345)
    assert (run.best.loss, run.best.bits_per_byte, run.best.step, run.last.loss) == (1.25, 1.8, 10, 1.5)
    assert run.tokens_per_second == 500.0
    assert [record["step"] for record in run.steps] == ([20] if brief else [*range(1, 21)])


def test_the_states(write):
    directory = write(*WHOLE)
    assert read_run(directory).state == "failed"
    with DirectoryLock(directory, "out"):
        assert read_run(directory).state == "running"
    assert read_run(write(*WHOLE, end(interrupted=True), name="b")).state == "interrupted"
    (directory / "report.json").write_text(json.dumps({"total_steps": 10, "interrupted": False}))
    assert read_run(directory).state == "failed"  # that report is of an earlier session
    (directory / "report.json").write_text(json.dumps({"total_steps": 20, "interrupted": True}))
    assert read_run(directory).state == "interrupted"


def test_a_torn_last_line_is_passed_over(write):
    directory = write(*WHOLE[:12])
    with open(directory / "metrics.jsonl", "a") as file:
        file.write('{"type": "step", "step": 12, "lo')
    run = read_run(directory)
    assert (run.step, run.tokens) == (11, 1100)
    (directory / "metrics.jsonl").write_bytes(b"\x00\xff\n[1]\n{}\n3\n")
    assert (read_run(directory).step, read_run(directory).best) == (0, None)


@pytest.mark.parametrize(("key", "value"), [
    *(("step", "12"), ("step", 2**70), ("tokens", [1]), ("time", "soon"), ("time", 10**400), ("type", None)),
])  # fmt: skip
def test_a_record_that_holds_something_else_is_passed_over(write, key, value):
    directory = write(*WHOLE[:12])
    with open(directory / "metrics.jsonl", "a") as file:
        file.write(json.dumps({"type": "step", "step": 12, "tokens": 1200, "time": 3.0, key: value}) + "\n")
    run = read_run(directory)
    assert (run.step, run.tokens) == (11, 1100)
    (directory / "report.json").write_text(json.dumps({"total_steps": 20, "interrupted": False, "total_time_ns": "x"}))
    assert read_run(directory).state == "failed"


def test_a_resumed_run_has_each_step_once_and_its_new_end(write):
    directory = write(*WHOLE, end())
    write(begin(step=10, total=40), a_step(11, 9.0))
    run = read_run(directory)
    assert [record["step"] for record in run.steps] == [*range(1, 12)]
    assert run.steps[-1]["loss"] == 9.0
    assert run.start["total_steps"] == 40
    assert (directory / "metrics.jsonl").read_text().count('"start"') == 1
    assert run.state == "failed"


def test_of_a_long_file_the_tail_is_read_if_the_run_has_ended(write, monkeypatch):
    monkeypatch.setattr(recorded, "TAIL", 1000)
    directory = write(*WHOLE, end())
    text = (directory / "metrics.jsonl").read_text().splitlines(keepends=True)
    text[3] = "never looked at\n"
    (directory / "metrics.jsonl").write_text("".join(text))
    assert len(recorded._lines(directory / "metrics.jsonl", True)) < 8
    run = read_run(directory, brief=True)
    assert (run.state, run.step, run.num_params, run.best.loss) == ("finished", 20, 345, 1.25)
    assert len(recorded._lines(write(*WHOLE, name="b") / "metrics.jsonl", True)) > 20  # not ended: the best is anywhere


def test_an_evaluation_that_was_not_finite_is_never_the_best(write):
    losses = float("nan"), 3.0, float("inf")
    run = read_run(write(begin(), *(an_evaluation(step, loss) for step, loss in enumerate(losses, 1))))
    assert (run.best.step, run.last.loss, run.last.perplexity) == (2, None, None)


def test_settings_that_cannot_be_read_are_told(write):
    directory = write(*WHOLE)
    assert "has no config.yaml" in read_run(directory).problem
    (directory / "config.yaml").write_text("training: {lerning_rate: 1}")
    assert "learning_rate" in read_run(directory).problem
    (directory / "config.yaml").write_text("training: {learning_rate: 1}")
    run = read_run(directory)
    assert run.problem is None
    assert run.setting("training", "learning_rate") == 1.0
    assert run.setting("model", "family") is None


def test_runs_are_found_two_floors_down(write, tmp_path):
    for name in ("one", "sweep/two", "x/y/three", ".hidden/four"):
        write(begin(), name=name)
    assert [str(path.relative_to(tmp_path)) for path in find_runs(tmp_path)] == ["one", "sweep/two"]
    assert list(find_runs(tmp_path / "one")) == [tmp_path / "one"]
    for path in (tmp_path / "x", tmp_path / "missing"):
        with pytest.raises(ConfigError, match="must be the directory of a run"):
            read_run(path)


def test_size_counts_a_file_with_two_names_once(tmp_path):
    (tmp_path / "a").write_bytes(b"1" * 1000)
    (tmp_path / "b").mkdir()
    os.link(tmp_path / "a", tmp_path / "b" / "c")
    (tmp_path / "b" / "link").symlink_to(tmp_path / "a")
    assert 1000 <= size_on_disk(tmp_path) < 1000 + 300
