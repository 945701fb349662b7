"""The loop of the ABI's README ("Programmatic API"), word for word in Python, and the other spellings of its pages."""

import numpy as np
import pytest

import abi_py as abi

SHAPE = {"hidden_dim": 16, "num_layers": 1, "num_heads": 2, "num_kv_heads": 2, "intermediate_dim": 24}
TOKENS = np.random.default_rng(3).integers(0, 19, 250)  # 249 labels: 31 rows of 8 and one of 1, so 8 batches of 4


@pytest.fixture
def run(tmp_path):
    """Return trainer, the ids of each epoch's batches, and losses, after the README's own loop."""
    model_config = abi.trainable_model.TrainableModelConfig(**SHAPE, vocab_size=19, max_seq_len=8)
    model = abi.TrainableModel(model_config)
    TOKENS.astype("<u4").tofile(tmp_path / "train.bin")
    dataset = abi.TokenizedDataset.load(tmp_path / "train.bin")
    train_config = abi.LlmTrainingConfig(
        epochs=3, batch_size=4, max_seq_len=8, learning_rate=1e-2, grad_accum_steps=2, warmup_steps=2, decay_steps=12,
        checkpoint_interval=5, checkpoint_path=str(tmp_path / "checkpoints"),
    )  # fmt: skip
    trainer = abi.LlamaTrainer(model, train_config)
    epochs, losses = [], []
    for _epoch in range(train_config.epochs):
        iterator, seen = dataset.batches(train_config.batch_size, train_config.max_seq_len, True), []
        while (batch := iterator.next()) is not None:
            metrics = trainer.train_step_with_metrics(batch.input_ids, batch.labels)
            losses.append(metrics.loss)
            seen.append(batch)
        epochs.append(seen)
    return trainer, epochs, losses


def test_every_label_comes_once_an_epoch_in_another_order(run):
    _, epochs, losses = run
    labels = [np.concatenate([batch.labels[batch.labels < 19] for batch in epoch]) for epoch in epochs]
    for each in labels:
        assert sorted(each.tolist()) == sorted(TOKENS[1:].tolist())
    assert len({each.tobytes() for each in labels}) == 3
    assert np.mean(losses[-8:]) < np.mean(losses[:8])


def test_checkpoints_come_at_their_interval(run, tmp_path):
    trainer, _, _ = run
    assert trainer.state.global_step == 12  # 3 epochs of 8 micro-batches, two to an update
    names = sorted(path.name for path in (tmp_path / "checkpoints").glob("llm_step_*"))
    assert names == ["llm_step_10", "llm_step_5"]
    again = abi.LlamaTrainer(abi.TrainableModel(trainer.model.config.replace(seed=9)), trainer.config)
    path = again.load_checkpoint(tmp_path / "checkpoints/llm_step_10.ckpt")  # the Zig trainer's name for it
    assert (path.name, again.state.global_step) == ("llm_step_10", 10)
    assert trainer.get_report().checkpoints_saved == 2


def test_it_is_the_trainers_own_training(run, tmp_path):
    """The same seed and windows: `fit` ends with the same bits."""
    trainer, _, _ = run
    model = abi.TrainableModel(trainer.model.config)
    abi.LlamaTrainer(model, trainer.config.replace(checkpoint_path=None)).fit(abi.TokenizedDataset.from_slice(TOKENS))
    assert model.collect_weights().tobytes() == trainer.model.collect_weights().tobytes()


def test_an_epoch_with_validation_is_evaluated_whatever_the_interval(make_model, make_config, data):
    trainer = abi.LlamaTrainer(make_model(), make_config(eval_interval=500))
    trainer.set_validation_data(data)
    early = abi.EarlyStoppingConfig(patience=1, min_delta=100.0, enabled=True)
    assert not trainer.train_epoch_with_validation(data, early).early_stopped  # the first is the best so far
    assert trainer.state.evaluated_step == trainer.state.global_step == 3
    assert trainer.get_report().best_val_loss == trainer.evaluate(data).loss
    assert trainer.train_epoch_with_validation(data, early).early_stopped
    often = abi.LlamaTrainer(make_model(), make_config(eval_interval=2))
    often.set_validation_data(data)
    often.train_epoch_with_validation(data, early)
    assert often.state.evaluated_step == 2  # as the interval says, and no more


@pytest.mark.parametrize("targets", [("q", "v"), {"q": True, "v": True, "k": False}, {"q_proj": True, "v_proj": True}])
def test_lora_targets_of_the_abi(make_model, targets):
    assert abi.LoraConfig(target_modules=targets).target_modules == ("q_proj", "v_proj")
    assert abi.LoraConfig(target_modules="q").target_modules == ("q_proj",)
    with pytest.raises(abi.errors.ConfigError, match="no such projection"):
        abi.LoraModel(make_model(), abi.LoraConfig(target_modules=("query",)))
