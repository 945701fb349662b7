"""TensorBoard and W&B: what they are given, by stand-ins for the packages; TensorBoard's files are read back too."""

import json
import struct
import sys
import types

import pytest

from abi_py.config import LlmTrainingConfig
from abi_py.errors import ConfigError
from abi_py.training import loggers
from abi_py.training.events import RunLabel, SampleEvent, StartEvent
from abi_py.training.trainer import LlamaTrainer


@pytest.fixture
def label(tmp_path):
    """Return the label of a run in a directory that is there."""
    (tmp_path / "my-run").mkdir()
    settings = {"training": {"learning_rate": 0.5, "log_dir": None}, "data": {"path": ("a.txt", "b.txt")}}
    return RunLabel(name="my-run", settings=settings, directory=tmp_path / "my-run")


KEPT = [("sample", 3), ("evaluation", 6), ("sample", 6), ("sample", 9)]


class Writes:
    """Writes a sample at every evaluation, as the samples of a run do."""

    def __init__(self, trainer, text="first\n  <b>second"):
        self.trainer, self.text = trainer, text

    def handle(self, event):
        if event.type == "evaluation":
            self.trainer.events.emit(SampleEvent(step=event.step, time=1.0, prompt="The ", text=self.text))

    def close(self):
        pass


def trained(model, config, data, label=None):
    """Train with an evaluation and a sample at step 6, and return the report."""
    trainer = LlamaTrainer(model, config)
    trainer.label = label
    trainer.add_sink(Writes(trainer))
    return trainer.fit(data, data)


def test_missing_packages_are_named(monkeypatch, tmp_path):
    for package, extra in (("tensorboardX", "tensorboard"), ("wandb", "wandb")):
        monkeypatch.setitem(sys.modules, package, None)
        config = LlmTrainingConfig(log_dir=str(tmp_path), **{f"enable_{extra}": True})
        with pytest.raises(ConfigError, match=rf"pip install 'abi_py\[{extra}\]'"):
            loggers.configured_sinks(config)


def test_hyperparameters_are_numbers_or_texts():
    found = dict(loggers.hyperparameters({"a": {"b": 1, "c": None, "d": True, "e": ("x", "y"), "f": ()}, "g": "h"}))
    assert found == {"a.b": 1, "a.d": True, "a.e": "x, y", "g": "h"}


# -- TensorBoard ---------------------------------------------------------------------------------


def test_tensorboard_gets_the_tags(make_model, make_config, data, tmp_path, monkeypatch):
    """With a stand-in for the package; the next test reads the real one's files where it is installed."""
    written, flushed, texts, raw = [], [], [], []

    class SummaryWriter:
        def __init__(self, logdir, purge_step=None):
            self.logdir, self.file_writer = logdir, types.SimpleNamespace(add_summary=raw.append)

        def add_scalar(self, tag, value, step):
            written.append((tag, step))

        def add_text(self, tag, text, step):
            texts.append((tag, text, step))

        def flush(self):
            flushed.append(True)

        def close(self):
            pass

    def hparams(values, metrics):
        return ("experiment", values), "start", "end"

    monkeypatch.setitem(sys.modules, "tensorboardX", types.SimpleNamespace(SummaryWriter=SummaryWriter))
    monkeypatch.setitem(sys.modules, "tensorboardX.summary", types.SimpleNamespace(hparams=hparams))
    config = make_config(log_dir=str(tmp_path), enable_tensorboard=True, eval_interval=6)
    trained(make_model(), config, data)
    assert [step for tag, step in written if tag == "train/loss"] == [1, 2, 3, 4, 5, 6]
    assert ("val/perplexity", 6) in written
    assert ("train/final_loss", 6) in written
    assert texts[0] == ("samples/The ", "    first\n      <b>second", 6)
    assert texts[1][0] == "report"
    assert "| total_steps | 6 |" in texts[1][1]
    assert raw[0][1]["learning_rate"] == config.learning_rate
    assert raw[1:] == ["start", "end"]
    assert flushed


def summaries(file):
    """Yield (step, value) of an event file: records of length, checksum, content, checksum."""
    from tensorboardX.proto.event_pb2 import Event

    content = file.read_bytes()
    while content:
        (size,) = struct.unpack("<Q", content[:8])
        event = Event.FromString(content[12 : 12 + size])
        content = content[16 + size :]
        for value in event.summary.value:
            yield event.step, value


def test_tensorboard_files_read_back(make_model, make_config, data, tmp_path, label):
    pytest.importorskip("tensorboardX")
    from tensorboardX.proto.plugin_hparams_pb2 import HParamsPluginData

    config = make_config(log_dir=str(tmp_path / "log"), enable_tensorboard=True, eval_interval=6)
    report = trained(make_model(), config, data, label)
    assert report.warnings == ()
    (file,) = (tmp_path / "log").iterdir()  # no second run beside it
    found = list(summaries(file))
    numbers = [(step, value) for step, value in found if value.WhichOneof("value") == "simple_value"]
    scalars = {value.tag: (step, value.simple_value) for step, value in numbers}
    assert scalars["val/best_loss"] == (6, pytest.approx(report.best_val_loss))
    assert scalars["train/grad_norm"][0] == 6
    texts = {value.tag: value.tensor.string_val[0].decode() for _, value in found if value.HasField("tensor")}
    assert texts["samples/The /text_summary"] == "    first\n      <b>second"
    assert "| interrupted | False |" in texts["report/text_summary"]
    plugins = {value.tag: value.metadata.plugin_data.content for _, value in found}
    start = HParamsPluginData.FromString(plugins["_hparams_/session_start_info"]).session_start_info.hparams
    assert start["training.learning_rate"].number_value == 0.5
    assert start["data.path"].string_value == "a.txt, b.txt"
    infos = HParamsPluginData.FromString(plugins["_hparams_/experiment"]).experiment.metric_infos
    assert {info.name.tag for info in infos} <= set(scalars)
    assert "_hparams_/session_end_info" in plugins


# -- W&B -----------------------------------------------------------------------------------------


@pytest.fixture
def wandb(monkeypatch):
    """Put a stand-in in the place of the package, and return what it was told."""
    told = types.SimpleNamespace(made=[], logged=[], finished=[], summary={})

    class Run:
        summary = told.summary

        def log(self, values, step):
            told.logged.append((step, values))

        def finish(self, exit_code):
            told.finished.append(exit_code)

    def init(**settings):
        told.made.append(settings)
        return Run()

    def table(columns, data):
        return columns, data

    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=init, Table=table))
    return told


def test_wandb_gets_the_tags(make_model, make_config, data, tmp_path, wandb):
    config = make_config(log_dir=str(tmp_path / "w"), enable_wandb=True, wandb_project="p", eval_interval=6)
    trained(make_model(), config, data)
    (made,) = wandb.made
    assert (made["project"], made["name"], made["dir"]) == ("p", None, str(tmp_path / "w"))
    assert made["config"] == json.loads(json.dumps(config.to_dict()))
    assert "id" not in made
    assert [step for step, values in wandb.logged if "train/learning_rate" in values] == [1, 2, 3, 4, 5, 6]
    (samples,) = [values["samples"] for _, values in wandb.logged if "samples" in values]
    assert samples == (["step", "prompt", "text"], [[6, "The ", "first\n  <b>second"]])
    assert wandb.summary["train/total_steps"] == 6
    assert wandb.finished == [0]


def test_a_run_that_goes_on_is_the_same_run_there(make_model, make_config, data, tmp_path, wandb, label):
    config = make_config(log_dir=str(tmp_path / "w"), enable_wandb=True)
    for _ in range(2):
        trained(make_model(), config, data, label)
    first, second = wandb.made
    assert (first["name"], first["resume"], first["id"]) == ("my-run", "allow", second["id"])
    assert first["config"]["data"] == {"path": ["a.txt", "b.txt"]}
    assert json.loads((label.directory / "wandb.json").read_text()) == {"id": first["id"]}
    trained(make_model(), config.replace(wandb_run_name="mine"), data, label)
    assert wandb.made[-1]["name"] == "mine"


def test_a_damaged_id_is_told_and_does_not_stop_training(make_model, make_config, data, tmp_path, wandb, label):
    (label.directory / "wandb.json").write_text("{")
    report = trained(make_model(), make_config(log_dir=str(tmp_path / "w"), enable_wandb=True), data, label)
    assert report.total_steps == 6
    assert "delete it, and W&B begins another run" in report.warnings[0]
    assert wandb.made == []


def test_a_run_that_fails_is_failed_there(make_model, make_config, data, tmp_path, wandb):
    def fail(event, control):
        raise RuntimeError

    trainer = LlamaTrainer(make_model(), make_config(log_dir=str(tmp_path / "w"), enable_wandb=True))
    with pytest.raises(RuntimeError):
        trainer.fit(data, callbacks=[fail])
    own = LlamaTrainer(make_model(), make_config(log_dir=str(tmp_path / "w"), enable_wandb=True))
    own.train_epoch(data)  # a loop of one's own has no end but this
    own.finalize_logging()
    assert wandb.finished == [1, 0]


def test_samples_of_before_a_resume_stay_in_the_table(make_model, make_config, data, tmp_path, wandb, label):
    lines = [{"type": kind, "step": step, "prompt": "a", "text": f"{step}"} for kind, step in KEPT]
    (label.directory / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    sink = loggers.WandbSink(make_config(), tmp_path)
    known = {"epoch": 1, "epochs": 1, "total_steps": 9, "num_params": 1, "tokens_per_step": 1, "flops_per_token": 1.0}
    sink.handle(StartEvent(step=6, time=5.0, label=label, **known))
    sink.handle(SampleEvent(step=8, time=9.0, prompt="b", text="c"))
    ((_, values),) = wandb.logged
    assert values["samples"][1] == [[3, "a", "3"], [6, "a", "6"], [8, "b", "c"]]
