"""Training on conversations: only answers teach, batches of any kind give the same gradient, resume is exact."""

import numpy as np
import pytest

from abi_py.config import LlmTrainingConfig, TrainableModelConfig
from abi_py.data import ChatDataset
from abi_py.model import TrainableModel
from abi_py.training.feed import open_feed
from abi_py.training.trainer import LlamaTrainer

SHAPE = TrainableModelConfig(
    hidden_dim=16, num_layers=2, num_heads=2, num_kv_heads=1, intermediate_dim=32, vocab_size=64, max_seq_len=32
)


def rows(count=23, packing=False):
    rng = np.random.default_rng(5)
    made = []
    for _ in range(count):
        n = int(rng.integers(4, 30))
        trained = np.arange(n) >= n // 2
        made.append((rng.integers(0, 64, n).astype(np.uint32), trained))
    return ChatDataset(made, vocab_size=64, max_seq_len=32, packing=packing)


def config(**changes):
    values = {"epochs": 3, "batch_size": 4, "max_seq_len": 32, "learning_rate": 1e-2, "grad_accum_steps": 1}
    return LlmTrainingConfig(**{**values, "warmup_steps": 1, "decay_steps": 20, "eval_interval": 3, **changes})


def gradient(data, batch_size):
    """Return the loss of all rows together, and the gradient that the trainer makes of them in one window."""
    one_window = {"epochs": 1, "grad_accum_steps": 100, "optimizer": "sgd", "max_grad_norm": 0.0, "weight_decay": 0.0}
    trainer = LlamaTrainer(TrainableModel(SHAPE), config(batch_size=batch_size, **one_window))
    result = trainer.evaluate(data)
    trainer.train_epoch(data)
    assert trainer.state.global_step == 1
    return result, trainer.optimizer.moments["m"].copy()  # after one update, the gradient itself


def test_packed_and_padded_and_single_rows_have_the_same_loss_and_gradient():
    (alone, g1), (padded, g2), (packed, g3) = (
        gradient(rows(packing=packing), size) for packing, size in ((False, 1), (False, 5), (True, 4))
    )
    assert alone.total_tokens == padded.total_tokens == packed.total_tokens == rows().num_targets
    assert padded.loss == pytest.approx(alone.loss, rel=1e-5)
    assert packed.loss == pytest.approx(alone.loss, rel=1e-5)
    scale = np.abs(g1).max()
    assert np.abs(g2 - g1).max() < 1e-4 * scale
    assert np.abs(g3 - g1).max() < 1e-4 * scale


def test_what_is_masked_does_not_teach():
    data = rows()
    _, before = gradient(data, 4)
    # Another id as a *label* only: the last id of a row is no input, and here it is not trained either.
    changed = []
    for i in range(len(data)):
        ids, trained = (part.copy() for part in data.row(i))
        trained[-1] = False
        changed.append((ids, trained))
    one = ChatDataset(changed, vocab_size=64, max_seq_len=32)
    for ids, _ in changed:
        ids[-1] = (ids[-1] + 1) % 64
    two = ChatDataset(changed, vocab_size=64, max_seq_len=32)
    (_, g1), (_, g2) = gradient(one, 4), gradient(two, 4)
    assert np.array_equal(g1, g2)
    assert not np.array_equal(g1, before)


def test_padded_rows_come_in_the_order_of_the_epoch():
    data, training = rows(), config()
    feed, found = open_feed(data, training, SHAPE, training=True), []
    for epoch in (0, 1):
        feed.set_epoch(epoch)
        found.append([batch.input_ids.tolist() for batch in feed])
        plan = data.plan(4, True, training.seed, epoch)
        assert found[epoch] == [data.padded(batch).input_ids.tolist() for batch in plan]
    assert found[0] != found[1]


@pytest.mark.parametrize("packing", [False, True])
def test_resumed_is_never_stopped(packing, tmp_path):
    data, valid = rows(packing=packing).split(0.2)
    whole = LlamaTrainer(TrainableModel(SHAPE), config(checkpoint_path=str(tmp_path / "whole")))
    whole.fit(data, valid)
    part = LlamaTrainer(TrainableModel(SHAPE), config(checkpoint_path=str(tmp_path / "part"), max_steps=4))
    part.fit(data, valid)
    resumed = LlamaTrainer(TrainableModel(SHAPE), config(checkpoint_path=str(tmp_path / "part")))
    resumed.load_checkpoint(tmp_path / "part")
    resumed.fit(data, valid)
    assert resumed.state.global_step == whole.state.global_step
    assert resumed.model.parameters.weights_flat.tobytes() == whole.model.parameters.weights_flat.tobytes()
