"""Twenty optimizer steps beside PyTorch's: same weights, data, AdamW, clipping and schedule (tests/golden/make.py)."""

import json

import numba
import numpy as np
import pytest

from abi_py.config import LlmTrainingConfig, TrainableModelConfig
from abi_py.model import TrainableModel
from abi_py.training.trainer import LlamaTrainer


def run(stored, parts):
    """Train on the stored batches, each cut into `parts` micro-batches; return the trainer and its figures by step."""
    options = json.loads(str(stored["options"]))
    names = ("optimizer", "weight_decay", "max_grad_norm", "learning_rate", "min_learning_rate", "warmup_steps")
    config = LlmTrainingConfig(
        **{name: options[name] for name in names},
        decay_steps=options["decay_steps"],
        beta1=options["betas"][0],
        beta2=options["betas"][1],
        epsilon=options["eps"],
        grad_accum_steps=parts,
    )
    model = TrainableModel(TrainableModelConfig.from_dict(json.loads(str(stored["config"]))))
    for name in model.weights:
        model.weights[name][...] = stored[f"initial/{name}"]
    trainer, figures = LlamaTrainer(model, config), []
    for ids, labels in zip(stored["ids"], stored["labels"], strict=True):
        for part in np.array_split(np.arange(len(ids)), parts):
            metrics = trainer.train_step_with_metrics(ids[part], labels[part])
        assert metrics.updated
        figures.append((trainer.state.loss, metrics.grad_norm, metrics.learning_rate))
    return trainer, np.array(figures).T


@pytest.mark.parametrize("parts", [1, 2])
def test_twenty_steps(golden, parts):
    stored = golden("trajectory")
    trainer, (losses, norms, rates) = run(stored, parts)
    np.testing.assert_allclose(losses, stored["losses"], atol=1e-4, rtol=0)
    np.testing.assert_allclose(norms, stored["grad_norms"], rtol=1e-4)
    np.testing.assert_allclose(rates, stored["learning_rates"], rtol=1e-6)
    for name, weights in trainer.model.weights.items():
        np.testing.assert_allclose(weights, stored[f"final/{name}"], atol=1e-4, rtol=0, err_msg=name)


def test_thread_count_does_not_change_a_bit(golden, same_bits):
    stored = golden("trajectory")

    def weights_and_figures():
        trainer, figures = run(stored, 2)
        return trainer.model.collect_weights(), figures

    same_bits(weights_and_figures)


def test_num_threads_is_applied(make_model, make_config):
    before = numba.get_num_threads()
    try:
        LlamaTrainer(make_model(), make_config(num_threads=1))
        assert numba.get_num_threads() == 1
        LlamaTrainer(make_model(), make_config(num_threads=0))
        assert numba.get_num_threads() == numba.config.NUMBA_NUM_THREADS
    finally:
        numba.set_num_threads(before)
