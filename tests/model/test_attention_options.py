"""What a family may choose of attention, all at once and block by block, as Gemma 3 does: beside the float64 page."""

import json

import numpy as np
import pytest
from small_models import make_batch

from abi_py.config import TrainableModelConfig
from abi_py.families import FAMILIES, Family, llama
from abi_py.generation.decoder import Decoder
from abi_py.gradcheck import check_close, check_gradient
from abi_py.kernels.engine.jit import JIT
from abi_py.kernels.rope import rope_frequencies, rope_table
from abi_py.model import TrainableModel, reference
from abi_py.model.folder import config_from_huggingface
from abi_py.model.layers.attention import Attention
from abi_py.model.layers.norm import RmsNorm
from abi_py.model.layers.run import Angles, Run
from abi_py.rope_scaling import RopeScaling
from abi_py.shape import ModelFamily

SHAPE = {"hidden_dim": 18, "num_layers": 3, "num_heads": 3, "num_kv_heads": 1, "head_dim": 8, "intermediate_dim": 13}
WINDOW = 4
OPTIONS = ("everything", "qk_norm", "window", "scale", "after")
SEGMENTS = np.array([[0] * 7 + [1] * 6, [5] * 13])


def layers_with(chosen):
    """Return a family's list of layers: windows in two blocks of three, each kind with its own angles."""

    def norm(name, width):
        return RmsNorm(name, width, 1e-6, above_one=True)

    def options(block, width, head_dim):
        return {
            "qk_norm": (norm("q_norm", head_dim), norm("k_norm", head_dim)),
            "window": WINDOW if block % 3 != 2 else None,
            "scale": 0.6,
            "after": norm("after_norm", width),
        }

    def layers(shape):
        made, D = llama.decoder_layers(shape), shape.resolved_head_dim
        angles = Angles(D, 1e4, shape.max_seq_len), Angles(D, 30.0, shape.max_seq_len)
        for i, layer in enumerate(made):
            if isinstance(layer, Attention):
                sizes = layer.width, layer.heads, layer.kv_heads, D
                own = {k: v for k, v in options(layer.block, layer.width, D).items() if chosen in (k, "everything")}
                made[i] = Attention(layer.at, layer.block, *sizes, layer.norm, angles[layer.block % 3 != 2], **own)
        return made

    return layers


@pytest.fixture(params=OPTIONS)
def make(request, monkeypatch):
    """Return a function that makes a model whose attention has one of the options, or all."""
    names = llama.NAMES | {f"layers.{{i}}.{name}": (name, name) for name in ("q_norm", "k_norm", "after_norm")}
    family = Family(**{**vars(llama.FAMILY), "layers": layers_with(request.param), "names": names})
    monkeypatch.setitem(FAMILIES, ModelFamily.LLAMA, family)

    def model(**changes):
        made = TrainableModel(TrainableModelConfig(**SHAPE, vocab_size=29, max_seq_len=64, **changes))
        rng = np.random.default_rng(7)
        for name, w in made.weights.items():
            w[...] = (0.3 if w.ndim == 1 else 0.4) * rng.standard_normal(w.shape) + ("norm" in name and w.max() > 0.5)
        return made

    return model


def test_every_gradient(make, rng):
    """The page beside finite differences, the kernels beside the page."""
    model = make()
    ids, labels = make_batch(rng, model, 2, 13)
    weights = reference.widened(model.weights)
    marks = {"segment_ids": SEGMENTS}
    loss, gradients = reference.loss_and_gradients(model.layers, weights, ids, labels, **marks)
    for name, w in weights.items():
        if name.startswith("layers.") and ("norm" in name or name.endswith(("w_q", "w_k", "w_v", "w_o"))):

            def f(value, name=name):
                changed = weights | {name: value}
                return reference.loss(model.layers, changed, ids, labels, **marks)

            check_gradient(f, w, gradients[name], rng, name=name)
    check_close(model.forward(ids, **marks), reference.logits(model.layers, weights, ids, **marks), 1e-5)
    model.zero_gradients()
    result = model.compute_loss(ids, labels, backward=True, **marks)
    assert result.loss == pytest.approx(loss, rel=1e-6)
    for name, gradient in gradients.items():
        check_close(model.gradients[name], gradient, 1e-4, name=name)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_what_is_computed_again_has_the_same_bits(make, rng, precision):
    plain = make()
    ids, labels = make_batch(rng, plain, 2, 13)
    plain.compute_loss(ids, labels, backward=True, precision=precision)
    for strategy in ("full", "attention_only", "every_n_layers"):
        model = make(checkpointing=strategy, **({"checkpoint_interval": 2} if strategy == "every_n_layers" else {}))
        model.compute_loss(ids, labels, backward=True, precision=precision)
        assert model.parameters.gradients_flat.tobytes() == plain.parameters.gradients_flat.tobytes(), strategy
    exact = plain.parameters.gradients_flat.copy()
    plain.zero_gradients()
    plain.compute_loss(ids, labels, backward=True)
    assert np.abs(exact - plain.parameters.gradients_flat).max() < 0.1 * np.abs(exact).max()


def test_generation_gives_what_the_whole_text_gives(make, rng):
    """A prompt at once and in pieces, then token by token, beside another sequence of another length."""
    model = make()
    ids = rng.integers(0, 29, 30 if JIT else 14).astype(np.int32)
    whole, n = model.forward(ids[None])[0], len(ids)
    decoder = Decoder(model, 2)
    check_close(decoder.prefill(0, ids[: n // 3]), whole[n // 3 - 1], 1e-4)
    check_close(decoder.prefill(0, ids[n // 3 : n // 2]), whole[n // 2 - 1], 1e-4)
    decoder.prefill(1, ids[:2])
    for t in range(n // 2, n - 2):
        logits = decoder.step(np.array([0, 1]), ids[[t, t - n // 2 + 2]])
        check_close(logits[0], whole[t], 1e-4)
        check_close(logits[1], whole[t - n // 2 + 2], 1e-4)


def test_a_window_costs_less(make):
    """The count of operations: the sum over the queries of the keys that each sees."""
    model = make()
    for layer in (each for each in model.layers if isinstance(each, Attention)):
        products = layer.qkv.flops(True) + layer.o.flops(True)
        for length in (1, WINDOW, WINDOW + 1, 23):
            seen = sum(min(t + 1, layer.window or length) for t in range(length)) / length
            assert layer.flops(length, True) - products == pytest.approx(12 * layer.o.inputs * seen)


def test_dynamic_generation_gives_what_transformers_gives(golden):
    """Beyond the row of training, each token has other angles, and keys that are kept have those of their time."""
    g = golden("rope_dynamic")
    config = config_from_huggingface(json.loads(str(g["config"])))
    assert config.max_seq_len == 36
    model = TrainableModel(config)
    for tensor in model.parameters.table:
        model.weights[tensor.name] = g[f"weight/{tensor.hf_name}"].astype(np.float32)
    decoder, ids, prompt = Decoder(model, 2), g["ids"], int(g["prompt"])
    decoder.prefill(0, ids[:3])  # beside it, a sequence that is shorter
    made = [decoder.prefill(1, ids[:prompt]).copy()]
    made += [decoder.step(np.array([0, 1]), np.array([1, token], np.int32))[1].copy() for token in ids[prompt:]]
    check_close(np.array(made), g["logits"], 1e-4)
    whole = model.forward(ids[None])[0]  # has the angles of its whole length in every place
    assert np.abs(whole[-1] - made[-1]).max() > 0.1
    decoder.clear(1)  # a prompt that is longer than the row of training
    check_close(decoder.prefill(1, ids), whole[-1], 1e-4)


def test_dynamic_angles_follow_the_length_of_what_is_read():
    """Training: of the longest sample of a batch.  Generation: of each row's own sequence, after this call."""
    scaling = RopeScaling(rope_type="dynamic", factor=4)
    angles, numbers = Angles(6, 100.0, 32, scaling.numbers(32)), scaling.numbers(32)
    assert numbers["original"] == 8

    def wanted(positions, length):
        cos, sin = rope_table(length, 6, 100.0, scaling=numbers)
        return cos[positions], sin[positions]

    def run(positions, length, **more):
        rows = np.array(positions, np.int32)
        return Run(1, length, None if more else np.zeros_like(rows), rows, **more)

    for length in (5, 8, 9, 20, 11, 32, 3):
        cos, sin, at = angles.of(run(range(length), length))
        assert np.array_equal(cos[at], wanted(range(length), length)[0])
        assert np.array_equal(angles.reference(length)[1].astype(np.float32), wanted(range(length), length)[1])
    packed = [*range(10), *range(5)]
    cos, _, at = angles.of(run(packed, 15))
    assert np.array_equal(cos[at], wanted(packed, 10)[0])
    slots = np.array([2, 0, 0, 0], np.int32)
    cos, sin, at = angles.of(run([7, 18, 19, 20], 4, slots=slots), 32)
    for rows, length in (([0], 8), ([1, 2, 3], 21)):
        positions = np.array([7, 18, 19, 20])[rows]
        check_close(cos[at][rows], wanted(positions, length)[0], 1e-6)
        check_close(sin[at][rows], wanted(positions, length)[1], 1e-6)
    frequencies, _ = rope_frequencies(6, 100.0, numbers, 32)
    assert frequencies[-1] < rope_frequencies(6, 100.0)[0][-1] / 3  # the slowest pair turns as far as in 8 tokens
