"""Replayed steps of decoding: the bits of Python's, for every kind of layer, and never those of another step."""

import numpy as np
import pytest

from abi_py.config import LoraConfig, TrainableModelConfig
from abi_py.generation.decoder import Decoder
from abi_py.kernels.cached_attention import TASK_KEYS
from abi_py.kernels.engine import replay
from abi_py.kernels.engine.jit import JIT
from abi_py.kernels.engine.streams import STREAMED
from abi_py.model import LoraModel, TrainableModel
from abi_py.runs.tiny_models import tiny_frozen
from abi_py.shape import ModelFamily

pytestmark = pytest.mark.skipif(not JIT, reason="nothing is compiled, so nothing is replayed")

SHAPE = {"hidden_dim": 16, "num_layers": 2, "num_heads": 4, "num_kv_heads": 2, "intermediate_dim": 24, "vocab_size": 61}
OTHERS = [
    {},
    {"family": "mistral", "sliding_window": 9},
    {"family": "gpt2", "num_kv_heads": 4},
    {"family": "gemma3"},
    {"family": "mixtral", "num_experts": 4, "experts_per_token": 2},
]


def make(max_seq_len=40, **changes):
    return TrainableModel(TrainableModelConfig(**SHAPE | {"max_seq_len": max_seq_len, "seed": 5} | changes))


def both(monkeypatch, script):
    """Hold what script() returns with replays to the bits of what it returns without."""
    found = []
    for setting in ("1", "0"):
        monkeypatch.setattr(replay, "SETTING", setting)
        found.append(script())
    assert np.array_equal(*found)


def decode(model, steps, sequences=3):
    """Return the logits of steps of three, two and one sequences, of different lengths, in turn."""
    decoder, rng, found = Decoder(model, sequences), np.random.default_rng(1), []
    for slot in range(sequences):
        decoder.prefill(slot, rng.integers(0, 61, 1 + 4 * slot))
    for step in range(steps):
        slots = np.arange(sequences - step % sequences, dtype=np.int32)
        found += list(decoder.step(slots, rng.integers(0, 61, len(slots))).copy())
    return np.array(found)


@pytest.mark.parametrize("changes", OTHERS, ids=lambda changes: changes.get("family", "llama"))
def test_replayed_steps_have_the_bits_of_python(changes, monkeypatch, replays):
    model = make(**changes)
    both(monkeypatch, lambda: decode(model, 18))
    assert len(replays) == 12  # of each number of sequences, all but the first two steps


def test_a_longer_cache_and_more_parts_of_keys_are_other_steps(monkeypatch, replays):
    model = make(3 * TASK_KEYS, num_layers=1)

    def script():
        decoder, found = Decoder(model), []
        decoder.prefill(0, np.arange(TASK_KEYS - 12, dtype=np.int32) % 61)
        for step in range(24):
            if step == 6:
                decoder.reserve(2 * TASK_KEYS)
            found.append(decoder.step(np.zeros(1, np.int32), np.array([step]))[0].copy())
        return np.array(found)

    both(monkeypatch, script)
    assert len(replays) == 4 + (12 - 6 - 2) + (24 - 12 - 2)


def test_weights_that_change_are_seen(monkeypatch, replays):
    def script():
        model = make()
        decoder, found = Decoder(model), []
        for _ in range(8):
            found.append(decoder.step(np.zeros(1, np.int32), np.array([3]))[0].copy())
            model.parameters.weights_flat[...] *= np.float32(1.1)
        return np.array(found)

    both(monkeypatch, script)
    assert len(replays) == 6


@pytest.mark.parametrize("sequences", [2, STREAMED + 1])  # read as they lie, and a strip at a time
@pytest.mark.parametrize("integer", [True, False])
@pytest.mark.parametrize("storage", ["bf16", "float16", "q8_0", "q4_k", "q6_k"])
def test_matrices_of_any_storage(storage, integer, sequences, monkeypatch, replays):
    model = tiny_frozen(ModelFamily.LLAMA, storage)

    def script():
        decoder, found = Decoder(model, sequences, integer=integer), []
        for step in range(5):
            ids = np.arange(sequences, dtype=np.int32) + step
            found.append(decoder.step(np.arange(sequences, dtype=np.int32), ids).copy())
        if replay.SETTING == "1":
            (arrays,) = decoder._of_steps.values()
            assert not arrays.steps.refused
            assert decoder._noted == {id(layer) for layer in model.layers}  # nothing of it is Python's
        return np.array(found)

    both(monkeypatch, script)
    assert len(replays) == 3


def test_adapters(monkeypatch, replays):
    model = LoraModel(make(), LoraConfig(rank=4))
    model.parameters.weights_flat[...] += np.float32(0.01)
    both(monkeypatch, lambda: decode(model, 9))
    assert replays


def test_a_hook_on_an_instance_is_called_in_every_step(monkeypatch, replays):
    """One that comes after steps were noted, and changes what is computed."""

    def script():
        model = make()
        decoder, calls = Decoder(model), []
        linear = decoder._stack.branches[0].linears[0]
        inner = linear.decode

        def hook(y, *others, **named):
            calls.append(y)
            inner(y, *others, **named)
            y *= np.float32(1.25)

        found = [decoder.step(np.zeros(1, np.int32), np.array([3]))[0].copy() for _ in range(4)]
        linear.decode = hook
        found += [decoder.step(np.zeros(1, np.int32), np.array([3]))[0].copy() for _ in range(4)]
        assert len(calls) == 4
        return np.array(found)

    both(monkeypatch, script)
    assert len(replays) == 2 + 2
