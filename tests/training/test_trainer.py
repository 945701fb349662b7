"""The trainer: windows, intervals, the NaN guard, evaluation, early stopping."""

import dataclasses
import math

import numpy as np
import pytest

from abi_py.config import EarlyStoppingConfig
from abi_py.data.batch import IGNORE_LABEL
from abi_py.data.packing import SequencePacker
from abi_py.data.tokens import DataLoader, TokenizedDataset
from abi_py.errors import CheckpointError, ConfigError, DataError, NonFiniteError
from abi_py.training.stop import GracefulStop
from abi_py.training.trainer import LlamaTrainer, train_llm, train_llm_with_validation


def one_batch(rng, rows=4, length=8):
    ids = rng.integers(0, 19, (rows, length + 1)).astype(np.uint32)
    return ids[:, :-1].copy(), ids[:, 1:].copy()


def test_training_lowers_the_loss_and_reports(make_model, make_config, data):
    model = make_model()
    report = train_llm(model, make_config(epochs=12, decay_steps=36), data)
    assert report.final_loss < 2.6 < math.log(19)
    assert report.total_steps == 12 * 3
    assert report.total_tokens == 12 * 123
    assert report.epochs == 12
    assert report.best_val_loss == math.inf
    assert report.final_perplexity == math.exp(report.final_loss)
    assert report.checkpoints_saved == 0
    assert not report.early_stopped
    assert not report.interrupted


def test_first_update_changes_weights(make_model, make_config, rng):
    trainer = LlamaTrainer(make_model(), make_config(grad_accum_steps=1))
    before = trainer.model.collect_weights()
    metrics = trainer.train_step_with_metrics(*one_batch(rng))
    assert metrics.updated
    assert metrics.learning_rate == 1e-2 / 2
    assert metrics.grad_norm > 0
    assert np.abs(trainer.model.collect_weights() - before).max() > 1e-3


def test_figures_of_a_step_are_those_of_its_window(make_model, make_config, rng, record):
    """Loss and accuracy are over the window's labels, GFLOP/s over the rows as they are, shorter than max_seq_len."""
    sink, model, outs = record(), make_model(), []
    original = model.compute_loss
    model.compute_loss = lambda *args, **kwargs: outs.append(original(*args, **kwargs)) or outs[-1]
    trainer = LlamaTrainer(model, make_config(grad_accum_steps=2), [sink])
    for _ in range(4):
        ids, labels = one_batch(rng, length=5)
        labels[0] = model.forward(ids[:1])[0].argmax(-1)  # a row that is known
        trainer.train_step(ids, labels)
    for event, window in zip(sink.of("step"), (outs[:2], outs[2:]), strict=True):
        tokens, correct = (sum(getattr(out, name) for out in window) for name in ("num_tokens", "num_correct"))
        assert (tokens, correct > 0) == (40, True)
        assert event.accuracy == correct / tokens
        assert event.loss == pytest.approx(sum(out.loss_sum for out in window) / tokens)
        assert event.gflops == pytest.approx(event.tokens_per_second * model.flops_per_token(5) / 1e9)


def test_a_flat_batch_is_rows_of_the_training_length(make_model, make_config, rng):
    """The ABI's batches are flat; their rows must not see each other, however long the model could read."""
    ids, labels = one_batch(rng)
    rows = LlamaTrainer(make_model(max_seq_len=64), make_config(grad_accum_steps=1))
    flat = LlamaTrainer(make_model(max_seq_len=64), make_config(grad_accum_steps=1))
    assert flat.train_step(ids.ravel(), labels.ravel()) == rows.train_step(ids, labels)
    assert flat.model.collect_weights().tobytes() == rows.model.collect_weights().tobytes()
    with pytest.raises(DataError, match=r"multiple of max_seq_len \(8\)"):
        flat.train_step(ids.ravel()[:-1], labels.ravel()[:-1])


def test_accumulation_is_weighted_by_tokens(make_model, make_config, rng):
    """Ragged micro-batches give the update of the one batch that holds all of their rows."""
    ids, labels = one_batch(rng)
    labels[0, 2:], labels[3, :5] = IGNORE_LABEL, IGNORE_LABEL
    together = LlamaTrainer(make_model(), make_config(grad_accum_steps=1))
    together.train_step(ids, labels)
    apart = LlamaTrainer(make_model(), make_config(grad_accum_steps=3))
    for rows in (slice(0, 1), slice(1, 3), slice(3, 4)):
        metrics = apart.train_step_with_metrics(ids[rows], labels[rows])
    assert metrics.updated
    assert apart.state.loss == pytest.approx(together.state.loss, rel=1e-6)
    assert apart.state.grad_norm == pytest.approx(together.state.grad_norm, rel=1e-6)
    moments = apart.optimizer.moments["m"], together.optimizer.moments["m"]
    np.testing.assert_allclose(*moments, atol=1e-6 * np.abs(moments[1]).max())


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


def test_window_without_labels_changes_nothing(make_model, make_config, rng):
    ids, labels = one_batch(rng)
    trainer = LlamaTrainer(make_model(), make_config(grad_accum_steps=1))
    before = trainer.model.collect_weights()
    metrics = trainer.train_step_with_metrics(ids, np.full_like(labels, IGNORE_LABEL))
    assert (metrics.updated, metrics.skipped, metrics.loss) == (False, False, 0.0)
    np.testing.assert_array_equal(trainer.model.collect_weights(), before)


@pytest.mark.parametrize("optimizer", ["sgd", "adam", "adamw"])
def test_optimizers(make_model, make_config, data, optimizer):
    config = make_config(optimizer=optimizer, epochs=6, nesterov=optimizer == "sgd", learning_rate=2e-2)
    assert train_llm(make_model(), config, data).final_loss < math.log(19)


def test_plain_sgd_keeps_no_moments(make_model, make_config, data):
    trainer = LlamaTrainer(make_model(), make_config(optimizer="sgd", momentum=0.0, weight_decay=0.0, max_grad_norm=0))
    trainer.fit(data)
    assert trainer.optimizer.moments == {}
    assert trainer.state.global_step == 6


@pytest.mark.parametrize("limit", [0.01, 0.0])
def test_clipping(make_model, make_config, rng, limit):
    """With plain sgd the update is lr * min(norm, max_norm) long; 0 is no limit."""
    config = make_config(optimizer="sgd", momentum=0.0, weight_decay=0.0, grad_accum_steps=1, max_grad_norm=limit)
    trainer = LlamaTrainer(make_model(), config)
    before = trainer.model.collect_weights().astype(np.float64)
    metrics = trainer.train_step_with_metrics(*one_batch(rng))
    assert metrics.grad_norm > 0.01
    length = np.linalg.norm(trainer.model.collect_weights() - before)
    assert length == pytest.approx((limit or metrics.grad_norm) * metrics.learning_rate, rel=1e-3)


def test_weight_decay_leaves_norms_alone(make_model, make_config, rng):
    ids, labels = one_batch(rng)
    for everything in (False, True):
        config = make_config(weight_decay=0.5, grad_accum_steps=1, decay_norms_and_biases=everything)
        plain = LlamaTrainer(make_model(), config.replace(weight_decay=0.0))
        decayed = LlamaTrainer(make_model(), config)
        for trainer in (plain, decayed):
            trainer.train_step(ids, labels)
        same = np.array_equal(plain.model.weights["final_norm"], decayed.model.weights["final_norm"])
        assert same is not everything
        assert not np.array_equal(plain.model.weights["layers.0.w_q"], decayed.model.weights["layers.0.w_q"])


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


def test_evaluation_covers_every_token_and_changes_nothing(make_model, make_config, data, rng):
    model = make_model()
    trainer = LlamaTrainer(model, make_config(label_smoothing=0.2))
    trainer.train_step(*one_batch(rng))  # an open window must survive the evaluation
    before, gradients = model.collect_weights(), model.parameters.gradients_flat.copy()
    result = trainer.evaluate(data)
    assert result.total_tokens == 123
    assert result.num_batches == 8
    whole = trainer.evaluate(DataLoader(data, batch_size=16, seq_len=8))
    assert result.loss == pytest.approx(whole.loss, rel=1e-6)
    assert result.perplexity == math.exp(result.loss)
    rows = [model.compute_loss(b.input_ids, b.labels) for b in data.batches(1, 8, False, 0, False)]
    assert result.loss == pytest.approx(sum(row.loss_sum for row in rows) / 123, rel=1e-6)
    np.testing.assert_array_equal(model.collect_weights(), before)
    np.testing.assert_array_equal(model.parameters.gradients_flat, gradients)


def test_evaluations_in_training_have_the_precision_of_the_run(make_model, make_config, data):
    trainer = LlamaTrainer(make_model(), make_config(mixed_precision="bf16", eval_interval=1, max_steps=1))
    found = trainer.fit(data, data).best_val_loss
    assert found == trainer.evaluate(data).loss
    assert found != LlamaTrainer(trainer.model, make_config()).evaluate(data).loss


def test_data_of_all_kinds(make_model, make_config):
    tokens = [i % 19 for i in range(60)]
    losses = []
    for form in (tokens, np.array(tokens), TokenizedDataset.from_slice(tokens)):
        losses.append(LlamaTrainer(make_model(), make_config()).train_epoch(form))
    assert losses[0] == losses[1] == losses[2]
    loader = DataLoader(TokenizedDataset.from_slice(tokens), batch_size=3, seq_len=4, drop_last=False)
    trainer = LlamaTrainer(make_model(), make_config())
    trainer.train_epoch(loader)
    assert trainer.state.tokens_processed == 59
    packer = SequencePacker(8)
    for start in range(0, 60, 5):
        packer.add_sequence(tokens[start : start + 5])
    report = train_llm(make_model(), make_config(epochs=4), packer.pack(2))
    assert report.total_tokens == 4 * 12 * 4


def test_ids_outside_the_vocabulary_are_refused(make_model, make_config):
    with pytest.raises(DataError, match="19"):
        train_llm(make_model(), make_config(), [19] * 40)


def test_rows_longer_than_the_model_reads_are_refused(make_model, make_config, data):
    with pytest.raises(ConfigError, match=r"max_seq_len \(32\).*\(16\)"):
        train_llm(make_model(), make_config(max_seq_len=32), data)


# -- NaN guard ---------------------------------------------------------------------------------


def poison(model, when):
    """Make the losses of row 1 NaN at the calls whose numbers `when` holds."""
    original, calls = model.compute_loss, iter(range(10**6))

    def compute_loss(*args, **kwargs):
        out = original(*args, **kwargs)
        if next(calls) in when:
            losses = out.token_losses.copy()
            losses[1] = np.nan
            model.parameters.gradients_flat[0] = np.nan
            return dataclasses.replace(out, loss=np.nan, loss_sum=np.nan, token_losses=losses)
        return out

    model.compute_loss = compute_loss


def test_bad_loss_skips_the_update_and_names_the_row(make_model, make_config, data, record):
    sink, model = record(), make_model()
    poison(model, {1})
    trainer = LlamaTrainer(model, make_config(epochs=1), [sink])
    trainer.train_epoch(data)
    assert trainer.state.global_step == 2  # micro-batches 0 and 1 are lost; 2-4 and 5-7 are windows
    assert trainer.optimizer.step == 2
    (bad,) = sink.of("bad_step")
    assert "row 1 of the batch" in bad.message
    assert "batch 1" in bad.message
    assert np.isfinite(model.collect_weights()).all()
    assert trainer.get_report().skipped_updates == 1
    assert trainer.state.bad_steps_in_row == 0


def test_bad_gradient_names_the_tensor(make_model, make_config, rng, record):
    sink, model = record(), make_model()
    trainer = LlamaTrainer(model, make_config(grad_accum_steps=2), [sink])
    ids, labels = one_batch(rng)
    before = model.collect_weights()
    trainer.train_step(ids, labels)
    model.gradients["layers.1.w_up"][0, 0] = np.inf
    metrics = trainer.train_step_with_metrics(ids, labels)
    assert (metrics.updated, metrics.skipped) == (False, True)
    assert "layers.1.w_up" in sink.of("bad_step")[0].message
    np.testing.assert_array_equal(model.collect_weights(), before)
    assert trainer.state.global_step == trainer.optimizer.step == 0
    assert trainer.train_step_with_metrics(ids, labels).skipped is False


def test_too_many_bad_steps_stop_the_run_and_name_the_last_checkpoint(make_model, make_config, data, tmp_path):
    model = make_model()
    poison(model, range(4, 100))
    config = make_config(grad_accum_steps=1, checkpoint_interval=2, checkpoint_path=str(tmp_path), max_bad_steps=3)
    trainer = LlamaTrainer(model, config)
    with pytest.raises(NonFiniteError, match=r"3 updates in a row.*llm_step_4"):
        trainer.fit(data)
    again = LlamaTrainer(make_model(), config)
    assert again.load_checkpoint(tmp_path).name == "llm_step_4"


def test_without_the_guard_the_update_is_applied_but_never_saved(make_model, make_config, data, tmp_path):
    model = make_model()
    poison(model, {5})
    config = make_config(grad_accum_steps=1, checkpoint_interval=2, checkpoint_path=str(tmp_path), nan_guard=False)
    with pytest.raises(NonFiniteError, match="nothing was saved"):
        LlamaTrainer(model, config).fit(data)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "llm_step_2", "llm_step_4"]


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


# -- stopping, statistics ----------------------------------------------------------------------


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


def test_stats(make_model, make_config, data):
    trainer = LlamaTrainer(make_model(), make_config())
    line = "epoch=0 step=0 loss=0.0000 acc=0.00% ppl=0.00 lr=0.00e+00 grad_norm=0.00 toks/s=0"
    assert str(trainer.get_stats()) == line
    trainer.fit(data)
    stats = trainer.get_stats()
    assert (stats.epoch, stats.global_step, stats.tokens_processed) == (2, 6, 246)
    assert stats.loss == trainer.loss_history[-1]
    assert len(trainer.loss_history) == 6
    assert stats.throughput > 0
    assert stats.time_ns > 0


def test_saving_needs_a_path(make_model, make_config):
    with pytest.raises(ConfigError, match="checkpoint_path"):
        LlamaTrainer(make_model(), make_config()).save_checkpoint()


def test_too_many_threads(make_model, make_config):
    with pytest.raises(ConfigError, match=r"num_threads \(4000\)"):
        LlamaTrainer(make_model(), make_config(num_threads=4000))


def test_full_disk_does_not_end_the_run(make_model, make_config, data, record, tmp_path, monkeypatch):
    """An interval's save may fail: the run warns and goes on; the final save must not fail in silence."""
    import shutil

    usage = shutil.disk_usage(tmp_path)
    full = iter([True, False, False, True])
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=10 if next(full) else usage.free))
    sink = record()
    config = make_config(checkpoint_interval=2, checkpoint_path=str(tmp_path), max_steps=6)
    report = LlamaTrainer(make_model(), config, [sink]).fit(data)
    assert [event.step for event in sink.of("checkpoint")] == [4, 6]
    assert report.checkpoints_saved == 2
    assert "step 2" in report.warnings[0]
    assert "MB are free" in report.warnings[0]
    with pytest.raises(CheckpointError, match="are free"):
        LlamaTrainer(make_model(), make_config(checkpoint_path=str(tmp_path / "new"), max_steps=1)).fit(data)
