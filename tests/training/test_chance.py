"""A loss above chance is told, once, and nothing else is."""

import math
from types import SimpleNamespace

import numpy as np
import pytest

from abi_py.training.chance import ChanceWatch
from abi_py.training.trainer import LlamaTrainer


def noise(level, steps, size=0.3, seed=0):
    return (level + np.random.default_rng(seed).normal(0, size, steps)).tolist()


def falling(begin, end, steps, size=0.1):
    return (np.linspace(begin, end, steps) + np.random.default_rng(1).normal(0, size, steps)).tolist()


V = 257  # chance is 5.55
EXPLODED = [5.56, 9.0, 30.0, *noise(7.3, 100)]
CASES = {  # losses, vocabulary, warm-up, warned while it runs, warned at the end
    "it explodes": (EXPLODED, V, 0, True, True),
    "it explodes to NaN without the guard": ([5.56, *[math.nan] * 60], V, 0, True, True),
    "it explodes after the warm-up": ([*falling(5.6, 3.0, 100), *noise(7.0, 60)], V, 100, True, True),
    "in the first steps": (EXPLODED[:50], V, 0, False, True),
    "shorter than anything can be said": (EXPLODED[:9], V, 0, False, False),
    "it learns": (falling(5.6, 2.0, 300), V, 10, False, False),
    "it begins high and falls slowly": (falling(9.0, 5.0, 100), V, 0, False, False),
    "it begins high, is above yet, and falls": (falling(9.0, 6.5, 60), V, 0, False, True),
    "a bad start, then it learns": ([5.6, *noise(8.0, 20), *falling(6.0, 3.0, 100)], V, 0, False, False),
    "hardly any rate": (noise(5.56, 200, 0.03), V, 0, False, False),
    "a long warm-up": (noise(5.9, 200), V, 500, False, True),
    "a hard text for a trained model": ([2.1, *noise(2.9, 200)], 50_000, 10, False, False),
    "a text that gets harder": ([1.9, *falling(1.9, 2.8, 200)], 50_000, 10, False, False),
    "a trained model is spoiled": ([2.1, *noise(7.0, 200)], 50_000, 10, True, True),
    "label smoothing of a model that learns": (noise(4.9, 200), V, 10, False, False),
    "few tokens to a step": ([4.0, *noise(3.5, 200, 1.5)], V, 10, False, False),
}


@pytest.mark.parametrize("case", CASES)
def test_table(case):
    losses, vocabulary, warmup, while_it_runs, at_end = CASES[case]
    said = []
    session = SimpleNamespace(
        model=SimpleNamespace(config=SimpleNamespace(vocab_size=vocabulary)),
        config=SimpleNamespace(warmup_steps=warmup, learning_rate=0.03),
        state=SimpleNamespace(bad_steps=0, global_step=0, rate_set=None),
        schedule=None,
        loss_history=[],
        warn=said.append,
    )
    watch = ChanceWatch(session)
    for loss in losses:
        session.loss_history.append(loss)
        watch.after_step()
    assert len(said) == while_it_runs, said
    watch.at_end()
    assert len(said) == while_it_runs + at_end, said
    assert all("a lower learning rate, 0.003 instead of 0.03" in text for text in said)
    if at_end and vocabulary > V and losses[0] < 3:
        assert said[-1].startswith("the model has lost what it knew: its loss is 6.9, far above its first value, 2.1")


def test_the_remedy_knows_who_sets_the_rate(make_model, make_config, data):
    usual = {"lr_schedule": "warmup_cosine", "warmup_steps": 100, "decay_steps": 10_000}
    config = make_config(grad_accum_steps=1, epochs=12, **usual)
    report = LlamaTrainer(make_model(), config, schedule=lambda step: 10.0).fit(data)
    assert "with lower learning rates than 10 was, the last one" in report.warnings[-1]


def test_most_updates_were_skipped():
    said = []
    session = SimpleNamespace(
        config=SimpleNamespace(warmup_steps=0, learning_rate=1.0),
        state=SimpleNamespace(bad_steps=24, global_step=20, rate_set=None),
        schedule=None,
        loss_history=[1.0],
        warn=said.append,
    )
    watch = ChanceWatch(session)
    for bad in (24, 25, 26):
        session.state.bad_steps = bad
        watch.after_step()
    assert [text.partition(",")[0] for text in said] == ["25 of 45 updates were skipped"]


def test_a_run_that_explodes_says_so(make_model, make_config, data, record):
    sink = record()
    config = make_config(learning_rate=10.0, grad_accum_steps=1, epochs=12, decay_steps=10_000)
    report = LlamaTrainer(make_model(), config, [sink]).fit(data)
    told = [event.message for event in sink.of("warning")]
    assert list(report.warnings) == told
    assert "the loss has been" in told[0]
    assert "above chance, 2.9" in told[0]
    assert told[-1].startswith("the model has learned nothing")
    assert len(told) == 2
    calm = LlamaTrainer(make_model(), make_config(epochs=8)).fit(data)
    assert calm.warnings == ()
