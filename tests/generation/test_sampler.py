"""Sampling: the definitions of temperature, top-k and top-p, and generation past the context."""

import numpy as np
import pytest

from abi_py.config import TrainableModelConfig
from abi_py.errors import ConfigError, DataError, NonFiniteError
from abi_py.generation import generate, sample
from abi_py.model import TrainableModel

LOGITS = np.log([0.1, 0.4, 0.2, 0.3])


def draw(count=4000, **settings):
    rng = np.random.default_rng(1)
    found = [sample(LOGITS, rng, **settings) for _ in range(count)]
    return np.bincount(found, minlength=4) / count


def test_temperature_one_draws_the_distribution():
    assert np.abs(draw(temperature=1.0, top_k=0, top_p=1.0) - [0.1, 0.4, 0.2, 0.3]).max() < 0.03


def test_temperature_zero_takes_the_first_largest():
    assert sample(np.array([1.0, 3.0, 3.0]), np.random.default_rng(0), temperature=0) == 1


def test_temperature_sharpens():
    p = np.array([0.1, 0.4, 0.2, 0.3]) ** 2
    assert np.abs(draw(temperature=0.5, top_k=0, top_p=1.0) - p / p.sum()).max() < 0.03


def test_top_k_keeps_the_likeliest():
    assert np.abs(draw(temperature=1.0, top_k=2, top_p=1.0) - [0, 4 / 7, 0, 3 / 7]).max() < 0.03


def test_top_p_keeps_up_to_the_one_that_reaches_it():
    assert np.abs(draw(temperature=1.0, top_k=0, top_p=0.5) - [0, 4 / 7, 0, 3 / 7]).max() < 0.03
    assert draw(temperature=1.0, top_k=0, top_p=0.01)[1] == 1  # never none


def test_min_p_looks_at_the_probabilities_after_temperature():
    p = np.array([0, 0.4, 0.2, 0.3]) ** 0.5  # 0.5, 1, 0.71 and 0.87 of the likeliest
    assert np.abs(draw(temperature=2.0, top_k=0, top_p=1.0, min_p=0.6) - p / p.sum()).max() < 0.03


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        ({"temperature": -1}, "temperature"),
        ({"top_k": -1}, "top_k"),
        ({"top_p": 0}, "top_p"),
        ({"top_p": 1.5}, "top_p"),
    ],
)
def test_settings_out_of_range(settings, name):
    with pytest.raises(ConfigError, match=name):
        sample(LOGITS, np.random.default_rng(0), **settings)


def test_nan_logits():
    with pytest.raises(NonFiniteError):
        sample(np.array([0.0, np.nan]), np.random.default_rng(0))


@pytest.fixture(scope="module")
def model():
    return TrainableModel(
        TrainableModelConfig(
            hidden_dim=16,
            num_layers=2,
            num_heads=2,
            num_kv_heads=1,
            intermediate_dim=16,
            vocab_size=23,
            max_seq_len=40,
            seed=3,
        )
    )


def test_greedy_equals_argmax_of_unpadded_logits(model):
    prompt = [3, 1, 4]
    made = generate(model, prompt, 5, temperature=0)
    context = list(prompt)
    for token in made:
        assert token == model.forward(np.array([context]))[0, -1].argmax()
        context.append(int(token))


def test_seed_decides(model):
    one, two = (generate(model, [1], 20, seed=seed) for seed in (1, 1))
    assert one.tolist() == two.tolist()
    assert generate(model, [1], 20, seed=2).tolist() != one.tolist()


def test_goes_past_the_context_and_stops_at_stop(model):
    made = generate(model, [1, 2], 60, temperature=2.0, top_k=0, top_p=1.0)
    assert made.shape == (60,)
    first = int(made[0])
    assert generate(model, [1, 2], 60, temperature=2.0, top_k=0, top_p=1.0, stop=first).size == 0


def test_bad_prompts(model):
    with pytest.raises(DataError, match="at least one token"):
        generate(model, [], 3)
    with pytest.raises(DataError):
        generate(model, [23], 3)
