"""`run --lora --base-storage`: adapters on a base that is encoded in fewer bits; what resumes and merges them."""

import hashlib
import shutil

import numpy as np
import pytest
import yaml

from abi_py.formats.safetensors import read_safetensors
from abi_py.model import LoraModel
from abi_py.model.frozen import FrozenModel
from abi_py.training.loading import load_model

QUICK = ["--max-seq-len", "16", "--corpus-bytes", "3000", "--sample-tokens", "0", "--learning-rate", "0.01"]


def trained(abi_train, *words):
    code, out, err = abi_train(*words)
    assert (code, err) == (0, ""), err
    return out


def digests(folder):
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


@pytest.fixture
def base(abi_train, tiny, tmp_path):
    """Return a folder in bfloat16."""
    trained(abi_train, "run", *tiny, "--out", "first")
    trained(abi_train, "export", "first", "-o", "base", "--dtype", "bfloat16")
    return tmp_path / "base"


@pytest.mark.parametrize("storage", ["nf4-dq", "float16"])
def test_adapters_on_an_encoded_base_go_on_to_the_same_bits_and_leave_it_as_it_is(abi_train, base, tmp_path, storage):
    before = digests(base)
    run = ("run", "--base", base, *QUICK, "--base-storage", storage, "--lr-schedule", "constant")  # which means --lora
    out = trained(abi_train, *run, "--epochs", "2", "--out", "whole")
    assert f"base in  {storage}: the matrices of its linear layers, encoded as they are read" in out
    assert yaml.safe_load((tmp_path / "whole/config.yaml").read_text())["lora"]["base_storage"] == storage
    trained(abi_train, *run, "--epochs", "1", "--out", "parts")
    trained(abi_train, "resume", "parts", "--epochs", "2")
    files = (tmp_path / name / "adapter/adapter_model.safetensors" for name in ("whole", "parts"))
    one, other = map(read_safetensors, files)
    assert one.keys() == other.keys()
    assert all(np.array_equal(one[name], other[name]) for name in one)
    assert digests(base) == before
    code, _, err = abi_train("resume", "parts", "--epochs", "3", "--base-storage", "nf4")
    assert code == 2
    assert f"base_storage (nf4) of lora must stay {storage}" in err


def test_adapters_are_merged_into_the_original_weights_or_those_they_know(abi_train, base, tmp_path):
    run = ("run", "--base", base, *QUICK, "--base-storage", "nf4", "--epochs", "1")
    out = trained(abi_train, *run, "--out", "r")
    assert "adapters are merged into the weights: these are the original weights; from those in nf4, on which" in out
    assert "KL " in out
    ids = np.arange(12)[None]
    known = load_model("r/adapter").model  # on the base as it was trained on
    assert known.model.storages() == ("bf16", "nf4")
    original = load_model("r/adapter", original=True).model
    assert load_model("r/checkpoints").model.model.storage == "nf4"
    for name, words, model in (
        ("m1", (), original),
        ("m2", ("--merge-base", "original"), original),
        ("m3", ("--merge-base", "dequant"), known),
    ):
        out = trained(abi_train, "merge", "r", "-o", name, *words)
        merged = load_model(name).model
        np.testing.assert_allclose(merged.forward(ids), model.forward(ids), atol=1e-5)
        assert ("these are the weights that they were trained on, out of nf4" in out) == (name == "m3")
        assert ("logits of 12 tokens are" in out or "logits of 16 tokens are" in out) == (name != "m3")
    assert np.abs(known.forward(ids) - original.forward(ids)).max() > 1e-3
    left = load_model("r").model.forward(ids)
    np.testing.assert_allclose(left, original.forward(ids), atol=1e-5)
    trained(abi_train, *run, "--out", "s", "--merge-base", "dequant")
    np.testing.assert_allclose(load_model("s").model.forward(ids), load_model("m3").model.forward(ids), atol=1e-6)
    trained(abi_train, "export", "r/adapter", "-o", "alone", "--format", "peft")  # still says what it was trained on
    assert load_model("alone").model.trained_in == "nf4"
    assert "trained on base in" in trained(abi_train, "inspect", "r/adapter")
    shutil.rmtree(tmp_path / "r/model")
    assert load_model("r/adapter").model.forward(ids).tobytes() == known.forward(ids).tobytes()


def test_what_does_not_go_together_is_told_before_anything_is_written(abi_train, base, tmp_path):
    for words, said in (
        (("--base", base, "--base-storage", "q4_k"), "weight cannot be kept as q4_k: rows of 16 numbers are no whole"),
        (("--base-storage", "nf4"), "base_storage (nf4) encodes the weights of a base, and none is given; give --base"),
        (("--base", base, "--base-storage", "nf5"), "nf5"),
        (("--base", base, "--lora", "--merge-base", "dequant"), "merge_base (dequant) has no effect: no base was enc"),
    ):
        code, _, err = abi_train("run", *words, *QUICK, "--out", "r")
        assert (code, said in err) == (2, True), err
        assert not (tmp_path / "r").exists()
    trained(abi_train, "run", "--base", base, *QUICK, "--lora", "--epochs", "1", "--out", "plain")
    code, _, err = abi_train("merge", "plain", "-o", "m", "--merge-base", "dequant")
    assert code == 2
    assert "--merge-base (dequant) has no effect: plain was trained on weights as they are" in err


@pytest.mark.parametrize("storage", ["nf4", "nf4-dq", "bf16"])
def test_a_dry_run_counts_the_bytes_of_what_is_encoded(abi_train, base, tmp_path, storage):
    from abi_py.runs.plan import memory_by_part
    from abi_py.runs.resolve import Given

    flags = {"base": {"path": "base"}, "lora": {"base_storage": storage}, "training": {"max_seq_len": 16}}
    given = Given({**flags, "data": {"corpus_bytes": 3000}}, {})
    run = given.resolve(given.open_data(), tmp_path / "r")
    model, parts = run.make_model(), memory_by_part(run)
    assert isinstance(model, LoraModel)
    assert isinstance(model.model, FrozenModel)
    assert parts["frozen weights"] == sum(array.nbytes for array in model.base.values())
    assert parts["frozen weights"] + parts["adapters"] == model.memory_plan(4, 16)["weights"]
    words = "run", "--base", "base", *QUICK, "--base-storage", storage, "--dry-run"
    assert "frozen weights" in trained(abi_train, *words)
