"""SGD, Adam, AdamW: references against PyTorch, kernels against them, chunks, decay, scale, threads and NaN."""

import numpy as np
import pytest

from abi_py.gradcheck import check_close
from abi_py.kernels.optimizers import adam_, adam_ref, adamw_, adamw_ref, parameter_chunks, sgd_, sgd_ref

OFFSETS, SIZES, DECAYS = [0, 1, 132, 139], [1, 131, 7, 400], [True, True, False, True]
CHUNKS, DECAY = parameter_chunks(OFFSETS, SIZES, DECAYS, size=64)
P = OFFSETS[-1] + SIZES[-1]
MASK = np.repeat(np.array(DECAYS, np.float64), SIZES)  # (P,)
LR, WEIGHT_DECAY, SCALE = 0.01, 0.1, 0.25
BETAS = 0.9, 0.999, 1e-8


def state(rng, dtype=np.float32):
    w, m, g = rng.standard_normal((3, P)).astype(dtype)
    return w, m, np.square(rng.standard_normal(P)).astype(dtype), g


def test_chunks_cover_each_tensor_and_never_cross():
    assert CHUNKS.dtype == np.int64
    assert DECAY.dtype == np.bool_
    covered = np.concatenate([np.arange(start, stop) for start, stop in CHUNKS])
    assert np.array_equal(covered, np.arange(P))
    assert (CHUNKS[:, 1] - CHUNKS[:, 0]).max() == 64
    for (start, stop), decays in zip(CHUNKS, DECAY, strict=True):
        tensor = np.searchsorted(OFFSETS, start, side="right") - 1
        assert stop <= OFFSETS[tensor] + SIZES[tensor]
        assert decays == DECAYS[tensor]


def test_no_tensors_no_chunks():
    chunks, decay = parameter_chunks([], [], [])
    assert chunks.shape == (0, 2)
    assert decay.shape == (0,)


@pytest.mark.parametrize("name", ["sgd", "sgd_momentum", "sgd_nesterov", "adam", "adamw"])
def test_definition(golden, name):
    g = golden("optimizers")
    lr, weight_decay = float(g["lr"]), float(g["weight_decay"])
    decay = np.repeat([1.0, 0.0], g["sizes"])
    w, m, v = g["w"], np.zeros_like(g["w"]), np.zeros_like(g["w"])
    for step, gradient in enumerate(g["g"], 1):
        if name.startswith("sgd"):
            momentum = 0.0 if name == "sgd" else 0.9
            w, m = sgd_ref(w, m, gradient, decay, lr, momentum, weight_decay, name == "sgd_nesterov", 1.0)
        else:
            reference = {"adam": adam_ref, "adamw": adamw_ref}[name]
            w, m, v = reference(w, m, v, gradient, decay, lr, *BETAS, weight_decay, step, 1.0)
        check_close(w, g[name][step - 1], 1e-10)


@pytest.mark.parametrize(("momentum", "nesterov"), [(0.0, False), (0.9, False), (0.9, True)])
def test_sgd_equals_the_reference(rng, momentum, nesterov):
    w, m, _, g = state(rng)
    settings = LR, momentum, WEIGHT_DECAY, nesterov, SCALE
    expected = sgd_ref(*(a.astype(np.float64) for a in (w, m, g)), MASK, *settings)
    kept = g.copy()
    sgd_(w, m, g, CHUNKS, DECAY, *settings)
    check_close(w, expected[0], 1e-6)
    check_close(m, expected[1], 1e-6)
    assert np.array_equal(g, kept)


def test_sgd_without_momentum_needs_no_buffer(rng):
    w, _, _, g = state(rng)
    expected = w - LR * SCALE * g.astype(np.float64)
    sgd_(w, np.empty(0, np.float32), g, CHUNKS, DECAY, LR, 0.0, 0.0, False, SCALE)
    check_close(w, expected, 1e-6)


@pytest.mark.parametrize("step", [1, 2, 1000, 10**6])
@pytest.mark.parametrize(("kernel", "reference"), [(adam_, adam_ref), (adamw_, adamw_ref)], ids=["adam", "adamw"])
def test_adam_equals_the_reference(rng, kernel, reference, step):
    w, m, v, g = state(rng)
    settings = LR, *BETAS, WEIGHT_DECAY, step, SCALE
    expected = reference(*(a.astype(np.float64) for a in (w, m, v, g)), MASK, *settings)
    update = expected[0] - w
    before, kept = w.astype(np.float64), g.copy()
    kernel(w, m, v, g, CHUNKS, DECAY, *settings)
    check_close(w - before, update, 1e-4)  # the update itself, not hidden behind the size of w
    check_close(m, expected[1], 1e-6)
    check_close(v, expected[2], 1e-6)
    assert np.array_equal(g, kept)


def test_first_adam_step_is_the_learning_rate(rng):
    w, _, _, g = state(rng)
    before, m, v = w.copy(), np.zeros_like(w), np.zeros_like(w)
    adamw_(w, m, v, g, CHUNKS, DECAY, LR, *BETAS, 0.0, 1, 1.0)
    large = np.abs(g) > 1e-3
    check_close((before - w)[large], LR * np.sign(g[large]), 1e-4)


def test_adamw_decay_stays_out_of_the_moments_and_off_the_norms(rng):
    w, _, _, g = state(rng)
    before, m, v = w.copy(), np.zeros_like(w), np.zeros_like(w)
    adamw_(w, m, v, np.zeros_like(g), CHUNKS, DECAY, LR, *BETAS, WEIGHT_DECAY, 1, 1.0)
    check_close(w, before * (1 - LR * WEIGHT_DECAY * MASK), 1e-6)
    assert np.array_equal(w[MASK == 0], before[MASK == 0])
    assert not m.any()
    assert not v.any()


def test_elements_outside_the_chunks_are_left_alone(rng):
    w, m, v, g = state(rng)
    before = [a.copy() for a in (w, m, v)]
    chunks, decay = CHUNKS[1:2], DECAY[1:2]
    start, stop = chunks[0]
    adam_(w, m, v, g, chunks, decay, LR, *BETAS, WEIGHT_DECAY, 1, SCALE)
    outside = np.r_[0:start, stop:P]
    for now, was in zip((w, m, v), before, strict=True):
        assert np.array_equal(now[outside], was[outside])
        assert (now[start:stop] != was[start:stop]).any()


def test_same_bits_for_any_thread_count(rng, same_bits):
    start = state(rng)

    def run(kernel, *settings):
        w, m, v, g = (a.copy() for a in start)
        moments = (m,) if kernel is sgd_ else (m, v)
        kernel(w, *moments, g, CHUNKS, DECAY, *settings)
        return (w, *moments)

    for kernel in (adam_, adamw_):
        same_bits(lambda kernel=kernel: run(kernel, LR, *BETAS, WEIGHT_DECAY, 7, SCALE))
    for momentum, nesterov in [(0.0, False), (0.9, False), (0.9, True)]:
        same_bits(lambda a=momentum, b=nesterov: run(sgd_, LR, a, WEIGHT_DECAY, b, SCALE))


def test_nan_in_the_gradient_reaches_its_weight_alone(rng):
    w, m, v, g = state(rng)
    g[133] = np.nan
    for kernel in (adam_, adamw_):
        now = [a.copy() for a in (w, m, v)]
        with np.errstate(invalid="ignore"):
            kernel(*now, g, CHUNKS, DECAY, LR, *BETAS, WEIGHT_DECAY, 1, SCALE)
        for a in now:
            assert np.array_equal(np.flatnonzero(np.isnan(a)), [133])
    for momentum in (0.0, 0.9):
        now = [a.copy() for a in (w, m)]
        with np.errstate(invalid="ignore"):
            sgd_(*now, g, CHUNKS, DECAY, LR, momentum, WEIGHT_DECAY, False, SCALE)
        assert np.array_equal(np.flatnonzero(np.isnan(now[0])), [133])
