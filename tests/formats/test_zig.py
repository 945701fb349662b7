"""The Zig trainer's checkpoint files: byte for byte, there and back, and every kind of damage."""

import contextlib
import struct

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from abi_py.errors import CheckpointError
from abi_py.formats.zig import load_abic, load_ablc, load_zig, save_abic, save_ablc

u32, u64 = st.integers(0, 2**32 - 1), st.integers(0, 2**64 - 1)
# Any finite bit pattern, minus zero and subnormals among them: it must survive.
EXPONENT = 0x7F800000
bits = arrays(np.uint32, st.integers(0, 40)).map(
    lambda a: np.where(a & EXPONENT == EXPONENT, a & ~np.uint32(1 << 23), a)
)


def floats(pattern):
    return pattern.view(np.float32)


def test_abic_bytes(tmp_path):
    save_abic(tmp_path / "a", np.array([1.0, -2.5], np.float32), step=7, timestamp=9)
    wanted = b"ABIC" + bytes([1, 0]) + struct.pack("<QQI", 7, 9, 2) + struct.pack("<2f", 1.0, -2.5)
    assert (tmp_path / "a").read_bytes() == wanted
    assert len(wanted) == 26 + 8


def test_ablc_bytes(tmp_path):
    parts = [np.array(values, np.float32) for values in ([1, 2], [3, 4], [5, 6])]
    save_ablc(tmp_path / "a", *parts, step=7, epoch=2, tokens_processed=99, timestamp=9)
    wanted = b"ABLC\x01\x00" + struct.pack("<QIQQIII", 7, 2, 99, 9, 2, 2, 2) + struct.pack("<6f", 1, 2, 3, 4, 5, 6)
    assert (tmp_path / "a").read_bytes() == wanted
    assert len(wanted) == 46 + 24


@given(bits, u64, u64)
@settings(max_examples=50)
def test_abic_round_trip(tmp_path_factory, weights, step, stamp):
    path = tmp_path_factory.getbasetemp() / "abic"
    save_abic(path, floats(weights), step, stamp)
    back = load_abic(path)
    assert (back.step, back.timestamp) == (step, stamp)
    assert back.weights.tobytes() == weights.tobytes()
    assert load_zig(path).step == step


@given(bits, bits, bits, u64, u32, u64, u64)
@settings(max_examples=50)
def test_ablc_round_trip(tmp_path_factory, weights, m, v, step, epoch, tokens, stamp):
    path = tmp_path_factory.getbasetemp() / "ablc"
    numbers = {"step": step, "epoch": epoch, "tokens_processed": tokens, "timestamp": stamp}
    save_ablc(path, floats(weights), floats(m), floats(v), **numbers)
    back = load_ablc(path)
    assert {name: getattr(back, name) for name in numbers} == numbers
    assert [part.tobytes() for part in (back.weights, back.m, back.v)] == [part.tobytes() for part in (weights, m, v)]
    assert type(load_zig(path)) is type(back)


@given(st.binary(max_size=80))
@settings(max_examples=200)
def test_noise_is_refused_and_never_crashes(tmp_path_factory, noise):
    path = tmp_path_factory.getbasetemp() / "noise"
    for magic in (b"", b"ABIC\x01\x00", b"ABLC\x01\x00"):
        path.write_bytes(magic + noise)
        with contextlib.suppress(CheckpointError):  # anything else would be a crash
            load_zig(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda b: b[:3], "offset 0"),
        (lambda b: b"", "offset 0"),
        (lambda b: b"GGUF" + b[4:], "offset 0 must hold"),
        (lambda b: b[:4] + b"\x02\x00" + b[6:], "version at offset 4 is 2"),
        (lambda b: b[:20], "ends at offset 20 inside the 26-byte header"),
        (lambda b: b[:-1], r"is truncated: 3 floats from offset 26 end at offset 38, the file at 37"),
        (lambda b: b + b"x", r"has bytes after its end.*offset 38, the file at 39"),
        (lambda b: b[:22] + b"\xff\xff\xff\xff" + b[26:], r"is truncated: 4294967295 floats"),
    ],
)
def test_damage_names_the_offset(tmp_path, change, message):
    path = tmp_path / "a.ckpt"
    save_abic(path, np.arange(3, dtype=np.float32), 1)
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(CheckpointError, match=message):
        load_zig(path)


def test_wrong_arguments(tmp_path):
    with pytest.raises(TypeError, match="float32"):
        save_abic(tmp_path / "a", np.zeros(3), 1)
    with pytest.raises(CheckpointError, match="step"):
        save_abic(tmp_path / "a", np.zeros(3, np.float32), -1)
    save_ablc(tmp_path / "b", *[np.zeros(3, np.float32)] * 3, step=1, epoch=1, tokens_processed=1)
    with pytest.raises(CheckpointError, match="ABIC"):
        load_abic(tmp_path / "b")
    assert not (tmp_path / "a").exists()
