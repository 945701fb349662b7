"""Folders of Hugging Face's kind: two values for one thing, names in all forms, and what is called by name."""

import json
from pathlib import Path

import numpy as np
import pytest

from abi_py.errors import CheckpointError
from abi_py.families import write_config
from abi_py.formats.safetensors import write_safetensors
from abi_py.model.folder import config_from_huggingface, read_config
from abi_py.training.loading import load_model

FOLDERS = json.loads((Path(__file__).parents[1] / "golden/folders.json").read_text(encoding="utf-8"))
LOGITS = np.array(FOLDERS["logits"])
LAYER = "model.layers.1.self_attn.q_proj"


def tensors():
    return {name: np.array(values, np.float32) / 64 for name, values in FOLDERS["weights"].items()}


@pytest.fixture
def write(tmp_path):
    """Return a function that writes a folder: changed tensors (None: leave out), changes of config.json."""

    def written(change=None, **config):
        content = tensors()
        (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", **FOLDERS["shape"], **config}))
        write_safetensors(tmp_path / "model.safetensors", change(content) if change else content, {"format": "pt"})
        return tmp_path

    return written


def logits_of(folder):
    return load_model(folder).model.forward(np.array([FOLDERS["ids"]]))[0]


def head(content):
    return {"lm_head.weight": content["model.embed_tokens.weight"]}


def without(content, *names):
    return {name: tensor for name, tensor in content.items() if name not in names}


def bare(content, part=""):
    return {name.removeprefix("model.") if part in name else name: tensor for name, tensor in content.items()}


INV_FREQ = {"model.rotary_emb.inv_freq": np.ones(2, np.float32), f"{LAYER[:14]}.rotary_emb.inv_freq": np.ones(2)}


@pytest.mark.parametrize(
    "change",
    [
        None,
        bare,
        lambda content: bare(content, "layers.0"),
        lambda content: content | head(content),
        lambda content: without(content, "model.embed_tokens.weight") | head(content),
        lambda content: bare(without(content, "model.embed_tokens.weight")) | head(content),
        lambda content: content | {"model.lm_head.weight": content["model.embed_tokens.weight"]},
        lambda content: content | INV_FREQ,
        lambda content: {name: tensor.astype(np.float64) for name, tensor in (content | head(content)).items()},
    ],
    ids=[
        "as it is",
        "bare",
        "half bare",
        "two heads",
        "head alone",
        "bare head",
        "model.lm_head",
        "buffers",
        "float64",
    ],
)
def test_weights_under_all_their_names_give_the_logits_of_transformers(write, change):
    assert np.abs(logits_of(write(change)) - LOGITS).max() < 1e-4
    assert LOGITS.std() > 0.3  # zeros would show nothing


def test_an_untied_head_is_used(write):
    folder = write(
        lambda content: content | {"lm_head.weight": 2 * content["model.embed_tokens.weight"]},
        tie_word_embeddings=False,
    )
    assert np.abs(logits_of(folder) - 2 * LOGITS).max() < 2e-4


@pytest.mark.parametrize(("changes", "theta"), FOLDERS["theta"], ids=lambda value: str(value)[:60])
def test_the_base_of_rope_is_that_of_transformers(changes, theta):
    assert config_from_huggingface({"model_type": "llama", **FOLDERS["shape"], **changes}).rope_theta == theta


def test_the_three_bases_of_a_deepzig_folder_must_agree():
    content = {"model_type": "deepzig_conversational", **FOLDERS["shape"], "rope_theta": 500, "rope_base": 500.0}
    assert config_from_huggingface(content).rope_theta == 500
    with pytest.raises(CheckpointError, match=r"rope_theta \(500\) and .*qk_rope_base \(900.0\) must be equal"):
        config_from_huggingface({**content, "qk_rope_base": 900.0})


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        (lambda c: c | {f"{LAYER}.bias": np.ones(8, np.float32)}, [f"{LAYER}.bias"]),
        (lambda c: c | {"model.layers.2.mlp.up_proj.weight": np.ones((12, 8))}, ["model.layers.2.mlp.up_proj.weight"]),
        (lambda c: c | {f"x.{i}": np.ones(1) for i in range(5)}, ["x.0, x.1, x.2 and 2 more"]),
        (lambda c: c | {"norm.weight": np.ones(8)}, ["model.norm.weight and norm.weight"]),
        (lambda c: c | {"lm_head.weight": np.ones((13, 8), np.float32)}, ["lm_head.weight differs", "embed_tokens"]),
        (lambda c: c | {"lm_head.weight": np.ones((12, 8), np.float32)}, ["lm_head.weight differs"]),
        (lambda c: without(c, "model.embed_tokens.weight"), ["model.embed_tokens.weight is missing"]),
        (lambda c: c | {"model.norm.weight": np.ones(8, np.int8)}, ["model.norm.weight is int8"]),
        (lambda c: c | {"model.norm.weight": np.ones(9)}, ["model.norm.weight has shape (9,)"]),
    ],
)
def test_tensors_that_do_not_fit_are_named(write, change, parts):
    with pytest.raises(CheckpointError) as error:
        load_model(write(change))
    assert all(part in str(error.value) for part in parts), error.value


@pytest.mark.parametrize(
    ("changes", "part"),
    [
        (
            {"rope_scaling": {"type": "longrope", "factor": 2.0}},
            r"rope_scaling.rope_type is 'longrope'; .* yarn or llama3",
        ),
        ({"rope_scaling": {"rope_type": ["yarn"]}}, r"rope_scaling.rope_type is \['yarn'\]"),
        ({"rope_parameters": {"rope_type": "yarn", "type": "default"}}, "rope_parameters lacks factor; rope_type yarn"),
        (
            {"rope_scaling": {"type": "dynamic"}, "rope_parameters": {"rope_type": "default"}},
            "rope_scaling lacks factor",
        ),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8}}, "lacks low_freq_factor, high_freq_factor"),
        (
            {"rope_scaling": {"rope_type": "linear", "factor": 0.5}},
            r"rope_scaling: factor \(0.5\) must be a number from 1",
        ),
        ({"rope_scaling": {"rope_type": "linear", "factor": 2, "mscale": 1}}, "rope_scaling: mscale .* acts only with"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 2, "finetuned": True}}, "unknown key 'finetuned'"),
        ({"rope_parameters": {"factor": 2}}, "rope_parameters.factor is 2; this version computes nothing of that kind"),
        ({"rope_parameters": {"full_attention": {"rope_type": "default"}}}, "rope_parameters.full_attention"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor is 0.5"),
        ({"rope_parameters": [1]}, r"rope_parameters is \[1\], but must be an object"),
        ({"rope_theta": None}, "rope_theta"),
        ({"partial_rotary_factor": 0.25}, "partial_rotary_factor is 0.25"),
        ({"sliding_window": 8}, "sliding_window is 8"),
        ({"sliding_window": 8, "use_sliding_window": True}, "sliding_window is 8"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "layer_types names 'sliding_attention'"),
        ({"qkv_bias": True}, "qkv_bias is True"),
        ({"mlp_bias": True}, "mlp_bias is True"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'; this version computes only 'silu' or 'swish'"),
        ({"logits_scaling": 8.0}, "logits_scaling is 8.0"),
        ({"final_logit_softcapping": 30.0}, "final_logit_softcapping is 30.0"),
        ({"num_local_experts": 8}, "num_local_experts is 8"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantization_config"),
        ({"model_type": "phi3"}, "model_type is 'phi3'"),
        ({"layer_types": 5}, "layer_types is 5, but must be a list"),
        ({"rope_theta": 10**400}, r"rope_theta \(1000.*\) must be a number"),
        ({"hidden_size": 10**400}, r"hidden_dim \(1000.*\) must be between -2\^63 and 2\^63"),
        ({"sliding_window": [0] * 1000}, r"sliding_window is \[0, 0, 0, 0, \.\.\.\], less"),
        ({"use_bias": "x" * 1000}, r"use_bias is 'x{37}\.\.\.x{38}'; this version"),
    ],
)
def test_arithmetic_that_is_not_computed_is_refused_by_name(changes, part):
    with pytest.raises(CheckpointError, match=part):
        config_from_huggingface({"model_type": "llama", **FOLDERS["shape"], **changes})


@pytest.mark.parametrize(
    "changes",
    [
        {"sliding_window": 16},
        {"sliding_window": 8, "use_sliding_window": False},
        {"sliding_window": None, "layer_types": ["full_attention"] * 2},
        {"quantization_config": None, "pretraining_tp": 2, "pruned_heads": {}, "attention_dropout": 0.0},
        {"attention_dropout": 0.1, "hidden_dropout": 0.1, "hidden_dropout_prob": 0.1, "resid_pdrop": 0.1},
        {"torch_dtype": "float16", "dtype": "bfloat16", "hidden_act": "swish", "partial_rotary_factor": 1.0},
        {"tie_word_embeddings": None},
    ],
)
def test_what_changes_nothing_passes(changes):
    shape = config_from_huggingface({"model_type": "llama", **FOLDERS["shape"], **changes})
    assert (shape.hidden_dim, shape.num_kv_heads, shape.resolved_head_dim) == (8, 1, 4)
    assert shape.tie_embeddings is ("tie_word_embeddings" not in changes)


@pytest.mark.parametrize("tied", [True, False])
def test_our_own_config_is_read_back(tied):
    other = {"head_dim": 6, "rope_theta": 77.0, "rms_norm_eps": 0.25, "tie_word_embeddings": tied}
    shape = config_from_huggingface({"model_type": "llama", **FOLDERS["shape"], **other})
    assert (shape.rope_theta, shape.norm_eps, shape.tie_embeddings) == (77.0, 0.25, tied)
    assert config_from_huggingface(write_config(shape)) == shape


# -- what stands in the place of weights --------------------------------------------------------


@pytest.mark.parametrize("dtype", ["F8_E4M3", "F8_E5M2", "F4", "C64"])
def test_types_that_are_not_read_are_named(write, dtype):
    folder = write()
    header = json.dumps({"model.norm.weight": {"dtype": dtype, "shape": [8], "data_offsets": [0, 8]}}).encode()
    (folder / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(8))
    with pytest.raises(CheckpointError, match=f"norm.weight' is of type '{dtype}', which this version does not read"):
        load_model(folder)


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_a_git_lfs_pointer_is_called_so(write, name):
    folder = write()
    (folder / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n")
    with pytest.raises(CheckpointError, match=rf"{name} is a git-lfs pointer.*git lfs pull"):
        load_model(folder)


def shards(folder, parts):
    """Write the folder anew in shards: file -> names."""
    content = tensors()
    (folder / "model.safetensors").unlink()
    for file, names in parts.items():
        write_safetensors(folder / file, {name: content[name] for name in names})
    places = {name: file for file, names in parts.items() for name in names}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))


def test_shards(write):
    folder, names = write(), sorted(tensors())
    shards(folder, {"a.safetensors": names[:5], "b.safetensors": names[5:]})
    assert np.abs(logits_of(folder) - LOGITS).max() < 1e-4
    shards_again = {"a.safetensors": names[:6], "b.safetensors": names[5:]}
    write()
    shards(folder, shards_again)
    with pytest.raises(CheckpointError, match=rf"{names[5]} is in a\.safetensors and in b\.safetensors"):
        load_model(folder)
    (folder / "b.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"b\.safetensors., which model\.safetensors\.index\.json names, is miss"):
        load_model(folder)


def test_a_pickle_is_not_opened(write):
    folder = write()
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"neither .*a pickle, pytorch_model\.bin, is never opened"):
        load_model(folder)


def test_read_config_names_the_file(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "opt"}')
    with pytest.raises(CheckpointError, match=r"config\.json: model_type is 'opt'"):
        read_config(tmp_path)


def test_shapes_are_compared_before_a_model_is_made(write, monkeypatch):
    """config.json may say anything; what it says is held against the file first."""
    folder = write(intermediate_size=10**6)
    monkeypatch.setattr("abi_py.model.transformer.Parameters", lambda *_: pytest.fail("a model was made"))
    with pytest.raises(CheckpointError, match=r"instead of \(1000000, "):
        load_model(folder)
    monkeypatch.setattr("abi_py.model.folder.tensor_table", lambda config: pytest.fail("a table was made"))
    with pytest.raises(CheckpointError, match=r"num_hidden_layers in config.json is 9,999, and its files hold 20 "):
        load_model(write(num_hidden_layers=9999))
