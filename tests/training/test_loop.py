"""The loop: intervals, the end of an epoch and of a run, evaluation, early stopping, a request to stop."""

import math

import numpy as np
import pytest

from abi_py.config import EarlyStoppingConfig
from abi_py.errors import ConfigError
from abi_py.training.stop import GracefulStop
from abi_py.training.trainer import LlamaTrainer, train_llm_with_validation


def test_last_partial_window_is_applied(make_model, make_config, data, record):
    sink = record()
    trainer = LlamaTrainer(make_model(), make_config(epochs=1), [sink])
    loss = trainer.train_epoch(data)
    assert trainer.state.global_step == 3
    assert trainer.state.micro_step == 0
    steps = sink.of("step")
    assert [event.step for event in steps] == [1, 2, 3]
    weights = np.diff([0, *(event.tokens for event in steps)])
    assert weights.sum() == 123
    assert loss == pytest.approx(np.average([event.loss for event in steps], weights=weights), rel=1e-6)


def test_intervals_fire_once_each(make_model, make_config, data, record, tmp_path):
    sink = record()
    config = make_config(
        epochs=4,
        checkpoint_interval=3,
        eval_interval=2,
        log_interval=4,
        checkpoint_path=str(tmp_path),
        max_checkpoints=0,
    )
    LlamaTrainer(make_model(), config, [sink]).fit(data, validation=data)
    assert [event.step for event in sink.of("evaluation")] == [2, 4, 6, 8, 10, 12]
    improved = {event.step for event in sink.of("evaluation") if event.improved}
    assert [event.step for event in sink.of("checkpoint")] == sorted(improved | {3, 6, 9, 12})
    assert [event.step for event in sink.of("step") if event.logged] == [1, 4, 8, 12]
    assert [event.epoch for event in sink.of("epoch")] == [1, 2, 3, 4]
    assert len(sink.of("start")) == len(sink.of("end")) == 1


def test_max_steps_and_total_steps(make_model, make_config, data, record):
    sink = record()
    report = LlamaTrainer(make_model(), make_config(max_steps=4), [sink]).fit(data)
    assert report.total_steps == sink.of("start")[0].total_steps == 4
    sink = record()
    LlamaTrainer(make_model(), make_config(epochs=3), [sink]).fit(data)
    assert sink.of("start")[0].total_steps == sink.of("step")[-1].step == 9


def test_evaluations_in_training_have_the_precision_of_the_run(make_model, make_config, data):
    trainer = LlamaTrainer(make_model(), make_config(mixed_precision="bf16", eval_interval=1, max_steps=1))
    found = trainer.fit(data, data).best_val_loss
    assert found == trainer.evaluate(data).loss
    assert found != LlamaTrainer(trainer.model, make_config()).evaluate(data).loss


def test_stop_request_without_a_checkpoint_path(make_model, make_config, data):
    stop = GracefulStop()
    stop.request()
    trainer = LlamaTrainer(make_model(), make_config())
    report = trainer.fit(data, stop=stop)
    assert report.interrupted
    assert report.total_steps == 0
    assert math.isfinite(trainer.train_epoch(data))  # the request was for that call alone
    assert trainer.state.epoch == 1
    assert not trainer.get_report().interrupted


# -- early stopping ----------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["memory", "disk"])
def test_early_stopping_restores_the_best(make_model, make_config, data, record, tmp_path, where):
    """Trained on one text and judged on another, the tiny model soon gets worse; the best step must come back."""
    other = np.random.default_rng(1).integers(0, 19, 60)
    sink, model = record(), make_model()
    config = make_config(epochs=200, learning_rate=3e-2, eval_interval=1, grad_accum_steps=2, lr_schedule="constant")
    if where == "disk":
        config = config.replace(checkpoint_path=str(tmp_path), max_checkpoints=1)
    trainer = LlamaTrainer(model, config, [sink])
    report = trainer.fit(data, other, EarlyStoppingConfig(patience=3, min_delta=0.0))
    evaluations = sink.of("evaluation")
    best = min(evaluations, key=lambda event: event.val_loss)
    assert report.early_stopped
    assert trainer.was_early_stopped()
    assert best.step == evaluations[-1].step - 3
    assert [event.patience_left for event in evaluations[-3:]] == [2, 1, 0]
    assert report.best_val_loss == best.val_loss
    assert trainer.evaluate(other).loss == best.val_loss
    assert trainer.optimizer.step == best.step
    if where == "disk":
        names = {path.name for path in tmp_path.iterdir()}
        assert names == {"latest", f"llm_step_{best.step}", f"llm_step_{report.total_steps}"}
        resumed = LlamaTrainer(make_model(), config)
        resumed.load_checkpoint(tmp_path)
        np.testing.assert_array_equal(resumed.model.collect_weights(), model.collect_weights())
        assert resumed.was_early_stopped()


@pytest.mark.parametrize("early", [None, EarlyStoppingConfig(patience=4, min_delta=1e6)])
def test_a_run_that_was_stopped_early_goes_on_if_asked(make_model, make_config, data, tmp_path, early):
    config = make_config(epochs=4, eval_interval=1, checkpoint_path=str(tmp_path))
    first = LlamaTrainer(make_model(), config)
    assert first.fit(data, data, EarlyStoppingConfig(patience=2, min_delta=1e6)).total_steps == 3
    again = LlamaTrainer(make_model(), config)
    again.load_checkpoint(tmp_path)
    assert again.fit(data, data, EarlyStoppingConfig(patience=2, min_delta=1e6)).total_steps == 3  # nothing changed
    report = again.fit(data, data, early)
    assert report.early_stopped is (early is not None)
    assert report.total_steps == (5 if early else 12)


def test_early_stopping_on_perplexity_and_min_delta(make_model, make_config, data):
    config = make_config(epochs=3, eval_interval=1)
    early = EarlyStoppingConfig(patience=2, min_delta=1e6, monitor_loss=False)
    trainer = LlamaTrainer(make_model(), config)
    trainer.set_validation_data(data)
    result = trainer.train_epoch_with_validation(data, early)
    assert result.early_stopped
    assert trainer.state.global_step == 3  # first evaluation improves on nothing, two more do not improve enough


def test_early_stopping_needs_validation(make_model, make_config, data):
    with pytest.raises(ConfigError, match="validation data"):
        train_llm_with_validation(make_model(), make_config(eval_interval=1), data, None)
    with pytest.raises(ConfigError, match="eval_interval"):
        train_llm_with_validation(make_model(), make_config(), data, data)
    off = EarlyStoppingConfig(enabled=False)
    report = train_llm_with_validation(make_model(), make_config(), data, data, off)
    assert math.isfinite(report.best_val_loss)  # the evaluation at the end
