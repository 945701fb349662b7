"""Every family beside the figures of the Transformers library (tests/golden/make_families.py)."""

from pathlib import Path

import numpy as np
import pytest
from golden_figures import Figures, names, stored

from abi_py.config import CheckpointingStrategy, LlmTrainingConfig, LoraConfig
from abi_py.data.tokens import TokenizedDataset
from abi_py.formats.safetensors import read_safetensors
from abi_py.generation import generate
from abi_py.gradcheck import check_close
from abi_py.model import LoraModel, TrainableModel, reference
from abi_py.training.checkpoint import find_latest
from abi_py.training.loading import load_model
from abi_py.training.trainer import LlamaTrainer


@pytest.fixture(params=names())
def figures(request, tmp_path):
    """Return the figures of each file."""
    return Figures(stored(request.param), tmp_path)


def test_the_page_has_a_line_for_each():
    page = (Path(__file__).resolve().parents[2] / "docs" / "3-model.md").read_text(encoding="utf-8")
    lines = {line.split("`")[1] for line in page.splitlines() if line.startswith("| `") and line.count("e-0") == 5}
    assert lines == set(names())


# -- the passes ----------------------------------------------------------------------------------


def test_logits_loss_and_every_gradient(figures):
    """Of rows of samples side by side, where each sample must be computed as if it were alone."""
    assert figures.logits_off() < 1e-4
    loss, gradients = figures.gradients_off()
    assert loss < 1e-5
    for name, off in gradients.items():
        assert off < 1e-4, name


def test_the_float64_page_has_the_same_figures(figures):
    model = figures.load()
    found = reference.logits(model.layers, model.weights, figures["ids"], **figures.marks)
    check_close(found, figures["logits"], 1e-10)
    loss, gradients = reference.loss_and_gradients(
        model.layers, model.weights, figures["ids"], figures["labels"], **figures.marks
    )
    assert loss == pytest.approx(float(figures["loss"] + figures["penalty"]), rel=1e-12)
    for name, gradient in figures.by_our_names("gradient").items():
        check_close(gradients[name], gradient, 1e-6, name=name)  # stored in float32


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_what_is_computed_again_is_the_same(figures, precision):
    model = figures.load()
    weights, found = model.collect_weights(), set()
    for strategy in CheckpointingStrategy:
        every = {"checkpoint_interval": 1} if strategy is CheckpointingStrategy.EVERY_N_LAYERS else {}
        again = TrainableModel(model.config.replace(checkpointing=strategy, **every), weights)
        loss = again.compute_loss(
            figures["ids"], figures["labels"], backward=True, precision=precision, **figures.marks
        ).loss
        found.add((loss, again.parameters.gradients_flat.tobytes()))
    assert len(found) == 1
    assert loss == pytest.approx(float(figures["loss"]), rel=1e-5 if precision == "fp32" else 1e-2)


def test_thread_count_does_not_change_a_bit(figures, same_bits):
    def step():
        model = figures.load()
        model.compute_loss(figures["ids"], figures["labels"], backward=True, **figures.marks)
        return model.parameters.gradients_flat

    same_bits(step)


def test_frozen_weights_compute_the_same(figures):
    """As they lie in the folder, in float16."""
    model, frozen = figures.load(), figures.load(frozen=True)
    logits = frozen.forward(figures["ids"], **figures.marks)
    assert logits.tobytes() == model.forward(figures["ids"], **figures.marks).tobytes()
    expected = figures["greedy"].tolist()
    assert generate(frozen, figures["prompt"][0], len(expected), temperature=0).tolist() == expected


# -- training ------------------------------------------------------------------------------------


def test_ten_steps_of_adamw(figures):
    for name, off in figures.steps_off().items():
        assert off < 1e-4, name


def test_a_resumed_run_ends_with_the_same_bits(figures, tmp_path):
    data = TokenizedDataset.from_slice(np.random.default_rng(3).integers(0, 61, 200))
    config = LlmTrainingConfig(
        epochs=2, batch_size=2, max_seq_len=9, learning_rate=1e-2, warmup_steps=2, decay_steps=30, grad_accum_steps=2,
        checkpoint_path=str(tmp_path / "run"), checkpoint_interval=0, eval_interval=0,
    )  # fmt: skip
    whole = LlamaTrainer(figures.load(), config.replace(checkpoint_path=None))
    whole.fit(data)
    LlamaTrainer(figures.load(), config.replace(max_steps=4)).fit(data)
    stopped = find_latest(tmp_path / "run").path
    assert set(read_safetensors(stopped / "model.safetensors")) == set(figures.group("weight"))
    resumed = LlamaTrainer(TrainableModel(whole.model.config), config)
    resumed.load_checkpoint(stopped)
    assert load_model(stopped).model.collect_weights().tobytes() == resumed.model.collect_weights().tobytes()
    resumed.fit(data)
    assert resumed.model.collect_weights().tobytes() == whole.model.collect_weights().tobytes()
    assert resumed.loss_history == whole.loss_history


# -- generation ----------------------------------------------------------------------------------


def test_greedy_text_with_and_without_a_cache(figures):
    assert max(figures.greedy_off()) < 1e-4


# -- adapters ------------------------------------------------------------------------------------


def adapted(figures, **options):
    """Return adapters on a model from which their product was taken, so that together they are the stored one.

    And the product by the name of each matrix that has one.  Experts and routers: tests/model/test_expert_adapters.py.
    """
    model = figures.load()
    if model.config.num_experts:
        options["target_modules"] = ("q", "k", "v", "o")
    lora, rng = LoraModel(model, LoraConfig(rank=3, alpha=6, **options)), np.random.default_rng(4)
    for name in lora.weights:
        lora.weights[name] = 0.2 * rng.standard_normal(lora.weights[name].shape)
    a = {name.removesuffix(".a"): weight for name, weight in lora.weights.items() if name.endswith(".a")}
    products = {name: lora.lora.scaling * lora.weights[f"{name}.b"] @ a[name] for name in a}
    for name, product in products.items():
        model.weights[name] -= product
    return lora, products


def test_adapters_on_every_projection(figures):
    """W + s B A is the stored matrix, so logits are the stored ones, dB = s dW Aᵀ and dA = s Bᵀ dW by the stored dW."""
    lora, products = adapted(figures)
    assert products
    assert figures.logits_off(lora) < 1e-4
    lora.zero_gradients()
    lora.compute_loss(figures["ids"], figures["labels"], backward=True, **figures.marks)
    gradients, scale = figures.by_our_names("gradient"), lora.lora.scaling
    for name in products:
        a, b = lora.weights[f"{name}.a"], lora.weights[f"{name}.b"]
        check_close(lora.gradients[f"{name}.b"], scale * gradients[name] @ a.T, 1e-4, name=name)
        check_close(lora.gradients[f"{name}.a"], scale * b.T @ gradients[name], 1e-4, name=name)


def test_merged_adapters_are_the_stored_model(figures, tmp_path):
    lora, products = adapted(figures, dropout=0.1)
    before = lora.model.collect_weights()
    prompt, expected = figures["prompt"][0], figures["greedy"].tolist()
    assert generate(lora, prompt, len(expected), temperature=0).tolist() == expected
    lora.save(tmp_path / "adapter")
    again = LoraModel.load(TrainableModel(lora.config, before), tmp_path / "adapter")
    assert again.forward(figures["ids"]).tobytes() == lora.forward(figures["ids"]).tobytes()
    merged = lora.merge()
    assert figures.logits_off(merged) < 1e-4
    assert generate(merged, prompt, len(expected), temperature=0).tolist() == expected
    for name, weight in figures.by_our_names("weight").items():
        assert name in products or merged.weights[name].tobytes() == weight.tobytes(), name
        check_close(merged.weights[name], weight, 1e-6, name=name)
    lora.unmerge()
    assert lora.model.collect_weights().tobytes() == before.tobytes()
