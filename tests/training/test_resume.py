"""Resumed means never stopped: bit for bit, from any point, also after a kill."""

import dataclasses
import functools
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from waiting import PATIENCE, until

from abi_py.config import EarlyStoppingConfig
from abi_py.data.tokens import TokenizedDataset
from abi_py.errors import CheckpointError, ConfigError, DataError, NonFiniteError
from abi_py.formats.zig import save_ablc
from abi_py.kernels.engine.number_formats import BFLOAT16
from abi_py.training.checkpoint import find_latest
from abi_py.training.metrics import JsonlSink
from abi_py.training.stop import GracefulStop
from abi_py.training.trainer import LlamaTrainer


def stop_at(model, number):
    """Return a stop that is requested while micro-batch `number` of the run is computed."""
    stop, original, calls = GracefulStop(), model.compute_loss, iter(range(1, 10**6))

    def compute_loss(*args, **kwargs):
        out = original(*args, **kwargs)
        if kwargs.get("backward") and next(calls) == number:
            stop.request()
        return out

    model.compute_loss = compute_loss
    return stop


def moments(trainer):
    return {name: moment.tobytes() for name, moment in trainer.optimizer.moments.items()}


@pytest.mark.parametrize("optimizer", ["adamw", "sgd", "muon", "adamw_8bit"])
@pytest.mark.parametrize("number", range(1, 17))
def test_stop_at_every_micro_batch_and_resume(make_model, make_config, data, tmp_path, number, optimizer, record):
    """16 micro-batches in two epochs: inside windows, at their ends, at epochs' ends."""
    if optimizer == "adamw_8bit":  # matrices of 4096 numbers are kept in 8 bits
        make_model = functools.partial(make_model, hidden_dim=64)
    config, sinks = make_config(optimizer=optimizer, checkpoint_path=str(tmp_path / "a")), (record(), record())
    whole = LlamaTrainer(make_model(), config.replace(checkpoint_path=None), sinks[:1])
    whole.fit(data)

    model = make_model()
    first = LlamaTrainer(model, config, sinks[1:])
    report = first.fit(data, stop=stop_at(model, number))
    assert report.interrupted
    second = LlamaTrainer(make_model(seed=99), config, sinks[1:])
    second.load_checkpoint(tmp_path / "a")
    assert second.state.batch_position == (number - 1) % 8 + 1
    report = second.fit(data)
    assert not report.interrupted
    assert second.loss_history == whole.loss_history
    epochs = [[(event.epoch, event.train_loss, event.train_tokens) for event in sink.of("epoch")] for sink in sinks]
    assert epochs[0] == epochs[1]
    assert second.model.collect_weights().tobytes() == whole.model.collect_weights().tobytes()
    assert moments(second) == moments(whole)
    assert second.state.tokens_processed == whole.state.tokens_processed
    assert report.total_steps == 6


def test_stop_and_resume_in_fp16(make_model, make_config, data, tmp_path):
    """While the loss scale falls from far above, and while it grows; in windows and between them."""
    config = make_config(epochs=5, mixed_precision="fp16", initial_loss_scale=2.0**20, loss_scale_growth_interval=2)
    whole = LlamaTrainer(make_model(), config)
    report = whole.fit(data)
    assert report.overflows > 2
    assert report.total_steps == 15 - report.overflows
    assert report.skipped_updates == 0
    for number in (1, 2, 3, 5, 8, 10, 22, 30, 38):
        config = config.replace(checkpoint_path=str(tmp_path / str(number)))
        model = make_model()
        assert LlamaTrainer(model, config).fit(data, stop=stop_at(model, number)).interrupted
        second = LlamaTrainer(make_model(seed=99), config)
        second.load_checkpoint(tmp_path / str(number))
        second.fit(data)
        assert second.loss_history == whole.loss_history
        assert second.model.collect_weights().tobytes() == whole.model.collect_weights().tobytes()
        assert moments(second) == moments(whole)
        assert second.scaler.get_stats() == whole.scaler.get_stats()


def test_a_checkpoint_names_how_bfloat16_was_multiplied(make_model, make_config, data, tmp_path, monkeypatch):
    """Another method has other last bits, so a run that is resumed with it says so."""
    config = make_config(epochs=1, mixed_precision="bf16", checkpoint_path=str(tmp_path / "bf16"))
    LlamaTrainer(make_model(), config).fit(data)

    def warnings(config):
        trainer = LlamaTrainer(make_model(), config)
        state = json.loads((trainer.load_checkpoint(config.checkpoint_path) / "state.json").read_text())["state"]
        return state["bf16_method"], trainer.events.warnings

    here = BFLOAT16.method
    assert warnings(config) == (here, [])
    monkeypatch.setitem(vars(BFLOAT16), "method", "other")
    _, (warning,) = warnings(config)
    assert f"multiplied bfloat16 by the method {here}, here it is other: the last bits will differ" in warning
    assert f"ABI_BF16={here} keeps" in warning
    assert warnings(config.replace(mixed_precision="bf16x3")) == (here, [])  # another precision has other bits anyway
    config = make_config(epochs=1, checkpoint_path=str(tmp_path / "fp32"))
    LlamaTrainer(make_model(), config).fit(data)
    assert warnings(config) == ("", [])


def test_resume_keeps_early_stopping_memory(make_model, make_config, data, tmp_path, record):
    other = np.random.default_rng(1).integers(0, 19, 60)
    early = EarlyStoppingConfig(patience=4, min_delta=0.0)
    config = make_config(epochs=100, learning_rate=3e-2, eval_interval=1, lr_schedule="constant")

    def saved(name):
        return {"checkpoint_path": str(tmp_path / name), "checkpoint_interval": 1}

    sink = record()
    whole = LlamaTrainer(make_model(), config.replace(**saved("whole")), [sink])
    steps = whole.fit(data, other, early).total_steps
    config = config.replace(**saved("parts"))
    for limit in (steps - 3, steps - 2, 0):  # inside the patience
        trainer = LlamaTrainer(make_model(seed=5), config.replace(max_steps=limit))
        if limit != steps - 3:
            trainer.load_checkpoint(tmp_path / "parts")
        else:
            trainer = LlamaTrainer(make_model(), config.replace(max_steps=limit))
        report = trainer.fit(data, other, early)
    assert report.early_stopped
    assert report.total_steps == steps
    assert trainer.model.collect_weights().tobytes() == whole.model.collect_weights().tobytes()
    assert trainer.state.best_metric == whole.state.best_metric


def test_resume_goes_on_counting_bad_steps_in_a_row(make_model, make_config, data, tmp_path):
    """Two in a row are too many, though the run was stopped and resumed between them."""
    config = make_config(grad_accum_steps=1, max_bad_steps=2, checkpoint_path=str(tmp_path))

    def broken(model, number):
        """Make the loss of micro-batch `number` infinite."""
        original, calls = model.compute_loss, iter(range(1, 100))

        def compute_loss(*args, **kwargs):
            out = original(*args, **kwargs)
            return dataclasses.replace(out, loss_sum=math.inf) if next(calls) == number else out

        model.compute_loss = compute_loss
        return model

    model = broken(make_model(), 3)
    assert LlamaTrainer(model, config).fit(data, stop=stop_at(model, 3)).skipped_updates == 1
    second = LlamaTrainer(broken(make_model(), 1), config)
    second.load_checkpoint(tmp_path)
    with pytest.raises(NonFiniteError, match="2 updates in a row"):
        second.fit(data)
    third = LlamaTrainer(broken(make_model(), 2), config)
    third.load_checkpoint(tmp_path)
    assert third.fit(data).skipped_updates == 2


def test_stop_during_an_evaluation(make_model, make_config, data, tmp_path, record):
    """The evaluation is put off and done first after the resume."""
    config = make_config(eval_interval=2, checkpoint_path=str(tmp_path), checkpoint_interval=2)
    model, sink = make_model(), record()
    stop, original, calls = GracefulStop(), model.compute_loss, iter(range(1, 1000))

    def compute_loss(*args, **kwargs):
        if not kwargs.get("backward") and next(calls) == 3:
            stop.request()
        return original(*args, **kwargs)

    model.compute_loss = compute_loss
    first = LlamaTrainer(model, config, [sink])
    assert first.fit(data, data, stop=stop).interrupted
    assert sink.of("evaluation") == []
    sink = record()
    second = LlamaTrainer(make_model(), config, [sink])
    second.load_checkpoint(tmp_path)
    assert second.state.evaluation_due
    second.fit(data, data)
    whole = LlamaTrainer(make_model(), config.replace(checkpoint_path=None), [reference := record()])
    whole.fit(data, data)
    figures = [[(e.step, e.val_loss) for e in log.of("evaluation")] for log in (sink, reference)]
    assert figures[0] == figures[1]


def test_metrics_file_of_a_resumed_run(make_model, make_config, data, tmp_path):
    """Records made after the checkpoint disappear, also a half-written last one."""
    config = make_config(checkpoint_path=str(tmp_path / "checkpoints"), checkpoint_interval=2)
    LlamaTrainer(make_model(), config, [JsonlSink(tmp_path / "whole.jsonl")]).fit(data)
    for path in (tmp_path / "checkpoints").iterdir():
        if path.is_dir():
            shutil.rmtree(path)
    file = tmp_path / "metrics.jsonl"
    first = LlamaTrainer(make_model(), config.replace(max_steps=3), [JsonlSink(file)])
    first.fit(data)
    with open(file, "a") as log:
        log.write('{"type": "step", "step": 4, "loss": 9.0, "time": 1e9}\n{"type": "st')
    second = LlamaTrainer(make_model(), config, [JsonlSink(file)])
    second.load_checkpoint(tmp_path / "checkpoints" / "llm_step_2")
    second.fit(data)
    logs = [[json.loads(line) for line in path.read_text().splitlines()] for path in (tmp_path / "whole.jsonl", file)]
    keys = ("type", "step", "epoch", "loss", "accuracy", "perplexity", "learning_rate", "grad_norm", "tokens", "best")
    comparable = [[{key: record[key] for key in keys if key in record} for record in log] for log in logs]
    assert comparable[0] == comparable[1]
    steps = [record for record in logs[1] if record["type"] == "step"]
    assert [record["step"] for record in steps] == [1, 2, 3, 4, 5, 6]
    assert {"accuracy", "perplexity", "learning_rate", "grad_norm", "tokens", "tokens_per_second"} <= set(steps[0])


def test_more_epochs_and_overrides(make_model, make_config, data, tmp_path):
    config = make_config(checkpoint_path=str(tmp_path))
    LlamaTrainer(make_model(), config).fit(data)
    more = LlamaTrainer(make_model(), config.replace(epochs=3, log_interval=5, batch_size=4, max_checkpoints=1))
    more.load_checkpoint(tmp_path)
    report = more.fit(data)
    assert (report.epochs, report.total_steps) == (3, 8)
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["latest", "llm_step_8"]


def test_finished_run_only_reports(make_model, make_config, data, tmp_path):
    config = make_config(checkpoint_path=str(tmp_path))
    first = LlamaTrainer(make_model(), config)
    report = first.fit(data)
    again = LlamaTrainer(make_model(), config)
    again.load_checkpoint(tmp_path)
    second = again.fit(data)
    assert second.final_loss == report.final_loss
    assert second.checkpoints_saved == report.checkpoints_saved == 1


def test_other_data_are_refused(make_model, make_config, data, tmp_path):
    config = make_config(checkpoint_path=str(tmp_path), max_steps=1)
    LlamaTrainer(make_model(), config).fit(data)
    tokens = data.tokens.copy()
    tokens[60] = (tokens[60] + 1) % 19
    other = TokenizedDataset.from_slice(tokens)
    longer = config.replace(max_steps=4)
    trainer = LlamaTrainer(make_model(), longer)
    trainer.load_checkpoint(tmp_path)
    with pytest.raises(DataError, match="new_data=True"):
        trainer.fit(other)
    trainer = LlamaTrainer(make_model(), longer)
    trainer.load_checkpoint(tmp_path, new_data=True)
    assert (trainer.state.global_step, trainer.state.batch_position) == (1, 0)
    assert trainer.fit(other).total_steps == 4
    trainer = LlamaTrainer(make_model(), longer.replace(batch_size=4))
    trainer.load_checkpoint(tmp_path / "llm_step_1")
    with pytest.raises(ConfigError, match=r"batch_size \(4\) must stay 2"):
        trainer.fit(data)


def test_another_model_or_optimizer_is_refused(make_model, make_config, data, tmp_path):
    config = make_config(checkpoint_path=str(tmp_path), max_steps=1)
    LlamaTrainer(make_model(), config).fit(data)
    with pytest.raises(CheckpointError, match="num_layers is 2 there and 1 here"):
        LlamaTrainer(make_model(num_layers=1), config).load_checkpoint(tmp_path)
    with pytest.raises(CheckpointError, match="sgd"):
        LlamaTrainer(make_model(), config.replace(optimizer="sgd")).load_checkpoint(tmp_path)
    with pytest.raises(CheckpointError, match=r"v has \d+ numbers, but muon needs \d+ here; resume with the optimizer"):
        LlamaTrainer(make_model(), config.replace(optimizer="muon")).load_checkpoint(tmp_path)


def test_a_zig_checkpoint_that_counts_beyond_63_bits_is_refused(make_model, make_config, tmp_path):
    """Its format has 64 and no checksum; Adam's kernel and state.json have no room for them."""
    model, path = make_model(), tmp_path / "llm_step_9.ckpt"
    flat = model.parameters.weights_flat
    for name in ("step", "tokens_processed"):
        counts = {"step": 1, "epoch": 0, "tokens_processed": 1, name: 2**63}
        save_ablc(path, flat, flat, flat, **counts)
        with pytest.raises(CheckpointError, match=rf"{name} is 9223372036854775808, but must be below 2\^63"):
            LlamaTrainer(model, make_config()).load_checkpoint(path)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_zig_files(make_model, make_config, data, tmp_path, optimizer):
    config = make_config(max_steps=4, optimizer=optimizer)
    whole = LlamaTrainer(make_model(), config)
    whole.fit(data)
    half = LlamaTrainer(make_model(), config.replace(epochs=1))
    half.fit(data)
    half.save_zig_checkpoint(tmp_path / "llm_step_3.ckpt")
    rest = LlamaTrainer(make_model(seed=8), config)
    rest.load_checkpoint(tmp_path / "llm_step_3.ckpt")
    assert (rest.state.global_step, rest.state.epoch, rest.state.tokens_processed) == (3, 1, 123)
    rest.fit(data)
    assert rest.model.collect_weights().tobytes() == whole.model.collect_weights().tobytes()
    half.model.save_checkpoint(tmp_path / "weights.ckpt", 3)
    weights = LlamaTrainer(make_model(seed=8), config)
    weights.load_checkpoint(tmp_path / "weights.ckpt")
    assert (weights.state.global_step, weights.optimizer.step) == (3, 0)
    assert weights.model.collect_weights().tobytes() == half.model.collect_weights().tobytes()
    with pytest.raises(CheckpointError, match="another model"):
        LlamaTrainer(make_model(num_layers=1), config).load_checkpoint(tmp_path / "weights.ckpt")


RUN = """
import sys, time
import numpy as np
from abi_py.config import LlmTrainingConfig, TrainableModelConfig
from abi_py.model import TrainableModel
from abi_py.training.stop import GracefulStop
from abi_py.training.trainer import LlamaTrainer
root, pause, steps, precision, optimizer = sys.argv[1], float(sys.argv[2]), int(sys.argv[3]), *sys.argv[4:]
width = 64 if optimizer == "adamw_8bit" else 16  # matrices of 4096 numbers are kept in 8 bits
model = TrainableModel(TrainableModelConfig(
    hidden_dim=width, num_layers=2, num_heads=2, num_kv_heads=1, intermediate_dim=24, vocab_size=19, max_seq_len=16))
config = LlmTrainingConfig(
    epochs=1000, batch_size=2, max_seq_len=8, learning_rate=1e-2, warmup_steps=2, decay_steps=50, grad_accum_steps=3,
    checkpoint_interval=1, max_checkpoints=2, checkpoint_path=root, max_steps=steps,
    mixed_precision=precision, optimizer=optimizer)
class Sink:
    def handle(self, event):
        if event.type == "step":
            print(event.step, flush=True)
            time.sleep(pause)
    def close(self):
        pass
trainer = LlamaTrainer(model, config, [Sink()])
try:
    trainer.load_checkpoint(root)
except (FileNotFoundError, ValueError):
    pass
with GracefulStop() as stop:
    report = trainer.fit(np.arange(124) % 19, stop=stop)
sys.exit(stop.exit_code if report.interrupted else 0)
"""


def start(root, pause, steps, precision="fp32", optimizer="adamw"):
    command = [sys.executable, "-c", RUN, str(root), str(pause), str(steps), precision, optimizer]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def wait_for_step(process, step):
    for line in process.stdout:
        if int(line) >= step:
            return
    raise AssertionError(process.stderr.read())


@pytest.mark.skipif(os.name != "posix", reason="signals")
def test_a_hang_up_that_is_ignored_stays_ignored():
    """As under nohup; else it is a request like the others."""
    before = signal.getsignal(signal.SIGHUP)
    try:
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        with GracefulStop() as stop:
            os.kill(os.getpid(), signal.SIGHUP)
        assert (stop.requested, signal.getsignal(signal.SIGHUP)) == (False, signal.SIG_IGN)
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
        with GracefulStop() as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            os.kill(os.getpid(), signal.SIGHUP)  # the shell's, and then the system's: nobody insists
        assert (stop.requested, stop.exit_code) == (True, 129)
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_DFL
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.skipif(os.name != "posix", reason="signals")
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_signals_finish_the_step_save_and_exit(tmp_path, number, code):
    process = start(tmp_path, 0.05, 1000)
    wait_for_step(process, 2)
    process.send_signal(number)
    _, errors = process.communicate(timeout=PATIENCE)
    assert process.returncode == code, errors
    assert find_latest(tmp_path).skipped == ()


@pytest.mark.skipif(os.name != "posix", reason="signals")
def test_a_second_signal_exits_at_once(tmp_path):
    process = start(tmp_path, 1e6, 1000)  # in its first step for days
    wait_for_step(process, 1)

    def ended():  # two signals that come at the same time may be one
        process.send_signal(signal.SIGINT)
        return process.poll() is not None

    assert until(ended, pause=0.5)
    process.communicate()
    assert process.returncode == 130


@pytest.mark.skipif(os.name != "posix", reason="signals")
@pytest.mark.parametrize("kind", [("fp32", "adamw"), ("fp16", "adamw"), ("fp32", "adamw_8bit")], ids="-".join)
def test_kill_at_random_moments(tmp_path, kind):
    """Kill a run that saves at every step (ABI_KILLS times, 3 if not set): it always resumes, to the same bits."""
    kills = int(os.environ.get("ABI_KILLS", "3"))
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    random = np.random.default_rng(5)
    for kill in range(kills):
        process = start(parts, 0, 10**6, *kind)  # never done before it is killed
        wait_for_step(process, 2)  # so the checkpoint of step 1 is there
        time.sleep(float(random.uniform(0, 0.05)))
        process.kill()
        process.communicate(timeout=PATIENCE)
        found = find_latest(parts)
        assert found.skipped == (), kill
    steps = int(found.path.name.removeprefix("llm_step_")) + 10
    for root in (parts, whole):
        process = start(root, 0, steps, *kind)
        _, errors = process.communicate(timeout=PATIENCE)
        assert process.returncode == 0, errors
    for name in ("model.safetensors", "optimizer.safetensors"):
        assert (parts / f"llm_step_{steps}" / name).read_bytes() == (whole / f"llm_step_{steps}" / name).read_bytes()
