"""Files that break the format, by damage or by design: an error that names file, byte, rule and remedy."""

import os
import struct
import sys
import tracemalloc

import pytest
import raw_gguf as raw

from abi_py.errors import CheckpointError
from abi_py.formats.gguf import open_gguf

HUGE = (2**32, 2**63 - 1, 2**63, 2**64 - 1)


def read_all(path):
    file = open_gguf(path)
    for key in file.metadata:
        file.metadata[key]


def refused(tmp_path, content, match):
    """Assert that a file is refused with a message that names it, and with no more memory than a few times its size."""
    path = tmp_path / "x.gguf"
    path.write_bytes(content)
    tracemalloc.start()
    try:
        with pytest.raises(CheckpointError, match=match) as caught:
            read_all(path)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    message = str(caught.value)
    assert message.startswith(str(path))
    assert "; " in message  # the remedy
    assert "\n" not in message
    assert len(message) < 600
    assert peak < 20 * len(content) + 200_000


def test_cut_short_at_every_byte(tmp_path):
    path = tmp_path / "x.gguf"
    for size in range(len(raw.VALID)):
        path.write_bytes(raw.VALID[:size])
        with pytest.raises(CheckpointError):
            open_gguf(path)


@pytest.mark.parametrize(("content", "match"), [
    (b"", "is empty; get it again"),
    (b"GG", "byte 4: the file ends within the version"),
    (b"PK\3\4 and more", r"is no GGUF file: it begins with b'PK\\x03\\x04'"),
    (b"tjgg" + bytes(40), "is a GGJT file, from before GGUF, and is not read here; convert the model again"),
    (b"version https://git-lfs.github.com/spec/v1\noid", "git lfs pull"),
    (raw.gguf(version=1), "byte 4: the file is of version 1, and this version of abi_py reads 2 and 3; convert"),
    (raw.gguf(version=4), "byte 4: the file is of version 4"),
    (raw.gguf(version=0), "byte 4: the file is of version 0"),
    (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), r"byte 4: the file is big-endian; gguf_convert_endian\.py"),
])  # fmt: skip
def test_what_is_no_file_of_this_format(tmp_path, content, match):
    refused(tmp_path, content, match)


@pytest.mark.parametrize("version", [2, 3])
def test_two_versions_are_read(tmp_path, version):
    path = tmp_path / "x.gguf"
    path.write_bytes(raw.gguf(raw.ENTRIES, raw.TENSORS, raw.DATA, version=version))
    assert open_gguf(path).metadata["a.u8"] == 200


@pytest.mark.parametrize("count", HUGE)
def test_absurd_counts(tmp_path, count):
    refused(tmp_path, raw.gguf(counts=(count, 0)), rf"byte 8: the file says that it has {count:,} tensors, which 32 b")
    refused(tmp_path, raw.gguf(counts=(0, count)), rf"byte 16: the file says that it has {count:,} metadata entries")
    refused(
        tmp_path, b"GGUF" + raw.u32(3) + raw.u64(0, 1, count) + bytes(8), f"byte 24: key 0 has {count:,} bytes, and "
    )
    head = raw.text("k") + raw.u32(raw.TYPES["array"])
    for kind in ("u8", "f64", "str", "array"):
        refused(tmp_path, raw.gguf([head + raw.u32(raw.TYPES[kind]) + raw.u64(count) + bytes(40)]),
                rf"byte 41: k has {count:,} items, and what is left of the file holds \d+ at most")  # fmt: skip
    refused(
        tmp_path, raw.gguf([raw.text("k") + raw.u32(8) + raw.u64(count) + b"abc"]), "the file ends within string 0 of k"
    )
    strings = head + raw.u32(8) + raw.u64(2) + raw.text("a") + raw.u64(count) + b"abc"
    refused(tmp_path, raw.gguf([strings]), "the file ends within string 1 of k")


KEY = raw.entry("a", "u8", 1)


@pytest.mark.parametrize(("entries", "match"), [
    ([KEY, KEY], r"byte 38: the key 'a' is given twice"),
    ([raw.entry("", "u8", 1)], "byte 24: key 0 is empty"),
    ([raw.entry(b"\xffab", "u8", 1)], "byte 32: key 0 is not UTF-8"),
    ([raw.entry("k" * 70_000, "u8", 1)], "byte 24: key 0 has 70,000 bytes, and at most 65,535 are allowed"),
    ([raw.text("a") + raw.u32(13) + bytes(8)], "byte 33: a is of type 13, and there are 0 to 12"),
    ([raw.text("a") + raw.u32(7) + b"\2"], "byte 37: a is 2, but must be 0 or 1, for it is a bool"),
    ([raw.text("a") + raw.u32(9, 7) + raw.u64(3) + b"\0\1\7"], "byte 51: item 2 of a is 7, but must be 0 or 1"),
    ([raw.entry("a", "str", b"abc\xc3(")], "byte 48: a is not UTF-8"),
    ([raw.entry("a", "array", ("str", ["x", b"\xe4\xbd"]))], "byte 66: string 1 of a is not UTF-8"),
    ([raw.text("a") + raw.u32(9, 99) + raw.u64(0)], "byte 37: the items of a is of type 99"),
    ([raw.entry("general.alignment", "u32", 0)], "general.alignment is 0, but must be a power of two, and at least 8"),
    ([raw.entry("general.alignment", "u32", 48)], "general.alignment is 48, but must be a power of two"),
    ([raw.entry("general.alignment", "u32", 4)], "general.alignment is 4, but must be a power of two, and at least 8"),
    ([raw.entry("general.alignment", "str", "32")], "general.alignment is string, but must be uint32"),
])  # fmt: skip
def test_metadata(tmp_path, entries, match):
    refused(tmp_path, raw.gguf(entries), match)


@pytest.mark.parametrize("depth", [5, 1000, 40_000])
def test_arrays_in_arrays(tmp_path, depth):
    nested = raw.text("a") + raw.u32(9) + (raw.u32(9) + raw.u64(1)) * depth + raw.u32(0) + raw.u64(0)
    refused(tmp_path, raw.gguf([nested]), "byte 85: a has arrays in arrays more than 4 deep; store it flat")


def one(sizes=(32,), kind=0, offset=0, name="t"):
    return raw.gguf([], [raw.tensor(name, sizes, kind, offset)], bytes(1024))


@pytest.mark.parametrize(("content", "match"), [
    (one(()), "byte 33: the tensor 't' has 0 axes, but must have 1 to 4"),
    (one((1, 1, 1, 1, 1)), "byte 33: the tensor 't' has 5 axes"),
    (one((32, 0)), r"byte 37: the tensor 't' has sizes \(32, 0\), innermost first; each must be at least 1"),
    (one((2**32, 2**31)), r"their product below 2\^63"),
    (one((2**64 - 1,) * 4), r"their product below 2\^63"),
    (one((2**62,)), "is bytes 64 to 18,446,744,073,709,551,680 of a file of 1,088"),
    (one((33,), 8), "byte 37: the tensor 't' has rows of 33 numbers, but Q8_0 keeps 32 in a block"),
    (one((32,), 4), "byte 45: the tensor 't' is of type 4, one that ggml has withdrawn; convert the model again"),
    (one((32,), 43), "byte 45: the tensor 't' is of type 43, unknown to this version"),
    (one(offset=16), "byte 24: the tensor 't' has offset 16, no multiple of 32"),
    (one(offset=2**64 - 32), "byte 24: the tensor 't' is bytes 18,446"),
    (one(offset=1024), "byte 24: the tensor 't' is bytes 1,088 to 1,216 of a file of 1,088"),
    (one(name=b"\xfe"), "byte 32: the name of tensor 0 is not UTF-8"),
    (one(name="n" * 70_000), "byte 24: the name of tensor 0 has 70,000 bytes"),
    (raw.gguf([], [raw.tensor("t", (8,), 0, 0)] * 2, bytes(64)), "byte 57: the tensor 't' is given twice"),
    (raw.gguf([], [raw.tensor("a", (8, 2), 0, 32), raw.tensor("b", (16,), 0, 0)], bytes(96)), "'b' and 'a' overlap"),
    (raw.gguf([], [raw.tensor("a", (8,), 0, 0), raw.tensor("b", (8,), 0, 0)], bytes(96)), "'a' and 'b' overlap"),
])  # fmt: skip
def test_tensors(tmp_path, content, match):
    refused(tmp_path, content, match)


def test_gaps_between_tensors_and_any_order_are_read(tmp_path):
    path = tmp_path / "x.gguf"
    tensors = [raw.tensor("a", (8,), 0, 128), raw.tensor("b", (8,), 0, 0)]
    path.write_bytes(raw.gguf([], tensors, bytes(range(32)) + bytes(96) + bytes(range(100, 132))))
    file = open_gguf(path)
    assert file.tensors["a"].raw.tobytes()[0] == 100
    assert file.tensors["b"].raw.tobytes()[1] == 1


# -- files of a split model ------------------------------------------------------------------------


def part(place, count, tensors, total, extra=()):
    keys = [raw.entry("split.no", "u16", place), raw.entry("split.count", "u16", count)]
    keys.append(raw.entry("split.tensors.count", "i32", total))
    lines = [raw.tensor(name, (8,), 0, 32 * i) for i, name in enumerate(tensors)]
    return raw.gguf([*extra, *keys], lines, bytes(32 * len(tensors)))


def split(tmp_path, **others):
    """Write three parts, some of them as given: place=content."""
    parts = {"p1": part(0, 3, "ab", 4, [raw.entry("k", "u8", 5)]), "p2": part(1, 3, "c", 4), "p3": part(2, 3, "d", 4)}
    paths = [tmp_path / f"m-0000{i}-of-00003.gguf" for i in (1, 2, 3)]
    for path, content in zip(paths, {**parts, **others}.values(), strict=True):
        path.unlink(missing_ok=True)
        if content is not None:
            path.write_bytes(content)
    return paths


def test_any_part_opens_all(tmp_path):
    for path in split(tmp_path):
        file = open_gguf(path)
        assert (file.path, len(file.files), [*file.tensors], file.metadata["k"]) == (path, 3, [*"abcd"], 5)
        assert [tensor.file.name[6] for tensor in file.tensors.values()] == [*"1123"]


@pytest.mark.parametrize(("others", "match"), [
    ({"p2": None}, r"byte \d+: of its 3 files m-00002-of-00003\.gguf are not there; put them"),
    ({"p2": None, "p3": None}, r"m-00002-of-00003\.gguf, m-00003-of-00003\.gguf are not there"),
    ({"p2": part(0, 3, "c", 4)}, r"m-00002.*split\.no is 0, and by m-00001-of-00003\.gguf must be 1; its files"),
    ({"p2": part(1, 2, "c", 4)}, r"m-00002.*split\.count is 2, and by .* must be 3"),
    ({"p2": part(1, 3, "c", 9)}, r"m-00002.*split\.tensors\.count is 9, and by .* must be 4"),
    ({"p2": raw.gguf()}, r"m-00002.*split\.count is missing, and by .* must be 3"),
    ({"p2": part(1, 3, "a", 4)}, r"m-00002.*: the tensor 'a' is in m-00001-of-00003\.gguf, too"),
    ({"p2": part(1, 3, "ce", 4)}, r"split\.tensors\.count is 4, and its files hold 5 tensors"),
    ({"p2": b"GGUF"}, r"m-00002.*: byte 4: the file ends within the version"),
    ({"p1": part(0, 3, "ab", 4, [raw.entry("split.no2", "str", "x")]), "p3": part(0, 3, "d", 4)}, r"split\.no is 0"),
])  # fmt: skip
def test_parts_that_do_not_belong_together(tmp_path, others, match):
    with pytest.raises(CheckpointError, match=match):
        open_gguf(split(tmp_path, **others)[0])


def test_a_part_must_be_named_as_one(tmp_path):
    path = tmp_path / "m.gguf"
    for name in ("m.gguf", "m-00001-of-00002.gguf"):
        path = path.rename(tmp_path / name) if path.exists() else path
        path.write_bytes(part(0, 3, "ab", 4))
        with pytest.raises(
            CheckpointError, match=r"it is one of 3 files, which must be named NAME-00001-of-00003\.gguf"
        ):
            open_gguf(path)
    for count in (2**16 - 1, 99_999):  # a part that says so, which nothing else is beside
        path = tmp_path / f"m-00001-of-{count:05d}.gguf"
        path.write_bytes(raw.gguf([raw.entry("split.count", "u32", count)]))
        with pytest.raises(
            CheckpointError, match=r"m-00002-of-\d+\.gguf, m-00003-of-\d+\.gguf, \S+ and more are not there"
        ):
            open_gguf(path)


def test_links_of_a_part_to_itself_are_no_model(tmp_path):
    first, *others = split(tmp_path)
    for path in others:
        path.unlink()
        path.symlink_to(first)
    with pytest.raises(CheckpointError, match=r"split\.no is 0, and by m-00001-of-00003\.gguf must be 1"):
        open_gguf(first)


# -- what is no file, and what is large ----------------------------------------------------------------


def test_a_folder_or_nothing_is_an_error_of_the_system(tmp_path):
    with pytest.raises(IsADirectoryError):
        open_gguf(tmp_path)
    with pytest.raises(FileNotFoundError):
        open_gguf(tmp_path / "none.gguf")


@pytest.mark.skipif(sys.platform == "win32", reason="has no such pipes")
def test_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(CheckpointError, match="is no file but a pipe or a device"):
        open_gguf(tmp_path / "pipe")


def test_a_large_file_is_not_read(tmp_path):
    """A sparse file of 64 GB, of which a few kilobytes are on the disk."""
    layers, width = 32, 32_768
    lines = [raw.tensor(f"blk.{i}", (width, width), 8, i * width * width // 32 * 34) for i in range(layers)]
    path = tmp_path / "large.gguf"
    path.write_bytes(raw.gguf(raw.ENTRIES, lines))
    os.truncate(path, path.stat().st_size + layers * width * width // 32 * 34)
    tracemalloc.start()
    file = open_gguf(path)
    assert file.tensors["blk.31"].raw[width - 1, -1] == 0
    assert tracemalloc.get_traced_memory()[1] < 300_000
    tracemalloc.stop()
