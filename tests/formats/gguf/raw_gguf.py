"""GGUF files as bytes, written out by hand and checked by nothing: what tests of the reader damage."""

import struct

import numpy as np

TYPES = {"u8": 0, "i8": 1, "u16": 2, "i16": 3, "u32": 4, "i32": 5, "f32": 6, "bool": 7, "str": 8, "u64": 10, "i64": 11}
TYPES |= {"f64": 12, "array": 9}
CODES = {"u8": "B", "i8": "b", "u16": "H", "i16": "h", "u32": "I", "i32": "i", "f32": "f", "bool": "?"}
CODES |= {"u64": "Q", "i64": "q", "f64": "d"}


def u32(*numbers):
    return struct.pack(f"<{len(numbers)}I", *numbers)


def u64(*numbers):
    return struct.pack(f"<{len(numbers)}Q", *numbers)


def text(content):
    raw = content.encode() if isinstance(content, str) else content
    return u64(len(raw)) + raw


def value(kind, content):
    """Return a value without its type; of an array, given as (type, items), with that of its items."""
    if kind == "array":
        inner, items = content
        return u32(TYPES[inner]) + u64(len(items)) + b"".join(value(inner, item) for item in items)
    return text(content) if kind == "str" else struct.pack(f"<{CODES[kind]}", content)


def entry(key, kind, content):
    return text(key) + u32(TYPES[kind]) + value(kind, content)


def tensor(name, sizes, kind, offset):
    """Return a tensor's line; sizes innermost first, ggml's number of its type."""
    return text(name) + u32(len(sizes)) + u64(*sizes) + u32(kind) + u64(offset)


def gguf(entries=(), tensors=(), data=b"", *, version=3, counts=None, alignment=32, magic=b"GGUF"):
    """Return a file of entries and tensors, bytes each, and of the tensors' own bytes."""
    n_tensors, n_entries = counts or (len(tensors), len(entries))
    head = magic + u32(version) + u64(n_tensors, n_entries) + b"".join(entries) + b"".join(tensors)
    return head + bytes(-len(head) % alignment) + data


def padded(raw, alignment=32):
    return raw + bytes(-len(raw) % alignment)


NUMBERS = np.arange(2 * 3 * 32, dtype=np.float32).reshape(2, 3, 32)
BYTES = np.arange(2 * 34, dtype=np.uint8)  # two rows of a block of Q8_0
ENTRIES = (
    entry("general.architecture", "str", "llama"),
    entry("a.u8", "u8", 200),
    entry("a.i8", "i8", -3),
    entry("a.u16", "u16", 60_000),
    entry("a.i16", "i16", -300),
    entry("a.u32", "u32", 4_000_000_000),
    entry("a.i32", "i32", -70_000),
    entry("a.f32", "f32", 0.5),
    entry("a.yes", "bool", True),
    entry("a.u64", "u64", 2**64 - 1),
    entry("a.i64", "i64", -(2**63)),
    entry("a.f64", "f64", 1e-300),
    entry("a.words", "array", ("str", ["a", "", "\u4f60\u597d", "\U0001f600"])),
    entry("a.numbers", "array", ("i32", [1, -2, 3])),
    entry("a.floats", "array", ("f32", [0.5, 1.5])),
    entry("a.bools", "array", ("bool", [True, False])),
    entry("a.none", "array", ("u16", [])),
    entry("a.nested", "array", ("array", [("i16", [1, 2]), ("str", ["x"]), ("array", [("u8", [7])])])),
)
TENSORS = (
    tensor("numbers", (32, 3, 2), 0, 0),
    tensor("blocks", (32, 2), 8, len(padded(NUMBERS.tobytes()))),
    tensor("vector", (5,), 1, len(padded(NUMBERS.tobytes()) + padded(BYTES.tobytes()))),
)
VECTOR = np.arange(5, dtype=np.float16)
DATA = padded(NUMBERS.tobytes()) + padded(BYTES.tobytes()) + VECTOR.tobytes()
VALID = gguf(ENTRIES, TENSORS, DATA)
