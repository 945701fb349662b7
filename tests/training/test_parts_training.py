"""bf16x3 and bf16x6 in training: loss, gradients, attention against float64, loss curves beside float32, resuming."""

from pathlib import Path

import numpy as np
import pytest

from abi_py.config import LlmTrainingConfig, Precision, TrainableModelConfig
from abi_py.data import BYTE_VOCAB_SIZE
from abi_py.kernels.attention import (
    attention_backward,
    attention_backward_ref,
    attention_forward,
    attention_forward_ref,
    starts_within,
)
from abi_py.kernels.engine.jit import JIT
from abi_py.kernels.engine.number_formats import BF16X3, BF16X6, BFLOAT16
from abi_py.model import TrainableModel
from abi_py.model.reference import loss_and_gradients
from abi_py.training.trainer import LlamaTrainer

PARTS = {"bf16x3": BF16X3, "bf16x6": BF16X6}
METHODS = {(name, way): one for name, choice in PARTS.items() for way, one in choice.usable.items()}
# Of gradients, as a share of their length: 3 to 4 roundings of 2^-17 and what float32 sums lose.
TOLERANCE = {"bf16x3": 3e-5, "bf16x6": 3e-6}


def make_model():
    return TrainableModel(
        TrainableModelConfig(
            hidden_dim=48,
            num_layers=2,
            num_heads=4,
            num_kv_heads=2,
            intermediate_dim=96,
            vocab_size=BYTE_VOCAB_SIZE,
            max_seq_len=64,
        )
    )


def share(found, exact):
    """Return the length of an error as a share of the length of what is right."""
    return np.linalg.norm(found - exact) / np.linalg.norm(exact)


@pytest.mark.parametrize("precision", PARTS)
def test_loss_and_gradients_beside_float64(rng, precision):
    ids, labels = rng.integers(0, BYTE_VOCAB_SIZE, (2, 2, 19))
    model = make_model()
    found = model.compute_loss(ids, labels, backward=True, precision=Precision(precision))
    loss, gradients = loss_and_gradients(model.stack.layers, model.weights, ids, labels)
    assert abs(found.loss - loss) < TOLERANCE[precision]
    for name, exact in gradients.items():
        assert share(model.gradients[name], exact) < TOLERANCE[precision], name


@pytest.mark.parametrize("precision", PARTS)
def test_activations_are_saved_in_float32(precision):
    model, ids = make_model(), np.zeros((1, 5), np.int32)
    model.compute_loss(ids, ids, backward=True, precision=Precision(precision))
    assert model.memory_plan(1, 5, Precision(precision)) == model.memory_plan(1, 5)
    assert model.memory_plan(1, 5, Precision.BF16) != model.memory_plan(1, 5)


@pytest.mark.parametrize("method", METHODS, ids=" by ".join)
@pytest.mark.parametrize("window", [None, 5])
def test_attention_beside_float64(rng, method, window):
    (precision, _), kind = method, METHODS[method]
    batch, length, heads, kv_heads, width = 2, 70 if JIT else 11, 4, 2, 10
    rows = batch * length
    q, do = rng.standard_normal((2, rows, heads * width)).astype(np.float32)
    k, v = rng.standard_normal((2, rows, kv_heads * width)).astype(np.float32)
    starts = starts_within(np.zeros(rows, np.int32), length, window)
    sizes = batch, heads, kv_heads
    o, lse = np.empty_like(do), np.empty((heads, rows), np.float32)
    gradients = np.empty_like(q), np.empty_like(k), np.empty_like(v)
    attention_forward(o, lse, q, k, v, starts, *sizes, number_format=kind)
    attention_backward(*gradients, do, q, k, v, o, lse, starts, *sizes, number_format=kind)
    wide = [x.astype(np.float64) for x in (do, q, k, v)]
    assert share(o, attention_forward_ref(*wide[1:], starts, *sizes)[0]) < TOLERANCE[precision]
    for found, exact in zip(gradients, attention_backward_ref(*wide, starts, *sizes), strict=True):
        assert share(found, exact) < TOLERANCE[precision]


def test_attention_takes_a_format_that_is_stored_as_q_is(rng):
    q = rng.standard_normal((4, 8)).astype(np.float32)
    o, lse, starts = np.empty_like(q), np.empty((1, 4), np.float32), np.zeros(4, np.int32)
    with pytest.raises(TypeError, match="q is float32; in attention bfloat16 is stored as uint16"):
        attention_forward(o, lse, q, q, q, starts, 1, 1, 1, number_format=BFLOAT16)
    with pytest.raises(TypeError, match="q is uint16; in attention bf16x3 is stored as float32"):
        attention_forward(o, lse, *[q.astype(np.uint16)] * 3, starts, 1, 1, 1, number_format=BF16X3)


@pytest.mark.parametrize("precision", PARTS)
def test_same_bits_for_any_number_of_threads(rng, same_bits, precision):
    ids = rng.integers(0, BYTE_VOCAB_SIZE, (2, 33))
    model = make_model()

    def make():
        model.zero_gradients()
        model.compute_loss(ids, ids, backward=True, precision=Precision(precision))
        return np.concatenate([gradient.ravel() for gradient in model.gradients.values()])

    same_bits(make)


# -- whole trainings -----------------------------------------------------------------------------

STEPS = 60


def train(precision, **changes):
    config = LlmTrainingConfig(
        epochs=100, batch_size=8, max_seq_len=64, learning_rate=3e-3, warmup_steps=10, decay_steps=STEPS,
        grad_accum_steps=1, max_steps=STEPS, mixed_precision=precision,
    )  # fmt: skip
    trainer = LlamaTrainer(make_model(), config.replace(**changes))
    trainer.fit(np.frombuffer((Path(__file__).read_text(encoding="utf-8") * 4).encode(), np.uint8).astype(np.int32))
    return trainer


@pytest.fixture(scope="module")
def exact():
    return np.array(train("fp32").loss_history)


@pytest.mark.skipif(not JIT, reason="slow without compiling")
@pytest.mark.parametrize("precision", PARTS)
def test_loss_curve_beside_float32(exact, precision):
    """Rounding grows over the steps, and begins at about a thousandth of bfloat16's."""
    curve = np.array(train(precision).loss_history)
    assert exact[-1] < 0.7 * exact[0]  # it did learn
    assert np.abs(curve / exact - 1)[:10].max() < 1e-5
    assert np.abs(curve / exact - 1).max() < 2e-3


@pytest.mark.parametrize("precision", PARTS)
def test_a_run_goes_on_with_the_method_of_its_checkpoint(tmp_path, monkeypatch, precision):
    config = {"max_steps": 2, "checkpoint_path": str(tmp_path / "run"), "checkpoint_interval": 1}
    first = train(precision, **config)
    again = LlamaTrainer(make_model(), first.config)
    again.load_checkpoint(tmp_path / "run")
    assert again.config.mixed_precision is Precision(precision)
    assert again.events.warnings == []
    assert again.state.global_step == 2
    monkeypatch.setitem(vars(PARTS[precision]), "method", "other")
    again = LlamaTrainer(make_model(), first.config)
    again.load_checkpoint(tmp_path / "run")
    (warning,) = again.events.warnings
    assert f"multiplied {precision} by the method fp32, here it is other" in warning.replace("amx", "fp32")
    assert "ABI_BF16_PARTS=" in warning
