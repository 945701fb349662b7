"""Adapters in mlx-lm itself: ours in its model have our logits, beside the matrices and fused, and its own ours here.

`pip install "mlx[cpu]" mlx-lm` brings it, on Linux too; without it, the tests are skipped.
"""

import json

import numpy as np
import pytest
from world import make_folder

from abi_py.config import LoraConfig
from abi_py.formats.safetensors import read_safetensors, write_safetensors
from abi_py.model import LoraModel
from abi_py.training.loading import load_model

IDS = np.random.default_rng(0).integers(1, 60, (2, 11))
UNTIED = {"tie_embeddings": False}
BALANCED = {"router_aux_loss_coef": 0.0}
WIDE = {"intermediate_dim": 64}  # four times the width, as all of GPT-2
EXPERTS = ("mlp.experts.gate_up_proj", "mlp.experts.down_proj")
CASES = {
    **{family: (family, {}, {}) for family in ("llama", "qwen2", "qwen3", "mistral")},
    "gpt2": ("gpt2", WIDE, {"target_modules": "c_attn,c_fc,mlp.c_proj"}),
    "gemma3": ("gemma3", {"num_layers": 6}, {"target_modules": "q,k,o,down"}),
    "ranks": ("llama", {}, {"rank_pattern": "q_proj=5", "alpha_pattern": "v_proj=11", "use_rslora": True}),
    "head": ("llama", UNTIED, {"target_modules": "lm_head,v"}),
    "embedding": ("llama", UNTIED, {"target_modules": "embed_tokens,up"}),
    "positions": ("gpt2", WIDE, {"target_modules": "wpe,c_attn"}),
    "experts": ("mixtral", BALANCED, {"target_modules": "q,o", "target_parameters": EXPERTS}),
    "ranks of experts": ("qwen3_moe", BALANCED, {"target_parameters": EXPERTS, "rank_pattern": "down_proj=2"}),
    "router": ("mixtral", BALANCED, {"target_parameters": "mlp.gate.weight"}),
    **{f"dora: {family}": (family, {}, {"use_dora": True}) for family in ("llama", "qwen2", "qwen3")},
    "dora: gpt2": ("gpt2", WIDE, {"target_modules": "c_attn,mlp.c_proj", "use_dora": True}),
    "dora: head": ("llama", UNTIED, {"target_modules": "lm_head,k", "use_dora": True, "rank_pattern": "lm_head=5"}),
}


@pytest.fixture
def made(mlx_lm, tmp_path):
    """Return a function that makes a folder, its model here, and a function that loads it there."""
    from mlx_lm.utils import load_model as load_theirs

    def make(family, shape):
        base = make_folder(tmp_path / "base", family=family, **{"num_layers": 2, **shape})
        if family == "gpt2":  # mlx-lm opens OpenAI's own files, of before transformers had a name for all of it
            config = json.loads((base / "config.json").read_text())
            (base / "config.json").write_text(json.dumps({**config, "n_ctx": config["n_positions"]}))
            tensors = read_safetensors(base / "model.safetensors")
            tensors = {name.removeprefix("transformer."): tensor.copy() for name, tensor in tensors.items()}
            write_safetensors(base / "model.safetensors", tensors)
        return load_model(base).model, lambda: load_theirs(base)[0]

    return make


def logits(theirs):
    import mlx.core as mx

    return np.array(theirs(mx.array(IDS)).astype(mx.float32))


def fused(theirs):
    """Return the logits of its model with the adapters in the matrices, by its own `fuse`."""
    from mlx.utils import tree_unflatten

    theirs.update_modules(tree_unflatten([(n, m.fuse()) for n, m in theirs.named_modules() if hasattr(m, "fuse")]))
    return logits(theirs)


@pytest.mark.parametrize("name", CASES)
def test_ours_in_mlx_lm(made, tmp_path, name):
    from mlx_lm.tuner.utils import load_adapters

    family, shape, settings = CASES[name]
    model, theirs = made(family, shape)
    lora = LoraModel(model, LoraConfig(**{"rank": 3, "alpha": 8, **settings}))
    rng = np.random.default_rng(1)
    for tensor, w in lora.weights.items():
        noise = rng.standard_normal(w.shape).astype(np.float32)
        w[...] = w * np.exp(0.3 * noise) if tensor.endswith(".m") else w + 0.2 * noise
    wanted = lora.forward(IDS)
    assert np.abs(wanted - model.forward(IDS)).max() > 1e-2
    lora.save_mlx(tmp_path / "adapter", str(tmp_path / "base"))
    found = load_adapters(theirs(), str(tmp_path / "adapter"))
    size = np.abs(wanted).max()
    assert np.abs(logits(found) - wanted).max() < 1e-4 * size
    assert np.abs(fused(found) - wanted).max() < 1e-4 * size
    assert np.abs(LoraModel.load(model, tmp_path / "adapter").forward(IDS) - wanted).max() < 1e-5 * size


THEIRS = {  # blocks, counted from the last, and keys
    "lora": ("llama", {}, "lora", 2, ["self_attn.q_proj", "mlp.down_proj"]),
    "last block": ("qwen2", {}, "lora", 1, ["self_attn.v_proj"]),
    "head and embedding": ("llama", UNTIED, "lora", 2, ["self_attn.v_proj", "lm_head", "model.embed_tokens"]),
    "all": ("mistral", {}, "lora", 2, None),
    "dora": ("qwen3", {}, "dora", 2, ["self_attn.k_proj", "self_attn.o_proj", "mlp.up_proj"]),
    "dora of all": ("llama", UNTIED, "dora", 2, None),
    "dora of the head": ("llama", UNTIED, "dora", 0, ["lm_head"]),
    "experts": ("mixtral", BALANCED, "lora", 2, None),  # gate and up have an A each, and routers one too
    "up alone": ("qwen3_moe", BALANCED, "lora", 2, ["mlp.switch_mlp.up_proj", "self_attn.q_proj"]),
}


@pytest.mark.parametrize("name", THEIRS)
def test_theirs_here(made, tmp_path, name):
    import mlx.core as mx
    from mlx.utils import tree_flatten, tree_map_with_path
    from mlx_lm.tuner.utils import linear_to_lora_layers, load_adapters

    family, shape, kind, blocks, keys = THEIRS[name]
    model, load = made(family, shape)
    theirs, parameters = load(), {"rank": 4, "scale": 2.5, "dropout": 0.0}
    parameters |= {} if keys is None else {"keys": keys}
    theirs.freeze()
    linear_to_lora_layers(theirs, blocks, parameters, use_dora=kind == "dora")
    mx.random.seed(2)
    theirs.update(
        tree_map_with_path(
            lambda path, w: w * (1.2 if path.endswith(".m") else 1) + 0.1 * mx.random.normal(w.shape),
            theirs.trainable_parameters(),
        )
    )
    theirs.eval()
    folder = tmp_path / "adapter"
    folder.mkdir()
    mx.save_safetensors(str(folder / "adapters.safetensors"), dict(tree_flatten(theirs.trainable_parameters())))
    content = {"fine_tune_type": kind, "num_layers": blocks, "lora_parameters": parameters}
    (folder / "adapter_config.json").write_text(json.dumps(content))
    wanted = logits(theirs)
    assert np.abs(wanted - model.forward(IDS)).max() > 1e-3
    ours = LoraModel.load(model, folder)
    size = np.abs(wanted).max()
    assert np.abs(ours.forward(IDS) - wanted).max() < 1e-4 * size
    ours.save_mlx(tmp_path / "again", str(tmp_path / "base"))
    assert np.abs(logits(load_adapters(load(), str(tmp_path / "again"))) - wanted).max() < 1e-4 * size
