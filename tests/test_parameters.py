"""The flat buffers: order, names, views, joined matrices, and the laziness of zeroing."""

import numpy as np
import pytest

import abi_py as abi
from abi_py.config import TrainableModelConfig
from abi_py.errors import ConfigError
from abi_py.families import tensor_table
from abi_py.parameters import Parameters, adjoin, joined

CONFIG = TrainableModelConfig(
    hidden_dim=12, num_layers=2, num_heads=3, num_kv_heads=1, intermediate_dim=7, vocab_size=11, head_dim=6
)


def test_the_table_in_flow_order():
    """Names, shapes (out, in) and weight decay, as the ABI orders them; q is 18 wide, k and v 6."""
    layer = ["w_q", "w_k", "w_v", "w_o", "attn_norm", "w_gate", "w_up", "w_down", "ffn_norm"]
    names = ["token_embedding", *(f"layers.{i}.{name}" for i in range(2) for name in layer), "final_norm"]
    table = tensor_table(CONFIG)
    assert [tensor.name for tensor in table] == names
    assert [t.name for t in tensor_table(CONFIG.replace(tie_embeddings=False))] == [*names, "output_proj"]
    shapes = [(18, 12), (6, 12), (6, 12), (12, 18), (12,), (7, 12), (7, 12), (12, 7), (12,)]
    assert [tensor.shape for tensor in table] == [(11, 12), *shapes, *shapes, (12,)]
    assert all(tensor.decay == (len(tensor.shape) == 2) for tensor in table)
    at = 0
    for tensor in table:
        assert tensor.offset == at
        assert tensor.slice == slice(at, at + tensor.size)
        at += int(np.prod(tensor.shape))
    assert at == CONFIG.num_params()


def test_names_elsewhere():
    names = {t.name: (t.hf_name, t.gguf_name) for t in tensor_table(CONFIG.replace(tie_embeddings=False))}
    assert names["layers.1.w_k"] == ("model.layers.1.self_attn.k_proj.weight", "blk.1.attn_k.weight")
    assert names["layers.0.w_o"] == ("model.layers.0.self_attn.o_proj.weight", "blk.0.attn_output.weight")
    assert names["layers.0.ffn_norm"] == ("model.layers.0.post_attention_layernorm.weight", "blk.0.ffn_norm.weight")
    assert names["output_proj"] == ("lm_head.weight", "output.weight")
    for column in range(2):
        assert len({pair[column] for pair in names.values()}) == len(names)


def test_views_share_the_flat_buffer():
    parameters = Parameters(tensor_table(CONFIG), CONFIG.seed)
    for buffer, views in (
        (parameters.weights_flat, parameters.weights),
        (parameters.gradients_flat, parameters.gradients),
    ):
        for number, name in enumerate(views):
            views[name] = np.full(views[name].shape, number)
        for number, tensor in enumerate(parameters.table):
            assert (buffer[tensor.slice] == number).all()
    assert len(parameters.weights) == len(parameters.table)
    assert parameters.weights["final_norm"].dtype == np.float32


def test_wrong_names_and_shapes_are_refused():
    weights = Parameters(tensor_table(CONFIG), CONFIG.seed).weights
    with pytest.raises(KeyError, match=r"'layers\.2\.w_q' is no tensor of this model"):
        weights["layers.2.w_q"]
    with pytest.raises(ValueError, match=r"layers\.0\.w_q has shape \(18, 12\); the value given has \(12, 18\)"):
        weights["layers.0.w_q"] = np.zeros((12, 18))
    with pytest.raises(ValueError, match=r"the value given has \(\)"):
        weights["final_norm"] = 1.0
    assert "layers.2.w_q" not in weights


def test_neighbours_are_one_matrix():
    parameters = Parameters(tensor_table(CONFIG), CONFIG.seed)
    q, k, v, o, norm = (parameters.weight(f"layers.1.{name}") for name in ("w_q", "w_k", "w_v", "w_o", "attn_norm"))
    assert adjoin(q, k)
    assert adjoin(k, v)
    whole = joined([q.w, k.w, v.w])
    assert np.array_equal(whole, np.concatenate([q.w, k.w, v.w]))
    assert np.shares_memory(whole, parameters.weights_flat)
    assert not adjoin(q, v)  # k is between them
    assert not adjoin(v, o)  # rows of another length
    assert not adjoin(o, norm)
    gate, up = (parameters.weight(f"layers.0.{name}") for name in ("w_gate", "w_up"))
    assert not parameters.gradients_flat.any()
    joined([gate.dw, up.dw])[:] = 3
    assert (parameters.gradients["layers.0.w_gate"] == 3).all()
    assert (parameters.gradients["layers.0.w_up"] == 3).all()
    assert parameters.gradients_flat.sum() == 3 * 2 * 7 * 12


def test_zeroing_is_put_off_but_never_seen():
    parameters = Parameters(tensor_table(CONFIG), CONFIG.seed)
    parameters.gradients_flat[...] = 5
    parameters.zero_gradients()
    gradients, accumulate = parameters.gradients_to_write()
    assert not accumulate  # whoever writes must overwrite, and finds what was there
    assert (gradients["final_norm"] == 5).all()
    assert parameters.gradients_to_write()[1]  # the second backward adds
    for look in (lambda: parameters.gradients["final_norm"], lambda: parameters.gradients_flat):
        parameters.gradients_flat[...] = 5
        parameters.zero_gradients()
        assert not look().any()
        assert parameters.gradients_to_write()[1]  # zeroed for good: adding is right now


def test_a_model_larger_than_the_machine_is_refused_before_anything_is_made():
    config = abi.TrainableModelConfig(
        hidden_dim=2**20, num_layers=100, num_heads=1, num_kv_heads=1, intermediate_dim=2**20, vocab_size=9
    )
    with pytest.raises(ConfigError, match=r"parameters and their gradients need [\d,.]+ GB, and this machine has"):
        abi.TrainableModel(config)


def test_the_size_of_a_tensor_does_not_wrap_around():
    """2^31 x 2^33 elements are 0 in 64 bits."""
    shape = {"hidden_dim": 2**33, "intermediate_dim": 2**33, "vocab_size": 2**31 - 1}
    config = abi.TrainableModelConfig(**shape, num_layers=1, num_heads=1, num_kv_heads=1)
    assert sum(tensor.size for tensor in tensor_table(config)) == config.num_params()


def test_a_long_context_costs_nothing_until_it_is_used():
    shape = {"hidden_dim": 8, "num_layers": 1, "num_heads": 1, "num_kv_heads": 1, "intermediate_dim": 8}
    shape |= {"vocab_size": 9}
    long = abi.TrainableModel(abi.TrainableModelConfig(**shape, max_seq_len=2**31 - 1))
    short = abi.TrainableModel(abi.TrainableModelConfig(**shape, max_seq_len=12))
    ids = np.arange(8)[None]
    assert (long.forward(ids[:, :3]) == short.forward(ids[:, :3])).all()
    assert (long.forward(ids) == short.forward(ids)).all()
