"""A mixture of experts in a model: routing, penalties, checkpointing, loads, adapters, folders, what is refused."""

import json

import numpy as np
import pytest

from abi_py.config import CheckpointingStrategy, LlmTrainingConfig, LoraConfig, TrainableModelConfig
from abi_py.errors import CheckpointError, ConfigError
from abi_py.families import read_config, tensor_table, write_config
from abi_py.formats.safetensors import write_safetensors
from abi_py.generation import generate
from abi_py.gradcheck import check_close, check_gradient, relative_error
from abi_py.model import LoraModel, TrainableModel, reference
from abi_py.model.layers.experts import Experts
from abi_py.training.loading import load_model
from abi_py.training.trainer import LlamaTrainer

SHAPE = {
    "hidden_dim": 24, "num_layers": 2, "num_heads": 2, "num_kv_heads": 1, "intermediate_dim": 20, "vocab_size": 31,
    "max_seq_len": 16, "num_experts": 5, "experts_per_token": 2,
}  # fmt: skip
FAMILIES = ("mixtral", "qwen3_moe")


def make(family="mixtral", **changes):
    """Return a model of which every router clearly prefers some experts."""
    model = TrainableModel(TrainableModelConfig(**SHAPE | {"family": family} | changes))
    for name, weights in model.weights.items():
        weights *= 20 if name.endswith("w_router") else 3 if weights.ndim > 1 else 1
    return model


def batch(rng, rows=3, length=16):
    return rng.integers(0, 31, (rows, length)), rng.integers(0, 31, (rows, length))


def prefer(model, chosen):
    """Make the routers send every token to the same experts, the first of them with the largest gate."""
    model.weights["token_embedding"][:, 2] = 2.0
    for layer in model.layers:
        if isinstance(layer, Experts):
            router = model.weights[layer.at + "w_router"]
            router[...] = 0
            router[list(chosen), 2] = [1.0 - 0.2 * place for place in range(len(chosen))]


# -- gradients -----------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"router_z_loss_coef": 0.1, "router_aux_loss_coef": 0.3}])
@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_through_the_router(rng, family, options):
    """The float32 model equals the float64 page, and that central differences of the loss with its penalties."""
    model, (ids, labels) = make(family, **options), batch(rng)
    labels[0, :5] = -100
    mask = np.ones_like(ids)
    mask[1, 10:] = 0
    out = model.compute_loss(ids, labels, attention_mask=mask, backward=True)
    weights = reference.widened(model.weights)
    loss, gradients = reference.loss_and_gradients(model.layers, weights, ids, labels, attention_mask=mask)
    assert out.loss + sum(out.penalties.values()) == pytest.approx(loss, rel=1e-5)
    for name, gradient in gradients.items():
        assert relative_error(model.gradients[name], gradient) < 1e-4, name
    for name in ("layers.0.w_router", "layers.1.experts_gate", "layers.1.experts_down", "layers.0.ffn_norm"):

        def value(changed, name=name):
            changed = {**weights, name: changed}
            return reference.loss(model.layers, changed, ids, labels, attention_mask=mask)

        check_gradient(value, weights[name], gradients[name], rng, 1e-6, name)


@pytest.mark.parametrize("family", FAMILIES)
def test_all_tokens_to_the_same_experts(rng, family):
    model, (ids, labels) = make(family), batch(rng)
    prefer(model, (3, 1))
    model.parameters.gradients_flat.fill(np.nan)  # what was there must be gone
    model.zero_gradients()
    out = model.compute_loss(ids, labels, backward=True)
    loads = model.stack.loads()
    assert loads.shape == (2, 5)
    assert loads[0].tolist() == [0, ids.size, 0, ids.size, 0]
    _, gradients = reference.loss_and_gradients(model.layers, model.weights, ids, labels)
    for name, gradient in gradients.items():
        assert relative_error(model.gradients[name], gradient) < 1e-4, name
        if "layers.0.experts_" in name:
            assert not model.gradients[name][[0, 2, 4]].any()  # exactly zero
            assert model.gradients[name][1].any()
    assert out.penalties["load_balancing"] > 0.001 * 2.5  # of equal loads: the coefficient times K


def test_one_expert_of_one(rng):
    """A mixture of one expert is a dense model: the gate is 1."""
    model = make(num_experts=1, experts_per_token=1, router_aux_loss_coef=0.0)
    dense = TrainableModel(model.config.replace(family="llama", num_experts=None, experts_per_token=None))
    for name, weights in dense.weights.items():
        stem, _, last = name.rpartition(".")
        theirs = f"{stem}.experts_{last[2:]}" if last in ("w_gate", "w_up", "w_down") else name
        weights[...] = model.weights[theirs].reshape(weights.shape)
    ids, labels = batch(rng)
    found = [each.compute_loss(ids, labels, backward=True).loss for each in (model, dense)]
    assert found[0] == pytest.approx(found[1], rel=1e-6)
    assert relative_error(model.gradients["layers.0.experts_up"][0], dense.gradients["layers.0.w_up"]) < 1e-5
    assert not model.gradients["layers.0.w_router"].any()


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_computed_again_routes_the_same_and_counts_once(rng, family, precision):
    base, (ids, labels) = make(family, num_layers=3, router_z_loss_coef=0.01), batch(rng)
    found = set()
    for strategy in CheckpointingStrategy:
        every = {"checkpoint_interval": 2} if strategy is CheckpointingStrategy.EVERY_N_LAYERS else {}
        model = TrainableModel(base.config.replace(checkpointing=strategy, **every), base.collect_weights())
        out = model.compute_loss(ids, labels, backward=True, precision=precision)
        gradients = model.parameters.gradients_flat.tobytes()
        found.add((out.loss, *out.penalties.values(), model.stack.loads().tobytes(), gradients))
    assert len(found) == 1
    assert model.stack.loads().sum() == 3 * 2 * ids.size


@pytest.mark.parametrize(("experts", "loads"), [(128, 8), (256, 8)])
def test_many_experts_learn(rng, experts, loads):
    model = TrainableModel(
        TrainableModelConfig(
            **SHAPE
            | {"family": "qwen3_moe", "num_experts": experts, "experts_per_token": loads, "expert_dim": 6}
            | {"norm_topk_prob": True}
        )
    )
    trainer = LlamaTrainer(model, LlmTrainingConfig(learning_rate=3e-3, warmup_steps=0, grad_accum_steps=1))
    ids = rng.integers(0, 31, (4, 17))
    losses = [trainer.train_step_with_metrics(ids[:, :-1], ids[:, 1:]).loss for _ in range(20)]
    assert losses[-1] < losses[0] - 0.5
    assert model.stack.loads().sum() == 2 * loads * 64


# -- penalties -----------------------------------------------------------------------------------


def test_padding_does_not_count_and_ignored_labels_do(rng):
    model, (ids, labels) = make(router_z_loss_coef=0.1), batch(rng)
    mask = np.ones_like(ids)
    mask[:, 12:] = 0
    masked = model.compute_loss(ids, labels, attention_mask=mask, backward=True)
    short = model.compute_loss(ids[:, :12], labels[:, :12], backward=True)
    assert masked.penalties == pytest.approx(short.penalties, rel=1e-5)
    labels[:, 3:9] = -100
    assert model.compute_loss(ids, labels, attention_mask=mask, backward=True).penalties == masked.penalties


def test_a_penalty_weighs_as_the_tokens_of_its_micro_batch(rng):
    model, (ids, labels) = make(router_aux_loss_coef=0.5), batch(rng)
    plain = TrainableModel(model.config.replace(router_aux_loss_coef=0.0), model.collect_weights())
    found = {}
    for reduction in ("mean", "sum"):
        for each in (model, plain):
            each.zero_gradients()
            each.compute_loss(ids, labels, backward=True, reduction=reduction, loss_scale=2.0)
        name = "layers.0.w_router"
        found[reduction] = model.gradients[name] - plain.gradients[name]
    check_close(found["sum"], ids.size * found["mean"], 1e-3)


def test_an_evaluation_has_no_penalty_and_a_backward_of_logits_none(rng):
    model, (ids, labels) = make(router_aux_loss_coef=0.5), batch(rng)
    assert model.compute_loss(ids, labels).penalties == {}
    logits = model.forward(ids)
    model.zero_gradients()
    model.backward(np.ones_like(logits))
    plain = TrainableModel(model.config.replace(router_aux_loss_coef=0.0), model.collect_weights())
    plain.forward(ids)
    plain.backward(np.ones_like(logits))
    assert model.parameters.gradients_flat.tobytes() == plain.parameters.gradients_flat.tobytes()


# -- shapes, names, files --------------------------------------------------------------------------


def test_sparse_and_dense_blocks(rng):
    shape = {"num_layers": 4, "decoder_sparse_step": 2, "mlp_only_layers": (3,), "expert_dim": 7}
    model, (ids, labels) = make("qwen3_moe", norm_topk_prob=True, **shape), batch(rng)
    assert [isinstance(layer, Experts) for layer in model.layers[2:-1:2]] == [False, True, False, False]
    assert model.weights["layers.1.experts_down"].shape == (5, 24, 7)
    assert model.weights["layers.0.w_down"].shape == (24, 20)
    for strategy in CheckpointingStrategy:
        again = TrainableModel(model.config.replace(checkpointing=strategy), model.collect_weights())
        again.compute_loss(ids, labels, backward=True)
        _, gradients = reference.loss_and_gradients(again.layers, again.weights, ids, labels)
        assert max(relative_error(again.gradients[name], gradient) for name, gradient in gradients.items()) < 1e-4


@pytest.mark.parametrize("family", FAMILIES)
def test_fused_tensors_are_read_and_a_tensor_for_each_expert_is_written(family, tmp_path):
    model = make(family)
    content = {"num_local_experts": 5} | write_config(model.config)
    tensors = {}
    for entry in model.parameters.table:
        form, weights = entry.hf_names[-1], model.weights[entry.name]
        k, n = form.part
        if n == 1:
            tensors[form.name] = weights
        else:
            size = weights.shape[1]
            whole = tensors.setdefault(form.name, np.empty((len(weights), n * size, weights.shape[2])))
            whole[:, k * size : (k + 1) * size] = weights
    (tmp_path / "config.json").write_text(json.dumps(content), encoding="utf-8")
    write_safetensors(tmp_path / "model.safetensors", {name: w.astype(np.float32) for name, w in tensors.items()})
    assert "model.layers.0.mlp.experts.gate_up_proj" in tensors
    assert load_model(tmp_path).model.collect_weights().tobytes() == model.collect_weights().tobytes()
    assert all("{e}" in entry.hf_name for entry in tensor_table(model.config) if "experts_" in entry.name)


def test_a_config_json_says_the_number_of_experts_once(rng):
    content = write_config(make("qwen3_moe").config)
    assert content["num_experts"] == content["num_local_experts"] == 5
    assert read_config({**content, "num_experts": None})["num_experts"] == 5
    with pytest.raises(CheckpointError, match=r"num_local_experts \(5\) and num_experts \(6\) must be equal"):
        read_config({**content, "num_experts": 6})
    with pytest.raises(CheckpointError, match=r"router_jitter_noise is 0\.1"):
        read_config({**write_config(make().config), "router_jitter_noise": 0.1})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"experts_per_token": 6}, r"experts_per_token \(6\) must be at most num_experts \(5\); choose at most all"),
        ({"num_experts": 0}, r"num_experts \(0\) must be at least 1"),
        ({"family": "llama"}, r"num_experts \(5\) acts only with family mixtral or qwen3_moe"),
        ({"expert_dim": 9}, r"expert_dim \(9\) acts only with family qwen3_moe"),
        ({"router_aux_loss_coef": -1.0}, r"router_aux_loss_coef \(-1.0\) must be zero or more"),
        ({"family": "qwen3_moe", "mlp_only_layers": (2,)}, r"mlp_only_layers \(2\) must name layers from 0 to 1"),
        ({"family": "qwen3_moe", "decoder_sparse_step": 3}, r"no layer has experts: decoder_sparse_step is 3"),
    ],
)
def test_what_cannot_be_is_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        TrainableModelConfig(**SHAPE | {"family": "mixtral"} | changes)


def test_active_parameters(rng):
    config = make().config
    experts = 2 * 5 * 3 * 24 * 20
    assert config.num_active_params() == config.num_params() - experts * 3 // 5
    dense = config.replace(family="llama", num_experts=None, experts_per_token=None)
    assert dense.num_active_params() == dense.num_params()


# -- adapters, generation --------------------------------------------------------------------------


def test_adapters_on_attention(rng):
    model, (ids, labels) = make("qwen3_moe"), batch(rng)
    before = model.collect_weights()
    lora = LoraModel(model, LoraConfig(rank=2, target_modules=("q", "v", "o")))
    trainer = LlamaTrainer(lora, LlmTrainingConfig(learning_rate=1e-2, warmup_steps=0, grad_accum_steps=1))
    told = [trainer.train_step_with_metrics(ids, labels) for _ in range(10)]
    assert told[-1].loss < told[0].loss
    assert told[0].penalties["load_balancing"] > 0
    assert model.collect_weights().tobytes() == before.tobytes()
    with pytest.raises(ConfigError, match="gate_proj of experts without up_proj, and both are one matrix"):
        LoraModel(model, LoraConfig(target_modules=("gate_proj",)))


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_text_is_that_of_whole_rows(rng, family):
    model, prompt = make(family), rng.integers(0, 31, 4)
    found = generate(model, prompt, 8, temperature=0)
    ids = list(prompt)
    for _ in range(8):
        ids.append(int(model.forward(np.array([ids]))[0, -1].argmax()))
    assert found.tolist() == ids[4:]
