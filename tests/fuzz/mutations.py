"""Small damages to a valid file: of its bytes, of the JSON in it, or of what a GGUF file counts by."""

import json
import random
import struct
from typing import Any

WORDS = (
    *(b"null", b"true", b"-1", b"0", b"1e999", b"NaN", b"Infinity", b"9" * 30, b"4294967296", b"2147483647", b"0.5"),
    *(b"[", b"]", b"{", b"}", b'"', b":", b",", b"\\ud83d", b"\\u0000", b"\xef\xbb\xbf", b"\xff\xfe", b"\0", b"\n"),
    *(b"'", b"&a ", b"*a", b"!!binary ", b"{{", b"}}", b"{%", b"%}", b" * 2000000000", b"../../x", b"/dev/zero"),
)
NUMBERS = (0, 1, 0x7F, 0x80, 0xFF, 0x7FFF, 0xFFFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, 2**63 - 1, 2**64 - 1)
LARGEST = 1 << 20  # bytes of a mutated file


def _values(random_: random.Random) -> Any:
    """Return a JSON value that is often of the wrong type, or too large."""
    deep: Any = 1
    for _ in range(random_.choice((3, 80, 400))):
        deep = [deep]
    choices = (
        *(None, True, False, 0, 1, -1, 2, 7, 2**31 - 1, 2**31, 2**32, 2**53, 2**63, 2**64, -(2**63), 10**30, 10**400),
        *(0.0, -0.5, 0.1, 1e-300, 1e300, float("nan"), float("inf"), -float("inf")),
        *("", "a", "0", "-1", "1e5", "../../etc/passwd", "/dev/zero", "\ud83d", "\0", "x" * 70_000, "F32", "silu"),
        *([], {}, [None], [1, 2], [[]], {"a": 1}, {"": None}, ["a", "b"], deep, [0] * 2000, {"content": "a"}),
    )
    return random_.choice(choices)


def _places(value: Any, limit: int = 400) -> list[tuple[Any, Any]]:
    """Return (container, key) of values inside of `value`."""
    found, level = [], [value]
    while level and len(found) < limit:
        outer = level.pop()
        keys = list(outer) if isinstance(outer, dict) else range(len(outer)) if isinstance(outer, list) else ()
        for key in keys:
            found.append((outer, key))
            if isinstance(outer[key], dict | list):
                level.insert(0, outer[key])
    return found


def mutate_json(value: Any, random_: random.Random) -> Any:
    """Return `value`, changed in place, with one to three members replaced, removed, added or exchanged."""
    for _ in range(random_.choice((1, 1, 1, 2, 3))):
        places = _places(value)
        if not places or random_.random() < 0.02:
            return _values(random_)
        container, key = random_.choice(places)
        what = random_.randrange(6)
        if what <= 2:
            container[key] = _values(random_)
        elif what == 3:
            del container[key]
        elif what == 4:
            other, there = random_.choice(places)
            try:
                container[key], other[there] = other[there], container[key]
                json.dumps(value)  # an exchange may have made a circle
            except (ValueError, KeyError, IndexError, RecursionError):
                return _values(random_)
        elif isinstance(container, dict):
            container[random_.choice(("", "a", "__metadata__", key + "x", "../x"))] = container[key]
        else:
            container.insert(key, container[key])
    return value


def mutate_bytes(data: bytes, random_: random.Random) -> bytes:
    """Return `data` with one to four damages: bits, pieces, numbers, words, its end."""
    raw = bytearray(data)
    for _ in range(random_.choice((1, 1, 1, 2, 4))):
        at = random_.randrange(len(raw) + 1)
        size = random_.choice((1, 1, 2, 4, 8, 30, 200))
        what = random_.randrange(10)
        if what == 0 and raw:
            raw[at % len(raw)] ^= 1 << random_.randrange(8)
        elif what == 1 and raw:
            raw[at % len(raw)] = random_.randrange(256)
        elif what == 2:
            del raw[at : at + size]
        elif what == 3:
            raw[at:at] = raw[at : at + size] * random_.choice((1, 1, 3, 50))
        elif what == 4:
            raw[at : at + size] = random_.randbytes(size)
        elif what == 5:
            raw[at:at] = random_.choice(WORDS) * random_.choice((1, 1, 1, 2, 300))
        elif what == 6:
            word = random_.choice(WORDS)
            raw[at : at + len(word)] = word
        elif what == 7:
            width = random_.choice((2, 4, 8))
            raw[at : at + width] = (random_.choice(NUMBERS) & ((1 << 8 * width) - 1)).to_bytes(width, "little")
        elif what == 8:
            there = random_.randrange(len(raw) + 1)
            raw[at : at + size] = raw[there : there + size]
        elif random_.random() < 0.3:
            del raw[at:]
    return bytes(raw[:LARGEST])


def mutate(data: bytes, random_: random.Random) -> bytes:
    """Return a damaged copy of a file's content; JSON, JSON lines, safetensors and GGUF often by their values."""
    if random_.random() < 0.6:
        for damage in (_as_gguf, _as_json, _as_safetensors, _as_lines):
            changed = damage(data, random_)
            if changed is not None:
                return changed[:LARGEST]
    return mutate_bytes(data, random_)


def _dump(value: Any) -> bytes:
    return json.dumps(value).encode()


def _as_json(data: bytes, random_: random.Random) -> bytes | None:
    if data[:1] not in (b"{", b"["):
        return None
    try:
        return _dump(mutate_json(json.loads(data), random_))
    except ValueError:
        return None


def _as_safetensors(data: bytes, random_: random.Random) -> bytes | None:
    length = int.from_bytes(data[:8], "little")
    if data[8:9] != b"{" or length > len(data):
        return None
    header = _dump(mutate_json(json.loads(data[8 : 8 + length]), random_))
    return len(header).to_bytes(8, "little") + header + data[8 + length :]


def _as_lines(data: bytes, random_: random.Random) -> bytes | None:
    lines = data.split(b"\n")
    at = random_.randrange(len(lines))
    if data[:1] != b"{":
        if b": " not in lines[at] or b"\0" in data:  # as YAML
            return None
        lines[at] = lines[at].split(b": ")[0] + b": " + _dump(_values(random_))
        return b"\n".join(lines)
    changed = _as_json(lines[at], random_)
    if changed is None:
        return None
    lines[at] = changed
    return b"\n".join(lines)


# -- GGUF ----------------------------------------------------------------------------------------

WIDTHS = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}  # bytes of a value, by its type


def _gguf_fields(data: bytes) -> tuple[list[tuple[int, int]], list[tuple[int, int, int]]]:
    """Return the numbers (place, width) that a valid file is read by, and its records: (count's place, first, last)."""
    fields, records, at = [(4, 4)], [], 8

    def number(width: int) -> int:
        nonlocal at
        fields.append((at, width))
        at += width
        return int.from_bytes(data[at - width : at], "little")

    def text() -> None:
        nonlocal at
        length = number(8)
        at += length

    def value(kind: int) -> None:
        if kind == 9:
            inner, count = number(4), number(8)
            for _ in range(count):
                value(inner)
        elif kind == 8:
            text()
        else:
            number(WIDTHS[kind])

    tensors, entries = number(8), number(8)
    for _ in range(entries):
        first = at
        text()
        value(number(4))
        records.append((16, first, at))
    for _ in range(tensors):
        first = at
        text()
        for _ in range(number(4)):
            number(8)
        number(4), number(8)
        records.append((8, first, at))
    return fields, records


def _as_gguf(data: bytes, random_: random.Random) -> bytes | None:
    if data[:4] != b"GGUF":
        return None
    raw = bytearray(data)
    fields, records = _gguf_fields(data)
    what = random_.randrange(8)
    if what == 0:  # a record twice, or missing, and counted so
        count, first, last = random_.choice(records)
        twice = random_.random() < 0.5
        raw[first:last] = data[first:last] * (2 * twice)
        struct.pack_into("<Q", raw, count, int.from_bytes(raw[count : count + 8], "little") + (1 if twice else -1))
        return bytes(raw)
    for _ in range(random_.choice((1, 1, 1, 2, 3))):
        at, width = random_.choice(fields)
        old = int.from_bytes(raw[at : at + width], "little")
        there, other_width = random_.choice(fields)
        other = int.from_bytes(data[there : there + other_width], "little")
        near = old + random_.choice((-32, -8, -1, 1, 8, 32, 256))
        new = random_.choice((near, near, old ^ 1 << random_.randrange(8 * width), other, random_.choice(NUMBERS)))
        raw[at : at + width] = (new & (1 << 8 * width) - 1).to_bytes(width, "little")
    return bytes(raw) if what > 1 else mutate_bytes(bytes(raw), random_)
