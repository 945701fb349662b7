"""LoRA: gradients, bits at the start, dropout, merging, checkpointing strategies, costs."""

from dataclasses import replace

import numba
import numpy as np
import pytest
from small_models import make_batch, make_model

from abi_py.config import LoraConfig, TrainableModelConfig
from abi_py.errors import ConfigError
from abi_py.families import FAMILIES
from abi_py.families.llama import FAMILY
from abi_py.gradcheck import check_close, relative_error
from abi_py.kernels.dropout import dropout_mask_ref
from abi_py.kernels.engine.jit import JIT
from abi_py.model import LoraModel, TrainableModel, reference
from abi_py.model.layers.adapter import Adapter, Group, Part
from abi_py.model.layers.feed_forward import FeedForward
from abi_py.model.layers.linear import Linear, Projection
from abi_py.model.layers.run import Run
from abi_py.parameters import Weight
from abi_py.shape import ModelFamily

TARGETS = [
    ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),  # all
    ("q_proj", "v_proj"),
    ("k_proj", "up_proj"),
    ("o_proj",),
    ("gate_proj", "down_proj"),
]


def make_lora(size=6.0, rank=3, trained=True, shape=(), **options):
    """Return a LoraModel with B as it may be after some steps; a fresh one if not `trained`."""
    lora = LoraModel(make_model(size, **dict(shape)), LoraConfig(rank=rank, **options))
    rng = np.random.default_rng(5)
    for name, w in lora.weights.items():
        if trained and name.endswith(".b"):
            w[...] = 0.1 * rng.standard_normal(w.shape)
    return lora


def step(lora, ids, labels, **options):
    lora.zero_gradients()
    result = lora.compute_loss(ids, labels, backward=True, **options)
    return result.loss, lora.parameters.gradients_flat.copy()


def merged_ref(lora):
    """Return the model's weights with s B A in them, in float64."""
    adapters, weights = reference.widened(lora.weights), reference.widened(lora.model.weights)
    for name in weights:
        if f"{name}.a" in adapters:
            weights[name] = weights[name] + lora.lora.scaling * adapters[f"{name}.b"] @ adapters[f"{name}.a"]
    return weights


# -- the beginning -------------------------------------------------------------------------------


@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_a_fresh_adapter_changes_no_bit(rng, precision, dropout):
    """B is zero, so its product adds zeros to every output: of the logits, the losses, and with bf16 as well."""
    lora = make_lora(trained=False, dropout=dropout, rank=5)
    ids, labels = make_batch(rng, lora.model)
    expected = lora.model.compute_loss(ids, labels, precision=precision).token_losses
    for backward in (False, True):
        got = lora.compute_loss(ids, labels, precision=precision, backward=backward)
        assert got.token_losses.tobytes() == expected.tobytes()
    assert lora.forward(ids).tobytes() == lora.model.forward(ids).tobytes()


def test_initial_values():
    lora = make_lora(trained=False, rank=32)
    for name, w in lora.weights.items():
        if name.endswith(".b"):
            assert not w.any()
            continue
        bound = w.shape[1] ** -0.5
        assert np.abs(w).max() <= bound
        assert np.abs(w).max() > 0.98 * bound
        assert abs(w.mean()) < 0.05 * bound
        assert abs(w.std() - bound / 3**0.5) < 0.03 * bound
    assert make_lora(trained=False).collect_weights().tobytes() == make_lora(trained=False).collect_weights().tobytes()
    other = make_lora(trained=False, seed=1)
    assert other.collect_weights().tobytes() != make_lora(trained=False).collect_weights().tobytes()


# -- gradients -----------------------------------------------------------------------------------


@pytest.mark.parametrize("targets", TARGETS, ids=" ".join)
def test_gradients_equal_the_reference(rng, targets):
    """W + s B A is the matrix of the merged model, so dA = s Bᵀ dW and dB = s dW Aᵀ; dW by the model in float64."""
    odd = {"hidden_dim": 21, "num_heads": 3, "num_kv_heads": 1, "head_dim": 6, "intermediate_dim": 13}
    for shape in ({}, odd):
        lora = make_lora(target_modules=targets, shape=shape, alpha=5)
        ids, labels = make_batch(rng, lora.model, 2, 7)
        loss, _ = step(lora, ids, labels)
        expected, dw = reference.loss_and_gradients(lora.layers, merged_ref(lora), ids, labels)
        assert abs(loss - expected) < 1e-5
        assert {name.partition(".w_")[2] for name in lora.gradients} == {
            f"{'o' if t[0] == 'o' else t.removesuffix('_proj')}.{half}" for t in targets for half in "ab"
        }
        adapters, s = reference.widened(lora.weights), lora.lora.scaling
        for tensor, gradient in lora.gradients.items():
            name, half = tensor[:-2], tensor[-1]
            a, b = adapters[f"{name}.a"], adapters[f"{name}.b"]
            check_close(gradient, s * (b.T @ dw[name] if half == "a" else dw[name] @ a.T), 1e-4, tensor)


def test_a_wrong_adapter_gradient_would_be_noticed(rng):
    """The check above fails on an adapter with 1 % more of one matrix."""
    lora = make_lora()
    batch = make_batch(rng, lora.model, 2, 7)
    before = step(lora, *batch)[1]
    lora.weights["layers.1.w_o.a"][...] *= np.float32(1.01)
    assert relative_error(step(lora, *batch)[1], before) > 1e-4


def make_linear(rng, N, inner, outers, rank, dropout, seed=11):
    """Return a joined linear layer with an adapter on each part but the second, in float32."""

    def random(*shape):
        return rng.standard_normal(shape).astype(np.float32)

    w, parts, groups, column, targeted = random(sum(outers), inner), [], [], 0, 0
    for k, outer in enumerate(outers):
        if k != 1:
            ranks = slice(targeted * rank, (targeted + 1) * rank)
            b = random(outer, rank)
            parts.append(Part(slice(column, column + outer), ranks, b, np.zeros_like(b)))
            targeted += 1
        column += outer
    a = random(rank * len(parts), inner)
    da = np.zeros_like(a)
    if dropout:
        groups = [Group(p.ranks, a[p.ranks], da[p.ranks], (p,), 3 * k) for k, p in enumerate(parts)]
    else:
        groups = [Group(slice(0, len(a)), a, da, tuple(parts), 0)]
    linear, rows = Linear(inner, *(Projection(f"w{k}", outer) for k, outer in enumerate(outers))), 0
    matrices = {}
    for projection in linear.projections:
        matrices[projection.name] = Weight(projection.name, w[rows : rows + projection.width], None)
        rows += projection.width
    linear.bind("", matrices.__getitem__)
    linear.adapter = Adapter(tuple(groups), np.full((rank * len(parts), 1), 0.7, np.float32), dropout, seed, 50)
    return linear, w, random(N, inner), random(N, sum(outers))


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("outers", [(11,), (17, 5, 9), (64, 3)])
@pytest.mark.parametrize(("N", "inner", "rank"), [(1, 1, 1), (13, 19, 3), (67, 41, 16)])
def test_one_layer_equals_the_whole_matrix(rng, N, inner, rank, outers, dropout):
    """y and dx are those of W + s B D A; each gradient is the sum that the definition says."""
    from types import SimpleNamespace

    linear, w, x, dy = make_linear(rng, N, inner, outers, rank, dropout)
    adapter = linear.adapter
    ranks = rank * sum(len(group.parts) for group in adapter.groups)
    s = SimpleNamespace(du=np.empty((ranks + 2, N), np.float32), dropped=np.empty((N, inner + 3), np.float32))
    u, y, dx = np.empty((ranks, N), np.float32), np.empty_like(dy), np.empty_like(x)
    addend = rng.standard_normal(y.shape).astype(np.float32)
    zeros = np.zeros(N, np.int32)
    run = Run(1, N, zeros, zeros, draw=4, accumulate=False)
    linear.forward(y, x, u, s, run, addend=addend)
    linear.backward(dx, dy, x, u, s, run)

    wide_x, wide_dy, w = x.astype(float), dy.astype(float), w.astype(float)
    y_ref, dx_ref = wide_x @ w.T + addend, wide_dy @ w
    for group in adapter.groups:
        mask = np.ones_like(wide_x)
        if dropout:
            mask = dropout_mask_ref(x.shape, dropout, adapter.seed + 4 * 50 + group.stream) / (1 - dropout)
        da = np.zeros(group.a.shape)
        for part in group.parts:
            rows = slice(part.ranks.start - group.ranks.start, part.ranks.stop - group.ranks.start)
            a, b, dy_part = group.a[rows].astype(float), part.b.astype(float), wide_dy[:, part.columns]
            kept = wide_x * mask
            y_ref[:, part.columns] += 0.7 * kept @ a.T @ b.T
            dx_ref += 0.7 * (dy_part @ b @ a) * mask
            da[rows] = 0.7 * (dy_part @ b).T @ kept
            check_close(part.db, 0.7 * dy_part.T @ (kept @ a.T), 1e-5)
        check_close(group.da, da, 1e-5)
    check_close(y, y_ref, 1e-5)
    check_close(dx, dx_ref, 1e-5)

    once = [(group.da.copy(), [part.db.copy() for part in group.parts]) for group in adapter.groups]
    again = np.empty_like(dx)  # in the order of a layer whose x is there only after dx
    linear.inner_gradient(dy, u, s, run)
    linear.input_gradient(again, dy, u, s, run)
    linear.weight_gradients(dy, x, u, s, run)
    assert again.tobytes() == dx.tobytes()
    for group, (da, dbs) in zip(adapter.groups, once, strict=True):
        assert group.da.tobytes() == da.tobytes()
        assert all(part.db.tobytes() == db.tobytes() for part, db in zip(group.parts, dbs, strict=True))
    linear.backward(None, dy, x, u, s, replace(run, accumulate=True))
    for group, (da, dbs) in zip(adapter.groups, once, strict=True):
        check_close(group.da, 2 * da, 1e-6)
        for part, db in zip(group.parts, dbs, strict=True):
            check_close(part.db, 2 * db, 1e-6)


@pytest.mark.parametrize("tied", [True, False])
def test_the_base_is_frozen(rng, tied):
    """Neither weights nor gradients of the model are touched, whatever the adapters learn."""
    lora = make_lora(shape={"tie_embeddings": tied})
    ids, labels = make_batch(rng, lora.model)
    before = lora.model.collect_weights()
    lora.model.parameters.gradients_flat[...] = 7
    step(lora, ids, labels)
    step(lora, ids, labels)
    assert lora.model.collect_weights().tobytes() == before.tobytes()
    assert (lora.model.parameters.gradients_flat == 7).all()


def test_accumulating_and_overwriting(rng):
    lora = make_lora()
    ids, labels = make_batch(rng, lora.model)
    once = step(lora, ids, labels)[1]
    lora.compute_loss(ids, labels, backward=True)
    check_close(lora.parameters.gradients_flat, 2 * once, 1e-6)
    lora.parameters.gradients_flat[...] = np.nan  # whatever was there must not come back
    assert step(lora, ids, labels)[1].tobytes() == once.tobytes()
    check_close(lora.compute_gradient_norm(), np.linalg.norm(once.astype(float)), 1e-6)


def test_forward_and_backward_equal_the_loss(rng):
    lora = make_lora()
    ids, labels = make_batch(rng, lora.model)
    expected = step(lora, ids, labels)[1]
    z = lora.forward(ids).astype(np.float64)
    p = np.exp(z - z.max(-1, keepdims=True))
    p /= p.sum(-1, keepdims=True)
    counted = labels >= 0
    p[np.nonzero(counted) + (labels[counted],)] -= 1
    lora.zero_gradients()
    lora.backward((p * counted[..., None] / counted.sum()).astype(np.float32))
    check_close(lora.parameters.gradients_flat, expected, 1e-5)


# -- dropout -------------------------------------------------------------------------------------


def test_dropout_is_of_training_only_and_new_each_time(rng):
    lora, plain = make_lora(dropout=0.5), make_lora()
    ids, labels = make_batch(rng, lora.model)
    assert lora.compute_loss(ids, labels).loss == pytest.approx(plain.compute_loss(ids, labels).loss, abs=1e-6)
    assert lora.draws == 0
    first, second = step(lora, ids, labels), step(lora, ids, labels)
    assert lora.draws == 2
    assert first[0] != second[0]
    lora.draws = 0
    again = step(lora, ids, labels)
    assert again[0] == first[0]
    assert again[1].tobytes() == first[1].tobytes()
    other = make_lora(dropout=0.5, seed=1)
    other.distribute_weights(lora.collect_weights())
    assert step(other, ids, labels)[0] != first[0]


def test_no_two_adapters_share_a_mask():
    lora = make_lora(dropout=0.5)
    none = np.zeros(0, np.int32)
    run, later = Run(1, 0, none, none, draw=3), Run(1, 0, none, none, draw=4)
    seeds = []
    for layer in lora.layers:
        for linear in layer.linears:
            adapter = linear.adapter
            seeds += [adapter.mask_seed(group, each) for group in adapter.groups for each in (run, later)]
    assert len(seeds) == len(set(seeds)) == 2 * 7 * lora.config.num_layers
    assert not adapter.drops(Run(1, 0, none, none))


# -- the same bits -------------------------------------------------------------------------------

STRATEGIES = [
    {"checkpointing": "every_n_layers", "checkpoint_interval": 2},
    {"checkpointing": "attention_only"},
    {"checkpointing": "full"},
]


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("options", STRATEGIES, ids=lambda options: options["checkpointing"])
def test_strategies_give_the_same_bits(rng, options, dropout):
    plain = make_lora(4.0, shape={"num_layers": 3}, dropout=dropout)
    saving = make_lora(4.0, shape={"num_layers": 3, **options}, dropout=dropout)
    ids, labels = make_batch(rng, plain.model, 2, 17 if JIT else 3)
    segments = np.sort(rng.integers(0, 3, ids.shape))
    for marks in ({}, {"segment_ids": segments}, {"precision": "bf16"}):
        expected, got = step(plain, ids, labels, **marks), step(saving, ids, labels, **marks)
        assert got[0] == expected[0]
        assert got[1].tobytes() == expected[1].tobytes()


@pytest.mark.skipif(not JIT or numba.config.NUMBA_NUM_THREADS < 2, reason="needs two threads")
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_one_thread_gives_the_bits_of_two(rng, dropout):
    lora = make_lora(4.0, shape={"hidden_dim": 96, "vocab_size": 997, "max_seq_len": 128}, rank=16, dropout=dropout)
    ids, labels = make_batch(rng, lora.model, 4, 128)
    assert 512 * lora.flops_per_token(128) > 50e6  # not so small that it runs on one thread anyway
    results, before = [], numba.get_num_threads()
    try:
        for threads in (1, 2):
            numba.set_num_threads(threads)
            lora.draws = 0
            results.append(step(lora, ids, labels))
    finally:
        numba.set_num_threads(before)
    assert results[0][0] == results[1][0]
    assert results[0][1].tobytes() == results[1][1].tobytes()


def test_reduced_precision_is_close(rng):
    lora = make_lora(2.0)
    ids, labels = make_batch(rng, lora.model)
    exact = step(lora, ids, labels)
    for precision, tolerance in (("bf16", 0.05), ("fp16", 0.01)):
        loss, gradient = step(lora, ids, labels, precision=precision)
        assert abs(loss - exact[0]) < 0.02
        assert relative_error(gradient, exact[1]) < tolerance


# -- merging -------------------------------------------------------------------------------------


@pytest.mark.parametrize("targets", TARGETS, ids=" ".join)
def test_merged_weights_compute_what_the_adapters_do(rng, targets):
    lora = make_lora(4.0, target_modules=targets)
    ids, _ = make_batch(rng, lora.model)
    before, expected = lora.model.collect_weights(), lora.forward(ids)
    assert relative_error(expected, lora.model.forward(ids)) > 1e-3
    copy = lora.merged()
    check_close(copy.forward(ids), expected, 1e-5)
    assert lora.model.collect_weights().tobytes() == before.tobytes()
    merged = lora.merge()
    assert merged is lora.model
    assert lora.is_merged
    assert merged.collect_weights().tobytes() == copy.collect_weights().tobytes()
    assert lora.forward(ids).tobytes() == copy.forward(ids).tobytes()  # the adapters do not come on top
    assert lora.merge().collect_weights().tobytes() == copy.collect_weights().tobytes()  # once only
    assert lora.merged().collect_weights().tobytes() == copy.collect_weights().tobytes()
    lora.unmerge()
    assert lora.model.collect_weights().tobytes() == before.tobytes()
    assert lora.forward(ids).tobytes() == expected.tobytes()
    lora.unmerge()
    assert lora.model.collect_weights().tobytes() == before.tobytes()


def test_merged_weights_have_the_scale_of_rslora(rng):
    lora = make_lora(4.0, use_rslora=True)
    ids, _ = make_batch(rng, lora.model)
    check_close(lora.merged().forward(ids), lora.forward(ids), 1e-5)


def test_there_is_no_training_while_merged(rng):
    lora = make_lora()
    ids, labels = make_batch(rng, lora.model)
    lora.merge()
    with pytest.raises(RuntimeError, match=r"call unmerge\(\) to train on"):
        lora.compute_loss(ids, labels, backward=True)
    lora.unmerge()
    assert lora.compute_loss(ids, labels, backward=True).loss > 0


def test_a_backward_needs_a_forward_through_the_same_weights(rng):
    """merge and unmerge change what the next pass runs through; what an earlier one has kept is of no use to it."""
    lora = make_lora()
    ids, _ = make_batch(rng, lora.model)
    dlogits = lora.forward(ids)
    lora.merge()
    lora.unmerge()
    with pytest.raises(RuntimeError, match="backward needs the activations of a forward"):
        lora.backward(dlogits)
    lora.merge()
    lora.forward(ids)
    lora.unmerge()
    with pytest.raises(RuntimeError, match="backward needs the activations of a forward"):
        lora.backward(dlogits)


# -- costs and borders ---------------------------------------------------------------------------


def test_an_adapter_without_a_place_is_an_error(rng, monkeypatch):
    """A family may lack a projection: whoever names it is told; all means all that there are."""

    def without_feed_forward(shape):
        return [layer for layer in FAMILY.layers(shape) if not isinstance(layer, FeedForward)]

    monkeypatch.setitem(FAMILIES, ModelFamily.LLAMA, replace(FAMILY, layers=without_feed_forward))
    model = make_model()
    with pytest.raises(ConfigError, match=r"'up_proj'\): .* no such projection; try q_proj, k_proj, v_proj, o_proj, "):
        LoraModel(model, LoraConfig(target_modules=("q_proj", "up_proj")))
    assert LoraModel(model).train_step(*make_batch(rng, model)) > 0


def test_number_of_trained_parameters():
    """The figure of the DeepZig model, from the spec: 10 240 r in each of 8 layers."""
    deepzig = TrainableModelConfig(
        hidden_dim=512, num_layers=8, num_heads=8, num_kv_heads=8, intermediate_dim=1536, vocab_size=16
    )
    model = TrainableModel(deepzig, np.zeros(deepzig.num_params(), np.float32))
    for rank, expected in ((8, 655_360), (16, 1_310_720), (32, 2_621_440)):
        lora = LoraModel(model, LoraConfig(rank=rank))
        assert lora.num_params() == lora.parameters.weights_flat.size == expected
    assert "2,621,440 trained parameters" in lora.report()
    assert "rank 32: q_proj, k_proj" in repr(lora)


@pytest.mark.parametrize("targets", TARGETS, ids=" ".join)
def test_flops_equal_a_count_by_hand(targets):
    lora, T, R = make_lora(target_modules=targets), 11, 3
    c, total = lora.config, 0
    D = c.resolved_head_dim
    shapes = {
        **dict.fromkeys(("q_proj",), (c.hidden_dim, c.num_heads * D)),
        **dict.fromkeys(("k_proj", "v_proj"), (c.hidden_dim, c.num_kv_heads * D)),
        "o_proj": (c.num_heads * D, c.hidden_dim),
        **dict.fromkeys(("gate_proj", "up_proj"), (c.hidden_dim, c.intermediate_dim)),
        "down_proj": (c.intermediate_dim, c.hidden_dim),
    }
    order = ["q_proj k_proj v_proj", "o_proj", "gate_proj up_proj", "down_proj"]  # what is before an adapter has no dx
    first = next(at for at, names in enumerate(order) if set(names.split()) & set(targets))
    for layer in range(c.num_layers):
        for name, (inner, outer) in shapes.items():
            dx = layer > 0 or next(at for at, names in enumerate(order) if name in names.split()) > first
            total += (1 + dx) * 2 * T * inner * outer  # y = x Wᵀ, dx = dy W
            if name in targets:
                total += 3 * 2 * T * outer * R  # y = u Bᵀ, du = dy B, dB = dyᵀ u
                total += (2 + dx) * 2 * T * inner * R  # u = x Aᵀ, dA = duᵀ x, dx = du A
    total += 2 * 2 * T * c.hidden_dim * c.vocab_size
    products = 6 * c.num_layers - 4 * (first > 0)  # without adapters on q k v the first attention has no backward
    total += products * c.num_heads * T * (T + 1) // 2 * 2 * D
    check_close(T * lora.flops_per_token(T), total, 1e-12)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("options", [{}, *STRATEGIES], ids=lambda options: options.get("checkpointing", "none"))
def test_the_plan_is_what_is_allocated(rng, options, dropout):
    lora = make_lora(shape={"num_layers": 3, **options}, dropout=dropout)
    ids, labels = make_batch(rng, lora.model, 2, 16, ignored=0)
    step(lora, ids, labels)
    plan = lora.memory_plan(2, 16)
    assert plan["weights"] == lora.model.parameters.weights_flat.nbytes + lora.parameters.weights_flat.nbytes
    assert plan["gradients"] == lora.parameters.gradients_flat.nbytes
    assert plan["moments"] == 2 * plan["gradients"]
    arena = lora.stack.arena.nbytes()
    assert plan["saved activations"] + plan["scratch"] == arena


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"rank": 0}, r"rank \(0\) must be at least 1"),
        ({"alpha": 0}, r"alpha \(0.0\) must be a positive number"),
        ({"alpha": "nan"}, r"alpha \(nan\) must be a positive number"),
        ({"dropout": 1}, r"dropout \(1.0\) must be at least 0 and below 1"),
        ({"target_modules": ()}, "must name at least one projection"),
        ({"bias": "some"}, r"bias \(some\) must be none, all or lora_only"),
        ({"target_modules": ("q_proj", ".*v_proj")}, r"must be names, or one regular expression alone; join them with"),
        ({"target_modules": "(q"}, r"target_modules \('\(q'\) must be a regular expression; missing \)"),
        ({"target_modules": ("all-linear", "q")}, "must be all-linear alone"),
        ({"target_modules": ".*q", "layers_to_transform": 1}, "must not stand beside a regular expression"),
        ({"layers_to_transform": (-1,)}, "must be numbers of blocks"),
        ({"layers_to_transform": "one"}, r"layers_to_transform \('one'\) must be a whole number"),
        ({"layers_pattern": "layers"}, "acts only with layers_to_transform"),
        ({"ensure_weight_tying": True}, "acts only with modules_to_save"),
        ({"rank_pattern": {"q_proj": 0}}, r"rank_pattern \(q_proj=0\) must be NAME=VALUE, with a whole number of 1"),
        ({"rank_pattern": f"q_proj=1{400 * '0'}"}, r"rank_pattern .* must be NAME=VALUE, with a whole number of 1"),
        ({"rank_pattern": "q_proj"}, r"rank_pattern \(q_proj\) must be NAME=VALUE"),
        ({"alpha_pattern": ("q=320", "q_proj=8")}, "give each NAME once"),
        ({"rank_pattern": ("q=16", "q=16")}, "give each NAME once"),
        ({"alpha_pattern": {"(": 2}}, "must be a regular expression"),
        ({"alpha_pattern": {"q_proj": "nan"}}, "with a positive number"),
        ({"seed": -1}, r"seed \(-1\) must be at least 0"),
    ],
)
def test_a_wrong_config_is_refused(values, message):
    with pytest.raises(ConfigError, match=message):
        LoraConfig(**values)


def test_config():
    assert LoraConfig().scaling == 2
    assert LoraConfig(rank=16, alpha=32, use_rslora=True).scaling == 8
    assert LoraConfig(target_modules=("v_proj", "q_proj", "v_proj")).target_modules == ("v_proj", "q_proj")
    assert make_lora(target_modules=("v_proj", "q_proj")).lora.target_modules == ("q_proj", "v_proj")  # as in the model
    assert LoraConfig(target_modules="up_proj").target_modules == ("up_proj",)


def test_adapters_go_on_a_whole_model_only():
    for wrong in (make_lora(), None, make_model().config):
        with pytest.raises(TypeError, match="adapters are put on a TrainableModel"):
            LoraModel(wrong)
