"""The options of layers that a family may combine: scaled embeddings, weights above one, gated GELU, norms afterwards.

As Gemma has them, and with learned positions and biases besides.
"""

import math
from dataclasses import replace

import numpy as np
import pytest

from abi_py.config import CheckpointingStrategy, LoraConfig, TrainableModelConfig
from abi_py.families import FAMILIES
from abi_py.families.family import Family
from abi_py.families.llama import FAMILY
from abi_py.generation import generate
from abi_py.generation.decoder import Decoder
from abi_py.gradcheck import check_close, check_gradient
from abi_py.model import LoraModel, TrainableModel, reference
from abi_py.model.layers.activation import Gelu
from abi_py.model.layers.attention import Attention
from abi_py.model.layers.embedding import Embedding
from abi_py.model.layers.feed_forward import FeedForward
from abi_py.model.layers.head import Head
from abi_py.model.layers.norm import LayerNorm, RmsNorm
from abi_py.model.layers.run import Angles
from abi_py.parameters import HfName
from abi_py.shape import ModelFamily

SHAPE = {"hidden_dim": 18, "num_layers": 3, "num_heads": 3, "num_kv_heads": 1, "intermediate_dim": 14, "vocab_size": 29}
T = 11


def layers(shape):
    """Return a list of layers in which blocks differ."""
    width, eps = shape.hidden_dim, shape.norm_eps
    sizes = width, shape.num_heads, shape.num_kv_heads, shape.resolved_head_dim
    made = [Embedding(shape.vocab_size, width, shape.max_seq_len, learned_positions=True, scale=math.sqrt(width))]

    def rms(name):
        return RmsNorm(name, width, eps, above_one=True)

    for i in range(shape.num_layers):
        at, angles = f"layers.{i}.", Angles(shape.resolved_head_dim, shape.rope_theta, shape.max_seq_len)
        after = LayerNorm("ffn_after", width, eps) if i == 1 else rms("ffn_after")
        activation = Gelu(exact=i == 1, gated=i != 2)
        inner = shape.intermediate_dim + i
        made.append(Attention(at, i, *sizes, rms("attn_norm"), angles, after=rms("attn_after")))
        made.append(FeedForward(at, i, width, inner, rms("ffn_norm"), activation=activation, bias=i == 1, after=after))
    return [*made, Head(rms("final_norm"), shape.vocab_size, width, shape.tie_embeddings)]


@pytest.fixture(autouse=True)
def family(monkeypatch):
    """Let the family of the default be made of these layers."""
    monkeypatch.setitem(FAMILIES, ModelFamily.LLAMA, replace(FAMILY, layers=layers))
    monkeypatch.setattr(Family, "names_of", lambda self, name: ((HfName(f"{name}.weight"),), name))


def make_model(**changes):
    """Return a model away from its beginning, where norms after a branch are all but linear."""
    model = TrainableModel(TrainableModelConfig(**{**SHAPE, "max_seq_len": T, **changes}))
    rng = np.random.default_rng(2)
    model.parameters.weights_flat += 0.15 * rng.standard_normal(model.num_params()).astype(np.float32)
    return model


def make_batch(rng):
    ids = rng.integers(0, SHAPE["vocab_size"], (2, T)).astype(np.int32)
    labels = np.roll(ids, -1, axis=1)
    labels[:, -1] = -100
    return ids, labels, {"segment_ids": np.array([[0] * 4 + [1] * 7, [0] * T])}


@pytest.mark.parametrize("tied", [True, False])
def test_every_gradient_equals_the_reference_and_that_finite_differences(rng, tied):
    model = make_model(tie_embeddings=tied)
    ids, labels, marks = make_batch(rng)
    found = model.compute_loss(ids, labels, backward=True, **marks).loss
    weights = reference.widened(model.weights)
    loss, gradients = reference.loss_and_gradients(model.layers, weights, ids, labels, **marks)
    assert found == pytest.approx(loss, rel=1e-5)
    assert {"layers.0.attn_after", "layers.1.ffn_after_bias", "layers.1.b_gate", "position_embedding"} <= set(gradients)
    for name, gradient in gradients.items():
        check_close(model.gradients[name], gradient, 1e-4, name=name)

        def f(value, name=name):
            return reference.loss(model.layers, {**weights, name: value}, ids, labels, **marks)

        check_gradient(f, weights[name], gradient, rng)


@pytest.mark.parametrize("adapters", [None, 0.0, 0.2])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_what_is_computed_again_has_the_same_bits(rng, precision, adapters):
    ids, labels, marks = make_batch(rng)
    found = set()
    for strategy in CheckpointingStrategy:
        every = {"checkpoint_interval": 2} if strategy is CheckpointingStrategy.EVERY_N_LAYERS else {}
        model = make_model(checkpointing=strategy, **every)
        if adapters is not None:
            model = LoraModel(model, LoraConfig(rank=2, dropout=adapters))
            values = np.random.default_rng(1)
            for weight in model.weights.values():
                weight += 0.1 * values.standard_normal(weight.shape).astype(np.float32)
        loss = model.compute_loss(ids, labels, backward=True, precision=precision, **marks).loss
        found.add((loss, model.parameters.gradients_flat.tobytes()))
    assert len(found) == 1


def test_adapters_have_the_gradients_of_the_model_that_they_make(rng):
    """dB = s dW Aᵀ and dA = s Bᵀ dW, by the gradient of the merged matrix."""
    ids, labels, marks = make_batch(rng)
    lora = LoraModel(make_model(), LoraConfig(rank=2, alpha=6))
    for weight in lora.weights.values():
        weight[...] = 0.1 * rng.standard_normal(weight.shape)
    lora.compute_loss(ids, labels, backward=True, **marks)
    merged = lora.merged()
    merged.compute_loss(ids, labels, backward=True, **marks)
    for name in {name[:-2] for name in lora.weights}:
        a, b, gradient = lora.weights[f"{name}.a"], lora.weights[f"{name}.b"], merged.gradients[name]
        check_close(lora.gradients[f"{name}.b"], lora.lora.scaling * gradient @ a.T, 1e-4, name=name)
        check_close(lora.gradients[f"{name}.a"], lora.lora.scaling * b.T @ gradient, 1e-4, name=name)


def test_decoding_computes_what_forward_does(rng):
    model, ids = make_model(), rng.integers(0, SHAPE["vocab_size"], T).astype(np.int32)
    decoder, whole = Decoder(model), model.forward(ids[None])[0]
    check_close(decoder.prefill(0, ids[:5]), whole[4], 1e-5)
    for i in range(5, T):
        check_close(decoder.step(np.zeros(1, np.int32), ids[i : i + 1])[0], whole[i], 1e-5)
    assert len(generate(model, ids[:3], 5, temperature=0)) == 5


def test_the_plan_is_what_is_allocated(rng):
    for strategy in ("none", "full", "attention_only"):
        model = make_model(checkpointing=strategy)
        ids, labels, marks = make_batch(rng)
        model.compute_loss(ids, labels, backward=True, **marks)
        plan = model.memory_plan(2, T)
        assert plan["saved activations"] + plan["scratch"] == model.stack.arena.nbytes()


def test_the_scale_of_an_embedding_is_rounded_to_float32():
    """As transformers does with Gemma's: sqrt(C) in the type of the weights."""
    embedding = Embedding(5, 3, 4, scale=math.sqrt(3))
    assert embedding.scale == float(np.float32(math.sqrt(3))) != math.sqrt(3)
