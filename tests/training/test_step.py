"""A step: windows, clipping, optimizers, and what happens when a number is not finite."""

import dataclasses
import math

import numpy as np
import pytest

from abi_py.data.batch import IGNORE_LABEL
from abi_py.errors import DataError, NonFiniteError
from abi_py.training.state import TrainingState
from abi_py.training.trainer import LlamaTrainer, train_llm


def test_first_update_changes_weights(make_model, make_config, one_batch):
    trainer = LlamaTrainer(make_model(), make_config(grad_accum_steps=1))
    before = trainer.model.collect_weights()
    metrics = trainer.train_step_with_metrics(*one_batch())
    assert metrics.updated
    assert metrics.learning_rate == 1e-2 / 2
    assert metrics.grad_norm > 0
    assert np.abs(trainer.model.collect_weights() - before).max() > 1e-3


def test_figures_of_a_step_are_those_of_its_window(make_model, make_config, record, one_batch):
    """Loss and accuracy are over the window's labels, GFLOP/s over the rows as they are, shorter than max_seq_len."""
    sink, model, outs = record(), make_model(), []
    original = model.compute_loss
    model.compute_loss = lambda *args, **kwargs: outs.append(original(*args, **kwargs)) or outs[-1]
    trainer = LlamaTrainer(model, make_config(grad_accum_steps=2), [sink])
    for _ in range(4):
        ids, labels = one_batch(length=5)
        labels[0] = model.forward(ids[:1])[0].argmax(-1)  # a row that is known
        trainer.train_step(ids, labels)
    for event, window in zip(sink.of("step"), (outs[:2], outs[2:]), strict=True):
        tokens, correct = (sum(getattr(out, name) for out in window) for name in ("num_tokens", "num_correct"))
        assert (tokens, correct > 0) == (40, True)
        assert event.accuracy == correct / tokens
        assert event.loss == pytest.approx(sum(out.loss_sum for out in window) / tokens)
        assert event.gflops == pytest.approx(event.tokens_per_second * model.flops_per_token(5) / 1e9)


def test_a_flat_batch_is_rows_of_the_training_length(make_model, make_config, one_batch):
    """The ABI's batches are flat; their rows must not see each other, however long the model could read."""
    ids, labels = one_batch()
    rows = LlamaTrainer(make_model(max_seq_len=64), make_config(grad_accum_steps=1))
    flat = LlamaTrainer(make_model(max_seq_len=64), make_config(grad_accum_steps=1))
    assert flat.train_step(ids.ravel(), labels.ravel()) == rows.train_step(ids, labels)
    assert flat.model.collect_weights().tobytes() == rows.model.collect_weights().tobytes()
    with pytest.raises(DataError, match=r"multiple of max_seq_len \(8\)"):
        flat.train_step(ids.ravel()[:-1], labels.ravel()[:-1])


@pytest.mark.parametrize("z_loss", [0.0, 0.5])
def test_accumulation_is_weighted_by_tokens(make_model, make_config, one_batch, z_loss):
    """Ragged micro-batches give the update of the one batch that holds all of their rows."""
    ids, labels = one_batch()
    labels[0, 2:], labels[3, :5] = IGNORE_LABEL, IGNORE_LABEL
    together = LlamaTrainer(make_model(), make_config(grad_accum_steps=1, z_loss=z_loss))
    together.train_step(ids, labels)
    apart = LlamaTrainer(make_model(), make_config(grad_accum_steps=3, z_loss=z_loss))
    for rows in (slice(0, 1), slice(1, 3), slice(3, 4)):
        metrics = apart.train_step_with_metrics(ids[rows], labels[rows])
    assert metrics.updated
    assert apart.state.loss == pytest.approx(together.state.loss, rel=1e-6)
    assert apart.state.grad_norm == pytest.approx(together.state.grad_norm, rel=1e-6)
    assert apart.state.penalties == pytest.approx(together.state.penalties, rel=1e-6)
    assert set(apart.state.penalties) == ({"z_loss"} if z_loss else set())
    moments = apart.optimizer.moments["m"], together.optimizer.moments["m"]
    np.testing.assert_allclose(*moments, atol=1e-6 * np.abs(moments[1]).max())


@pytest.mark.parametrize("checkpointing", ["none", "full"])
def test_a_penalty_weighs_as_the_trained_tokens_of_its_micro_batch(
    make_model, make_config, record, one_batch, checkpointing
):
    """Layers add theirs once in a pass, also where forward is repeated; the loss stays the cross-entropy."""
    sink, model, weights = record(), make_model(checkpointing=checkpointing), []
    values = iter([1.0, 3.0])

    def with_penalty(branch):
        original = branch.backward

        def backward(dx, a, s, run, below):
            weights.append(run.penalties.weight)
            run.penalties.add("router_z", 0.5 * value[0])
            original(dx, a, s, run, below)

        branch.backward = backward

    for branch in model.stack.branches[:2]:
        with_penalty(branch)
    trainer = LlamaTrainer(model, make_config(grad_accum_steps=2), [sink])
    ids, labels = one_batch()
    labels[0, 2:] = IGNORE_LABEL
    alone = [model.compute_loss(ids[rows], labels[rows]) for rows in (slice(0, 1), slice(1, 4))]
    assert alone[0].penalties == {}
    for rows in (slice(0, 1), slice(1, 4)):
        value = [next(values)]
        metrics = trainer.train_step_with_metrics(ids[rows], labels[rows])
        if not metrics.updated:  # an open window is saved
            state = TrainingState.from_dict(trainer.state.to_dict())
            assert state.window_penalties == {"router_z": 2.0}
    assert weights == [2.0, 2.0, 24.0, 24.0]
    assert metrics.penalties == {"router_z": 3.0}
    (event,) = sink.of("step")
    assert event.penalties == {"router_z": pytest.approx((2 * 1.0 + 24 * 3.0) / 26)}
    assert event.loss == pytest.approx(sum(out.loss_sum for out in alone) / 26)
    assert trainer.state.window_penalties == {}
    value = [1.0]
    model.compute_loss(ids, labels, backward=True, loss_scale=4.0)
    assert weights[-1] == pytest.approx(4.0)  # of a mean


def test_window_without_labels_changes_nothing(make_model, make_config, one_batch):
    ids, labels = one_batch()
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
def test_clipping(make_model, make_config, limit, one_batch):
    """With plain sgd the update is lr * min(norm, max_norm) long; 0 is no limit."""
    config = make_config(optimizer="sgd", momentum=0.0, weight_decay=0.0, grad_accum_steps=1, max_grad_norm=limit)
    trainer = LlamaTrainer(make_model(), config)
    before = trainer.model.collect_weights().astype(np.float64)
    metrics = trainer.train_step_with_metrics(*one_batch())
    assert metrics.grad_norm > 0.01
    length = np.linalg.norm(trainer.model.collect_weights() - before)
    assert length == pytest.approx((limit or metrics.grad_norm) * metrics.learning_rate, rel=1e-3)


def test_weight_decay_leaves_norms_alone(make_model, make_config, one_batch):
    ids, labels = one_batch()
    for everything in (False, True):
        config = make_config(weight_decay=0.5, grad_accum_steps=1, decay_norms_and_biases=everything)
        plain = LlamaTrainer(make_model(), config.replace(weight_decay=0.0))
        decayed = LlamaTrainer(make_model(), config)
        for trainer in (plain, decayed):
            trainer.train_step(ids, labels)
        same = np.array_equal(plain.model.weights["final_norm"], decayed.model.weights["final_norm"])
        assert same is not everything
        assert not np.array_equal(plain.model.weights["layers.0.w_q"], decayed.model.weights["layers.0.w_q"])


# -- what is not finite ------------------------------------------------------------------------


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


def test_bad_gradient_names_the_tensor(make_model, make_config, record, one_batch):
    sink, model = record(), make_model()
    trainer = LlamaTrainer(model, make_config(grad_accum_steps=2), [sink])
    ids, labels = one_batch()
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
