"""The range test: which rates it tries, where it ends, what it suggests, and that it leaves everything as it was."""

import math

import numba
import numpy as np
import pytest

from abi_py.config import LoraConfig
from abi_py.data import IGNORE_LABEL
from abi_py.errors import ConfigError, DataError
from abi_py.model import LoraModel
from abi_py.training.range_test import _smooth, find_learning_rate, steepest
from abi_py.training.trainer import LlamaTrainer

CHANGES = [{}, {"optimizer": "muon"}, {"mixed_precision": "bf16"}, {"mixed_precision": "fp16"}]


@pytest.mark.parametrize("change", CHANGES, ids=str)
def test_a_sweep_leaves_model_and_directory_as_they_were(make_model, make_config, data, tmp_path, change):
    config = make_config(checkpoint_path=str(tmp_path / "c"), checkpoint_interval=1, grad_accum_steps=1, **change)
    model = make_model()
    before = model.collect_weights()
    found = find_learning_rate(model, config, data, steps=40)
    np.testing.assert_array_equal(model.collect_weights(), before)
    assert not model.parameters.gradients_flat.any()
    assert list(tmp_path.iterdir()) == []
    assert len(found.rates) == len(found.losses) == len(found.smoothed) <= 40
    ratios = np.diff(np.log(found.rates))
    np.testing.assert_allclose(ratios, math.log(1e6) / 39, rtol=1e-9)
    assert 1e-4 < found.suggestion < 1


def test_a_training_after_a_sweep_has_the_bits_of_one_without(make_model, make_config, data):
    swept, plain = (LoraModel(make_model(), LoraConfig(rank=2, dropout=0.3)) for _ in range(2))
    find_learning_rate(swept, make_config(), data, steps=20)
    for model in (swept, plain):
        LlamaTrainer(model, make_config()).fit(data)
    np.testing.assert_array_equal(swept.collect_weights(), plain.collect_weights())


def test_the_updates_have_the_rates_and_losses_that_are_told(make_model, make_config, data):
    config = make_config(grad_accum_steps=2)
    found = find_learning_rate(make_model(), config, data, steps=20, smallest=1e-3, largest=1e-1)
    quiet = config.replace(lr_schedule="warmup_cosine", warmup_steps=100, decay_steps=10000)
    trainer = LlamaTrainer(make_model(), quiet, schedule=lambda step: found.rates[step])
    trainer.fit(data)  # 8 batches an epoch: windows of two fill it
    n = len(trainer.loss_history)
    assert n == 8
    assert trainer.loss_history == list(found.losses[:n])


def test_it_ends_where_training_diverges(make_model, make_config, data):
    found = find_learning_rate(make_model(), make_config(optimizer="sgd", grad_accum_steps=1), data, largest=1e6)
    assert found.diverged
    assert len(found.rates) < 100
    assert found.rates[-1] < 1e6


def test_the_suggestion_is_where_the_loss_falls_fastest():
    rates = [10 ** (-6 + 6 * k / 99) for k in range(100)]
    losses = [5 - 2 / (1 + math.exp(-(math.log10(rate) + 3) * 4)) + (rate > 0.2) * 40 * rate for rate in rates]
    assert steepest(rates, losses) == pytest.approx(1e-3, rel=0.2)
    assert steepest(rates, [5.0] * 100) is None
    assert steepest(rates, [5 + k / 100 for k in range(100)]) is None
    assert steepest(rates[:5], losses[:5]) is None
    np.testing.assert_allclose(_smooth([1.0, 2.0]), [1.0, (0.9 + 2) / 1.9])


def test_wrong_numbers_are_refused(make_model, make_config, data):
    with pytest.raises(ConfigError, match=r"smallest \(1.0\) must be above 0 and below largest"):
        find_learning_rate(make_model(), make_config(), data, smallest=1.0)
    with pytest.raises(ConfigError, match=r"steps \(3\) must be at least 20"):
        find_learning_rate(make_model(), make_config(), data, steps=3)


def test_data_that_train_no_token_are_refused(make_model, make_config, data, monkeypatch):
    model = make_model()
    original = model.compute_loss
    none = lambda ids, labels, **given: original(ids, np.full_like(labels, IGNORE_LABEL), **given)  # noqa: E731
    monkeypatch.setattr(model, "compute_loss", none)
    with pytest.raises(DataError, match="a pass over the data trained no token"):
        find_learning_rate(model, make_config(), data, steps=20)


def test_it_ends_at_nan_without_the_guard_too(make_model, make_config, data):
    config = make_config(optimizer="sgd", grad_accum_steps=1, nan_guard=False, max_grad_norm=0.0)
    found = find_learning_rate(make_model(), config, data, smallest=1e37, largest=1e38)
    assert found.diverged
    assert np.isfinite(found.losses).all()


def test_the_number_of_threads_is_put_back(make_model, make_config, data):
    before = numba.get_num_threads()
    numba.set_num_threads(numba.config.NUMBA_NUM_THREADS)
    try:
        find_learning_rate(make_model(), make_config(num_threads=1), data, steps=20)
        assert numba.get_num_threads() == numba.config.NUMBA_NUM_THREADS
    finally:
        numba.set_num_threads(before)
