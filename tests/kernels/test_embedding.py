"""Embedding: the three nails, accumulation, repeated tokens, threads and NaN."""

import numpy as np
import pytest

from abi_py.gradcheck import check_close, check_gradient
from abi_py.kernels.embedding import (
    _embedding_backward,
    embedding_backward,
    embedding_backward_ref,
    embedding_forward,
    embedding_forward_adding,
    embedding_forward_ref,
    grid,
)

SHAPES = [(1, 1, 1), (5, 3, 7), (31, 13, 11), (257, 293, 19)]  # (N, C, V); the last: for several threads


def inputs(rng, N, C, V, dtype=np.float32):
    w, dx = rng.standard_normal((V, C)).astype(dtype), rng.standard_normal((N, C)).astype(dtype)
    return rng.integers(0, V, N).astype(np.int32), w, dx


@pytest.mark.parametrize("shape", SHAPES)
def test_derivation(rng, shape):
    ids, w, dx = inputs(rng, *shape, np.float64)
    dw = embedding_backward_ref(dx, ids, len(w))
    check_gradient(lambda w: (embedding_forward_ref(ids, w) * dx).sum(), w, dw, rng)


def test_definition(golden):
    g = golden("embedding")
    check_close(embedding_forward_ref(g["ids"], g["w"]), g["x"], 1e-10)
    check_close(embedding_backward_ref(g["dx"], g["ids"], len(g["w"])), g["dw"], 1e-10)


@pytest.mark.parametrize("shape", SHAPES)
def test_kernels_equal_the_reference(rng, shape):
    ids, w, dx = inputs(rng, *shape)
    x = np.full_like(dx, np.nan)  # overwritten
    embedding_forward(x, ids, w)
    assert np.array_equal(x, embedding_forward_ref(ids, w))
    embedding_forward_adding(x, ids[::-1].copy(), w)
    assert np.array_equal(x, embedding_forward_ref(ids, w) + embedding_forward_ref(ids[::-1], w))

    before = rng.standard_normal(w.shape).astype(np.float32)
    dw = before.copy()  # added to
    embedding_backward(dw, dx, ids)
    check_close(dw, before + embedding_backward_ref(dx.astype(np.float64), ids, len(w)), 1e-4)


def test_one_token_many_times(rng):
    dx = rng.standard_normal((1000, 5)).astype(np.float32)
    dw = np.zeros((3, 5), np.float32)
    embedding_backward(dw, dx, np.full(1000, 2, np.int32))
    check_close(dw[2], dx.sum(0, dtype=np.float64), 1e-4)
    assert not dw[:2].any()


def test_same_bits_for_any_thread_count(rng, same_bits):
    ids, w, dx = inputs(rng, *SHAPES[-1])

    def run():
        x, dw = np.empty_like(dx), np.ones_like(w)
        embedding_forward(x, ids, w)
        embedding_backward(dw, dx, ids)
        return x, dw

    same_bits(run)


def test_any_number_of_tasks_gives_the_bits_of_one(rng):
    ids, w, dx = inputs(rng, *SHAPES[-1])
    wanted = np.ones_like(w)
    _embedding_backward(wanted, dx, ids, 1, 1)
    for down, across in ((1, 2), (1, 10), (2, 10), (6, 7), (3, 1)):
        dw = np.ones_like(w)
        _embedding_backward(dw, dx, ids, down, across)
        assert dw.tobytes() == wanted.tobytes()


@pytest.mark.parametrize(("threads", "wanted"), [(1, (1, 1)), (2, (2, 1)), (8, (8, 1)), (32, (8, 4)), (128, (8, 16))])
def test_there_is_a_task_for_every_thread(threads, wanted):
    assert grid(2048, 512, threads) == wanted
    assert grid(64, 64, threads) == (1, 1)  # the demo step


def test_nan_stays_nan(rng):
    ids, w, dx = np.array([1, 0, 1], np.int32), np.ones((2, 3), np.float32), np.ones((3, 3), np.float32)
    w[1, 2] = dx[2, 1] = np.nan
    x, dw = np.empty_like(dx), np.zeros_like(w)
    embedding_forward(x, ids, w)
    embedding_backward(dw, dx, ids)
    assert np.array_equal(np.argwhere(np.isnan(x)), [[0, 2], [2, 2]])
    assert np.array_equal(np.argwhere(np.isnan(dw)), [[1, 1]])
