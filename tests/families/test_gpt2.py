"""GPT-2: what its config.json may say, how it begins, and that what it does not compute is refused by name."""

import json

import numpy as np
import pytest

from abi_py.config import CheckpointingStrategy, LlmTrainingConfig, LoraConfig, TrainableModelConfig
from abi_py.errors import CheckpointError, ConfigError
from abi_py.families import read_config, write_config
from abi_py.formats.peft import ADAPTER_CONFIG
from abi_py.formats.safetensors import read_safetensors, write_safetensors
from abi_py.gradcheck import check_close
from abi_py.model import LoraModel, TrainableModel, reference
from abi_py.training.checkpoint import find_latest
from abi_py.training.loading import load_model
from abi_py.training.trainer import LlamaTrainer

SIZES = {"hidden_dim": 15, "num_layers": 2, "num_heads": 5, "intermediate_dim": 22, "vocab_size": 31, "max_seq_len": 12}


def shape_of(**changes):
    """Return a shape of odd widths: heads of 3 numbers."""
    return TrainableModelConfig(**{**SIZES, "family": "gpt2", **changes})


def batch(rng):
    """Return ids, labels and the segments of packed rows, in which positions begin again."""
    ids = rng.integers(0, SIZES["vocab_size"], (3, 12)).astype(np.int32)
    segments = np.repeat([[0, 1, 2, 2]], 3, axis=1).reshape(1, 12).repeat(3, axis=0)
    labels = np.roll(ids, -1, 1)
    labels[:, -1] = -100
    return ids, labels, {"segment_ids": segments}


# -- config.json ---------------------------------------------------------------------------------


def test_real_folders_are_read():
    """The file of `openai-community/gpt2`, in short, and transformers' other names."""
    real = {
        "activation_function": "gelu_new", "architectures": ["GPT2LMHeadModel"], "attn_pdrop": 0.1,
        "bos_token_id": 50256, "embd_pdrop": 0.1, "eos_token_id": 50256, "initializer_range": 0.02,
        "layer_norm_epsilon": 1e-05, "model_type": "gpt2", "n_ctx": 1024, "n_embd": 768, "n_head": 12, "n_layer": 12,
        "n_positions": 1024, "resid_pdrop": 0.1, "summary_activation": None, "vocab_size": 50257,
    }  # fmt: skip
    shape = TrainableModelConfig(**read_config(real))
    assert shape == TrainableModelConfig(
        family="gpt2", hidden_dim=768, num_layers=12, num_heads=12, intermediate_dim=3072, vocab_size=50257,
        max_seq_len=1024,
    )  # fmt: skip
    assert shape.num_params() == 124_439_808  # as transformers counts them
    others = {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "max_position_embeddings": 1024}
    assert TrainableModelConfig(**read_config({"model_type": "gpt2", **others})) == shape
    found = read_config({"model_type": "gpt2", "activation_function": "gelu", "n_inner": 100})
    assert (found["activation"], found["intermediate_dim"]) == ("gelu", 100)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"activation_function": "relu"}, "activation_function is 'relu'; this version computes gelu_new, .* or gelu"),
        ({"scale_attn_weights": False}, "scale_attn_weights is False; this version computes only True"),
        ({"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx is True; .* only False"),
        ({"add_cross_attention": True}, "add_cross_attention is True; .* only False"),
    ],
)
def test_what_is_not_computed_is_refused(change, message):
    with pytest.raises(CheckpointError, match=message):
        read_config({**write_config(shape_of()), **change})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_kv_heads": 1}, r"num_kv_heads \(1\) acts only with family other than gpt2"),
        ({"rope_theta": 500.0}, r"rope_theta \(500.0\) acts only with family other than gpt2"),
        ({"head_dim": 4}, r"head_dim \(4\) acts only with family other than gpt2"),
        ({"activation": "relu"}, r"activation \('relu'\) must be one of gelu_tanh, gelu"),
        ({"family": "llama", "head_dim": 4, "activation": "gelu"}, r"activation \(gelu\) acts only with family gpt2"),
    ],
)
def test_fields_without_effect_are_refused(change, message):
    with pytest.raises(ConfigError, match=message):
        shape_of(**change)


def test_a_folder_without_the_prefix_and_with_masks_is_read(tmp_path):
    """As the first GPT-2s were saved: no `transformer.`, and the causal mask of each block among the weights."""
    model = TrainableModel(shape_of())
    model.save_pretrained(tmp_path / "new")
    old = tmp_path / "old"
    old.mkdir()
    (old / "config.json").write_bytes((tmp_path / "new" / "config.json").read_bytes())
    stored = read_safetensors(tmp_path / "new" / "model.safetensors")
    assert stored["transformer.h.0.attn.c_attn.weight"].shape == (15, 45)  # (in, out)
    tensors = {name.removeprefix("transformer."): tensor for name, tensor in stored.items()}
    for i in range(2):
        tensors[f"h.{i}.attn.bias"] = np.tril(np.ones((1, 1, 12, 12), np.float32))
        tensors[f"h.{i}.attn.masked_bias"] = np.array(-1e4, np.float32)
    write_safetensors(old / "model.safetensors", tensors)
    assert load_model(old).model.collect_weights().tobytes() == model.collect_weights().tobytes()


# -- the model -----------------------------------------------------------------------------------


def test_it_begins_as_gpt2_does():
    model = TrainableModel(shape_of(hidden_dim=60, num_layers=8, intermediate_dim=240))
    for name, weight in model.weights.items():
        if weight.ndim == 2:
            small = name.endswith(("w_o", "w_down"))
            assert weight.std() == pytest.approx(0.02 / (4 if small else 1), rel=0.1), name  # sqrt(2 * 8) = 4
        else:
            assert (weight == (1 if name.endswith("norm") else 0)).all(), name


@pytest.mark.parametrize("activation", ["gelu_tanh", "gelu"])
def test_every_gradient_equals_the_reference(rng, activation):
    model = TrainableModel(shape_of(activation=activation, tie_embeddings=activation == "gelu"))
    model.parameters.weights_flat += 0.1 * rng.standard_normal(model.num_params()).astype(np.float32)
    ids, labels, marks = batch(rng)
    found = model.compute_loss(ids, labels, backward=True, **marks).loss
    loss, gradients = reference.loss_and_gradients(model.layers, model.weights, ids, labels, **marks)
    assert found == pytest.approx(loss, rel=1e-5)
    for name, gradient in gradients.items():
        check_close(model.gradients[name], gradient, 1e-4, name=name)
    assert not model.gradients["position_embedding"][6:].any()  # of segments, the longest has six


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_adapters_with_every_checkpointing_have_the_same_bits(rng, dropout, precision):
    ids, labels, marks = batch(rng)
    found = set()
    for strategy in CheckpointingStrategy:
        every = {"checkpoint_interval": 1} if strategy is CheckpointingStrategy.EVERY_N_LAYERS else {}
        model = TrainableModel(shape_of(checkpointing=strategy, **every))
        lora = LoraModel(model, LoraConfig(rank=2, dropout=dropout))
        values = np.random.default_rng(1)
        for weight in lora.weights.values():
            weight += 0.1 * values.standard_normal(weight.shape).astype(np.float32)
        loss = lora.compute_loss(ids, labels, backward=True, precision=precision, **marks).loss
        found.add((loss, lora.parameters.gradients_flat.tobytes()))
    assert len(found) == 1
    assert lora.lora.target_modules == ("c_attn", "c_proj", "c_fc")


def test_an_adapter_is_saved_as_peft_saves_it(tmp_path):
    lora = LoraModel(TrainableModel(shape_of()), LoraConfig(rank=2, target_modules=("mlp.c_proj", "c_attn")))
    LlamaTrainer(lora, LlmTrainingConfig(max_seq_len=12, checkpoint_path=str(tmp_path / "run"))).save_checkpoint()
    lora.save(tmp_path / "saved")
    for folder in (tmp_path / "saved", find_latest(tmp_path / "run").path):
        content = json.loads((folder / ADAPTER_CONFIG).read_text(encoding="utf-8"))
        assert content["fan_in_fan_out"] is True
        assert content["target_modules"] == ["mlp.c_proj", "c_attn"]  # c_proj would be attention's, too
        assert LoraModel.load(lora.model, folder).collect_weights().tobytes() == lora.collect_weights().tobytes()
    tensors = read_safetensors(tmp_path / "saved" / "adapter_model.safetensors")
    assert tensors["base_model.model.transformer.h.1.attn.c_attn.lora_B.weight"].shape == (45, 2)
