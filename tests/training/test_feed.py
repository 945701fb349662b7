"""What may be called data: a data set of the user's own is trained on, resumed and named as those of the house are."""

import hashlib

import numpy as np
import pytest

from abi_py.config import LlmTrainingConfig, TrainableModelConfig
from abi_py.data import Batch, ChatDataset, DataLoader, SequencePacker, TokenizedDataset
from abi_py.data.feed import Feed
from abi_py.errors import ConfigError, DataError, NonFiniteError
from abi_py.training.feed import describe, open_feed
from abi_py.training.trainer import LlamaTrainer, train_llm


class Sums:
    """Rows a, b, a + b, a, b ...: made when they are asked for, nowhere stored."""

    def __init__(self, rows=10):
        self.rows = rows

    def identity(self):
        return {"length": self.rows, "sha256": hashlib.sha256(b"sums").hexdigest()}

    def feed(self, batching):
        return SumsFeed(
            self,
            num_batches=self.rows,
            batch_size=batching.batch_size,
            seq_len=batching.seq_len,
            shuffle=batching.shuffle,
            seed=batching.seed,
        )


class SumsFeed(Feed):
    def batch_at(self, position):
        rng = np.random.default_rng((self.epoch if self.shuffle else 0, position))
        a, b = rng.integers(0, 9, (2, self.batch_size, 1))
        ids = np.tile(np.hstack([a, b, a + b]), (1, self.seq_len))[:, : self.seq_len + 1].astype(np.uint32)
        return Batch(ids[:, :-1].copy(), ids[:, 1:].copy())

    def origin(self, position, row, column):
        return f"sum {position}.{row}"


def test_a_data_set_of_the_users_own_is_trained_on_and_resumed(make_model, make_config, tmp_path):
    config = make_config(epochs=3, checkpoint_path=str(tmp_path / "a"))
    whole = LlamaTrainer(make_model(), config.replace(checkpoint_path=None))
    report = whole.fit(Sums(), Sums(3))
    assert report.total_steps == 3 * 4  # 10 batches in windows of 3, 3, 3 and 1
    assert report.best_val_loss < 3.0
    first = LlamaTrainer(make_model(), config.replace(max_steps=5))
    first.fit(Sums(), Sums(3))
    second = LlamaTrainer(make_model(seed=99), config)
    second.load_checkpoint(tmp_path / "a")
    with pytest.raises(DataError, match="not the data of the checkpoint: length 11 instead of 10"):
        second.check_data(Sums(11))
    second.fit(Sums(), Sums(3))
    assert second.loss_history == whole.loss_history
    assert second.model.collect_weights().tobytes() == whole.model.collect_weights().tobytes()


def test_messages_name_the_rows_of_the_users_own_data(make_model, make_config):
    model = make_model()
    model.parameters.weights["token_embedding"][...] = np.nan
    with pytest.raises(NonFiniteError, match=r"\(sum 1\.0, sum 1\.1\)"):
        LlamaTrainer(model, make_config(max_bad_steps=2)).fit(Sums())


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


SHAPE = TrainableModelConfig(
    hidden_dim=16, num_layers=1, num_heads=2, num_kv_heads=1, intermediate_dim=32, vocab_size=400, max_seq_len=64
)
TOKENS = np.arange(1000) % 400
ORDER = {"batch_size": 3, "shuffle": True, "seed": 7}
ROWS = [(np.arange(5 + i, dtype=np.uint32), np.arange(5 + i) % 3 == 2) for i in range(7)]


def packed():
    packer = SequencePacker(16)
    for n in (3, 9, 20, 5):
        packer.add_sequence(np.arange(n) + n)
    return packer.pack(2)


@pytest.mark.parametrize(
    ("data", "length", "sha256", "order", "batches"),
    [
        (TOKENS, 1000, "306fab24", {**ORDER, "drop_last": False, "seq_len": 16}, "a8741b17"),
        (
            DataLoader(TokenizedDataset.from_slice(TOKENS[:999]), 5, 7, seed=3),
            999,
            "30b932f6",
            {"batch_size": 5, "shuffle": True, "seed": 3, "drop_last": True, "seq_len": 7},
            "f41fe1a4",
        ),
        (packed(), 2, "6aa4daa8", {"batch_size": 2, "shuffle": True, "seed": 7, "seq_len": 16}, "c96bdc25"),
        (
            ChatDataset(ROWS, vocab_size=300, max_seq_len=16),
            7,
            "b388921d",
            {**ORDER, "packing": False, "seq_len": 16},
            "37688c20",
        ),
        (
            ChatDataset(ROWS, vocab_size=300, max_seq_len=16, packing=True),
            7,
            "b388921d",
            {**ORDER, "packing": True, "seq_len": 16},
            "1440df23",
        ),
    ],
    ids=["tokens", "loader", "packed", "chat", "packed chat"],
)
def test_checkpoints_of_every_version_mean_the_same_batches(data, length, sha256, order, batches):
    """Identity and order as the first version wrote them, and what it then gave as third epoch."""
    feed = open_feed(data, LlmTrainingConfig(batch_size=3, max_seq_len=16, seed=7), SHAPE, training=True)
    facts = describe(feed)
    assert facts["identity"]["length"] == length
    assert facts["identity"]["sha256"].startswith(sha256)
    assert list(facts["order"].items()) == list(order.items())
    feed.set_epoch(2)
    content = b"".join(batch.input_ids.tobytes() + batch.labels.tobytes() for batch in feed)
    assert hashlib.sha256(content).hexdigest().startswith(batches)
