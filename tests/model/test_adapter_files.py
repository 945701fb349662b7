"""Adapters as a GGUF file and as mlx-lm's folder: the same adapters again, and what has no place is refused by name."""

import json
import re

import numpy as np
import pytest

from abi_py.config import LoraConfig, TrainableModelConfig
from abi_py.errors import CheckpointError, ConfigError, NonFiniteError
from abi_py.formats.gguf import F32, PlannedTensor, open_gguf, write_gguf
from abi_py.formats.gguf.ggml_types import BY_NAME
from abi_py.formats.mlx_lm import MLX_WEIGHTS
from abi_py.formats.safetensors import read_safetensors, write_safetensors
from abi_py.model import LoraModel, TrainableModel, gguf_adapter
from abi_py.model.frozen import FrozenModel
from abi_py.model.gguf_adapter import LowRank

SHAPE = {
    **{"hidden_dim": 32, "num_layers": 2, "num_heads": 4, "num_kv_heads": 2, "intermediate_dim": 48},
    **{"vocab_size": 61, "max_seq_len": 32},
}
FAMILIES = {
    **{name: {"family": name} for name in ("llama", "mistral", "qwen2", "qwen3", "gemma3")},
    "gpt2": {"family": "gpt2", "num_kv_heads": 4},
    "mixtral": {"family": "mixtral", "num_experts": 4},
}
IDS = np.arange(20).reshape(2, 10)


def made(name="llama", **changes):
    return TrainableModel(TrainableModelConfig(**(SHAPE | FAMILIES[name] | changes)))


def adapted(model, **changes):
    lora = LoraModel(model, LoraConfig(**({"rank": 3, "alpha": 5.0} | changes)))
    lora.parameters.weights_flat[:] = np.random.default_rng(7).normal(0, 0.2, lora.num_params())
    return lora


# -- there and back -----------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["save_gguf", "save_mlx"])
@pytest.mark.parametrize("name", FAMILIES)
def test_the_same_adapters_come_back(name, form, tmp_path):
    model = made(name)
    lora = adapted(model, target_modules=("attn.c_attn", "mlp.c_proj") if name == "gpt2" else ("q_proj", "k_proj"))
    getattr(lora, form)(tmp_path / "a")
    again = LoraModel.load(model, tmp_path / "a")
    assert again.collect_weights().tobytes() == lora.collect_weights().tobytes()
    assert [*again.weights] == [*lora.weights]
    assert again.forward(IDS).tobytes() == lora.forward(IDS).tobytes()
    assert np.abs(again.forward(IDS) - model.forward(IDS)).max() > 1e-3


EXPERTS = ("mlp.gate.weight", "mlp.experts.gate_up_proj", "mlp.experts.down_proj")


@pytest.mark.parametrize("parameters", [EXPERTS, EXPERTS[:1], EXPERTS[1:2], ("1.mlp.experts.down_proj",)])
@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_adapters_of_experts_come_back_from_gguf(family, parameters, tmp_path):
    """Gate and up each have the A of both, and their rows of B; of the bits nothing changes."""
    model = made("mixtral", family=family, norm_topk_prob=True) if family == "qwen3_moe" else made(family)
    lora = adapted(model, target_parameters=parameters, target_modules="v")
    lora.save_gguf(tmp_path / "a.gguf")
    again = LoraModel.load(model, tmp_path / "a.gguf")
    assert again.collect_weights().tobytes() == lora.collect_weights().tobytes()
    assert again.forward(IDS).tobytes() == lora.forward(IDS).tobytes()
    shapes = {name: tensor.shape for name, tensor in open_gguf(tmp_path / "a.gguf").tensors.items()}
    if EXPERTS[1] in parameters:
        a, b = (lora.weights[f"layers.0.experts_gate_up.{half}"] for half in "ab")
        for part, rows in (("gate", b[:, : b.shape[1] // 2]), ("up", b[:, b.shape[1] // 2 :])):
            name = f"blk.0.ffn_{part}_exps.weight.lora_"
            assert (shapes[f"{name}a"], shapes[f"{name}b"]) == (a.shape, rows.shape)
    assert ("blk.1.ffn_gate_inp.weight.lora_b" in shapes) == (EXPERTS[0] in parameters)

    lora = adapted(model)  # all-linear: gate and up of twice the rank, which the file's one alpha does not say
    lora.save_gguf(tmp_path / "b.gguf")
    assert LoraModel.load(model, tmp_path / "b.gguf").forward(IDS).tobytes() == lora.forward(IDS).tobytes()


@pytest.mark.parametrize("alpha", [6.0, 0.0])
def test_gate_and_up_of_experts_with_adapters_of_their_own(alpha, tmp_path, monkeypatch):
    """As llama.cpp's converter writes PEFT's older folders; one of them alone; an alpha of 0, a factor of 1."""
    model, rng = made("mixtral"), np.random.default_rng(3)
    found = {}
    for name, rank in (("0.experts_gate", 2), ("0.experts_up", 3), ("1.experts_up", 2), ("1.experts_down", 4)):
        experts, outer, inner = model.weights[f"layers.{name}"].shape
        sizes = (experts, rank, inner), (experts, outer, rank)
        found[f"layers.{name}"] = LowRank(*(rng.normal(0, 0.3, each).astype(np.float32) for each in sizes), 6.0 / rank)
    entries = gguf_adapter.adapter_metadata
    monkeypatch.setattr(gguf_adapter, "adapter_metadata", lambda family, _, *rest: entries(family, alpha, *rest))
    gguf_adapter.write_gguf_adapter(tmp_path / "a.gguf", model.config, found)
    merged = LoraModel.load(model, tmp_path / "a.gguf").merged().weights
    for name, w in model.weights.items():
        wanted = w
        if name in found:
            wanted = w + (found[name].scale if alpha else 1.0) * found[name].b @ found[name].a
        assert np.abs(merged[name] - wanted).max() < 1e-5, name


MLX_MODULES = {  # what mlx-lm calls the modules of Llama and Mixtral
    **{f"w_{part}": f"self_attn.{part}_proj" for part in "qkvo"},
    **{f"w_{part}": f"mlp.{part}_proj" for part in ("gate", "up", "down")},
    **{f"experts_{part}": f"block_sparse_moe.switch_mlp.{part}_proj" for part in ("gate", "up", "down")},
    "w_router": "block_sparse_moe.gate",
    "output_proj": "lm_head",
    "token_embedding": "model.embed_tokens",
}
UNTIED = {"tie_embeddings": False}
OF_MLX = {
    "lora": ("llama", {}, {"rank_pattern": "q_proj=5", "alpha_pattern": "v_proj=11"}),
    "dora": ("llama", {}, {"use_dora": True, "use_rslora": True}),
    "ends": ("llama", UNTIED, {"target_modules": "embed_tokens,lm_head,v", "rank_pattern": "lm_head=2"}),
    "dora of the head": ("llama", UNTIED, {"target_modules": "lm_head,down", "use_dora": True}),
    "experts": ("mixtral", {}, {"target_parameters": EXPERTS, "rank_pattern": "down_proj=2", "target_modules": "o"}),
    "all of a mixture": ("mixtral", {}, {}),
}


def weights_of_mlx(folder, model):
    """Return the weights that mlx-lm computes with, by its formulas (`tuner/lora.py`, `dora.py`), and what is left."""
    content, tensors = json.loads((folder / "adapter_config.json").read_text()), read_safetensors(folder / MLX_WEIGHTS)
    tensors, scale = dict(tensors), content["lora_parameters"]["scale"]
    weights = {}
    for name, w in model.weights.items():
        block, _, local = name.rpartition(".")
        module = f"model.{block}.{MLX_MODULES.get(local)}" if block else MLX_MODULES.get(local)
        weights[name] = w.astype(float)
        if f"{module}.lora_a" not in tensors:
            continue
        a, b = (tensors.pop(f"{module}.lora_{half}").astype(float) for half in "ab")
        assert content["lora_parameters"]["rank"] == (a.shape[1])
        key = module if not block else module.removeprefix(f"model.{block}.")
        assert key in content["lora_parameters"]["keys"]
        if w.ndim == 3:
            weights[name] += scale * b @ a
        elif name == "token_embedding":
            weights[name] += scale * a @ b
        else:
            weights[name] += scale * b.T @ a.T
        if content["fine_tune_type"] == "dora":
            weights[name] *= (tensors.pop(f"{module}.m") / np.linalg.norm(weights[name], axis=1))[:, None]
    return weights, tensors


@pytest.mark.parametrize("case", OF_MLX)
def test_mlx_lm_computes_with_the_same_weights(case, tmp_path):
    """By its formulas in NumPy; tests/oracle/test_mlx_lm.py asks mlx-lm itself.  And they come back."""
    family, shape, settings = OF_MLX[case]
    model = made(family, **shape)
    lora = LoraModel(model, LoraConfig(**{"rank": 3, "alpha": 5.0, **settings}))
    for name, w in lora.weights.items():
        noise = np.random.default_rng(len(name)).normal(0, 0.2, w.shape).astype(np.float32)
        w[...] = w * np.exp(noise) if name.endswith(".m") else w + noise
    lora.save_mlx(tmp_path)
    wanted, (found, left) = lora.merged().weights, weights_of_mlx(tmp_path, model)
    assert not left
    for name, w in wanted.items():
        assert np.abs(found[name] - w).max() < 1e-5, name
    again = LoraModel.load(model, tmp_path)
    assert again.lora.use_dora == lora.lora.use_dora
    assert np.abs(again.forward(IDS) - lora.forward(IDS)).max() < 1e-5
    assert np.abs(again.forward(IDS) - model.forward(IDS)).max() > 1e-3


def test_gate_and_up_of_mlx_lm_have_an_a_each(tmp_path):
    """Two adapters in one of twice the rank and the same factor; one of the two alone is half of one."""
    model, rng = made("mixtral"), np.random.default_rng(3)
    tensors = {}
    for block, part, sizes in ((0, "gate", (48, 32)), (0, "up", (48, 32)), (1, "up", (48, 32)), (1, "down", (32, 48))):
        at = f"model.layers.{block}.block_sparse_moe.switch_mlp.{part}_proj.lora_"
        tensors[f"{at}a"] = rng.normal(0, 0.3, (4, 2, sizes[1])).astype(np.float32)
        tensors[f"{at}b"] = rng.normal(0, 0.3, (4, sizes[0], 2)).astype(np.float32)
    write_safetensors(tmp_path / MLX_WEIGHTS, tensors)
    keys = [f"block_sparse_moe.switch_mlp.{part}_proj" for part in ("gate", "up", "down")]
    parameters = {"rank": 2, "scale": 3.0, "dropout": 0.0, "keys": keys}
    content = {"fine_tune_type": "lora", "num_layers": 2, "lora_parameters": parameters}
    (tmp_path / "adapter_config.json").write_text(json.dumps(content))
    lora = LoraModel.load(model, tmp_path)
    ranks = {target.module.partition("layers.")[2]: (target.rank, target.scale) for target in lora.targets()}
    stacks = {"0.mlp.experts.gate_up_proj": (4, 3.0), "1.mlp.experts.gate_up_proj": (2, 3.0)}
    assert ranks == {**stacks, "1.mlp.experts.down_proj": (2, 3.0)}
    wanted, left = weights_of_mlx(tmp_path, model)
    assert not left
    for name, w in lora.merged().weights.items():
        assert np.abs(wanted[name] - w).max() < 1e-5, name

    parameters["dropout"] = 0.1  # it acts in training only
    (tmp_path / "adapter_config.json").write_text(json.dumps(content))
    again = LoraModel.load(model, tmp_path)
    assert again.lora == lora.lora
    assert again.collect_weights().tobytes() == lora.collect_weights().tobytes()
    parameters["dropout"] = 1.5
    (tmp_path / "adapter_config.json").write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match=r"dropout \(1.5\) must be at least 0 and below 1"):
        LoraModel.load(model, tmp_path)


def test_what_mlx_lm_computes_otherwise_is_not_written(tmp_path):
    table = LoraModel(made(**UNTIED), LoraConfig(target_modules="embed_tokens,q", use_dora=True))
    with pytest.raises(ConfigError, match="has lengths of an embedding's rows, and token_embedding has those of"):
        table.save_mlx(tmp_path / "a")
    model = made()
    model.weights["layers.1.w_v"][3] = 0
    with pytest.raises(ConfigError, match=r"divides by the lengths of rows, and layers.1.w_v has rows of zeros"):
        LoraModel(model, LoraConfig(use_dora=True)).save_mlx(tmp_path / "a")
    tied = adapted(made("gpt2"), target_modules="wte,c_attn")
    with pytest.raises(ConfigError, match=r"one matrix for embedding and head, and transformer\.wte has an adapter of"):
        tied.save_mlx(tmp_path / "a")
    assert not [*tmp_path.iterdir()]
    positions = adapted(made("gpt2"), target_modules="wpe,c_attn")
    positions.save_mlx(tmp_path / "a")
    assert LoraModel.load(positions.model, tmp_path / "a").forward(IDS).tobytes() == positions.forward(IDS).tobytes()


def test_adapters_of_other_experts_are_refused(tmp_path):
    adapted(made("mixtral"), target_parameters=EXPERTS).save_gguf(tmp_path / "a.gguf")
    for changes, said in (
        ({"num_experts": 5}, r"ffn_gate_exps.weight.lora_a has shape \(4, 3, 32\), and on this model takes \(5, 3, "),
        ({"intermediate_dim": 80}, r"ffn_gate_exps.weight.lora_b has shape .* and on this model takes \(4, 80, 3\)"),
        ({"num_layers": 1}, "has no place in this model"),
    ):
        with pytest.raises(CheckpointError, match=said):
            LoraModel.load(made("mixtral", **changes), tmp_path / "a.gguf")
    with pytest.raises(CheckpointError, match="has no place in this model, a llama"):
        LoraModel.load(made("llama"), tmp_path / "a.gguf")


@pytest.mark.parametrize("form", ["save_gguf", "save_mlx"])
def test_the_factor_of_rslora_is_in_alpha(form, tmp_path):
    model = made()
    lora = adapted(model, use_rslora=True, dropout=0.25)
    getattr(lora, form)(tmp_path / "a")
    again = LoraModel.load(model, tmp_path / "a")
    assert not again.lora.use_rslora
    assert again.lora.scaling == pytest.approx(lora.lora.scaling, rel=1e-6)
    assert np.abs(again.forward(IDS) - lora.forward(IDS)).max() < 1e-5
    assert again.lora.dropout == (0.25 if form == "save_mlx" else 0)  # a GGUF file does not say it


@pytest.mark.parametrize(("kind", "most"), [("f16", 2.0**-11), ("BF16", 2.0**-8)])
def test_narrower_types(kind, most, tmp_path):
    lora = adapted(made())
    written = lora.save_gguf(tmp_path / "a.gguf", kind)
    assert set(written.by_type()) == {kind.upper()}
    again = LoraModel.load(lora.model, tmp_path / "a.gguf").collect_weights()
    assert np.abs(again / lora.collect_weights() - 1).max() < most
    lora.parameters.weights_flat[3] = 1e6
    if kind == "f16":
        with pytest.raises(NonFiniteError, match="lora_a"):
            lora.save_gguf(tmp_path / "b.gguf", kind)


def test_what_llama_cpp_reads(tmp_path):
    """Names, entries and types are those of its loader; rows of q are in its order, as are the model's own."""
    model = made()
    lora = adapted(model, target_modules=("q_proj", "v_proj"))
    lora.save_gguf(tmp_path / "a.gguf", name="sums")
    file = open_gguf(tmp_path / "a.gguf")
    assert {key: file.metadata[key] for key in file.metadata if key.startswith(("general", "adapter"))} == {
        **{"general.architecture": "llama", "general.type": "adapter", "general.name": "sums"},
        **{"adapter.type": "lora", "adapter.lora.alpha": 5.0},
    }
    assert file.entries["adapter.lora.alpha"].type_name == "float32"
    assert sorted(file.tensors) == sorted(
        f"blk.{i}.attn_{part}.weight.lora_{half}" for i in range(2) for part in "qv" for half in "ab"
    )
    model.export_to_gguf(tmp_path / "m.gguf")
    before, theirs = open_gguf(tmp_path / "m.gguf"), open_gguf(tmp_path / "a.gguf")
    merged = lora.merged()
    merged.export_to_gguf(tmp_path / "merged.gguf")
    after = open_gguf(tmp_path / "merged.gguf")
    for name in ("blk.1.attn_q.weight", "blk.0.attn_v.weight"):
        b = theirs.tensors[f"{name}.lora_b"].numbers(0, theirs.tensors[f"{name}.lora_b"].shape[0])
        a = theirs.tensors[f"{name}.lora_a"].numbers(0, 3)
        w, wanted = (each.tensors[name].numbers(0, len(b)) for each in (before, after))
        assert np.abs(w + 5.0 / 3 * b @ a - wanted).max() < 1e-6


def test_what_mlx_lm_reads(tmp_path):
    lora = adapted(made("gpt2"), target_modules=("attn.c_attn",), dropout=0.1)
    lora.save_mlx(tmp_path / "a", "some/model")
    content = json.loads((tmp_path / "a/adapter_config.json").read_text())
    assert content == {
        **{"fine_tune_type": "lora", "num_layers": 2, "model": "some/model"},
        "lora_parameters": {"rank": 3, "scale": 5.0 / 3, "dropout": 0.1, "keys": ["attn.c_attn"]},
    }
    tensors = read_safetensors(tmp_path / "a/adapters.safetensors")
    assert {name: array.shape for name, array in tensors.items()} == {
        f"model.h.{i}.attn.c_attn.lora_{half}": {"a": (32, 3), "b": (3, 96)}[half] for i in range(2) for half in "ab"
    }


# -- what is read of others ---------------------------------------------------------------------------


def write(path, entries=None, kind="F32", **tensors):
    """Write a file of adapters on the first layer's v, rank 2, with changes."""
    rng = np.random.default_rng(1)
    found = {"blk.0.attn_v.weight.lora_a": rng.normal(0, 1, (2, 32)), "blk.0.attn_v.weight.lora_b": np.ones((16, 2))}
    found |= {name.replace("__", "."): array for name, array in tensors.items()}
    metadata = {
        **{"general.architecture": "llama", "general.type": "adapter", "adapter.type": "lora"},
        "adapter.lora.alpha": F32(4),
        **(entries or {}),
    }
    planned = []
    for name, array in found.items():
        if array is not None:
            own, raw = (kind, np.float16 if kind == "F16" else np.float32) if array.shape[-1] == 32 else ("F32", "f4")
            rows = np.atleast_2d(array).astype(raw)
            take = lambda first, last, rows=rows: rows[first:last]  # noqa: E731
            planned.append(PlannedTensor(name=name, shape=array.shape, kind=BY_NAME[own], rows=take))
    write_gguf(path, {key: value for key, value in metadata.items() if value is not None}, planned)
    return path


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16", "Q8_0"])
def test_one_target_of_one_layer(kind, tmp_path):
    model = made()
    lora = LoraModel.load(model, write(tmp_path / "a.gguf", kind=kind))
    assert lora.lora.target_modules == ("model.layers.0.self_attn.v_proj",)
    assert (lora.lora.rank, lora.lora.scaling) == (2, 2.0)
    assert [*lora.weights] == ["layers.0.w_v.a", "layers.0.w_v.b"]


@pytest.mark.parametrize("alpha", [None, F32(0)])
def test_without_alpha_the_factor_is_1(alpha, tmp_path):
    lora = LoraModel.load(made(), write(tmp_path / "a.gguf", {"adapter.lora.alpha": alpha}))
    assert lora.lora.scaling == 1


@pytest.mark.parametrize(
    ("entries", "tensors", "said"),
    [
        ({"general.type": "model"}, {}, "general.type is 'model'; give a file of adapters"),
        ({"adapter.type": "ia3"}, {}, "adapter.type is 'ia3'; this version computes only 'lora'"),
        ({"adapter.type": None}, {}, "the metadata lack adapter.type"),
        ({"general.architecture": "qwen2"}, {}, "general.architecture is 'qwen2', and the model under it is a llama"),
        ({"adapter.alora.invocation_tokens": np.array([1], np.uint32)}, {}, "this version does not know the entry"),
        ({}, {"output_norm__weight": np.ones(32)}, "output_norm.weight is no part of an adapter"),
        ({}, {"blk__0__attn_v__weight__lora_b": None}, "blk.0.attn_v.weight.lora_b is missing"),
        ({}, {"blk__0__attn_v__weight__lora_a": np.ones((3, 32))}, "must have one rank"),
        ({}, {"blk__0__attn_v__weight__lora_a": np.ones((2, 64))}, "(2, 64), and on this model takes (2, 32)"),
        ({}, {"blk__0__attn_v__weight__lora_b": np.ones((32, 2))}, "(32, 2), and on this model takes (16, 2)"),
        (
            {},
            {f"blk__9__attn_v__weight__lora_{half}": np.ones(n) for half, n in (("a", (2, 32)), ("b", (16, 2)))},
            "blk.9.attn_v.weight has no place in this model, a llama of 2 layers",
        ),
        (
            {},
            {f"blk__0__attn_norm__weight__lora_{half}": np.ones(n) for half, n in (("a", (2, 32)), ("b", (16, 2)))},
            "this model has no such projection",
        ),
        ({"adapter.lora.alpha": F32(-1)}, {}, "alpha (-1.0) must be a positive number"),
    ],
)
def test_what_has_no_place_is_refused_by_name(entries, tensors, said, tmp_path):
    path = write(tmp_path / "a.gguf", entries, **tensors)
    with pytest.raises(CheckpointError, match=re.escape(str(path))) as error:
        LoraModel.load(made(), path)
    assert said in str(error.value)


def test_no_tensor_is_no_adapter(tmp_path):
    path = write(tmp_path / "a.gguf", blk__0__attn_v__weight__lora_a=None, blk__0__attn_v__weight__lora_b=None)
    with pytest.raises(CheckpointError, match="it holds no adapter"):
        LoraModel.load(made(), path)


def test_nan_is_only_read_if_asked_for(tmp_path):
    path = write(tmp_path / "a.gguf", blk__0__attn_v__weight__lora_a=np.full((2, 32), np.nan), kind="F16")
    with pytest.raises(CheckpointError, match="holds NaN or infinity"):
        LoraModel.load(made(), path)
    assert np.isnan(LoraModel.load(made(), path, allow_nonfinite=True).weights["layers.0.w_v.a"]).all()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda content, tensors: content.update(fine_tune_type="full"), "fine_tune_type is 'full'"),
        (lambda content, tensors: content.update(fine_tune_type="dora"), "self_attn.q_proj.m is missing"),
        (lambda content, tensors: content["lora_parameters"].pop("scale"), "lora_parameters lack scale"),
        (lambda content, tensors: content["lora_parameters"].update(rank=10**400), "lora_parameters: rank is"),
        (lambda content, tensors: content["lora_parameters"].update(scale="a"), "lora_parameters: scale is"),
        (lambda content, tensors: content["lora_parameters"].update(rank=9), "rank 9 on this model takes (32, 9)"),
        (lambda content, tensors: content.update(lora_parameters=3), "lora_parameters"),
        (lambda content, tensors: tensors.pop("model.layers.1.self_attn.q_proj.lora_b"), "q_proj.lora_b is missing"),
        (
            lambda content, tensors: tensors.update({"model.layers.0.self_attn.q_proj.bias": np.ones(3, np.float32)}),
            "model.layers.0.self_attn.q_proj.bias is no part of an adapter",
        ),
        (
            lambda content, tensors: tensors.update({"model.layers.7.mlp.up_proj.lora_a": np.ones((32, 3))}),
            "model.layers.7.mlp.up_proj has no place in this model",
        ),
        (
            lambda content, tensors: tensors.update({"model.embed_tokens.lora_a": np.ones((50, 3), np.float32)}),
            "model.embed_tokens: it is embedding and head in one, and an adapter of both is not computed",
        ),
        (
            lambda content, tensors: [
                content.update(fine_tune_type="dora"),
                tensors.update({"model.embed_tokens.lora_a": np.ones((50, 3), np.float32)}),
            ],
            "model.embed_tokens: lengths of an embedding's rows are not computed, but of its columns",
        ),
    ],
)
def test_what_of_mlx_lm_has_no_place_is_refused_by_name(change, said, tmp_path):
    adapted(made(), target_modules=("q_proj",)).save_mlx(tmp_path)
    config, weights = tmp_path / "adapter_config.json", tmp_path / "adapters.safetensors"
    content, tensors = json.loads(config.read_text()), dict(read_safetensors(weights))
    change(content, tensors)
    config.write_text(json.dumps(content))
    write_safetensors(weights, tensors)
    with pytest.raises(CheckpointError, match=re.escape(said)):
        LoraModel.load(made(), tmp_path)


def test_what_cannot_be_written(tmp_path):
    with pytest.raises(ConfigError, match=r"quantize \(Q4_K_M\) must be F32, F16 or BF16 for adapters"):
        adapted(made()).save_gguf(tmp_path / "a.gguf", "Q4_K_M")
    scaled = made("mistral", sliding_window=8)
    with pytest.raises(ConfigError, match="sliding_window"):
        adapted(scaled).save_gguf(tmp_path / "a.gguf")
    assert not [*tmp_path.iterdir()]


def test_on_a_quantised_file_the_model_stays_as_it_is(tmp_path):
    """Adapters that begin add nothing, to the bit, and the bytes of the file are read only."""
    made(hidden_dim=64, intermediate_dim=64).export_to_gguf(tmp_path / "m.gguf", "Q4_0")
    before = (tmp_path / "m.gguf").read_bytes()
    model = FrozenModel.from_gguf(tmp_path / "m.gguf")
    lora = LoraModel(model, LoraConfig(rank=2))
    assert lora.forward(IDS).tobytes() == model.forward(IDS).tobytes()
    lora.save_gguf(tmp_path / "a.gguf")
    assert LoraModel.load(model, tmp_path / "a.gguf").forward(IDS).tobytes() == model.forward(IDS).tobytes()
    assert (tmp_path / "m.gguf").read_bytes() == before
