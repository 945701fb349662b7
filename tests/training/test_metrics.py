"""Sinks: what they write, that they survive each other's failures, and the report."""

import io
import json
import math
import re

import numpy as np
import pytest
from rich.console import Console

from abi_py.errors import ConfigError
from abi_py.training import metrics
from abi_py.training.console import ConsoleSink
from abi_py.training.events import (
    CheckpointEvent,
    EvaluationEvent,
    EventHub,
    LossScaleEvent,
    StartEvent,
    StepEvent,
    WarningEvent,
)
from abi_py.training.metrics import JsonlSink, scalars
from abi_py.training.report import TrainingReport, perplexity, write_report
from abi_py.training.trainer import LlamaTrainer
from abi_py.training.trainer_state import TrainerStateSink


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def a_step(number, **changes):
    values = {"epoch": 1, "loss": 2.0, "accuracy": 0.5, "perplexity": 7.4, "learning_rate": 1e-3, "grad_norm": 0.7}
    values |= {"tokens": 64 * number, "tokens_per_second": 1000.0, "gflops": 20.0, "memory": 5_000_000, "logged": True}
    return StepEvent(step=number, time=0.5 * number, **{**values, **changes})


def test_metrics_stream_has_the_abi_lines(make_model, make_config, data, tmp_path):
    config = make_config(
        log_dir=str(tmp_path / "log"),
        enable_metrics_stream=True,
        eval_interval=3,
        log_interval=2,
        checkpoint_path=str(tmp_path / "c"),
        checkpoint_interval=6,
    )
    model = make_model()
    report = LlamaTrainer(model, config).fit(data, data)
    found = lines(tmp_path / "log" / "metrics.jsonl")
    scalars = [line for line in found if line["type"] == "scalar"]
    assert all(set(line) == {"type", "tag", "value", "step", "ts"} for line in scalars)
    assert [line["step"] for line in scalars if line["tag"] == "train/loss"] == [1, 2, 4, 6]
    assert [line["step"] for line in scalars if line["tag"] == "val/loss"] == [3, 6]
    progress = [line for line in found if line["type"] == "progress"]
    assert set(progress[0]) == {"type", "epoch", "total_epochs", "step", "total_steps", "ts"}
    assert (progress[-1]["step"], progress[-1]["total_steps"], progress[-1]["total_epochs"]) == (6, 6, 2)
    saved = [line for line in found if line["type"] == "checkpoint"]
    assert set(saved[0]) == {"type", "path", "size", "step", "ts"}
    assert saved[-1]["size"] > 4 * 3 * model.num_params()
    final = {line["tag"]: line["value"] for line in scalars if line["step"] == 0}
    assert final["train/final_loss"] == report.final_loss
    assert final["val/best_loss"] == report.best_val_loss
    assert final["train/total_steps"] == 6


def test_one_file_has_one_writer(make_model, make_config, tmp_path):
    config = make_config(log_dir=str(tmp_path), enable_metrics_stream=True)
    with pytest.raises(ConfigError, match="log_dir"):
        LlamaTrainer(make_model(), config, [JsonlSink(tmp_path / "metrics.jsonl")])


def test_jsonl_is_strict_json(tmp_path):
    sink = JsonlSink(tmp_path / "m.jsonl")
    sink.handle(a_step(1, loss=math.nan, perplexity=math.inf))
    sink.handle(a_step(2, logged=False))
    sink.close()
    (record,) = lines(tmp_path / "m.jsonl")
    assert record["loss"] is None
    assert record["perplexity"] is None
    assert (record["type"], record["step"], record["tokens_per_second"]) == ("step", 1, 1000.0)
    assert "logged" not in record


class Broken:
    """Fails as long as `ill`."""

    def __init__(self):
        self.ill, self.seen = True, []

    def handle(self, event):
        if self.ill:
            raise OSError("No space left on device")
        self.seen.append(event)

    def close(self):
        pass


def test_a_failing_sink_is_reported_once_and_tried_again(record):
    hub, broken, sink = EventHub(), Broken(), record()
    hub.add(broken)
    hub.add(sink)
    for number in range(3):
        hub.emit(a_step(number))
    (warning,) = sink.of("warning")
    assert "Broken failed (No space left on device)" in warning.message
    assert hub.warnings == [warning.message]
    assert hub.failures[id(broken)] == 3
    assert len(sink.of("step")) == 3
    broken.ill = False
    hub.emit(a_step(3))
    assert len(broken.seen) == 1


def test_a_sink_is_told_of_warnings_from_before_training(record):
    """What loading a checkpoint warns of is shown at once, not in the report alone."""
    hub, early, late = EventHub(), record(), record()
    hub.emit(WarningEvent(step=3, time=0.0, message="other bits"))
    hub.add(early)
    assert [event.message for event in early.events] == ["other bits"]
    hub.emit(a_step(4))
    hub.add(late)
    assert late.events == []


def test_training_survives_a_broken_sink(make_model, make_config, data):
    report = LlamaTrainer(make_model(), make_config(), [Broken()]).fit(data)
    assert report.total_steps == 6
    assert "Broken" in report.warnings[0]


def test_console_prints_plain_lines_when_not_a_terminal(make_model, make_config, data, tmp_path):
    text = io.StringIO()
    config = make_config(log_interval=3, eval_interval=3, checkpoint_path=str(tmp_path), checkpoint_interval=6)
    LlamaTrainer(make_model(), config, [ConsoleSink(Console(file=text), peak_gflops=100.0)]).fit(data, data)
    printed = text.getvalue().splitlines()
    assert "\x1b" not in text.getvalue()
    number = r"[\d.,e+-]+"
    steps = [line for line in printed if line.startswith("step") and "tok/s" in line]
    form = rf"step \d/6  epoch \d  loss {number}  lr {number}  grad {number}  {number} tok/s  {number} GFLOP/s "
    form += rf"\(\d+% of peak\)  {number} MB  ETA \d:\d\d"
    assert len(steps) == 3
    assert all(re.fullmatch(form, line) for line in steps), steps
    assert any("validation loss" in line for line in printed)
    assert any("saved" in line and "llm_step_6" in line for line in printed)
    assert sum(line.startswith("epoch") for line in printed) == 2


def test_console_on_a_terminal_has_one_live_line():
    text = io.StringIO()
    sink = ConsoleSink(Console(file=text, force_terminal=True, width=150))
    start = {"epoch": 1, "epochs": 1, "total_steps": 10, "num_params": 1, "tokens_per_step": 8, "flops_per_token": 1.0}
    sink.handle(StartEvent(step=0, time=0.0, **start))
    sink.handle(a_step(3))
    sink.handle(WarningEvent(step=3, time=1.0, message="look here"))
    sink.close()
    sink.close()
    assert "loss 2.0000" in text.getvalue()
    assert "3/10" in text.getvalue()
    assert "look here" in text.getvalue()


def test_loss_scale_is_shown_with_fp16_only():
    text = io.StringIO()
    sink = ConsoleSink(Console(file=text))
    sink.handle(a_step(1))
    sink.handle(a_step(2, loss_scale=2.0**31))
    change = {"loss_scale": 512.0, "previous": 1024.0, "overflow": True, "message": "the gradient is not finite in w_q"}
    sink.handle(LossScaleEvent(step=2, time=1.0, **change))
    sink.handle(LossScaleEvent(step=2, time=1.0, **{**change, "overflow": False, "message": "2000 good updates"}))
    plain, scaled, overflow, growth = text.getvalue().splitlines()
    assert "scale" not in plain
    assert scaled.endswith("scale 2147483648")
    assert overflow == "step 2: update dropped, loss scale 1024 -> 512: the gradient is not finite in w_q"
    assert growth == "step 2: loss scale 1024 -> 512: 2000 good updates"
    assert "train/loss_scale" not in dict(scalars(a_step(1)))
    assert dict(scalars(a_step(2, loss_scale=1024.0)))["train/loss_scale"] == 1024.0


def test_penalties_have_columns_of_their_own():
    text = io.StringIO()
    event = a_step(2, penalties={"z_loss": 0.0125, "router_z": math.inf})
    sink = ConsoleSink(Console(file=text))
    sink.handle(a_step(1))
    sink.handle(event)
    plain, penalized = text.getvalue().splitlines()
    assert penalized.startswith(plain.replace("step 1", "step 2").rpartition("ETA")[0])
    assert penalized.endswith("z_loss 0.0125  router_z inf")
    record = event.record()
    assert (record["z_loss"], record["router_z"], record["loss"]) == (0.0125, None, 2.0)
    assert set(a_step(1).record()) == set(record) - {"z_loss", "router_z"}
    assert dict(scalars(event))["train/z_loss"] == 0.0125


def test_report_file(make_model, make_config, data, tmp_path):
    report = LlamaTrainer(make_model(), make_config()).fit(data)
    write_report(report, tmp_path / "report.json")
    stored = json.loads((tmp_path / "report.json").read_text())
    abi = ["final_loss", "final_accuracy", "best_val_loss", "best_val_accuracy", "final_perplexity", "total_steps"]
    abi += ["total_tokens", "total_time_ns", "avg_throughput", "checkpoints_saved", "early_stopped"]
    assert list(stored)[: len(abi)] == abi
    assert stored["best_val_loss"] is None
    assert stored["final_loss"] == report.final_loss
    assert isinstance(report, TrainingReport)


def test_perplexity():
    assert perplexity(0.0) == 1.0
    assert perplexity(800.0) == math.inf
    assert math.isnan(perplexity(math.nan))


def test_memory_in_use():
    assert metrics.memory_in_use() > 1_000_000


def test_finalize_logging_closes_the_sinks_of_a_loop_of_ones_own(make_model, make_config, data, tmp_path):
    config = make_config(log_dir=str(tmp_path), enable_metrics_stream=True, log_interval=1, grad_accum_steps=1)
    trainer = LlamaTrainer(make_model(), config)
    (sink,) = trainer.events.sinks
    ids = np.arange(8)[None] % 18
    trainer.train_step(ids, ids)
    assert sink._lines._file is not None
    trainer.finalize_logging()
    assert sink._lines._file is None
    trainer.train_step(ids, ids)  # opens it again
    trainer.finalize_logging()
    assert [line["step"] for line in lines(sink.path) if line["type"] == "progress"] == [1, 2]


def test_a_run_that_goes_on_from_before_its_best_knows_the_best_until_there(tmp_path):
    sizes = {"steps_per_epoch": 10, "rows": 10, "valid_rows": 2, "input_tokens": 100, "batch_size": 1}
    sizes |= {"logging_steps": 1, "eval_steps": 2, "save_steps": 4}

    def begun(step):
        sink = TrainerStateSink(tmp_path / "trainer_state.json", **sizes)
        counts = {"epoch": 1, "epochs": 2, "total_steps": 20, "num_params": 1, "tokens_per_step": 10}
        sink.handle(StartEvent(step=step, time=float(step), flops_per_token=1.0, **counts))
        return sink

    sink = begun(0)
    for step, loss in ((2, 1.5), (4, 2.0), (6, float("nan")), (8, 1.0)):
        figures = {"val_loss": loss, "val_perplexity": 1.0, "val_accuracy": 0.5, "val_tokens": 9, "improved": True}
        sink.handle(EvaluationEvent(step=step, time=float(step), epoch=1, **figures))
    sink.handle(CheckpointEvent(step=8, time=8.0, path="llm_step_8", size=1, best=True))
    assert (begun(8).best, begun(8).best_path) == ((1.0, 8), "llm_step_8")
    assert (begun(6).best, begun(6).best_path) == ((1.5, 2), None)
