"""PEFT's folders: its own names, shapes and keys; what it wrote is read; what is refused and how."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from waiting import PATIENCE

from abi_py.config import LoraConfig, TrainableModelConfig
from abi_py.errors import CheckpointError
from abi_py.families import write_config
from abi_py.formats.peft import ADAPTER_CONFIG, ADAPTER_WEIGHTS, adapter_config, read_adapter
from abi_py.formats.safetensors import read_safetensors, write_safetensors
from abi_py.model import LoraModel, TrainableModel
from abi_py.training.loading import load_model

SHAPE = {
    "hidden_dim": 24,
    "num_layers": 2,
    "num_heads": 4,
    "num_kv_heads": 2,
    "intermediate_dim": 40,
    "vocab_size": 61,
    "max_seq_len": 32,
}
NAME = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"


@pytest.fixture
def model():
    return TrainableModel(TrainableModelConfig(**SHAPE))


@pytest.fixture
def folder(model, tmp_path):
    """Return the folder of adapters with other values than fresh ones."""
    lora = LoraModel(model, LoraConfig(rank=3, alpha=7.5, dropout=0.1))
    lora.weights["layers.1.w_v.b"][...] = 0.25
    lora.save(tmp_path / "adapter")
    return tmp_path / "adapter"


def rewrite(folder, **changes):
    path = folder / ADAPTER_CONFIG
    path.write_text(json.dumps({**json.loads(path.read_text(encoding="utf-8")), **changes}), encoding="utf-8")


# -- the same as PEFT ----------------------------------------------------------------------------


def test_names_shapes_and_keys_are_those_of_peft(golden, model, tmp_path):
    g = golden("lora")
    LoraModel(model, LoraConfig(rank=4, alpha=12)).save(tmp_path, "some/model")
    tensors = read_safetensors(tmp_path / ADAPTER_WEIGHTS)
    assert {name: list(tensor.shape) for name, tensor in tensors.items()} == json.loads(str(g["saved_names"]))
    assert {tensor.dtype for tensor in tensors.values()} == {np.dtype(np.float32)}
    ours = json.loads((tmp_path / ADAPTER_CONFIG).read_text(encoding="utf-8"))
    theirs = json.loads(str(g["saved_config"]))
    assert set(ours) <= set(theirs)
    assert sorted(ours.pop("target_modules")) == theirs["target_modules"]
    assert ours.pop("base_model_name_or_path") == "some/model"
    assert ours == {name: theirs[name] for name in ours}
    left_out = {name: value for name, value in theirs.items() if name not in ours and value}
    assert set(left_out) == {
        *("base_model_name_or_path", "target_modules", "megatron_core", "peft_version", "qalora_group_size")
    } & set(left_out)


def test_what_peft_wrote_is_read(golden, model, tmp_path):
    """Its config with all its keys, and tensors in float64: the logits are PEFT's."""
    g = golden("lora")
    for entry in model.parameters.table:
        model.weights[entry.name] = g[f"base/{entry.hf_name}"]
    tensors = {name.partition("/")[2]: g[name] for name in g if name.startswith("final/")}
    write_safetensors(tmp_path / ADAPTER_WEIGHTS, tensors, {"format": "pt"})
    (tmp_path / ADAPTER_CONFIG).write_text(str(g["saved_config"]), encoding="utf-8")
    lora = LoraModel.load(model, tmp_path)
    assert lora.lora == LoraModel(model, LoraConfig(rank=4, alpha=12)).lora
    assert np.abs(lora.forward(g["ids"][0]) - g["logits"]).max() < 1e-4 * np.abs(g["logits"]).max()


# -- save and load -------------------------------------------------------------------------------


def test_round_trip(model, folder):
    lora = LoraModel.load(model, folder)
    assert lora.lora == LoraModel(model, LoraConfig(rank=3, alpha=7.5, dropout=0.1)).lora
    assert (lora.weights["layers.1.w_v.b"] == 0.25).all()
    fresh = LoraModel(model, LoraConfig(rank=3, alpha=7.5, dropout=0.1))
    fresh.weights["layers.1.w_v.b"][...] = 0.25
    assert lora.collect_weights().tobytes() == fresh.collect_weights().tobytes()
    assert lora.base_model is None


def test_options_of_the_config():
    content = adapter_config(LoraConfig(rank=4, alpha=6, target_modules=("v_proj", "q_proj"), use_rslora=True), "base")
    assert (content["r"], content["lora_alpha"], content["use_rslora"]) == (4, 6, True)
    assert content["target_modules"] == ["v_proj", "q_proj"]
    assert list(content) == sorted(content)


def test_targets_of_every_spelling(model, folder):
    whole = [tensor.hf_name.removesuffix(".weight") for tensor in model.parameters.table if "_proj" in tensor.hf_name]
    ends = [name.split(".", 3)[3] for name in whole]  # of modules, as in self_attn.q_proj
    for targets in ("all-linear", whole, ends):
        rewrite(folder, target_modules=targets)
        assert LoraModel.load(model, folder).lora.target_modules == LoraModel(model).lora.target_modules


def test_targets_of_one_layer(model, tmp_path):
    """PEFT takes whole names of modules too, so an adapter may be on some layers only."""
    lora = LoraModel(model, LoraConfig(target_modules=("layers.1.self_attn.q_proj", "v_proj")))
    assert sorted(name for name in lora.weights if name.endswith(".a")) == [
        *("layers.0.w_v.a", "layers.1.w_q.a", "layers.1.w_v.a")
    ]
    lora.save(tmp_path)
    assert LoraModel.load(model, tmp_path).lora == lora.lora


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"bias": "some"}, r"bias \(some\) must be none, all or lora_only"),
        ({"rank_pattern": {"q_proj": 4}}, r"has shape \(3, 24\); rank 4 on this model takes \(4, 24\)"),
        ({"rank_pattern": [4]}, r"rank_pattern is \[4\]; it must be an object of names and numbers"),
        ({"modules_to_save": ["lm_head"]}, r"lm_head.weight is missing; what is trained whole on this model takes"),
        ({"modules_to_save": ["head"]}, r"lm_head.weight is missing"),
        ({"modules_to_save": ["score"]}, r"'score'.: this model has no such module; try embed_tokens, norm or lm_head"),
        ({"target_modules": 3}, r"target_modules is 3; it must be a list of names, or one text"),
        ({"peft_type": "LOHA"}, "peft_type is 'LOHA'"),
        ({"layers_to_transform": [0]}, r"and \d+ more has no place in this model"),
        ({"layers_to_transform": [2]}, r"layers_to_transform \(2\): there is no such block; this model has "),
        ({"lora_bias": True}, "lora_bias is True; this version does not compute that"),
        ({"some_new_thing": 3}, "some_new_thing is 3; this version does not compute that"),
        ({"init_lora_weights": "pissa"}, "'pissa', which changes frozen weights"),
        ({"r": None}, "lacks r; it is not the adapter_config.json of LoRA"),
        ({"r": 0}, r"rank \(0\) must be at least 1"),
        ({"r": 5}, r"has shape \(3, 24\); rank 5 on this model takes \(5, 24\)"),
        ({"target_modules": ["q_proj"]}, r"and \d+ more has no place in this model; .* names other targets"),
        ({"target_modules": ["head"]}, "'head'.: this model has no such projection; try q_proj, k_proj"),
        ({"target_modules": ["lm_head"]}, r"lm_head.lora_A.weight is missing; rank 3"),
        ({"target_modules": ["proj"]}, "'proj'.: this model has no such projection; try q_proj, k_proj"),
        ({"target_modules": ".*[qk]_proj"}, r"and \d+ more has no place in this model"),
        ({"target_modules": ".*heads"}, r"'.\*heads'.: fits no projection of this model; try q_proj"),
    ],
)
def test_what_is_refused(model, folder, changes, message):
    rewrite(folder, **changes)
    with pytest.raises(CheckpointError, match=message) as caught:
        LoraModel.load(model, folder)
    assert str(folder) in str(caught.value)


@pytest.mark.skipif(os.name != "posix", reason="RLIMIT_FSIZE")
def test_a_full_disk_leaves_the_earlier_adapter(tmp_path):
    """A limit on the size of files stands for the disk: writing fails amid the weights, and nothing has changed."""
    code = """
import resource, signal, sys
from abi_py.config import LoraConfig, TrainableModelConfig
from abi_py.model import LoraModel, TrainableModel
shape = TrainableModelConfig(hidden_dim=16, num_layers=1, num_heads=2, num_kv_heads=1, intermediate_dim=16,
                             vocab_size=19, max_seq_len=8)
LoraModel(TrainableModel(shape), LoraConfig(rank=2)).save(sys.argv[1])
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
try:
    LoraModel(TrainableModel(shape), LoraConfig(rank=64, alpha=1)).save(sys.argv[1])
except OSError as error:
    print(error.strerror)
"""
    words = [sys.executable, "-c", code, str(tmp_path / "adapter")]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[2])}
    done = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=PATIENCE)
    assert (done.stdout, done.stderr) == ("File too large\n", "")
    config, tensors, _ = read_adapter(tmp_path / "adapter")
    assert config.rank == 2
    assert {min(tensor.shape) for tensor in tensors.values()} == {2}
    assert sorted(path.name for path in (tmp_path / "adapter").iterdir()) == [ADAPTER_CONFIG, ADAPTER_WEIGHTS]


def test_damaged_folders(model, folder, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"adapter_config\.json does not exist; give a folder"):
        LoraModel.load(model, tmp_path / "nowhere")
    tensors = dict(read_safetensors(folder / ADAPTER_WEIGHTS))
    tensors = {name: tensor.copy() for name, tensor in tensors.items()}
    write_safetensors(folder / ADAPTER_WEIGHTS, {name: t for name, t in tensors.items() if name != NAME})
    with pytest.raises(CheckpointError, match=r"layers\.0\.self_attn\.q_proj\.lora_A\.weight is missing; rank 3"):
        LoraModel.load(model, folder)
    write_safetensors(folder / ADAPTER_WEIGHTS, tensors | {NAME: tensors[NAME].astype(np.int32)})
    with pytest.raises(CheckpointError, match="is int32; adapters are floats"):
        LoraModel.load(model, folder)
    for text, message in (("{", "is not JSON"), ("[]", "must be an object")):
        (folder / ADAPTER_CONFIG).write_text(text, encoding="utf-8")
        with pytest.raises(CheckpointError, match=message):
            LoraModel.load(model, folder)


def test_another_model_is_refused(folder):
    wider = TrainableModel(TrainableModelConfig(**SHAPE | {"hidden_dim": 32}))
    with pytest.raises(CheckpointError, match=r"has shape \(3, 24\); rank 3 on this model takes \(3, 32\)"):
        LoraModel.load(wider, folder)
    shallower = TrainableModel(TrainableModelConfig(**SHAPE | {"num_layers": 1}))
    with pytest.raises(CheckpointError, match="trained on a model with more layers"):
        LoraModel.load(shallower, folder)


# -- a folder that brings its model along --------------------------------------------------------


def save_base(model, folder):
    folder.mkdir()
    tensors = {entry.hf_name: model.weights[entry.name] for entry in model.parameters.table}
    write_safetensors(folder / "model.safetensors", tensors)
    (folder / "config.json").write_text(json.dumps(write_config(model.config)), encoding="utf-8")


def test_load_model_finds_the_base(model, folder, tmp_path):
    with pytest.raises(CheckpointError, match="names no model that they are of; say where it is: abi-train merge"):
        load_model(folder)
    rewrite(folder, base_model_name_or_path=str(tmp_path / "base"))
    with pytest.raises(CheckpointError, match=r"the model under them, .*base, is not there; put it back"):
        load_model(folder)
    rewrite(folder, base_model_name_or_path=5)
    with pytest.raises(CheckpointError, match="base_model_name_or_path is 5, but must be text"):
        load_model(folder)
    rewrite(folder, base_model_name_or_path=str(tmp_path / "base"))
    save_base(model, tmp_path / "base")
    loaded = load_model(folder)
    assert isinstance(loaded.model, LoraModel)
    assert loaded.directory == folder
    assert loaded.model.base_model == str(tmp_path / "base")
    ids = np.arange(9)[None]
    assert loaded.model.forward(ids).tobytes() == LoraModel.load(model, folder).forward(ids).tobytes()
    rewrite(folder, base_model_name_or_path=str(folder))
    with pytest.raises(CheckpointError, match=r"is the base of .* but holds adapters itself; merge them into theirs"):
        load_model(folder)
