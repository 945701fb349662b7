"""Adapters on experts and routers (PEFT's target_parameters): names, counts, gradients, bits, frozen bases, files."""

import json

import numpy as np
import pytest
from small_models import make_batch, make_model

from abi_py.config import LoraConfig
from abi_py.errors import CheckpointError, ConfigError
from abi_py.formats.peft import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from abi_py.formats.safetensors import read_safetensors, write_safetensors
from abi_py.generation.decoder import Decoder
from abi_py.gradcheck import check_close, check_gradient
from abi_py.model import LoraModel, TrainableModel, reference
from abi_py.model.arena import memory_plan
from abi_py.model.lora_layers import planned
from abi_py.model.lora_targets import chosen_targets, named, num_trained, report, trained_table
from abi_py.runs.tiny_models import stored_as

SHAPE = {"hidden_dim": 32, "num_experts": 5, "experts_per_token": 2, "intermediate_dim": 32, "num_layers": 2}
FAMILIES = {
    "mixtral": {"family": "mixtral", **SHAPE},
    "qwen3_moe": {"family": "qwen3_moe", "expert_dim": 64, **SHAPE},
}
BOTH = ("mlp.experts.gate_up_proj", "mlp.experts.down_proj")
ROUTER = "mlp.gate.weight"
ALL = (ROUTER, *BOTH)
PEFT_NAME = "base_model.model.model.layers.0.mlp.experts"


def make_base(family="mixtral", **changes):
    """Return a model whose routers send tokens to different experts."""
    model = make_model(3.0, **{**FAMILIES[family], **changes})
    for name, w in model.weights.items():
        if name.endswith("w_router"):
            w *= 20
    return model


def make_lora(base, rng, **settings):
    """Return adapters as they may be after some steps."""
    lora = LoraModel(base, LoraConfig(**{"rank": 3, "alpha": 5, "target_parameters": BOTH, **settings}))
    for w in lora.weights.values():
        w[...] += 0.1 * rng.standard_normal(w.shape).astype(np.float32)
    return lora


def with_adapters(base, trained, lora):
    """Return the weights W + s B A of each expert and router, written down, in the type of `trained`."""
    weights = dict(base)
    for target in lora.targets():
        name, own = target.tensor.name, matrices_of(target)
        product = target.scale * np.einsum("...or,...ri->...oi", trained[f"{name}.b"], trained[f"{name}.a"])
        for each, half in zip(own, np.split(product, len(own), axis=-2), strict=True):
            weights[each] = weights[each] + half
    return weights


def matrices_of(target):
    """Return the names of what an adapter is on."""
    at, _, last = target.tensor.name.rpartition(".")
    return [f"{at}.{own}" for own in target.matrices or (last,)]


def gradients_by_hand(lora, trained, dw):
    """Return s Bᵀ dW and s dW Aᵀ of each expert and router."""
    found = {}
    for target in lora.targets():
        name = target.tensor.name
        whole = target.scale * np.concatenate([dw[own] for own in matrices_of(target)], axis=-2)
        found[f"{name}.a"] = np.einsum("...or,...oi->...ri", trained[f"{name}.b"], whole)
        found[f"{name}.b"] = np.einsum("...oi,...ri->...or", whole, trained[f"{name}.a"])
    return found


# -- names and numbers -------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_what_a_name_means_and_how_much_it_trains(family):
    shape, (inner, width, experts) = make_base(family).config, (64 if family == "qwen3_moe" else 32, 32, 5)
    gate_up, down = 3 * experts * (width + 2 * inner), 3 * experts * (inner + width)

    def count(**settings):
        return num_trained(shape, LoraConfig(rank=3, **settings))

    assert count(target_parameters=BOTH) == 2 * (gate_up + down)
    assert count(target_parameters="experts.down_proj") == 2 * down
    assert count(target_parameters="1.mlp.experts.gate_up_proj") == gate_up
    assert count(target_parameters=BOTH, rank_pattern="down_proj=6") == 2 * (gate_up + 2 * down)
    attention, router = count(target_modules="q,k,v,o"), 3 * (width + experts)
    every = attention + 2 * (router + 2 * gate_up + down)  # gate and up, which were two modules, have twice the rank
    assert count(target_parameters=BOTH, target_modules="all-linear") == count() == every
    assert count(target_parameters=ROUTER) == count(target_modules="mlp.gate") == 2 * router
    names = "w1,w2,w3" if family == "mixtral" else "gate,up,down_proj"
    assert count(target_modules=names) == count(target_modules=names, alpha=7) == 2 * (2 * gate_up + down)
    q = count(target_modules="q") / 2
    assert count(target_modules=f"q,{names}", layers_to_transform=1) == q + 2 * gate_up + down
    assert count(exclude_modules="gate_up_proj,down_proj,mlp.gate") == attention
    assert count(exclude_modules="0.mlp.gate") == every - router
    assert count(rank_pattern="gate_up_proj=3,mlp.gate.weight=6") == every - 2 * gate_up + 2 * router
    assert count(target_modules=r".*layers\.1\.(self_attn\.q_proj|mlp\.gate)") == q + router
    assert "rank 3: q_proj, mlp.experts.down_proj" in report(
        shape, LoraConfig(rank=3, target_modules="q", target_parameters="mlp.experts.down_proj")
    )


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"target_modules": "q,gate,up,down", "use_rslora": True, "rank_pattern": "1.mlp.experts.0.(gate|up)_proj=5"},
        {"exclude_modules": "experts.gate_up_proj,1.mlp.gate", "rank_pattern": "down_proj=4"},
        {"layers_to_transform": 1, "alpha_pattern": "gate_up_proj=4"},
        {"target_modules": "down_proj,mlp.gate", "target_parameters": "gate_up_proj"},
        {"target_modules": "all-linear", "modules_to_save": "0.mlp"},
    ],
)
@pytest.mark.parametrize("dense", [(), (0,)])
def test_a_named_configuration_stays_as_it_is(dense, settings):
    """As it is written and read, and repeated when a run goes on; in a model with a dense block, too."""
    shape = make_base("qwen3_moe", mlp_only_layers=dense).config
    once = named(shape, LoraConfig(rank=3, **settings))
    assert named(shape, once) == once
    assert trained_table(shape, named(shape, once.replace(**settings))) == trained_table(shape, once)


@pytest.mark.parametrize(
    ("settings", "gate_up", "down"),
    [
        ({"rank_pattern": ".*=5"}, (10, 0.4), (5, 0.4)),
        ({"rank_pattern": ".*=4", "rank": 8}, (8, 0.5), (4, 0.5)),  # the sum is the rank of all
        ({"alpha_pattern": ".*experts.*=32"}, (4, 16), (2, 16)),
        ({"alpha_pattern": ".*experts.*=32", "use_rslora": True}, (4, 32 / 2**0.5), (2, 32 / 2**0.5)),
        ({"alpha_pattern": ".*experts.*=32", "rank_pattern": "w2=4"}, (4, 16), (4, 8)),
        ({"rank_pattern": ["w1=3", "w3=3", ".*experts.*=7"]}, (6, 2 / 3), (7, 2 / 7)),
        ({"rank_pattern": ["gate_up_proj=4", ".*=5"], "alpha_pattern": ".*=10"}, (4, 5), (5, 2)),  # its own
    ],
)
def test_a_pattern_that_fits_modules_and_their_parameter(settings, gate_up, down):
    """The sums of rank and alpha go before it, so that the factor is the one that the modules are given."""
    shape, settings = make_base().config, {"rank": 2, "alpha": 2, "target_modules": "w1,w2,w3", **settings}
    config = named(shape, LoraConfig(**settings))
    targets = chosen_targets(shape, config)
    found = {target.module.partition("layers.")[2]: (target.rank, target.scale) for target in targets}
    for block in range(2):
        assert found.pop(f"{block}.mlp.experts.gate_up_proj") == pytest.approx(gate_up)
        assert found.pop(f"{block}.mlp.experts.down_proj") == pytest.approx(down)
    assert not found
    assert named(shape, config) == config


def test_a_sum_is_of_the_blocks_alone_whose_modules_are_meant():
    shape = make_base().config
    modules = r".*layers\.1\..*\.w[123]"
    config = named(shape, LoraConfig(rank=2, target_modules=modules, target_parameters=f"0.{BOTH[0]}"))
    ranks = {target.module.partition("layers.")[2]: target.rank for target in chosen_targets(shape, config)}
    assert ranks == {f"0.{BOTH[0]}": 2, f"1.{BOTH[0]}": 4, f"1.{BOTH[1]}": 2}


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"target_parameters": "experts.up_proj"}, r"target_parameters \('experts.up_proj'\): this model has no such "),
        ({"target_parameters": "gate.bias"}, "try mlp.gate.weight, mlp.experts.gate_up_proj or mlp.experts.down_proj"),
        ({"target_modules": "q,w1"}, "w1 of experts without w3, and both are one matrix, model.layers.0.mlp.experts.g"),
        ({"target_modules": "w1,w3", "rank_pattern": "w1=2"}, "adapter has one factor; give them one rank and alpha"),
        ({"dropout": 0.1}, r"dropout \(0.1\) must be 0.0 where target_modules mean experts or routers \(model.lay"),
        ({"target_modules": "mlp.gate", "use_dora": True}, r"use_dora \(True\) must be False .* name other modules"),
        ({"target_parameters": ROUTER, "dropout": 0.1}, r"dropout \(0.1\) must be 0 beside target_parameters"),
        ({"target_parameters": "q_proj.weight"}, r"target_parameters \('q_proj.weight'\)"),
        ({"target_parameters": r".*down_proj"}, r"target_parameters \('\.\*down_proj'\)"),  # no expressions, as in PEFT
        ({"target_parameters": "xdown_proj"}, r"target_parameters \('xdown_proj'\)"),
        ({"target_parameters": BOTH, "dropout": 0.1}, r"dropout \(0.1\) must be 0 beside target_parameters"),
        ({"target_parameters": BOTH, "use_dora": True}, r"use_dora \(True\) must be false beside target_parameters"),
        ({"target_parameters": BOTH, "modules_to_save": "layers.1.mlp"}, "modules_to_save trains model.layers.1"),
    ],
)
def test_what_is_refused(settings, said):
    with pytest.raises(ConfigError, match=said):
        LoraModel(make_base(), LoraConfig(**settings))


def test_a_model_without_experts_has_none():
    with pytest.raises(ConfigError, match="it has no experts; name modules in target_modules"):
        LoraModel(make_model(3.0), LoraConfig(target_parameters=BOTH))


# -- passes ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"target_parameters": BOTH[:1]},
        {"target_parameters": BOTH[1:], "use_rslora": True},
        {"target_parameters": ALL, "rank_pattern": "mlp.gate.weight=5"},
        {"target_parameters": ROUTER},
        {"target_parameters": f"1.{ROUTER}"},
    ],
)
def test_gradients_equal_the_reference(rng, family, settings):
    lora = make_lora(make_base(family), rng, **settings)
    ids, labels = make_batch(rng, lora)
    before = lora.model.collect_weights()
    base, trained = reference.widened(lora.model.weights), reference.widened(lora.weights)
    merged = with_adapters(base, trained, lora)
    for passes in (1, 2):  # the first overwrites, the second adds
        found = lora.compute_loss(ids, labels, backward=True)
        loss = found.loss + sum(found.penalties.values())
        wanted, dw = reference.loss_and_gradients(lora.layers, merged, ids, labels)
        if "target_parameters" not in settings or "1." not in settings["target_parameters"]:  # else a part is constant
            assert abs(loss - wanted) < 1e-5
        for name, gradient in gradients_by_hand(lora, trained, dw).items():
            check_close(lora.gradients[name], passes * gradient, 1e-4, name)
    assert lora.model.collect_weights().tobytes() == before.tobytes()


@pytest.mark.parametrize("half", "ab")
@pytest.mark.parametrize("name", ["experts_gate_up", "experts_down", "w_router"])
def test_gradients_equal_finite_differences(rng, name, half):
    lora = make_lora(make_base(), rng, target_parameters=ALL)
    ids, labels = make_batch(rng, lora)
    base, trained = reference.widened(lora.model.weights), reference.widened(lora.weights)
    name = f"layers.0.{name}.{half}"  # under another block of adapters

    def loss(changed):
        merged = with_adapters(base, {**trained, name: changed}, lora)
        return reference.loss_and_gradients(lora.layers, merged, ids, labels)[0]

    _, dw = reference.loss_and_gradients(lora.layers, with_adapters(base, trained, lora), ids, labels)
    wanted = gradients_by_hand(lora, trained, dw)[name]
    check_gradient(loss, trained[name], wanted, rng, 1e-6, name)
    lora.compute_loss(ids, labels, backward=True)
    check_close(lora.gradients[name], wanted, 1e-4, name)


def test_bits(rng, same_bits):
    """Fresh adapters change none; threads and checkpointing change none of a step."""
    base = make_base()
    ids, labels = make_batch(rng, base)
    fresh = LoraModel(base, LoraConfig(target_parameters=ALL))
    assert fresh.forward(ids).tobytes() == base.forward(ids).tobytes()

    def step(**changes):
        lora = make_lora(make_base(**changes), np.random.default_rng(4), target_parameters=ALL)
        loss = lora.compute_loss(ids, labels, backward=True)
        return loss.token_losses, lora.parameters.gradients_flat

    same_bits(step)
    plain = [each.tobytes() for each in step()]
    for strategy in ("full", "attention_only"):
        assert [each.tobytes() for each in step(checkpointing=strategy)] == plain


def test_an_expert_without_rows_gets_no_gradient(rng):
    lora = make_lora(make_base(), rng)
    ids, labels = np.array([[3]]), np.array([[5]])  # one token
    lora.parameters.gradients_flat.fill(np.nan)
    lora.zero_gradients()
    lora.compute_loss(ids, labels, backward=True)
    for name, gradient in lora.gradients.items():
        assert np.isfinite(gradient).all()
        assert np.count_nonzero(gradient.any(axis=(1, 2))) == 2, name


def test_penalties_reach_the_adapter_of_a_router(rng):
    """That alone learns, from the balance of the load, which experts tokens are sent to."""
    lora = make_lora(make_base(router_aux_loss_coef=0.5), rng, target_parameters=ROUTER)
    base = TrainableModel(lora.config.replace(router_aux_loss_coef=0.0), lora.model.collect_weights())
    plain = LoraModel(base, lora.lora)
    plain.parameters.weights_flat[:] = lora.parameters.weights_flat
    ids, labels = make_batch(rng, lora)
    penalties = [model.compute_loss(ids, labels, backward=True).penalties for model in (lora, plain)]
    assert penalties[0]["load_balancing"] > penalties[1].get("load_balancing", 0.0)
    name = "layers.0.w_router.a"
    assert np.abs(lora.gradients[name] - plain.gradients[name]).max() > 1e-4


def test_bfloat16_is_near(rng):
    lora = make_lora(make_base(), rng)
    ids, labels = make_batch(rng, lora)
    lora.compute_loss(ids, labels, backward=True)
    wanted = {name: gradient.copy() for name, gradient in lora.gradients.items()}
    lora.zero_gradients()
    lora.compute_loss(ids, labels, backward=True, precision="bf16")
    for name, gradient in lora.gradients.items():
        assert np.linalg.norm(gradient - wanted[name]) < 0.1 * np.linalg.norm(wanted[name]), name


@pytest.mark.parametrize("storage", ["q8_0", "bf16", "nf4-dq"])
def test_on_a_frozen_base_as_it_lies(rng, storage):
    """Passes, decoding and merging are those on the decoded experts."""
    frozen = stored_as(make_base("qwen3_moe", hidden_dim=64), storage)
    bases = frozen, frozen.widened()
    ours, plain = (make_lora(base, np.random.default_rng(5), target_parameters=ALL) for base in bases)
    ids, labels = make_batch(rng, ours)
    assert LoraModel(frozen, ours.lora).forward(ids).tobytes() == frozen.forward(ids).tobytes()
    for lora in (ours, plain):
        lora.compute_loss(ids, labels, backward=True)
    check_close(ours.parameters.gradients_flat, plain.parameters.gradients_flat, 1e-5)
    check_close(ours.forward(ids), plain.forward(ids), 1e-5)
    check_close(ours.merged().forward(ids), ours.forward(ids), 1e-4)
    decoder = Decoder(ours.for_decoding(), integer=False)
    found = decoder.prefill(0, ids[0, :3].astype(np.int32)).copy()
    check_close(found, ours.forward(ids[:1, :3])[0, -1], 1e-4)
    step = decoder.step(np.zeros(1, int), ids[0, 3:4].astype(np.int32))[0]
    check_close(step, ours.forward(ids[:1, :4])[0, -1], 1e-4)
    _, kept = ours.stored_tensors()
    stack, whole = kept["layers.1.experts_up"], ours.merged().weights["layers.1.experts_up"]
    check_close(stack.widened(), whole, 1e-6)
    check_close(np.concatenate([part.reshape(-1) for part in stack.numbers()]), whole.reshape(-1), 1e-6)


def test_merge_and_unmerge(rng):
    lora = make_lora(make_base(), rng, target_parameters=ALL)
    ids, _ = make_batch(rng, lora)
    wanted, before = lora.forward(ids).copy(), lora.model.collect_weights()
    check_close(lora.merged().forward(ids), wanted, 1e-5)
    assert lora.model.collect_weights().tobytes() == before.tobytes()
    lora.merge()
    assert lora.model.collect_weights().tobytes() == lora.merged().collect_weights().tobytes()
    check_close(lora.forward(ids), wanted, 1e-5)
    lora.unmerge()
    assert lora.model.collect_weights().tobytes() == before.tobytes()
    assert lora.forward(ids).tobytes() == wanted.tobytes()


def test_the_plan_and_the_operations(rng):
    """A plan without a model is that of the model; u of each adapter is saved, K ranks of a token."""
    base = make_base()
    lora = make_lora(base, rng)
    made, table = planned(base.config, lora.lora)
    frozen = sum(w.nbytes for w in base.weights.values())
    plan = memory_plan(base.config, 2, 8, adapted=(made, table), frozen=frozen)
    assert plan == lora.memory_plan(2, 8)
    down = LoraModel(base, lora.lora.replace(target_parameters=BOTH[1:]))
    with_gate_up, without = (each.memory_plan(2, 8, accumulates=True)["saved activations"] for each in (lora, down))
    assert with_gate_up - without == 2 * 4 * 16 * 2 * 3  # blocks, bytes, tokens, K, R
    more = lora.flops_per_token(8) - down.flops_per_token(8)
    assert more == 2 * 6 * 2 * 3 * (32 + 2 * 32)  # blocks, operations, K, R, (in + out)

    routed = LoraModel(base, lora.lora.replace(target_parameters=ALL))
    plan = memory_plan(base.config, 2, 8, adapted=planned(base.config, routed.lora), frozen=frozen)
    assert plan == routed.memory_plan(2, 8)
    saved = [each.memory_plan(2, 8, accumulates=True)["saved activations"] for each in (routed, lora)]
    assert saved[0] - saved[1] == 2 * 4 * 16 * 3  # blocks, bytes, tokens, R
    more = routed.flops_per_token(8) - lora.flops_per_token(8)
    assert more == 2 * 6 * 3 * (32 + 5) - 2 * 3 * 32  # there is no gradient of the first block's input


# -- files -------------------------------------------------------------------------------------------


def test_saved_as_peft_has_it(rng, tmp_path):
    """A below each other, columns of B in turns; the first of two adapters is inside the second."""
    lora = make_lora(make_base(), rng, rank_pattern="down_proj=2")
    lora.save(tmp_path / "a")
    tensors = read_safetensors(tmp_path / "a" / ADAPTER_WEIGHTS)
    for name, inside in (("gate_up", ".base_layer"), ("down", "")):
        a, b = (lora.weights[f"layers.0.experts_{name}.{half}"] for half in "ab")
        stored = {half: tensors[f"{PEFT_NAME}{inside}.lora_{half}.weight"] for half in "AB"}
        experts, rank, inner = a.shape
        assert stored["A"].shape == (experts * rank, inner)
        assert stored["B"].shape == (b.shape[1], rank * experts)
        for e in range(experts):
            assert np.array_equal(stored["A"][e * rank : (e + 1) * rank], a[e])
            assert np.array_equal(stored["B"][:, e::experts], b[e])
    said = json.loads((tmp_path / "a" / ADAPTER_CONFIG).read_text())
    assert (said["target_modules"], said["target_parameters"]) == ([], list(BOTH))
    again = LoraModel.load(lora.model, tmp_path / "a")
    assert again.lora == lora.lora
    assert again.collect_weights().tobytes() == lora.collect_weights().tobytes()

    router = make_lora(make_base(), rng, target_parameters=f"1.{ROUTER}")
    router.save(tmp_path / "r")
    tensors, at = read_safetensors(tmp_path / "r" / ADAPTER_WEIGHTS), "base_model.model.model.layers.1.mlp.gate.lora"
    assert {name: w.shape for name, w in tensors.items()} == {f"{at}_A.weight": (3, 32), f"{at}_B.weight": (5, 3)}
    again = LoraModel.load(router.model, tmp_path / "r")
    assert again.collect_weights().tobytes() == router.collect_weights().tobytes()

    other = LoraModel(make_base(num_experts=6), lora.lora)
    with pytest.raises(CheckpointError, match=r"has shape \(15, 32\); rank 3 on this model takes \(18, 32"):
        LoraModel.load(other.model, tmp_path / "a")


def older_folder(folder, rng, shape, drop=(), **said):
    """Write a folder of Mixtral's as PEFT did before version 5 of the Transformers library; return its tensors."""
    tensors, at = {}, "base_model.model.model.layers"
    for block in range(2):
        modules = {f"{block}.block_sparse_moe.gate": (shape.num_experts, 32)}
        for e in range(shape.num_experts):
            modules |= {f"{block}.block_sparse_moe.experts.{e}.{name}": (32, 32) for name in ("w1", "w2", "w3")}
        for module, (outer, inner) in modules.items():
            for half, sizes in (("A", (3, inner)), ("B", (outer, 3))):
                tensors[f"{at}.{module}.lora_{half}.weight"] = rng.standard_normal(sizes).astype(np.float32)
    folder.mkdir()
    kept = {name: values for name, values in tensors.items() if not name.endswith(drop)}
    write_safetensors(folder / ADAPTER_WEIGHTS, kept, {"format": "pt"})
    config = {"peft_type": "LORA", "r": 3, "lora_alpha": 6, "target_modules": ["gate", "w1", "w2", "w3"], **said}
    (folder / ADAPTER_CONFIG).write_text(json.dumps(config))
    return tensors


def test_a_folder_of_an_older_version(rng, tmp_path):
    """Two adapters of an expert's gate and up are one of twice the rank; all else is as it was."""
    base = make_base()
    tensors = older_folder(tmp_path / "a", rng, base.config, lora_dropout=0.1, use_rslora=True)
    lora = LoraModel.load(base, tmp_path / "a")
    merged, factor = lora.merged().weights, 6 / np.sqrt(3)
    for name, own in (("w1", "experts_gate"), ("w2", "experts_down"), ("w3", "experts_up")):
        for e in range(5):
            at = f"base_model.model.model.layers.1.block_sparse_moe.experts.{e}.{name}.lora"
            wanted = base.weights[f"layers.1.{own}"][e] + factor * tensors[f"{at}_B.weight"] @ tensors[f"{at}_A.weight"]
            check_close(merged[f"layers.1.{own}"][e], wanted, 1e-5)
    at = "base_model.model.model.layers.0.block_sparse_moe.gate.lora"
    wanted = base.weights["layers.0.w_router"] + factor * tensors[f"{at}_B.weight"] @ tensors[f"{at}_A.weight"]
    check_close(merged["layers.0.w_router"], wanted, 1e-5)


@pytest.mark.parametrize(
    ("said", "factors"),
    [
        ({}, (2, 2, 2)),
        ({"alpha_pattern": {".*experts.*": 12}}, (4, 4, 2)),
        ({"r": 8, "rank_pattern": {".*experts.*": 3, "gate": 3}}, (2, 2, 2)),
        ({"r": 8, "rank_pattern": {".*": 3}}, (2, 2, 2)),
        ({"alpha_pattern": {"gate": 12}}, (2, 2, 4)),
        ({"alpha_pattern": {"q": 12, "up": 5}}, (2, 2, 2)),  # no names of modules in PEFT
        ({"target_modules": ["q", "gate", "w1", "w2", "w3"], "exclude_modules": ["up"]}, (2, 2, 2)),
    ],
)
def test_patterns_of_a_folder_of_an_older_version(rng, tmp_path, said, factors):
    """One that fits modules and parameter alike is that of the modules, and `gate` is the router."""
    base = make_base()
    tensors = older_folder(tmp_path / "a", rng, base.config, **said)
    adapters, at = LoraModel.load(base, tmp_path / "a").by_matrix(), "base_model.model.model.layers.1.block_sparse_moe"
    for matrix, module, factor in zip(
        ("experts_up", "experts_down", "w_router"), ("experts.3.w3", "experts.3.w2", "gate"), factors, strict=True
    ):
        adapter = adapters[f"layers.1.{matrix}"]
        a, b = (tensors[f"{at}.{module}.lora_{half}.weight"] for half in "AB")
        product = adapter.scale * adapter.b @ adapter.a
        check_close(product if matrix == "w_router" else product[3], factor * b @ a, 1e-5, matrix)


def test_short_names_are_not_those_of_peft(rng, tmp_path):
    base = make_base()
    older_folder(tmp_path / "a", rng, base.config, target_modules=["q", "v"])
    with pytest.raises(CheckpointError, match=r"target_modules is \['q', 'v'\]; no module has such a name, which PEFT"):
        LoraModel.load(base, tmp_path / "a")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"drop": "experts.3.w2.lora_B.weight"}, r"experts.3.w2.lora_B.weight is missing; rank 3 .* takes \(32, 3\)"),
        ({"drop": "gate.lora_A.weight"}, r"mlp.gate.lora_A.weight is missing"),
        ({"r": 2}, r"block_sparse_moe.gate.lora_A.weight has shape \(3, 32\); rank 2 on this model takes \(2, "),
        ({"use_dora": True}, r"use_dora \(True\) must be False where target_modules mean experts or routers"),
        ({"target_modules": ["w1", "w2"]}, "w1 of experts without w3"),
        ({"target_modules": ["w2"]}, r"block_sparse_moe.* has no place in this model"),
    ],
)
def test_a_damaged_folder_of_an_older_version(rng, tmp_path, changes, said):
    base = make_base()
    older_folder(tmp_path / "a", rng, base.config, **changes)
    with pytest.raises(CheckpointError, match=said):
        LoraModel.load(base, tmp_path / "a")
