"""The arena: gradient checkpointing, its memory, reuse, and no allocation once it is there."""

import gc
import tracemalloc
from dataclasses import replace

import numpy as np
import pytest
from small_models import make_batch, make_model

from abi_py.config import CheckpointingStrategy, LlmTrainingConfig
from abi_py.families import FAMILIES, Family, layers
from abi_py.families.llama import FAMILY, NAMES
from abi_py.generation.decoder import Decoder
from abi_py.gradcheck import check_close
from abi_py.kernels.engine.jit import JIT
from abi_py.kernels.engine.scratch import LINE_BYTES
from abi_py.kernels.optimizers import adamw_, parameter_chunks
from abi_py.model.arena import Slots, parts_of
from abi_py.model.layers.attention import Attention
from abi_py.model.layers.feed_forward import FeedForward
from abi_py.model.layers.norm import RmsNorm
from abi_py.model.layers.run import Angles
from abi_py.parameters import HfName
from abi_py.shape import ModelFamily
from abi_py.training.optimizer import Optimizer

LAYERS = 5
TIME = 17 if JIT else 3
STRATEGIES = [
    {"checkpointing": "every_n_layers", "checkpoint_interval": 1},
    {"checkpointing": "every_n_layers", "checkpoint_interval": 2},
    {"checkpointing": "every_n_layers", "checkpoint_interval": 3},
    {"checkpointing": "every_n_layers", "checkpoint_interval": 99},
    {"checkpointing": "attention_only"},
    {"checkpointing": "full"},
]


def identify(options):
    return " ".join(str(value) for value in options.values())


def step(model, ids, labels, **options):
    model.zero_gradients()
    result = model.compute_loss(ids, labels, backward=True, **options)
    return result.loss, model.parameters.gradients_flat.copy()


# -- checkpointing -------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("options", STRATEGIES, ids=identify)
def test_strategies_give_the_same_bits(rng, options, tied):
    """What is computed again is computed in the same way: gradients agree to the last bit."""
    plain = make_model(4.0, num_layers=LAYERS, tie_embeddings=tied)
    model = make_model(4.0, num_layers=LAYERS, tie_embeddings=tied, **options)
    ids, labels = make_batch(rng, plain, 2, TIME)
    segments = np.sort(rng.integers(0, 3, ids.shape))
    for marks in ({}, {"segment_ids": segments}):
        expected, got = step(plain, ids, labels, **marks), step(model, ids, labels, **marks)
        assert got[0] == expected[0]
        assert got[1].tobytes() == expected[1].tobytes()
    dlogits = rng.standard_normal((2, TIME, 97)).astype(np.float32)
    for each in (plain, model):
        each.zero_gradients()
        each.forward(ids)
        each.backward(dlogits)
    assert plain.parameters.gradients_flat.tobytes() == model.parameters.gradients_flat.tobytes()


def uneven_layers(shape):
    """Return blocks of three branches, each in another order, whose widths differ from block to block."""
    width, angles = shape.hidden_dim, Angles(shape.resolved_head_dim, shape.rope_theta, shape.max_seq_len)
    embedding, *_, head = FAMILY.layers(shape)
    branches = []
    for i in range(shape.num_layers):
        kv_heads, inner = 1 + i % 2, 16 * (1 + i % 3)
        sizes = width, shape.num_heads, kv_heads, shape.resolved_head_dim
        kinds = [
            Attention(f"layers.{i}.", i, *sizes, RmsNorm("attn_norm", width, shape.norm_eps), angles),
            FeedForward(f"layers.{i}.", i, width, inner, RmsNorm("ffn_norm", width, shape.norm_eps)),
            FeedForward(f"layers.{i}.second.", i, width, 112 - inner, RmsNorm("ffn_norm", width, shape.norm_eps)),
        ]
        branches += kinds[i % 3 :] + kinds[: i % 3]
    return [embedding, *branches, head]


def uneven_names(name):
    """Return names of a tensor, which no folder holds."""
    return (HfName(name),), name


@pytest.mark.parametrize("options", STRATEGIES, ids=identify)
def test_blocks_may_differ_in_their_branches_and_widths(rng, options, monkeypatch):
    family = Family(**{**vars(FAMILY), "layers": uneven_layers, "names": NAMES})
    monkeypatch.setattr(Family, "names_of", lambda self, name: uneven_names(name))
    monkeypatch.setitem(FAMILIES, ModelFamily.LLAMA, family)
    plain, model = (make_model(4.0, num_layers=LAYERS, **each) for each in ({}, options))
    ids, labels = make_batch(rng, plain, 2, TIME)
    for precision in ("fp32", "bf16"):
        expected, got = (step(each, ids, labels, precision=precision) for each in (plain, model))
        assert got[0] == expected[0]
        assert got[1].tobytes() == expected[1].tobytes()
    fresh = make_model(4.0, num_layers=LAYERS, **options)
    fresh.train_step(ids, labels)
    plan = fresh.memory_plan(2, TIME)
    assert plan["saved activations"] + plan["scratch"] == arena_bytes(fresh)


def test_a_table_of_angles_is_as_long_as_was_asked_while_another_thread_asks_for_less():
    """Two decoders over one model grow one table; what is returned is read without a look at its length."""

    class Raced(Angles):
        kept = None

        @property
        def _table(self):
            return self.kept

        @_table.setter
        def _table(self, table):
            self.kept = table and tuple(part[:2] for part in table)  # the other thread's, which came later

    assert [len(part) for part in Raced(8, 10000.0, 64).upto(9)] == [9, 9]


def own_arrays(model, rows):
    """Return the saved arrays of a step that borrows which do not lie in gradients."""
    gradients = model.parameters.gradients_memory
    return [a for a in model.stack.arena.saved(rows, borrows=True) if not np.shares_memory(a, gradients)]


def arena_bytes(model):
    return model.stack.arena.nbytes()


@pytest.mark.parametrize("options", [{}, *STRATEGIES], ids=identify)
def test_the_plan_is_what_is_allocated(rng, options):
    model = make_model(4.0, num_layers=LAYERS, **options)
    ids, labels = make_batch(rng, model, 2, 16, ignored=0)
    model.train_step(ids, labels)
    plan = model.memory_plan(2, 16)
    assert plan["saved activations"] == sum(array.nbytes for array in own_arrays(model, 2 * 16))
    assert plan["saved activations"] + plan["scratch"] == arena_bytes(model)
    model.train_step(ids, labels)  # which adds to the gradients
    plan = model.memory_plan(2, 16, accumulates=True)
    assert plan["weights"] == model.parameters.weights_flat.nbytes
    assert plan["gradients"] == model.parameters.gradients_flat.nbytes
    assert plan["moments"] == 2 * plan["weights"]
    assert plan["saved activations"] + plan["scratch"] == arena_bytes(model)
    assert plan["saved activations"] == sum(array.nbytes for array in model.stack.arena.saved(2 * 16))


def test_what_products_read_and_write_begins_at_cache_lines(rng):
    """Weights, gradients, moments, saved activations, scratch, logits, and a decoder's arrays."""
    model = make_model(num_layers=2)
    ids, labels = make_batch(rng, model, 1, 13)
    for precision in ("fp32", "bf16"):
        model.compute_loss(ids, labels, backward=True, precision=precision)
    arena, decoder = model.stack.arena, Decoder(model, 2)
    found = {"weights": model.parameters.weights_flat, "gradients": model.parameters.gradients_flat}
    found |= Optimizer(model.parameters, LlmTrainingConfig()).moments
    found |= {str(key): array for key, array in arena._flat.items()} | arena._scratch
    found |= {"logits": model.forward(ids), "decoder's logits": decoder._logits}
    few = decoder._arrays(2, 2)
    found |= {"decoder's x": few.x, "decoder's n": few.n, "decoder's r": few.r}
    for branch, arrays in zip(decoder._stack.branches, few.branches, strict=True):
        found |= {f"decoding {name}": getattr(arrays, name) for name in branch.decoding()}
    for keys, values in decoder.cache.kept.values():
        found |= {"keys": keys, "values": values}
    assert not {name for name, array in found.items() if array.size and array.ctypes.data % LINE_BYTES}


def test_strategies_save_memory():
    """none, every two layers, full: each saves less; attention_only keeps its entries for one layer alone."""

    def saved(**options):
        return make_model(num_layers=LAYERS, **options).memory_plan(2, 16, accumulates=True)["saved activations"]

    none = saved()
    tables = [branch.saved() for branch in make_model(num_layers=1).stack.branches]
    entries = [entry for table in tables for entry in table.values()]
    row = 4 * sum(entry.width for entry in entries)
    assert none == 2 * 16 * LAYERS * row
    every_two = saved(checkpointing="every_n_layers", checkpoint_interval=2)
    full = saved(checkpointing="full")
    assert none > every_two > full
    assert full == 2 * 16 * (row + 4 * 48 * (LAYERS - 1))  # one layer's arrays, and the inputs of the others
    attention = 4 * sum(entry.width for entry in entries if entry.again)
    assert saved(checkpointing="attention_only") == none - 2 * 16 * attention * (LAYERS - 1)
    assert saved(checkpointing="every_n_layers", checkpoint_interval=99) == none


@pytest.mark.parametrize("options", [{}, *STRATEGIES], ids=identify)
def test_inputs_of_layers_never_share_an_array(options):
    """Within a segment each layer has an input of its own, and so has the first layer of each segment."""
    model = make_model(num_layers=LAYERS, **options)
    config, branches = model.config, model.stack.branches
    slots, entry = Slots(config, branches), branches[0].saved()["x"]

    def slot(block):
        return slots.slot(2 * block, "x", entry)

    length = {"none": LAYERS, "attention_only": LAYERS, "full": 1}.get(config.checkpointing.value)
    length = length or config.checkpoint_interval
    for start in range(0, LAYERS, length):
        inside = range(start, min(start + length, LAYERS))
        assert len({slot(block) for block in inside}) == len(inside)
    firsts = {slot(block) for block in range(0, LAYERS, length)}
    others = {slot(block) for block in range(LAYERS) if block % length}
    assert not firsts & others
    assert len(firsts) == len(range(0, LAYERS, length))


def test_every_strategy_is_tested():
    tested = {options["checkpointing"] for options in STRATEGIES} | {"none"}
    assert tested == {strategy.value for strategy in CheckpointingStrategy}


def ids_of_arrays(model):
    arena = model.stack.arena
    return {key: id(array) for arrays in (arena._flat, arena._scratch) for key, array in arrays.items()}


# -- activations in the memory of gradients --------------------------------------------------------


def all_weights(layer):
    """Return the weights of a layer and of its linear layers."""
    return [*layer.weights, *(weight for linear in layer.linears for weight in linear.weights)]


@pytest.mark.parametrize("family", [family.value for family in ModelFamily])
@pytest.mark.parametrize("options", [{}, *STRATEGIES[1:]], ids=identify)
def test_what_lies_in_gradients_is_read_before_they_are_written(rng, options, family):
    """No array that a branch uses lies in gradients of the head, of a branch above, or its own."""
    model = make_model(num_layers=LAYERS, num_kv_heads=4, family=family, **options)
    branches = model.stack.branches
    for narrow in (False, True):
        made = model.stack.arena.arrays(8, narrow, True).saved
        gradients = model.parameters.gradients_memory
        borrowed = [[a for a in vars(each).values() if np.shares_memory(a, gradients)] for each in made]
        assert any(borrowed)
        for i, arrays in enumerate(borrowed):
            above = [weight.dw for layer in (*branches[i:], model.stack.head) for weight in all_weights(layer)]
            assert not any(np.shares_memory(a, dw) for a in arrays for dw in (*above, *model._added_to))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("options", [{}, *STRATEGIES], ids=identify)
def test_activations_in_gradients_give_the_same_bits(rng, options, precision):
    """A pass over gradients that read as zero borrows their memory, one that adds to zeros does not."""
    model = make_model(4.0, num_layers=LAYERS, **options)
    ids, labels = make_batch(rng, model, 1, 8)
    model.zero_gradients()
    model.parameters.gradients_memory.fill(np.nan)
    losses, flat = [], []
    for _ in range(2):
        assert model.parameters.lends is (not losses)
        losses.append(model.compute_loss(ids, labels, backward=True, precision=precision).loss)
        flat.append(model.parameters.gradients_flat.copy())
        model.parameters.gradients_flat.fill(0)  # not `zero_gradients`: what is there is read
    assert losses[0] == losses[1]
    np.testing.assert_array_equal(*flat)


def test_a_loss_between_backward_passes_leaves_the_gradients(rng):
    model, ids = make_model(), np.arange(8)
    model.train_step(ids, ids)
    before = model.parameters.gradients_flat.copy()
    model.compute_loss(ids[::-1], ids)
    model.forward(ids)
    np.testing.assert_array_equal(model.parameters.gradients_flat, before)


def test_a_forward_by_itself_borrows_nothing(rng):
    """Between it and its backward the user may read the gradients, which makes them zeros."""
    one, other = make_model(4.0), make_model(4.0)
    ids, dlogits = np.arange(8), rng.standard_normal((1, 8, 97)).astype(np.float32)
    for model in (one, other):
        model.forward(ids[None])
        if model is other:
            assert not model.parameters.gradients_flat.any()
        model.backward(dlogits)
    np.testing.assert_array_equal(one.parameters.gradients_flat, other.parameters.gradients_flat)


@pytest.mark.parametrize("family", [family.value for family in ModelFamily])
def test_every_matrix_of_a_branch_is_overwritten_and_so_lent(family):
    """A description without weights says the same: the memory plan follows from it."""
    model = make_model(num_layers=2, num_kv_heads=4, family=family)
    described = parts_of(layers(model.config))[1]
    for branch, unbound in zip(model.stack.branches, described, strict=True):
        specs = {branch.at + spec.name for spec in branch.tensors() if len(spec.shape) > 1}
        assert specs == branch.overwritten() == unbound.overwritten()


class Adding(FeedForward):
    """A branch that adds to the gradients of its matrices too, so it names none that it overwrites."""

    def overwritten(self):
        return set()

    def backward(self, dx, a, s, run, below):
        super().backward(dx, a, s, replace(run, accumulate=True), below)


def adding_layers(shape):
    made = FAMILY.layers(shape)
    for i, layer in enumerate(made):
        if isinstance(layer, FeedForward):
            norm = RmsNorm("ffn_norm", shape.hidden_dim, shape.norm_eps)
            made[i] = Adding(layer.at, layer.block, shape.hidden_dim, shape.intermediate_dim, norm)
    return made


def test_gradients_that_are_added_to_are_not_lent(rng, monkeypatch):
    """They are filled with 0 when backward begins, and the activations are read after that."""
    plain = make_model(4.0, num_layers=LAYERS)
    ids, labels = make_batch(rng, plain, 1, 16, ignored=0)
    expected = step(plain, ids, labels)
    monkeypatch.setitem(FAMILIES, ModelFamily.LLAMA, Family(**{**vars(FAMILY), "layers": adding_layers}))
    model = make_model(4.0, num_layers=LAYERS)
    got = step(model, ids, labels)
    assert got[0] == expected[0]
    check_close(got[1], expected[1], 1e-6)
    added_to = [weight for branch in model.stack.branches[1::2] for weight in all_weights(branch)]
    matrices = [weight.dw for weight in added_to if weight.w.ndim > 1]
    assert matrices
    gradients, saved = model.parameters.gradients_memory, model.stack.arena.saved(16, borrows=True)
    lent = [array for array in saved if np.shares_memory(array, gradients)]
    assert lent  # by attention
    assert not any(np.shares_memory(array, dw) for array in lent for dw in matrices)
    plan = model.memory_plan(1, 16)
    assert plan["saved activations"] + plan["scratch"] == arena_bytes(model)


class Calling:
    """A check that calls a function and lets attention go on."""

    def __init__(self, function):
        self.function, self.flag = function, np.zeros(1, np.uint8)

    def __call__(self):
        self.function()


def test_gradients_cannot_be_read_while_activations_lie_in_them(rng):
    """Reading makes them zeros, which would ruin the activations of the pass and leave what its backward adds to."""
    model = make_model(4.0, num_layers=LAYERS)
    ids, labels = make_batch(rng, model, 1, 8)
    expected, looks = step(model, ids, labels), []

    def look():
        for read in (lambda: model.gradients, lambda: model.parameters.gradients_flat, model.compute_gradient_norm):
            with pytest.raises(RuntimeError, match=r"gradients cannot be read inside a pass .* after its backward"):
                read()
        looks.append(model.parameters.passes)

    got = step(model, ids, labels, check=Calling(look))
    assert len(set(looks)) == 2  # in forward and in backward
    assert got[0] == expected[0]
    assert got[1].tobytes() == expected[1].tobytes()
    model.compute_loss(ids, labels, backward=True, check=Calling(model.compute_gradient_norm))
    check_close(model.parameters.gradients_flat, 2 * expected[1], 1e-6)  # it added, and lent nothing


def test_gradients_are_zeros_after_a_forward_that_was_given_up(rng):
    model = make_model()
    ids, labels = make_batch(rng, model, 1, 8)
    seen = model.gradients["layers.0.w_q"]
    model.zero_gradients()

    def give_up():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        model.compute_loss(ids, labels, backward=True, check=Calling(give_up))
    assert seen.any()  # a view that was taken before shows activations until gradients are looked at again
    assert not model.gradients["layers.0.w_q"].any()
    assert not seen.any()


# -- reuse ---------------------------------------------------------------------------------------


def test_other_shapes_use_the_same_memory(rng):
    model = make_model(4.0)
    sizes = [(3, 20), (2, 13), (1, 1), (4, 15), (60, 1), (1, 32), (3, 20)] if JIT else [(2, 3), (1, 5), (6, 1)]
    batches = [make_batch(rng, model, *size) for size in sizes]
    model.train_step(*batches[0])
    arrays = ids_of_arrays(model)
    for batch in batches:
        got, fresh = step(model, *batch), step(make_model(4.0), *batch)
        assert got[0] == fresh[0]
        assert got[1].tobytes() == fresh[1].tobytes()
    assert ids_of_arrays(model) == arrays


def test_a_larger_batch_makes_the_arena_grow(rng):
    model = make_model(4.0)
    model.train_step(*make_batch(rng, model, 1, 8))  # whole cache lines, of which no rest is lost
    small = arena_bytes(model)
    batch = make_batch(rng, model, 3, 16)
    got, fresh = step(model, *batch), step(make_model(4.0), *batch)
    assert got[1].tobytes() == fresh[1].tobytes()
    plans = [model.memory_plan(1, 8), model.memory_plan(3, 16)]
    assert [small, arena_bytes(model)] == [plan["saved activations"] + plan["scratch"] for plan in plans]


def test_two_models_do_not_disturb_each_other(rng):
    one, other = make_model(4.0), make_model(4.0, seed=9)
    ids, _ = make_batch(rng, one)
    dlogits = rng.standard_normal((2, 13, 97)).astype(np.float32)
    one.forward(ids)
    one.backward(dlogits)
    expected = one.parameters.gradients_flat.copy()
    one.zero_gradients()
    one.forward(ids)
    other.forward(ids[:, ::-1])
    other.backward(dlogits)
    one.backward(dlogits)
    assert one.parameters.gradients_flat.tobytes() == expected.tobytes()


@pytest.mark.skipif(not JIT, reason="plain Python makes arrays in every operation")
@pytest.mark.parametrize("options", [{}, {"checkpointing": "full"}, {"tie_embeddings": False}], ids=identify)
def test_a_step_allocates_nothing_but_its_result(rng, options):
    """What Python and NumPy allocate during a later step is far smaller than any of its arrays, and does not grow."""
    model = make_model(4.0, hidden_dim=64, vocab_size=499, max_seq_len=64, **options)
    table, flat = model.parameters.table, model.parameters.weights_flat
    chunks, decay = parameter_chunks([t.offset for t in table], [t.size for t in table], [t.decay for t in table])
    m, v = np.zeros_like(flat), np.zeros_like(flat)
    batches = [make_batch(rng, model, 8, 64) for _ in range(3)]  # the residual stream alone is 128 KiB

    def train(number):
        model.zero_gradients()
        model.train_step(*batches[number % 3])
        norm = model.compute_gradient_norm()
        gradients = model.parameters.gradients_flat
        adamw_(flat, m, v, gradients, chunks, decay, 1e-4, 0.9, 0.999, 1e-8, 0.01, number + 1, 1 / max(norm, 1.0))

    for number in range(3):
        train(number)
    gc.collect()
    tracemalloc.start()
    try:
        train(3)
        before, _ = tracemalloc.get_traced_memory()
        tracemalloc.reset_peak()
        for number in range(4, 12):
            train(number)
        after, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak - before < 60_000
    assert after - before < 5_000
