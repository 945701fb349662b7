"""Replayed passes: the bits of Python's, for every family and way of training, and never of another pass."""

import gc
import threading
import weakref

import numba
import numpy as np
import pytest
from small_models import make_batch, make_model

from abi_py.config import CheckpointingStrategy, LoraConfig, Precision, TrainableModelConfig
from abi_py.families import FAMILIES
from abi_py.kernels import matmul
from abi_py.kernels.engine import replay, threads
from abi_py.kernels.engine.calls import NotNumbers
from abi_py.kernels.engine.jit import JIT
from abi_py.model import LoraModel, TrainableModel, passes
from abi_py.model.layers.activation import Swiglu
from abi_py.model.layers.linear import Linear
from abi_py.model.layers.run import Angles
from abi_py.model.stack import Stack

pytestmark = pytest.mark.skipif(not JIT, reason="nothing is compiled, so nothing is replayed")

FORMATS = [Precision.FP32, Precision.BF16, Precision.FP16]
SMALL = {"hidden_dim": 48, "num_layers": 2, "num_heads": 4, "intermediate_dim": 64, "vocab_size": 61, "max_seq_len": 24}


@pytest.fixture
def replays(replays, monkeypatch):
    """Return the recordings that were replayed so far, without trials of one thread and more, kinds of their own."""
    monkeypatch.setattr(threads, "SMALL", 0.0)
    return replays


def run_twice(monkeypatch, make, script):
    """Return what script(model) returns with replays and without, each with a model of its own."""
    found = []
    for setting in ("1", "0"):
        monkeypatch.setattr(replay, "SETTING", setting)
        found.append(script(make()))
    return found


def same_bits(one, other):
    """Hold two lists of arrays and numbers to the same bits."""
    assert len(one) == len(other)
    for x, y in zip(one, other, strict=True):
        assert np.asarray(x).tobytes() == np.asarray(y).tobytes()


def train(model, batches, rate=0.1, **options):
    """Return the losses and gradients of a step for each batch, after which the weights have changed."""
    found = []
    for batch in batches:
        model.zero_gradients()
        out = model.compute_loss(*batch, backward=True, **options)
        flat = model.parameters.gradients_flat
        found += [out.token_losses, out.num_correct, flat.copy(), *out.penalties.values()]
        model.parameters.weights_flat -= np.float32(rate) * flat
    return found


def passes_of(model, narrow=False):
    """Return the kinds of passes over 26 rows that are known, of steps that begin with empty gradients."""
    return model.stack.arena.arrays(26, narrow, True).passes


def batches_of(model, count=5, **sizes):
    """Return so many different batches; of every label, and in the end of some."""
    rng = np.random.default_rng(3)
    return [make_batch(rng, model, ignored=0 if i < count - 1 else 0.3, **sizes) for i in range(count)]


@pytest.mark.parametrize("precision", FORMATS, ids=str)
@pytest.mark.parametrize("family", list(FAMILIES), ids=lambda family: family.value)
def test_every_family_has_the_bits_of_python(family, precision, monkeypatch, replays):
    """Losses, penalties and gradients of five steps are the same, and three of them were replayed."""
    config = TrainableModelConfig(**SMALL, head_dim=16).replace(family=family)

    def script(model):
        found = train(model, batches_of(model), precision=precision, z_loss=1e-3, label_smoothing=0.1)
        assert passes_of(model, precision is Precision.BF16).refused == []
        assert replay.SETTING == "0" or len(passes_of(model, precision is Precision.BF16)) > 0
        return found

    same_bits(*run_twice(monkeypatch, lambda: TrainableModel(config), script))
    assert len(replays) >= 5


@pytest.mark.parametrize("precision", [Precision.BF16X3, Precision.BF16X6], ids=str)
def test_products_of_parts_are_replayed(precision, monkeypatch, replays):
    """Formats whose numbers have several parts."""
    same_bits(*run_twice(monkeypatch, make_model, lambda model: train(model, batches_of(model), precision=precision)))
    assert len(replays) == 5


@pytest.mark.parametrize("strategy", list(CheckpointingStrategy), ids=lambda strategy: strategy.value)
def test_gradient_checkpointing_is_replayed(strategy, monkeypatch, replays):
    """Blocks that are computed again are part of the pass."""
    every = {"checkpoint_interval": 2} if strategy is CheckpointingStrategy.EVERY_N_LAYERS else {}
    same_bits(
        *run_twice(
            monkeypatch,
            lambda: make_model(num_layers=4, checkpointing=strategy, **every),
            lambda model: train(model, batches_of(model)),
        )
    )
    assert len(replays) == 5  # three times forward, and twice backward: the fourth has other labels


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_adapters_are_replayed(dropout, monkeypatch, replays):
    """The masks of dropout are those of the pass, not of the one that was noted; merging in between changes nothing."""

    def make():
        return LoraModel(make_model(), LoraConfig(rank=2, dropout=dropout))

    def script(model):
        found = train(model, batches_of(model), rate=1.0)
        model.merge()
        found.append(model.compute_loss(*batches_of(model)[0]).token_losses)
        model.unmerge()
        return found + train(model, batches_of(model), rate=1.0) + [model.draws]

    same_bits(*run_twice(monkeypatch, make, script))
    assert len(replays) > 10


def test_whatever_comes_in_between_is_not_replayed_for_it(monkeypatch, replays):
    """Other shapes, marks, precisions, objectives, threads, windows, weights, and evaluations, in a random order."""
    most = numba.get_num_threads()

    def script(model):
        rng, found = np.random.default_rng(11), []
        weights = model.collect_weights()
        batches = [make_batch(rng, model, ignored=0) for _ in range(3)]
        ways = [{}, {}, {"precision": "bf16"}, {"z_loss": 0.01}, {"label_smoothing": 0.2}, {"loss_scale": 8.0}]
        ways += [{"reduction": "sum"}, {"attention_mask": rng.integers(0, 2, (2, 13)).astype(np.uint8)}]
        ways += [{"segment_ids": np.sort(rng.integers(0, 3, (2, 13)), axis=1)}]
        for turn in range(60):
            batch = batches[rng.integers(3)]
            match rng.integers(9):
                case 0:
                    batch = make_batch(rng, model, batch=int(rng.integers(1, 4)), time=int(rng.integers(3, 20)))
                    found += train(model, [batch])
                    continue
                case 1:
                    found.append(model.compute_loss(*batch).token_losses)
                case 2:
                    model.distribute_weights(weights)
                case 3:
                    numba.set_num_threads(1 + turn % most)
                case 4:
                    found.append(model.forward(batch[0]))
                case 5:  # a window of two micro-batches
                    model.zero_gradients()
                    for _ in range(2):
                        model.compute_loss(*batch, backward=True)
                    found.append(model.parameters.gradients_flat.copy())
                case 6:
                    found.append(model.compute_loss(batch[0], np.full_like(batch[1], -100), backward=True).token_losses)
            found += train(model, [batch], rate=0.01, **ways[rng.integers(len(ways))])
        numba.set_num_threads(most)
        return found

    try:
        same_bits(*run_twice(monkeypatch, make_model, script))
    finally:
        numba.set_num_threads(most)
    assert len(replays) > 30


def test_each_python_thread_replays_with_its_own_scratch(replays):
    """A pass that one thread noted is not another's: two threads that live at once take turns, four passes each."""
    model, turns = make_model(), threading.Barrier(2)
    batches = [batch for batch in batches_of(model)[:4] for _ in range(2)]
    expected, found, seen = train(make_model(), batches), [], []
    replays.clear()

    def work(me):
        for i, batch in enumerate(batches):
            turns.wait(60)
            if i % 2 == me:
                found.extend(train(model, [batch]))
                seen.append(len(replays))

    both = [threading.Thread(target=work, args=(me,)) for me in range(2)]
    for thread in both:
        thread.start()
    for thread in both:
        thread.join()
    same_bits(found, expected)
    assert seen == [0, 0, 0, 0, 2, 4, 6, 8]  # each thread's first pass is plain, and its second is noted


def test_a_thread_with_the_number_of_one_that_has_ended_is_another(replays):
    """Linux gives the number of a thread that has ended to the next one."""
    model = make_model()
    batches = batches_of(model)
    for i in range(12):
        thread = threading.Thread(target=train, args=(model, [batches[i % 4]]))
        thread.start()
        thread.join()
    assert not replays  # none of them has made a second pass


class Leaky(Swiglu):
    """SwiGLU with something of NumPy's after it, which it does not tell."""

    def forward(self, h, u):
        """Write h, and change it."""
        super().forward(h, u)
        h *= np.float32(1.5)


def test_a_layer_that_does_not_say_that_it_only_calls_kernels_stays_python(monkeypatch, replays):
    """A class made from one of ours may do anything between its kernels: what surrounds it is replayed, it is run."""

    def make():
        model = make_model()
        for branch in model.stack.branches[1::2]:
            branch.activation = Leaky()
        model.stack = Stack(model.config, model.layers)
        return model

    same_bits(*run_twice(monkeypatch, make, lambda model: train(model, batches_of(model))))
    assert replays


class LeakyLinear(Linear):
    """A linear layer with something of NumPy's after it, which it does not tell."""

    def forward(self, y, *others, **named):
        """Write y, and change it."""
        super().forward(y, *others, **named)
        y *= np.float32(1.5)


class LeakyAngles(Angles):
    """Angles that grow from pass to pass."""

    def of(self, run, capacity=0):
        """Return them."""
        cos, sin, rows = super().of(run, capacity)
        self.passes = getattr(self, "passes", 0) + 1
        return cos, sin * np.float32(1 + self.passes / 100), rows


@pytest.mark.parametrize("kind", [LeakyLinear, LeakyAngles])
def test_pieces_of_other_classes_stay_python(kind, monkeypatch, replays):
    """A linear layer or angles of a class of one's own."""

    def make():
        model = make_model()
        for branch in model.stack.branches:
            piece = branch.linears[0] if kind is LeakyLinear else getattr(branch, "angles", None)
            if piece is not None:
                piece.__class__ = kind
        model.stack = Stack(model.config, model.layers)
        return model

    same_bits(*run_twice(monkeypatch, make, lambda model: train(model, batches_of(model))))
    assert replays


@pytest.mark.parametrize("place", ["branch", "linear", "norm"])
def test_a_hook_on_an_instance_is_called_in_every_pass(place, monkeypatch, replays):
    """One that comes after passes were noted, changes what is computed, and is taken away again."""

    def script(model):
        branch = model.stack.branches[1]
        layer = {"branch": branch, "linear": branch.linears[1], "norm": branch.norm}[place]
        batches, calls, inner = batches_of(model), [], layer.forward

        def hook(y, *others, **named):
            calls.append(y)
            inner(y, *others, **named)
            y *= np.float32(1.25)

        found = train(model, batches, rate=0.01)
        layer.forward = hook
        found += train(model, batches, rate=0.01)
        assert len(calls) == len(batches) * (2 if place == "norm" else 1)  # backward norms again
        del layer.forward
        before = len(replays)
        found += train(model, batches, rate=0.01)
        assert replay.SETTING == "0" or len(replays) > before
        return found

    same_bits(*run_twice(monkeypatch, make_model, script))


def test_marks_that_mark_nothing_are_none(monkeypatch, replays):
    """A mask of ones and segments of one number have the bits of a batch without them, and its replays."""

    def script(model, **marks):
        return train(model, batches_of(model), **marks)

    ones = np.ones((2, 13), np.uint8)
    expected = script(make_model())
    for marks in ({"attention_mask": ones}, {"segment_ids": 3 * ones}, {"attention_mask": ones, "segment_ids": ones}):
        replays.clear()
        same_bits(*run_twice(monkeypatch, make_model, lambda model, marks=marks: script(model, **marks)))
        assert len(replays) == 5
        same_bits(script(make_model(), **marks), expected)


def test_products_by_blas_are_replayed(monkeypatch, replays):
    """NumPy's products, ABI_MATMUL=blas, are part of the pass."""
    monkeypatch.setattr(matmul, "BACKEND", "blas")
    same_bits(*run_twice(monkeypatch, make_model, lambda model: train(model, batches_of(model))))
    assert len(replays) == 5


def test_a_long_step_is_left_to_python(monkeypatch, replays):
    """Above the limit, a stop is looked for between two layers, and Python costs nothing."""
    monkeypatch.setattr("abi_py.model.stack.LONG", 1.0)
    model = make_model()
    train(model, batches_of(model))
    assert not replays


def test_a_request_to_stop_is_seen_after_a_replayed_pass(replays):
    """`check` is called after forward and after backward; what it raises leaves them."""
    model = make_model()
    batch, seen = batches_of(model)[0], []

    class Check:
        flag = np.zeros(1, np.uint8)

        def __call__(self):
            seen.append(len(replays))
            if len(seen) > 100:
                raise InterruptedError

    for _ in range(3):
        model.compute_loss(*batch, backward=True, check=Check())
    seen.clear()
    model.compute_loss(*batch, backward=True, check=Check())
    assert seen == [1, 2]  # gradients were empty at the first step, which has other arrays
    seen.extend(range(100))
    with pytest.raises(InterruptedError):
        model.compute_loss(*batch, backward=True, check=Check())


def test_what_is_remembered_dies_with_the_arrays(replays):
    """Larger batches lay the arrays out anew; nothing keeps the old ones, and few kinds of passes are kept."""
    model = make_model()
    train(model, batches_of(model))
    arrays = weakref.ref(model.stack.arena.arrays(26))
    for scale in range(40):
        model.compute_loss(*batches_of(model)[0], backward=True, loss_scale=1.0 + scale)
    assert len(arrays().passes) <= 12
    replays.clear()
    for scale in range(20):  # what is used is kept, whatever else comes
        model.compute_loss(*batches_of(model)[0], backward=True)
        model.compute_loss(*batches_of(model)[0], backward=True, loss_scale=100.0 + scale)
    assert len(replays) == 2 * 20 - 2 + 20  # all but the first two backwards; forward has no scale
    train(model, batches_of(model, batch=3))
    gc.collect()
    assert arrays() is None


def test_why_a_pass_is_refused_is_kept(monkeypatch, replays):
    """A call that cannot be made again leaves the pass to Python, and says why."""

    def refuse(notes):
        raise NotNumbers("kernel returns something")

    monkeypatch.setattr(passes, "Recording", refuse)
    model = make_model()
    train(model, batches_of(model))
    assert not replays
    assert set(passes_of(model).refused) == {"kernel returns something"}


def test_the_setting_switches_it_off(monkeypatch, replays):
    """ABI_REPLAY=0."""
    monkeypatch.setattr(replay, "SETTING", "0")
    model = make_model()
    train(model, batches_of(model))
    assert not replays
