"""Scratch: made once, kept, larger when needed, and each Python thread's own."""

import threading

import numpy as np

from abi_py.kernels.engine.scratch import scratch


def test_the_same_memory_until_more_is_needed():
    one, other = scratch("test", (2, 3), (5,))
    assert (one.shape, one.dtype, one.flags.c_contiguous, other.shape) == ((2, 3), np.float32, True, (5,))
    assert not np.shares_memory(one, other)
    assert scratch("test", (2, 3), (5,))[1] is other
    (smaller,) = scratch("test", (4,))
    assert smaller.shape == (4,)
    assert np.shares_memory(smaller, one)
    (larger,) = scratch("test", (70,))
    assert not np.shares_memory(larger, one)
    assert np.shares_memory(scratch("test", (2, 3), (5,))[1], larger)


def test_names_and_threads_share_nothing():
    (mine,), found = scratch("test", (5,)), []
    assert not np.shares_memory(mine, *scratch("test of another name", (5,)))
    thread = threading.Thread(target=lambda: found.extend(scratch("test", (5,))))
    thread.start()
    thread.join()
    assert not np.shares_memory(mine, found[0])
