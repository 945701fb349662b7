"""Callbacks and schedules of the user's own: what each does to training, bit for bit, and what a resume makes of it."""

import json

import numpy as np
import pytest

import abi_py as abi
from abi_py.errors import ConfigError
from abi_py.training.metrics import JsonlSink
from abi_py.training.schedule import learning_rate
from abi_py.training.trainer import LlamaTrainer


@pytest.fixture
def train(make_model, make_config, data, tmp_path):
    """Return a function that trains the tiny model with callbacks: the trainer and its report."""

    def run(*callbacks, schedule=None, checkpoint=None, validation=True, **changes):
        if schedule is None:
            config = make_config(**changes)
        else:
            usual = {"lr_schedule": "warmup_cosine", "warmup_steps": 100, "decay_steps": 10000}
            config = make_config(**usual, **changes)
        trainer = LlamaTrainer(make_model(), config, schedule=schedule)
        if checkpoint is not None:
            trainer.load_checkpoint(checkpoint)
        return trainer, trainer.fit(data, data if validation else None, callbacks=callbacks)

    return run


def weights(trainer):
    return trainer.model.parameters.weights_flat


# -- what a callback may do ----------------------------------------------------------------------


def test_a_function_stops_training_and_the_report_says_why(train, tmp_path):
    def enough(event, control):
        if event.step == 3:
            control.stop("three are enough")

    stopped, report = train(enough, checkpoint_path=str(tmp_path / "a"))
    assert (report.total_steps, report.stop_reason, report.interrupted) == (3, "three are enough", False)
    assert report.checkpoint.endswith("llm_step_3")
    planned, _ = train(max_steps=3)
    np.testing.assert_array_equal(weights(stopped), weights(planned))
    again = LlamaTrainer(stopped.model, stopped.config)
    again.load_checkpoint(report.checkpoint)
    assert again.state.global_step == 3


def test_a_rate_acts_from_the_next_step_on(train, make_config):
    class Halve:
        def on_step(self, event, control):
            if event.step == 2:
                control.scale_learning_rate(0.5)
            if event.step == 4:
                control.set_learning_rate(3e-3)
            if event.step == 5:
                control.set_learning_rate(None)

    config, rates = make_config(), []
    trainer, _ = train(Halve(), lambda event, control: rates.append(event.learning_rate))
    plan = [learning_rate(config, step) for step in range(6)]
    assert rates == [plan[0], plan[1], plan[2] * 0.5, plan[3] * 0.5, 3e-3, plan[5]]
    same, _ = train(schedule=lambda step: rates[step])
    np.testing.assert_array_equal(weights(trainer), weights(same))


def test_evaluations_and_checkpoints_on_demand(train, tmp_path):
    seen = []

    class Ask:
        def on_step(self, event, control):
            if event.step == 2:
                control.evaluate()
                control.save()

        def on_evaluation(self, event, control):
            seen.append(("evaluation", event.step))

        def on_checkpoint(self, event, control):
            seen.append(("checkpoint", event.step))

        def on_epoch(self, event, control):
            seen.append(("epoch", event.step))

        def on_start(self, event, control):
            seen.append(("start", event.step))

        def on_end(self, event, control):
            seen.append(("end", event.step))

    asked, _ = train(Ask(), checkpoint_path=str(tmp_path / "a"))
    assert seen[:4] == [("start", 0), ("evaluation", 2), ("checkpoint", 2), ("epoch", 3)]
    assert seen[-1] == ("end", 6)
    plain, _ = train()
    np.testing.assert_array_equal(weights(asked), weights(plain))


def test_what_a_callback_did_is_in_metrics(train, make_model, make_config, data, tmp_path):
    trainer = LlamaTrainer(make_model(), make_config(), sinks=[JsonlSink(tmp_path / "metrics.jsonl")])

    def cut(event, control):
        if event.step == 1:
            control.scale_learning_rate(0.1)
        if event.step == 2:
            control.stop("done")

    report = trainer.fit(data, callbacks=[cut])
    records = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    (rate,) = (record for record in records if record["type"] == "rate")
    assert (rate["step"], rate["factor"], rate["fixed"]) == (1, 0.1, None)
    assert "cut" in rate["by"]
    assert rate["learning_rate"] == pytest.approx(records[-3]["learning_rate"])
    assert records[-1]["stop_reason"] == report.stop_reason == "done"


# -- resume ----------------------------------------------------------------------------------------


class Plateau:
    """Halve the rate at each evaluation that is not better than the one before; remembers the one before."""

    def __init__(self):
        self.last = 0.0

    def on_evaluation(self, event, control):
        if event.val_loss >= self.last:
            control.scale_learning_rate(0.5)
        self.last = event.val_loss

    def state_dict(self):
        return {"last": self.last}

    def load_state_dict(self, state):
        self.last = state["last"]


@pytest.mark.parametrize("step", [1, 2, 3, 4, 5])
def test_a_resumed_run_has_the_same_bits(train, tmp_path, step):
    changes = {"eval_interval": 1, "checkpoint_interval": 1, "max_checkpoints": 0}
    whole, _ = train(Plateau(), checkpoint_path=str(tmp_path / "a"), **changes)
    assert whole.state.rate_factor < 1
    checkpoint = tmp_path / "a" / f"llm_step_{step}"
    resumed, _ = train(Plateau(), checkpoint=checkpoint, checkpoint_path=str(tmp_path / "b"), **changes)
    np.testing.assert_array_equal(weights(resumed), weights(whole))
    assert resumed.state.rate_factor == whole.state.rate_factor
    assert resumed.state.callbacks == whole.state.callbacks


def test_a_resume_without_the_callback_that_acted_is_refused(train, tmp_path):
    _, report = train(Plateau(), eval_interval=1, checkpoint_path=str(tmp_path / "a"))
    with pytest.raises(ConfigError, match=r"trained with the callback Plateau, .*add_callback it before fit"):
        train(checkpoint=report.checkpoint, epochs=3)


# -- what goes wrong -------------------------------------------------------------------------------


def test_an_exception_of_a_callback_ends_fit_and_the_run_can_go_on(train, make_model, make_config, data):
    def fail(event, control):
        if event.step == 2 and not failed:
            failed.append(event.step)
            raise RuntimeError("mine")

    failed = []
    trainer = LlamaTrainer(make_model(), make_config())
    with pytest.raises(RuntimeError, match="mine"):
        trainer.fit(data, callbacks=[fail])
    assert trainer.state.global_step == 2
    trainer.fit(data)
    whole, _ = train(validation=False)
    np.testing.assert_array_equal(weights(trainer), weights(whole))


def test_what_comes_too_late_or_cannot_be_had_is_refused(train):
    class Late:
        def on_end(self, event, control):
            control.stop("too late")

    with pytest.raises(ConfigError, match=r"Late: on_end comes too late to ask for stop; ask in on_start, on_step"):
        train(Late())
    with pytest.raises(ConfigError, match="no validation data; give it to fit"):
        train(lambda event, control: control.evaluate(), validation=False)
    with pytest.raises(ConfigError, match=r"checkpoint_path \(None\) must be a directory"):
        train(lambda event, control: control.save())
    with pytest.raises(ConfigError, match=r"learning rate \(nan\) must be zero or more"):
        train(lambda event, control: control.set_learning_rate(float("nan")))


def test_what_is_no_callback_is_refused(make_model, make_config):
    trainer = LlamaTrainer(make_model(), make_config())

    class Misspelt:
        def on_steps(self, event, control):
            pass

    with pytest.raises(TypeError, match=r"has on_steps, which is no hook; did you mean on_step\?"):
        trainer.add_callback(Misspelt())
    with pytest.raises(TypeError, match="int is no callback"):
        trainer.add_callback(3)
    with pytest.raises(TypeError, match=r"Plateau is a class, not a callback; give an object of it: Plateau\(\)"):
        trainer.add_callback(Plateau)


def test_the_same_callback_of_another_fit_is_called_once(make_model, make_config, data):
    class Count:
        def __init__(self):
            self.steps = []

        def on_step(self, event, control):
            self.steps.append(event.step)

    count, seen = Count(), Count()
    trainer = LlamaTrainer(make_model(), make_config(epochs=1))
    for _ in range(2):
        trainer.config = trainer.config.replace(epochs=trainer.config.epochs + 1)
        trainer.fit(data, callbacks=[count, seen.on_step, Count()])
    assert count.steps == sorted(set(count.steps))
    assert seen.steps == sorted(set(seen.steps))
    assert len(count.steps) > 6


# -- a schedule of one's own -----------------------------------------------------------------------


def test_a_function_is_the_schedule(train, make_config, tmp_path):
    config = make_config()
    own, report = train(schedule=lambda step: learning_rate(config, step), checkpoint_path=str(tmp_path / "a"))
    plain, _ = train()
    np.testing.assert_array_equal(weights(own), weights(plain))
    with pytest.raises(ConfigError, match=r"schedule of its own \(.*lambda.*go on in Python with LlamaTrainer"):
        train(checkpoint=report.checkpoint, epochs=3)


def test_a_resumed_run_takes_its_schedule_again(train, tmp_path):
    def decay(step):
        return 1e-2 * 0.7**step

    whole, _ = train(schedule=decay, checkpoint_path=str(tmp_path / "a"), checkpoint_interval=2, max_checkpoints=0)
    resumed, _ = train(schedule=decay, checkpoint=tmp_path / "a" / "llm_step_2")
    np.testing.assert_array_equal(weights(resumed), weights(whole))
    assert whole.state.own_schedule.endswith("decay")


def test_a_schedule_beside_settings_of_another_is_refused(make_model, make_config, data):
    with pytest.raises(ConfigError, match=r"warmup_steps \(2\) has no effect beside a schedule of your own"):
        LlamaTrainer(make_model(), make_config(), schedule=lambda step: 1e-3)
    config = abi.LlmTrainingConfig(batch_size=2, max_seq_len=8, grad_accum_steps=1)
    trainer = LlamaTrainer(make_model(), config, schedule=lambda step: -1.0)
    with pytest.raises(ConfigError, match=r"schedule\(0\) is -1.0, but must be a learning rate"):
        trainer.fit(data)
