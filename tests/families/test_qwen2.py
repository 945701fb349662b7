"""Qwen2 beside the figures of the Transformers library (tests/golden/make_families.py)."""

import json
from types import SimpleNamespace

import numpy as np
import pytest

from abi_py.config import CheckpointingStrategy, LlmTrainingConfig, LoraConfig, TrainableModelConfig
from abi_py.data.tokens import TokenizedDataset
from abi_py.errors import CheckpointError
from abi_py.families import read_config, write_config
from abi_py.formats.safetensors import read_safetensors, write_safetensors
from abi_py.generation import generate
from abi_py.generation.decoder import Decoder
from abi_py.gradcheck import TOLERANCE, check_close, gradient_error
from abi_py.model import LoraModel, TrainableModel, reference
from abi_py.training.checkpoint import find_latest
from abi_py.training.loading import load_model
from abi_py.training.trainer import LlamaTrainer

ADAPTED = ("w_q", "w_k", "w_v", "w_o", "w_gate", "w_up", "w_down")


@pytest.fixture(params=["qwen2", "qwen2_untied"])
def qwen2(request, golden, tmp_path):
    """Return the figures of a file, the folder that it stands for, and `load()`: a model from that folder."""
    stored = golden(request.param)
    folder = tmp_path / "qwen2"
    folder.mkdir()
    (folder / "config.json").write_text(str(stored["config"]), encoding="utf-8")
    write_safetensors(folder / "model.safetensors", group(stored, "weight"))
    return SimpleNamespace(stored=stored, folder=folder, load=lambda: load_model(folder).model)


def group(stored, name):
    """Return the tensors of a part of the file by Hugging Face's names."""
    return {key.partition("/")[2]: value for key, value in stored.items() if key.startswith(f"{name}/")}


def hf_names(model):
    """Return Hugging Face's name of each tensor by ours."""
    return {tensor.name: tensor.hf_name for tensor in model.parameters.table}


def biases(model):
    """Return the names of the biases."""
    return [name for name, hf_name in hf_names(model).items() if hf_name.endswith(".bias")]


# -- the passes ----------------------------------------------------------------------------------


def test_logits_loss_and_every_gradient(qwen2):
    model, stored = qwen2.load(), qwen2.stored
    assert len(biases(model)) == 6
    assert set(hf_names(model).values()) == set(group(stored, "weight"))
    check_close(model.forward(stored["ids"]), stored["logits"], 1e-4)
    model.zero_gradients()
    result = model.compute_loss(stored["ids"], stored["labels"], backward=True)
    assert result.loss == pytest.approx(float(stored["loss"]), rel=1e-5)
    for name, hf_name in hf_names(model).items():
        check_close(model.gradients[name], stored[f"gradient/{hf_name}"], 1e-4, name=hf_name)


def test_the_float64_page_has_the_same_figures(qwen2):
    model, stored = qwen2.load(), qwen2.stored
    weights = reference.widened(model.weights)
    check_close(reference.logits(model.layers, weights, stored["ids"]), stored["logits"], 1e-10)
    loss, gradients = reference.loss_and_gradients(model.layers, weights, stored["ids"], stored["labels"])
    assert loss == pytest.approx(float(stored["loss"]), rel=1e-12)
    for name, hf_name in hf_names(model).items():
        check_close(gradients[name], stored[f"gradient/{hf_name}"], 1e-6, name=hf_name)  # stored in float32


def test_the_gradients_of_the_biases_are_those_of_differences(qwen2, rng):
    model, stored = qwen2.load(), qwen2.stored
    weights = reference.widened(model.weights)
    _, gradients = reference.loss_and_gradients(model.layers, weights, stored["ids"], stored["labels"])
    for name in biases(model):

        def loss(value, name=name):
            changed = {**weights, name: value}
            return reference.loss_and_gradients(model.layers, changed, stored["ids"], stored["labels"])[0]

        assert gradient_error(loss, weights[name], gradients[name], rng, directions=1) < TOLERANCE


@pytest.mark.parametrize("strategy", list(CheckpointingStrategy))
def test_what_is_computed_again_has_its_biases(qwen2, strategy):
    model, stored = qwen2.load(), qwen2.stored
    interval = {"checkpoint_interval": 1} if strategy is CheckpointingStrategy.EVERY_N_LAYERS else {}
    again = TrainableModel(model.config.replace(checkpointing=strategy, **interval), model.collect_weights())
    for precision in ("fp32", "bf16"):
        found = []
        for each in (model, again):
            each.zero_gradients()
            loss = each.compute_loss(stored["ids"], stored["labels"], backward=True, precision=precision).loss
            found.append((loss, each.parameters.gradients_flat.tobytes()))
        assert found[0] == found[1]
        assert found[0][0] == pytest.approx(float(stored["loss"]), rel=1e-5 if precision == "fp32" else 1e-2)


def test_a_packed_row_is_its_samples(qwen2):
    model, ids = qwen2.load(), qwen2.stored["ids"][:1]
    packed = model.forward(ids, segment_ids=np.repeat([0, 1], (5, 8))[None])
    check_close(packed[0], np.concatenate([model.forward(ids[:, :5])[0], model.forward(ids[:, 5:])[0]]), 1e-5)


def test_thread_count_does_not_change_a_bit(qwen2, same_bits):
    def step():
        model = qwen2.load()
        model.train_step(qwen2.stored["ids"], qwen2.stored["labels"])
        return model.parameters.gradients_flat

    same_bits(step)


# -- training ------------------------------------------------------------------------------------


def trained(qwen2, **changes):
    """Train on the stored batches; return the trainer with the losses, norms and rates of its steps."""
    stored, figures = qwen2.stored, []
    config = LlmTrainingConfig(**json.loads(str(stored["options"])), grad_accum_steps=1, **changes)
    trainer = LlamaTrainer(qwen2.load(), config)
    for ids, labels in zip(stored["step_ids"], stored["step_labels"], strict=True):
        metrics = trainer.train_step_with_metrics(ids, labels)
        figures.append((metrics.loss, metrics.grad_norm, metrics.learning_rate))
    return trainer, np.array(figures).T


def off(model, stored, name):
    """Return how far a trained tensor is from the stored one, as a share of its length."""
    expected = stored[f"final/{hf_names(model)[name]}"]
    return np.linalg.norm(model.weights[name] - expected) / np.linalg.norm(expected)


def test_ten_steps_of_adamw(qwen2):
    trainer, (losses, norms, rates) = trained(qwen2)
    np.testing.assert_allclose(losses, qwen2.stored["losses"], rtol=1e-4)
    np.testing.assert_allclose(norms, qwen2.stored["grad_norms"], rtol=1e-3)
    np.testing.assert_allclose(rates, qwen2.stored["learning_rates"], rtol=1e-6)
    for name in hf_names(trainer.model):
        assert off(trainer.model, qwen2.stored, name) < 1e-4, name


def test_biases_do_not_decay(qwen2):
    trainer, _ = trained(qwen2, decay_norms_and_biases=True)
    assert [tensor.name for tensor in trainer.model.parameters.table if not tensor.decay and "b_" in tensor.name]
    for name in biases(trainer.model):  # had they decayed, the test above would have seen it
        assert off(trainer.model, qwen2.stored, name) > 1e-3, name


def test_a_resumed_run_ends_with_the_same_bits(qwen2, tmp_path):
    data = TokenizedDataset.from_slice(np.random.default_rng(3).integers(0, 61, 400))
    config = LlmTrainingConfig(
        epochs=2, batch_size=2, max_seq_len=9, learning_rate=1e-2, warmup_steps=2, decay_steps=30, grad_accum_steps=2,
        checkpoint_path=str(tmp_path / "run"), checkpoint_interval=0, eval_interval=0,
    )  # fmt: skip
    whole = LlamaTrainer(qwen2.load(), config.replace(checkpoint_path=None))
    whole.fit(data)
    LlamaTrainer(qwen2.load(), config.replace(max_steps=9)).fit(data)
    stopped = find_latest(tmp_path / "run").path
    assert set(read_safetensors(stopped / "model.safetensors")) == set(group(qwen2.stored, "weight"))
    resumed = LlamaTrainer(TrainableModel(whole.model.config), config)
    resumed.load_checkpoint(stopped)
    assert load_model(stopped).model.collect_weights().tobytes() == resumed.model.collect_weights().tobytes()
    resumed.fit(data)
    assert resumed.model.collect_weights().tobytes() == whole.model.collect_weights().tobytes()
    assert resumed.loss_history == whole.loss_history


# -- generation ----------------------------------------------------------------------------------


def test_greedy_text_with_and_without_a_cache(qwen2):
    model, stored = qwen2.load(), qwen2.stored
    prompt, expected = stored["prompt"][0], stored["greedy"]
    assert generate(model, prompt, len(expected), temperature=0).tolist() == expected.tolist()
    uncached = model.forward(np.concatenate([prompt, expected[:-1]])[None])[0, len(prompt) - 1 :]
    decoder = Decoder(model)
    cached = [decoder.prefill(0, prompt).copy()]
    cached += [decoder.step(np.zeros(1, np.int32), expected[i : i + 1])[0].copy() for i in range(len(expected) - 1)]
    for found in (uncached, np.array(cached)):
        check_close(found, stored["greedy_logits"], 1e-4)


# -- adapters ------------------------------------------------------------------------------------


def adapted(qwen2, **options):
    """Return adapters on the stored model from which their product was taken: together they are the stored model."""
    model = qwen2.load()
    lora = LoraModel(model, LoraConfig(rank=3, alpha=6, **options))
    rng = np.random.default_rng(4)
    for name in lora.weights:
        lora.weights[name] = 0.2 * rng.standard_normal(lora.weights[name].shape)
    for name in model.weights:
        if name.rpartition(".")[2] in ADAPTED:
            model.weights[name] -= lora.lora.scaling * lora.weights[f"{name}.b"] @ lora.weights[f"{name}.a"]
    return lora


def test_adapters_beside_biases(qwen2):
    """W + s B A is the stored matrix, so logits are the stored ones, dB = s dW Aᵀ and dA = s Bᵀ dW by the stored dW."""
    lora, stored = adapted(qwen2), qwen2.stored
    check_close(lora.forward(stored["ids"]), stored["logits"], 1e-4)
    lora.zero_gradients()
    lora.compute_loss(stored["ids"], stored["labels"], backward=True)
    names, scale = hf_names(lora.model), lora.lora.scaling
    for name, hf_name in names.items():
        if name.rpartition(".")[2] in ADAPTED:
            dw, a, b = stored[f"gradient/{hf_name}"], lora.weights[f"{name}.a"], lora.weights[f"{name}.b"]
            check_close(lora.gradients[f"{name}.b"], scale * dw @ a.T, 1e-4, name=name)
            check_close(lora.gradients[f"{name}.a"], scale * b.T @ dw, 1e-4, name=name)
    assert len(lora.weights) == 2 * len(ADAPTED) * lora.config.num_layers


def test_merging_leaves_biases_and_writes_the_same_text(qwen2, tmp_path):
    lora, stored = adapted(qwen2, dropout=0.1), qwen2.stored
    before = lora.model.collect_weights()
    prompt, expected = stored["prompt"][0], stored["greedy"].tolist()
    assert generate(lora, prompt, len(expected), temperature=0).tolist() == expected
    lora.save(tmp_path / "adapter")
    again = LoraModel.load(TrainableModel(lora.config, before), tmp_path / "adapter")
    assert again.forward(stored["ids"]).tobytes() == lora.forward(stored["ids"]).tobytes()
    merged = lora.merge()
    check_close(merged.forward(stored["ids"]), stored["logits"], 1e-4)
    assert generate(merged, prompt, len(expected), temperature=0).tolist() == expected
    for name, hf_name in hf_names(merged).items():
        same = merged.weights[name].tobytes() == stored[f"weight/{hf_name}"].astype(np.float32).tobytes()
        assert same or name.rpartition(".")[2] in ADAPTED, name
        check_close(merged.weights[name], stored[f"weight/{hf_name}"], 1e-6, name=name)
    lora.unmerge()
    assert lora.model.collect_weights().tobytes() == before.tobytes()


def test_training_adapters_leaves_the_model_as_it_is(qwen2):
    model, stored = qwen2.load(), qwen2.stored
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
    sizes = {name: weight.size for name, weight in group(qwen2.stored, "weight").items()}
    assert model.num_params() == model.config.num_params() == sum(sizes.values())
    multiplied = sum(size for name, size in sizes.items() if name.endswith("proj.weight"))
    head = sizes.get("lm_head.weight", sizes["model.embed_tokens.weight"])
    pairs = 2 * 4 * 8 * (length + 1) / 2  # 2 layers, 4 heads of width 8; a query sees (T + 1) / 2 keys on average
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
        {"use_sliding_window": True, "sliding_window": 4096},
        {"layer_types": ["full_attention", "sliding_attention"]},
        {"attention_bias": False},
        {"hidden_act": "gelu"},
        {"rope_scaling": {"type": "yarn", "factor": 4.0}},
    ],
)
def test_what_is_not_computed_is_refused(change):
    (name,) = set(change) - {"sliding_window"} if len(change) > 1 else change
    with pytest.raises(CheckpointError, match=r"(?s)config\.json: .*(" + name + "|sliding_window)"):
        shape_of({**PUBLISHED, **change})


def test_a_folder_without_a_bias_is_refused(qwen2):
    tensors = group(qwen2.stored, "weight")
    del tensors["model.layers.1.self_attn.k_proj.bias"]
    write_safetensors(qwen2.folder / "model.safetensors", tensors)
    with pytest.raises(CheckpointError, match=r"model\.layers\.1\.self_attn\.k_proj\.bias"):
        qwen2.load()
