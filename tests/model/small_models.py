"""Small models and batches for the tests of this directory."""

import numpy as np

from abi_py.config import TrainableModelConfig
from abi_py.model import TrainableModel

TINY = {
    "hidden_dim": 48,
    "num_layers": 2,
    "num_heads": 4,
    "num_kv_heads": 2,
    "intermediate_dim": 80,
    "vocab_size": 97,
    "max_seq_len": 32,
}


def make_model(size=1.0, **changes):
    """Return a small model whose matrices are `size` times as large as fresh ones, and whose norms are not 1."""
    model = TrainableModel(TrainableModelConfig(**(TINY | changes)))
    rng = np.random.default_rng(7)
    for name, w in model.weights.items():
        if w.ndim == 1:
            model.weights[name] = 1 + 0.2 * rng.standard_normal(w.shape)
        else:
            w *= np.float32(size)
    return model


def make_batch(rng, model, batch=2, time=13, ignored=0.2):
    """Return ids and labels (B, T) int32; some labels do not count, but the first does."""
    ids, labels = rng.integers(0, model.config.vocab_size, (2, batch, time)).astype(np.int32)
    labels.ravel()[1:][rng.random(batch * time - 1) < ignored] = -100
    return ids, labels
