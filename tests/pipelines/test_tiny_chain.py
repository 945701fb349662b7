"""The chain that comes with the package, trained whole: its adapters are there for something, and learn it.

Each adapter has patterns that the model under it has never seen.  On rows that are kept for validation the loss falls
to a fraction, and more answers have the right keys.  A minute and a half on two cores.
"""

import numpy as np
import pytest

import abi_py as abi
from abi_py.data.tokenizer import Tokenizer
from abi_py.formats.safetensors import read_safetensors
from abi_py.pipelines import train_phases
from abi_py.pipelines.chain import RUN, Chain
from abi_py.pipelines.recipe import SHIPPED, Recipe
from abi_py.runs.conversations import ends_of_answers
from abi_py.runs.json_answers import check_answers

ADAPTERS = ("phase2_reasoning_atlas", "phase3_content_marketing", "phase4_coder_nexus")


@pytest.fixture(scope="module")
def chain(tmp_path_factory):
    out = tmp_path_factory.mktemp("tiny")
    for name in ("phase0_base", "phase1_base_csdl", *ADAPTERS):
        train_phases("tiny", out, only=name)
    return Chain(Recipe.read(SHIPPED["tiny"]), out)


def adapter_of(chain, name):
    phase = chain.recipe.phase(name)
    return phase, chain.folder(phase) / phase.config.leaves_adapter


@pytest.mark.parametrize("name", ADAPTERS)
def test_no_adapter_is_without_effect(chain, name):
    """B begins as zeros: a matrix that is still zero has learned nothing, and adds nothing."""
    tensors = read_safetensors(adapter_of(chain, name)[1] / "adapter_model.safetensors")
    learned = {key: np.asarray(tensor) for key, tensor in tensors.items() if ".lora_B." in key}
    assert len(learned) == 7 * 2  # targets of each layer
    for key, tensor in learned.items():
        assert np.isfinite(tensor).all(), key
        assert np.abs(tensor).max(1).all(), key  # no row of it is zero


@pytest.mark.parametrize("name", ADAPTERS)
def test_each_adapter_learns_its_category(chain, name):
    phase, folder = adapter_of(chain, name)
    figures = chain.done(phase).figures
    assert figures["best_val_loss"] < 0.25 * figures["initial_val_loss"]

    data = chain.given(phase).open_data().valid
    run, merged = chain.folder(phase) / RUN, chain.model_of(chain.before(phase))
    said = {"tokenizer": Tokenizer.load(run), "stop_ids": ends_of_answers(run), "data": data, "most": len(data)}
    model = abi.TrainableModel.from_pretrained(merged)
    before = check_answers(model, **said)
    after = check_answers(abi.LoraModel.load(model, folder), **said)
    assert before.asked == after.asked == len(data)
    assert after.keyed >= before.keyed + 3, (before, after)  # 5, 10 and 13 more where docs/10-csdl.md was measured
    assert after.equal > before.equal, (before, after)
