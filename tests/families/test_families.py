"""What holds for every family: names, config.json both ways, and what a wrong family is told."""

from dataclasses import replace

import pytest

from abi_py import families
from abi_py.config import TrainableModelConfig
from abi_py.families import FAMILIES, tensor_table, write_config
from abi_py.model.folder import config_from_huggingface
from abi_py.shape import ModelFamily

SHAPE = {"hidden_dim": 12, "num_layers": 2, "num_heads": 3, "num_kv_heads": 1, "intermediate_dim": 7, "vocab_size": 11}


def shape_of(family, **changes):
    """Return a shape of a family, without the fields that do not act in it."""
    return TrainableModelConfig(**{**SHAPE, "head_dim": 6, **changes}).replace(family=family)


@pytest.mark.parametrize("family", ModelFamily)
@pytest.mark.parametrize("tied", [True, False])
def test_config_json_and_names_both_ways(family, tied):
    shape = shape_of(family, tie_embeddings=tied, rope_theta=500.0, norm_eps=1e-3, max_seq_len=77)
    assert config_from_huggingface(write_config(shape)) == shape
    table = tensor_table(shape)
    for names in zip(*((tensor.name, tensor.hf_name, tensor.gguf_name) for tensor in table), strict=True):
        assert len(set(names)) == len(table)
    assert sum(tensor.size for tensor in table) == shape.num_params()


@pytest.mark.parametrize("family", ModelFamily)
def test_a_description_takes_no_memory(family):
    shape = shape_of(family, vocab_size=2**30, num_layers=1).replace(hidden_dim=3 * 2**40)
    assert sum(tensor.size for tensor in tensor_table(shape)) == shape.num_params()  # petabytes


def test_a_family_that_does_not_read_what_it_writes_is_told(monkeypatch):
    """Before anything is saved: no tool could open it again."""
    right = FAMILIES[ModelFamily.LLAMA]
    for change in ({"attention_bias": True}, {"rms_norm_eps": 0.5}):
        wrong = replace(right, write=lambda shape, change=change: right.write(shape) | change)
        monkeypatch.setitem(families.FAMILIES, ModelFamily.LLAMA, wrong)
        with pytest.raises(RuntimeError, match="llama: its `read` does not give back what its `write` wrote"):
            write_config(shape_of("llama"))
