"""A frozen model that is encoded as it is read: its numbers, gradients of adapters on it, generation, bytes, digest."""

import tracemalloc

import numpy as np
import pytest
from small_models import make_batch, make_model

from abi_py.choices import BaseStorage
from abi_py.config import LoraConfig
from abi_py.errors import ConfigError
from abi_py.formats import encoded
from abi_py.generation.decoder import Decoder
from abi_py.gradcheck import check_close
from abi_py.kernels.engine.jit import JIT
from abi_py.kernels.storage import OF_A_MATRIX, STORAGES
from abi_py.model import LoraModel
from abi_py.model.frozen import FrozenModel, frozen_bytes
from abi_py.model.stored_adapter import base_storage_of
from abi_py.model.transformer import TrainableModel

SHAPES = {
    "llama": {},
    "biases": {"family": "qwen2", "tie_embeddings": False},
    "stored (in, out)": {"family": "gpt2", "num_kv_heads": 4},
    "experts": {"family": "qwen3_moe", "norm_topk_prob": True, "num_experts": 4, "experts_per_token": 2},
}
KEPT = ["nf4", "nf4-dq", "bf16"]


@pytest.fixture(params=SHAPES, scope="module")
def folder(request, tmp_path_factory):
    """Return the folder of a model in bfloat16."""
    place = tmp_path_factory.mktemp("encoded") / "m"
    make_model(4.0, **SHAPES[request.param]).save_pretrained(place, "bfloat16")
    return place


def adapted(model):
    """Return adapters with numbers on a model."""
    lora, rng = LoraModel(model, LoraConfig(rank=3, alpha=6)), np.random.default_rng(3)
    for w in lora.weights.values():
        w[...] = 0.1 * rng.standard_normal(w.shape)
    return lora


def test_every_storage_but_float32_may_be_asked_for():
    assert {each.value for each in BaseStorage} == {*STORAGES, *OF_A_MATRIX} - {"float32"}


@pytest.mark.parametrize("storage", KEPT)
def test_what_is_multiplied_is_encoded_and_the_rest_lies_as_it_did(folder, storage):
    model, plain = FrozenModel.from_pretrained(folder, storage=storage), FrozenModel.from_pretrained(folder)
    table, kept = model.stored_tensors()
    made = model.widened()
    for entry in table:
        w = plain.widened().weights[entry.name]
        if not entry.hidden:
            assert model.base[entry.name] is not None
            assert np.array_equal(made.weights[entry.name], w)
            continue
        keeps = {**STORAGES, **OF_A_MATRIX}[storage]
        raw, own = keeps.encoded_ref(np.ascontiguousarray(w).reshape(-1, w.shape[-1]))
        assert np.array_equal(kept[entry.name].raw.reshape(raw.shape), raw)
        assert np.array_equal(made.weights[entry.name].reshape(len(raw), -1), own.decode_ref(raw))
    assert sum(w.nbytes for w in model.base.values()) == frozen_bytes(folder, model.config, storage)


@pytest.mark.parametrize("storage", KEPT)
def test_gradients_of_adapters_are_those_on_the_decoded_weights(rng, folder, storage, same_bits):
    lora = adapted(FrozenModel.from_pretrained(folder, storage=storage))
    plain = adapted(lora.model.widened())
    ids, labels = make_batch(rng, lora)
    expected = plain.compute_loss(ids, labels, backward=True)

    def make():
        lora.zero_gradients()
        return np.append(lora.parameters.gradients_flat, lora.compute_loss(ids, labels, backward=True).loss)

    same_bits(make)
    assert abs(lora.compute_loss(ids, labels).loss - expected.loss) < 1e-6 * expected.loss
    lora.zero_gradients()
    lora.compute_loss(ids, labels, backward=True)
    for name, gradient in plain.gradients.items():
        check_close(lora.gradients[name], gradient, 1e-5)


def test_step_zero_is_the_base_to_the_bit_and_training_leaves_its_codes(rng, folder):
    model = FrozenModel.from_pretrained(folder, storage="nf4-dq")
    lora, (ids, labels) = LoraModel(model, LoraConfig(rank=2)), make_batch(rng, model)
    before = {name: w.tobytes() for name, w in model.base.items()}
    assert lora.forward(ids).tobytes() == model.forward(ids).tobytes()
    lora.compute_loss(ids, labels, backward=True)
    assert {name: w.tobytes() for name, w in model.base.items()} == before


def test_generation_reads_codes_and_has_the_logits_of_the_decoded_weights(rng, folder):
    lora = adapted(FrozenModel.from_pretrained(folder, storage="nf4-dq"))
    ids = rng.integers(0, lora.config.vocab_size, 9).astype(np.int32)
    decoder = Decoder(lora)
    decoder.prefill(0, ids[:-1])
    found = decoder.step(np.zeros(1, np.int32), ids[-1:])
    check_close(found[0], lora.forward(ids[None])[0, -1], 1e-4)


def test_the_digest_is_that_of_the_files(folder):
    plain = LoraModel(FrozenModel.from_pretrained(folder)).base_digest()
    assert {LoraModel(FrozenModel.from_pretrained(folder, storage=each)).base_digest() for each in KEPT} == {plain}


def test_adapters_of_files_that_name_no_storage_are_on_what_the_model_is_encoded_in(folder, tmp_path):
    LoraModel(FrozenModel.from_pretrained(folder)).save(tmp_path / "plain")
    loaded = LoraModel.load(FrozenModel.from_pretrained(folder, storage="nf4"), tmp_path / "plain")
    loaded.save(tmp_path / "again")
    assert (loaded.trained_in, base_storage_of(tmp_path / "again")) == ("nf4", "nf4")
    assert LoraModel.load(FrozenModel.from_pretrained(folder), tmp_path / "again").trained_in == "nf4"


def test_a_float32_folder_and_one_that_was_encoded_before(tmp_path):
    model = make_model(4.0)
    model.save_pretrained(tmp_path / "m")
    frozen = FrozenModel.from_pretrained(tmp_path / "m", storage="nf4")
    assert frozen.storages() == ("float32", "nf4")
    digest = LoraModel(TrainableModel.from_pretrained(tmp_path / "m")).base_digest()
    assert LoraModel(frozen).base_digest() == digest
    table, tensors = frozen.stored_tensors()
    again = FrozenModel(model.config, tensors, "nf4").stored_tensors()[1]
    assert all(again[entry.name] is tensors[entry.name] for entry in table if entry.hidden)
    wide = make_model(hidden_dim=64, intermediate_dim=256, num_heads=4)
    wide.export_to_gguf(tmp_path / "q8.gguf", "Q8_0")
    assert "nf4-dq" in FrozenModel.from_pretrained(tmp_path / "q8.gguf", storage="nf4-dq").storages()


def test_rows_are_encoded_strip_by_strip(rng, monkeypatch):
    """A matrix is never there as float32 as a whole, and strips do not change a bit; of stacked ones neither."""
    monkeypatch.setattr(encoded, "STRIP", 64)
    for name in ("nf4-dq", "q8_0"):
        for shape in ((150, 96), (3, 50, 96)):
            w = rng.standard_normal(shape).astype(np.float32)
            storage = {**STORAGES, **OF_A_MATRIX}[name]
            raw, own = storage.encoded(w.reshape(-1, 96))
            found = encoded.encoded_as(storage, encoded.Stored(w))
            assert np.array_equal(found.raw, raw)
            assert np.array_equal(found.widened(), own.decode_ref(raw).reshape(shape))
    large = encoded.Stored(np.ones((1 << 14, 128) if JIT else (128, 64), np.float32))
    tracemalloc.start()
    encoded.encoded_as(OF_A_MATRIX["nf4-dq"], large)
    assert tracemalloc.get_traced_memory()[1] < large.nbytes / 4 or not JIT
    tracemalloc.stop()


def test_what_a_storage_cannot_keep_is_named(folder, tmp_path):
    with pytest.raises(ConfigError, match=r"weight cannot be kept as q4_k: rows of \d+ numbers are no whole blocks"):
        FrozenModel.from_pretrained(folder, storage="q4_k")
    with pytest.raises(ConfigError, match=r"cannot be kept as q4_k: .*; nf4-dq and nf4 keep rows of any even length"):
        frozen_bytes(folder, FrozenModel.from_pretrained(folder).config, "q4_k")
    with pytest.raises(ConfigError, match="storage \\('q4'\\) must be nf4, nf4-dq, float32, bf16"):
        FrozenModel.from_pretrained(folder, storage="q4")
