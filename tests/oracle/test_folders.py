"""Folders both ways: written here and opened by transformers, written by transformers and opened here; equal logits."""

import json

import numpy as np
import pytest
from random_families import FAMILIES

from abi_py.model import TrainableModel
from abi_py.model.frozen import FrozenModel

PLAIN = {
    "rope_parameters": {"rope_type": "default", "rope_theta": 1000.0},
    **{"sliding_window": None, "use_sliding_window": False, "max_position_embeddings": 64},
}
EAGER = {"experts_implementation": "eager"}  # the grouped products of PyTorch take widths that are multiples of 4 alone
IDS = np.random.default_rng(0).integers(0, 41, (2, 17))  # every vocabulary that is drawn has 41 at least


@pytest.fixture
def theirs_of(transformers, torch):
    """Return a function that makes a random model of a family."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()

    def make(family, number=0, plain=True, **changes):
        kind, fields = FAMILIES[family]
        drawn = fields(np.random.default_rng([7, number]))
        if plain and "layer_types" not in drawn:  # else each kind of layer has its own RoPE
            drawn |= {name: value for name, value in PLAIN.items() if name in drawn}
        config = getattr(transformers, kind)(**{**drawn, **changes})
        torch.manual_seed(number)
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32, **EAGER).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += 0.1 * torch.randn_like(parameter)  # biases that are not 0, norms that are not 1
        return model

    return make


@pytest.fixture
def logits_of(torch):
    """Return a function that gives the logits of a model of theirs."""

    def compute(model):
        with torch.no_grad():
            return model(input_ids=torch.tensor(IDS)).logits.numpy()

    return compute


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_folder_of_transformers_is_read(theirs_of, logits_of, torch, transformers, tmp_path, family, tied, dtype):
    made = theirs_of(family, tie_word_embeddings=tied).to(getattr(torch, dtype))
    made.save_pretrained(tmp_path / "m", max_shard_size="4KB")
    assert (tmp_path / "m/model.safetensors.index.json").is_file()
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "m", dtype="float32", **EAGER).eval()
    wanted = logits_of(theirs)
    for kind in (TrainableModel, FrozenModel):
        assert np.abs(kind.from_pretrained(tmp_path / "m").forward(IDS) - wanted).max() < 1e-4
    assert np.ptp(wanted) > 1


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_folder_of_ours_is_read(theirs_of, logits_of, transformers, tmp_path, family, tied, dtype):
    theirs_of(family, 1, tie_word_embeddings=tied).save_pretrained(tmp_path / "source")
    model = TrainableModel.from_pretrained(tmp_path / "source")
    for name, size in (("one", "5GB"), ("shards", "4KB")):
        model.save_pretrained(tmp_path / name, dtype, size)
        found, told = transformers.AutoModelForCausalLM.from_pretrained(
            tmp_path / name, output_loading_info=True, dtype="float32", **EAGER
        )
        assert not any(told.values()), told
        ours = TrainableModel.from_pretrained(tmp_path / name)
        assert np.abs(ours.forward(IDS) - logits_of(found.eval())).max() < 1e-4
        assert str(transformers.AutoModelForCausalLM.from_pretrained(tmp_path / name).dtype) == f"torch.{dtype}"
    model.companions = type(model.companions)()  # a config.json of our own, not what the source said
    model.save_pretrained(tmp_path / "own")
    found = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "own", **EAGER).eval()
    assert np.abs(model.forward(IDS) - logits_of(found)).max() < 1e-4


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("number", range(4))
def test_names_shards_and_index_are_those_of_transformers(theirs_of, tmp_path, family, number):
    made = theirs_of(family, number, plain=number == 0, tie_word_embeddings=False)
    made.save_pretrained(tmp_path / "theirs", max_shard_size="4KB")
    TrainableModel.from_pretrained(tmp_path / "theirs").save_pretrained(tmp_path / "ours", max_shard_size="4KB")
    ours, theirs = (
        json.loads((tmp_path / name / "model.safetensors.index.json").read_text()) for name in ("ours", "theirs")
    )
    assert set(ours["weight_map"]) == set(theirs["weight_map"])
    assert ours["metadata"] == theirs["metadata"]
    content, source = (json.loads((tmp_path / name / "config.json").read_text()) for name in ("ours", "theirs"))
    assert {name: value for name, value in content.items() if name != "torch_dtype"} == source


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_experts_as_transformers_has_them_in_memory(theirs_of, logits_of, tmp_path, family):
    """One tensor of all experts, gate and up fused: `save_original_format=False`."""
    made = theirs_of(family, 3)
    made.save_pretrained(tmp_path / "m", save_original_format=False)
    assert np.abs(TrainableModel.from_pretrained(tmp_path / "m").forward(IDS) - logits_of(made)).max() < 1e-4
