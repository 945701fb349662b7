"""Adapters by name on one model: one at a time, switched without loading, and nothing of one is left in another."""

import numpy as np
import pytest

from abi_py.config import LoraConfig, TrainableModelConfig
from abi_py.errors import ConfigError
from abi_py.generation import Generator, generate
from abi_py.model import Adapters, LoraModel, TrainableModel
from abi_py.model.frozen import FrozenModel

SHAPE = {
    **{"hidden_dim": 32, "num_layers": 2, "num_heads": 4, "num_kv_heads": 2, "intermediate_dim": 64},
    **{"vocab_size": 61, "max_seq_len": 64},
}
IDS = np.arange(20).reshape(2, 10)


@pytest.fixture(params=["trainable", "quantised"])
def model(request, tmp_path):
    made = TrainableModel(TrainableModelConfig(**SHAPE))
    for w in made.weights.values():
        w *= 4 if w.ndim > 1 else 1
    if request.param == "trainable":
        return made
    made.export_to_gguf(tmp_path / "m.gguf", "Q4_0")
    return FrozenModel.from_gguf(tmp_path / "m.gguf")


def filled(model, seed, **changes):
    lora = LoraModel(model, LoraConfig(**({"rank": 2, "alpha": 6.0} | changes)))
    lora.parameters.weights_flat[:] = np.random.default_rng(seed).normal(0, 0.3, lora.num_params())
    return lora


def test_one_at_a_time_and_again_the_same(model, tmp_path):
    alone = model.forward(IDS).copy()
    adapters = Adapters(model)
    filled(model, 1).save_gguf(tmp_path / "a.gguf")
    filled(model, 2).save(tmp_path / "b")
    adapters.add("a", tmp_path / "a.gguf")
    adapters.add("b", tmp_path / "b")
    assert ([*adapters], adapters.active, adapters.model) == (["a", "b"], None, model)
    found = {name: adapters.use(name).forward(IDS).copy() for name in ("a", None, "b")}
    assert adapters.active == "b"
    assert adapters.model is adapters["b"]
    assert found[None].tobytes() == alone.tobytes()
    assert np.abs(found["a"] - alone).max() > 0.1
    assert np.abs(found["a"] - found["b"]).max() > 0.1
    for name in ("b", "a", None, "a", "b"):
        assert adapters.use(name).forward(IDS).tobytes() == found[name].tobytes()
    assert "a, b (active), on" in repr(adapters)


def test_what_a_generator_keeps_is_its_own(model):
    """The same weights with another factor differ in what they compute, and so in keys and values."""
    adapters = Adapters(model)
    one, other = filled(model, 1), filled(model, 1, alpha=2.0)
    assert one.collect_weights().tobytes() == other.collect_weights().tobytes()
    adapters.add("one", one)
    adapters.add("other", other)
    settings = {"max_new_tokens": 12, "temperature": 0}
    wanted = {name: generate(adapters.use(name), IDS[0], **settings).tolist() for name in ("one", "other", None)}
    assert len({str(each) for each in wanted.values()}) == 3
    generators = {name: Generator(adapters.use(name)) for name in wanted}
    for name in ("one", "other", None, "other", "one", None, "one"):
        adapters.use(name)
        assert generators[name].run([IDS[0]], **settings)[0].ids.tolist() == wanted[name]


def test_wrong_calls(model):
    adapters, lora = Adapters(model), filled(model, 1)
    with pytest.raises(ConfigError, match=r"adapter \(a\) is not there; there are none"):
        adapters.use("a")
    assert adapters.add("a", lora) is lora
    with pytest.raises(ConfigError, match=r"adapter \(b\) is not there; there are a"):
        adapters.use("b")
    with pytest.raises(ConfigError, match=r"adapter \(a\) is there already"):
        adapters.add("a", lora)
    with pytest.raises(ConfigError, match=r"adapter \(b\) is on another model"):
        adapters.add("b", filled(TrainableModel(TrainableModelConfig(**SHAPE)), 1))
    with pytest.raises(TypeError, match="model is a LoraModel"):
        Adapters(lora)


def test_while_one_is_merged_the_others_wait():
    adapters = Adapters(TrainableModel(TrainableModelConfig(**SHAPE)))
    for seed, name in enumerate("ab"):
        adapters.add(name, filled(adapters.base, seed))
    adapters["a"].merge()
    for name in ("b", None):
        with pytest.raises(RuntimeError, match="the adapters a are merged"):
            adapters.use(name)
    adapters["a"].unmerge()
    adapters.use("b")
