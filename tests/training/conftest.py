"""A tiny model, its data and its configuration, for all tests of the trainer."""

import numpy as np
import pytest

from abi_py.config import LlmTrainingConfig, TrainableModelConfig
from abi_py.data.tokens import TokenizedDataset
from abi_py.model import TrainableModel

SHAPE = {"hidden_dim": 16, "num_layers": 2, "num_heads": 2, "num_kv_heads": 1, "intermediate_dim": 24, "vocab_size": 19}


@pytest.fixture
def make_model():
    """Return a function that makes the tiny model: the same weights for the same seed."""

    def make(**changes):
        return TrainableModel(TrainableModelConfig(**{**SHAPE, "max_seq_len": 16, "seed": 3, **changes}))

    return make


@pytest.fixture
def make_config():
    """Return a function that makes a training configuration for it."""

    def make(**changes):
        values = {
            "epochs": 2,
            "batch_size": 2,
            "max_seq_len": 8,
            "learning_rate": 1e-2,
            "warmup_steps": 2,
            "decay_steps": 20,
            "grad_accum_steps": 3,
            "eval_interval": 0,
            "log_interval": 1,
            "checkpoint_interval": 0,
        }
        return LlmTrainingConfig(**values).replace(**changes)

    return make


@pytest.fixture
def data():
    """Return 124 tokens: 16 rows of 8, the last one short; 8 batches of 2, so windows of 3, 3 and 2 micro-batches."""
    tokens = np.random.default_rng(7).integers(0, 19, 124)
    return TokenizedDataset.from_slice(np.where(np.arange(124) % 2, tokens, np.arange(124) % 19))


@pytest.fixture
def one_batch(rng):
    """Return a function that makes ids and labels (rows, length)."""

    def make(rows=4, length=8):
        ids = rng.integers(0, 19, (rows, length + 1)).astype(np.uint32)
        return ids[:, :-1].copy(), ids[:, 1:].copy()

    return make


@pytest.fixture
def record():
    """Return a sink that keeps events, with `of(type)` to pick some."""

    class Record:
        def __init__(self):
            self.events = []

        def handle(self, event):
            self.events.append(event)

        def close(self):
            pass

        def of(self, *types):
            return [event for event in self.events if event.type in types]

    return Record
