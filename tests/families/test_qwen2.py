"""What is Qwen2's own: its biases, its counts, and its config.json.  Its figures are those of test_golden.py."""

import json

import pytest
from golden_figures import Figures, stored

from abi_py.config import LlmTrainingConfig, LoraConfig, TrainableModelConfig
from abi_py.errors import CheckpointError
from abi_py.families import read_config, write_config
from abi_py.formats.safetensors import write_safetensors
from abi_py.gradcheck import TOLERANCE, gradient_error
from abi_py.model import LoraModel, reference
from abi_py.training.trainer import LlamaTrainer


@pytest.fixture(params=["qwen2", "qwen2_untied"])
def qwen2(request, tmp_path):
    """Return the figures of a file."""
    return Figures(stored(request.param), tmp_path)


def biases(model):
    """Return the names of the biases."""
    return [tensor.name for tensor in model.parameters.table if tensor.name.rpartition(".")[2].startswith("b_")]


def test_the_gradients_of_the_biases_are_those_of_differences(qwen2, rng):
    model, stored = qwen2.load(), qwen2
    assert len(biases(model)) == 6
    weights = reference.widened(model.weights)
    _, gradients = reference.loss_and_gradients(model.layers, weights, stored["ids"], stored["labels"])
    for name in biases(model):

        def loss(value, name=name):
            changed = {**weights, name: value}
            return reference.loss_and_gradients(model.layers, changed, stored["ids"], stored["labels"])[0]

        assert gradient_error(loss, weights[name], gradients[name], rng, directions=1) < TOLERANCE


def test_biases_do_not_decay(qwen2):
    """Had they decayed, the ten steps of test_golden.py would have seen it."""
    table = qwen2.load().parameters.table
    off = qwen2.steps_off(decay_norms_and_biases=True)
    assert all(off[tensor.name] > 1e-3 for tensor in table if not tensor.decay)


def test_training_adapters_leaves_the_model_as_it_is(qwen2):
    model, stored = qwen2.load(), qwen2
    before = model.collect_weights()
    lora = LoraModel(model, LoraConfig(rank=8, alpha=16, target_modules=("q_proj", "v_proj", "down_proj")))
    config = LlmTrainingConfig(learning_rate=3e-2, lr_schedule="constant", grad_accum_steps=1, weight_decay=0.0)
    trainer = LlamaTrainer(lora, config)
    losses = [trainer.train_step(stored["ids"], stored["labels"]) for _ in range(30)]
    assert losses[-1] < losses[0] / 2
    assert model.collect_weights().tobytes() == before.tobytes()


# -- what it costs -------------------------------------------------------------------------------


def test_parameters_and_operations_counted_from_the_stored_tensors(qwen2):
    model, length = qwen2.load(), 13
    sizes = {name: weight.size for name, weight in qwen2.group("weight").items()}
    assert model.num_params() == model.config.num_params() == sum(sizes.values())
    multiplied = sum(size for name, size in sizes.items() if name.endswith("proj.weight"))
    head = sizes.get("lm_head.weight", sizes["model.embed_tokens.weight"])
    shape = model.config  # in each layer a query sees (T + 1) / 2 keys on average
    pairs = shape.num_layers * shape.num_heads * shape.resolved_head_dim * (length + 1) / 2
    assert model.flops_per_token(length) == 6 * (multiplied + head) + 2 * 6 * pairs


# -- config.json ---------------------------------------------------------------------------------

PUBLISHED = {  # as Qwen2-0.5B has it
    "architectures": ["Qwen2ForCausalLM"], "attention_dropout": 0.0, "bos_token_id": 151643, "eos_token_id": 151643,
    "hidden_act": "silu", "hidden_size": 896, "initializer_range": 0.02, "intermediate_size": 4864,
    "max_position_embeddings": 131072, "max_window_layers": 24, "model_type": "qwen2", "num_attention_heads": 14,
    "num_hidden_layers": 24, "num_key_value_heads": 2, "rms_norm_eps": 1e-06, "rope_theta": 1000000.0,
    "sliding_window": 131072, "tie_word_embeddings": True, "torch_dtype": "bfloat16", "use_cache": True,
    "use_sliding_window": False, "vocab_size": 151936,
}  # fmt: skip


def shape_of(content):
    return TrainableModelConfig.from_dict(read_config(content))


def test_a_published_config():
    shape = shape_of(PUBLISHED)
    assert (shape.family.value, shape.resolved_head_dim, shape.rope_theta, shape.norm_eps) == ("qwen2", 64, 1e6, 1e-6)
    assert shape.num_params() == 494_032_768  # as its page says: 0.49B
    without = {name: value for name, value in PUBLISHED.items() if name != "use_sliding_window"}
    assert shape_of({**without, "sliding_window": 4096}) == shape  # which is off where nothing switches it on


def test_a_written_config_is_read_as_it_was(qwen2):
    shape = qwen2.load().config
    content = write_config(shape)
    assert content["model_type"] == "qwen2"
    assert content["architectures"] == ["Qwen2ForCausalLM"]
    assert shape_of(json.loads(json.dumps(content))) == shape.replace(head_dim=shape.resolved_head_dim)


@pytest.mark.parametrize(
    "change",
    [
        {"layer_types": ["chunked_attention"] * 24},
        {"layer_types": ["sliding_attention"] * 24},  # without a window
        {"layer_types": ["full_attention", "sliding_attention"]},
        {"attention_bias": False},
        {"hidden_act": "gelu"},
        {"rope_scaling": {"type": "longrope", "factor": 4.0}},
    ],
)
def test_what_is_not_computed_is_refused(change):
    (name,) = change
    with pytest.raises(CheckpointError, match=r"config\.json: .*" + name):
        shape_of({**PUBLISHED, **change})


def test_a_folder_without_a_bias_is_refused(qwen2):
    tensors = qwen2.group("weight")
    del tensors["model.layers.1.self_attn.k_proj.bias"]
    qwen2.load()
    write_safetensors(qwen2.folder / "weight" / "model.safetensors", tensors)
    with pytest.raises(CheckpointError, match=r"model\.layers\.1\.self_attn\.k_proj\.bias"):
        qwen2.load()
