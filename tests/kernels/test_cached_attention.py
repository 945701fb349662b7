"""Attention over a cache: the definition, the same as attention of the whole sample, parts, slots, threads and NaN."""

import itertools

import numpy as np
import pytest

from abi_py.gradcheck import check_close
from abi_py.kernels.attention import attention_forward_ref
from abi_py.kernels.cached_attention import (
    BLOCK_KEYS,
    QUERIES,
    ROWS_OF_A_BLOCK,
    TASK_KEYS,
    cache_append,
    cache_append_ref,
    cached_attention_forward,
    cached_attention_forward_ref,
)
from abi_py.kernels.engine.jit import JIT
from abi_py.kernels.engine.streams import STREAMED

SHAPES = [  # (heads, kv_heads, D, positions of the rows)
    (1, 1, 2, [0]),
    (4, 2, 6, [3, 0, 40]),
    (6, 1, 34, [7, BLOCK_KEYS - 1, BLOCK_KEYS]),
    (4, 4, 16, [BLOCK_KEYS + 1, 2]),
    (2, 1, 72, [TASK_KEYS - 1, TASK_KEYS, 2 * TASK_KEYS + 5]),
    (3, 3, 100, [9]),
    (STREAMED + 1, 1, 16, [70, 3]),  # more queries to a key head than are multiplied together
    (4 * STREAMED + 4, 2, 10, [BLOCK_KEYS + 3]),
]


def inputs(rng, heads, kv_heads, head_dim, positions, dtype=np.float32):
    """Return q, keys, values, slots and positions: a slot for each row, in another order, and a slot more."""
    rows, capacity = len(positions), max(positions) + 3
    q = rng.standard_normal((rows, heads * head_dim)).astype(dtype)
    keys, values = rng.standard_normal((2, rows + 1, kv_heads, capacity, head_dim)).astype(dtype)
    return q, keys, values, np.arange(rows, dtype=np.int32)[::-1].copy(), np.array(positions, np.int32)


def forward(q, *cache, **options):
    o = np.full_like(q, 7)
    cached_attention_forward(o, q, *cache, **options)
    return o


def wide(*arrays):
    return [a.astype(np.float64) if a.dtype == np.float32 else a for a in arrays]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_kernel_equals_the_reference(rng, shape):
    arrays = inputs(rng, *shape)
    check_close(forward(*arrays), cached_attention_forward_ref(*wide(*arrays)), 1e-5)


@pytest.mark.parametrize("window", [1, 2, 7, BLOCK_KEYS, TASK_KEYS - 1, TASK_KEYS, TASK_KEYS + 1, 5 * TASK_KEYS])
def test_a_window_and_a_scale(rng, window):
    for shape in SHAPES:
        arrays = inputs(rng, *shape)
        options = {"window": window, "scale": 0.3}
        wanted = cached_attention_forward_ref(*wide(*arrays), **options)
        _, keys, values, slots, positions = arrays
        for slot, position in zip(slots, positions):  # before the window nothing is read
            keys[slot, :, : max(0, position + 1 - window)] = np.nan
            values[slot, :, : max(0, position + 1 - window)] = np.nan
        check_close(forward(*arrays, **options), wanted, 1e-5)
    with pytest.raises(ValueError, match=r"window \(0\) must be at least 1"):
        forward(*arrays, window=0)


def test_a_window_has_the_bits_of_the_row_alone(rng):
    q, *cache, slots, positions = inputs(rng, 4, 2, 24, [TASK_KEYS + 70, 5, 3 * TASK_KEYS, 64])
    together = forward(q, *cache, slots, positions, window=TASK_KEYS + 3)
    for n in range(len(q)):
        alone = forward(q[n : n + 1], *cache, slots[n : n + 1], positions[n : n + 1], window=TASK_KEYS + 3)
        assert alone.tobytes() == together[n : n + 1].tobytes()


def test_definition(golden):
    """A query in the middle and the last one see what PyTorch's causal attention of the whole sample gives them."""
    g = golden("attention")
    for position in (6, g["q"].shape[2] - 1):
        q, wanted = (g[name][:, :, position].reshape(len(g["q"]), -1) for name in ("q", "causal_o"))
        rows = np.arange(len(q)), np.full(len(q), position)
        check_close(cached_attention_forward_ref(q, g["k"], g["v"], *rows), wanted, 1e-10)


def test_a_prompt_that_goes_on_equals_the_whole_sample(rng):
    """Several rows of one slot, appended together, give the rows of causal attention."""
    heads, kv_heads, head_dim, time, past = 4, 2, 10, 90, 30
    q = rng.standard_normal((time, heads * head_dim)).astype(np.float32)
    k, v = rng.standard_normal((2, time, kv_heads * head_dim)).astype(np.float32)
    keys, values = np.full((2, 3, kv_heads, 100, head_dim), np.nan, np.float32)
    positions, slots = np.arange(time, dtype=np.int32), np.full(time, 1, np.int32)
    cache_append(keys, values, k, v, slots, positions)
    o = forward(q[past:], keys, values, slots[past:], positions[past:])
    whole, _ = attention_forward_ref(*wide(q, k, v), np.zeros(time, np.int32), 1, heads, kv_heads)
    check_close(o, whole[past:], 1e-5)
    o = forward(q[past:], keys, values, slots[past:], positions[past:], window=11, scale=0.4)
    whole, _ = attention_forward_ref(*wide(q, k, v), np.maximum(0, positions - 10), 1, heads, kv_heads, 0.4)
    check_close(o, whole[past:], 1e-5)


@pytest.mark.skipif(not JIT, reason="NumPy's sums depend on the shape")
@pytest.mark.parametrize("window", [None, 5, BLOCK_KEYS, TASK_KEYS + 3])
@pytest.mark.parametrize("shape", [(4, 2, 24), (3, 3, 64), (2, 1, 72), (8, 1, 10)], ids=str)
def test_bits_do_not_depend_on_how_a_prompt_is_cut(rng, shape, window, same_bits):
    """Row by row, in pieces, and as a whole: by different kernels."""
    heads, kv_heads, head_dim = shape
    time = TASK_KEYS + BLOCK_KEYS + 2 * QUERIES + 3
    q = rng.standard_normal((time, heads * head_dim)).astype(np.float32)
    keys, values = rng.standard_normal((2, 2, kv_heads, time + 2, head_dim)).astype(np.float32)
    positions, slots = np.arange(time, dtype=np.int32), np.full(time, 1, np.int32)
    same_bits(lambda: forward(q, keys, values, slots, positions, window=window))
    whole = forward(q, keys, values, slots, positions, window=window)
    wanted = cached_attention_forward_ref(*wide(q, keys, values), slots, positions, window)
    check_close(whole, wanted, 1e-5)
    for cuts in ([1], [QUERIES + 1], [7, ROWS_OF_A_BLOCK + 3, 100]):
        at, made = 0, []
        for n in itertools.chain.from_iterable(itertools.repeat(cuts)):
            some = slice(at, at + n)
            made.append(forward(q[some], keys, values, slots[some], positions[some], window=window))
            at += n
            if at >= time:
                break
        assert np.concatenate(made).tobytes() == whole.tobytes()


def test_append_writes_its_places_only(rng):
    qkv = rng.standard_normal((3, 20)).astype(np.float32)
    k, v = qkv[:, 8:14], qkv[:, 14:]  # column slices, as in the model
    slots, positions = np.array([2, 0, 2], np.int32), np.array([4, 0, 1], np.int32)
    made, wanted = np.zeros((2, 2, 3, 2, 5, 3), np.float32)
    cache_append(*made, k, v, slots, positions)
    cache_append_ref(*wanted, k, v, slots, positions)
    assert np.array_equal(made, wanted)
    assert np.count_nonzero(made) == 2 * 3 * 6


def test_bits_do_not_depend_on_threads_or_on_other_rows(rng, same_bits):
    q, keys, values, slots, positions = inputs(rng, 4, 2, 24, [TASK_KEYS + 70, 5, 3 * TASK_KEYS, 64])
    same_bits(lambda: forward(q, keys, values, slots, positions))
    together = forward(q, keys, values, slots, positions)
    for n in range(len(q)):
        alone = forward(q[n : n + 1], keys, values, slots[n : n + 1], positions[n : n + 1])
        assert alone.tobytes() == together[n : n + 1].tobytes()


def test_nothing_behind_the_position_is_read(rng):
    q, keys, values, slots, positions = inputs(rng, 4, 2, 24, [TASK_KEYS + 70, 5])
    before = forward(q, keys, values, slots, positions)
    for slot, position in zip(slots, positions):
        keys[slot, :, position + 1 :] = values[slot, :, position + 1 :] = np.nan
    keys[2] = values[2] = np.nan  # nobody's slot
    assert np.array_equal(forward(q, keys, values, slots, positions), before)


@pytest.mark.parametrize("spoiled", ["q", "keys", "values"])
@pytest.mark.parametrize("at", [0, TASK_KEYS + 1])
def test_nan_stays_in_its_row_and_head(rng, spoiled, at):
    q, keys, values, slots, positions = inputs(rng, 4, 2, 8, [TASK_KEYS + 3, 9])
    if spoiled == "q":
        q[0, 8] = np.nan  # head 1
    else:
        {"keys": keys, "values": values}[spoiled][slots[0], 0, at, 3] = np.nan  # heads 0 and 1
    with np.errstate(invalid="ignore"):  # NumPy warns where nothing is compiled
        o = forward(q, keys, values, slots, positions).reshape(2, 4, 8)
    bad = np.isnan(o).any(-1)
    assert bad.tolist() == [[spoiled != "q", True, False, False], [False] * 4]


def test_large_scores_do_not_overflow(rng):
    arrays = inputs(rng, 2, 1, 16, [700])
    arrays[1][...] *= 100
    check_close(forward(*arrays), cached_attention_forward_ref(*wide(*arrays)), 1e-5)


@pytest.mark.skipif(not JIT, reason="nothing is compiled")
def test_a_call_allocates_nothing_large(rng):
    import tracemalloc

    arrays = inputs(rng, 8, 4, 64, [900])
    o = forward(*arrays)
    tracemalloc.start()
    cached_attention_forward(o, *arrays)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 10_000
