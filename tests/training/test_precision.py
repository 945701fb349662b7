"""bfloat16 products: close to float32 step by step, and over three hundred steps on real text."""

import numpy as np
import pytest

from abi_py.config import LlmTrainingConfig, Precision, TrainableModelConfig
from abi_py.data import BYTE_VOCAB_SIZE, TokenizedDataset, standard_library_corpus
from abi_py.kernels._jit import JIT
from abi_py.model import TrainableModel
from abi_py.training.trainer import LlamaTrainer

STEPS = 300


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


def train(data, precision):
    config = LlmTrainingConfig(
        epochs=100,
        batch_size=8,
        max_seq_len=64,
        learning_rate=3e-3,
        warmup_steps=20,
        decay_steps=STEPS,
        grad_accum_steps=1,
        max_steps=STEPS,
        mixed_precision=precision,
    )
    trainer = LlamaTrainer(make_model(), config)
    trainer.fit(data)
    return np.array(trainer.loss_history).reshape(-1, 10).mean(1)  # of ten steps: single batches scatter by more


@pytest.mark.skipif(not JIT, reason="slow without compiling")
def test_loss_curve_stays_within_three_percent_of_float32():
    data = TokenizedDataset.from_slice(standard_library_corpus(200_000).tokens)
    exact, rounded = train(data, "fp32"), train(data, "bf16")
    assert exact[-1] < 0.7 * exact[0]  # it did learn
    assert np.abs(rounded / exact - 1).max() < 0.03
    assert not np.array_equal(rounded, exact)


def test_gradients_are_those_of_float32_up_to_the_rounding(rng):
    model = make_model()
    ids, labels = rng.integers(0, BYTE_VOCAB_SIZE, (2, 2, 19))
    exact = model.compute_loss(ids, labels, backward=True)
    gradients = {name: gradient.copy() for name, gradient in model.gradients.items()}
    model.zero_gradients()
    rounded = model.compute_loss(ids, labels, backward=True, precision=Precision.BF16)
    assert 0 < abs(rounded.loss - exact.loss) < 1e-2
    for name, gradient in gradients.items():
        error = np.linalg.norm(model.gradients[name] - gradient) / np.linalg.norm(gradient)
        assert 0 < error < 0.03, name  # a bfloat16 has 8 bits: 0.4 % for each operand


def test_an_unknown_precision_is_refused(rng):
    ids = rng.integers(0, BYTE_VOCAB_SIZE, (1, 3))
    with pytest.raises(ValueError, match="must be one of fp32, bf16, fp16"):
        make_model().compute_loss(ids, ids, precision="fp8")


def test_evaluation_uses_the_precision_of_the_run():
    data = np.arange(2000) % 251
    results = []
    for precision in ("fp32", "bf16"):
        config = LlmTrainingConfig(batch_size=4, max_seq_len=64, mixed_precision=precision)
        results.append(LlamaTrainer(make_model(), config).evaluate(data).loss)
    assert 0 < abs(results[0] - results[1]) < 1e-2
