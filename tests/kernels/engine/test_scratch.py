"""Scratch: made once, kept, larger when needed, and each Python thread's own."""

import threading

import numpy as np

from abi_py.kernels.engine.scratch import LINE_BYTES, aligned_empty, aligned_zeros, scratch


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


def test_arrays_begin_at_a_cache_line():
    for make in (aligned_empty, aligned_zeros):
        for shape, dtype in ((7, np.float32), ((3, 5), np.uint16), ((2, 1), np.float64), (1 << 20, np.uint8)):
            array = make(shape, dtype)
            assert array.ctypes.data % LINE_BYTES == 0
            assert array.shape == (shape if isinstance(shape, tuple) else (shape,))
            assert array.dtype == dtype
            assert array.flags.c_contiguous
            assert array.flags.writeable
    assert not aligned_zeros((3, 5)).any()


def test_all_scratch_of_a_name_begins_at_cache_lines():
    for array in scratch("test of lines", (3, 5), (1,), (2, 2, 2)):
        assert array.ctypes.data % LINE_BYTES == 0
