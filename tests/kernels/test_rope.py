"""RoPE: the three nails, what must not be touched, positions, threads and NaN."""

import json
from pathlib import Path

import numpy as np
import pytest

from abi_py.gradcheck import check_close, check_gradient
from abi_py.kernels.engine.halves import round_to_bf16_ref, widen_bf16_ref
from abi_py.kernels.rope import (
    rope_backward,
    rope_backward_ref,
    rope_forward,
    rope_forward_ref,
    rope_forward_rounded,
    rope_frequencies,
    rope_table,
)
from abi_py.rope_scaling import RopeScaling

SHAPES = [(1, 1, 2, 0), (5, 3, 6, 1), (13, 2, 34, 7), (131, 5, 16, 40)]  # (N, heads, D, further columns)


def inputs(rng, N, heads, D, extra, dtype=np.float32):
    cos, sin = rope_table(211, D, 1e4)
    x, dy = rng.standard_normal((2, N, heads * D + extra)).astype(dtype)
    return x, dy, cos.astype(dtype), sin.astype(dtype), rng.integers(0, 211, N).astype(np.int32)


@pytest.mark.parametrize("shape", SHAPES)
def test_derivation(rng, shape):
    heads = shape[1]
    x, dy, cos, sin, positions = inputs(rng, *shape, np.float64)
    dx = rope_backward_ref(dy, cos, sin, positions, heads)
    check_gradient(lambda x: (rope_forward_ref(x, cos, sin, positions, heads) * dy).sum(), x, dx, rng)


def test_definition(golden):
    g = golden("rope")
    saved = g["cos"], g["sin"], g["positions"], int(g["heads"])
    check_close(rope_forward_ref(g["x"], *saved), g["y"], 1e-10)
    check_close(rope_backward_ref(g["dy"], *saved), g["dx"], 1e-10)
    cos, sin = rope_table(len(g["cos"]), 2 * g["cos"].shape[1], float(g["theta"]))
    assert cos.dtype == sin.dtype == np.float32
    check_close(cos, g["cos"], 1e-7)  # float64 angles, rounded once to float32
    check_close(sin, g["sin"], 1e-7)


@pytest.mark.parametrize("shape", SHAPES)
def test_kernels_equal_the_reference(rng, shape):
    heads, width = shape[1], shape[1] * shape[2]
    x, dy, *saved = inputs(rng, *shape)
    y, dx = x.copy(), dy.copy()  # changed in place
    rope_forward(y, *saved, heads)
    rope_backward(dx, *saved, heads)
    cos, sin, positions = (a if a.dtype == np.int32 else a.astype(np.float64) for a in saved)
    check_close(y, rope_forward_ref(x.astype(np.float64), cos, sin, positions, heads), 1e-5)
    check_close(dx, rope_backward_ref(dy.astype(np.float64), cos, sin, positions, heads), 1e-4)
    assert np.array_equal(y[:, width:], x[:, width:])
    assert np.array_equal(dx[:, width:], dy[:, width:])


SCALINGS = json.loads((Path(__file__).parents[1] / "golden" / "rope_scalings.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("case", SCALINGS["cases"], ids=lambda case: case["name"])
def test_scaled_frequencies_are_those_of_transformers(case):
    """Which computes them in float32 (tests/golden/make_rope.py)."""
    scaling = RopeScaling.from_dict(case["scaling"]).resolved(case["max_seq_len"]).numbers(case["max_seq_len"])
    found, factor = rope_frequencies(case["head_dim"], case["theta"], scaling, case["length"])
    assert np.abs(found / np.array(case["frequencies"]) - 1).max() < 2e-6
    assert factor == pytest.approx(case["factor"], rel=1e-12)
    plain, _ = rope_frequencies(case["head_dim"], case["theta"])
    assert bool(np.abs(found / plain - 1).max() > 0.1) is case["changes"]  # a case that changes nothing shows nothing


def test_a_scaled_table_is_that_of_its_frequencies():
    scaling = RopeScaling.from_dict({"rope_type": "yarn", "factor": 4, "original_max_position_embeddings": 64})
    numbers = scaling.numbers(256)
    frequencies, factor = rope_frequencies(16, 1e4, numbers)
    assert factor > 1.1
    cos, sin = rope_table(256, 16, 1e4, np.float64, numbers)
    check_close(cos**2 + sin**2, np.full_like(cos, factor**2), 1e-12)
    check_close(np.arctan2(sin, cos)[1], frequencies, 1e-12)


def test_backward_undoes_forward(rng):
    x, _, *saved = inputs(rng, 131, 5, 16, 0)
    y = x.copy()
    rope_forward(y, *saved, 5)
    check_close(np.square(y).sum(1), np.square(x).sum(1), 1e-5)  # a rotation keeps lengths
    rope_backward(y, *saved, 5)
    check_close(y, x, 1e-5)


def test_scores_depend_on_the_distance_only(rng):
    q, k = rng.standard_normal((2, 1, 16)).astype(np.float32)
    cos, sin = rope_table(100, 16, 1e4)

    def score(t, s):
        a, b = q.copy(), k.copy()
        rope_forward(a, cos, sin, np.array([t], np.int32), 1)
        rope_forward(b, cos, sin, np.array([s], np.int32), 1)
        return float((a * b).sum())

    check_close(score(10, 3), score(97, 90), 1e-4)
    check_close(score(5, 5), float((q * k).sum()), 1e-4)


def test_same_bits_for_any_thread_count(rng, same_bits):
    x, dy, *saved = inputs(rng, *SHAPES[-1])

    def run():
        y, dx = x.copy(), dy.copy()
        rope_forward(y, *saved, 5)
        rope_backward(dx, *saved, 5)
        return y, dx

    same_bits(run)


def test_nan_stays_in_its_pair(rng):
    x, _, *saved = inputs(rng, 3, 2, 8, 2)
    for turn in (rope_forward, rope_backward):
        y = x.copy()
        y[1, 9] = np.nan  # head 1, j = 1: its partner is column 13
        turn(y, *saved, 2)
        assert np.array_equal(np.argwhere(np.isnan(y)), [[1, 9], [1, 13]])


def test_rounded_forward_is_forward_rounded(rng):
    x, _, *saved = inputs(rng, 131, 5, 16, 40)
    x[3, 2] = x[4, -1] = np.nan
    y, rounded = x.copy(), np.zeros(x.shape, np.uint16)
    rope_forward(y, *saved, 5)
    rope_forward_rounded(rounded, x, *saved, 5)
    assert np.array_equal(widen_bf16_ref(rounded), round_to_bf16_ref(y), equal_nan=True)
