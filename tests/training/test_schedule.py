"""The seven schedules against tables worked out by hand, and the rules that hold for all of them."""

import math

import numpy as np
import pytest

from abi_py.config import LearningRateSchedule, LlmTrainingConfig
from abi_py.training.schedule import learning_rate

COMMON = {"learning_rate": 1.0, "min_learning_rate": 0.1, "warmup_steps": 4, "decay_steps": 8}
HALF = 0.1 + 0.9 * 0.5

TABLE = {
    "constant": {0: 1.0, 7: 1.0, 10**9: 1.0},
    "cosine": {0: 1.0, 2: 0.1 + 0.9 * (1 + math.sqrt(0.5)) / 2, 4: HALF, 8: 0.1, 9: 0.1, 16: 0.1, 10**9: 0.1},
    "warmup_cosine": {0: 0.25, 1: 0.5, 2: 0.75, 3: 1.0, 4: 1.0, 6: HALF, 8: 0.1, 12: 0.1, 10**9: 0.1},
    "linear": {0: 1.0, 2: 0.775, 4: HALF, 8: 0.1, 9: 0.1},
    "step": {0: 1.0, 7: 1.0, 8: 0.1, 15: 0.1, 16: 0.1, 800: 0.1},
    "polynomial": {0: 1.0, 4: 0.1 + 0.9 * 0.5**0.9, 8: 0.1, 9: 0.1},
    "cosine_warm_restarts": {0: 1.0, 4: HALF, 8: 1.0, 16: HALF, 24: 1.0, 40: HALF, 56: 1.0},
}


@pytest.mark.parametrize("name", TABLE)
def test_table(name):
    config = LlmTrainingConfig(lr_schedule=name, **COMMON)
    for step, wanted in TABLE[name].items():
        assert learning_rate(config, step) == pytest.approx(wanted, rel=1e-12), step


def test_every_schedule_has_a_table():
    assert set(TABLE) == {each.value for each in LearningRateSchedule}


@pytest.mark.parametrize("name", TABLE)
@pytest.mark.parametrize("warmup", [0, 1, 8])
def test_rules(name, warmup):
    """The first update has a rate above zero; no rate is above the peak, or, after the warm-up, below the minimum."""
    config = LlmTrainingConfig(lr_schedule=name, **{**COMMON, "warmup_steps": warmup})
    rates = [learning_rate(config, step) for step in range(100)]
    assert rates[0] > 0
    assert all(type(rate) is float for rate in rates)
    assert max(rates) <= 1.0
    assert min(rates[warmup:]) >= 0.1 - 1e-15
    if name != "cosine_warm_restarts":
        assert all(later <= earlier for earlier, later in zip(rates[warmup:-1], rates[warmup + 1 :], strict=True))


def test_step_decays_by_ten_down_to_the_minimum():
    config = LlmTrainingConfig(lr_schedule="step", learning_rate=1.0, min_learning_rate=0.005, decay_steps=3)
    rates = [learning_rate(config, step) for step in (0, 2, 3, 5, 6, 8, 9, 100)]
    np.testing.assert_allclose(rates, [1, 1, 0.1, 0.1, 0.01, 0.01, 0.005, 0.005], rtol=1e-12)
