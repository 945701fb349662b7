"""The DeepZig shapes have exactly the weights that their table says, and a model of that shape has them in memory."""

import pytest

from abi_py.config import LoraConfig
from abi_py.errors import ConfigError
from abi_py.model import LoraModel, TrainableModel
from abi_py.model.presets import PRESETS, preset

COUNTS = {
    "test": 682_624,
    "small": 5_458_176,
    "medium": 104_319_744,
    "large": 301_237_248,
    "seed": 43_655_680,
}


def test_exact_counts():
    assert {name: shape.num_params() for name, shape in PRESETS.items()} == COUNTS


def test_untied_seed():
    assert preset("seed", tie_embeddings=False).num_params() == 60_039_680


@pytest.mark.parametrize("name", ["test", "small"])
def test_the_model_has_them(name):
    assert TrainableModel(preset(name)).num_params() == COUNTS[name]


def test_adapters_of_the_seed():
    # 10 240 for each of 8 layers and each unit of rank: counted on one layer, for the model itself is large.
    shape = preset("seed", num_layers=1, vocab_size=16, max_seq_len=8)
    for rank in (8, 16, 32):
        assert 8 * LoraModel(TrainableModel(shape), LoraConfig(rank=rank)).num_params() == 81_920 * rank


# Heads and context leave no trace in the number of weights.
HEADS_AND_CONTEXT = {
    "test": (4, 512),
    "small": (4, 1024),
    "medium": (12, 2048),
    "large": (16, 4096),
    "seed": (8, 4096),
}


def test_constants_of_the_family():
    assert {name: (shape.num_heads, shape.max_seq_len) for name, shape in PRESETS.items()} == HEADS_AND_CONTEXT
    for shape in PRESETS.values():
        assert (shape.rope_theta, shape.norm_eps, shape.tie_embeddings) == (10000.0, 1e-6, True)
        assert shape.num_kv_heads == shape.num_heads
    assert PRESETS["seed"].resolved_head_dim == 64


def test_unknown_name():
    with pytest.raises(ConfigError, match="must be one of test, small, medium, large, seed"):
        preset("huge")
