"""The eight schedules against tables worked out by hand, and the rules that hold for all of them."""

import math

import numpy as np
import pytest

from abi_py.config import LearningRateSchedule, LlmTrainingConfig
from abi_py.errors import ConfigError
from abi_py.training.schedule import cooldown_start, learning_rate, restarted, stretched

COMMON = {"learning_rate": 1.0, "min_learning_rate": 0.1, "decay_steps": 8}
OWN = {"wsd": {"cooldown_steps": 4}}  # settings of one schedule alone


def make(name, **changes):
    """Return a configuration with that schedule; a constant one takes neither minimum nor length."""
    return LlmTrainingConfig(warmup_steps=0, **COMMON).replace(lr_schedule=name, **OWN.get(name, {}), **changes)

HALF = 0.1 + 0.9 * 0.5

TABLE = {
    "constant": {0: 1.0, 7: 1.0, 10**9: 1.0},
    "cosine": {0: 1.0, 2: 0.1 + 0.9 * (1 + math.sqrt(0.5)) / 2, 4: HALF, 8: 0.1, 9: 0.1, 16: 0.1, 10**9: 0.1},
    "warmup_cosine": {0: 0.25, 1: 0.5, 2: 0.75, 3: 1.0, 4: 1.0, 6: HALF, 8: 0.1, 12: 0.1, 10**9: 0.1},
    "linear": {0: 1.0, 2: 0.775, 4: HALF, 8: 0.1, 9: 0.1},
    "step": {0: 1.0, 7: 1.0, 8: 0.1, 15: 0.1, 16: 0.1, 800: 0.1},
    "polynomial": {0: 1.0, 4: 0.1 + 0.9 * 0.5**0.9, 8: 0.1, 9: 0.1},
    "cosine_warm_restarts": {0: 1.0, 4: HALF, 8: 1.0, 16: HALF, 24: 1.0, 40: HALF, 56: 1.0},
    "wsd": {0: 1.0, 4: 1.0, 5: HALF, 6: 0.1 + 0.9 * (1 - math.sqrt(0.5)), 8: 0.1, 9: 0.1, 10**9: 0.1},
}


@pytest.mark.parametrize("name", TABLE)
def test_table(name):
    warmup = {"warmup_steps": 4} if name == "warmup_cosine" else {}
    config = make(name, **warmup)
    for step, wanted in TABLE[name].items():
        assert learning_rate(config, step) == pytest.approx(wanted, rel=1e-12), step


# With a warm-up of 4 of the 8 steps, each schedule falls from step 4 to step 8; a period of 8 begins at step 4.
WARM = {
    "constant": {4: 1.0, 10**9: 1.0},
    "cosine": {4: 1.0, 6: HALF, 8: 0.1, 12: 0.1},
    "warmup_cosine": {4: 1.0, 6: HALF, 8: 0.1, 12: 0.1},
    "linear": {4: 1.0, 5: 0.775, 6: HALF, 8: 0.1, 12: 0.1},
    "step": {4: 1.0, 11: 1.0, 12: 0.1},
    "polynomial": {4: 1.0, 6: 0.1 + 0.9 * 0.5**0.9, 8: 0.1, 12: 0.1},
    "cosine_warm_restarts": {4: 1.0, 8: HALF, 12: 1.0, 20: HALF, 28: 1.0},
    "wsd": {4: 1.0, 5: HALF, 6: 0.1 + 0.9 * (1 - math.sqrt(0.5)), 8: 0.1, 12: 0.1},
}


@pytest.mark.parametrize("name", TABLE)
def test_every_schedule_takes_a_warm_up(name):
    config = make(name, warmup_steps=4)
    for step, wanted in {**dict(enumerate((0.25, 0.5, 0.75, 1.0))), **WARM[name]}.items():
        assert learning_rate(config, step) == pytest.approx(wanted, rel=1e-12), step
    later = config.replace(schedule_start=100)
    assert [learning_rate(later, 100 + step) for step in range(40)] == [learning_rate(config, s) for s in range(40)]


def test_the_warm_up_that_nobody_asked_for_is_that_of_warmup_cosine():
    for name in TABLE:
        assert LlmTrainingConfig(lr_schedule=name).warmup_steps == (100 if name in ("warmup_cosine", "wsd") else 0)
    assert LlmTrainingConfig().replace(lr_schedule="linear").warmup_steps == 0
    assert LlmTrainingConfig(warmup_steps=7).replace(lr_schedule="linear").warmup_steps == 7


def test_a_schedule_that_has_ended_is_stretched():
    config = LlmTrainingConfig(warmup_steps=4, lr_schedule="linear", **COMMON)
    assert learning_rate(config, 8) == 0.1
    assert learning_rate(stretched(config, 8, 20), 12) == pytest.approx(HALF)  # half of the way from 4 to 20
    assert stretched(stretched(config, 8, 20), 20, 20) == stretched(config, 8, 20)
    assert stretched(config.replace(lr_schedule="step"), 16, 32).decay_steps == 16  # two falls before, two falls now
    with pytest.raises(ConfigError, match=r"schedule \(stretch\) .* constant"):
        stretched(config.replace(lr_schedule="constant"), 8, 20)


def test_the_cooldown_of_wsd():
    """Its length is a share of the steps after the warm-up, or given; its end moves with that of the schedule."""
    config = LlmTrainingConfig(lr_schedule="wsd", **{**COMMON, "decay_steps": 100}, warmup_steps=10)
    assert cooldown_start(config) == 91
    assert cooldown_start(config.replace(cooldown_share=0.2)) == 82
    assert cooldown_start(config.replace(cooldown_share=1.0)) == 10
    assert cooldown_start(config.replace(cooldown_share=0.001)) == 99
    assert cooldown_start(config.replace(cooldown_steps=30)) == 70
    assert cooldown_start(config.replace(schedule_start=7)) == 98
    linear = config.replace(cooldown_steps=10, cooldown_shape="linear")
    rates = [learning_rate(linear, step) for step in (10, 90, 95, 99, 100)]
    assert rates == pytest.approx([1.0, 1.0, 0.55, 0.19, 0.1])
    assert stretched(config, 100, 60) == config.replace(decay_steps=60)
    shorter, longer = ([learning_rate(each, s) for s in range(56)] for each in (stretched(config, 100, 60), config))
    assert shorter == longer
    with pytest.raises(ConfigError, match=r"cooldown_steps \(91\) must be at most 90, the steps between"):
        config.replace(cooldown_steps=91)
    with pytest.raises(ConfigError, match=r"cooldown_share \(0.0\) must be above 0"):
        config.replace(cooldown_share=0.0)


def test_a_schedule_is_restarted():
    config = restarted(LlmTrainingConfig(warmup_steps=4, lr_schedule="linear", **COMMON), 8, 48)
    assert (config.schedule_start, config.warmup_steps, config.decay_steps) == (8, 2, 40)
    rates = [learning_rate(config, step) for step in (8, 9, 10, 29, 48, 60)]
    assert rates == pytest.approx([0.5, 1.0, 1.0, HALF, 0.1, 0.1])
    constant = LlmTrainingConfig(lr_schedule="constant", learning_rate=1.0)
    assert learning_rate(restarted(constant, 8, 48, warmup=2), 8) == 0.5
    with pytest.raises(ConfigError, match=r"schedule \(restart\) .* warmup_steps"):
        restarted(constant, 8, 48)


def test_every_schedule_has_a_table():
    assert set(TABLE) == set(WARM) == {each.value for each in LearningRateSchedule}


@pytest.mark.parametrize("name", TABLE)
@pytest.mark.parametrize("warmup", [0, 1, 4])
def test_rules(name, warmup):
    """The first update has a rate above zero; no rate is above the peak, or, after the warm-up, below the minimum."""
    config = make(name, warmup_steps=warmup)
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
