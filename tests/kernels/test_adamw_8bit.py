"""AdamW in 8 bits: the reference against PyTorch, the kernel against it, blocks, decay, threads, NaN, small numbers."""

import itertools

import numpy as np
import pytest

from abi_py.gradcheck import check_close
from abi_py.kernels.adamw_8bit import (
    SHARING,
    adamw_8bit_,
    adamw_8bit_ref,
    block_chunks,
    blocks_of,
    decode_blocks_ref,
    encode_blocks_ref,
)
from abi_py.kernels.engine.dynamic_codes import ZERO_CODE
from abi_py.kernels.optimizers import adamw_ref

OFFSETS, SIZES, DECAYS = [0, 512, 1900], [512, 1000, 77], [True, False, True]  # the second ends within a block; a gap
CHUNKS, DECAY = block_chunks(OFFSETS, SIZES, DECAYS)
P, S = OFFSETS[-1] + SIZES[-1], sum(map(blocks_of, SIZES))
LR, WEIGHT_DECAY, SCALE = 0.01, 0.1, 0.25
BETAS = 0.9, 0.999, 1e-8


def places():
    """Return the place of each tensor in w, and that of its blocks."""
    ends = np.cumsum([0, *map(blocks_of, SIZES)])
    return [
        (slice(o, o + n), slice(*pair)) for o, n, pair in zip(OFFSETS, SIZES, itertools.pairwise(ends), strict=True)
    ]


def state(rng):
    """Return w, and codes and scales of moments as an update leaves them."""
    w, m = rng.standard_normal((2, P)).astype(np.float32)
    codes, scales = [np.zeros((S, SHARING), np.uint8) for _ in range(2)], [np.zeros(S, np.float32) for _ in range(2)]
    for place, blocks in places():
        for k, x in enumerate((m, np.square(m))):
            codes[k][blocks], scales[k][blocks] = encode_blocks_ref(x[place], k == 0)
    return w, codes[0], scales[0], codes[1], scales[1]


def by_reference(arrays, g, *settings):
    """Return w, m and v after an update of each tensor by the reference in float64; m and v before they are encoded."""
    w, m_codes, m_scales, v_codes, v_scales = arrays
    new = w.astype(np.float64), np.zeros(P), np.zeros(P)
    for (place, blocks), decays in zip(places(), DECAYS, strict=True):
        m = decode_blocks_ref(m_codes[blocks], m_scales[blocks].astype(np.float64), w[place].size, True)
        v = decode_blocks_ref(v_codes[blocks], v_scales[blocks].astype(np.float64), w[place].size, False)
        found = adamw_ref(w[place].astype(np.float64), m, v, g[place].astype(np.float64), float(decays), *settings)
        for whole, part in zip(new, found, strict=True):
            whole[place] = part
    return new


def decoded(arrays):
    """Return m and v of all tensors, (P,) float64."""
    _, m_codes, m_scales, v_codes, v_scales = arrays
    m, v = np.zeros(P), np.zeros(P)
    for place, blocks in places():
        size = place.stop - place.start
        m[place] = decode_blocks_ref(m_codes[blocks], m_scales[blocks], size, True)
        v[place] = decode_blocks_ref(v_codes[blocks], v_scales[blocks], size, False)
    return m, v


def test_chunks_are_whole_blocks_of_a_tensor(rng):
    offsets, sizes = [0, 70_000], [70_000, 4097]
    chunks, decay = block_chunks(offsets, sizes, [True, False])
    covered = np.concatenate([np.arange(start, stop) for start, stop, _ in chunks])
    assert np.array_equal(covered, np.arange(74_097))
    for (start, _, block), decays in zip(chunks, decay, strict=True):
        tensor = int(start >= 70_000)
        assert (start - offsets[tensor]) % SHARING == 0
        assert block == (start - offsets[tensor]) // SHARING + tensor * blocks_of(70_000)
        assert decays == (tensor == 0)


def test_definition(golden):
    """Codes, scales and weights of six updates, each made by PyTorch from what the update before has left."""
    g = golden("adamw_8bit")
    w, size = g["w"], g["w"].size
    codes, scales = [np.zeros((blocks_of(size), SHARING), np.uint8) for _ in range(2)], [np.zeros(blocks_of(size))] * 2
    for step, gradient in enumerate(g["g"], 1):
        arrays = w, codes[0], scales[0], codes[1], scales[1]
        settings = float(g["lr"]), *BETAS, float(g["weight_decay"]), step, 1.0
        w, codes[0], scales[0], codes[1], scales[1] = adamw_8bit_ref(*arrays, gradient, 1.0, *settings)
        check_close(w, g["after"][step - 1], 1e-10)
        for name, found in (("m_codes", codes[0]), ("v_codes", codes[1])):
            assert np.array_equal(found.ravel()[:size], g[name][step - 1]), (name, step)


@pytest.mark.parametrize("step", [1, 2, 1000, 10**6])
def test_kernel_equals_the_reference(rng, step):
    arrays, g = state(rng), rng.standard_normal(P).astype(np.float32)
    settings = LR, *BETAS, WEIGHT_DECAY, step, SCALE
    expected = by_reference(arrays, g, *settings)
    before, kept = arrays[0].astype(np.float64), g.copy()
    adamw_8bit_(*arrays, g, CHUNKS, DECAY, *settings)
    inside = np.concatenate([np.arange(P)[place] for place, _ in places()])
    check_close((arrays[0] - before)[inside], (expected[0] - before)[inside], 1e-4)
    for found, exact, (_, codes, scales) in zip(
        decoded(arrays), expected[1:], ((0, arrays[1], arrays[2]), (0, arrays[3], arrays[4])), strict=True
    ):
        signed = codes is arrays[1]
        for place, blocks in places():
            wanted, wanted_scales = encode_blocks_ref(exact[place], signed)
            check_close(scales[blocks], wanted_scales, 1e-6)
            apart = np.abs(codes[blocks].astype(int) - wanted)
            assert apart.max() <= 1
            assert (apart > 0).mean() < 1e-3
        assert np.abs(found - exact)[inside].max() <= 0.008 * np.abs(exact).max()
    assert np.array_equal(g, kept)
    outside = np.setdiff1d(np.arange(P), inside)
    assert np.array_equal(arrays[0][outside], before[outside])


def test_a_block_begins_with_scale_zero_whatever_its_codes_are(rng):
    w, g = rng.standard_normal((2, P)).astype(np.float32)
    results = []
    for filling in (0, 200):
        arrays = w.copy(), *(np.full((S, SHARING), filling, np.uint8) for _ in range(2))
        scales = np.zeros(S, np.float32), np.zeros(S, np.float32)
        arrays = arrays[0], arrays[1], scales[0], arrays[2], scales[1]
        adamw_8bit_(*arrays, g, CHUNKS, DECAY, LR, *BETAS, 0.0, 1, 1.0)
        results.append(arrays)
    for one, other in zip(*results, strict=True):
        assert np.array_equal(one, other)
    place = places()[0][0]
    check_close((w - results[0][0])[place], LR * np.sign(g[place]), 1e-3)  # the first update is the rate


def test_decay_stays_out_of_the_moments_and_off_the_norms(rng):
    w = rng.standard_normal(P).astype(np.float32)
    before = w.copy()
    arrays = w, np.zeros((S, SHARING), np.uint8), np.zeros(S, np.float32), np.zeros((S, SHARING), np.uint8)
    arrays = *arrays, np.zeros(S, np.float32)
    adamw_8bit_(*arrays, np.zeros(P, np.float32), CHUNKS, DECAY, LR, *BETAS, WEIGHT_DECAY, 1, 1.0)
    for (place, _), decays in zip(places(), DECAYS, strict=True):
        check_close(w[place], before[place] * (1 - LR * WEIGHT_DECAY * decays), 1e-6)
    assert not arrays[2].any()
    assert not arrays[4].any()
    assert (arrays[1] == ZERO_CODE).all()
    assert not arrays[3].any()


def test_same_bits_for_any_thread_count(rng, same_bits):
    start, g = state(rng), rng.standard_normal(P).astype(np.float32)

    def run():
        arrays = tuple(a.copy() for a in start)
        for step in range(1, 4):
            adamw_8bit_(*arrays, g, CHUNKS, DECAY, LR, *BETAS, WEIGHT_DECAY, step, SCALE)
        return arrays

    same_bits(run)


def test_what_the_last_block_of_a_tensor_has_too_many_stays_zero(rng):
    arrays = state(rng)
    for step in range(1, 5):
        g = rng.standard_normal(P).astype(np.float32)
        adamw_8bit_(*arrays, g, CHUNKS, DECAY, LR, *BETAS, WEIGHT_DECAY, step, SCALE)
    last = places()[1][1].stop - 1
    used = SIZES[1] % SHARING
    assert (arrays[1][last, used:] == ZERO_CODE).all()
    assert (arrays[3][last, used:] == 0).all()
    assert arrays[3][last, :used].any()


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_nan_in_the_gradient_reaches_its_weight_and_the_moments_of_its_block(rng, bad):
    arrays = state(rng)
    before, g = arrays[0].copy(), np.zeros(P, np.float32)
    g[300] = bad
    with np.errstate(invalid="ignore"):
        adamw_8bit_(*arrays, g, CHUNKS, DECAY, LR, *BETAS, WEIGHT_DECAY, 1, SCALE)
        m, v = decoded(arrays)
    assert np.array_equal(np.flatnonzero(np.isnan(arrays[0])), [300])
    assert np.array_equal(np.flatnonzero(np.isnan(m)), np.arange(256, 512))
    assert np.array_equal(np.flatnonzero(np.isnan(v)), np.arange(256, 512))
    assert np.isfinite(before).all()


def test_a_weight_without_a_gradient_is_not_thrown_far():
    """Where a small v became 0, the next step without a gradient would divide m by epsilon: 1000 times the rate."""
    w, g = np.zeros(256, np.float32), np.full(256, 1e-4, np.float32)
    g[0] = 1.0  # v of the others is 1e-8 of its own, below half of the smallest number, 3.25e-7
    arrays = w, np.zeros((1, 256), np.uint8), np.zeros(1, np.float32), np.zeros((1, 256), np.uint8)
    arrays = *arrays, np.zeros(1, np.float32)
    chunks, decay = block_chunks([0], [256], [True])
    adamw_8bit_(*arrays, g, chunks, decay, LR, *BETAS, 0.0, 1, 1.0)
    assert (arrays[3] > 0).all()
    before = w.copy()
    adamw_8bit_(*arrays, np.zeros_like(g), chunks, decay, LR, *BETAS, 0.0, 2, 1.0)
    assert np.abs(w - before).max() < 2 * LR


@pytest.mark.parametrize("size", [1e-18, 1e-20, 1e-22, 1e-36])
def test_tiny_gradients_do_no_harm(size):
    w, g = np.ones(256, np.float32), np.full(256, size, np.float32)
    arrays = w, np.zeros((1, 256), np.uint8), np.zeros(1, np.float32), np.zeros((1, 256), np.uint8)
    arrays = *arrays, np.zeros(1, np.float32)
    chunks, decay = block_chunks([0], [256], [True])
    for step in range(1, 5):
        adamw_8bit_(*arrays, g, chunks, decay, LR, *BETAS, 0.0, step, 1.0)
    assert np.isfinite(arrays[2]).all()
    assert np.isfinite(arrays[4]).all()
    assert np.abs(w - 1).max() < 1e-6  # epsilon is far above


def test_blocks_there_and_back(rng):
    x = (rng.standard_normal(1000) * 10.0 ** rng.uniform(-3, 0, 1000)).astype(np.float32)
    codes, scales = encode_blocks_ref(x, True)
    assert codes.shape == (4, 256)
    assert scales.dtype == np.float32
    back = decode_blocks_ref(codes, scales, 1000, True)
    again = encode_blocks_ref(back, True)
    apart = np.abs(back - x) / np.repeat(scales, 256)[:1000]
    assert apart.max() <= 0.4501 / 64  # half of a part of the last decade
    assert np.array_equal(np.sign(back[x < 0]), -np.ones((x < 0).sum()))
    assert np.array_equal(decode_blocks_ref(*again, 1000, True), back) or (again[1] != scales).any()


def test_state_takes_two_bytes_a_number():
    size = 512 * 1536
    assert (2 * blocks_of(size) * SHARING + 2 * 4 * blocks_of(size)) / size == 2.03125


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"chunks": np.array([[0, P + 1, 0]])}, "ranges inside 0"),
        ({"chunks": np.array([[0, 512, S - 1]])}, "of blocks inside 0"),
        ({"step": 0}, "must be 1 at the first update"),
    ],
)
def test_what_does_not_fit_is_refused(rng, change, message):
    arrays, g = state(rng), np.zeros(P, np.float32)
    chunks, step = change.get("chunks", CHUNKS), change.get("step", 1)
    with pytest.raises(ValueError, match=message):
        adamw_8bit_(*arrays, g, chunks, DECAY[: len(chunks)], LR, *BETAS, WEIGHT_DECAY, step, SCALE)
