"""Adapters on experts (PEFT's target_parameters): names, counts, gradients, bits, frozen bases, merging, files."""

import json

import numpy as np
import pytest
from small_models import make_batch, make_model

from abi_py.config import LoraConfig
from abi_py.errors import CheckpointError, ConfigError
from abi_py.formats.peft import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from abi_py.formats.safetensors import read_safetensors
from abi_py.generation.decoder import Decoder
from abi_py.gradcheck import check_close, check_gradient
from abi_py.model import LoraModel, reference
from abi_py.model.arena import memory_plan
from abi_py.model.lora_layers import planned
from abi_py.model.lora_targets import num_trained, report
from abi_py.runs.tiny_models import stored_as

SHAPE = {"hidden_dim": 32, "num_experts": 5, "experts_per_token": 2, "intermediate_dim": 32, "num_layers": 2}
FAMILIES = {
    "mixtral": {"family": "mixtral", **SHAPE},
    "qwen3_moe": {"family": "qwen3_moe", "expert_dim": 64, **SHAPE},
}
BOTH = ("mlp.experts.gate_up_proj", "mlp.experts.down_proj")
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
    """Return the weights W + s B A of each expert, written down, in the type of `trained`."""
    weights = dict(base)
    for target in lora.targets():
        name, at = target.tensor.name, target.tensor.name.rpartition(".")[0]
        product = target.scale * np.einsum("eor,eri->eoi", trained[f"{name}.b"], trained[f"{name}.a"])
        for own, half in zip(target.matrices, np.split(product, len(target.matrices), axis=1), strict=True):
            weights[f"{at}.{own}"] = weights[f"{at}.{own}"] + half
    return weights


def gradients_by_hand(lora, trained, dw):
    """Return s Bᵀ dW and s dW Aᵀ of each expert."""
    found = {}
    for target in lora.targets():
        name, at = target.tensor.name, target.tensor.name.rpartition(".")[0]
        whole = target.scale * np.concatenate([dw[f"{at}.{own}"] for own in target.matrices], axis=1)
        found[f"{name}.a"] = np.einsum("eor,eoi->eri", trained[f"{name}.b"], whole)
        found[f"{name}.b"] = np.einsum("eoi,eri->eor", whole, trained[f"{name}.a"])
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
    attention = count(target_modules="q,k,v,o")
    assert count(target_parameters=BOTH, target_modules="all-linear") == attention + 2 * (gate_up + down)
    assert "rank 3: q_proj, mlp.experts.down_proj" in report(
        shape, LoraConfig(rank=3, target_modules="q", target_parameters="mlp.experts.down_proj")
    )


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"target_parameters": "experts.up_proj"}, r"target_parameters \('experts.up_proj'\): this model has no such "),
        ({"target_parameters": "mlp.gate.weight"}, r"try mlp.experts.gate_up_proj or mlp.experts.down_proj"),
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
    "settings", [{}, {"target_parameters": BOTH[:1]}, {"target_parameters": BOTH[1:], "use_rslora": True}]
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
        assert abs(loss - wanted) < 1e-5
        for name, gradient in gradients_by_hand(lora, trained, dw).items():
            check_close(lora.gradients[name], passes * gradient, 1e-4, name)
    assert lora.model.collect_weights().tobytes() == before.tobytes()


@pytest.mark.parametrize("name", ["experts_gate_up.a", "experts_gate_up.b", "experts_down.a", "experts_down.b"])
def test_gradients_equal_finite_differences(rng, name):
    lora = make_lora(make_base(), rng)
    ids, labels = make_batch(rng, lora)
    base, trained = reference.widened(lora.model.weights), reference.widened(lora.weights)
    name = f"layers.0.{name}"  # under another block of adapters

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
    fresh = LoraModel(base, LoraConfig(target_parameters=BOTH))
    assert fresh.forward(ids).tobytes() == base.forward(ids).tobytes()

    def step(**changes):
        lora = make_lora(make_base(**changes), np.random.default_rng(4))
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
    ours, plain = (make_lora(base, np.random.default_rng(5)) for base in (frozen, frozen.widened()))
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
    lora = make_lora(make_base(), rng)
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

    other = LoraModel(make_base(num_experts=6), lora.lora)
    with pytest.raises(CheckpointError, match=r"has shape \(15, 32\); rank 3 on this model takes \(18, 32"):
        LoraModel.load(other.model, tmp_path / "a")


def test_files_that_have_no_room_for_them(rng, tmp_path):
    lora = make_lora(make_base(), rng, target_modules="q")
    said = r"has no room here for adapters of experts \(model.layers.0.mlp.experts.gate_up_proj, target_par"
    with pytest.raises(ConfigError, match="a GGUF file of adapters " + said):
        lora.save_gguf(tmp_path / "a.gguf")
    with pytest.raises(ConfigError, match="mlx-lm's folder " + said):
        lora.save_mlx(tmp_path / "mlx")
    assert not list(tmp_path.iterdir())
