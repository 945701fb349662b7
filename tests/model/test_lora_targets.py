"""What gets adapters and what is trained whole: names, counts, gradients, one matrix for both ends, merging, memory."""

import numpy as np
import pytest
from small_models import make_batch

from abi_py.config import LoraConfig, TrainableModelConfig
from abi_py.errors import CheckpointError, ConfigError
from abi_py.families import tensor_table
from abi_py.formats.peft import ADAPTER_WEIGHTS
from abi_py.formats.safetensors import read_safetensors, write_safetensors
from abi_py.gradcheck import check_close
from abi_py.kernels.cross_entropy import cross_entropy_ref
from abi_py.kernels.dropout import dropout_mask_ref
from abi_py.model import LoraModel, TrainableModel, reference
from abi_py.model.lora_targets import Kind, chosen_targets, named, num_trained, without_unused
from abi_py.model.presets import preset
from abi_py.runs.tiny_models import stored_as

LLAMA = {"hidden_dim": 24, "num_layers": 3, "num_heads": 4, "num_kv_heads": 2, "intermediate_dim": 40}
LLAMA |= {"vocab_size": 61, "max_seq_len": 32}


def shape_of(family="llama", **changes):
    sizes = {name: size for name, size in LLAMA.items() if name != "num_kv_heads" or family != "gpt2"}
    return TrainableModelConfig(**sizes, **changes, family=family)


def modules(shape, **settings):
    """Return the modules that get adapters, without what all names begin with."""
    return [target.module.removeprefix("model.layers.") for target in chosen_targets(shape, LoraConfig(**settings))]


def make_lora(rng, family="llama", shape=(), **settings):
    """Return a LoraModel on random weights, norms and biases among them, as it may be after some steps."""
    base = TrainableModel(shape_of(family, **dict(shape)))
    for w in base.weights.values():
        w[...] += 0.1 * rng.standard_normal(w.shape).astype(np.float32)
    lora = LoraModel(base, LoraConfig(**{"rank": 3, **settings}))
    for w in lora.weights.values():
        w[...] += 0.1 * rng.standard_normal(w.shape).astype(np.float32)
    return lora


# -- names ---------------------------------------------------------------------------------------


def test_what_settings_mean():
    shape = shape_of()
    assert len(modules(shape)) == len(modules(shape, target_modules="all-linear")) == 21
    assert modules(shape, target_modules=("q", "down"), layers_to_transform=(1,)) == [
        *("1.self_attn.q_proj", "1.mlp.down_proj")
    ]
    assert modules(shape, target_modules=r".*\.[12]\..*(k|v)_proj", exclude_modules="2.self_attn.k_proj") == [
        *("1.self_attn.k_proj", "1.self_attn.v_proj", "2.self_attn.v_proj")
    ]
    assert modules(shape, target_modules="v", exclude_modules=r".*\.[02]\..*") == ["1.self_attn.v_proj"]
    assert modules(shape, target_modules="model.layers.2.self_attn.q_proj, k", layers_to_transform=0) == [
        *("0.self_attn.k_proj", "2.self_attn.q_proj")  # as in PEFT: a whole name means its module anyway
    ]
    assert modules(shape, modules_to_save="mlp", layers_to_transform="0")[-1] == "0.self_attn.o_proj"
    assert LoraConfig(target_modules={"q": True, "k": False}).target_modules == ("q_proj",)


def test_ranks_and_alphas_are_those_of_the_first_pattern_that_fits():
    config = LoraConfig(rank=4, alpha=8, rank_pattern={"attn.q": 2, "q_proj": 3, r"1\..*": 5}, alpha_pattern="up=1")
    at = "model.layers.1."
    assert [config.rank_of(at + name) for name in ("self_attn.q_proj", "self_attn.k_proj")] == [3, 5]
    assert config.rank_of("model.layers.11.self_attn.k_proj") == 4  # only from a dot on
    assert config.scaling_of("model.layers.0.mlp.up_proj") == 1 / 4
    assert config.scaling == config.scaling_of("model.layers.0.mlp.gate_proj") == 2
    assert config.replace(use_rslora=True).scaling_of(at + "self_attn.q_proj") == 8 / 3**0.5


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"target_modules": "heads"}, r"target_modules \('heads'\): this model has no such projection; try q_proj, "),
        ({"target_modules": ".*attn"}, r"fits no projection of this model; try q_proj"),
        ({"target_modules": "q,k", "exclude_modules": "k"}, r"'k_proj'\): exclude_modules, .* leaves out all that it "),
        ({"exclude_modules": "norm"}, r"exclude_modules \('norm'\): leaves out no projection of this model"),
        ({"exclude_modules": "all-linear"}, r"exclude_modules \('all-linear'\): leaves out no projection"),
        ({"layers_to_transform": (0, 3)}, r"layers_to_transform \(3\): there is no such block; this model has bloc"),
        ({"rank_pattern": "up=2,w1=3"}, r"rank_pattern \('w1=3'\): fits no adapter"),
        ({"target_modules": "q", "alpha_pattern": "k=3"}, r"alpha_pattern \('k_proj=3'\): fits no adapter"),
        ({"rank_pattern": ("up=2", ".*=3", "down=4")}, r"'down_proj=4'\): fits no adapter that one before it does"),
        ({"layers_to_transform": 0, "layers_pattern": "layers,foo"}, r"layers_pattern \('foo'\): stands before no bl"),
        ({"target_modules": "embed_tokens", "dropout": 0.1}, r"dropout \(0.1\): only embeddings get adapters"),
        ({"modules_to_save": "score"}, r"modules_to_save \('score'\): this model has no such module; try embed_tokens"),
        ({"modules_to_save": "layers"}, "no projection is left that gets an adapter; leave out exclude_modules"),
        ({"bias": "all"}, r"bias \(all\): no bias would be trained, this model has none"),
        (
            {"target_modules": "q,lm_head", "modules_to_save": "embed_tokens", "ensure_weight_tying": True},
            "beside lm_head in target_modules: one adapter for embedding and head is not computed",
        ),
        ({"modules_to_save": "norm", "ensure_weight_tying": True}, "acts only where embedding and head are one matrix"),
    ],
)
def test_what_means_nothing_is_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        named(shape_of(), LoraConfig(**settings))


def test_what_peft_lets_pass_is_read_without_it():
    shape, read = shape_of(), LoraConfig(
        target_modules="q", layers_to_transform=0, layers_pattern="layers,foo", alpha_pattern=("q=2", ".*=3"),
    )  # fmt: skip
    found = without_unused(shape, read)
    assert (found.layers_pattern, found.alpha_pattern) == (("layers",), ("q_proj=2",))
    assert chosen_targets(shape, found) == chosen_targets(shape, read)
    assert without_unused(shape, LoraConfig(target_modules="embed_tokens", dropout=0.1)).dropout == 0
    foreign = LoraConfig(layers_to_transform=0, layers_pattern="foo")
    assert without_unused(shape, foreign) == foreign  # without it, it would mean all lists of blocks


# -- counts --------------------------------------------------------------------------------------


def test_counts_equal_the_formulas():
    """Rank times (in + out) of each matrix; no weights are needed."""
    assert num_trained(preset("seed"), LoraConfig(rank=16)) == 81_920 * 16 == 1_310_720
    qwen = TrainableModelConfig(
        hidden_dim=5120, num_layers=48, num_heads=40, num_kv_heads=8, intermediate_dim=13824, vocab_size=152064,
        max_seq_len=4096,
    ).replace(family="qwen2", tie_embeddings=False)  # fmt: skip
    assert num_trained(qwen, LoraConfig(rank=16)) == 68_812_800
    more = LoraConfig(rank=16, rank_pattern="q=32", modules_to_save="lm_head,norm", bias="all")
    norms, biases = 97 * 5120, 48 * (5120 + 2 * 1024)
    assert num_trained(qwen, more) == 68_812_800 + 48 * 16 * 2 * 5120 + 5120 * 152064 + norms + biases


# -- passes --------------------------------------------------------------------------------------

TIED = {"tie_embeddings": True}
UNTIED = {"tie_embeddings": False}
WHOLE = {
    "biases": ("qwen2", {}, {"target_modules": "q,down", "bias": "all"}),
    "their biases": ("qwen2", {}, {"target_modules": "k,down", "bias": "lora_only"}),
    "first norms": ("llama", {}, {"target_modules": "down", "modules_to_save": "layers.0.input_layernorm"}),
    "norms of heads": ("qwen3", {}, {"target_modules": "down", "modules_to_save": "q_norm,k_norm"}),
    "a branch": ("llama", {}, {"modules_to_save": "layers.1.mlp", "rank_pattern": "q=5"}),
    "one of three": ("llama", {}, {"modules_to_save": "k_proj"}),
    "ends": ("llama", UNTIED, {"target_modules": "q", "modules_to_save": "embed_tokens,lm_head,model.norm"}),
    "tied: head": ("llama", TIED, {"target_modules": "q", "modules_to_save": "lm_head"}),
    "tied: embedding": ("gemma3", TIED, {"target_modules": "q", "modules_to_save": "embed_tokens"}),
    "tied: two": ("gpt2", TIED, {"target_modules": "c_attn", "modules_to_save": "wte,wpe,lm_head", "bias": "all"}),
    "tied: one": ("llama", TIED, {"modules_to_save": "lm_head", "ensure_weight_tying": True}),
    "adapted ends": ("llama", UNTIED, {"target_modules": "embed_tokens,lm_head,v", "rank_pattern": "lm_head=5"}),
    "tied: adapted head": ("llama", TIED, {"target_modules": "lm_head,q"}),
    "tied: adapted embedding": ("gemma3", TIED, {"target_modules": "embed_tokens", "modules_to_save": "lm_head"}),
    "adapted tables": ("gpt2", TIED, {"target_modules": "wte,wpe,c_attn", "alpha": 5, "bias": "lora_only"}),
    "experts": ("mixtral", {"router_aux_loss_coef": 0.0}, {"target_modules": "q", "modules_to_save": "layers.1.mlp"}),
}


@pytest.mark.parametrize("name", WHOLE)
def test_gradients_equal_the_reference(rng, name):
    """Those of what is trained whole are those of the merged model, whose layers these are."""
    family, shape, settings = WHOLE[name]
    lora = make_lora(rng, family, shape, **settings)
    ids, labels = make_batch(rng, lora, 2, 7)
    base = lora.model.collect_weights()
    weights = reference.widened(lora.model.weights)
    own = {entry.name: entry for entry in tensor_table(lora.stored_config())}
    if "output_proj" in own:
        weights.setdefault("output_proj", weights["token_embedding"])
    scales = {target.tensor.name: target.scale for target in chosen_targets(lora.config, lora.lora)}
    trained = reference.widened(lora.weights)
    whole = {entry: trained[entry] for entry in trained if entry in own}
    weights |= whole
    tables = {target.tensor.name for target in lora.targets() if target.kind is Kind.TABLE}
    for each, scale in scales.items():
        product = trained[f"{each}.b"] @ trained[f"{each}.a"].T if each in tables else None
        product = trained[f"{each}.b"] @ trained[f"{each}.a"] if product is None else product.T
        weights[each] = weights[each] + scale * product
    for passes in (1, 2):  # the first clears what layers add to, the second adds
        loss = lora.compute_loss(ids, labels, backward=True).loss
        expected, dw = reference.loss_and_gradients(lora.layers, weights, ids, labels)
        assert abs(loss - expected) < 1e-5
        for each in whole:
            check_close(lora.gradients[each], passes * dw[each], 1e-4, each)
        for each, s in scales.items():
            a, b = trained[f"{each}.a"], trained[f"{each}.b"]
            if each in tables:  # W + s A Bᵀ
                check_close(lora.gradients[f"{each}.a"], passes * s * (dw[each] @ b), 1e-4, each)
                check_close(lora.gradients[f"{each}.b"], passes * s * (dw[each].T @ a), 1e-4, each)
                continue
            check_close(lora.gradients[f"{each}.a"], passes * s * (b.T @ dw[each]), 1e-4, each)
            check_close(lora.gradients[f"{each}.b"], passes * s * (dw[each] @ a.T), 1e-4, each)
    assert lora.model.collect_weights().tobytes() == base.tobytes()
    merged = lora.merged()
    assert merged.config == lora.stored_config()
    assert np.abs(merged.forward(ids) - lora.forward(ids)).max() < 1e-5
    copy = LoraModel(lora.model, lora.lora)
    assert copy.forward(ids).tobytes() == lora.model.forward(ids).tobytes()  # what is fresh changes no bit
    if merged.config == lora.config:
        lora.merge()
        assert lora.model.weights.keys() == merged.weights.keys()
        assert lora.model.collect_weights().tobytes() == merged.collect_weights().tobytes()
        lora.unmerge()
        assert lora.model.collect_weights().tobytes() == base.tobytes()
    else:
        with pytest.raises(RuntimeError, match=r"one matrix in the model, and two now; merged\(\) returns a copy"):
            lora.merge()


def test_copies_on_a_base_that_is_only_read(rng):
    """What is trained whole is a float32 copy of what lies there in bfloat16."""
    base = TrainableModel(shape_of("qwen2"))
    for name in base.weights:
        base.weights[name] = (base.weights[name].view(np.uint32) & np.uint32(0xFFFF0000)).view(np.float32)
    settings = {"rank": 2, "modules_to_save": "embed_tokens,k_proj,norm", "bias": "all"}
    plain, narrow = (LoraModel(each, LoraConfig(**settings)) for each in (base, stored_as(base, "bf16")))
    ids, labels = make_batch(rng, plain, 2, 7)
    for lora in (plain, narrow):
        lora.compute_loss(ids, labels, backward=True)
    assert narrow.weights["layers.0.w_k"].tobytes() == base.weights["layers.0.w_k"].tobytes()
    assert narrow.forward(ids).tobytes() == plain.forward(ids).tobytes()
    for name, gradient in narrow.gradients.items():
        check_close(gradient, plain.gradients[name], 1e-5, name)


@pytest.mark.parametrize("accumulates", [False, True])
def test_the_memory_plan_counts_what_is_made(rng, accumulates):
    """Gradients of what is trained whole lend memory, as those of a whole model do."""
    lora = make_lora(rng, modules_to_save="layers.0.mlp,layers.1.mlp,lm_head", shape=UNTIED)
    ids, labels = make_batch(rng, lora, 4, 16)
    plan = lora.memory_plan(4, 16, accumulates=accumulates)
    for _ in range(1 + accumulates):
        lora.compute_loss(ids, labels, backward=True)
    made = lora.stack.arena.nbytes()
    assert plan["gradients"] == lora.parameters.gradients_flat.nbytes
    assert plan["weights"] == lora.parameters.weights_flat.nbytes + lora.model.parameters.weights_flat.nbytes
    if not accumulates:
        assert abs(plan["saved activations"] + plan["scratch"] - made) < 0.02 * made


def test_one_matrix_of_two_ends_is_saved_by_both_names(rng, tmp_path):
    """As PEFT writes it; what differs is no adapter of such a model."""
    lora = make_lora(rng, target_modules="q", modules_to_save="lm_head", ensure_weight_tying=True, shape=TIED)
    lora.save(tmp_path)
    tensors = {name: tensor.copy() for name, tensor in read_safetensors(tmp_path / ADAPTER_WEIGHTS).items()}
    names = ["base_model.model.lm_head.weight", "base_model.model.model.embed_tokens.weight"]
    assert [name for name in sorted(tensors) if "lora_" not in name] == names
    ids, _ = make_batch(rng, lora)
    assert LoraModel.load(lora.model, tmp_path).forward(ids).tobytes() == lora.forward(ids).tobytes()
    write_safetensors(tmp_path / ADAPTER_WEIGHTS, tensors | {names[0]: tensors[names[1]] + 1})
    with pytest.raises(CheckpointError, match="differs from the embedding, and ensure_weight_tying makes them one"):
        LoraModel.load(lora.model, tmp_path)


def test_a_head_with_dropout(rng):
    """One mask for the loss and its gradients, by the formulas in float64; none where nothing is trained."""
    lora = make_lora(rng, target_modules="lm_head", dropout=0.4, shape=UNTIED)
    ids, labels = make_batch(rng, lora, 2, 7)
    head, w = lora.stack.head, reference.widened(lora.weights)
    adapter = head.adapter
    seed = (adapter.seed + adapter.streams * 1 + adapter.stream) % 2**63
    lora.compute_loss(ids, labels, backward=True)
    lora.zero_gradients()
    loss = lora.compute_loss(ids, labels, backward=True).loss  # the second pass, so draw 1
    hidden = reference.widened({"x": lora.stack.forward(ids.ravel(), lora._runs.run((2, 7), None, None))})["x"]
    mask = dropout_mask_ref(hidden.shape, 0.4, seed) / 0.6
    a, b, s = w["output_proj.a"], w["output_proj.b"], adapter.scale
    logits = hidden @ lora.model.weights["output_proj"].T + s * (hidden * mask) @ a.T @ b.T
    losses, _, _, dz = cross_entropy_ref(logits, labels.ravel())
    count = (labels >= 0).sum()
    assert abs(loss - losses.sum() / count) < 1e-5
    u, du = s * (hidden * mask) @ a.T, s * dz / count @ b
    check_close(lora.gradients["output_proj.b"], (dz / count).T @ u, 1e-4)
    check_close(lora.gradients["output_proj.a"], du.T @ (hidden * mask), 1e-4)


def test_what_of_it_has_no_place_in_other_files(rng, tmp_path):
    """An embedding's adapter goes into a GGUF file and comes back; tied files have no room."""
    lora = make_lora(rng, target_modules="embed_tokens,lm_head,q", shape=UNTIED)
    lora.save_gguf(tmp_path / "a.gguf")
    again, (ids, _) = LoraModel.load(lora.model, tmp_path / "a.gguf"), make_batch(rng, lora)
    assert np.abs(again.forward(ids) - lora.forward(ids)).max() < 1e-6
    tied = make_lora(rng, target_modules="embed_tokens", shape=TIED)
    with pytest.raises(ConfigError, match=r"one matrix for embedding and head, and model.embed_tokens has an adapter"):
        tied.save_gguf(tmp_path / "b.gguf")
    whole = make_lora(rng, target_modules="q", modules_to_save="norm")
    with pytest.raises(ConfigError, match=r"holds adapters alone, and .*attn_norm.* are trained whole"):
        whole.save_gguf(tmp_path / "b.gguf")


def test_an_embedding_that_is_not_the_models_is_refused(rng, tmp_path):
    """PEFT writes the frozen one beside an adapter on it."""
    lora = make_lora(rng, target_modules="embed_tokens,q", shape=UNTIED)
    lora.save(tmp_path)
    tensors = {name: tensor.copy() for name, tensor in read_safetensors(tmp_path / ADAPTER_WEIGHTS).items()}
    name, own = "base_model.model.model.embed_tokens.base_layer.weight", lora.model.weights["token_embedding"]
    write_safetensors(tmp_path / ADAPTER_WEIGHTS, {**tensors, name: own})
    LoraModel.load(lora.model, tmp_path)
    write_safetensors(tmp_path / ADAPTER_WEIGHTS, {**tensors, name: own + 1})
    with pytest.raises(CheckpointError, match=r"holds a model.embed_tokens of its own, and the model under it has ano"):
        LoraModel.load(lora.model, tmp_path)
