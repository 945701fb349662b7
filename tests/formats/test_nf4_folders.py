"""Folders whose linear matrices bitsandbytes has written in NF4: read as a base and as a model, and what is refused."""

import json

import numpy as np
import pytest
from world import parts_in_nf4

from abi_py.config import LoraConfig, TrainableModelConfig
from abi_py.errors import CheckpointError
from abi_py.formats.safetensors import map_safetensors, read_safetensors, write_safetensors
from abi_py.kernels.storage.nf4 import NF4, VALUES
from abi_py.model import LoraModel, TrainableModel
from abi_py.model.frozen import FrozenModel
from abi_py.training.loading import load_model

SHAPE = {"hidden_dim": 48, "num_layers": 1, "num_heads": 4, "num_kv_heads": 2, "intermediate_dim": 80}
SHAPE |= {"vocab_size": 50, "max_seq_len": 16}
SAID = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "quant_method": "bitsandbytes"}


@pytest.fixture(params=[False, True], ids=["nf4", "nf4-dq"])
def folder(request, tmp_path):
    """Return a folder in NF4, the same in float32, and the storage."""
    TrainableModel(TrainableModelConfig(**SHAPE)).save_pretrained(tmp_path / "plain")
    TrainableModel(TrainableModelConfig(**SHAPE)).save_pretrained(tmp_path / "nf4")
    tensors = {}
    for name, w in read_safetensors(tmp_path / "plain/model.safetensors").items():
        tensors |= parts_in_nf4(name, w, request.param) if name.endswith("_proj.weight") else {name: w}
    write_safetensors(tmp_path / "nf4/model.safetensors", tensors)
    config = json.loads((tmp_path / "nf4/config.json").read_text()) | {"quantization_config": SAID}
    (tmp_path / "nf4/config.json").write_text(json.dumps(config))
    return tmp_path, "nf4-dq" if request.param else "nf4"


def test_it_is_read_as_it_lies_and_is_what_the_plain_folder_is_encoded_to(folder):
    place, storage = folder
    model, ids = FrozenModel.from_pretrained(place / "nf4"), np.arange(12)[None]
    assert model.storages() == ("float32", storage)
    assert isinstance(model.base["layers.0.w_q"], np.memmap)
    encoded = FrozenModel.from_pretrained(place / "plain", storage=storage)
    assert model.forward(ids).tobytes() == encoded.forward(ids).tobytes()
    whole = TrainableModel.from_pretrained(place / "nf4")
    np.testing.assert_allclose(whole.forward(ids), model.forward(ids), atol=1e-5)
    lora = LoraModel(model, LoraConfig(rank=2))
    assert np.isfinite(lora.compute_loss(ids, ids, backward=True).loss)
    lora.merged().save_pretrained(place / "merged", "bfloat16")
    assert "quantization_config" not in json.loads((place / "merged/config.json").read_text())
    assert TrainableModel.from_pretrained(place / "merged").config == model.config


def test_its_digest_is_one_whatever_it_is_encoded_in_and_sees_the_scales(folder):
    place, storage = folder
    digest = FrozenModel.from_pretrained(place / "nf4").identity.digest
    for other in ("nf4-dq", "nf4", "bf16"):
        model = FrozenModel.from_pretrained(place / "nf4", storage=other)
        assert model.identity.digest == digest
        LoraModel(model, LoraConfig(rank=2), place / "nf4").save(place / f"on-{other}")
        assert load_model(place / f"on-{other}", frozen=True).model.trained_in == other
        assert load_model(place / f"on-{other}", frozen=True, original=True).model.model.storages() == (
            "float32",
            storage,
        )
    file = place / "nf4/model.safetensors"
    tensors = {name: np.array(part) for name, part in read_safetensors(file).items()}
    scales = next(name for name in tensors if name.endswith(".nested_absmax" if storage == "nf4-dq" else ".absmax"))
    write_safetensors(file, tensors | {scales: tensors[scales] * np.float32(3)})
    for each in (None, "nf4-dq", "nf4"):
        assert FrozenModel.from_pretrained(place / "nf4", storage=each).identity.digest != digest


def test_its_blocks_are_not_encoded_again_for_adapters_of_the_plain_folder(folder):
    """As those of a GGUF file are not; of adapters that were trained on it in another storage they are, as then."""
    place, storage = folder
    for kept in ("nf4-dq", "nf4", "bf16"):
        plain = FrozenModel.from_pretrained(place / "plain", storage=kept)
        LoraModel(plain, LoraConfig(rank=2), place / "plain").save(place / "on-plain")
        loaded = load_model(place / "on-plain", base=place / "nf4", frozen=True)
        assert (loaded.model.model.storage, loaded.model.model.storages()) == (None, ("float32", storage)), kept
        assert loaded.notes[0].endswith(f"on-plain was trained on this model in float32, and here it is in {storage}")
        assert load_model(place / "on-plain", frozen=True).model.model.storage == kept


def test_the_parts_that_bitsandbytes_has_written_are_one_matrix(golden, tmp_path):
    from abi_py.formats.bitsandbytes import in_nf4

    stored = golden("nf4")
    for case, double in (("plain", False), ("plain", True), ("across", True), ("long", True)):
        at = f"{case}/double/" if double else f"{case}/"
        own = {name.removeprefix(at): part for name, part in stored.items() if name.startswith(at)}
        names = {"codes": "w", **{name: f"w.{name}" for name in own}} | {"codes": "w"}
        parts = {names[name]: part for name, part in own.items() if "/" not in name and name not in ("x", "values")}
        write_safetensors(tmp_path / "m.safetensors", parts)
        found = in_nf4(map_safetensors(tmp_path / "m.safetensors"), tmp_path)
        assert [*found] == ["w"]
        assert isinstance(found["w"].storage, NF4)
        assert np.array_equal(found["w"].widened(), own["values"])


def test_what_is_damaged_or_of_another_type_is_named(folder):
    place, _ = folder
    file, name = place / "nf4/model.safetensors", "model.layers.0.self_attn.q_proj.weight"
    good = dict(read_safetensors(file))
    state = json.loads(bytes(good[f"{name}.quant_state.bitsandbytes__nf4"]))

    def refused(change, said):
        write_safetensors(file, {key: value for key, value in {**good, **change}.items() if value is not None})
        with pytest.raises(CheckpointError, match=said):
            FrozenModel.from_pretrained(place / "nf4")

    def of(**changes):
        text = json.dumps(state | changes).encode()
        return {f"{name}.quant_state.bitsandbytes__nf4": np.frombuffer(text, np.uint8)}

    good = {key: np.array(value) for key, value in good.items()}
    refused({f"{name}.absmax": None}, "q_proj.weight.absmax is missing; of .* it is damaged")
    refused({f"{name}.quant_map": -VALUES}, "quant_map are other values than those of NF4")
    refused(of(blocksize=128), "has blocks of 128")
    refused(of(shape=[48, 47]), "is not of a matrix with rows of an even length")
    refused(of(shape=[96, 48]), "q_proj.weight is uint8 of 1152 numbers")
    refused({f"{name}.quant_state.bitsandbytes__fp4": np.zeros(3, np.uint8)}, "is in 'fp4' of bitsandbytes")
    refused({f"{name}.quant_state.bitsandbytes__nf4": np.zeros(3, np.uint8)}, "is not JSON")
