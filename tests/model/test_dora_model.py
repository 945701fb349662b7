"""DoRA: gradients, bits at the start, dropout, storages, merging, checkpointing strategies, costs."""

from dataclasses import replace
from types import SimpleNamespace

import numba
import numpy as np
import pytest
from small_models import make_batch, make_model

from abi_py.config import LoraConfig, TrainableModelConfig
from abi_py.families import tensor_table
from abi_py.formats.safetensors import read_safetensors
from abi_py.generation.decoder import Decoder
from abi_py.gradcheck import check_close, check_gradient, relative_error
from abi_py.kernels.cross_entropy import cross_entropy_ref
from abi_py.kernels.dropout import dropout_mask_ref
from abi_py.kernels.engine.jit import JIT
from abi_py.kernels.storage import STORAGES
from abi_py.model import LoraModel, TrainableModel, reference
from abi_py.model.layers.linear import Linear, Projection
from abi_py.model.layers.run import Run
from abi_py.model.lora_targets import Kind
from abi_py.parameters import Weight
from abi_py.runs.tiny_models import stored_as, tiny_frozen
from abi_py.shape import ModelFamily

EVERY = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
TARGETS = [EVERY, ("q_proj", "v_proj"), ("k_proj", "up_proj"), ("o_proj",), ("gate_proj", "down_proj")]
ODD = {"hidden_dim": 21, "num_heads": 3, "num_kv_heads": 1, "head_dim": 6, "intermediate_dim": 13}


def move(lora):
    """Give B and m values that they may have after some steps."""
    rng = np.random.default_rng(5)
    for name, w in lora.weights.items():
        if name.endswith(".b"):
            w[...] = 0.1 * rng.standard_normal(w.shape)
        elif name.endswith(".m"):
            w *= np.exp(0.3 * rng.standard_normal(w.shape)).astype(np.float32)
    return lora


def make_dora(size=6.0, rank=3, shape=(), family=None, **options):
    """Return adapters as they may be after some steps."""
    return move(LoraModel(make_model(size, **dict(shape)), LoraConfig(rank=rank, use_dora=True, **options)))


def step(lora, ids, labels, **options):
    lora.zero_gradients()
    result = lora.compute_loss(ids, labels, backward=True, **options)
    return result.loss, lora.parameters.gradients_flat.copy()


def merged_ref(lora, lengths=None):
    """Return the model's weights with rows of W + s B A as long as m says, in float64, and those rows' own lengths."""
    adapters, weights, found = reference.widened(lora.weights), reference.widened(lora.model.weights), {}
    for name in weights:
        if f"{name}.a" in adapters:
            w = weights[name] + lora.lora.scaling * adapters[f"{name}.b"] @ adapters[f"{name}.a"]
            found[name] = np.linalg.norm(w, axis=1) if lengths is None else lengths[name]
            weights[name] = w * (adapters[f"{name}.m"] / found[name])[:, None]
    return weights, found


# -- the beginning -------------------------------------------------------------------------------


@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_a_fresh_adapter_changes_no_bit(rng, precision, dropout):
    """Sums of more than one slice among them: a product's order does not change."""
    lora = LoraModel(
        make_model(hidden_dim=520, intermediate_dim=1100, num_layers=1),
        LoraConfig(rank=5, dropout=dropout, use_dora=True),
    )
    ids, labels = make_batch(rng, lora.model, 1, 5)
    expected = lora.model.compute_loss(ids, labels, precision=precision).token_losses
    for backward in (False, True):
        got = lora.compute_loss(ids, labels, precision=precision, backward=backward)
        assert got.token_losses.tobytes() == expected.tobytes()
    assert lora.forward(ids).tobytes() == lora.model.forward(ids).tobytes()
    for name, w in lora.weights.items():
        if name.endswith(".m"):
            check_close(w, np.linalg.norm(lora.model.weights[name[:-2]].astype(float), axis=1), 1e-6)
    assert lora.merged().collect_weights().tobytes() == lora.model.collect_weights().tobytes()


# -- gradients -----------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [{}, ODD], ids=["", "odd"])
@pytest.mark.parametrize("targets", TARGETS, ids=" ".join)
def test_gradients_equal_the_reference(rng, targets, shape):
    """g (W + s B A) is the matrix of the merged model, with constant n: dA = s Bᵀ (g dW), dB = s (g dW) Aᵀ, and dm is
    the sum of dW along the row's direction."""
    lora = make_dora(target_modules=targets, shape=shape, alpha=5)
    ids, labels = make_batch(rng, lora.model, 2, 7)
    loss, _ = step(lora, ids, labels)
    merged, lengths = merged_ref(lora)
    expected, dw = reference.loss_and_gradients(lora.layers, merged, ids, labels)
    assert abs(loss - expected) < 1e-5
    adapters, s = reference.widened(lora.weights), lora.lora.scaling
    for tensor, gradient in lora.gradients.items():
        name, kind = tensor[:-2], tensor[-1]
        a, b, m = (adapters[f"{name}.{each}"] for each in "abm")
        dz = (m / lengths[name])[:, None] * dw[name]
        wanted = {"a": s * b.T @ dz, "b": s * dz @ a.T, "m": (dw[name] * merged[name]).sum(1) / m}[kind]
        check_close(gradient, wanted, 1e-4, tensor)


@pytest.mark.parametrize("kind", "abm")
def test_the_reference_equals_finite_differences(rng, kind):
    """In float64, with the lengths n as they are: PEFT's detached norm, section 4.3 of the paper."""
    lora = make_dora(4.0, rank=2, shape={"num_layers": 1})
    ids, labels = make_batch(rng, lora.model, 2, 5)
    lengths = merged_ref(lora)[1]
    name = "layers.0.w_up"
    adapters, s = reference.widened(lora.weights), lora.lora.scaling

    def loss(value):
        parts = {**{each: adapters[f"{name}.{each}"] for each in "abm"}, kind: value}
        weights = merged_ref(lora, lengths)[0]
        w = lora.model.weights[name].astype(float) + s * parts["b"] @ parts["a"]
        weights[name] = (parts["m"] / lengths[name])[:, None] * w
        return reference.loss_and_gradients(lora.layers, weights, ids, labels)[0]

    merged = merged_ref(lora)[0]
    dw = reference.loss_and_gradients(lora.layers, merged, ids, labels)[1][name]
    a, b, m = (adapters[f"{name}.{each}"] for each in "abm")
    dz = (m / lengths[name])[:, None] * dw
    wanted = {"a": s * b.T @ dz, "b": s * dz @ a.T, "m": (dw * merged[name]).sum(1) / m}[kind]
    check_gradient(loss, adapters[f"{name}.{kind}"], wanted, rng, 1e-6)


def test_a_wrong_length_would_be_noticed(rng):
    lora = make_dora()
    batch = make_batch(rng, lora.model, 2, 7)
    before = step(lora, *batch)[1]
    lora.weights["layers.1.w_o.m"][...] *= np.float32(1.01)
    assert relative_error(step(lora, *batch)[1], before) > 1e-4


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("storage", ["float32", "bf16", "q8_0"])
@pytest.mark.parametrize(("outers", "targeted"), [((11,), (0,)), ((17, 5, 9), (0, 2)), ((64, 3), (0, 1))])
def test_one_layer_equals_the_definition(rng, outers, targeted, storage, dropout):
    """y, dx and each gradient of a layer with biases and an addend, whose matrices are kept in any storage."""
    from abi_py.model.layers.adapter import Group, Part
    from abi_py.model.layers.dora_adapter import DoraAdapter
    from abi_py.model.layers.magnitude import Magnitude

    N, inner, R, scale = 13, 32, 3, 0.7
    kept = STORAGES[storage]
    linear = Linear(inner, *(Projection(f"w{k}", outer, f"b{k}") for k, outer in enumerate(outers)))
    weights = {
        f"w{k}": Weight(f"w{k}", kept.encode_ref(rng.standard_normal((outer, inner)).astype(np.float32)), None, kept)
        for k, outer in enumerate(outers)
    }
    biases = [rng.standard_normal(outer).astype(np.float32) for outer in outers]
    weights |= {f"b{k}": Weight(f"b{k}", bias, None) for k, bias in enumerate(biases)}
    linear.bind("", weights.__getitem__)
    parts, groups, magnitudes, columns = [], [], [], linear.columns()
    a = rng.standard_normal((R * len(targeted), inner)).astype(np.float32)
    da = np.zeros_like(a)
    for k, at in enumerate(targeted):
        b = 0.3 * rng.standard_normal((outers[at], R)).astype(np.float32)
        parts.append(Part(columns[at], slice(k * R, (k + 1) * R), b, np.zeros_like(b)))
        m = np.abs(rng.standard_normal(outers[at])).astype(np.float32) + 1
        lengths = Weight(f"w{at}.m", m, np.zeros_like(m))
        magnitudes.append(Magnitude.of(linear.parts[at].w, kept, a[k * R : (k + 1) * R], b, scale, lengths))
    if dropout:
        groups = [Group(p.ranks, a[p.ranks], da[p.ranks], (p,), 3 * k) for k, p in enumerate(parts)]
    else:
        groups = [Group(slice(0, len(a)), a, da, tuple(parts), 0)]
    scales = np.full((len(a), 1), scale, np.float32)
    adapter = DoraAdapter(tuple(groups), scales, dropout, 11, 50, tuple(magnitudes), linear.width, len(a))
    linear.adapter = adapter
    for magnitude in magnitudes:
        magnitude.measure()

    x = rng.standard_normal((N, inner)).astype(np.float32)
    dy, addend = rng.standard_normal((2, N, linear.width)).astype(np.float32)
    s = SimpleNamespace(
        du=np.full((len(a) + 2 * linear.width) * N + 5, np.nan, np.float32),
        dropped=np.empty((N, inner + 3), np.float32),
    )
    saved = np.empty((len(a) + sum(outers[at] for at in targeted), N), np.float32)
    y, dx = np.empty_like(dy), np.empty_like(x)
    zeros = np.zeros(N, np.int32)
    run = Run(1, N, zeros, zeros, draw=4, accumulate=False)
    linear.forward(y, x, saved, s, run, addend=addend)
    for magnitude in magnitudes:
        magnitude.dm[...] = np.nan  # whatever was there is overwritten
    linear.backward(dx, dy, x, saved, s, run)

    wide_x, wide_dy = x.astype(float), dy.astype(float)
    w = np.concatenate([kept.decode_ref(weights[f"w{k}"].w) for k in range(len(outers))]).astype(float)
    y_ref = wide_x @ w.T + np.concatenate(biases) + addend
    dx_ref = wide_dy @ w
    streams = {id(part): group.stream for group in groups for part in group.parts}
    for part, magnitude in zip(parts, magnitudes, strict=True):
        mask = np.ones_like(wide_x)
        if dropout:
            mask = dropout_mask_ref(x.shape, dropout, 11 + 4 * 50 + streams[id(part)]) / (1 - dropout)
        h, dy_part, w_part = wide_x * mask, wide_dy[:, part.columns], w[part.columns]
        a_part, b, m = a[part.ranks].astype(float), part.b.astype(float), magnitude.m.astype(float)
        n = np.linalg.norm(w_part + scale * b @ a_part, axis=1)
        check_close(magnitude.n, n, 1e-6)
        g, z = m / n, h @ (w_part + scale * b @ a_part).T
        y_ref[:, part.columns] += g * z - h @ w_part.T
        dx_ref += (((g - 1) * dy_part) @ w_part + scale * (g * dy_part) @ b @ a_part) * mask
        check_close(part.db, scale * (g * dy_part).T @ (h @ a_part.T), 1e-5)
        check_close(da[part.ranks], scale * ((g * dy_part) @ b).T @ h, 1e-5)
        check_close(magnitude.dm, (dy_part * z).sum(0) / n, 1e-5)
    check_close(y, y_ref, 1e-5)
    check_close(dx, dx_ref, 1e-5)

    once = da.copy(), [part.db.copy() for part in parts], [magnitude.dm.copy() for magnitude in magnitudes]
    again = np.empty_like(dx)  # in the order of a layer whose x is there only after dx
    linear.inner_gradient(dy, saved, s, run)
    linear.input_gradient(again, dy, saved, s, run)
    linear.weight_gradients(dy, x, saved, s, run)
    assert again.tobytes() == dx.tobytes()
    assert da.tobytes() == once[0].tobytes()
    linear.backward(None, dy, x, saved, s, replace(run, accumulate=True))
    check_close(da, 2 * once[0], 1e-6)
    for part, magnitude, db, dm in zip(parts, magnitudes, *once[1:], strict=True):
        check_close(part.db, 2 * db, 1e-6)
        check_close(magnitude.dm, 2 * dm, 1e-6)

    decoded = addend.copy()
    linear.decode(decoded, x, Run(1, N, None, zeros), addend=decoded)  # written over what is added
    plain = np.empty_like(y)
    linear.forward(plain, x, saved, s, replace(run, draw=None), addend=addend)
    check_close(decoded, plain, 1e-5)


def test_lengths_follow_the_weights(rng):
    """A pass after a change of any adapter reads the new lengths; another of the same weights measures nothing."""
    lora = make_dora(4.0)
    ids, _ = make_batch(rng, lora.model)
    for kind in "abm":
        lora.weights[f"layers.0.w_v.{kind}"][0] *= np.float32(1.5)
        check_close(lora.forward(ids), lora.merged().forward(ids), 1e-5)
    measured = []
    for magnitude in lora._magnitudes.values():
        object.__setattr__(magnitude, "measure", lambda: measured.append(1))
    lora.forward(ids)
    assert not measured
    lora.weights["layers.0.w_v.a"][0] += 1
    lora.forward(ids)
    assert len(measured) == len(lora._magnitudes)


def test_accumulating_and_overwriting(rng):
    lora = make_dora()
    ids, labels = make_batch(rng, lora.model)
    once = step(lora, ids, labels)[1]
    lora.compute_loss(ids, labels, backward=True)
    check_close(lora.parameters.gradients_flat, 2 * once, 1e-6)
    lora.parameters.gradients_flat[...] = np.nan
    assert step(lora, ids, labels)[1].tobytes() == once.tobytes()


def test_dropout_is_of_training_only_and_new_each_time(rng):
    lora, plain = make_dora(dropout=0.5), make_dora()
    ids, labels = make_batch(rng, lora.model)
    assert lora.compute_loss(ids, labels).loss == pytest.approx(plain.compute_loss(ids, labels).loss, abs=1e-6)
    first, second = step(lora, ids, labels), step(lora, ids, labels)
    assert first[0] != second[0]
    lora.draws = 0
    again = step(lora, ids, labels)
    assert again[0] == first[0]
    assert again[1].tobytes() == first[1].tobytes()


# -- embedding and head --------------------------------------------------------------------------

SIZES = {"hidden_dim": 24, "num_layers": 2, "num_heads": 4, "intermediate_dim": 40, "vocab_size": 61}
SIZES |= {"max_seq_len": 32}
UNTIED, TIED = {"tie_embeddings": False}, {"tie_embeddings": True}
ENDS = {
    "llama": ("llama", UNTIED, {"target_modules": "embed_tokens,lm_head,v", "rank_pattern": "lm_head=5"}),
    "tied head": ("llama", TIED, {"target_modules": "lm_head,q"}),
    "tied embedding": ("qwen2", TIED, {"target_modules": "embed_tokens", "use_rslora": True}),
    "tied ends": ("gemma3", TIED, {"target_modules": "embed_tokens,lm_head", "alpha": 5}),  # rows times a factor
    "tables": ("gpt2", TIED, {"target_modules": "wte,wpe,c_attn", "modules_to_save": "ln_f"}),
    "positions": ("gpt2", TIED, {"target_modules": "wpe", "modules_to_save": "wte"}),
}


def make_ends(rng, name, **changes):
    """Return adapters on the ends of a model as they may be after some steps."""
    family, shape, settings = ENDS[name]
    lora = LoraModel(make_of(family, rng, **shape), LoraConfig(**{"rank": 3, "use_dora": True, **settings, **changes}))
    for tensor, w in move(lora).weights.items():
        if tensor.endswith(".a"):
            w[...] = 0.3 * rng.standard_normal(w.shape)
    return lora


def make_of(family, rng, **shape):
    """Return a model whose weights, norms and biases among them, are random."""
    base = TrainableModel(TrainableModelConfig(**{**SIZES, **shape}, family=family))
    for w in base.weights.values():
        w[...] += 0.1 * rng.standard_normal(w.shape).astype(np.float32)
    return base


def ends_ref(lora, trained, lengths=None):
    """Return the merged model's weights for what is trained, and the lengths n, in float64; or with these lengths.

    Rows of a matrix have the lengths m, of a table its columns.
    """
    weights, found = reference.widened(lora.model.weights), {}
    if "output_proj" in {entry.name for entry in tensor_table(lora.stored_config())}:
        weights.setdefault("output_proj", weights["token_embedding"])
    weights |= {name: w for name, w in trained.items() if name in weights}
    for target in lora.targets():
        name, is_table = target.tensor.name, target.kind is Kind.TABLE
        a, b, m = (trained[f"{name}.{part}"] for part in "abm")
        w = weights[name] + target.scale * (a @ b.T if is_table else b @ a)
        found[name] = np.linalg.norm(w, axis=0 if is_table else 1) if lengths is None else lengths[name]
        factor = m / found[name]
        weights[name] = w * (factor if is_table else factor[:, None])
    return weights, found


@pytest.mark.parametrize("name", ENDS)
def test_ends_equal_the_reference(rng, name):
    """Loss and gradients of the merged model, those that are overwritten and those that are added to; merging."""
    lora = make_ends(rng, name)
    ids, labels = make_batch(rng, lora, 2, 7)
    trained = reference.widened(lora.weights)
    weights, lengths = ends_ref(lora, trained)
    expected, dw = reference.loss_and_gradients(lora.layers, weights, ids, labels)
    for passes in (1, 2):
        assert abs(lora.compute_loss(ids, labels, backward=True).loss - expected) < 1e-5
        for target in lora.targets():
            each, s, is_table = target.tensor.name, target.scale, target.kind is Kind.TABLE
            a, b, m = (trained[f"{each}.{part}"] for part in "abm")
            factor, along = m / lengths[each], (dw[each] * weights[each]).sum(0 if is_table else 1) / m
            if is_table:
                dz = factor * dw[each]
                wanted = {"a": s * dz @ b, "b": s * dz.T @ a, "m": along}
            else:
                dz = factor[:, None] * dw[each]
                wanted = {"a": s * b.T @ dz, "b": s * dz @ a.T, "m": along}
            for part, gradient in wanted.items():
                check_close(lora.gradients[f"{each}.{part}"], passes * gradient, 1e-4, f"{each}.{part}")
        for each in trained.keys() & weights.keys():
            check_close(lora.gradients[each], passes * dw[each], 1e-4, each)
    merged = lora.merged()
    check_close(merged.forward(ids), lora.forward(ids), 1e-5)
    for target in lora.targets():
        of_rows = int(target.kind is not Kind.TABLE)
        of_its = np.linalg.norm(merged.weights[target.tensor.name].astype(float), axis=of_rows)
        check_close(of_its, lora.weights[f"{target.tensor.name}.m"], 1e-5)


@pytest.mark.parametrize(("name", "tensor"), [("tied ends", "token_embedding"), ("tied ends", "output_proj")])
@pytest.mark.parametrize("kind", "abm")
def test_the_reference_of_ends_equals_finite_differences(rng, name, tensor, kind):
    """In float64, with n as it is."""
    lora = make_ends(rng, name)
    ids, labels = make_batch(rng, lora, 2, 5)
    trained = reference.widened(lora.weights)
    weights, lengths = ends_ref(lora, trained)
    dw = reference.loss_and_gradients(lora.layers, weights, ids, labels)[1][tensor]
    (target,) = (each for each in lora.targets() if each.tensor.name == tensor)
    a, b, m = (trained[f"{tensor}.{part}"] for part in "abm")
    if target.kind is Kind.TABLE:
        dz, along = m / lengths[tensor] * dw, (dw * weights[tensor]).sum(0) / m
        wanted = {"a": target.scale * dz @ b, "b": target.scale * dz.T @ a, "m": along}[kind]
    else:
        dz, along = (m / lengths[tensor])[:, None] * dw, (dw * weights[tensor]).sum(1) / m
        wanted = {"a": target.scale * b.T @ dz, "b": target.scale * dz @ a.T, "m": along}[kind]

    def loss(value):
        changed = ends_ref(lora, {**trained, f"{tensor}.{kind}": value}, lengths)[0]
        return reference.loss_and_gradients(lora.layers, changed, ids, labels)[0]

    check_gradient(loss, trained[f"{tensor}.{kind}"], wanted, rng, 1e-6)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("name", ENDS)
def test_fresh_ends_change_no_bit(rng, name, dropout, precision):
    family, shape, settings = ENDS[name]
    settings = {"rank": 3, "use_dora": True, **settings}
    if dropout:
        settings["target_modules"] += ",o_proj" if family != "gpt2" else ",c_fc"  # tables alone have no dropout
    lora = LoraModel(make_of(family, rng, **shape), LoraConfig(**settings, dropout=dropout))
    ids, labels = make_batch(rng, lora, 2, 9)
    for backward in (False, True):
        expected = lora.model.compute_loss(ids, labels, precision=precision)
        got = lora.compute_loss(ids, labels, precision=precision, backward=backward)
        assert got.token_losses.tobytes() == expected.token_losses.tobytes()
    assert lora.forward(ids).tobytes() == lora.model.forward(ids).tobytes()
    assert lora.merged().forward(ids).tobytes() == lora.model.forward(ids).tobytes()


def test_a_head_with_lengths_and_dropout(rng):
    """logits = hidden Wᵀ + (g - 1) h Wᵀ + g u Bᵀ with one mask for the loss and its gradients, in float64."""
    lora = make_ends(rng, "llama", target_modules="lm_head,embed_tokens", dropout=0.4)
    ids, labels = make_batch(rng, lora, 2, 7)
    head, trained = lora.stack.head, reference.widened(lora.weights)
    adapter = head.adapter
    seed = (adapter.seed + adapter.streams * 1 + adapter.stream) % 2**63
    lora.compute_loss(ids, labels, backward=True)
    lora.zero_gradients()
    loss = lora.compute_loss(ids, labels, backward=True).loss  # the second pass, so draw 1
    run = lora._runs.run((2, 7), None, None)
    hidden = lora.stack.forward(ids.ravel(), run).astype(float)
    mask = dropout_mask_ref(hidden.shape, 0.4, seed) / 0.6
    a, b, m = (trained[f"output_proj.{part}"] for part in "abm")
    s, w, h = adapter.scale, lora.model.weights["output_proj"].astype(float), hidden * mask
    n = np.linalg.norm(w + s * b @ a, axis=1)
    u, g = s * h @ a.T, m / n
    losses, _, _, dy = cross_entropy_ref(hidden @ w.T + (g - 1) * (h @ w.T) + g * (u @ b.T), labels.ravel())
    dy /= (labels >= 0).sum()
    assert abs(loss - losses.sum() / (labels >= 0).sum()) < 1e-5
    check_close(lora.gradients["output_proj.b"], (g * dy).T @ u, 1e-4)
    check_close(lora.gradients["output_proj.a"], (s * (g * dy) @ b).T @ h, 1e-4)
    check_close(lora.gradients["output_proj.m"], (dy * (h @ w.T + u @ b.T)).sum(0) / n, 1e-4)
    wanted = dy @ w + ((g - 1) * dy @ w + s * (g * dy) @ b @ a) * mask
    seen = []
    head.norm.backward = lambda dx, dy, *others: (seen.append(dy.copy()), dx.fill(0))  # what comes out of the head
    lora.draws = 1
    lora.compute_loss(ids, labels, backward=True)
    check_close(seen[0], wanted, 1e-4)


@pytest.mark.parametrize("name", ["llama", "tables"])
def test_backward_of_logits_is_that_of_the_loss(rng, name):
    """By `forward` and `backward`, in which the logits of all rows exist."""
    lora = make_ends(rng, name)
    ids, labels = make_batch(rng, lora, 2, 7, ignored=0)
    expected = step(lora, ids, labels)[1]
    lora.zero_gradients()
    logits = lora.forward(ids).reshape(labels.size, -1)
    dz = cross_entropy_ref(logits.astype(float), labels.ravel())[3] / labels.size
    lora.backward(dz.astype(np.float32).reshape(*ids.shape, -1))
    check_close(lora.parameters.gradients_flat, expected, 1e-4)


@pytest.mark.parametrize("storage", ["bf16", "q8_0"])
@pytest.mark.parametrize("name", ["llama", "tables"])
def test_ends_of_a_frozen_base_are_those_of_its_widened_weights(rng, name, storage):
    """Steps, merging, and generation with the adapters beside the matrices."""
    family, shape, settings = ENDS[name]
    settings = {**settings, "modules_to_save": None}
    base = stored_as(make_of(family, rng, **shape, hidden_dim=32), storage)
    frozen, wide = (
        move(LoraModel(model, LoraConfig(rank=3, use_dora=True, **settings))) for model in (base, base.widened())
    )
    for tensor, w in frozen.weights.items():
        w += 0.1 * rng.standard_normal(w.shape).astype(np.float32)
        wide.weights[tensor][...] = w
    ids, labels = make_batch(rng, wide)
    expected, got = (step(each, ids, labels) for each in (wide, frozen))
    assert got[0] == pytest.approx(expected[0], abs=1e-4)
    check_close(got[1], expected[1], 1e-4)
    assert frozen.for_decoding() is frozen
    logits = [Decoder(each, integer=False).prefill(0, ids[0]).copy() for each in (frozen, wide)]
    check_close(logits[0], logits[1], 1e-4)
    check_close(frozen.merged().forward(ids), wide.forward(ids), 1e-4)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("accumulates", [False, True])
def test_the_plan_of_ends_is_what_is_allocated(rng, dropout, accumulates):
    lora = make_ends(rng, "llama", dropout=dropout)
    ids, labels = make_batch(rng, lora, 2, 16, ignored=0)
    for _ in range(1 + accumulates):
        lora.compute_loss(ids, labels, backward=True)
    plan = lora.memory_plan(2, 16, accumulates=accumulates)
    assert plan["gradients"] == lora.parameters.gradients_flat.nbytes
    if not accumulates:
        assert plan["saved activations"] + plan["scratch"] == lora.stack.arena.nbytes()


def test_operations_of_ends(rng):
    """Lengths add u Bᵀ of a table once more, and with dropout two products with the head's matrix."""
    V, C, R = 61, 24, 3
    lora, dora, dropped = (
        LoraModel(make_of("llama", rng, **UNTIED), LoraConfig(rank=R, target_modules="embed_tokens,lm_head", **options))
        for options in ({}, {"use_dora": True}, {"use_dora": True, "dropout": 0.1})
    )
    assert dora.flops_per_token(8) - lora.flops_per_token(8) == 2 * C * R
    assert dropped.flops_per_token(8) - dora.flops_per_token(8) == 4 * V * C
    assert dora.num_params() - lora.num_params() == C + V


def test_ends_are_saved_as_peft_names_them(rng, tmp_path):
    lora = make_ends(rng, "tables")
    lora.save(tmp_path)
    found = read_safetensors(tmp_path / "adapter_model.safetensors")
    assert found["base_model.model.transformer.wte.lora_magnitude_vector"].shape == (24,)
    assert found["base_model.model.transformer.wpe.lora_magnitude_vector"].shape == (24,)
    again, (ids, _) = LoraModel.load(lora.model, tmp_path), make_batch(rng, lora)
    assert again.forward(ids).tobytes() == lora.forward(ids).tobytes()


# -- the same bits -------------------------------------------------------------------------------

STRATEGIES = [
    {"checkpointing": "every_n_layers", "checkpoint_interval": 2},
    {"checkpointing": "attention_only"},
    {"checkpointing": "full"},
]


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("options", STRATEGIES, ids=lambda options: options["checkpointing"])
def test_strategies_give_the_same_bits(rng, options, dropout):
    plain = make_dora(4.0, shape={"num_layers": 3}, dropout=dropout)
    saving = make_dora(4.0, shape={"num_layers": 3, **options}, dropout=dropout)
    ids, labels = make_batch(rng, plain.model, 2, 17 if JIT else 3)
    segments = np.sort(rng.integers(0, 3, ids.shape))
    for marks in ({}, {"segment_ids": segments}, {"precision": "bf16"}):
        expected, got = step(plain, ids, labels, **marks), step(saving, ids, labels, **marks)
        assert got[0] == expected[0]
        assert got[1].tobytes() == expected[1].tobytes()


@pytest.mark.skipif(not JIT or numba.config.NUMBA_NUM_THREADS < 2, reason="needs two threads")
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_one_thread_gives_the_bits_of_two(rng, dropout):
    lora = make_dora(4.0, shape={"hidden_dim": 96, "vocab_size": 997, "max_seq_len": 128}, rank=16, dropout=dropout)
    ids, labels = make_batch(rng, lora.model, 4, 128)
    assert 512 * lora.flops_per_token(128) > 50e6  # not so small that it runs on one thread anyway
    results, before = [], numba.get_num_threads()
    try:
        for threads in (1, 2):
            numba.set_num_threads(threads)
            lora.draws, lora._measured = 0, b""
            results.append(step(lora, ids, labels))
    finally:
        numba.set_num_threads(before)
    assert results[0][0] == results[1][0]
    assert results[0][1].tobytes() == results[1][1].tobytes()


def test_a_replayed_pass_reads_the_lengths_of_now(rng, replays):
    """From the third pass of a kind on; lengths are measured before, in place."""
    lora, other = make_dora(), make_dora()
    ids, labels = make_batch(rng, lora.model)
    for _ in range(8):  # with one thread and with two
        lora.parameters.weights_flat *= np.float32(1.01)
        got = step(lora, ids, labels)
    assert bool(replays) == JIT
    other.distribute_weights(lora.collect_weights())
    assert step(other, ids, labels)[1].tobytes() == got[1].tobytes()


def test_reduced_precision_is_close(rng):
    lora = make_dora(2.0)
    ids, labels = make_batch(rng, lora.model)
    exact = step(lora, ids, labels)
    for precision, tolerance in (("bf16", 0.05), ("fp16", 0.01)):
        loss, gradient = step(lora, ids, labels, precision=precision)
        assert abs(loss - exact[0]) < 0.02
        assert relative_error(gradient, exact[1]) < tolerance


@pytest.mark.parametrize("storage", ["bf16", "float16", "q8_0", "nf4", "q4_k"])
def test_on_a_frozen_base_it_is_that_of_its_widened_weights(rng, storage):
    """Steps, and generation with the adapters beside the matrices."""
    wide = 256 if storage == "q4_k" else 64
    shape = {"hidden_dim": wide, "num_heads": 4, "num_kv_heads": 2, "intermediate_dim": wide, "num_layers": 1}
    base = stored_as(make_model(4.0, **shape), storage)
    frozen, wide = (
        move(LoraModel(model, LoraConfig(rank=3, use_dora=True, use_rslora=True))) for model in (base, base.widened())
    )
    ids, labels = make_batch(rng, wide.model)
    assert frozen.lora.use_dora
    for precision, tolerance in (("fp32", 1e-4), ("bf16", 2e-2)):
        expected, got = (step(each, ids, labels, precision=precision) for each in (wide, frozen))
        assert got[0] == pytest.approx(expected[0], abs=tolerance)
        check_close(got[1], expected[1], tolerance)
    from abi_py.generation.decoder import Decoder

    assert frozen.for_decoding() is frozen
    frozen.weights["layers.0.w_q.m"][...] *= np.float32(1.2)  # no pass has read it before the decoder
    wide.weights["layers.0.w_q.m"][...] *= np.float32(1.2)
    logits = [Decoder(each, integer=False).prefill(0, ids[0]).copy() for each in (frozen, wide)]
    check_close(logits[0], logits[1], 1e-4)


# -- merging -------------------------------------------------------------------------------------


@pytest.mark.parametrize("targets", TARGETS, ids=" ".join)
def test_merged_weights_compute_what_the_adapters_do(rng, targets):
    lora = make_dora(4.0, target_modules=targets)
    ids, _ = make_batch(rng, lora.model)
    before, expected = lora.model.collect_weights(), lora.forward(ids)
    assert relative_error(expected, lora.model.forward(ids)) > 1e-3
    copy = lora.merged()
    check_close(copy.forward(ids), expected, 1e-5)
    for name, w in copy.weights.items():
        if f"{name}.m" in lora.weights:
            check_close(np.linalg.norm(w.astype(float), axis=1), lora.weights[f"{name}.m"], 1e-6)
    assert lora.merge().collect_weights().tobytes() == copy.collect_weights().tobytes()
    assert lora.forward(ids).tobytes() == copy.forward(ids).tobytes()
    lora.weights[next(name for name in lora.weights if name.endswith(".m"))][...] *= np.float32(1.1)
    lora.forward(ids)  # of the merged weights: nothing is measured by them
    lora.unmerge()
    assert lora.model.collect_weights().tobytes() == before.tobytes()
    check_close(lora.forward(ids), lora.merged().forward(ids), 1e-5)


# -- costs ---------------------------------------------------------------------------------------


def test_number_of_trained_parameters():
    """Those of LoRA, and a length for each row."""
    plain, lora = (LoraModel(make_model(), LoraConfig(rank=4, use_dora=dora)) for dora in (False, True))
    rows = sum(w.shape[0] for name, w in lora.weights.items() if name.endswith(".b"))
    assert lora.num_params() - plain.num_params() == rows
    decays = {entry.name[-1]: entry.decay for entry in lora.parameters.table}
    assert decays == {"a": True, "b": True, "m": False}


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("options", [{}, *STRATEGIES], ids=lambda options: options.get("checkpointing", "none"))
def test_the_plan_is_what_is_allocated(rng, options, dropout):
    lora = make_dora(shape={"num_layers": 3, **options}, dropout=dropout)
    ids, labels = make_batch(rng, lora.model, 2, 16, ignored=0)
    step(lora, ids, labels)
    plan = lora.memory_plan(2, 16)
    assert plan["gradients"] == lora.parameters.gradients_flat.nbytes
    assert plan["saved activations"] + plan["scratch"] == lora.stack.arena.nbytes()


def test_with_dropout_each_adapted_matrix_is_multiplied_again():
    shape = {"num_layers": 1}
    plain, lora, dropped = (
        LoraModel(make_model(**shape), LoraConfig(rank=3, target_modules=EVERY, **options))
        for options in ({}, {"use_dora": True}, {"use_dora": True, "dropout": 0.1})
    )
    assert lora.flops_per_token(8) == plain.flops_per_token(8)
    again = sum(w.size for name, w in lora.model.weights.items() if f"{name}.m" in lora.weights)
    first = sum(lora.model.weights[f"layers.0.w_{part}"].size for part in "qkv")  # whose dx nobody needs
    assert dropped.flops_per_token(8) - lora.flops_per_token(8) == 2 * (2 * again - first)


def test_a_decoder_that_is_kept_measures_anew():
    """Prefill and the steps after it, replayed or not, read the lengths of the weights as they now are."""
    model = tiny_frozen(ModelFamily.LLAMA, "bf16")
    lora = LoraModel(model, LoraConfig(rank=3, use_dora=True))

    def read(decoder):
        decoder.clear(0)
        logits = [decoder.prefill(0, np.arange(7)).copy()]
        logits += [decoder.step(np.zeros(1, int), np.array([i])).copy()[0] for i in (3, 1, 4)]
        return np.array(logits)

    kept = Decoder(lora)
    before = read(kept)
    move(lora)
    now = read(kept)
    assert not np.array_equal(now, before)
    np.testing.assert_array_equal(now, read(Decoder(lora)))
