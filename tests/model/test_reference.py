"""The model in float64, which the others are measured against: PyTorch's figures, finite differences, packed rows."""

import json
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from small_models import make_batch, make_model

from abi_py.config import TrainableModelConfig
from abi_py.errors import DataError
from abi_py.families import layers
from abi_py.gradcheck import STEP, check_close, check_gradient
from abi_py.model import reference

SMALLEST = {  # 564 parameters, 630 if untied
    "hidden_dim": 6,
    "num_layers": 2,
    "num_heads": 2,
    "num_kv_heads": 1,
    "head_dim": 4,
    "intermediate_dim": 5,
    "vocab_size": 11,
}
SHAPES = {
    "grouped heads": {},
    "one for each, three layers": {"num_kv_heads": 4, "num_layers": 3},
    "odd sizes": {"hidden_dim": 21, "num_heads": 3, "num_kv_heads": 3, "head_dim": 2, "intermediate_dim": 13},
    "untied": {"tie_embeddings": False},
    "other theta and eps": {"rope_theta": 300.0, "norm_eps": 1e-2},
}
SEGMENTS = np.array([[0] * 3 + [1] * 4, [5] * 7])


@pytest.mark.parametrize("name", ["model_tiny", "model_tiny_untied"])
def test_logits_loss_and_every_gradient_equal_pytorch(golden, name):
    g = golden(name)
    config = TrainableModelConfig(**json.loads(str(g["config"])))
    weights = {key.removeprefix("weight/"): g[key] for key in g if key.startswith("weight/")}
    loss, gradients = reference.loss_and_gradients(layers(config), weights, g["ids"], g["labels"])
    assert abs(loss - g["loss"]) < 1e-12
    check_close(reference.logits(layers(config), weights, g["ids"]), g["logits"], 1e-7)  # stored in float32
    assert set(gradients) == set(weights)
    for tensor, gradient in gradients.items():
        check_close(gradient, g[f"gradient/{tensor}"], 1e-7, tensor)


def gradients_and_losses(model, ids, labels, **options):
    """Return the gradients, and for each tensor the loss as a function of it."""
    weights = reference.widened(model.weights)
    value, gradients = reference.loss_and_gradients(model.layers, weights, ids, labels, **options)
    assert value == reference.loss(model.layers, weights, ids, labels, **options)

    def by(name):
        return lambda w: reference.loss(model.layers, weights | {name: w}, ids, labels, **options)

    return gradients, {name: (weights[name], by(name)) for name in weights}


@pytest.mark.parametrize("tied", [True, False])
def test_every_parameter_equals_finite_differences(rng, tied):
    """One number after the other, with segments and smoothing."""
    model = make_model(10.0, **SMALLEST, tie_embeddings=tied)
    ids, labels = make_batch(rng, model, 2, 7)
    options = {"segment_ids": SEGMENTS, "label_smoothing": 0.1, "z_loss": 0.02}
    gradients, losses = gradients_and_losses(model, ids, labels, **options)
    assert sum(gradient.size for gradient in gradients.values()) == model.num_params() == (564 if tied else 630)
    for name, (w, f) in losses.items():
        numeric = np.empty_like(w)
        for place in np.ndindex(*w.shape):
            step = np.zeros_like(w)
            step[place] = STEP
            numeric[place] = (f(w + step) - f(w - step)) / (2 * STEP)
        check_close(gradients[name], numeric, 1e-7, name)


@pytest.mark.parametrize("name", SHAPES)
def test_every_tensor_equals_finite_differences(rng, name):
    """In random directions; three layers, other shapes."""
    model = make_model(3.0, **SHAPES[name])
    ids, labels = make_batch(rng, model, 2, 7)
    gradients, losses = gradients_and_losses(model, ids, labels)
    for tensor, (w, f) in losses.items():
        check_gradient(f, w, gradients[tensor], rng, name=tensor)
    tensor = "layers.0.w_k"
    w, f = losses[tensor]
    with pytest.raises(AssertionError, match="is off by"):
        check_gradient(f, w, 1.001 * gradients[tensor], rng)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_the_loss_is_that_of_the_logits(rng, smoothing):
    model = make_model(6.0)
    ids, labels = make_batch(rng, model)
    z = reference.logits(model.layers, model.weights, ids)
    log_p = z - np.log(np.exp(z).sum(-1, keepdims=True))  # (B, T, V)
    named = np.take_along_axis(log_p, np.maximum(labels, 0)[..., None], -1)[..., 0]
    losses = -(1 - smoothing) * named - smoothing * log_p.mean(-1)
    value = reference.loss(model.layers, model.weights, ids, labels, label_smoothing=smoothing)
    assert abs(value - losses[labels >= 0].mean()) < 1e-12


@pytest.mark.parametrize("mark", ["segment_ids", "attention_mask"])
def test_a_packed_row_equals_sequences_of_their_own(rng, mark):
    model = make_model(6.0)
    ids, labels = make_batch(rng, model, 1, 12, ignored=0)
    marks, cuts = np.array([[0] * 5 + [1] + [0] * 6]), (0, 5, 6, 12)
    loss, packed = reference.loss_and_gradients(model.layers, model.weights, ids, labels, **{mark: marks})
    logits = reference.logits(model.layers, model.weights, ids, **{mark: marks})
    total, summed = 0.0, {name: np.zeros(w.shape) for name, w in model.weights.items()}
    for first, last in pairwise(cuts):
        part = np.s_[:, first:last]
        alone, gradients = reference.loss_and_gradients(model.layers, model.weights, ids[part], labels[part])
        check_close(logits[part], reference.logits(model.layers, model.weights, ids[part]), 1e-12)
        total += alone * (last - first)
        for name, gradient in gradients.items():
            summed[name] += gradient * (last - first)
    assert abs(loss - total / 12) < 1e-12
    for name, gradient in packed.items():
        check_close(gradient, summed[name] / 12, 1e-12, name)


def test_it_is_a_page():
    """One to be read from beginning to end, with what all families have."""
    assert len(Path(reference.__file__).read_text(encoding="utf-8").splitlines()) <= 200


def test_what_comes_in_is_what_the_model_takes(rng):
    model = make_model(6.0)
    ids, labels = make_batch(rng, model)
    before = model.collect_weights()
    loss, gradients = reference.loss_and_gradients(model.layers, model.weights, ids, labels)
    assert model.collect_weights().tobytes() == before.tobytes()
    assert all(gradient.dtype == np.float64 for gradient in gradients.values())
    assert (labels < 0).any()
    assert reference.loss(model.layers, model.weights, ids.tolist(), labels.view(np.uint32)) == loss
    nothing, zero = reference.loss_and_gradients(model.layers, model.weights, ids, np.full_like(labels, -100))
    assert nothing == 0
    assert not any(gradient.any() for gradient in zero.values())
    with pytest.raises(DataError, match=r"input_ids\[0, 0\] is 97"):
        reference.logits(model.layers, model.weights, np.full((1, 3), 97))
    with pytest.raises(DataError, match=r"segment_ids has shape \(2, 12\)"):
        reference.logits(model.layers, model.weights, ids, segment_ids=labels[:, 1:])
    with pytest.raises(TypeError, match="segments"):
        reference.logits(model.layers, model.weights, ids, segments=labels)
