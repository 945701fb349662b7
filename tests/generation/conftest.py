"""A model with Hugging Face's weights, and its golden file."""

import json

import pytest

from abi_py.config import TrainableModelConfig
from abi_py.model import TrainableModel


@pytest.fixture
def generation(golden):
    """Return tests/golden/generation.npz."""
    return golden("generation")


@pytest.fixture
def hf_model(generation):
    """Return a model of the shape and weights that `transformers` generated with."""
    shape = json.loads(str(generation["meta"]))["shape"]
    config = TrainableModelConfig(
        hidden_dim=shape["hidden_size"],
        num_layers=shape["num_hidden_layers"],
        num_heads=shape["num_attention_heads"],
        num_kv_heads=shape["num_key_value_heads"],
        intermediate_dim=shape["intermediate_size"],
        vocab_size=shape["vocab_size"],
        max_seq_len=shape["max_position_embeddings"],
        rope_theta=shape["rope_theta"],
        norm_eps=shape["rms_norm_eps"],
        tie_embeddings=False,
    )
    model = TrainableModel(config)
    for tensor in model.parameters.table:
        model.weights[tensor.name] = generation[f"weights.{tensor.hf_name}"]
    return model
